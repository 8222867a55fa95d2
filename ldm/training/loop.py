"""Running a task on one device or many: steps, checkpoints, resuming, logs, validation and samples."""

import dataclasses
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from PIL import Image
from torch import Tensor
from torch.nn.utils import get_total_norm
from tqdm import tqdm

from ldm.errors import InputError
from ldm.optimize.memory import keep_memory
from ldm.training.averages import Averages
from ldm.training.checkpoints import (
    Checkpoints,
    averaged_name,
    check_options,
    check_resumed,
    read_checkpoint,
    write_checkpoint,
)
from ldm.training.costs import TrainingCosts
from ldm.training.data.example import Source
from ldm.training.data.latents import Latents, cached
from ldm.training.data.loader import Items, Loader, Pixels, loader, report, validation_batches
from ldm.training.files import whole, writing_below
from ldm.training.logs import open_logs
from ldm.training.objective import learning_rate
from ldm.training.processes import gathered, led, start_processes
from ldm.training.tasks import Batch, LatentDiffusionTask, Task

LAST = "last.ckpt"
MANY = 4096  # latents at most that a new model takes its scale from
SHOWN = 16  # examples whose captions samples are made of
DAMAGED = "damaged.txt"
NEVER = 2**31 - 1  # a step that no run gets to


def train(task: Task, folder: Path, stop_at: int | None = None, fabric: Fabric | None = None) -> list[Path]:
    """Train up to a step, from the last checkpoint in `folder` if there is one. The files that are left.

    InputError for whatever cannot be used, before the first step; DiskFull where a checkpoint finds no room.
    """
    fabric = fabric or start_processes(task.config)
    with writing_below(folder), interruptible(folder):
        return Run(task, folder, fabric).train(min(stop_at or task.config.steps, task.config.steps))


@contextmanager
def interruptible(folder: Path) -> Iterator[None]:
    """Inside, SIGTERM does what Ctrl-C does: a KeyboardInterrupt, which says how the run goes on."""

    def end(*_: Any) -> None:
        raise KeyboardInterrupt

    own = threading.current_thread() is threading.main_thread()  # elsewhere signals cannot be taken
    before = signal.signal(signal.SIGTERM, end) if own else None
    try:
        yield
    except KeyboardInterrupt:
        how = "goes on from the last checkpoint" if (folder / LAST).exists() else "starts anew"
        raise KeyboardInterrupt(f"the same command {how}") from None
    finally:
        if own:
            signal.signal(signal.SIGTERM, before)


class Run:
    """A task on its devices, in a folder."""

    def __init__(self, task: Task, folder: Path, fabric: Fabric):
        self.task, self.folder, self.fabric, self.config = task, folder, fabric, task.config
        self.leads = fabric.is_global_zero
        self.precision = task.config.precision_on(fabric.device.type)
        folder.mkdir(parents=True, exist_ok=True)
        cache = Path(task.data.cache) if task.data.cache else folder
        source, validation = task.sources(cache)
        if self.config.validation_every and validation is None:
            raise InputError("training: validation_every needs a data.validation, or a data.validation_share")
        self.identity = task.identity() | {"data": source.fingerprint, "size": str(task.data.size)}
        self.names = task.names()
        tensors = task.state_dict(keep_vars=True)
        self.shapes = {checkpoint: list(tensors[name].shape) for name, checkpoint in self.names.items()}
        found = self._find_checkpoint()
        self.first_step = self.saved = found["global_step"] if found else 0
        self.broken_at = torch.full((), NEVER, dtype=torch.int32, device=fabric.device)

        on_cpu = fabric.device.type == "cpu"
        if on_cpu:
            keep_memory()  # gradients of every step are as large as those before
        task.to(fabric.device)
        self.items = self._items(source, cache)
        self.validation = None
        if self.config.validation_every:
            shares = fabric.global_rank, fabric.world_size, self._at_a_time
            self.validation = validation_batches(
                task.data, self._items(validation, cache), self.config, *shares
            )
        if task.is_new and not found:
            task.start(self._on_device(self._some_examples()))
        trained = task.trained()
        if self.config.compile and hasattr(task, "unet"):
            task.unet.compile()
        self.module = fabric.setup_module(task)
        for method in ("validation_losses", "sample_grid"):
            self.module.mark_forward_method(method)
        self.weights = list(trained.values())
        self.optimizer = fabric.setup_optimizers(
            torch.optim.AdamW(
                self.weights,
                lr=self.config.learning_rate,
                betas=self.config.betas,
                weight_decay=self.config.weight_decay,
                fused=on_cpu or None,  # without the temporary tensors of torch's loop
            )
        )
        self.checkpoints = Checkpoints(task, self.names, self._inner, self.optimizer.optimizer)
        self.averages = None
        if self.config.ema_decay:
            self.averages = Averages(trained, self.config.ema_decay)
        self.trained_names = list(trained)
        if found:
            self._resume(found)

    def train(self, stop: int) -> list[Path]:
        """Take the steps up to `stop`, then write the last checkpoint and what the task leaves."""
        config, logs, costs = self.config, [], None
        with led(self.fabric):
            if self.leads:
                logs = open_logs(self.folder, config.logs, self.first_step)
                costs = TrainingCosts(self.folder, config, self.fabric, self.first_step)
                if not self.first_step:
                    (self.folder / DAMAGED).unlink(missing_ok=True)
        waited, since = 0.0, time.perf_counter()
        self.batches = self._batches()
        stream = iter(self.batches)
        steps = range(self.first_step, stop)
        with tqdm(total=stop, initial=self.first_step, desc="training", disable=not self.leads) as bar:
            for step in steps:
                loss, seconds = self._step(step, stream)
                waited += seconds
                done, figures = step + 1, {}
                bar.update()
                if done % config.log_every == 0 or done == stop:
                    figures = self._figures(loss, step)
                    now = time.perf_counter()
                    figures["waiting"] = waited / (now - since)
                    waited, since = 0.0, now
                    bar.set_postfix(loss=f"{figures['loss']:.4f}")
                if config.validation_every and done % config.validation_every == 0:
                    figures |= self._validate()
                if config.sample_every and done % config.sample_every == 0:
                    self._sample(done)
                if figures:
                    with led(self.fabric):
                        for log in logs:
                            log.write(done, figures)
                if config.checkpoint_every and done % config.checkpoint_every == 0 and done < stop:
                    self._save(done, costs)
        if steps or not self.saved:
            self._save(max(stop, self.first_step), costs, last=True)
        with led(self.fabric):
            for log in logs:
                log.close()
        return self._export()

    def _step(self, step: int, batches: Iterator[Batch]) -> tuple[Tensor, float]:
        """One optimiser step: the mean loss of this process's examples, and seconds of waiting for data."""
        fabric, passes = self.fabric, self.accumulation
        for group in self.optimizer.optimizer.param_groups:  # Fabric's own list is that of before resuming
            group["lr"] = learning_rate(self.config, step)
        total, waited = 0.0, 0.0
        for k in range(passes):
            start = time.perf_counter()
            batch = self._on_device(next(batches))
            waited += time.perf_counter() - start
            with fabric.no_backward_sync(self.module, enabled=k < passes - 1):
                with fabric.autocast():  # with one process Fabric's own wrapper does not turn it on
                    loss = self.module.training_step(batch)
                fabric.backward(loss / passes)
            total = total + loss.detach() / passes
        if self.config.gradient_clip:
            self.gradient_norm = fabric.clip_gradients(
                self.module, self.optimizer, max_norm=self.config.gradient_clip, error_if_nonfinite=False
            )
        self._watch(step, total)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.averages:
            self.averages.update()
        return total, waited

    @torch.no_grad()
    def _watch(self, step: int, loss: Tensor) -> None:
        """Keep the first step whose loss or gradient is no number, on the device, so that nothing waits."""
        finite = loss.isfinite()
        if self.precision != "fp16":  # whose loss scaling leaves out steps with such a gradient
            if self.config.gradient_clip:
                norm = self.gradient_norm
            else:
                norm = get_total_norm([w.grad for w in self.weights if w.grad is not None])
            finite = finite & norm.isfinite()
        now = torch.full_like(self.broken_at, step + 1)
        self.broken_at = torch.where(finite, self.broken_at, torch.minimum(self.broken_at, now))

    def _check_finite(self) -> None:
        """RuntimeError if the loss or the gradient of a step so far was no number. All processes call it."""
        step = int(self.fabric.all_reduce(self.broken_at.clone(), reduce_op="min"))
        if step != NEVER and not self.leads:
            raise SystemExit(1)  # the leader says why
        if step != NEVER:
            last = f"{self.folder / LAST} stays as it is" if self.saved else "there is no checkpoint"
            raise RuntimeError(f"the loss or the gradient of step {step} is no number; {last}")

    @property
    def accumulation(self) -> int:
        return self.config.batch_size // (self._at_a_time * self.fabric.world_size)

    @property
    def _at_a_time(self) -> int:
        return self.config.examples_at_a_time(self.fabric.world_size)

    @property
    def _inner(self) -> torch.nn.Module:
        """The task, wrapped for several devices but without Fabric's own wrapper."""
        return self.module._forward_module

    def _figures(self, loss: Tensor, step: int) -> dict[str, float]:
        """What is logged of a step. RuntimeError if it, or one before it, has a loss that is no number."""
        self._check_finite()
        figures = {"loss": self._mean(loss), "learning_rate": learning_rate(self.config, step)}
        if self.config.gradient_clip:
            figures["gradient_norm"] = float(self.gradient_norm)
        return figures | {name: self._mean(value) for name, value in self.task.figures.items()}

    def _mean(self, value: Tensor) -> float:
        """The mean over all processes."""
        value = value.detach().float().to(self.fabric.device)
        return self.fabric.all_reduce(value, reduce_op="mean").item()

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """The validation loss of the weights as they are, and of the averaged ones."""
        figures = {}
        for name, weights in self._both("validation_loss", "validation_loss_ema"):
            with weights:
                total = torch.zeros(2, device=self.fabric.device)
                for batch in map(self._on_device, self.validation):
                    with self.fabric.autocast():
                        losses, weight = self.module.validation_losses(batch), batch["weight"]
                    total += torch.stack([(losses * weight).sum(), weight.sum()])
            loss, count = self.fabric.all_reduce(total, reduce_op="sum").tolist()
            figures[name] = loss / count
        return figures

    def _sample(self, step: int) -> None:
        """Save samples of the averaged weights, and of those as they are if there are both."""
        batch = self._on_device(self._shown)
        for name, weights in self._both(
            f"step-{step:06}{'-raw' if self.averages else ''}", f"step-{step:06}"
        ):
            with weights, self.fabric.autocast():
                grid = self.module.sample_grid(batch)
            with led(self.fabric):
                if self.leads:
                    write_image(grid, self.folder / f"{name}.png")

    def _both(self, raw: str, averaged: str) -> list[tuple[str, Any]]:
        return [(raw, nullcontext()), *([(averaged, self.averages.applied())] if self.averages else [])]

    @cached_property
    def _shown(self) -> Batch:
        """The examples whose captions, masks and the like samples have; of validation if there are any."""
        data = dataclasses.replace(self.task.data, workers=0)
        items = self.validation.dataset.items if self.validation else self.items
        return next(iter(validation_batches(data, items, self.config, device_batch=SHOWN)))

    def _items(self, source: Source, cache: Path) -> Items:
        """What the loader reads of a source: its pixels, or the latents that they are encoded into now."""
        data = self.task.data
        if not data.latents:
            return Pixels(data, source, cache)
        if not isinstance(self.task, LatentDiffusionTask):
            raise InputError(f"data: latents: a {type(self.task.model).__name__} is trained on images")
        return cached(data, source, self.task.model, cache)

    def _some_examples(self) -> Batch:
        """The examples that a new model takes something from; the same in all processes."""
        if isinstance(self.items, Latents):
            return self.items.first(MANY)
        data = dataclasses.replace(self.task.data, workers=0)
        config = dataclasses.replace(self.config, validation_count=64)
        return next(iter(validation_batches(data, self.items, config, device_batch=64)))

    def _batches(self) -> Loader:
        fabric = self.fabric
        shares = fabric.global_rank, fabric.world_size, self._at_a_time
        return loader(self.task.data, self.items, self.config, *shares, self.first_step)

    def _save(self, step: int, costs: TrainingCosts | None, last: bool = False) -> None:
        self._check_finite()
        damaged = self._damaged()
        state = self.checkpoints.weights()
        facts = {
            "global_step": step,
            "optimizer_states": [self.checkpoints.optimizer_state()],
            "precision": self.fabric._precision.state_dict(),
            "identity": self.identity,
            "settings": self._settings(),
            "options": dict(self.task.method_options),
            "updates": self.averages.updates if self.averages else 0,
        }
        if self.averages:
            with self.averages.applied():
                averaged = self.checkpoints.weights()
            state |= {averaged_name(name): averaged[name] for name in self.trained_names if name in averaged}
        state |= self.task.markers()
        with led(self.fabric):
            if self.leads:
                write_checkpoint(self.folder / LAST, state, facts, self.config.keep)
                report(damaged, self.folder / DAMAGED, aloud=last)
                if costs and step > self.first_step:
                    costs.save(step, last)
        self.saved = step

    def _damaged(self) -> dict[str, str]:
        """What all processes have left out of their data so far, and why."""
        own = self.batches.damaged | (self.validation.damaged if self.validation else {})
        found: dict[str, str] = {}
        for damaged in gathered(self.fabric, own):
            found |= damaged
        return found

    def _settings(self) -> dict[str, Any]:
        """What decides the curve besides `identity`, in plain values."""
        model = dict(_leaves("model", self.task.section))
        data = {f"data.{name}": str(value) for name, value in vars(self.task.data).items()}
        values = dataclasses.asdict(self.config) | {"precision": self.precision}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return model | data | plain

    def _find_checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint of the folder, if there is one.

        InputError for that of something else, and in all processes where one of them finds another one.
        """
        path = self.folder / LAST
        found, problem = None, None
        try:
            if path.exists():
                option = self.task.output_option
                found = read_checkpoint(path, option)
                check_options(path, found, self.task.method_options, option)
                settings = self._settings()
                if not any(name.startswith("model.") for name in found["settings"]):  # an older file
                    settings = {name: v for name, v in settings.items() if not name.startswith("model.")}
                check_resumed(path, found, self.identity, self.shapes, settings, option)
        except InputError as error:
            problem = str(error)
        problems = gathered(self.fabric, problem)
        if any(problems):
            raise InputError(next(filter(None, problems)))
        steps = gathered(self.fabric, found["global_step"] if found else 0)
        for rank, step in enumerate(steps):
            if step != steps[0]:
                raise InputError(
                    f"{path} is of step {steps[0]} for process 0, and of step {step} for process {rank}: all "
                    f"machines need the same folder; choose a {self.task.output_option} that they share"
                )
        return found

    def _resume(self, found: dict[str, Any]) -> None:
        state = found["state_dict"]
        if self.averages:
            kept = {name: state.get(averaged_name(name), state[name]) for name in self.trained_names}
            self.checkpoints.load_weights(state | kept)
            self.averages.take(found["updates"])
        self.checkpoints.load_weights(state)
        self.checkpoints.load_optimizer_state(found["optimizer_states"][0])
        if found["precision"]:  # the loss scaling of fp16, of which other precisions have none
            self.fabric._precision.load_state_dict(found["precision"])

    def _export(self) -> list[Path]:
        """The files that the task leaves, from averaged weights where there are any."""
        with self.averages.applied() if self.averages else nullcontext():
            if self.config.strategy == "fsdp":
                self.task.gathered = self.checkpoints.weights()
            with led(self.fabric):
                return self.task.export(self.folder) if self.leads else []

    def _on_device(self, batch: Batch) -> dict[str, Any]:
        device = self.fabric.device
        return {
            name: value.to(device, non_blocking=True)
            if isinstance(value, Tensor) and name != "row"
            else value
            for name, value in batch.items()
        }


def _leaves(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """The values of a section without its levels: `model.params.channels`, 4."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _leaves(f"{name}.{key}", each)
    else:
        yield name, str(value)


def write_image(image: np.ndarray, path: Path) -> None:
    with whole(path) as unfinished:
        Image.fromarray(image).save(unfinished, format="png")
