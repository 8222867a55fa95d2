"""Painting a part of an image anew, with plain checkpoints and with those for inpainting."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_inpainting
import torch
from image_files import noise
from PIL import Image
from torch import Tensor

from ldm.errors import InputError
from ldm.images.masks import Box
from ldm.images.pixels import to_float
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.pipeline import ImageRequest, Pipeline, drawing, init_images
from ldm.sampling import catalogue

Load = Callable[..., Pipeline]

IMAGE = Image.fromarray(noise(37, 50))
MASK = np.zeros((37, 50), np.uint8)
MASK[10:20, 12:30] = 255


@pytest.fixture(scope="session")
def inpainting_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_inpainting.write_model(tmp_path_factory.mktemp("tiny-inpainting"))


@pytest.fixture(params=["plain", "inpainting"])
def pipeline(request: pytest.FixtureRequest, load: Load) -> Pipeline:
    """Of a plain checkpoint and of one for inpainting."""
    return load() if request.param == "plain" else load(*request.getfixturevalue("inpainting_model"))


@pytest.fixture
def inpainting(load: Load, inpainting_model: tuple[Path, Path]) -> Pipeline:
    return load(*inpainting_model)


def painted(mask: object = MASK, **values: object) -> ImageRequest:
    """Four steps, seed 3."""
    if isinstance(mask, np.ndarray):
        mask = Image.fromarray(mask)
    defaults = {"prompt": "a cat", "init_img": IMAGE, "strength": 1.0, "steps": 4, "seed": 3}
    return ImageRequest(**defaults | {"mask": mask} | values)


def pixels(pipeline: Pipeline, *requests: ImageRequest) -> list[np.ndarray]:
    return [image.pixels.astype(int) for image in pipeline.generate(requests)]


def near(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal to one level."""
    return bool(np.abs(a.astype(int) - b.astype(int)).max() <= 1)


# --- what is kept

GREYS = np.tile(np.linspace(-80, 255, 50).clip(0).astype(np.uint8), (37, 1))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"mask_blur": 0},
        {"mask_blur": 1.5, "strength": 0.5},
        {"invert_mask": True, "mask_blur": 1},
        {"mask": GREYS, "soft": True, "mask_blur": 1},
        {"mask": GREYS, "soft": True, "strength": 0.5, "crop_to_mask": 0},
        {"crop_to_mask": 2, "mask_blur": 1},
        {"crop_to_mask": 30, "height": 24, "width": 40},
        {"outpaint": (5, 0, 12, 3), "mask_blur": 1},
        {"outpaint": (0, 40, 0, 0), "crop_to_mask": 4, "mask_blur": 1},
        {"height": 48, "width": 32, "mask_blur": 2, "resize": "crop"},
        {"sampler": "dpmpp_sde", "mask_blur": 1},
    ],
    ids=lambda values: " ".join(values) or "default",
)
def test_known_pixels_are_byte_equal(pipeline: Pipeline, values: dict) -> None:
    """Outside of the blurred mask, whatever the size; and the mask is painted."""
    request = painted(**values)
    (image,) = pipeline.generate([request])
    canvas = pipeline.canvases(image.request, pipeline.described)
    known = canvas.alpha == 0
    assert 0.02 < known.mean() < 0.98
    assert image.pixels.shape == canvas.whole.shape == (*pipeline.image_size(image.request), 3)
    assert np.array_equal(image.pixels[known], canvas.whole[known])
    changed = (image.pixels != canvas.whole).any(axis=-1)
    assert changed[canvas.alpha == canvas.alpha.max()].mean() > 0.9
    left, top, *_ = request.outpaint or (0, 0)
    if not request.height or request.crop_to_mask is not None:  # the image has its own size
        there = np.s_[int(top) : int(top) + 37, int(left) : int(left) + 50]
        assert np.array_equal(canvas.whole[there], np.asarray(IMAGE))


def test_the_known_part_decides_what_is_painted(pipeline: Pipeline) -> None:
    other = np.asarray(IMAGE).copy()
    other[30:, 40:] = 0  # within the same 40x56 pixels, beside the mask
    inside = MASK > 0
    request = painted(mask_blur=0)
    first, second = pixels(pipeline, request, painted(mask_blur=0, init_img=Image.fromarray(other)))
    assert (first[inside] != second[inside]).any()


def test_a_black_mask_gives_the_image_back(pipeline: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    """Greys below a half count as black, but with soft; there is one notice for the whole run."""
    black = Image.fromarray(np.full_like(MASK, 127))
    crops = (None, 5, None, 5)
    results = pixels(pipeline, *(painted(black, seed=k, crop_to_mask=crop) for k, crop in enumerate(crops)))
    assert all(np.array_equal(result, np.asarray(IMAGE)) for result in results)
    assert caplog.messages == ["nothing is white in the mask image: the image comes back as it is"]
    (soft,) = pixels(pipeline, painted(black, soft=True))
    assert not np.array_equal(soft, np.asarray(IMAGE))
    white = Image.fromarray(np.full_like(MASK, 255))
    (inverted,) = pixels(pipeline, painted(white, invert_mask=True))
    assert np.array_equal(inverted, np.asarray(IMAGE))


def test_a_mask_that_its_blur_wipes_out(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    point = np.zeros_like(MASK)
    point[20, 20] = 255
    (result,) = pixels(load(), painted(point, mask_blur=60, crop_to_mask=4))
    assert np.array_equal(result, np.asarray(IMAGE))
    assert caplog.messages == ["a blur of 60 leaves nothing of the mask image: the image comes back as it is"]


def test_canvases_that_are_kept_have_a_size(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen of photographs took gigabytes."""
    pipeline = load()
    requests = [pipeline.resolve(painted(seed=1)), pipeline.resolve(painted(seed=1, mask_blur=1))]
    first, _ = (pipeline.canvases(request, pipeline.described) for request in requests)
    assert pipeline.canvases(requests[0], pipeline.described) is first
    monkeypatch.setattr(init_images, "KEPT_BYTES", first.nbytes)
    assert pipeline.canvases(pipeline.resolve(painted(mask_blur=2)), pipeline.described) is not first
    assert pipeline.canvases(requests[0], pipeline.described) is not first


def test_a_mask_of_another_size_is_resized(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = load()
    large = Image.fromarray(MASK).resize((100, 74), Image.Resampling.NEAREST)
    requests = [painted(large, seed=1), painted(large, seed=2)]
    (image, _) = pipeline.generate(requests)
    assert caplog.messages == ["the mask image has 100x74 pixels and the image 50x37: it is resized"]
    canvas = pipeline.canvases(image.request, pipeline.described)
    assert (canvas.mask[:37, :50] != (MASK > 0)).mean() < 0.05


# --- sizes


@pytest.mark.parametrize(
    ("values", "sampled", "whole"),
    [
        ({}, (40, 56), (37, 50)),
        ({"outpaint": (5, 0, 12, 3)}, (40, 72), (40, 67)),
        ({"height": 40, "width": 56}, (40, 56), (37, 50)),  # what its own size is filled up to
        ({"height": 64, "width": 64}, (64, 64), (64, 64)),
        ({"height": 64}, (64, 88), (64, 88)),
        ({"width": 24}, (16, 24), (16, 24)),
        ({"height": 72, "width": 48, "outpaint": (8, 0, 0, 20)}, (72, 48), (72, 48)),
        ({"height": 64, "outpaint": (5, 0, 0, 20)}, (64, 64), (64, 64)),  # 44 of 64, so that 59 of 64
        ({"crop_to_mask": 4}, (16, 16), (37, 50)),
        ({"crop_to_mask": 4, "height": 32, "outpaint": (0, 0, 0, 5)}, (32, 16), (42, 50)),
    ],
    ids=str,
)
def test_sizes(load: Load, values: dict, sampled: tuple[int, int], whole: tuple[int, int]) -> None:
    """A resolved request has the same, so that the settings in a file make its image again."""
    pipeline = load()
    resolved = pipeline.resolve(painted(**values))
    assert (resolved.height, resolved.width) == sampled
    canvas = pipeline.canvases(resolved, pipeline.described)
    assert canvas.image.shape == (*sampled, 3)
    assert canvas.mask.shape == sampled
    assert canvas.whole.shape == (*whole, 3)
    assert pipeline.image_size(resolved) == whole
    assert pipeline.resolve(resolved) == resolved


def test_what_outpainting_starts_from(load: Load) -> None:
    """The image lies where the margins say, its edges go on, and all that is new is to be painted."""
    pipeline = load()
    resolved = pipeline.resolve(painted(mask=None, outpaint=(8, 16, 6, 3), mask_blur=1))
    canvas = pipeline.canvases(resolved, pipeline.described)
    own = np.asarray(IMAGE)
    assert np.array_equal(canvas.whole[16:53, 8:58], own)
    assert np.array_equal(canvas.whole[16:53, 7], own[:, 0])
    assert np.array_equal(canvas.image[:56, :64], canvas.whole)
    assert (canvas.mask[16:53, 8:58] == 0).all()
    assert canvas.mask[:56, :64].sum() == 56 * 64 - 37 * 50
    (both,) = [pipeline.canvases(pipeline.resolve(painted(outpaint=(8, 0, 0, 0))), pipeline.described)]
    assert np.array_equal(both.mask[:37, 8:58], (MASK > 0).astype(np.float32))
    assert (both.mask[:, :8] == 1).all()


def test_the_crop_is_sampled_at_full_resolution(load: Load) -> None:
    pipeline = load()
    resolved = pipeline.resolve(painted(crop_to_mask=1, mask_blur=0, height=48, width=48))
    canvas = pipeline.canvases(resolved, pipeline.described)
    assert canvas.box == Box(5, 11, 25, 31)
    assert canvas.image.shape == (48, 48, 3)
    part = Image.fromarray(np.asarray(IMAGE)[5:25, 11:31]).resize((48, 48), Image.Resampling.LANCZOS)
    assert np.array_equal(canvas.image, np.asarray(part))
    blurred = pipeline.canvases(resolved.twin(mask_blur=3), pipeline.described)
    box = blurred.box.within(37, 50)  # all of the feather, which would end at a seam otherwise
    assert (blurred.alpha[: box.top] == 0).all()
    assert (blurred.alpha[:, box.right :] == 0).all()


def test_what_cannot_be_painted(load: Load) -> None:
    pipeline = load()
    with pytest.raises(InputError, match="outpaint adds 40 of height 40: nothing is left"):
        pipeline.resolve(painted(outpaint=(0, 20, 0, 20), height=40))
    with pytest.raises(InputError, match="would become 16050x8037: more than --max_pixels 64,000,000"):
        pipeline.resolve(painted(mask=None, outpaint=(8000, 8000, 8000, 0)))
    with pytest.raises(InputError, match=r"no-mask\.png"):
        pipeline.resolve(painted("no-mask.png"))


# --- batches


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral"])
def test_an_image_alone_is_the_image_of_a_batch(load: Load, inpainting_model, sampler: str) -> None:
    """Masks, strengths of pixels and images of one size may differ within a batch."""
    other = Image.fromarray(noise(39, 52, seed=1))
    requests = [
        painted(sampler=sampler, mask_blur=0),
        painted(MASK[::-1], sampler=sampler, seed=4, mask_blur=0),
        painted(GREYS, sampler=sampler, seed=5, soft=True, mask_blur=0),
        painted(sampler=sampler, seed=6, init_img=other, mask=Image.new("L", (52, 39), "white")),
    ]
    for model in ((), inpainting_model):
        together = pixels(load(*model, batch_size=4), *requests)
        single = load(*model)
        alone = [pixels(single, request)[0] for request in requests]
        assert all(map(near, together, alone))
        assert not near(together[0], together[1])


@pytest.mark.parametrize("sampler", catalogue.SAMPLERS)
def test_every_sampler_paints(load: Load, sampler: str) -> None:
    image, half = load(batch_size=2).generate(
        [painted(sampler=sampler, mask_blur=0), painted(GREYS, sampler=sampler, soft=True, mask_blur=0)]
    )
    assert np.array_equal(image.pixels[MASK == 0], np.asarray(IMAGE)[MASK == 0])
    assert image.pixels[MASK > 0].std() > 1
    assert half.pixels.std() > 1


# --- plain checkpoints


def test_a_white_mask_is_text_to_image(load: Load) -> None:
    """At strength 1, soft or not: nothing is known. The default scale is text to image's, too."""
    pipeline = load()
    white = Image.new("L", (50, 37), "white")
    hard, soft = pixels(pipeline, painted(white), painted(white, soft=True))
    (text,) = pixels(pipeline, ImageRequest("a cat", steps=4, seed=3, height=40, width=56))
    assert np.array_equal(hard, text[:37, :50])
    assert np.array_equal(soft, text[:37, :50])


def test_a_soft_mask_of_one_grey_is_image_to_image_by_that_strength(load: Load) -> None:
    """Where the run starts at the level of the first step: all pixels join it together."""
    pipeline = load()
    init = Image.fromarray(noise(64, 64))
    settings = {"init_img": init, "steps": 10, "sampler": "euler", "seed": 3, "scale": 5}
    grey = Image.new("L", (64, 64), 128)  # 0.502, at least 1 - 5 / 10
    (soft,) = pixels(pipeline, ImageRequest("a cat", mask=grey, soft=True, strength=1.0, **settings))
    (half,) = pixels(pipeline, ImageRequest("a cat", strength=0.5, **settings))
    assert near(soft, half)


# --- checkpoints for inpainting


@pytest.fixture
def channels(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the UNet was given beside the latents, by call."""
    found, plain = [], LatentDiffusion.apply_model

    def recorded(self, x: Tensor, t: Tensor, cond: dict) -> Tensor:
        found.append(cond["c_concat"][0])
        return plain(self, x, t, cond)

    monkeypatch.setattr(LatentDiffusion, "apply_model", recorded)
    return found


def test_the_unet_sees_the_mask_and_the_image_without_it(
    inpainting: Pipeline, channels: list[Tensor]
) -> None:
    pixels(inpainting, painted(scale=1.0))
    seen = channels[0]
    assert seen.shape == (1, 5, 5, 7)
    canvas = inpainting.canvases(inpainting.resolve(painted()), inpainting.described)
    assert torch.equal(seen[0, 0], torch.from_numpy(canvas.mask[::8, ::8].copy()))
    with torch.inference_mode():
        masked = to_float([canvas.image]) * torch.from_numpy(1 - canvas.mask)
        posterior = inpainting.model.encode_first_stage(masked)
    expected = posterior.mean * inpainting.model.scale_factor
    spread = posterior.std.max().item() * inpainting.model.scale_factor
    assert (seen[:, 1:] - expected).abs().max() <= 5 * spread + 1e-6
    assert (seen[:, 1:] - expected).abs().max() > 0  # a sample


@pytest.mark.parametrize("rng", ["image", "compvis"])
def test_without_a_mask_all_is_painted(inpainting: Pipeline, channels: list[Tensor], rng: str) -> None:
    request = ImageRequest("a cat", steps=2, seed=3, height=24, width=16, rng=rng)
    first, second = pixels(inpainting, request)[0], pixels(inpainting, request)[0]
    assert first.shape == (24, 16, 3)
    assert np.array_equal(first, second)
    assert (channels[0][:, 0] == 1).all()
    with torch.inference_mode():
        grey = inpainting.model.encode_first_stage(torch.zeros(1, 3, 24, 16)).mean
    torch.testing.assert_close(channels[0][:1, 1:], grey * inpainting.model.scale_factor)
    init = ImageRequest("a cat", steps=2, seed=3, init_img=IMAGE, strength=0.5)
    assert pixels(inpainting, init)[0].shape == (64, 64, 3)


def test_the_image_is_diffusers(
    inpainting: Pipeline, inpainting_model: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`StableDiffusionInpaintPipeline` with ten steps of DDIM from equal noise; also the posterior's is."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Posterior

    init, mask = Image.fromarray(noise(64, 48)), np.zeros((64, 48), np.uint8)
    mask[16:40, 8:30] = 255
    decoded, decode = [], inpainting.first_stage.decode
    draws = []
    own_sample = DiagonalGaussianDistribution.sample

    def sample(self, draw: Tensor) -> Tensor:
        draws.append(draw)
        return own_sample(self, draw)

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", sample)
    monkeypatch.setattr(
        inpainting.first_stage, "decode", lambda *args: decoded.append(decode(*args)) or decoded[0]
    )
    request = painted(mask, init_img=init, steps=10, scale=7.5, negative_prompt="a dog")
    request = inpainting.resolve(request)
    start = drawing._image_noise(inpainting, [request], inpainting.trajectory(request)[1]).start()
    pixels(inpainting, request)

    other = tiny_inpainting.diffusers_pipeline(inpainting_model[1])
    monkeypatch.setattr(Posterior, "sample", lambda self, generator=None: self.mean + self.std * draws[0])
    with torch.inference_mode():
        (image,) = other(
            prompt_embeds=inpainting.embed("a cat"),
            negative_prompt_embeds=inpainting.embed("a dog"),
            image=init,
            mask_image=Image.fromarray(mask),
            height=64,
            width=48,
            strength=1.0,
            num_inference_steps=10,
            guidance_scale=7.5,
            latents=start,
            output_type="pt",
        ).images
    expected = (decoded[0][0] / 2 + 0.5).clamp(0, 1)
    assert expected.std() > 0.01
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-3)


def test_the_masked_image_is_encoded_in_float32_where_low_precision_fails(
    load: Load, inpainting_model: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = LatentDiffusion.encode_first_stage

    def overflowing(self, x: Tensor) -> DiagonalGaussianDistribution:
        posterior = plain(self, x)
        low = posterior.mean.dtype != torch.float32
        return DiagonalGaussianDistribution(posterior.parameters * float("nan")) if low else posterior

    monkeypatch.setattr(LatentDiffusion, "encode_first_stage", overflowing)
    pipeline = load(*inpainting_model, precision="bf16")
    assert pixels(pipeline, painted(steps=1))[0].std() > 1
    assert pipeline.first_stage.in_float32


@pytest.mark.parametrize("name", ["init_img", "mask"])
def test_files_are_read_before_their_batch(
    load: Load, reads_ahead: Callable, tmp_path: Path, name: str
) -> None:
    """A file that vanished ended the run: it was first read when its batch had begun."""
    path = tmp_path / f"{name}.png"
    (IMAGE if name == "init_img" else Image.fromarray(MASK)).save(path)
    reads_ahead(load(), painted(**{name: str(path)}), path)
