"""What is known of samplers and schedules without running them: names, options, papers. Imports no torch.

`SAMPLERS` and `SCHEDULES` map names to the facts recorded where the functions are defined. What is about
schedules imports numpy when it is first asked for.
"""

from __future__ import annotations

import difflib
import re
from functools import cache
from typing import Any

from ldm.errors import FieldError
from ldm.sampling import facts, samplers
from ldm.sampling.facts import SamplerFacts, ScheduleFacts

SAMPLERS: dict[str, SamplerFacts] = {name: facts.SAMPLERS[name] for name in samplers.SAMPLERS}


@cache
def schedules() -> dict[str, ScheduleFacts]:
    """Facts about schedules by name."""
    import ldm.sampling.schedule  # noqa: F401  its functions record them

    return facts.SCHEDULES


def __getattr__(name: str) -> Any:
    if name == "SCHEDULES":
        return schedules()
    if name == "RHO":  # the schedules with a rho, and its default
        return {name: known.rho for name, known in schedules().items() if known.rho is not None}
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def resolve(name: str) -> tuple[str, str | None]:
    """The sampler of any known spelling, and the schedule that the name implies, if it does.

    `euler_ancestral`, `Euler a`, `k_euler_a`, `sample_euler_ancestral` and `EulerAncestralDiscreteScheduler`
    are one; `DPM++ 2M Karras` implies a schedule. InputError names the nearest known ones.
    """
    plain = _plain(name)
    for suffix, schedule in {"": None, **_suffixes()}.items():
        if plain.endswith(suffix):
            stem = plain.removesuffix(suffix)
            for prefix in ("", "k", "sample"):
                if stem.startswith(prefix) and (sampler := _KNOWN.get(stem.removeprefix(prefix))):
                    return sampler, schedule
    near = _nearest(plain, _KNOWN)
    if plain.endswith("cfgpp"):  # ComfyUI's names: euler_cfg_pp
        text = "{sampler} {given} is not known: CFG++ is {cfg_pp} with ddim, ddpm, euler or euler_ancestral"
        raise FieldError(text, given=name)
    text = "{sampler} {given} is not known; {near} (--list_samplers shows all)"
    raise FieldError(text, given=name, near=near)


def resolve_schedule(name: str) -> str:
    """The schedule of a name in any spelling; InputError names the nearest known ones."""
    known = {_plain(schedule): schedule for schedule in schedules()}
    known |= {_plain(alias): schedule for schedule, of in schedules().items() for alias in of.aliases}
    if found := known.get(_plain(name)):
        return found
    near, choices = _nearest(_plain(name), known), ", ".join(schedules())
    text = "{schedule} {given} is not known; {near}; choose from {choices}"
    raise FieldError(text, given=name, near=near, choices=choices)


def uses_ends_only(sampler: str) -> bool:
    """Whether a sampler chooses its own levels between the ends of those that it is given."""
    return SAMPLERS[sampler].ends_only


def table() -> str:
    """All samplers, as text for a terminal."""
    rows = [("sampler", "order", "calls/step", "noise", "schedule", "arXiv", "also known as")]
    rows += [
        (name, str(s.order), s.calls, s.stochastic, s.schedule, s.paper, ", ".join(s.aliases))
        for name, s in SAMPLERS.items()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    described = [f"{name:<18}{what.description}" for name, what in schedules().items()]
    return "\n".join([*map(str.rstrip, lines), "", "schedule", *described])


def _plain(name: str) -> str:
    """The name without case, spaces and punctuation: "DPM++ 2M" and "dpmpp_2m" are one."""
    return re.sub("[^a-z0-9]", "", name.lower().replace("++", "pp"))


_KNOWN = {_plain(alias): name for name, s in SAMPLERS.items() for alias in (name, *s.aliases)}
_KNOWN |= {alias.removesuffix("scheduler"): name for alias, name in _KNOWN.items()}  # diffusers' classes


@cache
def _suffixes() -> dict[str, str]:
    """What a sampler's name may end with -> the schedule it implies.

    "Uniform" does not: ours is DPM-Solver's grid, A1111's is linspace.
    """
    theirs = {_plain(known.a1111): name for name, known in schedules().items() if known.a1111}
    plain = {_plain(name): name for name in schedules()}
    unambiguous = {suffix: name for suffix, name in plain.items() if theirs.get(suffix, name) == name}
    return unambiguous | {"k": "karras", "ka": "karras"}  # InvokeAI's and A1111's


def _nearest(plain: str, known: dict[str, str]) -> str:
    matches = difflib.get_close_matches(plain, known, 4, 0.6) or [k for k in known if k.startswith(plain[:4])]
    names = dict.fromkeys(known[match] for match in matches)
    return f"the nearest {'is' if len(names) == 1 else 'are'} {', '.join(names)}" if names else "none is near"
