"""Random numbers: a stream for each image, Brownian paths, variations, and the original's one stream."""

import gc
import itertools
import random
import weakref

import numpy as np
import pytest
import torch
from closed_form import V1, V1_ALPHAS, NormalData, compvis_noise, image_noise
from torch import Tensor

from ldm.sampling import (
    SCHEDULES,
    Denoiser,
    Discretization,
    Trajectory,
    catalogue,
    default_trajectory,
    sample,
)
from ldm.sampling.noise import (
    BrownianPath,
    CompvisNoise,
    CompvisStream,
    ImageNoise,
    ImageSeeds,
    slerp,
    tree_depth,
)
from ldm.sampling.schedule import karras, zero_terminal_snr

CPU = torch.device("cpu")
SHAPE = (4, 8, 8)
MAX_SEED = 2**63 - 1
BIG_SEEDS = [0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**33 + 1, 2**40 + 1, MAX_SEED - 1, MAX_SEED]


def all_different(tensors: list[Tensor] | Tensor) -> bool:
    return not any(torch.equal(a, b) for a, b in itertools.combinations(tensors, 2))


def assert_standard_normal(draw: Tensor) -> None:
    """Mean, standard deviation and kurtosis, each within five of its own standard errors."""
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


def test_a_path_keeps_a_bounded_number_of_tensors():
    path = BrownianPath(3, (1, 2, 2))
    for level in range(1, 500):
        path.increment(level / 500, level / 501)
    assert len(path._nodes) <= 3 * path.depth


def test_a_deeper_tree_is_the_same_path():
    """Where no two levels share a leaf its increments are those of before, and finer ones have variance 1."""
    coarse, fine = BrownianPath(3, (1, 64, 64)), BrownianPath(3, (1, 64, 64), tree_depth(1e-4))
    assert (coarse.depth, fine.depth) == (tree_depth(1e-3), 20)
    for pair in PAIRS:
        assert correlation(coarse.increment(*pair), fine.increment(*pair)) > 0.99
    levels = [14.6 * (1 - 1e-4) ** k for k in range(30)]
    draws = [fine.increment(*pair) for pair in itertools.pairwise(levels)]
    assert_standard_normal(torch.stack(draws))
    for a, b in itertools.pairwise(draws):
        assert abs(correlation(a, b)) < 5 / a.numel() ** 0.5


def test_a_path_is_freed_with_its_last_reference():
    """A cache of a bound method on its own object kept each image's path until the collector ran."""
    gc.disable()
    try:
        path = BrownianPath(3, SHAPE)
        path.increment(2.0, 1.0)
        alive = weakref.ref(path)
        del path
        assert alive() is None
    finally:
        gc.enable()


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
        return sample(denoiser, sampler, Trajectory.of(karras(V1, steps)), noise)

    assert correlation(image(15, True), image(30, True)) > 0.95
    assert correlation(image(15, False), image(30, False)) < 0.5


# --- variations


def varied(strength: float, first: int = 1, second: int = 2, brownian: bool = False) -> ImageNoise:
    image = ImageSeeds(first, variation_seed=second, variation_strength=strength)
    return ImageNoise([image], SHAPE, CPU, brownian)


def draws(noise: ImageNoise) -> list[Tensor]:
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


@pytest.mark.parametrize("brownian", [False, True])
def test_images_of_a_batch_may_differ_in_all_that_is_about_their_noise(brownian):
    images = [
        ImageSeeds(1),
        ImageSeeds(MAX_SEED, start_seed=3),
        ImageSeeds(1, variation_seed=2, variation_strength=0.3),
        ImageSeeds(5, start_seed=3, variation_seed=MAX_SEED, variation_strength=0.7),
        ImageSeeds(1, variation_seed=2, variation_strength=1.0),
    ]
    batch = draws(ImageNoise(images, SHAPE, CPU, brownian))
    for k, image in enumerate(images):
        alone = draws(ImageNoise([image], SHAPE, CPU, brownian))
        assert all(torch.equal(a[k], b[0]) for a, b in zip(batch, alone, strict=True))
    assert all(all_different(draw) for draw in batch[2:])


@pytest.mark.parametrize("brownian", [False, True])
def test_a_variation_is_the_way_from_one_seeds_draw_to_the_others(brownian):
    own, other = image_noise(1, 1, brownian=brownian), image_noise(2, 3, brownian=brownian)
    images = [ImageSeeds(1, None, seed, 0.3) for seed in (2, 3)]
    both = zip(draws(own), draws(other), draws(ImageNoise(images, SHAPE, CPU, brownian)), strict=True)
    for first, second, between in both:
        assert torch.equal(between, slerp(first, second, 0.3))


# --- another image's noise to start from


def test_another_seeds_start_leaves_the_rest_the_images_own():
    noise, own = ImageNoise([ImageSeeds(5, start_seed=3)], SHAPE, CPU), image_noise(5)
    assert torch.equal(noise.start(), image_noise(3).start())
    own.start()
    assert torch.equal(noise(2.0, 1.0), own(2.0, 1.0))
    assert torch.equal(noise.posterior(), own.posterior())


def test_with_its_own_seeds_start_the_first_step_does_not_draw_it_again():
    """Then eta > 0 only scales the start instead of adding noise to it."""
    noise = ImageNoise([ImageSeeds(3, start_seed=3)], SHAPE, CPU)
    start = noise.start()
    assert torch.equal(start, image_noise(3).start())
    assert not torch.equal(noise(2.0, 1.0), start)


def test_another_seeds_start_is_varied_too():
    noise = ImageNoise([ImageSeeds(12, 10, 22, 0.3)], SHAPE, CPU)
    assert torch.equal(noise.start(), slerp(image_noise(10).start(), image_noise(22).start(), 0.3))


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
    assert (len(drawn) > 1) == facts.stochastic.startswith("always")  # the start is always drawn
    assert len(drawn) <= 1 + len(denoiser.model.batches)


def test_one_stream_starts_with_its_first_draw():
    expected = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(compvis_noise(3, (2, 3, 4, 5)).start(), expected)


def test_compvis_batches_share_a_stream():
    stream = CompvisStream(3, SHAPE, CPU, 2)
    reference = torch.Generator().manual_seed(3)
    for images in (2, 1):
        expected = torch.randn(images, *SHAPE, generator=reference)
        assert torch.equal(stream.batch(images).start(), expected)


@pytest.mark.parametrize("fixed_code", [False, True])
def test_compvis_draws_the_posterior_before_all_else(fixed_code):
    """Once for all batches; then the start code, then batch by batch its noise and one draw per step."""
    stream = CompvisStream(3, SHAPE, CPU, 2, fixed_code=fixed_code, init_image=True)
    reference = torch.Generator().manual_seed(3)
    posterior = torch.randn(2, *SHAPE, generator=reference)
    code = torch.randn(2, *SHAPE, generator=reference) if fixed_code else None
    for images in (2, 1):
        noise, shape = stream.batch(images), (images, *SHAPE)
        assert torch.equal(noise.posterior(), posterior[:images])
        expected = torch.randn(shape, generator=reference) if code is None else code[:images]
        assert torch.equal(noise.start(), expected)
        assert torch.equal(noise(2.0, 1.0), torch.randn(shape, generator=reference))
        noise.finish(2)
        torch.randn(2, *shape, generator=reference)


def test_a_part_of_a_batch_has_its_rows_of_what_is_drawn_once():
    """Images of an adaptive sampler are sampled one at a time."""
    stream = CompvisStream(3, SHAPE, CPU, 2, fixed_code=True, init_image=True)
    whole, second = stream.batch(2), stream.batch(1, position=1)
    assert torch.equal(second.start(), whole.start()[1:])
    assert torch.equal(second.posterior(), whole.posterior()[1:])


def test_compvis_noise_is_never_brownian():
    noise = CompvisStream(3, SHAPE, CPU, 2).batch(2)
    assert isinstance(noise, CompvisNoise)
    assert not torch.equal(noise(2.0, 1.0), noise(2.0, 1.0))


def test_a_fixed_code_starts_every_compvis_batch():
    stream = CompvisStream(3, SHAPE, CPU, 2, fixed_code=True)
    first, second = stream.batch(2), stream.batch(1)
    start = first.start()
    assert torch.equal(second.start(), start[:1])
    assert not torch.equal(first(2.0, 1.0)[:1], second(2.0, 1.0))


def test_v1s_own_levels_are_a_path_away_from_the_end():
    """The last step of the original's grid ends above no noise, k-diffusion's at it."""
    path = BrownianPath(0, (1, 64, 64))
    for end in (float(V1.sigma(0)), 0.0):
        assert_standard_normal(path.increment(float(V1.sigma(20)), end))
