"""Images as they come out of a pipeline, saved with their settings."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Result
from PIL import Image

from ldm.errors import InputError
from ldm.images.watermark import read_watermark
from ldm.pipeline import ImageRequest, Pipeline
from ldm.pipeline import pipeline as engine
from ldm.pipeline.infotext import read_settings
from ldm.weights.loading import BUNDLED_WEIGHTS, ROOT

Command = Callable[..., Result]
Load = Callable[..., Pipeline]


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp"])
def test_an_image_is_saved_with_its_settings(load: Load, tmp_path: Path, suffix: str) -> None:
    request = ImageRequest(
        "a café", negative_prompt="blurry", seed=7, steps=1, sampler="Euler a", height=256, width=256
    )
    (image,) = load().generate([request])
    path = tmp_path / f"cube.{suffix}"
    image.save(path)
    settings = read_settings(path)
    assert settings == {**image.settings, "config": "tiny.yaml", "checkpoint": "tiny.safetensors"}
    expected = {"prompt": "a café", "seed": 7, "steps": 1, "sampler": "euler_ancestral", "scale": 7.5}
    assert settings.items() >= expected.items()
    saved = np.asarray(Image.open(path).convert("RGB"))
    assert saved.shape == (256, 256, 3)
    if suffix == "png":
        assert read_watermark(saved) == "StableDiffusionV1"
    again = ImageRequest(
        **{
            name: settings[name]
            for name in ("prompt", "negative_prompt", "seed", "steps", "sampler", "height", "width", "scale")
        }
    )
    (same,) = load().generate([again])
    assert np.array_equal(same.pixels, image.pixels)


def test_what_cannot_be_saved_is_an_error_in_words(load: Load, tmp_path: Path, monkeypatch) -> None:
    (image,) = load().generate([ImageRequest("a", steps=1)])
    with pytest.raises(InputError, match=r"a\.bmp: its suffix is none of png, jpg, webp"):
        image.save(tmp_path / "a.bmp")
    with pytest.raises(InputError, match=r"cannot write .*nowhere.a\.png: No such file or directory"):
        image.save(tmp_path / "nowhere/a.png")
    monkeypatch.setattr(engine, "sample", lambda **_: torch.full((1, 4, 2, 2), torch.nan))
    (image,) = load().generate([ImageRequest("a", steps=1)])
    assert image.pixels is None
    with pytest.raises(InputError, match=r"a\.png: the image came out as NaN"):
        image.save(tmp_path / "a.png")


NOTEBOOK = ROOT / "docs/notebook.md"


def test_the_notebook_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first block runs as it stands, but for its number of steps, on the bundled model."""
    block = re.search(r"```python\n(.*?)```", NOTEBOOK.read_text(), re.DOTALL)[1]
    code = block.replace("Pipeline.load()", f"Pipeline.load({str(ROOT / BUNDLED_WEIGHTS)!r})")
    code = re.sub(r"steps=\d+", "steps=2", code)
    assert code.count("steps=2") == code.count(BUNDLED_WEIGHTS) == 1
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(NOTEBOOK), "exec"), {})
    files = list(tmp_path.iterdir())
    assert files
    assert all(read_settings(path)["steps"] == 2 for path in files)
