"""Checkpoints of a training: whole or not at all, and the same for any number of devices.

A file has the weights by the names that other programs know (`state_dict`; averages are `model_ema.*`, as in
the original's), so that txt2img.py and convert.py take it as it is, and what a resumed run needs besides.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from ldm.errors import InputError
from ldm.log import notice
from ldm.training.files import whole
from ldm.training.tasks import Task
from ldm.weights.prediction import MARKERS
from ldm.weights.writing import write_ckpt

# What may differ in a resumed run without a word: it does not change the curve.
FREE = ("device_batch", "devices", "nodes", "strategy", "checkpointing", "compile", "init", "init_weights")
FREE += (
    "first_stage",
    "text_encoder",
    "depth_model",
    "linear_start",
    "logs",
    "log_every",
    "checkpoint_every",
)
FREE += ("keep", "validation_every", "validation_count", "validation_timesteps")
FREE += ("sample_every", "sample_prompts", "sample_steps", "sample_scale")
FREE += ("power", "region", "energy")
FREE += ("data.train", "data.validation", "data.cache", "data.workers", "data.prefetch")
# Options of a method of fine-tuning without which a run is another one.
FIXED = ("method", "ckpt", "weights", "class_prompt", "rank", "layers", "text_encoder", "lora", "token")
FIXED += ("vectors", "preprocess", "sampler")


# Of AdamW's groups: options that a resumed run may change, and what depends on the device.
SET_ANEW = ("betas", "weight_decay", "fused")


def averaged_name(name: str) -> str:
    """`model.diffusion_model.out.0.bias` -> `model_ema.diffusion_modelout0bias`, as the original names it."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")


class Checkpoints:
    """Reads and writes the state of a task whose module may be wrapped (DDP) or sharded (FSDP).

    `names` are `task.names()` of before it was wrapped.
    """

    def __init__(self, task: Task, names: Mapping[str, str], module: nn.Module, optimizer: Optimizer):
        self.task, self.names, self.module, self.optimizer = task, dict(names), module, optimizer
        # FSDP gathers states into one buffer, from which a CPU copies them only without cpu_offload.
        offload = task.device.type != "cpu"
        self.options = StateDictOptions(full_state_dict=True, cpu_offload=offload, strict=False)

    def weights(self) -> dict[str, Tensor]:
        """The weights by their names in a checkpoint, on the CPU; sharded ones on rank 0 alone."""
        state = get_model_state_dict(self.module, options=self.options)
        return {self.names[name]: t.detach().cpu().clone() for name, t in state.items() if name in self.names}

    def optimizer_state(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self.module, self.optimizer, options=self.options)

    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        """Put in weights by their names in a checkpoint; those that are not there stay."""
        own = {name: state[wanted] for name, wanted in self.names.items() if wanted in state}
        set_model_state_dict(self.module, own, options=self.options)

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Put in the moments and their step; what this run sets of the optimiser stays."""
        own = [{name: group[name] for name in SET_ANEW} for group in self.optimizer.param_groups]
        set_optimizer_state_dict(self.module, self.optimizer, state, options=self.options)
        for group, values in zip(self.optimizer.param_groups, own, strict=True):
            group.update(values)


def write_checkpoint(path: Path, state: Mapping[str, Tensor], facts: Mapping[str, Any], keep: int) -> None:
    """Write `path`, whole or not at all; besides it the last `keep` checkpoints stay as `step-000500.ckpt`.

    DiskFull where there is no room: what was there before is whole.
    """
    with whole(path) as unfinished:
        write_ckpt(state, unfinished, facts=facts)
    if keep:
        copy = path.with_name(f"step-{facts['global_step']:06}.ckpt")
        with whole(copy) as unfinished:
            try:
                os.link(path, unfinished)
            except OSError:  # a file system without links
                shutil.copyfile(path, unfinished)
        for old in _kept(path.parent, facts["global_step"])[:-keep]:
            old.unlink()


def _kept(folder: Path, last: int) -> list[Path]:
    """The checkpoints that are kept in a folder, up to a step: later ones are of a run that was given up."""
    found = {path: path.stem.removeprefix("step-") for path in folder.glob("step-*.ckpt")}
    steps = {path: int(step) for path, step in found.items() if step.isdecimal()}
    return sorted((path for path, step in steps.items() if step <= last), key=steps.__getitem__)


def read_checkpoint(path: Path, option: str = "--logdir") -> dict[str, Any]:
    """A checkpoint that `write_checkpoint` wrote, its tensors mapped. InputError for any other file.

    `option` of the command line chooses the folder, here and below.
    """
    try:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, EOFError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): move it away to start anew") from error
    if not isinstance(found, dict) or "identity" not in found or "global_step" not in found:
        init = "training.init" if option == "--logdir" else "--ckpt"
        raise InputError(f"{path} is no checkpoint of a training: give it as {init}, with another {option}")
    return found


def check_options(
    path: Path, found: Mapping[str, Any], options: Mapping[str, Any], option: str, say: bool = True
) -> None:
    """InputError if a checkpoint is of another fine-tuning; other options that have changed are a notice."""
    before = found.get("options") or options
    changed = {
        name: (before[name], now) for name, now in options.items() if name in before and before[name] != now
    }
    for name in FIXED:
        if name in changed:
            was, now = changed[name]
            raise InputError(
                f"{path} has another --{name}: {was}, not {now}: choose another {option}, or move it away to "
                "start anew"
            )
    if changed and say:
        words = (f"--{name} {was} -> {now}" for name, (was, now) in changed.items())
        notice(f"{path}: the run goes on with {', '.join(words)}")


def check_resumed(
    path: Path, found: Mapping[str, Any], identity: Mapping[str, str], shapes: Mapping[str, list[int]],
    settings: Mapping[str, Any], option: str = "--logdir",
) -> None:  # fmt: skip
    """InputError if a checkpoint is of another model or other data. Changed settings are a notice."""
    how = f"choose another {option}, or move it away to start anew"
    earlier = found["identity"]
    for name in {**earlier, **identity}:
        if name in FIXED and name not in earlier:
            continue  # an option, which `check_options` has compared
        if earlier.get(name) != identity.get(name):
            was, now = (one.get(name, "none") for one in (earlier, identity))
            if name == "data":  # two hashes say nothing
                raise InputError(f"{path} has another data: files, captions or filters changed: {how}")
            raise InputError(f"{path} has another {name}: {was}, not {now}: {how}")
    state = found["state_dict"]
    lacking = [name for name in shapes if name not in state]
    marked = {name for name in state if name.startswith("model_ema.") or name in MARKERS}
    unknown = [name for name in state if name not in shapes and name not in marked]
    other = [name for name in shapes if name in state and list(state[name].shape) != list(shapes[name])]
    if other:
        name = other[0]
        what = f"{name} is {list(state[name].shape)}, not {list(shapes[name])}"
        raise InputError(f"{path} has another model, {len(other)} weights differ ({what}): {how}")
    if lacking or unknown:
        what = f"it has no {lacking[0]}" if lacking else f"{unknown[0]} is not in this one"
        raise InputError(f"{path} has another model ({what}): {how}")
    changed = [
        f"{name} {found['settings'].get(name)} -> {value}"
        for name, value in settings.items()
        if name not in FREE and found["settings"].get(name) != value
    ]
    if changed:
        notice(f"{path}: the run goes on with {', '.join(changed)}")
