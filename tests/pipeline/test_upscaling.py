"""Enlarging by the x4 model: the small image and its noise, sizes, tiles and their seams."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers_pipelines import tiny_config, tiny_pipeline
from PIL import Image
from tiny_siblings import upscaler_section, write_model

from ldm.errors import FieldError, InputError
from ldm.images.pixels import to_float, to_uint8
from ldm.optimize.offload import PlainTransfer, offload
from ldm.optimize.tiling import overlap_of, spans
from ldm.pipeline import ImageRequest, Pipeline
from ldm.pipeline import pipeline as engine
from ldm.pipeline.upscaling import TiledModel
from ldm.sampling.noise import ImageNoise, ImageSeeds, image_generator, place_generator, slerp

Load = Callable[..., Pipeline]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_model(tmp_path_factory.mktemp("x4"), "x4", upscaler_section())


@pytest.fixture
def pipeline(load: Load, files: tuple[Path, Path]) -> Pipeline:
    return load(*files)


def photo(height: int = 16, width: int = 24, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def smooth(height: int, width: int) -> Image.Image:
    """An image without edges."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    return Image.fromarray((255 * np.stack([x, y, (x + y) / 2], axis=-1)).astype(np.uint8))


def one(image: Image.Image | None = None, **values: object) -> ImageRequest:
    base = {"prompt": "a cat", "steps": 2, "seed": 1, "scale": 3.0, "noise_level": 20}
    return ImageRequest(**base | {"init_img": photo() if image is None else image} | values)


def pixels(pipeline: Pipeline, *requests: ImageRequest) -> list[np.ndarray]:
    return [image.pixels for image in pipeline.generate(requests)]


@pytest.fixture
def calls(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """What each call of the UNet is given."""
    found, plain = [], pipeline.model.model.forward

    def forward(x: torch.Tensor, t: torch.Tensor, **cond: object) -> torch.Tensor:
        found.append({"x": x, "t": t, "concat": cond["c_concat"][0], "label": cond["c_adm"]})
        return plain(x, t, **cond)

    monkeypatch.setattr(pipeline.model.model, "forward", forward)
    return found


def test_the_unet_sees_the_noised_image_and_its_level(pipeline: Pipeline, calls: list) -> None:
    image = photo()
    (result,) = pixels(pipeline, one(image, noise_level=200))
    assert result.shape == (64, 96, 3)
    small = to_float([np.asarray(image)])
    drawn = torch.randn(small.shape[1:], generator=place_generator(1, b"small image"))
    expected, _ = pipeline.model.low_scale_model(small, torch.tensor([200]), drawn[None])
    for call in calls:
        assert call["x"].shape == (2, 4, 16, 24)  # both halves of guidance
        assert torch.equal(call["concat"], expected.expand(2, -1, -1, -1))
        assert call["label"].tolist() == [200, 200]
        assert call["label"].dtype == torch.int64
    start = torch.randn(4, 16, 24, generator=image_generator(1))
    torch.testing.assert_close(calls[0]["x"][0], start, atol=1e-3, rtol=0)  # pure noise, unmoved by the other


def test_images_of_a_batch_have_their_own_noise_and_levels(load: Load, files: tuple[Path, Path]) -> None:
    requests = [one(photo(seed=k), seed=k, noise_level=100 * k) for k in range(3)]
    alone, together = load(*files), load(*files, batch_size=3)
    for image, other in zip(pixels(alone, *requests), pixels(together, *requests), strict=True):
        assert np.abs(image.astype(int) - other).max() <= 1


def test_a_variation_varies_the_small_images_noise() -> None:
    def drawn(*images: ImageSeeds) -> torch.Tensor:
        return ImageNoise(images, (4, 2, 2), torch.device("cpu")).at(b"place", (3, 5, 6))

    a, b = drawn(ImageSeeds(1)), drawn(ImageSeeds(2))
    assert not torch.equal(a, b)
    varied = drawn(ImageSeeds(1, variation_seed=2, variation_strength=0.5), ImageSeeds(7))
    assert torch.equal(varied[:1], slerp(a, b, 0.5))


@pytest.mark.parametrize(
    ("asked", "size"), [({}, (64, 96)), ({"height": 32}, (32, 48)), ({"height": 16, "width": 16}, (16, 16))]
)
def test_sizes(pipeline: Pipeline, asked: dict[str, int], size: tuple[int, int]) -> None:
    """Four times the image's own, or what the user says of the result."""
    resolved = pipeline.resolve(one(**asked))
    assert (resolved.height, resolved.width) == size
    assert pipeline.resolve(resolved) == resolved
    (result,) = pixels(pipeline, one(**asked, steps=1))
    assert result.shape[:2] == size


def test_odd_sizes(pipeline: Pipeline) -> None:
    (result,) = pixels(pipeline, one(photo(13, 7), steps=1))
    assert result.shape == (52, 28, 3)


def test_what_is_refused(pipeline: Pipeline, load: Load) -> None:
    pipeline.init_pixels.max_pixels = 64 * 96 - 1
    with pytest.raises(InputError, match="would become 96x64: more than --max_pixels 6,143"):
        pipeline.resolve(one())
    pipeline.init_pixels.max_pixels = 10**6
    with pytest.raises(FieldError, match=r"noise_level 351 is not in range: .* 0 … 350"):
        pipeline.resolve(one(noise_level=351))
    assert pipeline.resolve(one(noise_level=350)).noise_level == 350
    with pytest.raises(FieldError, match="tile 15: take at least 16, or 0"):
        pipeline.resolve(one(tile=15))
    with pytest.raises(InputError, match="this model enlarges images"):
        pipeline.resolve(ImageRequest("a cat"))
    with pytest.raises(FieldError, match="this model enlarges nothing"):
        load().resolve(one())
    with pytest.raises(FieldError, match=r"deepcache 2 with tiles of 16 pixels"):
        Pipeline(pipeline.files, pipeline.config, engine.RuntimeOptions(device="cpu", deepcache=2)).resolve(
            one(tile=16)
        )


def test_a_missing_scale_is_that_of_the_task(pipeline: Pipeline) -> None:
    assert pipeline.resolve(one(scale=None)).scale == 9.0


# Tiles


def test_memory_decides(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image as a whole where it fits, else the native size times a power of two, at least once."""

    def chosen(memory: float, image: Image.Image) -> int:
        monkeypatch.setattr(engine, "all_memory", lambda device: memory)
        return pipeline.resolve(one(image)).tile

    image = smooth(100, 100)
    assert [chosen(memory, image) for memory in (1, 1e7, 4e7, 16e7, 64e7, 1e12)] == [16, 16, 32, 64, 0, 0]
    assert chosen(1, smooth(16, 16)) == 0  # no larger than a tile
    assert pipeline.resolve(one(image, tile=0)).tile == 0
    assert pipeline.resolve(one(image, tile=40)).tile == 40
    assert pipeline.resolve(one(image, tile=100)).tile == 0


def test_the_tile_is_recorded(pipeline: Pipeline) -> None:
    images = pipeline.generate([one(smooth(40, 24), tile=24, steps=1), one(smooth(40, 24), steps=1)])
    assert [image.settings["tile"] for image in images] == [24, 0]


def test_one_tile_is_none(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 4, 24, 20)
    cond = {
        "c_concat": [torch.randn(2, 3, 24, 20)],
        "c_crossattn": [torch.randn(2, 77, 32)],
        "c_adm": torch.tensor([20, 30]),
    }
    t = torch.full((2,), 500.0)
    with torch.inference_mode():
        plain = pipeline.model.apply_model(x, t, cond)
        assert torch.equal(TiledModel(pipeline.model, 24).apply_model(x, t, cond), plain)


def test_tiles_see_their_part_of_everything(pipeline: Pipeline) -> None:
    """With a model that works latent by latent tiles change nothing."""

    class Pointwise:
        parameterization, alphas_cumprod = "v", torch.ones(1)

        def __init__(self) -> None:
            self.sizes: list[tuple[int, ...]] = []

        def apply_model(self, x: torch.Tensor, t: torch.Tensor, cond: dict) -> torch.Tensor:
            self.sizes.append(tuple(x.shape[2:]))
            scale = t[:, None, None, None] + cond["c_adm"][:, None, None, None]
            return x * scale + cond["c_concat"][0].mean(dim=1, keepdim=True) + cond["c_crossattn"][0].mean()

    model = Pointwise()
    x, concat = torch.randn(2, 4, 70, 33), torch.randn(2, 3, 70, 33)
    cond = {"c_concat": [concat], "c_crossattn": [torch.randn(2, 77, 8)], "c_adm": torch.tensor([2, 3])}
    t = torch.tensor([1.0, 2.0])
    tiled = TiledModel(model, 32).apply_model(x, t, cond)
    assert set(model.sizes) == {(32, 32)}
    torch.testing.assert_close(tiled, model.apply_model(x, t, cond), atol=1e-5, rtol=0)


class Disagreeing:
    """A denoiser of one channel whose tiles differ by their means, as normalisation by tile makes them."""

    parameterization, alphas_cumprod = "v", torch.ones(1)

    def apply_model(self, x: torch.Tensor, t: torch.Tensor, cond: dict) -> torch.Tensor:
        shade = cond["c_concat"][0]
        return shade + shade.mean(dim=(2, 3), keepdim=True)


def test_no_seams() -> None:
    """The largest jump at the borders of tiles stays below that inside them, on an image without edges."""
    width, tile = 240, 48
    shade = 1 - torch.cos(torch.linspace(0, 3 * torch.pi, width)).expand(1, 1, 60, width)
    x, t = torch.zeros(1, 1, 60, width), torch.zeros(1)
    model = Disagreeing()
    blended = TiledModel(model, tile).apply_model(x, t, {"c_concat": [shade]})[0, 0, 30]
    cut = spans(width, tile, overlap_of(tile), 1)
    edges = sorted({place for span in cut for place in (span.start, span.stop) if 0 < place < width})
    assert len(edges) == 2 * (len(cut) - 1) > 8
    found = blended.diff().abs()  # found[i] lies between i and i + 1
    inside = torch.tensor([step for place, step in enumerate(found.tolist(), 1) if place not in edges])
    assert found[torch.tensor(edges) - 1].max() < inside.max()
    # blending is what does it: side by side the tiles differ by more than ten times that
    means = torch.stack([shade[..., span.start : span.stop].mean() for span in cut])
    assert means.diff().abs().max() > 10 * (found - (shade[0, 0, 30].diff().abs())).abs().max()


def test_tiles_are_near_the_whole(pipeline: Pipeline) -> None:
    whole, tiled = pixels(pipeline, one(smooth(32, 64), tile=0), one(smooth(32, 64), tile=32))
    assert not np.array_equal(whole, tiled)
    assert np.abs(whole.astype(float) - tiled).mean() < 40


def test_weights_that_stay_in_host_memory(pipeline: Pipeline) -> None:
    """`--low_vram`: the noise schedule of the small image is not forgotten."""
    request = one(smooth(24, 40), tile=16)
    (expected,) = pixels(pipeline, request)
    offload(pipeline.model, torch.device("cpu"), transfer=PlainTransfer())
    assert np.array_equal(pixels(pipeline, request)[0], expected)


def test_vae_tiling_keeps_its_own_tiles(load: Load, files: tuple[Path, Path]) -> None:
    plain, own = load(*files), load(*files, vae_tiling=True)
    request = one(smooth(32, 48), tile=32)
    assert [image.shape for image in pixels(own, request)] == [
        image.shape for image in pixels(plain, request)
    ]


def test_auto_batches_are_tried_with_the_small_image(pipeline: Pipeline) -> None:
    requests = [pipeline.resolve(one(seed=k)) for k in range(2)]
    assert pipeline.fitting_batch(requests, 2) >= 1


# The images of diffusers


def test_ten_steps_are_diffusers(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """StableDiffusionUpscalePipeline, from equal noise on the latents and on the small image."""
    theirs = tiny_pipeline("x4")
    theirs.save_pretrained(tmp_path / "x4")
    config = tmp_path / "x4.yaml"
    config.write_text(json.dumps({"model": tiny_config("x4")}))
    decoded: list[torch.Tensor] = []
    monkeypatch.setattr(engine, "to_uint8", lambda x: decoded.append(x) or to_uint8(x))
    image = photo(16, 24)
    (ours,) = load(config, tmp_path / "x4").generate(
        [one(image, negative_prompt="a dog", steps=10, scale=5.0, noise_level=60)]
    )
    drawn = torch.randn(3, 16, 24, generator=place_generator(1, b"small image"))[None]
    module = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_upscale"
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, **__: drawn)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        "a cat",
        negative_prompt="a dog",
        image=image,
        num_inference_steps=10,
        guidance_scale=5.0,
        noise_level=60,
        latents=torch.randn(1, 4, 16, 24, generator=image_generator(1)),
        output_type="pt",
    ).images
    assert ours.pixels.shape == (64, 96, 3)
    torch.testing.assert_close(((decoded[0] + 1) / 2).clamp(0, 1), expected, atol=1e-3, rtol=0)


def test_the_small_image_is_read_before_its_batch(
    pipeline: Pipeline, reads_ahead: Callable, tmp_path: Path
) -> None:
    photo().save(tmp_path / "small.png")
    reads_ahead(pipeline, one(str(tmp_path / "small.png")), tmp_path / "small.png")
