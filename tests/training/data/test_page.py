"""docs/training-data.md: its YAML is taken, its script runs, its tables are those of the code."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from ldm.training.data.buckets import bucket_sizes
from ldm.training.data.config import DataConfig, data_config
from ldm.training.data.folder import ImageFolder
from ldm.training.data.masks import RandomMasks, random_masks
from ldm.training.sections import read_sections

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "training-data.md").read_text()


def test_sections_are_taken() -> None:
    blocks = [yaml.safe_load(block)["data"] for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.S)]
    assert len(blocks) == 5
    for block in blocks:
        data_config({"size": 64} | block)
    (masks,) = (block["masks"] for block in blocks if "masks" in block)
    assert random_masks(masks) == RandomMasks(), "the page shows the defaults"
    assert masks.keys() == {option.name for option in fields(RandomMasks)}


def test_every_key_has_a_row() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", PAGE.partition("## All keys")[2], re.M)
    assert sorted(rows) == sorted(option.name for option in fields(DataConfig))


def test_the_sizes_of_buckets_are_those_of_the_code() -> None:
    (count, sizes) = re.search(r"For 512 there are (\d+): (.*), and those lying down", PAGE).groups()
    shown = {tuple(map(int, size.split("x"))) for size in sizes.split(", ")}
    assert sorted(shown | {(height, width) for width, height in shown}) == bucket_sizes(512)
    assert int(count) == len(bucket_sizes(512))


def test_the_examples_source_takes_the_place_of_another(tmp_path: Path) -> None:
    """Parameters of renders were handed to the folder, and a first stage was asked for that no clone has."""
    (block,) = re.findall(r"```yaml\n(# outputs.*?)```", PAGE, re.S)
    (tmp_path / "photos.yaml").write_text(block)
    sections = read_sections([ROOT / "configs/scenes/scenes-64.yaml", tmp_path / "photos.yaml"], [])
    assert sections.data.train["params"] == {"path": "outputs/photos"}
    assert (ROOT / sections.training.init).exists()
    assert sections.training.first_stage is None
    scenes = ["scenes-64.yaml", "drill.yaml"]
    sections = read_sections([ROOT / "configs/scenes" / name for name in scenes], [])
    assert sections.data.train["params"] == {"seed": 1, "images": 80000, "image_size": 64}


def test_the_example_makes_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (script,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    monkeypatch.chdir(tmp_path)
    exec(script.replace("images=200", "images=3"), {})
    assert len(ImageFolder("outputs/photos")) == 3
