"""Random numbers: a stream for each image, Brownian paths, variations, and the original's one stream."""

import itertools
import random

import numpy as np
import pytest
import torch
from closed_form import V1, V1_ALPHAS, NormalData, compvis_noise
from torch import Tensor

from ldm.sampling import (
    SCHEDULES,
    Denoiser,
    Discretization,
    catalogue,
    default_trajectory,
    sample,
    trajectory,
)
from ldm.sampling.batches import Batch
from ldm.sampling.noise import (
    MAX_SEED,
    BrownianPath,
    CompvisNoise,
    ImageNoise,
    VariedNoise,
    noise_source,
    slerp,
)
from ldm.sampling.schedule import karras, zero_terminal_snr

CPU = torch.device("cpu")
SHAPE = (4, 8, 8)
BATCHES = [Batch(("a", "b"), (0, 1)), Batch(("c",), (2,))]
BIG_SEEDS = [0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**33 + 1, 2**40 + 1, MAX_SEED - 1, MAX_SEED]


def image_noise(*seeds: int, **options) -> ImageNoise:
    return ImageNoise(seeds, SHAPE, CPU, **options)


def all_different(tensors: list[Tensor] | Tensor) -> bool:
    return not any(torch.equal(a, b) for a, b in itertools.combinations(tensors, 2))


def assert_standard_normal(draw: Tensor) -> None:
    """Mean, deviation and kurtosis, each within five of its own standard errors."""
    n, draw = draw.numel(), draw.double()
    assert abs(draw.mean().item()) < 5 / n**0.5
    assert abs(draw.std().item() - 1) < 5 / (2 * n) ** 0.5
    assert abs((draw**4).mean().item() - 3) < 5 * (96 / n) ** 0.5


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


# --- one stream for each image


def test_an_image_alone_has_the_noise_it_has_in_a_batch():
    batch, alone = image_noise(5, 6, 7), image_noise(6)
    for _ in range(4):
        assert torch.equal(batch.start()[1:2], alone.start())
        assert torch.equal(batch(2.0, 1.0)[1:2], alone(2.0, 1.0))
    assert torch.equal(batch.posterior()[1:2], alone.posterior())


def test_seeds_differ_in_their_start_and_in_their_steps():
    first, second = image_noise(1), image_noise(2)
    draws = [
        draw
        for noise in (first, second)
        for draw in (noise.start(), noise(2.0, 1.0), noise(1.0, 0.5), noise.posterior())
    ]
    for draw in draws:
        assert_standard_normal(draw)
    assert all_different(draws)


@pytest.mark.parametrize("brownian", [False, True])
def test_seeds_beyond_32_bits_differ(brownian):
    """torch's CPU generator reads 32 bits of a seed: seeds that share them made the same image."""
    noise = image_noise(*BIG_SEEDS, brownian=brownian)
    starts = noise.start()
    assert all_different(starts)
    assert all_different(noise(2.0, 1.0))
    assert all_different(noise.posterior())
    assert torch.equal(starts[3:4], image_noise(2**32).start())


def test_small_seeds_are_torchs():
    expected = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(42))
    assert torch.equal(image_noise(42).start(), expected)


def test_the_posterior_does_not_move_the_rest():
    """Text to image and image to image of one seed start from equal noise."""
    plain, asked = image_noise(3), image_noise(3)
    posterior = asked.posterior()
    assert torch.equal(plain.start(), asked.start())
    assert torch.equal(plain(2.0, 1.0), asked(2.0, 1.0))
    assert torch.equal(posterior, asked.posterior())


# --- Brownian paths

PAIRS = [(14.6, 9.0), (9.0, 2.0), (2.0, 0.9), (0.9, 0.05), (0.05, 0.0)]


def test_increments_are_standard_normal_and_independent():
    path = BrownianPath(0, (4, 128, 128))
    increments = [path.increment(*pair) for pair in PAIRS]
    for increment in increments:
        assert_standard_normal(increment)
    for a, b in itertools.combinations(increments, 2):
        assert abs(correlation(a, b)) < 5 / a.numel() ** 0.5


@pytest.mark.parametrize(
    "pair",
    [
        (4096.0, 14.6),
        (4096.0, 0.0),
        (4097.5, 4090.0),
        (4096.0, 4047.0),
        (1e5, 1.0),
        (1e5, 9e4),
        (14.61, 14.60),
        (0.03, 0.02997),
        (0.001, 0.0),
        (1e-6, 0.0),
        (1.001, 1.0),
        (1.0005, 0.9995),
    ],
)
def test_increments_over_any_interval_have_variance_1(pair):
    """Of a leaf of the tree and less, over the edges of leaves, at no noise and at zero terminal SNR."""
    assert_standard_normal(
        torch.stack([BrownianPath(seed, (1, 64, 64)).increment(*pair) for seed in range(4)])
    )


@pytest.mark.parametrize("schedule", ["karras", "exponential", "linspace"])
def test_all_increments_of_the_longest_run_have_variance_1(schedule):
    """Also those that `dpmpp_sde` asks for within a step, and with zero terminal SNR."""
    sigmas = SCHEDULES[schedule](Discretization(zero_terminal_snr(V1_ALPHAS)), 1000)[:-1]
    levels = np.sort([*sigmas, *np.sqrt(sigmas[1:] * sigmas[:-1])])[::-1]
    path = BrownianPath(0, (1, 16, 16))
    draws = torch.stack([path.increment(*pair) for pair in itertools.pairwise(levels.tolist())])
    assert_standard_normal(draws)
    assert draws.std(dim=(1, 2, 3)).max() < 1.3
    assert draws.std(dim=(1, 2, 3)).min() > 0.7


@pytest.mark.parametrize(
    ("high", "middle", "low"),
    [(14.6, 3.0, 0.5), (14.6, 14.5, 0.0), (1.0, 0.999, 0.998), (4096.0, 500.0, 0.03), (0.03, 0.01, 0.0)],
)
def test_increments_add_up(high, middle, low):
    """The whole is the parts' sum, with weights whose squares sum to 1."""
    path = BrownianPath(7, (1, 32, 32))
    parts = torch.stack([path.increment(high, middle).flatten(), path.increment(middle, low).flatten()], 1)
    whole = path.increment(high, low).flatten()[:, None]
    weights = torch.linalg.lstsq(parts.double(), whole.double()).solution
    torch.testing.assert_close(parts.double() @ weights, whole.double(), rtol=0, atol=1e-4)
    assert weights.square().sum().item() == pytest.approx(1, abs=1e-4)
    assert (weights > 0).all()


def test_increments_do_not_depend_on_what_else_was_asked():
    alone = {pair: BrownianPath(3, SHAPE).increment(*pair) for pair in PAIRS}
    path = BrownianPath(3, SHAPE)
    levels = random.Random(0).sample(range(1, 10_000), 200)
    for pair in reversed(PAIRS):
        assert torch.equal(path.increment(*pair), alone[pair])
        for level in levels:  # until nothing of before is left in its cache
            path.increment(level / 500, level / 501)
    for pair in PAIRS:
        assert torch.equal(path.increment(*pair), alone[pair])


def test_a_path_is_of_its_seed():
    paths = [BrownianPath(seed, SHAPE).increment(2.0, 1.0) for seed in BIG_SEEDS]
    assert all_different(paths)
    assert max(abs(correlation(a, b)) for a, b in itertools.combinations(paths, 2)) < 5 / 16


def test_brownian_images_have_their_own_path_in_any_batch():
    batch, alone = image_noise(5, 6, 7, brownian=True), image_noise(6, brownian=True)
    for pair in PAIRS:
        assert torch.equal(batch(*pair)[1:2], alone(*pair))
        assert torch.equal(alone(*pair), BrownianPath(6, SHAPE).increment(*pair)[None])
    plain = image_noise(6)
    assert torch.equal(plain.start(), alone.start())
    assert torch.equal(plain.posterior(), alone.posterior())
    assert abs(correlation(alone.start(), alone(14.6, 9.0))) < 5 / 16


@pytest.mark.parametrize("sampler", ["dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"])
def test_runs_of_more_steps_have_like_noise(sampler):
    def image(steps: int, brownian: bool) -> Tensor:
        denoiser = Denoiser(NormalData(), torch.zeros(1, 4, 1, 1), None, 1.0)
        noise = image_noise(0, brownian=brownian)
        return sample(denoiser, sampler, trajectory(karras(V1, steps)), noise)

    assert correlation(image(15, True), image(30, True)) > 0.95
    assert correlation(image(15, False), image(30, False)) < 0.5


# --- variations


def varied(strength: float, first: int = 1, second: int = 2, **options) -> VariedNoise:
    return VariedNoise(image_noise(first, **options), image_noise(second, **options), strength)


def draws(noise: ImageNoise | VariedNoise) -> list[Tensor]:
    return [noise.posterior(), noise.start(), noise(14.6, 2.0), noise(2.0, 1.0)]


@pytest.mark.parametrize("brownian", [False, True])
def test_a_variation_of_0_or_1_is_one_of_the_seeds_exactly(brownian):
    for strength, seed in ((0.0, 1), (1.0, 2)):
        pairs = zip(
            draws(varied(strength, brownian=brownian)),
            draws(image_noise(seed, brownian=brownian)),
            strict=True,
        )
        assert all(torch.equal(a, b) for a, b in pairs)


def test_the_way_between_two_seeds_is_even_and_stays_on_the_sphere():
    first, second = (torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    way = [slerp(first, second, t / 10) for t in range(11)]
    for noise in way:
        assert_standard_normal(noise)
    angles = [torch.acos(torch.cosine_similarity(first.flatten(1), w.flatten(1)).clamp(-1, 1)) for w in way]
    for k in range(2, 11):
        assert (angles[k] / angles[10]).tolist() == pytest.approx([k / 10] * 2, abs=5e-3)


@pytest.mark.parametrize("strength", [0.1, 0.5, 0.9])
def test_every_draw_is_varied_and_as_long_as_noise(strength):
    for draw, first, second in zip(
        draws(varied(strength)), draws(image_noise(1)), draws(image_noise(2)), strict=True
    ):
        assert_standard_normal(draw)
        assert correlation(draw, first) == pytest.approx(np.cos(strength * np.pi / 2), abs=0.2)
        assert correlation(draw, second) == pytest.approx(np.sin(strength * np.pi / 2), abs=0.2)


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_a_variation_toward_the_same_seed_is_that_seed(strength):
    same = zip(draws(varied(strength, 5, 5)), draws(image_noise(5)), strict=True)
    assert all(torch.equal(a, b) for a, b in same)


# --- the original's stream


@pytest.mark.parametrize("fixed_code", [False, True])
@pytest.mark.parametrize(
    ("sampler", "eta", "steps", "draws"),
    [
        ("ddim", 0.0, 7, 8),
        ("ddim", 0.5, 7, 8),
        ("plms", None, 7, 9),
        ("dpmpp_2m", None, 7, 1),
        ("plms", None, 1, 3),
    ],
)
def test_one_stream_with_the_originals_unused_draws(sampler, eta, steps, draws, fixed_code):
    """The original drew in every DDIM and PLMS step and multiplied by zero; the next batch comes after."""
    shape = (2, 3, 4, 5)
    code = torch.randn(shape, generator=torch.Generator().manual_seed(9)) if fixed_code else None
    noise = compvis_noise(3, shape, code)
    denoiser = Denoiser(NormalData(), torch.zeros(2, 3, 1, 1), None, 1.0)
    run = default_trajectory(denoiser, sampler, steps)
    options = {} if eta is None else {"eta": eta}
    reference = torch.Generator().manual_seed(3)
    for _ in range(2):
        sample(denoiser, sampler, run, noise, options=options)
        for _ in range(draws - fixed_code):
            torch.randn(shape, generator=reference)
        assert torch.equal(noise.generator.get_state(), reference.get_state())


@pytest.mark.parametrize("sampler", catalogue.SAMPLERS)
def test_samplers_draw_at_most_once_for_each_model_call(sampler):
    """And deterministic ones never."""
    drawn, denoiser = [], Denoiser(NormalData(), torch.zeros(1, 3, 1, 1), None, 1.0)
    noise = compvis_noise(0, (1, 3, 4, 5))
    noise.finish = lambda unused: None
    draw = noise.draw
    noise.draw = lambda: (drawn.append(1), draw())[1]
    sample(denoiser, sampler, default_trajectory(denoiser, sampler, 10), noise)
    facts = catalogue.SAMPLERS[sampler]
    assert (len(drawn) > 1) == (facts.stochastic == "yes")  # the start is always drawn
    assert len(drawn) <= 1 + len(denoiser.model.batches)


def test_one_stream_starts_with_its_first_draw():
    expected = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(compvis_noise(3, (2, 3, 4, 5)).start(), expected)


# --- the noise of a run's batches


def test_image_k_of_a_run_has_seed_plus_k():
    noise_of = noise_source("image", MAX_SEED, SHAPE, False, CPU, 2)
    assert torch.equal(noise_of(BATCHES[0]).start(), image_noise(MAX_SEED, 0).start())
    assert torch.equal(noise_of(BATCHES[1]).start(), image_noise(1).start())


def test_image_k_of_a_brownian_run_has_the_path_of_seed_plus_k():
    noise_of = noise_source("image", 10, SHAPE, False, CPU, 2, brownian=True)
    assert torch.equal(noise_of(BATCHES[0])(2.0, 1.0), image_noise(10, 11, brownian=True)(2.0, 1.0))
    assert torch.equal(noise_of(BATCHES[1])(2.0, 1.0), image_noise(12, brownian=True)(2.0, 1.0))


def test_image_k_has_the_posterior_of_seed_plus_k():
    noise_of = noise_source("image", 10, SHAPE, False, CPU, 2, init_image=True)
    assert torch.equal(noise_of(BATCHES[0]).posterior(), image_noise(10, 11).posterior())
    assert torch.equal(noise_of(BATCHES[1]).posterior(), image_noise(12).posterior())


@pytest.mark.parametrize("brownian", [False, True])
def test_image_k_is_varied_toward_variation_seed_plus_k(brownian):
    options = {"brownian": brownian, "init_image": True}
    noise_of = noise_source("image", 10, SHAPE, False, CPU, 2, variation=(MAX_SEED, 0.3), **options)
    for batch, seeds, others in ((BATCHES[0], (10, 11), (MAX_SEED, 0)), (BATCHES[1], (12,), (1,))):
        expected = VariedNoise(
            image_noise(*seeds, brownian=brownian), image_noise(*others, brownian=brownian), 0.3
        )
        for a, b in zip(draws(noise_of(batch)), draws(expected), strict=True):
            assert torch.equal(a, b)


def test_a_fixed_code_is_varied_too():
    noise_of = noise_source("image", 10, SHAPE, True, CPU, 2, variation=(20, 0.3))
    first, second = (noise_of(batch).start() for batch in BATCHES)
    assert torch.equal(second, slerp(image_noise(10).start(), image_noise(22).start(), 0.3))
    assert not torch.equal(second, first[:1])


def test_compvis_batches_share_a_stream():
    noise_of = noise_source("compvis", 3, SHAPE, False, CPU, 2)
    reference = torch.Generator().manual_seed(3)
    for batch in BATCHES:
        expected = torch.randn(len(batch), *SHAPE, generator=reference)
        assert torch.equal(noise_of(batch).start(), expected)


@pytest.mark.parametrize("fixed_code", [False, True])
def test_compvis_draws_the_posterior_before_all_else(fixed_code):
    """Once for all batches; then the start code, then batch by batch its noise and one draw per step."""
    noise_of = noise_source("compvis", 3, SHAPE, fixed_code, CPU, 2, init_image=True)
    reference = torch.Generator().manual_seed(3)
    posterior = torch.randn(2, *SHAPE, generator=reference)
    code = torch.randn(2, *SHAPE, generator=reference) if fixed_code else None
    for batch in BATCHES:
        noise, shape = noise_of(batch), (len(batch), *SHAPE)
        assert torch.equal(noise.posterior(), posterior[: len(batch)])
        expected = torch.randn(shape, generator=reference) if code is None else code[: len(batch)]
        assert torch.equal(noise.start(), expected)
        assert torch.equal(noise(2.0, 1.0), torch.randn(shape, generator=reference))
        noise.finish(2)
        torch.randn(2, *shape, generator=reference)


def test_compvis_noise_is_never_brownian():
    noise = noise_source("compvis", 3, SHAPE, False, CPU, 2, brownian=True)(BATCHES[0])
    assert isinstance(noise, CompvisNoise)
    assert not torch.equal(noise(2.0, 1.0), noise(2.0, 1.0))


@pytest.mark.parametrize("rng", ["image", "compvis"])
def test_a_fixed_code_starts_every_batch(rng):
    noise_of = noise_source(rng, 3, SHAPE, True, CPU, 2)
    first, second = (noise_of(batch) for batch in BATCHES)
    start = first.start()
    assert torch.equal(second.start(), start[:1])
    assert not torch.equal(first(2.0, 1.0)[:1], second(2.0, 1.0))


def test_with_a_fixed_code_the_first_step_does_not_draw_the_start_again():
    """Then eta > 0 only scales the start instead of adding noise to it."""
    noise = noise_source("image", 3, SHAPE, True, CPU, 2)(BATCHES[0])
    start = noise.start()
    assert not torch.equal(noise(2.0, 1.0), start)


def test_v1s_own_levels_are_a_path_away_from_the_end():
    """The last step of the original's grid ends above no noise, k-diffusion's at it."""
    path = BrownianPath(0, (1, 64, 64))
    for end in (float(V1.sigma(0)), 0.0):
        assert_standard_normal(path.increment(float(V1.sigma(20)), end))
