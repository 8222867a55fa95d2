"""Where losses go: a CSV file, TensorBoard's files, an image of the curve. A resumed run continues them."""

import csv
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path

from ldm.log import notice
from ldm.training.files import whole

LOSSES = ("loss", "validation_loss", "validation_loss_ema")


class MetricsFile:
    """One row of a CSV file for each logged step.

    Rows of steps that an earlier run took after its last checkpoint are dropped: they are repeated.
    """

    def __init__(self, path: Path, first_step: int):
        self.path = path
        rows = read_rows(path) if first_step else []
        self.columns = list(rows[0]) if rows else ["step"]
        self._rewrite([row for row in rows if int(row["step"]) <= first_step])

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        if new := [name for name in figures if name not in self.columns]:
            self.columns += new
            self._rewrite(read_rows(self.path))
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow({"step": step, **figures})

    def _rewrite(self, rows: Iterable[Mapping[str, str]]) -> None:
        with whole(self.path) as unfinished, unfinished.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)

    def close(self) -> None:
        """Nothing: each row is written at once."""


class TensorBoard:
    """Events for TensorBoard in `folder`; it hides those of an earlier run after `first_step`."""

    def __init__(self, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Plot:
    """An image of the losses, drawn at the end from the CSV file."""

    def __init__(self, path: Path, metrics: Path):
        self.path, self.metrics = path, metrics

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Nothing until the end."""

    def close(self) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel="loss")
        rows = read_rows(self.metrics)
        for name in LOSSES:
            points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
            if points:
                axes.plot(*zip(*points, strict=True), label=name.replace("_", " "))
        axes.legend()
        with whole(self.path) as unfinished:
            figure.savefig(unfinished, format="png", dpi=100)


Log = MetricsFile | TensorBoard | Plot


def open_logs(folder: Path, wanted: Iterable[str], first_step: int) -> list[Log]:
    """The logs of a run in `folder` that begins after `first_step`. A missing package is a notice."""
    metrics = folder / "metrics.csv"
    logs: list[Log] = []
    if "plot" in wanted and "csv" not in wanted:
        wanted = ("csv", *wanted)  # it is drawn from that file
    for name in wanted:
        package = {"tensorboard": "tensorboard", "plot": "matplotlib"}.get(name)
        if package and importlib.util.find_spec(package) is None:
            notice(f'no {name}: {package} is missing (pip install -e ".[training]", or leave it out of logs)')
        elif name == "csv":
            logs.append(MetricsFile(metrics, first_step))
        elif name == "tensorboard":
            logs.append(TensorBoard(folder / "tensorboard", first_step))
        else:
            logs.append(Plot(folder / "loss.png", metrics))
    return logs


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics file; none if there is no file. A torn last row is left out."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if (row.get("step") or "").isdigit() and None not in row.values()]
