"""Depth maps: given, fitted, estimated; what the UNet sees of them; diffusers' images."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers_pipelines import tiny_config, tiny_pipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_siblings import depth_section, write_model

from ldm.errors import FieldError, InputError
from ldm.images.pixels import to_float, to_uint8
from ldm.models.diffusion.ddpm import LatentDepth2ImageDiffusion
from ldm.optimize.offload import PlainTransfer, Stage, offload
from ldm.pipeline import ImageRequest, Pipeline
from ldm.pipeline import pipeline as engine
from ldm.pipeline.depth import WHITE, DepthMaps
from ldm.pipeline.init_images import InitImages

Load = Callable[..., Pipeline]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_model(tmp_path_factory.mktemp("depth"), "depth", depth_section())


@pytest.fixture
def pipeline(load: Load, files: tuple[Path, Path]) -> Pipeline:
    return load(*files)


def photo(height: int = 64, width: int = 64, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def ramp(height: int = 64, width: int = 64) -> Image.Image:
    """A 16-bit map that comes nearer from left to right."""
    values = np.linspace(0, WHITE, width).round().astype(np.uint16)
    return Image.fromarray(np.tile(values, (height, 1)))


def one(**values: object) -> ImageRequest:
    base = {"prompt": "a cat", "steps": 3, "seed": 1, "scale": 3.0}
    if values.get("init_img") is not None:
        base["strength"] = 0.9
    return ImageRequest(**base | values)


def seen(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The fifth channel of each call of the UNet, [b, h, w]."""
    found, plain = [], pipeline.model.model.diffusion_model.forward

    def forward(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        found.append(x[:, 4].clone())
        return plain(x, *args, **kwargs)

    monkeypatch.setattr(pipeline.model.model.diffusion_model, "forward", forward)
    return found


def test_the_unet_sees_the_map_of_each_image(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    channels = seen(pipeline, monkeypatch)
    pipeline.options = replace(pipeline.options, batch_size=2)
    other = ramp().transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    list(pipeline.generate([one(depth=ramp(), init_img=photo()), one(depth=other, init_img=photo())]))
    (channel,) = {tuple(call.flatten().tolist()) for call in channels}  # the same at every step
    rows = torch.tensor(channel).reshape(4, 8, 8)  # both halves of guidance
    assert torch.equal(rows[:2], rows[2:])
    assert rows.min() == -1.0
    assert 0.999 < rows.max() <= 1.0
    assert (rows[0].diff(dim=1) > 0).all()
    torch.testing.assert_close(rows[1], rows[0].flip(1), atol=1e-3, rtol=0)


def test_the_estimate_is_made_once(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, plain = [], LatentDepth2ImageDiffusion.estimate_depth

    def estimate(self: LatentDepth2ImageDiffusion, image: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(image.shape))
        return plain(self, image)

    monkeypatch.setattr(LatentDepth2ImageDiffusion, "estimate_depth", estimate)
    channels = seen(pipeline, monkeypatch)
    image = photo()
    images = list(pipeline.generate([one(init_img=image, seed=k) for k in range(3)]))
    assert calls == [(1, 3, 64, 64)]
    model = pipeline.model
    with torch.inference_mode():
        expected = model.depth_channel(plain(model, to_float([np.asarray(image)])), (8, 8))
    torch.testing.assert_close(channels[0][0], expected[0, 0], atol=1e-5, rtol=0)
    assert images[0].depth.dtype == np.uint16
    assert images[0].depth.shape == (64, 64)
    assert (images[0].depth.min(), images[0].depth.max()) == (0, WHITE)
    assert len({image.pixels.tobytes() for image in images}) == 3
    # the saved map gives the same image
    (again,) = pipeline.generate([one(init_img=image, seed=0, depth=Image.fromarray(images[0].depth))])
    assert np.abs(again.pixels.astype(int) - images[0].pixels).max() <= 1


def test_a_map_alone_starts_from_noise(pipeline: Pipeline) -> None:
    (small,) = pipeline.generate([one(depth=ramp(70, 130))])
    assert small.pixels.shape == (64, 128, 3)
    assert small.request.strength is None
    (sized,) = pipeline.generate([one(depth=ramp(70, 130), height=16, width=24)])
    assert sized.pixels.shape == (*sized.depth.shape, 3) == (16, 24, 3)


@pytest.mark.parametrize(
    ("grey", "word"), [(0, "all black"), (40_000, "all one grey"), (WHITE, "all one grey")]
)
def test_a_flat_map_gives_an_image_and_a_notice(
    pipeline: Pipeline,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    grey: int,
    word: str,
) -> None:
    """The original divided by zero: NaN."""
    channels = seen(pipeline, monkeypatch)
    flat = Image.fromarray(np.full((64, 64), grey, np.uint16))
    images = list(pipeline.generate([one(depth=flat, init_img=photo(), seed=k) for k in range(2)]))
    assert all(image.pixels is not None for image in images)
    assert torch.equal(channels[0], torch.full_like(channels[0], -1.0))
    (line,) = [record.message for record in caplog.records if "depth map" in record.message]
    assert word in line


def maps() -> DepthMaps:
    return DepthMaps(InitImages(1_000_000))


def test_sixteen_bits_are_kept() -> None:
    fine = Image.fromarray((np.arange(64 * 64).reshape(64, 64) + 20_000).astype(np.uint16))
    request = one(depth=fine, init_img=photo(), height=64, width=64)
    found = maps().given(request)
    assert np.array_equal(found.round().astype(np.uint16), np.asarray(fine))


def test_a_map_of_another_size_is_resized_with_one_notice(caplog: pytest.LogCaptureFixture) -> None:
    request = one(depth=ramp(30, 50), init_img=photo(64, 128), height=64, width=128)
    kept = maps()
    found = kept.given(request)
    kept.given(request.twin(seed=2))
    assert found.shape == (64, 128)
    assert (np.diff(found, axis=1) >= 0).all()
    (line,) = [record.message for record in caplog.records]
    assert "50x30" in line
    assert "128x64" in line


@pytest.mark.parametrize("resize", ["stretch", "crop", "pad"])
def test_a_map_of_the_init_images_size_is_fitted_like_it(
    resize: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A depth map that is the red of its photograph stays on it."""
    values = np.zeros((60, 120, 3), np.uint8)
    values[10:50, 20:60] = 255
    image = Image.fromarray(values)
    request = one(
        depth=image.convert("L"), init_img=image, height=64, width=64, resize=resize, background="black"
    )
    kept = maps()
    red = kept.images(request)[..., 0].astype(float) / 255
    assert np.abs(kept.given(request) / WHITE - red).mean() < 0.03
    assert not caplog.records


def test_low_precision_that_overflows_is_left(
    load: Load, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = LatentDepth2ImageDiffusion.estimate_depth

    def estimate(self: LatentDepth2ImageDiffusion, image: torch.Tensor) -> torch.Tensor:
        depth = plain(self, image)
        half = next(self.depth_model.parameters()).dtype == torch.bfloat16
        return depth * float("inf") if half else depth

    monkeypatch.setattr(LatentDepth2ImageDiffusion, "estimate_depth", estimate)
    pipeline = load(*files, precision="bf16")
    images = list(pipeline.generate([one(init_img=photo(seed=k)) for k in range(2)]))
    assert all(image.pixels is not None for image in images)
    assert len([record for record in caplog.records if "float32" in record.message]) == 1


def test_weights_that_stay_in_host_memory(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--low_vram`: the estimator's weights come to the device, too."""
    request = one(init_img=photo())
    (expected,) = pipeline.generate([request])
    offload(pipeline.model, torch.device("cpu"), transfer=PlainTransfer())
    entered, plain = [], Stage.enter
    monkeypatch.setattr(Stage, "enter", lambda self, part: entered.append(part.module) or plain(self, part))
    (found,) = pipeline.generate([request])
    assert np.array_equal(found.pixels, expected.pixels)
    assert pipeline.model.depth_model in entered


def test_a_model_without_an_estimator_takes_maps_alone(
    load: Load, files: tuple[Path, Path], tmp_path: Path
) -> None:
    """A file without `depth_model.*` is refused in one line before it is loaded, but for given maps."""
    lacking = tmp_path / "lacking.safetensors"
    state = {name: t for name, t in load_file(files[1]).items() if not name.startswith("depth_model.")}
    save_file(state, lacking)
    opened = Pipeline.open(str(lacking), str(files[0]), safety="off")
    with pytest.raises(FieldError, match=r"lacking.safetensors has no weights that estimate depth .* depth$"):
        opened.resolve(one(init_img=photo()))
    assert "model" not in vars(opened)
    pipelines = [load(files[0], lacking), load(*files)]
    request = one(init_img=photo(), depth=ramp())
    lean, full = (next(iter(pipeline.generate([request]))).pixels for pipeline in pipelines)
    assert np.array_equal(lean, full)


def test_other_models_refuse_a_map(load: Load, pipeline: Pipeline) -> None:
    with pytest.raises(FieldError, match="this model reads no depth map"):
        load().resolve(one(depth=ramp()))
    with pytest.raises(FieldError, match=r"paints over a depth map: give init_img, or a map as depth"):
        pipeline.resolve(one())


def test_too_large_a_map(load: Load, files: tuple[Path, Path]) -> None:
    pipeline = load(*files)
    pipeline.init_pixels.max_pixels = 64 * 64
    with pytest.raises(InputError, match="128x64: more than --max_pixels 4,096"):
        pipeline.resolve(one(depth=ramp(32, 64), height=64, width=128))


def test_the_default_scale_is_that_of_the_task(pipeline: Pipeline) -> None:
    assert pipeline.resolve(replace(one(init_img=photo()), scale=None)).scale == 9.0


@pytest.mark.parametrize("strength", [1.0, 0.9])
def test_ten_steps_are_diffusers(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strength: float
) -> None:
    """StableDiffusionDepth2ImgPipeline, from the start latents that are ours: it noises an init image to one
    level less."""
    theirs = tiny_pipeline("depth")
    theirs.save_pretrained(tmp_path / "depth")
    config = tmp_path / "depth.yaml"
    config.write_text(json.dumps({"model": tiny_config("depth")}))
    decoded, starts = [], []
    ours = load(config, tmp_path / "depth")
    plain = ours.model.apply_model
    monkeypatch.setattr(
        ours.model, "apply_model", lambda x, t, cond: starts.append(x[:1].clone()) or plain(x, t, cond)
    )
    monkeypatch.setattr(engine, "to_uint8", lambda x: decoded.append(x) or to_uint8(x))
    request = one(depth=ramp(), init_img=photo(), steps=10, scale=5.0, strength=strength)
    list(ours.generate([request]))
    assert len(starts) == round(10 * strength)
    monkeypatch.setattr(theirs, "prepare_latents", lambda *_, **__: starts[0].clone())
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        "a cat",
        image=photo(),
        depth_map=torch.from_numpy(np.asarray(ramp()).astype(np.float32))[None],
        strength=strength,
        num_inference_steps=10,
        guidance_scale=5.0,
        output_type="pt",
    ).images
    torch.testing.assert_close(((decoded[0] + 1) / 2).clamp(0, 1), expected, atol=1e-3, rtol=0)


def test_a_map_is_fitted_for_each_init_image(caplog: pytest.LogCaptureFixture) -> None:
    """The one that had been fitted for an image of the map's own size was taken for the others, too."""
    common = {"depth": ramp(60, 120), "height": 64, "width": 64, "resize": "crop"}
    own, other = (one(init_img=photo(*size), **common) for size in ((60, 120), (80, 80)))
    kept = maps()
    cropped = kept.given(own)
    assert not caplog.records
    assert np.array_equal(kept.given(other), maps().given(other))
    assert not np.array_equal(kept.given(other), cropped)
    assert np.array_equal(kept.given(own), cropped)


@pytest.mark.parametrize("name", ["init_img", "depth"])
def test_files_are_read_before_their_batch(
    pipeline: Pipeline, reads_ahead: Callable, tmp_path: Path, name: str
) -> None:
    """The map comes from the init image in the sizes of both passes where there is no file of one."""
    path = tmp_path / f"{name}.png"
    (photo() if name == "init_img" else ramp()).save(path)
    reads_ahead(pipeline, one(**{name: str(path)}, hires=2.0), path)
