"""The `training:` section of a YAML file."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from ldm.errors import InputError
from ldm.util import check_params


def _number(least: float, most: float = math.inf, default: float = MISSING) -> Any:
    """A field whose value has to lie in least … most."""
    return field(default=default, metadata={"range": (least, most)})


EVERY_TIMESTEP = (0, 1000)


@dataclass(frozen=True)
class TrainingConfig:
    """How a stage is trained. InputError for a value of the wrong type or out of range."""

    steps: int = _number(1)
    batch_size: int = _number(1)
    learning_rate: float = _number(0)
    images: int = _number(1)  # size of the training set: rendered (and for the second stage encoded) once
    image_size: int = _number(8)  # pixels; a multiple of the first stage's factor
    crop: int = _number(0, default=0)  # pixels: side of the random part of each image in a step; 0: all
    init: str | None = None  # checkpoint to start from; in a second stage of a whole model, see `load_start`
    first_stage: str | None = None  # second stage without init: weights of the trained first stage
    text_encoder: str | None = None  # second stage without init: checkpoint of a whole model with the encoder
    depth_model: str | None = None  # of a depth model: weights of its trained depth estimator
    soften: float = _number(0, 1, default=0.0)  # share of an upscaler's inputs that the bundled model decoded
    linear_start: bool = False  # an upscaler's stages: start as a linear map; see ldm/training/linear.py
    decoder_only: bool = False  # first stage: the latents stay what they are
    latent_noise: float = _number(0, default=0.0)  # first stage: standard deviation of noise for the decoder
    kl_weight: float = _number(0, default=1e-3)  # first stage: of the KL divergence in nats per pixel value
    prompt_dropout: float = _number(0, 1, default=0.1)  # second stage: share of captions replaced by ""
    warmup: int = _number(0, default=500)  # steps of rising learning rate; then it falls along a cosine
    drill: tuple[str, ...] = ()  # second stage: words, one of which `drill_share` of the captions have
    drill_share: float = _number(0, 1, default=0.7)
    drill_timesteps: tuple[int, int] = EVERY_TIMESTEP  # low, high: low <= t < high for that share
    ema_decay: float = _number(0, 1, default=0.999)
    seed: int = _number(0, 2**32 - 1, default=0)
    checkpoint_every: int = _number(0, default=500)  # steps; 0: only at the end
    sample_every: int = _number(0, default=1000)  # steps; 0: never

    def __post_init__(self) -> None:
        for option in fields(self):
            if "range" in option.metadata:
                _check_number(option.name, getattr(self, option.name), option.type, *option.metadata["range"])
        for name in ("init", "first_stage", "text_encoder", "depth_model"):
            path = getattr(self, name)
            if path is not None and not (isinstance(path, str) and path):
                raise _wrong(name, "the path of a file", path)
        for name in ("linear_start", "decoder_only"):
            if not isinstance(value := getattr(self, name), bool):
                raise _wrong(name, "true or false", value)
        words = self.drill
        if not isinstance(words, tuple) or not all(isinstance(word, str) and word.strip() for word in words):
            raise _wrong("drill", "a list of words", words)
        match self.drill_timesteps:
            case (int(low), int(high)) if 0 <= low < high:
                pass
            case other:
                raise _wrong("drill_timesteps", "two whole numbers [low, high] with 0 <= low < high", other)

    @property
    def drills(self) -> bool:
        """Whether a share of each batch has captions or timesteps of its own."""
        return bool(self.drill) or self.drill_timesteps != EVERY_TIMESTEP


def training_config(section: Mapping[str, Any]) -> TrainingConfig:
    """The `training:` section of a YAML file; InputError names a key that is unknown, missing or wrong."""
    check_params(TrainingConfig, section)
    required = [option.name for option in fields(TrainingConfig) if option.default is MISSING]
    if missing := [name for name in required if name not in section]:
        raise InputError(f"the training: section lacks {', '.join(missing)}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in section.items()}
    return TrainingConfig(**values)


def _check_number(name: str, value: Any, number: type, least: float, most: float) -> None:
    fits = isinstance(value, int if number is int else int | float) and not isinstance(value, bool)
    if not (fits and math.isfinite(value) and least <= value <= most):
        what = "a whole number" if number is int else "a number"
        bounds = f"from {least} to {most}" if most < math.inf else f"of at least {least}"
        raise _wrong(name, f"{what} {bounds}", value)


def _wrong(name: str, wanted: str, value: Any) -> InputError:
    shown = list(value) if isinstance(value, tuple) else value
    return InputError(f"training: {name} must be {wanted}, not {shown!r}")
