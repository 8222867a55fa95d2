"""The points of an evaluation, one for each checkpoint and guidance scale: files of them, and their plot."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ldm.errors import FieldError, InputError
from ldm.evaluation.intervals import LEVEL, Figure
from ldm.weights.files import user_file

JSON, CSV, PLOT = "results.json", "results.csv", "pareto.png"
# The palette of Okabe and Ito (2008), which colour-blind readers tell apart; shapes and lines differ, too.
STYLES = (
    ("#0072B2", "o", "-"),
    ("#D55E00", "s", "--"),
    ("#009E73", "^", "-."),
    ("#CC79A7", "D", ":"),
    ("#E69F00", "v", "-"),
    ("#56B4E9", "P", "--"),
    ("#000000", "X", "-."),
)
LIMITS = ("*", "h")  # marks of points that no model made
LOGARITHMIC = 5  # distances that differ by a larger factor are shown on a logarithmic scale


@dataclass(frozen=True)
class Point:
    """What was measured on the images of one checkpoint at one guidance scale.

    Without a scale, sampler and folder it is a limit: images that no diffusion made.
    """

    checkpoint: str
    scale: float | None
    sampler: str | None
    steps: int | None
    images: int
    missing: int  # that came out as NaN; in no figure but an accuracy, where they count as wrong
    distance: Figure
    agreement: Figure  # CLIP score or accuracy
    folder: str | None = None

    @property
    def key(self) -> tuple[str, float | None]:
        return self.checkpoint, self.scale


@dataclass(frozen=True)
class Axis:
    """A figure's name in a plot, its name in a table, and by how much the values are multiplied there."""

    label: str
    column: str
    factor: float = 1.0
    digits: int = 2

    def shown(self, figure: Figure) -> str:
        value, low, high = (
            f"{self.factor * x:.{self.digits}f}" for x in (figure.value, figure.low, figure.high)
        )
        return f"{value} ({low} to {high})"


FID = Axis("FID", "fid")
DETECTOR_DISTANCE = Axis("Fréchet distance of detector features", "feature_distance")
CLIP_SCORE = Axis("CLIP score (mean cosine similarity)", "clip_score", digits=4)
ACCURACY = Axis("images as their prompts say, read by the detector (%)", "accuracy", 100.0, digits=1)


class Results:
    """The points in an output folder, as JSON and CSV; a new one is written at once, whole or not at all.

    Several commands may measure into one folder at a time: each adds its points to those that are there.
    """

    def __init__(self, outdir: Path, settings: Mapping[str, Any], distance: Axis, agreement: Axis):
        """Of a new or an earlier evaluation in an existing folder; FieldError if that had other settings."""
        self.outdir, self.distance, self.agreement = outdir, distance, agreement
        self.settings = json.loads(json.dumps(settings))
        self.points: list[Point] = []
        # by each checkpoint's name what its points depend on besides the settings: hashes of its file and its
        # config, and its sampler
        self.models: dict[str, dict[str, str]] = {}
        self._take_in()

    def _take_in(self) -> None:
        """Add what the file has of other commands. FieldError if that has other settings or models."""
        path = self.outdir / JSON
        if not path.exists():
            return
        try:
            with user_file(path):
                content = json.loads(path.read_text(encoding="utf-8"))
            before, points = content["settings"], [_point(each) for each in content["points"]]
            # earlier files have the weights' hashes alone, or nothing
            weights = {name: {"weights": hash_} for name, hash_ in content.get("weights", {}).items()}
            models = {name: dict(facts) for name, facts in content.get("models", weights).items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise FieldError(
                "{outdir} {path} has no results of an evaluation; move it away", path=path
            ) from error
        if isinstance(before, dict) and before.get("precision") == "the device's":
            before = before | {"precision": self.settings.get("precision")}  # all that earlier files say
        if before != self.settings:
            from ldm.runs.manifest import differences

            raise FieldError(
                "{outdir} {path} has an evaluation of other settings: {what}; give another folder",
                path=self.outdir,
                what=differences(before, self.settings),
            )
        for name, facts in models.items():
            now = self.models.get(name, {})
            self._check(name, facts, now)
            self.models[name] = facts | now
        self.points = self._in_order([*points, *self.points])

    def use(self, checkpoint: str, facts: Mapping[str, str]) -> None:
        """Keep what a checkpoint is, whose name alone is in points and folders of images.

        FieldError if what is there was made by another file of that name, or with another config or sampler.
        """
        before = self.models.get(checkpoint, {})
        self._check(checkpoint, before, facts)
        self.models[checkpoint] = before | facts

    def _check(self, checkpoint: str, before: Mapping[str, str], now: Mapping[str, str]) -> None:
        for name in before:
            if name in now and before[name] != now[name]:
                raise FieldError(
                    "{outdir} {path} has images and figures of another {checkpoint} ({name} {before}, not "
                    "{now}): give another folder",
                    path=self.outdir,
                    checkpoint=checkpoint,
                    name=name,
                    before=before[name],
                    now=now[name],
                )

    def find(self, checkpoint: str, scale: float | None) -> Point | None:
        return next((point for point in self.points if point.key == (checkpoint, scale)), None)

    def add(self, point: Point) -> None:
        """Keep a point, in place of an earlier one of the same checkpoint and scale, and write all."""
        self.points = self._in_order([*self.points, point])
        self.write()

    @staticmethod
    def _in_order(points: Sequence[Point]) -> list[Point]:
        """The last point of each key: limits come last, checkpoints as they came first, scales rise."""
        order = list(dict.fromkeys(point.checkpoint for point in points))
        return sorted(
            {point.key: point for point in points}.values(),
            key=lambda point: (point.scale is None, order.index(point.checkpoint), point.scale or 0.0),
        )

    def write(self) -> None:
        """Write the files, with what another command has added to them meanwhile. FieldError as at first."""
        from ldm.runs.manifest import folder_lock
        from ldm.training.files import whole

        with folder_lock(self.outdir):
            self._take_in()
            points = [asdict(point) for point in self.points]
            content = {"settings": self.settings, "models": self.models, "points": points}
            texts = {JSON: json.dumps(content, indent=1, ensure_ascii=False) + "\n", CSV: self.csv()}
            for name, text in texts.items():
                with whole(self.outdir / name) as unfinished:
                    unfinished.write_text(text, encoding="utf-8")

    def csv(self) -> str:
        """A row for each point, the ends of intervals in columns of their own, in the figures' own units."""
        axes = ((self.distance, "distance"), (self.agreement, "agreement"))
        figures = [axis.column + end for axis, _ in axes for end in ("", "_low", "_high")]
        plain = [each.name for each in fields(Point) if each.name not in ("distance", "agreement")]
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow([*plain[:-1], *figures, plain[-1]])
        for point in self.points:
            values = [getattr(point, name) for name in plain]
            numbers = [f"{x:.6g}" for _, name in axes for x in asdict(getattr(point, name)).values()]
            table.writerow([*values[:-1], *numbers, values[-1]])
        return text.getvalue()

    def in_words(self, point: Point) -> str:
        where = point.checkpoint if point.scale is None else f"{point.checkpoint}, scale {point.scale:g}"
        distance, agreement = self.distance.shown(point.distance), self.agreement.shown(point.agreement)
        return f"{where}: {self.distance.label} {distance}, {self.agreement.label} {agreement}"

    def markdown(self) -> str:
        """The points as a table, each figure with its interval."""
        rows = [["checkpoint", "scale", self.distance.label, self.agreement.label], ["---", *["---:"] * 3]]
        for point in self.points:
            scale = "" if point.scale is None else f"{point.scale:g}"
            figures = (self.distance.shown(point.distance), self.agreement.shown(point.agreement))
            rows.append([point.checkpoint, scale, *figures])
        return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def plot(results: Results, path: Path) -> None:
    """The model cards' plot: distance over agreement, a line through the scales of each checkpoint.

    InputError if matplotlib is missing.
    """
    try:
        import matplotlib
        from matplotlib import ticker
    except ImportError as error:
        raise InputError('the plot needs matplotlib: pip install -e ".[evaluation]"') from error
    from matplotlib.figure import Figure as Canvas

    from ldm.training.files import whole

    x, y = results.agreement, results.distance
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Canvas(figsize=(8, 5.4), layout="constrained")
        axes = figure.add_subplot()
        for i, (name, points) in enumerate(_lines(results.points).items()):
            colour, marker, line = STYLES[i % len(STYLES)]
            _draw(axes, points, x, y, fmt=marker, color=colour, linestyle=line, markersize=6, label=name)
            for point in points:
                place = (x.factor * point.agreement.value, y.factor * point.distance.value)
                axes.annotate(
                    f"{point.scale:g}",
                    place,
                    (5, 6 if i % 2 == 0 else -13),
                    textcoords="offset points",
                    fontsize=9,
                    color=colour,
                )
        for marker, point in zip(LIMITS, (p for p in results.points if p.scale is None), strict=False):
            _draw(axes, [point], x, y, fmt=marker, color="#666666", markersize=9, label=point.checkpoint)
        heights = [point.distance.value for point in results.points]
        if min(heights) > 0 and max(heights) > LOGARITHMIC * min(heights):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(ticker.ScalarFormatter())
            axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        axes.set_xlabel(x.label)
        axes.set_ylabel(f"{y.label} (lower is better)")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, title="numbers: guidance scale", title_fontsize=9)
        figure.suptitle(_caption(results.points), fontsize=9)
        with whole(path) as unfinished:
            figure.savefig(unfinished, dpi=120, format="png")


def _draw(axes: Any, points: Sequence[Point], x: Axis, y: Axis, **style: Any) -> None:
    """Points in a line, with their intervals as bars."""

    def values(axis: Axis, figures: Sequence[Figure]) -> tuple[list[float], list[list[float]]]:
        ends = [[f.value - f.low for f in figures], [f.high - f.value for f in figures]]
        return [axis.factor * f.value for f in figures], [[axis.factor * e for e in side] for side in ends]

    across, across_bars = values(x, [point.agreement for point in points])
    up, up_bars = values(y, [point.distance for point in points])
    bars = {"ecolor": (style["color"], 0.4), "elinewidth": 1.0, "capsize": 2}
    axes.errorbar(across, up, up_bars, across_bars, **bars, linewidth=1.5, **style)


def _lines(points: Sequence[Point]) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = {}
    for point in points:
        if point.scale is not None:
            found.setdefault(point.checkpoint, []).append(point)
    return found


def _caption(points: Sequence[Point]) -> str:
    """How many images, steps and samplers the points have, and what the bars are."""
    sampled = [point for point in points if point.scale is not None]
    images = " or ".join(f"{count:,}" for count in sorted({point.images for point in sampled}))
    steps = " or ".join(f"{count}" for count in sorted({point.steps for point in sampled}))
    samplers = " or ".join(dict.fromkeys(point.sampler.upper() for point in sampled))
    bars = f"bars: {100 * LEVEL:g} % intervals over images"
    return f"{images} images a point; {steps} steps of {samplers}; {bars}"


def _point(content: Mapping[str, Any]) -> Point:
    own = dict(content)
    for name in ("distance", "agreement"):
        own[name] = Figure(**own[name])
    return Point(**own)
