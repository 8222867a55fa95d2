"""The detector reads scenes from images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ldm.errors import InputError
from ldm.images.pixels import to_float, to_uint8
from ldm.scenes.detector import (
    DETECTOR_WEIGHTS,
    Detector,
    load_detector,
    outline,
    save_detector,
    train_detector,
)
from ldm.scenes.renderer import render
from ldm.scenes.scene import Scene, random_scene
from ldm.scenes.scores import score

ROOT = Path(__file__).parents[2]


def fresh_renders(count: int) -> tuple[list[Scene], list[np.ndarray]]:
    rng = np.random.default_rng(20_000)
    scenes = [random_scene(rng) for _ in range(count)]
    return scenes, [render(scene, rng) for scene in scenes]


def test_the_bundled_detector_reads_renders():
    scenes, images = fresh_renders(100)
    seen = load_detector(ROOT / DETECTOR_WEIGHTS).read(images)
    assert score(scenes, seen)["all"] > 0.95


def test_the_bundled_detector_reads_soft_and_noisy_renders():
    scenes, images = fresh_renders(100)
    x = to_float(images)
    small = torch.nn.functional.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True)
    soft = torch.nn.functional.interpolate(small, scale_factor=2, mode="bilinear")
    noisy = soft + 0.05 * torch.randn(soft.shape, generator=torch.Generator().manual_seed(0))
    seen = load_detector(ROOT / DETECTOR_WEIGHTS).read(list(to_uint8(noisy)))
    assert score(scenes, seen)["all"] > 0.9


def test_the_bundled_detector_is_small():
    assert (ROOT / DETECTOR_WEIGHTS).stat().st_size < 0.8 * 2**20


def test_images_of_other_sizes_are_scaled_and_batches_do_not_matter():
    torch.manual_seed(0)
    detector = Detector().eval()
    images = fresh_renders(5)[1]
    doubled = [image.repeat(2, axis=0).repeat(2, axis=1) for image in images]
    seen = detector.read(images)
    assert detector.read(doubled) == seen
    assert detector.read(images, batch_size=2) == seen
    assert all(scene == outline(scene) for scene in seen)


def test_training_is_reproducible_and_makes_a_detector(tmp_path):
    (*_, (loss, detector)), (*_, (again, _)) = (train_detector(2, batch_size=4, seed=1) for _ in range(2))
    assert loss == again
    assert np.isfinite(loss)
    path = tmp_path / "models/detector.safetensors"
    save_detector(detector, path)
    loaded = load_detector(path).state_dict()
    for name, tensor in detector.state_dict().items():
        torch.testing.assert_close(loaded[name], tensor, rtol=1e-3, atol=1e-4)


def test_no_detector(tmp_path):
    with pytest.raises(InputError, match=r"absent\.safetensors; --train_detector makes one"):
        load_detector(tmp_path / "absent.safetensors")


def test_a_file_that_is_no_detector(tmp_path):
    """A damaged or foreign file was an internal error."""
    (tmp_path / "torn.safetensors").write_bytes((ROOT / DETECTOR_WEIGHTS).read_bytes()[:1000])
    save_file({"weight": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    for name in ("torn", "foreign"):
        with pytest.raises(InputError, match=f"{name}.safetensors is not a detector's weights: "):
            load_detector(tmp_path / f"{name}.safetensors")


def test_a_detector_that_cannot_be_saved(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/detector.safetensors cannot be written: "):
        save_detector(Detector(), tmp_path / "file/detector.safetensors")
