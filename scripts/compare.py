#!/usr/bin/env python3
"""Labelled sheets over the values of two or three options, from the same start noise.

compare.py --x sampler ddim plms "Euler a" --y steps 5 10 20 takes every other option of txt2img.py, and with
--init-img those of img2img.py. An axis may be any setting of an image, ckpt, weights or vae, or the weight
of the one LoRA or ControlNet that is given: lora:weight, control:weight. --z makes a page of each value.
"""

import contextlib
import io
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import arguments, entry, parser
from ldm.errors import InputError
from ldm.fields import Setting, listed_by_name
from ldm.images.names import file_name
from ldm.log import notice
from ldm.pipeline.request import ImageRequest
from ldm.pipeline.settings.adapters import parse_lora
from ldm.pipeline.settings.control import parse_control
from ldm.weights.description import describe

ONE = {"n_samples": 1, "n_iter": 1, "n_rows": 0}  # what these may say: each cell holds one image
NOT_FOR_CELLS = (
    *(*ONE, "batch_size", "from_file", "repeat", "expand", "wildcards", "save_control"),
    *("resume", "fixed_code", "devices", "num_nodes"),
)
NOT_COMPARED = ("fixed_code", "start_seed", "watermark", *arguments.TEMPLATES)
OF_MODEL = ("ckpt", "weights", "vae")
NOTHING = "none"  # as a value: the setting is left out
WORDS = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}


def _with_lora_weight(text: str, weight: str) -> str:
    """The LoRA at another weight; one that its text encoder has to itself stays."""
    lora = parse_lora(text)
    own = f":{lora.text_weight:.12g}" if lora.text_weight != lora.weight else ""
    return f"{lora.file}:{weight}{own}"


def _with_control_weight(text: str, weight: str) -> str:
    control = parse_control(text)
    return f"{control.file}:{control.image}:{weight}:{control.start:.12g}-{control.end:.12g}"


WEIGHTED = {"lora": _with_lora_weight, "control": _with_control_weight}


@dataclass(frozen=True)
class Axis:
    """An option and its values, as the user writes them; `weight` if they are of the files that it names."""

    option: str
    values: Sequence[str]
    setting: Setting | None  # None of an option of the model, and of --ddim_eta
    weight: Callable[[str, str], str] | None = None

    def own(self, value: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """What a value sets. InputError for one that is not fit."""
        name, each = self.option, self.setting
        if self.weight:
            name = name.partition(":")[0]
            return {name: (self.weight(given[name][0], value),)}
        if each is None or each.choices:
            return {name: value}
        if value == NOTHING and each.kind not in (str, list):  # a list knows the word itself
            return {name: each.default}
        if each.kind is bool:
            if value not in WORDS:
                raise InputError(f"--{name} {value}: give true or false")
            return {name: WORDS[value]}
        return {name: (value,) if each.kind is list else value}


@dataclass(frozen=True)
class Table:
    """What there is to draw: the axes, of which --z may be missing, and the cells by page, row, column."""

    x: Axis
    y: Axis
    z: Axis | None
    cells: Sequence[tuple[arguments.Arguments, ImageRequest]]

    def models(self) -> list[tuple[arguments.Arguments, list[int]]]:
        """A command for each model, and its cells: a model is loaded once."""
        found: dict[int, tuple[arguments.Arguments, list[int]]] = {}
        for k, (command, _) in enumerate(self.cells):
            found.setdefault(id(command), (command, []))[1].append(k)
        return list(found.values())


def parse(argv: list[str]) -> Table:
    """The arguments, the axes, and the request of every cell. InputError."""
    with_init = any(word.startswith("--init") for word in argv)  # also abbreviated, as argparse takes it
    options = parser.compare_parser(__doc__, with_init=with_init)
    given = vars(options.parse_args(argv))
    for name in NOT_FOR_CELLS:
        if name in given and given[name] != ONE.get(name):
            raise InputError(
                f"{parser.flag_of(name)} is not for compare.py: each cell of its sheet holds one image"
            )
    command = arguments.gather(options, given)
    if command.sources:
        raise InputError(f"--init-img {command.sources[0]}: a folder is not for compare.py; give one image")
    arguments.warn_of_ignored_eta(command.values)
    axes = {
        flag: _axis(flag, given[flag[2:]], options, command)
        for flag in ("--x", "--y", "--z")
        if flag[2:] in given
    }
    for flag, axis in axes.items():
        for other, same in axes.items():
            if flag < other and axis.option == same.option:
                raise InputError(f"{flag} and {other} both vary {given[flag[2:]][0]}; give different options")
    seed = command.run.seed
    if seed == -1:
        seed = secrets.randbelow(2**32)
        notice(f"seed {seed}")
        command = replace(command, run=replace(command.run, seed=seed))
    x, y, z = (axes.get(flag) for flag in ("--x", "--y", "--z"))
    return Table(x, y, z, _cells(command, seed, x, y, z))


def _cells(
    command: arguments.Arguments, seed: int, x: Axis, y: Axis, z: Axis | None
) -> list[tuple[arguments.Arguments, ImageRequest]]:
    """Each cell's command and request; the seed is each image's own: it does not move on."""
    commands: dict[tuple, arguments.Arguments] = {}
    cells = []
    for page in z.values if z else [None]:
        for row in y.values:
            for column in x.values:
                own: dict[str, Any] = {"seed": seed}
                for axis, value in ((z, page), (y, row), (x, column)):
                    if axis is not None:
                        own |= axis.own(value, command.values)
                of_model = {name: own.pop(name) for name in OF_MODEL if name in own}
                key = tuple(of_model.values())
                if key not in commands:
                    commands[key] = _with_model(command, of_model)
                request = commands[key].variant(own)
                # a mistake in it need not wait for torch
                request.check_size(describe(commands[key].config).factor or 8)
                cells.append((commands[key], request))
    return cells


def _with_model(command: arguments.Arguments, own: Mapping[str, Any]) -> arguments.Arguments:
    """The command for another model. InputError for weights of another name than raw and ema."""
    if not own:
        return command
    weights = own.get("weights", command.weights)
    if weights not in (None, *parser.WEIGHTS.choices):
        raise InputError(f"--weights {weights}: choose from {', '.join(parser.WEIGHTS.choices)}")
    given = {**command.given, **{name: None if value == NOTHING else value for name, value in own.items()}}
    return replace(command, given=given, weights=weights)


def _axis(flag: str, words: list[str], options: parser.Parser, command: arguments.Arguments) -> Axis:
    name, values = words[0].lstrip("-"), words[1:]
    known: dict[str, Setting | None] = {
        spelling: each
        for spelling, each in listed_by_name(ImageRequest).items()
        if each.name not in NOT_COMPARED
        and (each.group not in parser.EXTRA_GROUPS or each.group in options.groups)
    }
    weights = {f"{file}:weight" for file in WEIGHTED if file in known}
    known |= dict.fromkeys(("ddim_eta", *OF_MODEL, *sorted(weights)))
    if name not in known:
        raise InputError(f"{flag} {words[0]}: no option to compare; choose from {', '.join(known)}")
    if not values:
        raise InputError(f"{flag} {name} has no values; write {flag} {name} VALUE VALUE …")
    if name in weights:
        file = name.partition(":")[0]
        if len(command.values.get(file, ())) != 1:
            raise InputError(f"{flag} {name} varies the weight of one file: give it with --{file}")
        return Axis(name, values, None, WEIGHTED[file])
    return Axis(known[name].name if known[name] else name, values, known[name])


def main(argv: list[str] | None = None) -> int:
    table = parse(sys.argv[1:] if argv is None else argv)
    models, worst = table.models(), 0
    for command, _ in models:  # before the first image, and before torch is imported
        command.check_files()

    import numpy as np

    from ldm.runs.run import run
    from ldm.runs.writer import Sheet

    images: dict[int, np.ndarray] = {}
    for command, _ in models:  # before the first image
        check_weights(command)
    for number, (command, cells) in enumerate(models, 1):
        last = number == len(models)

        def draw(made: list, ended: bool, cells: list[int] = cells, last: bool = last) -> list:
            images.update(zip(cells, made, strict=True))
            return pages(table, images) if last or ended else []

        pipeline = command.pipeline()

        def requests(command=command, pipeline=pipeline, cells=cells):
            command.warn_of_another_model(pipeline)  # within the run, whose --quiet holds for it
            yield from (table.cells[k][1] for k in cells)

        # the folder's name is printed once
        only_said = command.run.dry_run or command.run.plan
        shown = last or command.run.json or only_said
        if only_said and len(models) > 1:
            notice(f"by {command.files.weights}, weights {command.weights or 'as its config says'}:")
        with contextlib.nullcontext() if shown else contextlib.redirect_stdout(io.StringIO()):
            code = run(pipeline, requests(), command.run, Sheet(draw))
        if code > 1:
            if not shown:
                print(command.run.outdir)
            return code
        worst = max(worst, code)
    return worst


def check_weights(command: arguments.Arguments) -> None:
    """InputError if a file lacks the weights, raw or averaged, or is no autoencoder, that is asked for."""
    from ldm.weights.checkpoint import pick_weights
    from ldm.weights.header import read_header
    from ldm.weights.vae import check_vae

    if vae := command.given.get("vae"):
        check_vae(vae, command.config)
    if command.weights is not None:
        tensors = read_header(command.files.weights).tensors
        pick_weights(tensors, command.weights, path=command.files.weights, names=tensors)


def pages(table: Table, images: Mapping[int, Any]) -> list:
    """A drawing for each page of a table's images, by the cells' numbers; cells without one are black."""
    import numpy as np

    from ldm.images.pixels import of_one_size
    from ldm.images.sheets import contact_sheet
    from ldm.runs.writer import Drawing

    x, y, z = table.x, table.y, table.z
    black = np.zeros_like(next(iter(images.values())))
    even = of_one_size([images.get(k, black) for k in range(len(table.cells))])
    columns, drawings = len(x.values), []
    for page in range(len(z.values) if z else 1):
        first = page * columns * len(y.values)
        rows = [even[first + i * columns : first + (i + 1) * columns] for i in range(len(y.values))]
        title = f"{y.option} by {x.option}"
        facts = {axis: [each.option, *each.values] for axis, each in (("x", x), ("y", y))}
        name = None
        if z:
            title += f", {z.option} {z.values[page]}"
            facts["z"] = [z.option, z.values[page]]
            name = file_name("{prompt}", {"prompt": f"sheet-{z.option}-{z.values[page]}"})
        if "prompt" not in (x.option, y.option, z and z.option):
            title += f": {table.cells[first][1].prompt}"
        drawings.append(Drawing(contact_sheet(rows, _labels(x), _labels(y), title), facts, name))
    return drawings


def _labels(axis: Axis) -> list[str]:
    """The values as they stand on a sheet: of files their names, with the folders' where those are equal."""
    if axis.option not in ("ckpt", "vae"):
        return list(axis.values)
    for parts in (1, 2):
        names = ["/".join(Path(value).parts[-parts:]) for value in axis.values]
        if len(set(names)) == len(names):
            return names
    return list(axis.values)


if __name__ == "__main__":
    sys.exit(entry.run(main))
