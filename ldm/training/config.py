"""The `training:` section of a YAML file."""

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from ldm.errors import FieldError, InputError, ValueFieldError
from ldm.fields import check_fields, setting
from ldm.runs.costs import LEAST_POWER, MEASURED, factor_of

EVERY_TIMESTEP = (0, 1000)
STRATEGIES = ("ddp", "fsdp")
PRECISIONS = ("full", "bf16", "fp16")
LOGS = ("csv", "tensorboard", "plot")
SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained. FieldError for a value of the wrong type or out of range."""

    steps: int = setting(MISSING, "optimiser steps of the whole training", low=1, group="length")
    batch_size: int = setting(
        MISSING, "examples of an optimiser step, over all devices", low=1, high=10**6, group="batch"
    )
    learning_rate: float = setting(MISSING, "AdamW's, after the warmup", low=0, high=10, group="optimiser")

    device_batch: int = setting(
        0, "examples that a device takes at a time; 0: all that it has in a step", low=0, group="batch"
    )
    devices: int = setting(
        0, "processes on each machine; 0: what the launcher says, or 1", low=0, group="batch"
    )
    nodes: int = setting(0, "machines; 0: what the launcher says, or 1", low=0, group="batch")
    strategy: str = setting(
        "ddp", "ddp: each device has the whole model; fsdp: a part of it", choices=STRATEGIES, group="batch"
    )
    precision: str | None = setting(
        None, "of the computation; weights and their sums stay float32", choices=PRECISIONS, group="batch",
        default_text="bf16 on a GPU, full elsewhere",
    )  # fmt: skip
    checkpointing: bool = setting(
        False, "compute the UNet's activations again for the gradients: less memory, a third more time",
        group="batch",
    )  # fmt: skip
    compile: bool = setting(False, "compile the UNet with torch.compile", group="batch")

    schedule: str = setting(
        "cosine", "of the learning rate after the warmup", choices=SCHEDULES, group="optimiser"
    )
    warmup: int = setting(500, "steps of rising learning rate", low=0, group="optimiser")
    weight_decay: float = setting(0.01, "AdamW's", low=0, high=10, group="optimiser")
    betas: tuple[float, ...] = setting((0.9, 0.99), "AdamW's two", low=0, high=0.999999, group="optimiser")
    gradient_clip: float = setting(
        1.0, "largest norm of the gradient of all weights; 0: any", low=0, group="optimiser"
    )
    ema_decay: float = setting(
        0.999, "of the averaged weights; 0: none are kept", low=0, high=1, group="optimiser"
    )

    prompt_dropout: float = setting(
        0.1, "share of captions replaced by the empty one", low=0, high=1, group="objective"
    )
    min_snr_gamma: float = setting(
        0.0, "weigh timesteps by min(SNR, gamma) (arXiv:2303.09556), 5 is usual; 0: all alike", low=0,
        group="objective",
    )  # fmt: skip
    noise_offset: float = setting(
        0.0, "standard deviation of further noise, one number for each channel", low=0, high=1,
        group="objective",
    )  # fmt: skip
    zero_terminal_snr: bool = setting(
        False,
        "of v-models: rescale the noise schedule to end in nothing but noise (arXiv:2305.08891)",
        group="objective",
    )
    drill: tuple[str, ...] = setting(
        (),
        "words: a share of each batch is drawn from examples whose caption has one of them",
        group="objective",
    )
    drill_share: float = setting(
        0.7, "the share of a batch for drill and drill_timesteps", low=0, high=1, group="objective"
    )
    drill_timesteps: tuple[float, ...] = setting(
        EVERY_TIMESTEP,
        "low, high: the share of drill_share has timesteps low <= t < high",
        low=0,
        group="objective",
    )

    init: str | None = setting(
        None, "checkpoint to start from: .ckpt, .safetensors or a diffusers folder", group="start"
    )
    init_weights: str | None = setting(
        None, "of a checkpoint that has both; by default what its model says, or else ema",
        choices=("raw", "ema"), group="start",
    )  # fmt: skip
    first_stage: str | None = setting(
        None, "weights of the trained first stage, with init in place of its own", group="start"
    )
    text_encoder: str | None = setting(
        None, "checkpoint of a whole model whose text encoder is taken", group="start"
    )
    depth_model: str | None = setting(
        None, "of a depth model: weights of its trained depth estimator", group="start"
    )
    linear_start: bool = setting(False, "of an upscaler's stages: start as a linear map", group="start")

    decoder_only: bool = setting(False, "train the decoder alone; the latents stay", group="first stage")
    latent_noise: float = setting(
        0.0,
        "standard deviation of the noise added to latents before they are decoded in training",
        low=0,
        group="first stage",
    )
    kl_weight: float = setting(
        1e-3, "of the KL divergence in nats for each pixel value", low=0, group="first stage"
    )
    depth_scale: float = setting(
        10.0, "of a depth estimator: its output for an inverse depth of 1", low=0, group="first stage"
    )

    seed: int = setting(0, "of everything random", low=0, high=2**32 - 1, group="length")
    logs: tuple[str, ...] = setting(
        LOGS, "where losses go: metrics.csv, TensorBoard's files, an image of the curve at the end",
        choices=LOGS, group="records",
    )  # fmt: skip
    log_every: int = setting(50, "steps between two rows of the logs", low=1, group="records")
    checkpoint_every: int = setting(
        500, "steps between two checkpoints; 0: only at the end", low=0, group="records"
    )
    keep: int = setting(0, "checkpoints kept besides the last one; 0: none", low=0, group="records")
    validation_every: int = setting(
        0, "steps between two validation losses; 0: never", low=0, group="records"
    )
    validation_count: int = setting(64, "examples of it", low=1, group="records")
    validation_timesteps: tuple[float, ...] = setting(
        (100, 300, 500, 700, 900), "timesteps of it", low=0, group="records"
    )
    sample_every: int = setting(1000, "steps between two grids of samples; 0: never", low=0, group="records")
    sample_prompts: tuple[str, ...] = setting(
        (), "their prompts; captions of the data where there are none", group="records"
    )
    sample_steps: int = setting(20, "sampling steps", low=1, high=1000, group="records")
    sample_scale: float = setting(4.0, "guidance scale", low=0, group="records")
    power: float | None = setting(
        None, "watts of one device, for costs.json; by default by its name", low=LEAST_POWER, group="records"
    )
    region: str = setting("world", "where the energy comes from, or its kg of CO2 per kWh", group="records")
    energy: str = setting(
        "auto", "power x hours, or what codecarbon measures; auto: measured where it can be",
        choices=("auto", "estimated", MEASURED), group="records",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_fields(self)
        factor_of(self.region)
        for name in ("betas", "drill_timesteps"):
            if len(getattr(self, name)) != 2:
                raise ValueFieldError(name, f"{list(getattr(self, name))} are not two numbers")
        for name in ("drill_timesteps", "validation_timesteps"):
            whole = tuple(int(t) for t in getattr(self, name))
            if whole != tuple(getattr(self, name)):
                raise ValueFieldError(name, f"{list(getattr(self, name))} are not whole numbers")
            object.__setattr__(self, name, whole)
        low, high = self.drill_timesteps
        if low >= high:
            raise ValueFieldError("drill_timesteps", f"[{low}, {high}] is empty")
        if self.drills and self.drill_share and not self.drilled:
            raise ValueFieldError(
                "drill_share",
                f"{self.drill_share:g} of a batch of {self.batch_size} is less than half an example",
            )
        if not self.validation_timesteps:
            raise ValueFieldError("validation_timesteps", "[] has no timestep")
        if any(not word.strip() for word in self.drill):
            raise ValueFieldError("drill", f"{list(self.drill)} has an empty word")
        for name in ("init", "first_stage", "text_encoder", "depth_model"):
            if getattr(self, name) == "":
                raise ValueFieldError(name, "'' is no path")
        self.accumulation(max(1, self.devices), max(1, self.nodes))

    @property
    def drills(self) -> bool:
        """Whether a share of each batch has captions or timesteps of its own."""
        return bool(self.drill) or self.drill_timesteps != EVERY_TIMESTEP

    @property
    def drilled(self) -> int:
        """The number of those examples: the first rows of each batch."""
        return round(self.drill_share * self.batch_size) if self.drills else 0

    def precision_on(self, device: str) -> str:
        """The precision that is asked for, or what is best on a type of device.

        A CPU computes in full precision by itself: those without instructions for bf16 are slow in it.
        """
        return self.precision or ("bf16" if device == "cuda" else "full")

    def examples_at_a_time(self, world: int) -> int:
        """Examples of one backward pass of one of `world` processes."""
        return self.device_batch or max(1, self.batch_size // world)

    def accumulation(self, devices: int, nodes: int) -> int:
        """Backward passes for an optimiser step. FieldError if the batch does not divide."""
        at_a_time = self.examples_at_a_time(devices * nodes)
        passes, rest = divmod(self.batch_size, at_a_time * devices * nodes)
        if rest or not passes:
            raise FieldError(
                "{batch_size} {size} is no multiple of {product} = {device_batch} {at_a_time} x "
                "{devices} {devices_} x {nodes} {nodes_}",
                size=self.batch_size, product=at_a_time * devices * nodes, at_a_time=at_a_time,
                devices_=devices, nodes_=nodes,
            )  # fmt: skip
        return passes


def training_config(section: Mapping[str, Any]) -> TrainingConfig:
    """The `training:` section of a YAML file; InputError names a key that is unknown, missing or wrong."""
    from ldm.util import check_params  # it imports torch, and `--help` is not to wait for that

    check_params(TrainingConfig, section)
    required = [option.name for option in fields(TrainingConfig) if option.default is MISSING]
    if missing := [name for name in required if section.get(name) is None]:
        raise InputError(f"the training: section lacks {', '.join(missing)}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in section.items()}
    try:
        return TrainingConfig(**values)
    except FieldError as error:
        raise InputError(f"training: {error}") from error


def table(owner: type) -> Iterable[str]:
    """The lines of a Markdown table of a section's keys, for the documentation."""
    from ldm.fields import settings_of

    yield "| key | default | what it is |"
    yield "|---|---|---|"
    for name, each in settings_of(owner).items():
        default = "" if each.default is MISSING else each.default_text or _shown(each.default)
        choices = f" ({', '.join(each.choices)})" if each.choices else ""
        yield f"| `{name}` | {default} | {each.help}{choices} |"


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(f'{one}' for one in value)}]" if value else ""
    if value is None:
        return ""
    return (
        str(value).lower()
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )
