"""The `data:` section of a YAML file."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, get_args

from ldm.errors import InputError
from ldm.training.data.masks import random_masks
from ldm.util import check_params


def _number(least: float, most: float = math.inf, default: Any = MISSING) -> Any:
    """A field whose value has to lie in least … most."""
    return field(default=default, metadata={"range": (least, most)})


Crop = Literal["center", "random"]


@dataclass(frozen=True)
class DataConfig:
    """What is trained on, and how its images are brought to size. InputError for a value out of range."""

    train: Mapping[str, Any]  # target and params of a source
    size: int = _number(8)  # pixels: the side of an image; with buckets that of the square of an image's area
    validation: Mapping[str, Any] | None = None  # target and params of another source
    validation_share: float = _number(
        0, 0.5, default=0.0
    )  # of train, by a hash of the key, where none is given
    filters: Mapping[str, str] = field(default_factory=dict)  # column -> condition, such as ">= 5.0"
    buckets: bool = False  # images keep about their aspect ratio; a batch is of one size
    bucket_step: int = _number(8, default=64)  # pixels: sides of buckets are multiples of it
    crop: Crop = "center"  # which part of an image stays where its aspect ratio is not that of its size
    flip: float = _number(0, 1, default=0.0)  # share of images that are mirrored, left and right
    patch: int = _number(0, default=0)  # pixels: side of the random part of each image in a step; 0: all
    masks: bool | Mapping[str, Any] = False  # draw random masks for inpainting; or params of `random_mask`
    latents: bool = False  # encode all images once, and train on their latents
    cache: str | None = None  # folder of these latents; by default they are beside the checkpoints
    workers: int | None = _number(0, default=None)  # processes that read images; by default as many as pay
    prefetch: int = _number(1, default=2)  # batches that each of them reads ahead

    def __post_init__(self) -> None:
        for option in fields(self):
            if "range" in option.metadata and (value := getattr(self, option.name)) != option.default:
                number = float if option.type is float else int
                _check_number(option.name, value, number, *option.metadata["range"])
        for name in ("train", "validation"):
            section = getattr(self, name)
            wrong = not isinstance(section, Mapping) or not isinstance(section.get("target"), str)
            if wrong and not (name == "validation" and section is None):
                raise _wrong(name, "a source's target and params", section)
        for name in ("buckets", "latents"):
            if not isinstance(value := getattr(self, name), bool):
                raise _wrong(name, "true or false", value)
        if self.crop not in get_args(Crop):
            raise _wrong("crop", "center or random", self.crop)
        if not isinstance(self.filters, Mapping):
            raise _wrong("filters", 'columns and conditions such as {aesthetic: ">= 5.0"}', self.filters)
        if not isinstance(self.masks, bool | Mapping):
            raise _wrong("masks", "true, false or the parameters of random masks", self.masks)
        random_masks(self.masks)
        if self.cache is not None and not (isinstance(self.cache, str) and self.cache):
            raise _wrong("cache", "the path of a folder", self.cache)
        if self.buckets and self.bucket_step > self.size:
            raise _wrong("bucket_step", f"at most size, {self.size}", self.bucket_step)
        if self.patch > self.size:
            raise _wrong("patch", f"at most size, {self.size}", self.patch)
        if self.patch and self.buckets:
            raise InputError(
                "data: patch and buckets do not go together: parts of images are squares of one size"
            )

    def check_factor(self, factor: int) -> None:
        """InputError unless all sizes are multiples of a first stage's factor."""
        for name in ("size", "patch", *(("bucket_step",) if self.buckets else ())):
            if (value := getattr(self, name)) % factor:
                raise _wrong(name, f"a multiple of {factor}, the factor of the first stage", value)


def data_config(section: Mapping[str, Any]) -> DataConfig:
    """The `data:` section of a YAML file; InputError names a key that is unknown, missing or wrong."""
    check_params(DataConfig, section)
    required = [o.name for o in fields(DataConfig) if o.default is MISSING and o.default_factory is MISSING]
    if missing := [name for name in required if name not in section]:
        raise InputError(f"the data: section lacks {', '.join(missing)}")
    return DataConfig(**section)


def _check_number(name: str, value: Any, number: type, least: float, most: float) -> None:
    fits = isinstance(value, int if number is int else int | float) and not isinstance(value, bool)
    if not (fits and math.isfinite(value) and least <= value <= most):
        what = "a whole number" if number is int else "a number"
        bounds = f"from {least} to {most}" if most < math.inf else f"of at least {least}"
        raise _wrong(name, f"{what} {bounds}", value)


def _wrong(name: str, wanted: str, value: Any) -> InputError:
    return InputError(f"data: {name} must be {wanted}, not {value!r}")
