"""The original's sampler classes, called as notebooks call them.

Golden records hold plain sampling. The rest is held against a loop written here from the original's formulae,
on the same random numbers.
"""

import functools
import inspect
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace

import pytest
import tiny
import torch
from golden_files import case, golden_file, manifest, pseudo_state_dict
from torch import Tensor

from ldm.models.diffusion.ddim import DDIMSampler, GlobalNoise
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.sampling.noise import CompvisNoise
from ldm.util import instantiate_from_config
from ldm.weights.loading import read_config

SAMPLERS = {"ddim": DDIMSampler, "plms": PLMSSampler, "dpm": DPMSolverSampler}
SHAPE = (2, 4, 4, 4)
STEPS = 8


@pytest.fixture(scope="module")
def golden():
    return case("samplers_mini-v1")[0]


@pytest.fixture(scope="module")
def mini_v1() -> LatentDiffusion:
    """mini-v1 without its text encoder, on stand-in weights."""
    config = read_config(golden_file("configs/mini-v1.yaml"))
    config["params"]["cond_stage_config"] = {"target": "torch.nn.Identity"}
    model = instantiate_from_config(config)
    keys = {
        key: value for key, value in manifest("mini-v1").items() if not key.startswith("cond_stage_model.")
    }
    model.load_state_dict(pseudo_state_dict(keys))
    return model.eval()


@pytest.fixture(params=["eps", "v"])
def model(request: pytest.FixtureRequest) -> LatentDiffusion:
    return tiny_model(request.param)


def tiny_model(parameterization: str = "eps") -> LatentDiffusion:
    model = instantiate_from_config(tiny.model_section({"parameterization": parameterization}))
    model.load_state_dict(weights())
    return model.eval().requires_grad_(False)


@functools.cache
def weights() -> dict[str, Tensor]:
    """The miniature's, with a tamed last layer: else rounding grows a thousandfold within a run."""
    state = tiny.state_dict()
    state["model.diffusion_model.out.2.weight"] *= 0.3
    return state


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs() -> dict:
    """Arguments of `sample` for a guided run."""
    return {
        "conditioning": normal(2, 7, 32, seed=1),
        "unconditional_conditioning": normal(2, 7, 32, seed=2),
        "unconditional_guidance_scale": 3.0,
        "verbose": False,
    }


class Corrector:
    """Moves eps by what it is given, and keeps the arguments of its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def modify_score(self, model, eps, x, t, c, **kwargs) -> Tensor:
        self.calls.append((model, t.tolist(), c, kwargs))
        return eps + kwargs["strength"] * x


def original(
    model: LatentDiffusion,
    grid: range,
    *,
    x: Tensor | None = None,
    alphas_prev: Tensor | None = None,
    plms: bool = False,
    conditioning: Tensor,
    unconditional_conditioning: Tensor,
    unconditional_guidance_scale: float = 1.0,
    verbose: bool = True,
    eta: float = 0.0,
    mask: Tensor | None = None,
    x0: Tensor | None = None,
    temperature: float = 1.0,
    noise_dropout: float = 0.0,
    score_corrector: Corrector | None = None,
    corrector_kwargs: dict | None = None,
    quantize: Callable[[Tensor], Tensor] = lambda z: z,
    dynamic_threshold: float | None = None,
    ucg_schedule: list[float] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """(latents, prediction) at the start and after each step over the ascending timesteps of `grid`."""
    ac = model.alphas_cumprod
    if alphas_prev is None:
        alphas_prev = torch.stack([ac[0], *(ac[t] for t in grid[:-1])])
    x = torch.randn(SHAPE) if x is None else x
    seen, history = [(x, x)], []

    def model_eps(x: Tensor, t: int, scale: float) -> Tensor:
        time = torch.full((len(x),), t)
        both = torch.cat([unconditional_conditioning, conditioning])
        u, c = model.apply_model(torch.cat([x, x]), torch.cat([time, time]), both).chunk(2)
        out = u + scale * (c - u)
        if model.parameterization == "v":
            out = ac[t].sqrt() * out + (1 - ac[t]).sqrt() * x
        if score_corrector:
            out = score_corrector.modify_score(model, out, x, time, conditioning, **corrector_kwargs)
        return out

    def advance(x: Tensor, eps: Tensor, a: Tensor, prev: Tensor) -> tuple[Tensor, Tensor]:
        pred = quantize((x - (1 - a).sqrt() * eps) / a.sqrt())
        if dynamic_threshold is not None:
            rms = pred.flatten(1).norm(dim=1) / pred[0].numel() ** 0.5
            pred = torch.stack([p * min(1.0, dynamic_threshold / r) for p, r in zip(pred, rms, strict=True)])
        sigma = eta * ((1 - prev) / (1 - a) * (1 - a / prev)).sqrt()
        noise = sigma * torch.randn(x.shape) * temperature
        if noise_dropout:
            noise = torch.nn.functional.dropout(noise, p=noise_dropout)
        return prev.sqrt() * pred + (1 - prev - sigma**2).sqrt() * eps + noise, pred

    for i, index in enumerate(reversed(range(len(grid)))):
        t, a, prev = grid[index], ac[grid[index]], alphas_prev[index]
        if mask is not None:
            noised = ac[t].sqrt() * x0 + (1 - ac[t]).sqrt() * torch.randn_like(x0)
            x = noised * mask + (1 - mask) * x
        scale = ucg_schedule[i] if ucg_schedule else unconditional_guidance_scale
        eps = along = model_eps(x, t, scale)
        if plms:
            e1, e2, e3 = [*history[::-1], None, None, None][:3]
            if e1 is None:
                x_next, _ = advance(x, eps, a, prev)
                along = (eps + model_eps(x_next, grid[max(index - 1, 0)], scale)) / 2
            elif e2 is None:
                along = (3 * eps - e1) / 2
            elif e3 is None:
                along = (23 * eps - 16 * e1 + 5 * e2) / 12
            else:
                along = (55 * eps - 59 * e1 + 37 * e2 - 9 * e3) / 24
            history.append(eps)
        x, pred = advance(x, along, a, prev)
        seen.append((x, pred))
    return seen


def grid_of(steps: int) -> range:
    return range(1, 1001, 1000 // steps)


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-4 * expected.std().item())


# --- plain sampling


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("name", SAMPLERS)
def test_sample_gives_the_originals_latents(golden, mini_v1, name: str, steps: int) -> None:
    seen = []
    latents, intermediates = SAMPLERS[name](mini_v1).sample(
        S=steps,
        batch_size=1,
        shape=[4, 16, 16],
        conditioning=golden["cond"],
        x_T=golden[f"{name}_{steps}_xT"],
        unconditional_guidance_scale=7.5,
        unconditional_conditioning=golden["uncond"],
        verbose=False,
        callback=seen.append,
    )
    expected = golden[f"{name}_{steps}_out"]
    assert (latents - expected).abs().max() < 1e-3 * expected.std()
    assert seen == list(range(steps))
    assert intermediates["pred_x0"][-1].shape == expected.shape


def test_encode_and_decode_give_the_originals_img2img(golden, mini_v1) -> None:
    sampler = DDIMSampler(mini_v1)
    sampler.make_schedule(ddim_num_steps=20, ddim_eta=0.0, verbose=False)
    z = sampler.stochastic_encode(golden["img2img_x0"], torch.tensor([12]), noise=golden["img2img_noise"])
    assert (z - golden["img2img_z12"]).abs().max() < 1e-5
    out = sampler.decode(
        z, golden["cond"], 12, unconditional_guidance_scale=5.0, unconditional_conditioning=golden["uncond"]
    )
    expected = golden["img2img_out"]
    assert (out - expected).abs().max() < 1e-3 * expected.std()


def test_noise_is_the_global_generators() -> None:
    """A notebook that seeds everything gets the original's stream: the start, then a draw a step."""
    arguments = {"batch_size": 2, "shape": SHAPE[1:], "conditioning": inputs()["conditioning"]}
    model = tiny_model()
    torch.manual_seed(3)
    first, _ = DDIMSampler(model).sample(2, **arguments)
    after = torch.randn(1)

    stream = CompvisNoise(torch.Generator().manual_seed(3), SHAPE)
    start = stream.start()
    stream.finish(2)
    assert torch.randn(1, generator=stream.generator) == after
    again, _ = DDIMSampler(model).sample(2, **arguments, x_T=start)
    torch.testing.assert_close(again, first)


def test_noise_is_drawn_on_the_models_device() -> None:
    """On Apple's GPU noise came from the CPU's generator. `meta`, too, is neither the CPU nor CUDA."""
    noise = GlobalNoise(SHAPE, torch.device("meta"), None)
    assert noise.start().device.type == "meta"
    assert noise(2.0, 1.0).device.type == "meta"


def test_sample_takes_the_originals_arguments_in_its_order() -> None:
    """All after `conditioning` had to be named, and half of them were unknown."""
    names = (
        "self S batch_size shape conditioning callback normals_sequence img_callback quantize_x0 eta mask x0 "
        "temperature noise_dropout score_corrector corrector_kwargs verbose x_T log_every_t "
        "unconditional_guidance_scale unconditional_conditioning dynamic_threshold ucg_schedule"
    )
    for sampler in SAMPLERS.values():
        assert list(inspect.signature(sampler.sample).parameters) == names.split()


@pytest.mark.parametrize("name", SAMPLERS)
def test_intermediates_of_plain_sampling(name: str) -> None:
    """`x_inter` was missing, and `pred_x0` had every step whatever `log_every_t` said."""
    model, x_T, predictions = tiny_model(), normal(*SHAPE, seed=5), []
    latents, intermediates = SAMPLERS[name](model).sample(
        STEPS,
        2,
        SHAPE[1:],
        **inputs(),
        x_T=x_T,
        log_every_t=3,
        img_callback=lambda x, i: predictions.append(x),
    )
    x_inter, pred_x0 = intermediates["x_inter"], intermediates["pred_x0"]
    assert x_inter[0] is x_T
    assert pred_x0[0] is x_T
    assert x_inter[-1] is latents
    for logged, step in zip(pred_x0[1:], [0, 1, 4, 7], strict=True):  # 7, 6, 3 and 0 places from the end
        assert logged is predictions[step]
    if name == "dpm":
        assert len(x_inter) == 5
    else:
        seen = original(model, grid_of(STEPS), x=x_T, plms=name == "plms", **inputs())
        for logged, step in zip(x_inter, [0, 1, 2, 5, 8], strict=True):
            close(logged, seen[step][0])


def test_plms_refuses_eta() -> None:
    with pytest.raises(ValueError, match="it must be 0"):
        PLMSSampler(tiny_model()).make_schedule(10, ddim_eta=0.5)


# --- variants


MASK = {"mask": (normal(1, 1, 4, 4, seed=8) > 0).float(), "x0": normal(*SHAPE, seed=9)}
VARIANTS = {
    "mask": MASK,
    "mask, eta": {**MASK, "eta": 0.7},
    "temperature": {"temperature": 0.6, "eta": 1.0},
    "noise_dropout": {"noise_dropout": 0.4, "eta": 1.0},
    "dynamic_threshold": {"dynamic_threshold": 0.8},
    "ucg_schedule": {"ucg_schedule": [1.5 + i for i in range(STEPS)]},
    "all": {**MASK, "eta": 0.5, "temperature": 1.2, "noise_dropout": 0.1, "dynamic_threshold": 2.0},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["ddim", "plms"])
def test_variants_do_what_the_original_does(model, name: str, variant: str) -> None:
    """They were refused. The random numbers that follow show that as many were drawn."""
    options = {**VARIANTS[variant]}
    if name == "plms":
        options.pop("eta", None)
    torch.manual_seed(11)
    seen = original(model, grid_of(STEPS), plms=name == "plms", **inputs(), **options)
    follows = torch.randn(1)
    torch.manual_seed(11)
    calls = []
    latents, intermediates = SAMPLERS[name](model).sample(
        STEPS, 2, SHAPE[1:], **inputs(), **options, log_every_t=1, callback=calls.append
    )
    assert torch.randn(1) == follows
    assert calls == list(range(STEPS))
    close(latents, seen[-1][0])
    for x, pred_x0, expected in zip(intermediates["x_inter"], intermediates["pred_x0"], seen, strict=True):
        close(x, expected[0])
        close(pred_x0, expected[1])


@pytest.mark.parametrize("name", ["ddim", "plms"])
def test_a_score_corrector_changes_eps(name: str) -> None:
    model, ours, theirs = tiny_model(), Corrector(), Corrector()
    options = {**inputs(), "corrector_kwargs": {"strength": 0.1}}
    torch.manual_seed(4)
    seen = original(model, grid_of(4), plms=name == "plms", score_corrector=theirs, **options)
    torch.manual_seed(4)
    latents, _ = SAMPLERS[name](model).sample(4, 2, SHAPE[1:], score_corrector=ours, **options)
    close(latents, seen[-1][0])
    assert [call[1] for call in ours.calls] == [call[1] for call in theirs.calls]
    assert all(call[0] is model and call[2] is options["conditioning"] for call in ours.calls)


@pytest.mark.parametrize("name", ["ddim", "plms"])
def test_predictions_are_quantized(name: str) -> None:
    """By the first stage's codebook, whose result has more than the latents."""
    model = tiny_model()
    torch.manual_seed(4)
    seen = original(model, grid_of(4), plms=name == "plms", quantize=torch.round, **inputs())
    model.first_stage_model.quantize = lambda z: (z.round(), None, (None, None, None))
    torch.manual_seed(4)
    latents, _ = SAMPLERS[name](model).sample(4, 2, SHAPE[1:], quantize_x0=True, **inputs())
    close(latents, seen[-1][0])


def test_conditioning_as_a_dict() -> None:
    """Stability's form, here for a variant."""
    model, plain = tiny_model(), inputs()
    nested = {**plain}
    for name in ("conditioning", "unconditional_conditioning"):
        nested[name] = {"c_concat": [], "c_crossattn": [plain[name]]}
    x_T, scales = normal(*SHAPE), [2.0, 3.0]
    a, b = (
        DDIMSampler(model).sample(2, 2, SHAPE[1:], **c, x_T=x_T, ucg_schedule=scales)[0]
        for c in (plain, nested)
    )
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        (DDIMSampler, {"mask": torch.ones(1)}, "mask without x0"),
        (DDIMSampler, {"quantize_x0": True}, "quantize_x0: the first stage, AutoencoderKL, has no codebook"),
        (DDIMSampler, {"ucg_schedule": [1.0]}, "ucg_schedule has 1 scales for 2 steps"),
        (PLMSSampler, {"eta": 0.5}, "ddim_eta 0.5 with PLMS"),
        (DPMSolverSampler, {"mask": torch.ones(1), "temperature": 0.5}, "mask, temperature with DPM-Solver"),
        (DPMSolverSampler, {"score_corrector": Corrector()}, "score_corrector with DPM-Solver"),
    ],
)
def test_what_cannot_be_given_is_an_error_that_names_it(sampler, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(tiny_model()).sample(2, 2, SHAPE[1:], **inputs(), **options)


def test_a_score_corrector_needs_eps() -> None:
    with pytest.raises(ValueError, match="score_corrector with a model that predicts v"):
        DDIMSampler(tiny_model("v")).sample(2, 2, SHAPE[1:], score_corrector=Corrector(), **inputs())


# --- the schedule


@pytest.mark.parametrize("eta", [0.0, 0.3])
def test_make_schedule_sets_the_originals_attributes(eta: float) -> None:
    model = tiny_model()
    sampler = DDIMSampler(model)
    sampler.make_schedule(ddim_num_steps=50, ddim_eta=eta, verbose=False)
    assert sampler.ddpm_num_timesteps == 1000
    assert sampler.ddim_timesteps.tolist() == list(range(1, 982, 20))
    ac = model.alphas_cumprod.double()
    a = ac[1::20]
    prev = torch.cat([ac[:1], a[:-1]])
    expected = {
        "ddim_alphas": a,
        "ddim_alphas_prev": prev,
        "ddim_sqrt_one_minus_alphas": (1 - a).sqrt(),
        "ddim_sigmas": eta * ((1 - prev) / (1 - a) * (1 - a / prev)).sqrt(),
    }
    for name, values in expected.items():
        torch.testing.assert_close(getattr(sampler, name), values.float())
    for name in ("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_one_minus_alphas_cumprod"):
        assert getattr(sampler, name) is getattr(model, name)
    assert len(sampler.ddim_sigmas_for_original_num_steps) == 1000
    assert sampler.ddim_sigmas_for_original_num_steps[0] == 0  # that step leads to no noise


# --- image to image


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_decode_draws_once_a_step(model, eta: float) -> None:
    """At eta 0 nothing was drawn, so that a seeded notebook's second image differed from the original's."""
    sampler = DDIMSampler(model)
    sampler.make_schedule(STEPS, ddim_eta=eta)
    z, arguments, seen = normal(*SHAPE), inputs(), []
    cond = arguments.pop("conditioning")
    torch.manual_seed(2)
    expected = original(
        model, grid_of(STEPS)[:5], x=z, conditioning=cond, unconditional_guidance_scale=3.0, eta=eta,
        unconditional_conditioning=arguments["unconditional_conditioning"],
    )  # fmt: skip
    follows = torch.randn(1)
    torch.manual_seed(2)
    out = sampler.decode(z, cond, 5, 3.0, arguments["unconditional_conditioning"], callback=seen.append)
    assert torch.randn(1) == follows
    assert seen == list(range(5))
    close(out, expected[-1][0])
    assert torch.equal(sampler.decode(z, cond, 0), z)


@pytest.mark.parametrize("name", ["ddim", "plms"])
def test_decode_over_the_original_steps_ends_at_no_noise(name: str) -> None:
    """The last step led to timestep 0 instead, whose noise stayed in the latents."""
    model, z = tiny_model(), normal(*SHAPE)
    cond = inputs()["conditioning"]
    sampler = SAMPLERS[name](model)
    sampler.make_schedule(STEPS)
    out = sampler.decode(z, cond, 6, use_original_steps=True)
    conditions = {"conditioning": cond, "unconditional_conditioning": cond}
    levels = model.alphas_cumprod_prev
    seen = original(model, range(6), x=z, alphas_prev=levels, plms=name == "plms", **conditions)
    close(out, seen[-1][0])


@pytest.mark.parametrize(("use_original_steps", "end"), [(True, 0.0), (False, 0.0291672)])
def test_decode_with_dpm_solver_ends_where_the_grid_does(use_original_steps: bool, end: float) -> None:
    """For a model that knows x0, 0.5 everywhere, what is left is the noise it began with."""
    model = tiny_model()

    def apply_model(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        a = model.alphas_cumprod[t.round().long()][:, None, None, None]
        return (x - a.sqrt() * 0.5) / (1 - a).sqrt()

    model.apply_model = apply_model
    sampler, noise, calls = DPMSolverSampler(model), normal(*SHAPE), []
    sampler.make_schedule(STEPS)
    t = torch.full((2,), 5)
    z = sampler.stochastic_encode(torch.full(SHAPE, 0.5), t, use_original_steps, noise)
    out = sampler.decode(z, noise, 6, use_original_steps=use_original_steps, callback=calls.append)
    expected = (0.5 + end * noise) / (1 + end**2) ** 0.5
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-3)
    assert calls == list(range(6))
    assert sampler.decode(z, noise, 0) is z


def test_stochastic_encode_draws_like_the_latents() -> None:
    model, x0 = tiny_model(), normal(*SHAPE)
    sampler = DDIMSampler(model)
    sampler.make_schedule(STEPS)
    torch.manual_seed(1)
    noise = torch.randn_like(x0)
    torch.manual_seed(1)
    z = sampler.stochastic_encode(x0, torch.tensor([3, 5]))
    a = sampler.ddim_alphas[[3, 5]][:, None, None, None]
    torch.testing.assert_close(z, a.sqrt() * x0 + (1 - a).sqrt() * noise)


@pytest.mark.parametrize("use_original_steps", [False, True])
def test_encode_runs_the_steps_upwards(model, use_original_steps: bool) -> None:
    """Each step is the reverse of one of `decode`, with eps from below it, at the timestep it leads to."""
    sampler, x, calls = DDIMSampler(model), normal(*SHAPE), []
    sampler.make_schedule(STEPS)
    arguments = inputs()
    cond, uncond = arguments["conditioning"], arguments["unconditional_conditioning"]
    out, found = sampler.encode(x, cond, 5, use_original_steps, 2, 3.0, uncond, callback=calls.append)
    ac = model.alphas_cumprod
    grid = range(5) if use_original_steps else grid_of(STEPS)[:5]
    levels = [torch.tensor(1.0) if use_original_steps else ac[0], *(ac[t] for t in grid)]
    seen = []
    for t, (a, a_next) in zip(grid, pairwise(levels), strict=True):
        time = torch.full((2,), t)
        u, c = (model.apply_model(x, time, each) for each in (uncond, cond))
        eps = u + 3.0 * (c - u)
        if model.parameterization == "v":
            eps = ac[t].sqrt() * eps + (1 - ac[t]).sqrt() * x
        x = a_next.sqrt() * (x / a.sqrt() + ((1 / a_next - 1).sqrt() - (1 / a - 1).sqrt()) * eps)
        seen.append(x)
    close(out, x)
    assert found["x_encoded"] is out
    assert found["intermediate_steps"] == [0, 2, 3, 4]
    for ours, expected in zip(found["intermediates"], (seen[i] for i in (0, 2, 3, 4)), strict=True):
        close(ours, expected)
    assert calls == list(range(5))


def test_decode_brings_back_what_encode_was_given() -> None:
    """With a model whose eps changes slowly, as a trained one's."""
    model, x0 = tiny_model(), 0.5 * normal(*SHAPE)
    model.apply_model = lambda x, t, cond: 0.3 * torch.tanh(x)
    sampler = DDIMSampler(model)
    sampler.make_schedule(200)
    z, _ = sampler.encode(x0, None, 100)
    assert (z - x0).abs().max() > 0.1
    torch.testing.assert_close(sampler.decode(z, None, 100), x0, rtol=0, atol=5e-3)


def test_encode_refuses_more_steps_than_there_are() -> None:
    sampler = DDIMSampler(tiny_model())
    sampler.make_schedule(4)
    with pytest.raises(ValueError, match=r"t_enc 5 is not in 0 … 4"):
        sampler.encode(normal(*SHAPE), None, 5)


# --- single calls


def test_ddim_sampling_stops_before_timesteps() -> None:
    """`timesteps` of the grid's steps, less one, as in the original."""
    model, cond = tiny_model(), inputs()["conditioning"]
    sampler = DDIMSampler(model)
    sampler.make_schedule(STEPS)
    for timesteps, expected in ((5, 4), (STEPS, STEPS - 1), (100, STEPS - 1), (None, STEPS)):
        calls = []
        sampler.ddim_sampling(cond, SHAPE, timesteps=timesteps, callback=calls.append)
        assert len(calls) == expected


def test_repeated_noise_is_one_for_the_batch() -> None:
    model = tiny_model()
    sampler = DDIMSampler(model)
    sampler.make_schedule(STEPS, ddim_eta=1.0)
    x, cond = normal(1, *SHAPE[1:]).expand(SHAPE), normal(1, 7, 32).expand(2, -1, -1)
    t = torch.tensor([501, 501])
    for repeat_noise in (True, False):
        (first, second), _ = sampler.p_sample_ddim(x, cond, t, 4, repeat_noise)
        assert torch.allclose(first, second, atol=1e-5) == repeat_noise


def test_plms_steps_one_by_one() -> None:
    """`p_sample_plms` returns its eps for the caller's list, oldest first."""
    model, x = tiny_model(), normal(*SHAPE)
    cond = inputs()["conditioning"]
    sampler = PLMSSampler(model)
    sampler.make_schedule(5)
    expected, _ = sampler.plms_sampling(cond, SHAPE, x_T=x)
    times = [torch.full((2,), int(t)) for t in sampler.ddim_timesteps]
    old_eps = []
    for index in reversed(range(5)):
        following = times[max(index - 1, 0)]
        x, _, eps = sampler.p_sample_plms(x, cond, times[index], index, old_eps=old_eps, t_next=following)
        old_eps.append(eps)
        if len(old_eps) >= 4:
            old_eps.pop(0)
    assert torch.equal(x, expected)


def test_a_half_precision_model_samples_in_float32() -> None:
    model = tiny_model().to(torch.bfloat16)
    model.register_schedule()  # the schedule stays in float32, as a loaded model's
    latents, _ = DDIMSampler(model).sample(2, 2, SHAPE[1:], **inputs(), **MASK)
    assert latents.dtype == torch.float32
    assert latents.isfinite().all()


def test_arguments_without_effect_are_accepted() -> None:
    model = SimpleNamespace(num_timesteps=1000)
    assert DDIMSampler(model, schedule="linear").ddpm_num_timesteps == 1000
    x_T = normal(*SHAPE)
    a, b = (
        PLMSSampler(tiny_model()).sample(2, 2, SHAPE[1:], **inputs(), **extra, x_T=x_T)[0]
        for extra in ({}, {"normals_sequence": [1], "temperature": 1, "corrector_kwargs": {}})
    )
    assert torch.equal(a, b)
