"""Previews: colours of latents, and the file that shows them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Result, refused
from PIL import Image

from ldm.images import preview as previews
from ldm.images.pixels import to_float
from ldm.images.preview import FACTORS, Preview, correlation, drawn, factors_of, fit_factors, to_colours
from ldm.pipeline import ImageRequest, Pipeline
from ldm.scenes.captions import caption
from ldm.scenes.scene import random_scene


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(3, 4, 8, 6, generator=torch.Generator().manual_seed(0))


def test_a_linear_map_is_found_again(latents: torch.Tensor) -> None:
    truth = torch.randn(9, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 20
    truth[4:8] = 0  # of the averages
    colours = latents.double().movedim(1, -1) @ truth[:4] + truth[8]
    pixels = colours.movedim(-1, 1).repeat_interleave(8, 2).repeat_interleave(8, 3)
    factors = fit_factors(latents, pixels)
    assert torch.allclose(factors, truth, atol=1e-6)
    assert correlation(latents, pixels, factors.tolist()) > 0.9999
    expected = (127.5 * (colours + 1)).round().numpy()
    for table in (factors, truth[[0, 1, 2, 3, 8]]):
        assert np.abs(to_colours(latents, table.tolist()).astype(int) - expected).max() <= 1


def test_broken_latents_have_colours(latents: torch.Tensor) -> None:
    latents[0, 0, 0, 0], latents[0, 0, 0, 1] = float("nan"), float("inf")
    colours = to_colours(latents, FACTORS[0.18215])
    assert (colours.dtype, colours.shape) == (np.uint8, (3, 8, 6, 3))


def test_latents_are_known_by_their_scale() -> None:
    assert factors_of(0.18215) is FACTORS[0.18215]
    assert factors_of(0.29290545) is FACTORS[0.29291]
    assert factors_of(0.5) is None


def test_the_grid_of_a_batch() -> None:
    """As wide as high, of images enlarged by whole numbers; large ones are not enlarged."""
    assert drawn(np.zeros((4, 64, 96, 3), np.uint8)).shape == (2 * 256 + 6, 2 * 384 + 6, 3)
    assert drawn(np.zeros((1, 300, 400, 3), np.uint8)).shape == (300, 400, 3)


class Unread:
    """Latents that must not be looked at."""

    def __getattr__(self, name: str) -> None:
        raise AssertionError(f"{name} was asked for")


def test_every_n_steps_alone(tmp_path: Path, latents: torch.Tensor) -> None:
    """A GPU must not be waited for at the other steps."""
    preview = Preview(tmp_path, 3, FACTORS[0.18215])
    for step in (1, 2, 4, 5):
        preview(step, Unread())
    assert list(tmp_path.iterdir()) == []
    preview(3, latents)
    assert [path.name for path in tmp_path.iterdir()] == ["preview.png"]
    first = (tmp_path / "preview.png").read_bytes()
    preview(6, -latents)
    assert (tmp_path / "preview.png").read_bytes() != first


def test_what_cannot_be_written_ends_no_run(
    tmp_path: Path, latents: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    preview = Preview(tmp_path / "missing", 1, FACTORS[0.18215])
    preview(1, latents)
    preview(2, Unread())
    assert len(caplog.messages) == 1
    assert "cannot write" in caplog.messages[0]


@pytest.mark.parametrize("name", ["scenes-64", "scenes-128"])
def test_previews_look_like_the_images_of_the_bundled_models(name: str) -> None:
    pipeline = Pipeline.load(f"models/{name}/model.safetensors", safety="off")
    rng = np.random.default_rng(3)
    requests = [
        pipeline.resolve(ImageRequest(caption(random_scene(rng)), seed=k, steps=6, sampler="dpmpp_2m"))
        for k in range(8)
    ]
    latents: list[torch.Tensor] = []

    def keep(step: int, x0: torch.Tensor) -> None:
        latents[:] = [x0.clone()]

    (images,) = pipeline.batches([requests], None, keep)
    decoded = to_float([image.pixels for image in images])
    factors = factors_of(float(pipeline.model.scale_factor))
    assert correlation(latents[0], decoded, factors) >= 0.9
    # and in the images' own size
    seen = [
        Image.fromarray(image).resize((decoded.shape[3], decoded.shape[2]), Image.Resampling.BICUBIC)
        for image in to_colours(latents[0], factors)
    ]
    pixels = np.stack([image.pixels for image in images])
    assert np.corrcoef(np.stack(seen).ravel(), pixels.ravel())[0, 1] > 0.85


@pytest.fixture
def txt2img(command: Callable[..., Result], model: tuple[Path, Path]) -> Callable[..., Result]:
    base = ["--config", model[0], "--ckpt", model[1], "--watermark", "none", "--prompt", "a cat"]
    base += ["--ddim_steps", 4, "--n_iter", 1, "--n_samples", 3]
    return lambda *argv, folder="out": command("txt2img", *base, *argv, folder=folder)


def test_a_run_with_previews(txt2img: Callable[..., Result]) -> None:
    """They change no image, and the last one stays."""
    plain, made = txt2img(folder="plain"), txt2img("--preview", 2)
    assert (made.code, made.err) == (0, [])
    assert set(made.files) - set(plain.files) == {"preview.png"}
    assert all(np.array_equal(*pair) for pair in zip(plain.images, made.images, strict=True))
    with Image.open(made.folder / "preview.png") as image:
        assert image.size == (2 * 258 + 2, 2 * 258 + 2)


def test_latents_without_colours(txt2img: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(previews, "FACTORS", {})
    made = txt2img("--preview", 1)
    assert made.code == 0
    assert [line for line in made.err if line.startswith("--preview: no colours are known")] == made.err
    assert "preview.png" not in made.files


def test_bad_previews(txt2img: Callable[..., Result]) -> None:
    refused(txt2img("--preview", 0), "0 is not a whole number in range: at least 1")
