"""The noise levels of one run: of a schedule or a user's list; image to image runs the last part of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from ldm.errors import FieldError
from ldm.sampling import catalogue
from ldm.sampling.schedule import SCHEDULES, Discretization, to_first_alpha


@dataclass(frozen=True)
class Trajectory:
    """The noise levels of one run."""

    sigmas: tuple[float, ...]  # descending, [steps + 1]
    start: float  # the level that an init image is noised to; the run takes it for sigmas[0]

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @classmethod
    def of(cls, grid: np.ndarray, steps: int | None = None, original: bool = False) -> Trajectory:
        """The last `steps` steps of a grid of sigmas, by default all of them.

        An init image is noised to the first level of the run, or with `original`, which is for the `leading`
        grid, to the level above as the original does.
        """
        first = 0 if steps is None else len(grid) - 1 - steps
        start = max(first - 1, 0) if original else first
        return cls(tuple(grid[first:].tolist()), float(grid[start]))

    @property
    def shortest(self) -> float:
        """The smallest relative step 1 - sigma_next / sigma; 1 if there is no step."""
        return min((1 - after / sigma for sigma, after in pairwise(self.sigmas)), default=1.0)


# smallest relative step: float32 resolution; leaf spacing of the finer Brownian tree
SHORTEST_STEP = {"": 1e-6, "plain": 1e-6, "brownian": 1e-4}  # by the sampler's noise


def plan_trajectory(
    discretization: Discretization,
    sampler: str,
    steps: int,
    steps_to_run: int | None = None,
    *,
    schedule: str | None = None,
    rho: float | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
) -> Trajectory:
    """The last `steps_to_run` (by default all) of `steps` steps on a schedule, by default the sampler's own.

    `rho` is the schedule's. Descending `timesteps`, or descending `sigmas` with the final one included, take
    the place of a schedule; `steps` is their number then. FieldError if two levels of the steps that are run
    are too near each other.
    """
    name = schedule or catalogue.SAMPLERS[sampler].schedule
    original = False
    if sigmas:
        grid, advice = np.array(sigmas, dtype=np.float64), "take other {sigmas}"
    elif timesteps:
        grid, advice = to_first_alpha(discretization, timesteps), "take other {timesteps}"
    else:
        grid = SCHEDULES[name](discretization, steps, **({} if rho is None else {"rho": rho}))
        original, advice = catalogue.SCHEDULES[name].level_above, "take fewer {steps}" + _even_rho(name)
    run = Trajectory.of(grid, steps_to_run, original)
    if run.shortest < SHORTEST_STEP[catalogue.SAMPLERS[sampler].noise]:
        sigma, after = min(pairwise(run.sigmas), key=lambda levels: 1 - levels[1] / levels[0])
        raise FieldError(
            "noise levels {sigma:.6g} and {after:.6g} follow each other: too near for {which}; " + advice,
            sigma=sigma,
            after=after,
            which=sampler,
        )
    return run


def _even_rho(schedule: str) -> str:
    """Which --rho makes a schedule's smallest relative step larger, if it takes one."""
    even = catalogue.SCHEDULES[schedule].even_rho
    if math.isnan(even):
        return ""
    return " or a larger {rho}" if math.isinf(even) else f" or a {{rho}} nearer to {even:g}"


def own_steps(run: Trajectory, discretization: Discretization) -> Trajectory:
    """A run for a sampler that chooses its steps: its ends, and the lowest level before there is no noise."""
    lowest = discretization.sigma(0.0)
    if run.sigmas[-1] > 0 or run.sigmas[0] <= lowest:
        return run
    return replace(run, sigmas=(run.sigmas[0], lowest, 0.0))


def guided_steps(steps: int, start: float, end: float) -> tuple[int, int]:
    """(first, last): guided are the steps i with start <= i / steps < end, which are first <= i < last.

    `start` and `end` are parts of the run, 0 … 1. FieldError if no step is within.
    """
    first, last = (math.ceil(round(part * steps, 6)) for part in (start, end))
    if steps and first >= last:
        raise FieldError(
            "none of the {steps} steps is within {guidance_start} {start:g} and {guidance_end} {end:g}; "
            "{scale} 1 samples without guidance",
            steps=steps,
            start=start,
            end=end,
        )
    return first, last


def guidance_interval(run: Trajectory, start: float, end: float) -> tuple[float, float]:
    """The sigmas (above, up to) of the steps from part `start` to part `end` of a run, of 0 … 1.

    The run's own ends are open: a sampler may go beyond them. Calls within a step go by their own levels.
    FieldError if no step is within.
    """
    first, last = guided_steps(run.steps, start, end)
    low = run.sigmas[last] if last < run.steps else -math.inf
    return low, run.sigmas[first] if first else math.inf
