"""Model cards: what of models/*/README.md is made from the files of evaluations and of trainings.

A card is written by hand but for what is between `<!-- generated: NAME -->` and `<!-- end -->`. This is made
from two files beside it: `evaluation.json`, which keeps what scripts/evaluate_scenes.py and
scripts/evaluate_siblings.py have found, and `training.json`, which says on what a model was trained for how
long.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.errors import InputError
from ldm.runs.costs import Costs, duration, energy, factor_of, mass, power_of
from ldm.scenes.captions import caption
from ldm.scenes.detector import outline
from ldm.scenes.scene import BACKGROUNDS, CANONICAL_RELATIONS, COLOURS, SHAPES, SIZES, Scene
from ldm.scenes.scores import NOT_FINITE, evaluation_scenes
from ldm.training.files import whole
from ldm.weights.loading import ROOT

MODELS = ROOT / "models"
CARD, EVALUATION, TRAINING = "README.md", "evaluation.json", "training.json"
KEPT = ("seed", "prompts", "sampler", "ddim_steps", "schedule", "noise_level")  # of an evaluation's settings
SHARES = ("all", "relation", "solids", "shapes", "colours")
UNITS = {"PSNR": " dB", "better by": " dB", "median": " pixels", "correlation": ""}  # others are shares
BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.S)


def condensed(scores: Mapping[str, Any], model: str, scale: float) -> dict[str, Any]:
    """What a card needs of the scores.json of one of the evaluations. InputError if it is none of a model's.

    Of `evaluate_scenes.py` these are the scores, and the right images by what their prompts ask for, at a
    guidance scale; of `evaluate_siblings.py` the scores of the model.
    """
    try:
        settings = {
            name: scores["settings"][name] for name in KEPT if scores["settings"].get(name) is not None
        }
        if "seen" in scores:
            own = {"scores": scores["scores"], "by": by_content(scores, f"scale {scale:g}")}
            return {"evaluation": "scenes", "settings": settings | {"scale": scale}} | own
        (task,) = set(scores["scores"]).intersection(TASKS[model])
        return {"evaluation": task, "settings": settings, "scores": scores["scores"][task]}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"these are no scores of an evaluation of {model}: {error}") from error


# The parts of evaluate_siblings.py by the model that they measure.
TASKS = {
    "scenes-64": (),
    "scenes-64-v": (),
    "scenes-128": (),
    "scenes-64-inpainting": ("inpainting",),
    "scenes-64-depth": ("depth",),
    "scenes-x4": ("upscaling",),
    "scenes-64-canny": ("edges",),
    "scenes-128-inpainting": ("inpainting",),
    "scenes-128-depth": ("depth",),
    "scenes-128-canny": ("edges",),
}


def by_content(scores: Mapping[str, Any], row: str) -> dict[str, dict[str, list[int]]]:
    """For each colour, shape, relation … [right, all] of the images whose prompts ask for it."""
    settings = scores["settings"]
    count = settings["prompts"]
    asked = [
        scene for pairs in (False, True) for scene in evaluation_scenes(settings["seed"], count, pairs=pairs)
    ]
    counts: dict[str, dict[str, list[int]]] = {
        "colour": {name: [0, 0] for name in COLOURS},
        "shape": {name: [0, 0] for name in SHAPES},
        "relation": {name: [0, 0] for name in CANONICAL_RELATIONS},
        "size": {name: [0, 0] for name in SIZES},
        "background": {name: [0, 0] for name in BACKGROUNDS},
    }
    for scene, seen in zip(asked, scores["seen"][row], strict=True):
        right = seen == caption(outline(scene))
        for factor, name in contents(scene):
            counts[factor][name][0] += right
            counts[factor][name][1] += 1
    return counts


def contents(scene: Scene) -> set[tuple[str, str]]:
    """What a scene's prompt asks for: {("colour", "red"), ("shape", "cube"), …}; relations are canonical."""
    scene = scene.canonical()
    found = {("relation", scene.relation), ("background", scene.background)}
    for solid in (scene.first, scene.second):
        if solid:
            found |= {("colour", solid.colour), ("shape", solid.shape), ("size", solid.size)}
    return {(factor, name) for factor, name in found if name is not None}


def add(model: str, scores: Mapping[str, Any], scale: float = 3.0) -> Path:
    """Put an evaluation's scores into a model's evaluation.json, in place of those of the same one."""
    path = MODELS / model / EVALUATION
    if model not in TASKS:
        raise InputError(f"{model!r} is no bundled model; there are {', '.join(TASKS)}")
    found = condensed(scores, model, scale)
    before = [one for one in read(path) or [] if _same_of(one) != _same_of(found)]
    with whole(path) as unfinished:
        unfinished.write_text(json.dumps([*before, found], indent=1) + "\n")
    return path


def _same_of(evaluation: Mapping[str, Any]) -> tuple:
    settings = {name: value for name, value in evaluation["settings"].items() if name != "prompts"}
    return evaluation["evaluation"], tuple(sorted(settings.items()))


def read(path: Path) -> Any:
    """The content of a JSON file; None if it is not there. InputError if it is damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def cards() -> list[Path]:
    """The cards of all bundled models."""
    return sorted(MODELS.glob(f"*/{CARD}"))


def filled(path: Path) -> str:
    """A card's text with what is generated made anew. InputError for what cannot be made."""

    def block(match: re.Match[str]) -> str:
        if match[2] not in BLOCKS:
            raise InputError(
                f"{path}: there is nothing {match[2]!r} to generate; there are {', '.join(BLOCKS)}"
            )
        return f"{match[1]}{BLOCKS[match[2]](path.parent)}{match[3]}"

    return BLOCK.sub(block, path.read_text())


def evaluation(folder: Path) -> str:
    """The scores of all evaluations, a table each."""
    found = read(folder / EVALUATION)
    return "\n".join(map(_table, found)) if found else "It has not been evaluated yet.\n"


def _table(found: Mapping[str, Any]) -> str:
    settings = found["settings"]
    how = f"{settings.get('sampler') or 'dpmpp_2m'}, {settings.get('ddim_steps', 20)} steps"
    if found["evaluation"] == "scenes":
        count = settings["prompts"]
        lines = [
            f"{count} held-out prompts of one solid and {count} of two, by {how}, seed {settings['seed']}: "
            "percent of the images that are right",
            "",
        ]
        for title, rows in found["scores"].items():
            lines += [f"| {title} | {' | '.join(SHARES)} |", f"|---|{'---:|' * len(SHARES)}"]
            for row, scores in rows.items():
                lines.append(f"| {row} | {' | '.join(f'{100 * scores[name]:.1f}' for name in SHARES)} |")
            lines.append("")
        return "\n".join(lines)
    if found["evaluation"] == "upscaling" and "sampler" not in settings:
        how = "ddim, schedule trailing, 1 step"
    level = settings.get("noise_level")
    noise = "" if level is None else f", noise level {level}"
    count = settings["prompts"]
    title = f"{count} scenes of one solid, {count} of two, by {how}{noise}"
    lines = [f"| {title} | |", "|---|---:|"]
    lines += [f"| {name} | {_figure(name, value)} |" for name, value in found["scores"].items()]
    return "\n".join([*lines, ""])


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return NOT_FINITE
    unit = next((unit for start, unit in UNITS.items() if name.startswith(start)), None)
    return f"{100 * value:.1f} %" if unit is None else f"{value:.2f}{unit}"


def biases(folder: Path) -> str:
    """The right images by what their prompts ask for, most often wrong first."""
    found = [one for one in read(folder / EVALUATION) or [] if one["evaluation"] == "scenes"]
    if not found:
        return "It has not been measured by what prompts ask for.\n"
    settings = found[0]["settings"]
    lines = [
        f"Right images of all whose prompts ask for it, {2 * settings['prompts']} together, at scale "
        f"{settings['scale']:g}:",
        "",
        "| | right of all, the most often wrong first |",
        "|---|---|",
    ]
    for factor, counts in found[0]["by"].items():
        named = {name: pair for name, pair in counts.items() if pair[1]}
        order = sorted(named, key=lambda name: named[name][0] / named[name][1])
        lines.append(
            f"| {factor} | {', '.join(f'{name} {named[name][0]}/{named[name][1]}' for name in order)} |"
        )
    return "\n".join([*lines, ""])


def footprint(folder: Path) -> str:
    """Energy and CO2 of the training, by the calculator's formula."""
    found = read(folder / TRAINING)
    if not found:
        return "It is not known.\n"
    region = found.get("region", "world")
    parts = [part_costs(part, region) for part in found["parts"]]
    total = total_of(parts)
    lines = ["| part | hardware | time | energy | CO2 |", "|---|---|---:|---:|---:|"]
    for part, costs in zip(found["parts"], parts, strict=True):
        hardware = (
            f"{part['cores']} core{'s' if part['cores'] > 1 else ''} of {part['device']}, {costs.watts:g} W"
        )
        spent = duration(3600 * costs.hours)
        lines.append(
            f"| {part['part']} | {hardware} | {spent} | {energy(costs.kwh)} | {mass(costs.co2_kg)} |"
        )
    lines.append(
        f"| **all of it** | | **{duration(3600 * total.hours)}** | **{energy(total.kwh)}** | "
        f"**{mass(total.co2_kg)}** |"
    )
    return "\n".join(
        [*lines, "", f"The region is {region}, at {total.factor:g} kg of CO2 per kWh ({total.how}).", ""]
    )


def part_costs(part: Mapping[str, Any], region: str) -> Costs:
    """What a part of a training took: minutes on so many cores of a processor."""
    return Costs(part["minutes"] / 60, power_of(part["device"], part["cores"]), factor_of(region))


def total_of(parts: Sequence[Costs]) -> Costs:
    hours = sum(part.hours for part in parts)
    return Costs(hours, 1000 * sum(part.kwh for part in parts) / hours, parts[0].factor)


def files(folder: Path) -> str:
    """The weights and their sizes."""
    found = sorted(folder.glob("*.safetensors"))
    return "".join(f"- `{file.name}`, {file.stat().st_size / 1e6:.1f} MB\n" for file in found)


BLOCKS: dict[str, Callable[[Path], str]] = {
    "evaluation": evaluation,
    "biases": biases,
    "footprint": footprint,
    "files": files,
}
