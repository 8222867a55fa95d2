"""The table of samplers and schedules: complete, true, and found by the names that other programs use."""

import inspect
import subprocess
import sys
from collections import Counter

import pytest
import torch
from closed_form import V1

from ldm.errors import InputError
from ldm.sampling import SAMPLERS, SCHEDULES, catalogue
from ldm.sampling.facts import USER_OPTIONS

NOT_OPTIONS = {"denoise", "x", "sigmas", "noise", "callback", "order", "rtol", "atol", "lower_order_final"}
NOT_OPTIONS |= {"gamma", "discretization"}

# What A1111, ComfyUI, k-diffusion, InvokeAI, Stability and diffusers call them
NAMES = {
    "ddim": ["ddim", "DDIM", "DDIMScheduler"],
    "plms": ["plms", "PLMS", "PNDM", "pndm", "PNDMScheduler"],
    "ddpm": ["ddpm", "DDPM", "DDPMScheduler"],
    "euler": ["euler", "Euler", "k_euler", "K_EULER", "sample_euler", "EulerDiscreteScheduler"],
    "euler_ancestral": [
        *("Euler a", "euler a", "euler_a", "k_euler_a", "k_euler_ancestral", "euler_ancestral"),
        *("Euler Ancestral", "sample_euler_ancestral", "EulerAncestralDiscreteScheduler"),
    ],
    "heun": ["Heun", "heun", "k_heun", "sample_heun", "HeunDiscreteScheduler"],
    "dpm_2": ["DPM2", "dpm_2", "dpm2", "k_dpm_2", "kdpm_2", "sample_dpm_2", "KDPM2DiscreteScheduler"],
    "dpm_2_ancestral": [
        *("DPM2 a", "dpm_2_ancestral", "dpm2_a", "k_dpm_2_a", "kdpm_2_a", "k_dpm_2_ancestral"),
        *("sample_dpm_2_ancestral", "KDPM2AncestralDiscreteScheduler"),
    ],
    "lms": ["LMS", "lms", "k_lms", "K-LMS", "sample_lms", "LMSDiscreteScheduler"],
    "dpm_fast": ["DPM fast", "dpm_fast", "k_dpm_fast", "sample_dpm_fast"],
    "dpm_adaptive": ["DPM adaptive", "dpm_adaptive", "k_dpm_ad", "sample_dpm_adaptive"],
    "dpmpp_2s_ancestral": [
        *("DPM++ 2S a", "dpmpp_2s_ancestral", "k_dpmpp_2s_a", "k_dpmpp_2s_ancestral"),
        *("sample_dpmpp_2s_ancestral", "k_dpmpp_2_a"),
    ],
    "dpmpp_sde": [
        *("DPM++ SDE", "dpmpp_sde", "dpmpp_sde_gpu", "k_dpmpp_sde", "sample_dpmpp_sde"),
        "DPMSolverSDEScheduler",
    ],
    "dpmpp_2m": [
        *("DPM++ 2M", "dpmpp_2m", "k_dpmpp_2m", "sample_dpmpp_2m", "DPMSolverMultistepScheduler"),
        *("dpm_solver", "DPM-Solver++", "k_dpmpp_2", "dpmsolver++"),
    ],
    "dpmpp_2m_sde": [
        "DPM++ 2M SDE",
        "dpmpp_2m_sde",
        "dpmpp_2m_sde_gpu",
        "k_dpmpp_2m_sde",
        "sample_dpmpp_2m_sde",
    ],
    "dpmpp_3m_sde": [
        "DPM++ 3M SDE",
        "dpmpp_3m_sde",
        "dpmpp_3m_sde_gpu",
        "k_dpmpp_3m_sde",
        "sample_dpmpp_3m_sde",
    ],
    "unipc": ["UniPC", "unipc", "uni_pc", "uni_pc_bh2", "UniPCMultistepScheduler"],
    "lcm": ["LCM", "lcm", "sample_lcm", "LCMScheduler"],
    "deis": ["DEIS", "deis", "sample_deis", "DEISMultistepScheduler"],
    "ipndm": ["IPNDM", "iPNDM", "ipndm", "sample_ipndm", "IPNDMScheduler"],
    "res_multistep": ["Res Multistep", "RES multistep", "res_multistep", "sample_res_multistep"],
    "gradient_estimation": ["Gradient Estimation", "gradient_estimation", "sample_gradient_estimation"],
    "er_sde": ["ER SDE", "ER-SDE", "er_sde", "sample_er_sde"],
    "tcd": ["TCD", "tcd", "sample_tcd", "TCDScheduler"],
}
WITH_SCHEDULE = [
    ("LMS Karras", "lms", "karras"),
    ("DPM2 Karras", "dpm_2", "karras"),
    ("DPM2 a Karras", "dpm_2_ancestral", "karras"),
    ("DPM++ 2S a Karras", "dpmpp_2s_ancestral", "karras"),
    ("DPM++ 2M Karras", "dpmpp_2m", "karras"),
    ("DPM++ SDE Karras", "dpmpp_sde", "karras"),
    ("DPM++ 2M SDE Karras", "dpmpp_2m_sde", "karras"),
    ("DPM++ 2M SDE Exponential", "dpmpp_2m_sde", "exponential"),
    ("DPM++ 3M SDE Karras", "dpmpp_3m_sde", "karras"),
    ("DPM++ 3M SDE Exponential", "dpmpp_3m_sde", "exponential"),
    ("DPM++ 3M SDE Polyexponential", "dpmpp_3m_sde", "polyexponential"),
    ("k_euler_a karras", "euler_ancestral", "karras"),
    ("k_dpmpp_2s_a_ka", "dpmpp_2s_ancestral", "karras"),
    ("k_dpm_2_ka", "dpm_2", "karras"),
    ("euler_k", "euler", "karras"),
    ("dpmpp_2m_sde_k", "dpmpp_2m_sde", "karras"),
    ("kdpm_2_k", "dpm_2", "karras"),
    ("Euler SGM Uniform", "euler", "sgm_uniform"),
    ("Euler trailing", "euler", "trailing"),
    ("DPM++ 2M AYS", "dpmpp_2m", "ays"),
]


def test_the_catalogue_lists_what_there_is():
    assert list(catalogue.SAMPLERS) == list(SAMPLERS)
    assert list(catalogue.SCHEDULES) == list(SCHEDULES)
    assert {facts.schedule for facts in catalogue.SAMPLERS.values()} <= set(SCHEDULES)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_options_are_the_functions_own(sampler):
    parameters = inspect.signature(SAMPLERS[sampler]).parameters
    facts = catalogue.SAMPLERS[sampler]
    assert [name for name in parameters if name not in NOT_OPTIONS] == list(facts.options)
    assert set(facts.options) <= set(USER_OPTIONS)
    assert facts.options == {name: parameters[name].default for name in facts.options}
    assert bool(facts.options) <= bool(facts.noise)  # they all are about noise
    assert facts.stochastic in ("never", "always", "always, --eta scales it", "with --eta", "with --s_churn")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_is_stochastic_is_so_by_default(sampler):
    """Or not: an option that has to be raised from 0."""
    facts = catalogue.SAMPLERS[sampler]
    option = {"with --eta": "eta", "with --s_churn": "s_churn"}.get(facts.stochastic)
    parameters = inspect.signature(SAMPLERS[sampler]).parameters
    if option:
        assert parameters[option].default == 0
    elif "eta" in facts.options:
        assert parameters["eta"].default == (0.3 if sampler == "tcd" else 1)
    assert (facts.stochastic == "never") == (not facts.noise)


def test_options_with_a_rho_are_the_schedules_that_take_it():
    taking = {name: inspect.signature(schedule).parameters.get("rho") for name, schedule in SCHEDULES.items()}
    assert {name: rho.default for name, rho in taking.items() if rho} == catalogue.RHO


@pytest.mark.parametrize(("name", "sampler"), [(name, s) for s, names in NAMES.items() for name in names])
def test_a_sampler_is_found_by_its_names_elsewhere(name, sampler):
    assert catalogue.resolve(name) == (sampler, None)


def test_every_sampler_has_its_names_in_this_test():
    assert set(NAMES) == set(SAMPLERS)


@pytest.mark.parametrize(("name", "sampler", "schedule"), WITH_SCHEDULE)
def test_a_name_may_imply_a_schedule(name, sampler, schedule):
    assert catalogue.resolve(name) == (sampler, schedule)
    joined = name.replace(" ", "_").lower()
    assert catalogue.resolve(joined) == (sampler, schedule)


def test_no_name_means_two_samplers():
    named = [
        (plain, sampler)
        for sampler, facts in catalogue.SAMPLERS.items()
        for plain in {catalogue._plain(name) for name in (sampler, *facts.aliases)}
    ]
    assert [plain for plain, count in Counter(plain for plain, _ in named).items() if count > 1] == []
    for plain, sampler in named:
        for prefixed in (plain, "k" + plain, "sample" + plain):
            assert catalogue.resolve(prefixed) == (sampler, None)
        for schedule in catalogue.SCHEDULES:
            if schedule != "uniform":
                assert catalogue.resolve(f"{plain} {schedule}") == (sampler, schedule)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("eular", "euler"),
        ("DPM++ 2N", "dpmpp_2m"),
        ("ddmi", "ddim"),
        ("dpmpp_2m_sd", "dpmpp_2m_sde"),
        ("lsm", "lms"),
    ],
)
def test_an_unknown_sampler_is_an_error_that_names_near_ones(name, near):
    with pytest.raises(InputError) as error:
        catalogue.resolve(name)
    assert f"sampler {name} is not known" in str(error.value)
    assert near in str(error.value).split("nearest")[1]


@pytest.mark.parametrize("name", ["euler_cfg_pp", "DPM++ 2M CFG++"])
def test_names_with_cfg_plus_plus_say_how_it_is_asked_for(name):
    with pytest.raises(InputError, match=r"is not known: CFG\+\+ is .*cfg_pp.* with ddim, ddpm, euler or"):
        catalogue.resolve(name)


@pytest.mark.parametrize(
    "name", ["", " ", "karras", "k_", "sample_", "zzzzzzzz", "++", "サンプラー", "uniform"]
)
def test_names_that_are_near_nothing_are_errors_too(name):
    with pytest.raises(InputError, match="is not known"):
        catalogue.resolve(name)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        *(("karras", "karras"), ("Karras", "karras"), ("SGM Uniform", "sgm_uniform"), ("AYS", "ays")),
        ("simple", "trailing"),
    ],
)
def test_a_schedule_is_found_in_any_spelling(name, schedule):
    assert catalogue.resolve_schedule(name) == schedule


@pytest.mark.parametrize(
    ("name", "near"), [("karas", "karras"), ("expo", "exponential"), ("train", "trailing")]
)
def test_an_unknown_schedule_is_an_error_that_names_near_ones(name, near):
    with pytest.raises(InputError, match=rf"^schedule {name} is not known; the nearest \w+ .*{near}"):
        catalogue.resolve_schedule(name)


def test_the_table_has_a_line_for_each_sampler_and_schedule():
    samplers, schedules = (part.splitlines() for part in catalogue.table().split("\n\n"))
    assert [line.split()[0] for line in samplers] == ["sampler", *SAMPLERS]
    assert [line.split()[0] for line in schedules] == ["schedule", *SCHEDULES]
    for line, facts in zip(samplers[1:], catalogue.SAMPLERS.values(), strict=True):
        assert all(word in line for word in (facts.calls, facts.paper, facts.schedule, *facts.aliases))


def test_importing_the_table_and_the_samplers_loads_neither_torch_nor_numpy():
    modules = "ldm.sampling, ldm.sampling.catalogue, ldm.sampling.samplers"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_names_and_schedules_are_checked_without_torch():
    code = (
        "import sys; from ldm.sampling import catalogue, plan_trajectory; catalogue.resolve('Euler Karras');"
        "catalogue.table(); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_order_of_the_table_does_not_depend_on_what_was_imported_first():
    code = "import ldm.sampling.exponential; from ldm.sampling import SAMPLERS; print(*SAMPLERS)"
    run = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert run.stdout.split() == list(SAMPLERS)


# --- facts that others act on


def test_unused_draws_are_the_originals():
    """Its DDIM drew in every step, its PLMS once more than it had steps, both to multiply by zero."""
    drawing = {
        name: (facts.unused_draws(7, 0.0), facts.unused_draws(7, 0.5))
        for name, facts in catalogue.SAMPLERS.items()
    }
    assert {name: draws for name, draws in drawing.items() if any(draws)} == {"ddim": (7, 0), "plms": (8, 8)}


def test_automatic_is_what_a1111_means_by_it():
    automatic = {name: facts.automatic for name, facts in catalogue.SAMPLERS.items() if facts.automatic}
    assert automatic == {
        **dict.fromkeys(("dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m"), "karras"),
        **dict.fromkeys(("dpmpp_2m_sde", "dpmpp_3m_sde"), "exponential"),
    }


def test_a1111s_names_of_schedules():
    names = {name: facts.a1111 for name, facts in catalogue.SCHEDULES.items() if facts.a1111}
    assert names == {
        "leading": "DDIM",
        "linspace": "Uniform",
        "trailing": "Simple",
        "karras": "Karras",
        "exponential": "Exponential",
        "polyexponential": "Polyexponential",
        "sgm_uniform": "SGM Uniform",
        "ays": "Align Your Steps",
        "kl_optimal": "KL Optimal",
        "beta": "Beta",
    }


def a1111_simple(n: int) -> list[float]:
    """Every (1000 / n)th of the timesteps, counted from the last one in whole numbers."""
    return [V1.sigma(999 - int(k * 1000 / n)) for k in range(n)] + [0.0]


def a1111_ddim(n: int) -> list[float]:
    return [*(V1.sigma(t) for t in reversed(range(1, 1000, 1000 // n))), 0.0]


@pytest.mark.parametrize("steps", [1, 2, 10, 20, 25, 50])
def test_a1111s_grids_that_we_have_under_other_names(steps):
    assert SCHEDULES["trailing"](V1, steps) == pytest.approx(a1111_simple(steps))
    assert SCHEDULES["leading"](V1, steps)[:-1] == pytest.approx(a1111_ddim(steps)[:-1])
    between = [V1.timestep(sigma) for sigma in SCHEDULES["trailing"](V1, steps + 1)[:-1]]
    theirs = [V1.timestep(sigma) for sigma in a1111_simple(steps + 1)[:-1]]
    assert between == pytest.approx(theirs, abs=1 + 1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_that_uses_only_the_ends_of_its_levels_says_so(name):
    """dpm_fast and dpm_adaptive took a list of sigmas without a word, and used two of them."""

    def levels(sigmas: list[float]) -> list[float]:
        called = []
        SAMPLERS[name](lambda x, sigma: called.append(sigma) or x * 0.5, torch.ones(1, 1, 1, 1), sigmas,
                       noise=lambda *_: torch.zeros(1, 1, 1, 1))  # fmt: skip
        return called

    same = levels([10.0, 7.0, 3.0, 0.1]) == levels([10.0, 5.0, 1.0, 0.1])
    assert catalogue.uses_ends_only(name) == same == (name in ("dpm_fast", "dpm_adaptive"))
    assert catalogue.SAMPLERS[name].adaptive == (name == "dpm_adaptive")
