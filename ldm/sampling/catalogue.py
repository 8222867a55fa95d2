"""What is known of samplers and schedules without running them: names, options, papers. Imports no torch."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from ldm.errors import InputError

CHURN = ("s_churn", "s_tmin", "s_tmax", "s_noise")
ANCESTRAL = ("eta", "s_noise")

SCHEDULES = {
    "leading": "the original's DDIM and PLMS grid",
    "uniform": "the original's DPM-Solver grid: fractional timesteps from the last one to 0",
    "linspace": "k-diffusion's: even timesteps, both ends included",
    "trailing": "even timesteps that start at the last one",
    "karras": "even in sigma^(1/rho), rho 7",
    "exponential": "even in log sigma",
    "polyexponential": "log sigma along a power rho, here 1: exponential",
    "sgm_uniform": "generative-models': linspace without its last timestep",
    "ays": "Align Your Steps: 11 noise levels optimised for v1 and v2 models",
    "lcm": "of the 50 timesteps that latent consistency models are distilled on",
}
SCHEDULE_ALIASES = {"normal": "linspace", "alignyoursteps": "ays", "timeuniform": "uniform"}
RHO = {"karras": 7.0, "polyexponential": 1.0}  # the schedules with a rho, and its default


@dataclass(frozen=True)
class Sampler:
    """Facts about one sampler; `options` are its function's keyword arguments that a user may set."""

    schedule: str  # its default
    order: int
    calls: str  # model calls per step
    paper: str  # arXiv number
    aliases: tuple[str, ...]  # its names elsewhere
    options: tuple[str, ...] = ()
    noise: str = ""  # "": none, "plain": independent draws, "brownian": increments of one path

    @property
    def stochastic(self) -> str:
        """yes, no, or the option that makes it so."""
        if self.options == ANCESTRAL and self.calls not in ("N in all", "adaptive"):
            return "yes"
        return {(): "yes" if self.noise else "no", CHURN: "s_churn > 0"}.get(self.options, "eta > 0")


SAMPLERS = {
    "ddim": Sampler("leading", 1, "1", "2010.02502", ("DDIM", "DDIMScheduler"), ("eta",), "plain"),
    "plms": Sampler("leading", 4, "1 (first: 2)", "2202.09778", ("PLMS", "PNDM", "PNDMScheduler")),
    "ddpm": Sampler("leading", 1, "1", "2006.11239", ("DDPM", "DDPMScheduler"), (), "plain"),
    "euler": Sampler("linspace", 1, "1", "2206.00364", ("Euler", "EulerDiscreteScheduler"), CHURN, "plain"),
    "euler_ancestral": Sampler(
        "linspace",
        1,
        "1",
        "2006.11239",
        ("Euler a", "euler_a", "EulerAncestralDiscreteScheduler"),
        ANCESTRAL,
        "plain",
    ),
    "heun": Sampler("linspace", 2, "2", "2206.00364", ("Heun", "HeunDiscreteScheduler"), CHURN, "plain"),
    "dpm_2": Sampler("linspace", 2, "2", "2206.00364", ("DPM2", "KDPM2DiscreteScheduler"), CHURN, "plain"),
    "dpm_2_ancestral": Sampler(
        "linspace",
        2,
        "2",
        "2206.00364",
        ("DPM2 a", "dpm_2_a", "KDPM2AncestralDiscreteScheduler"),
        ANCESTRAL,
        "plain",
    ),
    "lms": Sampler("linspace", 4, "1", "2204.13902", ("LMS", "LMSDiscreteScheduler")),
    "dpm_fast": Sampler("linspace", 3, "N in all", "2206.00927", ("DPM fast",), ANCESTRAL, "plain"),
    "dpm_adaptive": Sampler(
        "linspace", 3, "adaptive", "2206.00927", ("DPM adaptive", "dpm_ad"), ANCESTRAL, "plain"
    ),
    "dpmpp_2s_ancestral": Sampler(
        "linspace",
        2,
        "2",
        "2211.01095",
        ("DPM++ 2S a", "DPM++ 2S Ancestral", "dpmpp_2s_a", "k_dpmpp_2_a"),
        ANCESTRAL,
        "plain",
    ),
    "dpmpp_sde": Sampler(
        "linspace",
        2,
        "2",
        "2211.01095",
        ("DPM++ SDE", "dpmpp_sde_gpu", "DPMSolverSDEScheduler"),
        ANCESTRAL,
        "brownian",
    ),
    "dpmpp_2m": Sampler(
        "uniform",
        2,
        "1",
        "2211.01095",
        ("DPM++ 2M", "dpm_solver", "DPMSolver", "DPM-Solver++", "k_dpmpp_2", "DPMSolverMultistepScheduler"),
    ),
    "dpmpp_2m_sde": Sampler(
        "exponential", 2, "1", "2211.01095", ("DPM++ 2M SDE", "dpmpp_2m_sde_gpu"), ANCESTRAL, "brownian"
    ),
    "dpmpp_3m_sde": Sampler(
        "exponential", 3, "1", "2211.01095", ("DPM++ 3M SDE", "dpmpp_3m_sde_gpu"), ANCESTRAL, "brownian"
    ),
    "unipc": Sampler(
        "uniform", 2, "1", "2302.04867", ("UniPC", "uni_pc", "uni_pc_bh2", "UniPCMultistepScheduler")
    ),
    "lcm": Sampler("lcm", 1, "1", "2310.04378", ("LCM", "LCMScheduler"), (), "plain"),
}


def resolve(name: str) -> tuple[str, str | None]:
    """The sampler of any known spelling, and the schedule that the name implies, if it does.

    `euler_ancestral`, `Euler a`, `k_euler_a`, `sample_euler_ancestral` and `EulerAncestralDiscreteScheduler`
    are one; `DPM++ 2M Karras` implies a schedule. InputError names the nearest known ones.
    """
    plain = _plain(name)
    for suffix, schedule in {"": None, **_SUFFIXES}.items():
        if plain.endswith(suffix):
            stem = plain.removesuffix(suffix)
            for prefix in ("", "k", "sample"):
                if stem.startswith(prefix) and (sampler := _KNOWN.get(stem.removeprefix(prefix))):
                    return sampler, schedule
    raise InputError(f"--sampler {name} is not known; {_nearest(plain, _KNOWN)} (--list_samplers shows all)")


def resolve_schedule(name: str) -> str:
    """The schedule of a name in any spelling; InputError names the nearest known ones."""
    known = {_plain(schedule): schedule for schedule in SCHEDULES} | SCHEDULE_ALIASES
    if found := known.get(_plain(name)):
        return found
    raise InputError(
        f"--schedule {name} is not known; {_nearest(_plain(name), known)}; choose from {', '.join(SCHEDULES)}"
    )


def table() -> str:
    """All samplers, as text for a terminal."""
    rows = [("sampler", "order", "calls/step", "stochastic", "schedule", "arXiv", "also known as")]
    rows += [
        (name, str(s.order), s.calls, s.stochastic, s.schedule, s.paper, ", ".join(s.aliases))
        for name, s in SAMPLERS.items()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    schedules = [f"{name:<18}{what}" for name, what in SCHEDULES.items()]
    return "\n".join([*map(str.rstrip, lines), "", "schedule", *schedules])


def _plain(name: str) -> str:
    """The name without case, spaces and punctuation: "DPM++ 2M" and "dpmpp_2m" are one."""
    return re.sub("[^a-z0-9]", "", name.lower().replace("++", "pp"))


_KNOWN = {_plain(alias): name for name, s in SAMPLERS.items() for alias in (name, *s.aliases)}
_KNOWN |= {alias.removesuffix("scheduler"): name for alias, name in _KNOWN.items()}  # diffusers' classes
_SUFFIXES = {_plain(name): name for name in SCHEDULES if name != "uniform"}
_SUFFIXES |= {"k": "karras", "ka": "karras"}  # InvokeAI's and A1111's


def _nearest(plain: str, known: dict[str, str]) -> str:
    matches = difflib.get_close_matches(plain, known, 4, 0.6) or [k for k in known if k.startswith(plain[:4])]
    names = dict.fromkeys(known[match] for match in matches)
    return f"the nearest {'is' if len(names) == 1 else 'are'} {', '.join(names)}" if names else "none is near"
