"""Running a task: checkpoints, resuming, the metrics' file, sample images and the final weights."""

import csv
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from PIL import Image
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers.logger import Logger

from ldm.training.files import write_tensors, writing_below
from ldm.training.tasks import LatentDiffusionTask, Task
from ldm.weights.checkpoint import COMPUTED


class SampleImages(Callback):
    """Saves the task's grid of sample images every `every` steps; 0 is never."""

    def __init__(self, folder: Path, every: int):
        self.folder, self.every = folder, every

    def on_train_batch_end(self, trainer: pl.Trainer, task: Task, *_: Any) -> None:
        if self.every and trainer.global_step % self.every == 0:
            task.eval()
            Image.fromarray(task.sample_grid()).save(self.folder / f"step-{trainer.global_step:06}.png")
            task.train()


class MetricsFile(Logger):
    """One row of a CSV file for every logged step. A resumed run appends to the rows of the run before it.

    Steps that the earlier run took after its last checkpoint are repeated; their old rows are dropped.
    """

    name = version = None

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.columns: list[str] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        if not self.columns:
            self.columns = sorted([*metrics, "step"])
            self._write("w", [row for row in self._earlier_rows() if int(row["step"]) < step])
        self._write("a", [metrics | {"step": step}])

    def log_hyperparams(self, *_: Any) -> None:
        """Nothing: they are in the YAML file."""

    def _earlier_rows(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return [row for row in csv.DictReader(file) if (row.get("step") or "").isdigit()]

    def _write(self, mode: str, rows: list[dict[str, Any]]) -> None:
        with self.path.open(mode, newline="") as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
            if mode == "w":
                writer.writeheader()
            writer.writerows(rows)


def train(task: Task, folder: Path, stop_at: int) -> None:
    """Run a task up to a step, from its last checkpoint in `folder` if there is one."""
    config = task.config
    last, metrics = folder / "last.ckpt", folder / "metrics.csv"
    with writing_below(folder):
        if not last.exists():
            metrics.unlink(missing_ok=True)
        trainer = pl.Trainer(
            max_steps=stop_at,
            precision="bf16-mixed",
            devices=1,
            gradient_clip_val=1.0,
            logger=MetricsFile(metrics),
            log_every_n_steps=min(50, stop_at),
            callbacks=[
                ModelCheckpoint(
                    folder, save_last=True, save_top_k=0, every_n_train_steps=config.checkpoint_every
                ),
                SampleImages(folder, config.sample_every),
                TQDMProgressBar(),
            ],
            enable_model_summary=False,
        )
        trainer.fit(task, ckpt_path=last if last.exists() else None, weights_only=False)
        trainer.save_checkpoint(last)


def save_weights(task: Task, path: Path) -> Path:
    """Write the averaged weights: a first stage as it is, the whole model in half precision.

    The schedule, which every model computes itself, is left out.
    """
    state = {name: t for name, t in task.averaged_state().items() if not COMPUTED.fullmatch(name)}
    if isinstance(task, LatentDiffusionTask):
        # Scalars such as the latents' scale stay in single precision.
        state = {name: t.half() if t.ndim and t.is_floating_point() else t for name, t in state.items()}
    write_tensors(state, path)
    return path
