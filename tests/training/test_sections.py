"""YAML files and overrides, merged; each mistake is one line that names it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_training import FIRST_STAGE, TRAINING, scenes, write_yaml

from ldm.errors import InputError
from ldm.training.sections import read_sections
from ldm.util import instantiate_from_config

ROOT = Path(__file__).parents[2]
CARDS = [
    ("v1-inference.yaml", "v1-train.yaml", "eps", 4, 512),
    ("v2-inference-v.yaml", "v2-train-v.yaml", "v", 4, 768),
    ("v1-inpainting-inference.yaml", "v1-inpainting-train.yaml", "eps", 9, 512),
    ("v2-midas-inference.yaml", "v2-depth-train.yaml", "eps", 5, 512),
]


@pytest.mark.parametrize(("model", "recipe", "predicts", "channels", "size"), CARDS)
def test_the_recipes_of_the_model_cards(
    model: str, recipe: str, predicts: str, channels: int, size: int
) -> None:
    """Batch 2048 = 32 x 8 x 2 x 4, 1e-4 after 10,000 steps, a tenth of the captions dropped, EMA 0.9999."""
    folder = ROOT / "configs/stable-diffusion"
    sections = read_sections([folder / model, folder / recipe], ["training.seed=3"])
    training = sections.training
    assert (training.batch_size, training.device_batch, training.devices, training.nodes) == (2048, 4, 8, 32)
    assert training.accumulation(8, 32) == 2
    assert (training.learning_rate, training.warmup, training.schedule) == (1e-4, 10_000, "constant")
    assert (training.prompt_dropout, training.ema_decay, training.seed) == (0.1, 0.9999, 3)
    assert sections.data.size == size
    assert sections.data.train["target"] == "ldm.training.data.shards.WebDataset"
    with torch.device("meta"):
        built = instantiate_from_config(sections.model)
    assert built.parameterization == predicts
    assert built.model.diffusion_model.in_channels == channels
    assert bool(sections.data.masks) == (channels == 9)


@pytest.mark.parametrize(
    "names",
    [
        ["autoencoder"],
        ["autoencoder-x4"],
        ["autoencoder-x4", "decoder-x4"],
        ["scenes-64"],
        ["scenes-64", "drill"],
        ["autoencoder", "autoencoder-128"],
        ["autoencoder", "autoencoder-128", "decoder-128"],
        ["scenes-128"],
        ["scenes-64-v"],
        ["scenes-64-inpainting", "inpainting-drill"],
        ["depth-estimator"],
        ["scenes-64-depth", "depth-drill"],
        ["scenes-128-inpainting"],
        ["scenes-128-depth"],
        ["scenes-x4", "x4-drill"],
    ],
)
def test_the_bundled_models_recipes(names: list[str]) -> None:
    sections = read_sections([ROOT / f"configs/scenes/{name}.yaml" for name in names], [])
    assert sections.data.train["target"] == "ldm.scenes.source.Scenes"
    assert sections.training.steps > 0


def test_later_files_and_overrides_go_over_earlier_ones(tmp_path: Path) -> None:
    write_yaml(tmp_path / "a.yaml", FIRST_STAGE, scenes(size=32))
    (tmp_path / "b.yaml").write_text(yaml.safe_dump({"training": {"steps": 9}, "data": {"flip": 0.5}}))
    overrides = ["training.steps=11", "data.size=64", "model.params.ddconfig.ch=16", "training.drill=[a,b]"]
    sections = read_sections([tmp_path / "a.yaml", tmp_path / "b.yaml"], overrides)
    assert (sections.training.steps, sections.data.flip, sections.data.size) == (11, 0.5, 64)
    assert sections.model["params"]["ddconfig"]["ch"] == 16
    assert sections.training.drill == ("a", "b")
    assert sections.training.batch_size == TRAINING["batch_size"]


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("training.learning_rat=1", "no parameter 'learning_rat'; did you mean 'learning_rate'?"),
        ("training.steps=abc", "training: steps: abc is not a whole number in range: at least 1"),
        (
            "training.device_batch=3",
            "batch_size 4 is no multiple of 3 = device_batch 3 x devices 1",
        ),
        (
            "training.precision=half",
            "precision: invalid choice: 'half' (choose from full, bf16, fp16)",
        ),
        ("trainin.steps=3", "trainin.steps=3: an override is like training.steps=10 or data.size=64"),
        ("steps=3", "steps=3: an override is like training.steps=10"),
        ("training=3", "training=3: an override is like training.steps=10"),
        ("training.steps=[1", "training.steps=[1 cannot be read"),
        ("data.siz=3", "no parameter 'siz'; did you mean 'size'?"),
        ("model.target=null", "the model: section of a.yaml has no target"),
    ],
)
def test_bad_overrides(override: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_yaml(Path("a.yaml"), FIRST_STAGE)
    with pytest.raises(InputError) as error:
        read_sections([Path("a.yaml")], [override])
    assert why in str(error.value)


@pytest.mark.parametrize("section", ["model", "data", "training"])
def test_a_section_that_is_missing(section: str, tmp_path: Path) -> None:
    whole: dict[str, Any] = {"model": FIRST_STAGE, "data": scenes(), "training": TRAINING}
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump({name: each for name, each in whole.items() if name != section}))
    with pytest.raises(InputError, match=f"a.yaml has no {section}: section"):
        read_sections([path], [])
    path.write_text(yaml.safe_dump(whole | {section: [3]}))
    with pytest.raises(InputError, match=r"a\.yaml|not a section"):
        read_sections([path], [])


def test_an_override_with_another_source_drops_the_files_params(tmp_path: Path) -> None:
    """Those of the renders were given to the folder, which does not know them."""
    write_yaml(tmp_path / "a.yaml", FIRST_STAGE, scenes())
    target = "ldm.training.data.folder.ImageFolder"
    for overrides in (
        [f"data.train.target={target}", "data.train.params.path=photos"],
        ["data.train.params.path=photos", f"data.train.target={target}"],
    ):
        data = read_sections([tmp_path / "a.yaml"], overrides).data
        assert data.train == {"target": target, "params": {"path": "photos"}}
    same = read_sections([tmp_path / "a.yaml"], ["data.train.params.seed=3"]).data.train
    assert same["params"]["seed"] == 3
    assert same["params"]["images"] == 64


@pytest.mark.parametrize("value", [">= 5", '">= 5"', "'>= 5'"])
def test_a_condition_on_the_command_line(value: str, tmp_path: Path) -> None:
    """To YAML it is the head of a block of text, and an error; some shells leave the quotes."""
    write_yaml(tmp_path / "a.yaml", FIRST_STAGE, scenes() | {"filters": {"width": "> 100"}})
    overrides = [f"data.filters.aesthetic={value}", "data.filters.a.b=== x"]
    data = read_sections([tmp_path / "a.yaml"], overrides).data
    assert data.filters == {"width": "> 100", "aesthetic": ">= 5", "a.b": "== x"}


@pytest.mark.parametrize("name", ["data.train", "data.validation", "model"])
def test_params_that_are_no_mapping(name: str, tmp_path: Path) -> None:
    """It was an error of Python's, when the model was built already."""
    write_yaml(tmp_path / "a.yaml", FIRST_STAGE, scenes() | {"validation": scenes()["train"]})
    with pytest.raises(InputError, match=f"{name}.params is 'abc', not a mapping"):
        read_sections([tmp_path / "a.yaml"], [f"{name}.params=abc"])
