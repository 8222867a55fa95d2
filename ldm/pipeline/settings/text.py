"""How a prompt is read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, NamedTuple

from ldm.errors import FieldError
from ldm.fields import setting
from ldm.pipeline.settings import without_none
from ldm.prompts.lora_tags import TAG, split_lora_tags

PLAIN, A1111 = "plain", "a1111"  # syntaxes
EMBEDDING = re.compile(r"(?P<file>.+\.(?:pt|bin|safetensors))(?::(?P<name>[^:]*))?", re.IGNORECASE)


class Reading(NamedTuple):
    """All that decides, besides a text, what the text encoder makes of it."""

    syntax: str = PLAIN
    long: bool = False
    clip_skip: int | None = None
    embedding: tuple[str, ...] = ()


class Texts(NamedTuple):
    """What a request's UNet reads at one step."""

    parts: tuple[tuple[str, float], ...]  # of the prompt: text, weight
    negative: str


class EmbeddingFile(NamedTuple):
    """`FILE[:name]`, taken apart."""

    path: str
    name: str  # by which prompts call it; "" is left to the file

    @classmethod
    def parse(cls, text: str) -> EmbeddingFile:
        """FieldError for a text without a file, or a name without a letter or digit."""
        found = EMBEDDING.fullmatch(text)
        path, name = (found["file"], found["name"]) if found else (text, None)
        if not path.strip() or not PurePath(path).name:
            raise FieldError("{embedding} {text!r} names no file; give FILE or FILE:name", text=text)
        if name is not None and not any(map(str.isalnum, name)):
            raise FieldError("{embedding} {text!r}: its name has no letter or digit", text=text)
        return cls(path, (name or "").strip())

    def __str__(self) -> str:
        return f"{self.path}:{self.name}" if self.name else self.path


@dataclass(frozen=True, kw_only=True, init=False, repr=False, eq=False)
class TextSettings:
    """How a prompt is read."""

    prompt_syntax: str = setting(
        PLAIN,
        "a1111: weights, schedules, BREAK and AND as in AUTOMATIC1111's web UI (docs/prompts.md)",
        choices=(PLAIN, A1111),
        group="prompt",
        a1111="Prompt syntax",
        per_image=True,
        recorded=False,
    )
    long_prompts: bool = setting(
        False,
        "read prompts of any length, in chunks of 75 tokens, instead of cutting them",
        group="prompt",
        a1111="Long prompts",
        per_image=True,
        recorded=False,
    )
    clip_skip: int | None = setting(
        None,
        "read the text encoder's N-th layer from the end; 1 is the last",
        low=1,
        high=99,
        metavar="N",
        group="prompt",
        default_text="the model's: 1 for v1, 2 for v2",
        a1111="Clip skip",
        per_image=True,
        recorded=False,
    )
    embedding: tuple[str, ...] = setting(
        (),
        "a textual inversion that prompts call by its file's name, or by another one; none: not those of "
        "--like",
        metavar="FILE[:name]",
        group="prompt",
        per_image=True,
        recorded=False,
    )

    def check_text(self) -> None:
        """FieldError for prompts with a mistake and for values that do not go together."""
        without_none(self, "embedding")
        for text in self.embedding:
            EmbeddingFile.parse(text)
        if self.prompt_syntax == PLAIN:
            return
        from ldm.prompts import syntax

        for name in ("prompt", "negative_prompt"):
            try:
                prompt = getattr(self, name)
                text, _ = split_lora_tags(prompt)
                syntax.check(text, negative=name == "negative_prompt", prompt=prompt)
            except syntax.PromptError as error:
                raise FieldError("{" + name + "}: {why}", why=str(error)) from None

    @property
    def reading(self) -> Reading:
        """How this request's texts are read."""
        return Reading(self.prompt_syntax, self.long_prompts, self.clip_skip, self.embedding)

    def _composed(self) -> tuple[tuple[str, float], ...]:
        """The prompt's conditions, each with its weight."""
        if self.prompt_syntax == PLAIN:
            return ((self.prompt, 1.0),)
        from ldm.prompts import syntax

        return syntax.composed(split_lora_tags(self.prompt)[0])

    @property
    def parts(self) -> int:
        """The number of conditions that are composed with weights; 0 for the usual single one."""
        parts = self._composed()
        return 0 if len(parts) == 1 and parts[0][1] == 1.0 else len(parts)

    @property
    def rows(self: Any) -> int:
        """How many predictions an image takes of the UNet at each step; `scale` has to be known."""
        return 1 + (self.parts or self.guided)

    @property
    def total_weight(self) -> float:
        """The sum of the weights of the prompt's conditions; 1 for the usual single one."""
        return sum(weight for _, weight in self._composed())

    @property
    def changes_over_steps(self) -> bool:
        """Whether the texts are not the same at all steps."""
        if self.prompt_syntax == PLAIN:
            return False
        from ldm.prompts import syntax

        prompt, negative = (split_lora_tags(text)[0] for text in (self.prompt, self.negative_prompt))
        # in a negative prompt AND is a word
        return any(map(syntax.changes, [*(part for part, _ in syntax.composed(prompt)), negative]))

    def switching(self: Any) -> tuple:
        """At which steps of each pass the texts change; () if they are the same at all of them.

        DeepCache computes everything where a condition is new. So that an image is that of a batch, its
        condition is new at its own steps alone: images of one batch agree in this.
        """
        if not self.changes_over_steps:
            return ()
        from ldm.prompts import syntax

        texts = (*(text for text, _ in self._composed()), split_lora_tags(self.negative_prompt)[0])
        found = [syntax.switching(texts, max(1, self.steps_to_run))]
        if self.hires is not None:
            found.append(syntax.switching(texts, max(1, self.second_steps), second=True))
        return tuple(found) if any(found) else ()

    def texts(self, step: int, steps: int, second: bool = False) -> Texts:
        """The texts at a step, from 1, of a run of `steps`, or of its `second` pass.

        In a negative prompt AND is a word, as in the web UI.
        """
        if self.prompt_syntax == PLAIN:
            return Texts(self._composed(), self.negative_prompt)
        from ldm.prompts import syntax

        def at_step(text: str) -> str:
            return syntax.text_at(syntax.parse(text).items, step, steps, second)

        negative, _ = split_lora_tags(self.negative_prompt)
        return Texts(tuple((at_step(text), weight) for text, weight in self._composed()), at_step(negative))

    def all_texts(self) -> list[Texts]:
        """The different texts over the steps of a run."""
        steps = max(1, self.steps_to_run)
        count = steps if self.changes_over_steps else 1
        return list(dict.fromkeys(self.texts(step, steps) for step in range(1, count + 1)))

    def readings(self: Any, *, negative: bool = False) -> Iterator[str]:
        """What the text encoder reads over the steps of all passes, of the prompts or of the negative one.

        Without marks and LoRA tags; the same text may come again. PromptError for weights that are none.
        """
        if self.prompt_syntax == PLAIN:
            yield from (self.negative_prompt,) if negative else (self.prompt, self.prompt_to)
            return
        from ldm.prompts import syntax

        texts = [split_lora_tags(self.negative_prompt)[0]]
        if not negative:
            texts = [*(text for text, _ in self._composed()), self.prompt_to]
        passes = [(self.steps_to_run, False)]
        if self.hires is not None:
            passes.append((self.second_steps, True))
        for steps, second in passes:
            for text in texts:
                yield from syntax.readings(text, max(1, steps), second)

    def text_notices(self) -> list[str]:
        """What the language reads otherwise than its user may mean, a line each."""
        found = []
        if self.prompt_syntax == PLAIN and (tag := TAG.search(self.prompt)):
            found.append(
                f"{tag[0]} in the prompt is read as text; --prompt_syntax {A1111} or --lora names a LoRA"
            )
        if tag := TAG.search(self.negative_prompt):
            found.append(f"{tag[0]} in the negative prompt loads no LoRA; only the prompt names some")
        parts = self._composed()
        if len(parts) == 1 and parts[0][1] != 1.0:
            weight = f"{parts[0][1]:g}"
            found.append(
                f"The prompt ends in :{weight}, which multiplies the guidance of all of it; a colon that is "
                r"meant is written \:"
            )
        return found
