"""The methods of fine-tuning, their options and their defaults. torch is not imported here.

The module of a method has three functions, which are called in this order:

    check(setup, options)             InputError for what cannot be used, before the model is loaded
    new_task(model, setup, options)   the task to train
    sampling(files, setup, options)   how images are made with the files that it left: `Sampling`

It may have a fourth, `train_source(folder, prompt, size, options, files)`: the `train:` part of the `data:`
section for a folder of images, for a model of these files.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ldm.errors import InputError
from ldm.fields import check_fields, setting

if TYPE_CHECKING:
    from ldm.training.config import TrainingConfig
    from ldm.training.data.config import DataConfig
    from ldm.training.data.example import Example
    from ldm.weights.loading import ModelFiles

IMAGES = "ldm.training.data.folder.ImageFolder"


@dataclass(frozen=True)
class Full:
    text_encoder: bool = setting(False, "train the text encoder, too", group="model")

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Matrices:
    rank: int = setting(8, "of a LoRA's matrices", low=1, high=4096, group="LoRA")
    alpha: float | None = setting(
        None, "a LoRA's strength is alpha / rank", low=1e-6, high=1e6, default_text="the rank", group="LoRA"
    )
    layers: str = setting(
        "attention", "attention, attention+mlp, all, or a regular expression of layers' names in diffusers",
        group="LoRA",
    )  # fmt: skip
    layout: str = setting(
        "kohya", "whose names a LoRA's file has", choices=("kohya", "diffusers"), group="LoRA"
    )

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class LowRank(Matrices, Full):
    """A LoRA, of the text encoder, too, if asked for."""


@dataclass(frozen=True)
class Distillation(Matrices):
    rank: int = setting(64, "of a LoRA's matrices", low=1, high=4096, group="LoRA")
    layers: str = setting("all", "which layers of the UNet get matrices", group="LoRA")
    sampler: str = setting(
        "tcd", "the sampler that the LoRA is for", choices=("lcm", "tcd"), group="distillation"
    )
    scale: float | None = setting(
        None, "the guidance scale that the LoRA learns; its images are then made with --scale 1",
        low=0, high=100, default_text="the YAML file's, else 7.5; depth and x4 models 9",
        group="distillation",
    )  # fmt: skip


@dataclass(frozen=True)
class DreamBooth(LowRank):
    class_prompt: str | None = setting(
        None, 'the prompt without the rare word, such as "a vase", or with choices, such as '
        '"a {red|blue} vase{| on a table}": keeps what the model knows of the class',
        metavar="TEXT", group="DreamBooth",
    )  # fmt: skip
    class_images: int = setting(
        50, "images of class_prompt, made by the model first", low=1, high=10_000, group="DreamBooth"
    )
    prior_weight: float = setting(1.0, "of their loss", low=0, high=100, group="DreamBooth")
    lora: bool = setting(False, "train a LoRA in place of the whole UNet", group="DreamBooth")


@dataclass(frozen=True)
class Inversion:
    token: str | None = setting(
        None, "the new word, such as <vase>", metavar="WORD", group="textual inversion"
    )
    init_word: str | None = setting(
        None, "a word of one token to begin with, such as vase", metavar="WORD", group="textual inversion"
    )
    vectors: int = setting(1, "that stand for the new word", low=1, high=75, group="textual inversion")

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Control:
    preprocess: str | None = setting(
        None, "make the control images out of the images; else they are in FOLDER/control",
        choices=("canny", "depth"), group="ControlNet",
    )  # fmt: skip
    control_init: str | None = setting(
        None, "a ControlNet to go on from; by default a copy of the UNet's encoder", metavar="PATH",
        group="ControlNet",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Method:
    help: str
    module: str
    options: type
    training: Mapping[str, Any]  # defaults of the `training:` section
    data: Mapping[str, Any] = field(default_factory=lambda: {"latents": True})  # of the `data:` section
    prompt: bool = True  # whether --prompt is needed where images have no captions

    @property
    def functions(self) -> ModuleType:
        return importlib.import_module(f"ldm.training.finetune.{self.module}")


# Fine-tuning takes few steps: the learning rate is constant, and averages of the weights would lag behind.
_FEW = {"schedule": "constant", "warmup": 0, "ema_decay": 0.0, "sample_every": 0, "betas": [0.9, 0.999]}

METHODS = {
    "full": Method(
        "train all weights of the UNet", "full", Full,
        _FEW | {"steps": 1000, "batch_size": 4, "learning_rate": 1e-5, "warmup": 100, "prompt_dropout": 0.1},
    ),
    "lora": Method(
        "train small matrices beside the UNet's layers: a small file for --lora", "lora", LowRank,
        _FEW | {"steps": 500, "batch_size": 4, "learning_rate": 1e-4, "prompt_dropout": 0.0},
    ),
    "distillation": Method(
        "a LoRA with which few steps without guidance are enough", "distillation", Distillation,
        _FEW | {"steps": 2000, "batch_size": 16, "learning_rate": 1e-4, "prompt_dropout": 0.0}
        | {"warmup": 100, "sample_steps": 4, "sample_scale": 1.0}
        | {"precision": "full"},  # the loss compares x0, which magnifies the rounding of predicted noise
    ),
    "dreambooth": Method(
        "teach a rare word a subject, and keep what the model knows of its class", "dreambooth", DreamBooth,
        _FEW | {"steps": 400, "batch_size": 2, "learning_rate": 5e-6, "prompt_dropout": 0.0},
    ),
    "textual_inversion": Method(
        "find vectors for a new word: a small file for --embedding", "inversion", Inversion,
        _FEW | {"steps": 1000, "batch_size": 4, "learning_rate": 5e-3, "weight_decay": 0.0}
        | {"prompt_dropout": 0.0},
        prompt=False,
    ),
    "controlnet": Method(
        "train a network for --control: edges, depths or other images that say where things are",
        "controlnet", Control,
        _FEW | {"steps": 10_000, "batch_size": 8, "learning_rate": 1e-5, "prompt_dropout": 0.5},
        data={}, prompt=False,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """What a fine-tuning is about, besides its method's options.

    files, section: of the model, its YAML's `model:`
    folder: everything but the result goes there
    prompt: of images that have no caption
    fabric: its processes, once they are started
    """

    files: ModelFiles
    section: Mapping[str, Any]
    weights: str | None
    config: TrainingConfig
    data: DataConfig
    folder: Path
    output: Path
    prompt: str | None
    fabric: Any = None


@dataclass(frozen=True)
class Sampling:
    """How the result of a fine-tuning makes images: another checkpoint, or fields of the requests.

    `prompts` are those of samples where the user gives none; `before` are fields without the result.
    """

    ckpt: Path | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    before: Mapping[str, Any] = field(default_factory=dict)


def readable_examples(setup: Setup) -> Iterator[Example]:
    """The examples of a fine-tuning's source but the damaged ones. InputError where all are."""
    from ldm.training.data.example import DamagedExample
    from ldm.training.data.sources import open_sources

    source, _ = open_sources(setup.data, cache=setup.folder)
    why = None
    for k in range(len(source)):
        try:
            yield source[k]
            why = ""
        except DamagedExample as error:
            why = str(error) if why is None else why
    if why:
        raise InputError(f"none of the images can be read ({why})")


def readable_captions(setup: Setup) -> Iterator[str]:
    """The captions of a fine-tuning's source but the damaged ones; no image is read."""
    from ldm.training.data.example import DamagedExample
    from ldm.training.data.sources import open_sources

    source, _ = open_sources(setup.data, cache=setup.folder)
    for k in range(len(source)):
        with suppress(DamagedExample):
            yield source.caption(k)


def train_source(folder: str, prompt: str | None) -> dict[str, Any]:
    """The `train:` part of a `data:` section: a folder's images, with `prompt` where they have no caption."""
    return {"target": IMAGES, "params": {"path": folder} | ({} if prompt is None else {"caption": prompt})}
