"""Pixel upscalers: files that spandrel knows and others, sizes, tiles, what is recorded."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm.errors import FieldError, InputError
from ldm.pipeline import ImageRequest, RuntimeOptions
from ldm.pipeline.pixel_upscaler import PixelUpscaler, load_network

spandrel = pytest.importorskip("spandrel")
from spandrel.architectures.Compact import Compact  # noqa: E402
from spandrel.architectures.ESRGAN import ESRGAN  # noqa: E402


def esrgan(scale: int = 4, channels: int = 3) -> ESRGAN:
    torch.manual_seed(0)
    return ESRGAN(in_nc=channels, out_nc=channels, num_filters=8, num_blocks=2, scale=scale)


@pytest.fixture(scope="module")
def network() -> ESRGAN:
    return esrgan().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, network: ESRGAN) -> Path:
    path = tmp_path_factory.mktemp("esrgan") / "4x-tiny.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture
def open_upscaler(file: Path) -> Callable[..., PixelUpscaler]:
    def call(path: Path | None = None, **options: object) -> PixelUpscaler:
        return PixelUpscaler(
            path or file, RuntimeOptions(**{"device": "cpu"} | options), safety="off", max_pixels=100_000
        )

    return call


def photo(height: int = 12, width: int = 20) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def one(image: Image.Image | None = None, **values: object) -> ImageRequest:
    return ImageRequest(init_img=photo() if image is None else image, noise_level=20, **values)


def enlarged(upscaler: PixelUpscaler, request: ImageRequest) -> np.ndarray:
    (image,) = upscaler.generate([request])
    return image.pixels


def test_it_is_the_networks_output(open_upscaler: Callable, network: ESRGAN) -> None:
    x = torch.from_numpy(np.array(photo())).permute(2, 0, 1)[None] / 255
    expected = (255 * network(x).clamp(0, 1)).round().byte()[0].permute(1, 2, 0).numpy()
    found = enlarged(open_upscaler(), one())
    assert found.shape == (48, 80, 3)
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert len(np.unique(found)) > 20


@pytest.mark.parametrize("form", ["pth", "params_ema", "params and params_ema", "safetensors", "new names"])
def test_files(form: str, open_upscaler: Callable, file: Path, network: ESRGAN, tmp_path: Path) -> None:
    """Real-ESRGAN's files hold their weights under params_ema, and have newer names."""
    state, path = network.state_dict(), tmp_path / "upscaler.pth"
    if form == "params_ema":
        torch.save({"params_ema": state}, path)
    elif form == "params and params_ema":
        torch.save({"params": {name: t * 0 for name, t in state.items()}, "params_ema": state}, path)
    elif form == "safetensors":
        save_file(state, path := tmp_path / "upscaler.safetensors")
    elif form == "new names":
        torch.save({"params_ema": {newer(name): t for name, t in state.items()}}, path)
    else:
        path = file
    assert np.array_equal(enlarged(open_upscaler(path), one()), enlarged(open_upscaler(), one()))


def newer(name: str) -> str:
    """Real-ESRGAN's name of a weight of the original ESRGAN, of two blocks."""
    for old, new in (
        ("model.0.", "conv_first."),
        ("model.1.sub.2.", "conv_body."),
        ("model.1.sub.", "body."),
        ("model.3.", "conv_up1."),
        ("model.6.", "conv_up2."),
        ("model.8.", "conv_hr."),
        ("model.10.", "conv_last."),
    ):
        name = name.replace(old, new)
    return name.replace("RDB", "rdb").replace(".0.weight", ".weight").replace(".0.bias", ".bias")


def test_another_architecture_has_another_factor(open_upscaler: Callable, tmp_path: Path) -> None:
    torch.manual_seed(0)
    compact = Compact(num_feat=8, num_conv=2, upscale=2)
    torch.save({"params": compact.state_dict()}, tmp_path / "2x.pth")
    upscaler = open_upscaler(tmp_path / "2x.pth")
    assert enlarged(upscaler, one()).shape == (24, 40, 3)
    assert upscaler.facts["upscaler"] == "RealESRGAN Compact"


def test_sizes(open_upscaler: Callable) -> None:
    """The factor decides, or what the user says of the result."""
    assert enlarged(open_upscaler(), one(photo(7, 9))).shape == (28, 36, 3)
    assert enlarged(open_upscaler(), one(height=32, width=64, resize="crop")).shape == (32, 64, 3)
    with pytest.raises(FieldError, match="height 34 is not a multiple of 4"):
        open_upscaler().resolve(one(height=34))
    with pytest.raises(InputError, match="would become 800x400: more than --max_pixels 100,000"):
        open_upscaler().resolve(one(photo(100, 200)))
    with pytest.raises(FieldError, match="init_img is missing"):
        open_upscaler().resolve(ImageRequest())


def test_tiles(open_upscaler: Callable) -> None:
    """The network is one of convolutions: tiles differ only near their borders, which count least."""
    y, x = np.mgrid[:60, :90] / 90
    image = Image.fromarray((255 * np.stack([x, y, (x + y) / 2], axis=-1)).astype(np.uint8))
    whole = enlarged(open_upscaler(), one(image, tile=0)).astype(int)
    tiled = enlarged(open_upscaler(), one(image, tile=32)).astype(int)
    assert whole.shape == tiled.shape == (240, 360, 3)
    assert np.abs(whole - tiled).max() <= 3
    assert open_upscaler().resolve(one(image)).tile == 0
    with pytest.raises(FieldError, match="tile 8: take at least 16"):
        open_upscaler().resolve(one(tile=8))


def test_large_images_are_tiled(open_upscaler: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.pipeline.pixel_upscaler.TILE", 16)
    assert open_upscaler().resolve(one(photo(12, 17))).tile == 16
    assert open_upscaler().resolve(one(photo(12, 16))).tile == 0
    upscaler = open_upscaler()
    monkeypatch.setattr(upscaler.network, "tiling", spandrel.ModelTiling.INTERNAL)
    assert upscaler.resolve(one(photo(12, 17))).tile == 0


def test_what_is_recorded(open_upscaler: Callable, file: Path) -> None:
    """No prompt, no seed, no sampler: none of them had a say."""
    (image,) = open_upscaler().generate([one(prompt="a cat", steps=7, sampler="euler", watermark="none")])
    settings = image.settings
    assert {name: settings[name] for name in ("prompt", "width", "height", "tile", "upscaler")} == {
        "prompt": "",
        "width": 80,
        "height": 48,
        "tile": 0,
        "upscaler": "ESRGAN",
    }
    assert settings["checkpoint"] == str(file)
    assert not {"seed", "sampler", "steps", "scale", "noise_level"} & settings.keys()


def test_precision(open_upscaler: Callable, caplog: pytest.LogCaptureFixture) -> None:
    full, bf16 = (enlarged(open_upscaler(precision=name), one()) for name in ("full", "bf16"))
    assert not np.array_equal(full, bf16)
    assert np.abs(full.astype(int) - bf16).max() < 12
    upscaler = open_upscaler(precision="half")
    upscaler.network.supports_half = False
    assert upscaler.precision == "full"
    assert "ESRGAN cannot be computed in half" in caplog.text


def test_nan_in_low_precision(open_upscaler: Callable, caplog: pytest.LogCaptureFixture) -> None:
    upscaler = open_upscaler(precision="bf16")
    plain = upscaler.model._call_fn
    upscaler.model._call_fn = lambda network, x: (
        plain(network, x) * (float("nan") if x.dtype == torch.bfloat16 else 1)
    )
    expected = enlarged(open_upscaler(), one()).astype(int)
    assert np.abs(enlarged(upscaler, one()) - expected).max() < 12
    assert "float32 from here on" in caplog.text


def test_options_without_effect_are_said(open_upscaler: Callable, caplog: pytest.LogCaptureFixture) -> None:
    open_upscaler(deepcache=2, batch_size=2)
    assert [record.message for record in caplog.records] == [
        "--deepcache: without effect on a pixel upscaler"
    ]


def test_other_files_are_named(model: tuple[Path, Path], tmp_path: Path) -> None:
    def refused(path: Path) -> str:
        with pytest.raises(InputError) as caught:
            load_network(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "looks like a latent diffusion model" in refused(model[1])
    other = tmp_path / "other.safetensors"
    save_file({"some.weight": torch.zeros(3)}, other)
    assert "no pixel upscaler that the spandrel package knows" in refused(other)
    state = {name: t for name, t in tiny.state_dict().items() if name.startswith("first_stage_model.")}
    save_file(state, tmp_path / "vae.safetensors")
    assert "an autoencoder alone" in refused(tmp_path / "vae.safetensors")
    torch.save(esrgan(channels=1).state_dict(), tmp_path / "grey.pth")
    assert "ESRGAN for 1 channels" in refused(tmp_path / "grey.pth")
    broken = {name: t for name, t in esrgan().state_dict().items() if "RDB3" not in name}
    torch.save(broken, tmp_path / "broken.pth")
    assert "broken.pth cannot be used" in refused(tmp_path / "broken.pth")
    with pytest.raises(InputError, match=r"--model .*nothing.pth: there is no such file"):
        PixelUpscaler(tmp_path / "nothing.pth", RuntimeOptions(device="cpu"))


def test_the_image_is_read_before_its_batch(
    open_upscaler: Callable, reads_ahead: Callable, tmp_path: Path
) -> None:
    photo().save(tmp_path / "small.png")
    reads_ahead(open_upscaler(), one(str(tmp_path / "small.png")), tmp_path / "small.png")
