"""Facts about samplers and schedules, each recorded where its function is defined.

Imports neither torch nor numpy.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

Function = TypeVar("Function", bound=Callable)

USER_OPTIONS = ("eta", "s_churn", "s_tmin", "s_tmax", "s_noise")  # a sampler's keywords that a user may set


@dataclass(frozen=True)
class SamplerFacts:
    """What is known of one sampler without running it."""

    aliases: tuple[str, ...]  # its names elsewhere; the first is AUTOMATIC1111's
    order: int
    calls: str  # model calls per step
    schedule: str  # its default
    paper: str  # arXiv number
    noise: str = ""  # "": none, "plain": independent draws, "brownian": increments of one path
    automatic: str | None = None  # the schedule that A1111's "Schedule type: Automatic" means for it
    ends_only: bool = False  # of `sigmas` only the ends count, and how many there are
    by_timesteps: bool = False  # is given the model's `discretization`
    adaptive: bool = False  # chooses its own steps, by the whole batch: images are sampled one at a time
    # (steps, eta) -> how often the original's sampler draws noise only to multiply it by zero
    unused_draws: Callable[[int, float], int] = lambda steps, eta: 0
    options: dict[str, float] = field(default_factory=dict)  # of USER_OPTIONS, with their defaults

    @property
    def stochastic(self) -> str:
        """Whether steps add noise: never, always, or with the option that makes them."""
        if not self.noise:
            return "never"
        if "s_churn" in self.options:
            return "with --s_churn"
        if "eta" not in self.options:
            return "always"
        return "always, --eta scales it" if self.options["eta"] > 0 else "with --eta"


@dataclass(frozen=True)
class ScheduleFacts:
    """What is known of one schedule without computing it."""

    description: str
    aliases: tuple[str, ...] = ()
    a1111: str | None = None  # AUTOMATIC1111's name for (about) the same noise levels
    level_above: bool = False  # an init image is noised to the level above a run's first one
    rho: float | None = None  # default of its `rho`; None: it takes none
    even_rho: float = math.nan  # the rho at which its smallest relative step is largest

    def __str__(self) -> str:
        return self.description


# by name, as their modules were imported; the table's order is `catalogue`'s
SAMPLERS: dict[str, SamplerFacts] = {}
SCHEDULES: dict[str, ScheduleFacts] = {}


def sampler(
    *aliases: str, order: int, calls: str, schedule: str, paper: str, **facts: object
) -> Callable[[Function], Function]:
    """Records the facts about a sampler under its function's name; the function stays as it is."""

    def record(function: Function) -> Function:
        parameters = inspect.signature(function).parameters
        options = {name: parameters[name].default for name in parameters if name in USER_OPTIONS}
        SAMPLERS[function.__name__] = SamplerFacts(
            aliases, order, calls, schedule, paper, options=options, **facts
        )
        return function

    return record


def schedule(description: str, *aliases: str, **facts: object) -> Callable[[Function], Function]:
    """Records the facts about a schedule under its function's name; the function stays as it is."""

    def record(function: Function) -> Function:
        rho = inspect.signature(function).parameters.get("rho")
        SCHEDULES[function.__name__] = ScheduleFacts(description, aliases, rho=rho and rho.default, **facts)
        return function

    return record
