"""What prompts were drawn from, where they have choices or wildcards."""

from __future__ import annotations

from dataclasses import dataclass

from ldm.fields import setting


@dataclass(frozen=True, kw_only=True, init=False, repr=False, eq=False)
class TemplateSettings:
    """What the prompts were drawn from; it decides nothing, and is only recorded."""

    prompt_template: str = setting(
        "",
        "the prompt before its choices were drawn",
        group="prompt",
        a1111="Template",
        per_image=True,
        recorded=False,
    )
    negative_template: str = setting(
        "",
        "the negative prompt before its choices were drawn",
        group="prompt",
        a1111="Negative Template",
        per_image=True,
        recorded=False,
    )
