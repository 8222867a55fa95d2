"""`--expand` and `--wildcards`: lines of templates become lines of plain prompts, before a run begins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from random import Random

from ldm.cli.parser import in_flags
from ldm.cli.prompts import Line
from ldm.errors import FieldError, InputError
from ldm.pipeline.request import ImageRequest
from ldm.prompts.wildcards import Template, Wildcards

MAX_LINES = 100_000  # that --expand all makes


class Expansion:
    """How prompts and negative prompts are expanded. FieldError if the folder of wildcards is not there."""

    def __init__(self, mode: str, folder: str | None):
        self.mode = mode
        self.wildcards = Wildcards(folder)

    def lines(self, lines: Sequence[Line]) -> list[Line]:
        """The lines with their templates checked; with `all` one for each combination, in order.

        InputError for malformed templates and unknown wildcards, and for too many combinations.
        """
        if self.mode == "random":
            for line in lines:
                self._templates(line)
            return list(lines)
        found: list[Line] = []
        counts = [_count(self._templates(line)) for line in lines]
        if (total := sum(counts)) > MAX_LINES:
            _, line = max(zip(counts, lines, strict=True), key=lambda pair: pair[0])
            about = f"{total:,}" if total < 10**9 else f"at least 10^{len(str(total)) - 1}"
            raise placed(
                line,
                InputError(
                    f"--expand all: {about} combinations, {MAX_LINES:,} are the most; --expand random draws "
                    "one for each image"
                ),
            )
        for line in lines:
            found += _combinations(line, self._templates(line))
        return found

    def draw(self, request: ImageRequest, seed: int) -> ImageRequest:
        """The request with a prompt and a negative prompt that its templates, and the seed, decide."""
        random = Random(seed)
        texts = (request.prompt, request.negative_prompt)
        drawn = [self.wildcards.template(text).draw(random) for text in texts]
        return request.twin(
            prompt=drawn[0],
            negative_prompt=drawn[1],
            prompt_template=_template(texts[0], drawn[0]),
            negative_template=_template(texts[1], drawn[1]),
        )

    def changes(self, lines: Sequence[Line]) -> bool:
        """Whether any of the lines has a choice, a wildcard or an escape."""
        return any(
            line.templates != ("", "") or not all(template.is_plain for template in self._templates(line))
            for line in lines
        )

    def check_plain(self, name: str, text: str, line: Line) -> None:
        """InputError for a setting of a line that is not expanded, and has choices, wildcards or escapes."""
        try:
            if not self.wildcards.template(text).is_plain:
                raise FieldError(
                    "{" + name + "} {text!r} with {expand}: it is not expanded; write out what it is to say",
                    text=text,
                )
        except InputError as error:
            raise placed(line, error) from error

    def _templates(self, line: Line) -> tuple[Template, Template]:
        try:
            return self.wildcards.template(line.prompt), self.wildcards.template(line.negative)
        except InputError as error:
            raise placed(line, error) from error


def _count(templates: tuple[Template, Template]) -> int:
    return templates[0].count * templates[1].count


def _combinations(line: Line, templates: tuple[Template, Template]) -> Iterator[Line]:
    """The line with each prompt and, changing first, each negative prompt."""
    for prompt, negative in product(*(template.all() for template in templates)):
        before = (_template(line.prompt, prompt), _template(line.negative, negative))
        yield replace(line, prompt=prompt, negative=negative, templates=before)


def _template(text: str, drawn: str) -> str:
    """What is recorded as the template: nothing where the prompt is the same."""
    return "" if text == drawn else text


def placed(line: Line, error: InputError) -> InputError:
    """The error with the place of its line in the prompt file."""
    return InputError(f"--from-file {line.place}: {in_flags(error)}") if line.place else error
