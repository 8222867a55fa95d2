"""Between two prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ldm.errors import FieldError
from ldm.fields import setting


@dataclass(frozen=True, kw_only=True, init=False, repr=False, eq=False)
class WalkSettings:
    """Between two prompts, as the frames of a walk are; its way between two seeds is that of variations."""

    prompt_to: str = setting(
        "",
        "mix the prompt's embedding with this prompt's",
        metavar="TEXT",
        group="prompt",
        per_image=True,
        recorded=False,
    )
    prompt_mix: float = setting(
        0.0,
        "how far towards --prompt_to, 0 to 1",
        low=0,
        high=1,
        metavar="T",
        group="prompt",
        per_image=True,
        recorded=False,
    )

    def check_walk(self: Any) -> None:
        """FieldError for values that do not go together."""
        if bool(self.prompt_to) != bool(self.prompt_mix):
            given, lacking = ("prompt_to", "prompt_mix") if self.prompt_to else ("prompt_mix", "prompt_to")
            raise FieldError("{" + given + "} {value} without {" + lacking + "}", value=getattr(self, given))
        if not self.prompt_to or self.prompt_syntax == "plain":
            return
        from ldm.prompts import syntax
        from ldm.prompts.lora_tags import split_lora_tags

        if tags := split_lora_tags(self.prompt_to)[1]:
            raise FieldError(
                "{prompt_to} has a tag of the LoRA {lora!r}: only the prompt names some", lora=tags[0][0]
            )
        for name in ("prompt", "prompt_to"):
            prompt = getattr(self, name)
            text, _ = split_lora_tags(prompt)
            try:
                syntax.check(text, prompt=prompt)
            except syntax.PromptError as error:
                raise FieldError("{" + name + "}: {why}", why=str(error)) from None
            parts = syntax.composed(text)
            if len(parts) > 1 or syntax.changes(parts[0][0]):
                raise FieldError(
                    "{prompt_to} with AND or a schedule in {" + name + "}: embeddings are mixed once"
                )
