"""The noise levels of a run: of a schedule or a list of one's own, all of them or the last part."""

import itertools

import numpy as np
import pytest
from closed_form import V1, V1_ALPHAS

from ldm.errors import InputError
from ldm.sampling import SCHEDULES, Trajectory, catalogue, guidance_interval, own_steps, plan_trajectory
from ldm.sampling.schedule import karras, lcm, leading, leading_timesteps, linspace, to_first_alpha, uniform

FIRST = np.sqrt(1 / V1_ALPHAS[0] - 1)  # sigma of timestep 0


@pytest.mark.parametrize("steps_to_run", [0, 1, 29, 49, 50, None])
def test_a_part_of_the_steps_is_the_last_one(steps_to_run):
    run = plan_trajectory(V1, "ddim", 50, steps_to_run)
    assert run.steps == (50 if steps_to_run is None else steps_to_run)
    assert run.sigmas == tuple(leading(V1, 50)[50 - run.steps :])


@pytest.mark.parametrize("name", SCHEDULES)
def test_an_init_image_is_noised_to_the_first_level(name):
    """The original, whose grid `leading` is, noises to the level above; at full strength there is none."""
    grid = SCHEDULES[name](V1, 20)
    run = plan_trajectory(V1, "ddim", 20, 12, schedule=name)
    assert run.sigmas == tuple(grid[-13:])
    assert run.start == (grid[-14] if name == "leading" else grid[-13])
    whole = plan_trajectory(V1, "ddim", 20, 20, schedule=name)
    assert whole.sigmas == tuple(grid)
    assert whole.start == grid[0]


def test_a_trajectory_is_the_tail_of_a_grid():
    grid = np.array([3.0, 2.0, 1.0, 0.0])
    assert Trajectory.of(grid).sigmas == (3.0, 2.0, 1.0, 0.0)
    assert Trajectory.of(grid, 2).sigmas == (2.0, 1.0, 0.0)
    assert [Trajectory.of(grid, 2, original).start for original in (False, True)] == [2.0, 3.0]
    assert Trajectory.of(grid, 0).steps == 0
    assert Trajectory.of(grid).start == 3.0


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpmpp_2m", "euler", "lcm"])
def test_a_sampler_has_a_schedule_of_its_own(sampler):
    own = {"ddim": leading, "plms": leading, "dpmpp_2m": uniform, "euler": linspace, "lcm": lcm}[sampler]
    assert plan_trajectory(V1, sampler, 9).sigmas == tuple(own(V1, 9))
    named = plan_trajectory(V1, sampler, 9, schedule="karras", rho=5.0)
    assert named.sigmas == tuple(karras(V1, 9, 5.0))


def test_own_sigmas_are_taken_as_they_are():
    run = plan_trajectory(V1, "ddim", 3, sigmas=(14.6, 3.0, 0.5, 0.0))
    assert run.sigmas == (14.6, 3.0, 0.5, 0.0)
    assert run.start == 14.6
    tail = plan_trajectory(V1, "ddim", 3, 2, sigmas=(14.6, 3.0, 0.5, 0.1))
    assert tail.sigmas == (3.0, 0.5, 0.1)
    assert tail.start == 3.0


def test_own_timesteps_end_like_the_originals():
    run = plan_trajectory(V1, "ddim", 3, timesteps=(999, 700.5, 100))
    assert run.sigmas == pytest.approx((*V1.sigma(np.array([999, 700.5, 100])), FIRST))
    tail = plan_trajectory(V1, "ddim", 3, 1, timesteps=(999, 700.5, 100))
    assert tail.sigmas == pytest.approx((V1.sigma(100), FIRST))
    assert tail.start == tail.sigmas[0]  # the level above is far away


def test_own_timesteps_that_visit_0_end_without_noise():
    assert to_first_alpha(V1, (500, 0)) == pytest.approx([V1.sigma(500), FIRST, 0.0])


def test_the_originals_timesteps_are_its_grid():
    listed = plan_trajectory(V1, "ddim", 20, 12, timesteps=leading_timesteps(20).tolist())
    assert listed.sigmas == plan_trajectory(V1, "ddim", 20, 12).sigmas


@pytest.mark.parametrize(
    "changes",
    [
        {"sampler": "unipc", "schedule": "polyexponential", "rho": 20.0, "steps": 40},
        {"sampler": "dpmpp_2m", "schedule": "polyexponential", "rho": 12.0, "steps": 50},
        {"sampler": "dpmpp_sde", "sigmas": (14.0, 13.99999999999999, 5.0, 0.0), "steps": 3},
        {"sampler": "dpmpp_2m_sde", "sigmas": (10.0, 9.9999, 0.0), "steps": 2},
    ],
)
def test_levels_too_near_are_refused(changes):
    """They divided by zero, made NaN, or noise that was far too large."""
    with pytest.raises(InputError, match="follow each other: too near for"):
        plan_trajectory(V1, **changes)


def smallest_relative_step(schedule: str, steps: int, rho: float) -> float:
    levels = SCHEDULES[schedule](V1, steps, rho=rho)[:-1]
    return min(1 - sigma_next / sigma for sigma, sigma_next in itertools.pairwise(levels))


@pytest.mark.parametrize(
    ("schedule", "rhos", "advice"),
    [
        ("karras", (0.1, 0.5, 1.0, 3.0, 7.0, 20.0, 100.0), "or a larger rho"),
        ("polyexponential", (20.0, 7.0, 2.0, 1.0), "or a rho nearer to 1"),
        ("polyexponential", (0.1, 0.5, 0.9, 1.0), "or a rho nearer to 1"),
    ],
)
def test_the_advice_about_rho_widens_the_smallest_step(schedule, rhos, advice):
    """It was "a smaller --rho", which for Karras makes the steps at high noise smaller still."""
    smallest = [smallest_relative_step(schedule, 50, rho) for rho in rhos]
    assert smallest == sorted(smallest)
    with pytest.raises(InputError, match=f"take fewer steps {advice}$"):
        plan_trajectory(V1, "dpmpp_sde", 20_000, schedule=schedule, rho=rhos[0])


def test_the_advice_is_about_what_was_given():
    with pytest.raises(InputError, match=r"too near for dpmpp_sde; take other sigmas$"):
        plan_trajectory(V1, "dpmpp_sde", 2, sigmas=(10.0, 9.9999, 0.0))
    with pytest.raises(InputError, match=r"too near for dpmpp_sde; take fewer steps$"):
        plan_trajectory(V1, "dpmpp_sde", 100_000, schedule="exponential")


@pytest.mark.parametrize("steps", [1, 2, 20, 1000])
@pytest.mark.parametrize("sampler", catalogue.SAMPLERS)
def test_no_grid_of_a_sampler_is_too_near(sampler, steps):
    assert plan_trajectory(V1, sampler, steps).steps == steps


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m_sde"])
def test_no_named_schedule_is_too_near(sampler, schedule):
    """`beta` was refused from 270 steps on for the samplers whose noise follows a Brownian path."""
    for steps in (269, 300, 1000):
        assert plan_trajectory(V1, sampler, steps, schedule=schedule).steps == steps


def test_only_the_steps_that_are_run_can_be_too_near():
    """Image to image was refused for levels above its strength, which it never visits."""
    near = (14.6, 14.5999999, 3.0, 0.5, 0.0)
    with pytest.raises(InputError, match=r"noise levels 14.6 and 14.6 follow"):
        plan_trajectory(V1, "ddim", 4, 4, sigmas=near)
    assert plan_trajectory(V1, "ddim", 4, 3, sigmas=near).shortest == pytest.approx(1 - 3 / 14.5999999)


@pytest.mark.parametrize("steps", [1, 2, 50])
def test_steps_of_its_own_go_from_end_to_end(steps):
    """dpm_adaptive with --steps 1 was a single model call."""
    for name in ("linspace", "trailing", "karras"):
        run = own_steps(plan_trajectory(V1, "dpm_adaptive", steps, schedule=name), V1)
        assert run.sigmas == (V1.sigma(999), V1.sigma(0), 0.0)


def test_a_sampler_that_chooses_its_steps_is_given_the_ends_of_its_run():
    """Also above no noise, and of a run that starts at the lowest level, nothing is added."""
    above = Trajectory((14.0, 3.0, 0.5), 14.0)
    lowest = Trajectory((V1.sigma(0), 0.0), V1.sigma(0))
    assert own_steps(above, V1) is above
    assert own_steps(lowest, V1) is lowest


def test_no_step_within_the_guidance_interval_is_an_error():
    run = Trajectory.of(linspace(V1, 10))
    with pytest.raises(InputError, match="none of the 10 steps is within guidance_start"):
        guidance_interval(run, 0.5, 0.5)
