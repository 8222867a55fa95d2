"""The data of the bundled models' own trainings, as configs/scenes/ has it."""

from pathlib import Path

import pytest

from ldm.training.data.loader import Pixels
from ldm.training.data.sources import open_sources
from ldm.training.sections import read_sections

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "scenes"


@pytest.mark.parametrize(
    ("names", "seed", "images", "size", "maps"),
    [
        ("autoencoder", 0, 20000, 64, set()),
        ("scenes-64", 0, 80000, 64, set()),
        ("scenes-64 drill", 1, 80000, 64, set()),
        ("autoencoder autoencoder-128", 20, 4800, 128, set()),
        ("autoencoder autoencoder-128 decoder-128", 22, 6000, 128, set()),
        ("scenes-128", 21, 20000, 128, set()),
        ("scenes-64-v", 2, 30000, 64, set()),
        ("scenes-64-inpainting", 4, 14000, 64, {"mask"}),
        ("scenes-64-inpainting inpainting-drill", 4, 14000, 64, {"mask"}),
        ("depth-estimator", 7, 8000, 64, {"depth"}),
        ("scenes-64-depth depth-drill", 5, 10000, 64, {"depth"}),
        ("scenes-128-inpainting", 24, 12000, 128, {"mask"}),
        ("scenes-128-depth", 25, 12000, 128, {"depth"}),
        ("autoencoder-x4", 3, 1200, 256, set()),
        ("autoencoder-x4 decoder-x4", 8, 4000, 128, set()),
        ("scenes-x4 x4-drill", 6, 1200, 256, {"small"}),
    ],
)
def test_each_training_has_its_renders(names: str, seed: int, images: int, size: int, maps: set[str]) -> None:
    """Its seed, their number and size, and the maps that its model needs."""
    files = [CONFIGS / f"{name}.yaml" for name in names.split()]
    params = read_sections(files, []).data.train["params"]
    assert (params["seed"], params["images"], params["image_size"]) == (seed, images, size)
    data = read_sections(files, ["data.train.params.images=2"]).data
    assert data.size == size, "renders are not resized"
    source, validation = open_sources(data)
    assert validation is None
    assert source[0].maps.keys() == maps
    assert len(Pixels(data, source)) == 2


@pytest.mark.parametrize(("name", "patch"), [("autoencoder-x4", 64), ("scenes-x4", 96), ("scenes-64", 0)])
def test_an_upscaler_is_trained_on_parts_of_images(name: str, patch: int) -> None:
    assert read_sections([CONFIGS / f"{name}.yaml"], []).data.patch == patch
