#!/usr/bin/env python3
"""Batch scoring: files of prompts in, an image for each line and a file of answers for each file out.

The files are CSV, with a line of column names, or JSON in the form of AzureML's scoring contract. Columns are
prompt, negative_prompt, seed, image, mask and the names of settings. A line with a fault is reported and does
not keep the others from being made. With --resume a run that was interrupted goes on where it stopped.
"""

import argparse
import base64
import binascii
import contextlib
import csv
import hashlib
import io
import json
import os
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import entry
from ldm.cli import parser as cli
from ldm.cli.sources import files_inside
from ldm.errors import InputError
from ldm.fields import settings_of
from ldm.log import notice, problem
from ldm.pipeline.infotext import without_folders
from ldm.pipeline.options import RuntimeOptions
from ldm.pipeline.request import DEPTH, IMAGE_SETTINGS, UPSCALE, ImageRequest, image_seed
from ldm.runs.options import RunOptions
from ldm.runs.processes import is_follower
from ldm.service import table as contract

if TYPE_CHECKING:
    from ldm.pipeline.pipeline import Pipeline

SUFFIXES = (".csv", ".json")
BATCH = 8  # images sampled together
SHOWN = 10  # lines with faults that are reported one by one
ANSWERS, INPUTS = "answers", "inputs"  # folders below the output folder
LONGEST_CELL = 2**30  # characters of a CSV file's cell, which may be an image in base64
OF_LINES = ("prompt", *IMAGE_SETTINGS, *contract.NOT_HERE)  # settings that are no options here


@dataclass
class Line:
    """A line of an input file: the request that it makes, or its fault."""

    place: str
    prompt: str
    label: Any = None
    request: ImageRequest | None = None
    fault: str | None = None
    image: int | None = None  # its number in the run


@dataclass
class Source:
    """An input file and its lines."""

    path: Path
    table: contract.Table
    lines: list[Line]


@dataclass(frozen=True)
class Scoring:
    """What a command asks for."""

    args: argparse.Namespace
    runtime: RuntimeOptions
    run: RunOptions
    settings: Mapping[str, Any]  # of all lines that do not say otherwise

    def pipeline(self) -> "Pipeline":
        from ldm.pipeline.pipeline import Pipeline
        from ldm.weights.loading import choose_model, read_config

        args = self.args
        files = choose_model(args.config, args.ckpt, None)
        return Pipeline(
            files,
            read_config(files.config),
            self.runtime,
            weights=args.weights,
            vae=args.vae,
            lora_folder=args.lora_folder,
            allow_target=args.allow_target or (),
            safety=self.run.safety,
            expected={"C": args.C, "f": args.f},
        )


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="batch_score.py", description=__doc__)
    add = cli.group_of(parser, "input").add_argument
    text = "CSV and JSON files, or folders of them"
    add("--input", nargs="+", required=True, metavar="FILE", help=text)
    text = "images in the answers as base64, as the online contract has them, and not as names of files"
    cli.group_of(parser, "output").add_argument("--base64", action="store_true", help=text)
    elsewhere = [name for name, each in settings_of(ImageRequest).items() if each.group in (DEPTH, UPSCALE)]
    cli.add_options(parser, ImageRequest, leave_out=("seed", *OF_LINES, *elsewhere))
    no_run = ("n_iter", "n_samples", "skip_grid", "skip_save", "n_rows", "save_depth", "save_control")
    cli.add_options(parser, RunOptions, leave_out=no_run, defaults={"outdir": "outputs/batch-score"})
    cli.add_model_options(parser)
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    return parser


def parse(argv: Sequence[str]) -> Scoring:
    """The command, checked. InputError."""
    args = make_parser().parse_args(argv)
    given = vars(args)

    def options(owner: type, **defaults: Any) -> Any:
        return owner(**defaults | {name: given[name] for name in settings_of(owner) if name in given})

    names = settings_of(ImageRequest).keys() - {"seed", *OF_LINES}
    settings = {name: value for name, value in given.items() if name in names}
    run = options(RunOptions, outdir="outputs/batch-score", skip_grid=True)
    scoring = Scoring(args, options(RuntimeOptions, batch_size=BATCH), run, settings)
    ImageRequest(**contract.by_the_rules(settings))  # a mistake in an option is no fault of the lines
    return scoring


# Reading


def input_files(given: Sequence[str]) -> list[Path]:
    """The files to score, those of folders in natural order. InputError."""
    found: list[Path] = []
    for name in given:
        path = Path(name)
        if not path.is_dir():
            if path.suffix.lower() not in SUFFIXES:
                raise InputError(f"--input {name}: its suffix is neither .csv nor .json")
            found.append(path)
            continue
        inside = [file for file in files_inside(path) if file.suffix.lower() in SUFFIXES]
        if not inside:
            raise InputError(f"--input {name}: the folder holds no .csv or .json file")
        found += inside
    names: dict[str, Path] = {}
    for path in found:
        if names.setdefault(path.name, path) != path:
            raise InputError(
                f"--input: {names[path.name]} and {path} would have one file of answers; rename one"
            )
    return list(dict.fromkeys(found))


def read_source(path: Path) -> Source:
    """An input file as a table. InputError that names the file."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"--input {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"--input {path} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error
    try:
        is_csv = path.suffix.lower() == ".csv"
        table, places = csv_table(text) if is_csv else (json_table(text), None)
    except InputError as error:
        raise InputError(f"--input {path}: {error}") from error
    if not len(table):
        raise InputError(f"--input {path}: there are no lines in it")
    lines = []
    for k in range(len(table)):
        place = f"{path}, line {places[k]}" if places else f"{path}, data[{k}]"
        lines.append(Line(place, prompt_of(table, k), table.label(k)))
    return Source(path, table, lines)


def json_table(text: str) -> contract.Table:
    try:
        content = contract.json_of(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"no JSON: {str(error) or 'nested too deeply'}") from error
    return contract.Table.of(content)


def csv_table(text: str) -> tuple[contract.Table, list[int]]:
    """A CSV file as a table, and the number of each line. Cells that are empty are not given."""
    if "\0" in text:
        raise InputError("it holds a NUL character, and is no text")
    before = csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[list[str]] = []
    places: list[int] = []
    try:
        start = 1
        for row in reader:
            if any(row):
                rows.append(row)
                places.append(start)
            start = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"line {reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(before)
    if not rows:
        raise InputError("it is empty; its first line has the names of the columns")
    columns = contract.columns_of([name.strip() for name in rows[0]])
    known = contract.known_names()
    kinds = [known[name].kind for name in columns]
    # an empty prompt is one
    cells = [
        [_cell(text, name, kind) for text, name, kind in zip(row, columns, kinds, strict=True)]
        if len(row) == len(columns)
        else row
        for row in rows[1:]
    ]
    return contract.Table(columns, cells, None, {}), places[1:]


def _cell(text: str, name: str, kind: type) -> Any:
    if kind is bool and text.strip().lower() in ("true", "false"):
        return text.strip().lower() == "true"
    if not text.strip() and name != "prompt":
        return None
    return text.strip() if kind in (int, float) else text


def prompt_of(table: contract.Table, k: int) -> str:
    """A line's prompt, whatever else is wrong with it; "" if it has none."""
    cells = table.cells[k]
    if isinstance(cells, InputError):
        return ""
    at = table.columns.index("prompt")
    return cells[at] if at < len(cells) and isinstance(cells[at], str) else ""


# Requests


def add_requests(scoring: Scoring, sources: Sequence[Source], pipeline: "Pipeline") -> None:
    """The request of each line, resolved, or its fault. CannotWrite if its init image cannot be kept."""
    from ldm.images.outputs import CannotWrite

    images = 0
    for source in sources:
        for k, line in enumerate(source.lines):
            try:
                values = source.table.values(k, scoring.settings)
                values = contract.with_strength(values, pipeline.described.task)
                for name in IMAGE_SETTINGS:
                    if isinstance(values.get(name), str):
                        theirs = contract.THEIRS.get(name, name)
                        values[name] = image_source(values[name], theirs, source.path.parent, scoring.run)
                request = ImageRequest(**values)
                pipeline.check_size(request)
                line.request = pipeline.resolve(request)
                line.image, images = images, images + 1
            except CannotWrite:  # no line's fault: the others would find the disk as full
                raise
            except InputError as error:
                line.fault = contract.in_words(error)


def add_seeds(options: RunOptions, lines: Sequence[Line]) -> int:
    """Give each line's request a seed, if it has none of its own. Returns the run's.

    It is the run's plus the line's number among all lines, whatever becomes of the others.
    """
    from ldm.runs.manifest import chosen_seed

    known = dict.fromkeys(settings_of(ImageRequest))  # a run's settings lack those that are left out
    first = next((line.request for line in lines if line.request is not None), None)
    if first is not None:
        known |= without_folders(first.settings())
    del known["seed"]
    seed, is_new = chosen_seed(options, known)
    if is_new:
        notice(f"seed {seed}")
    for number, line in enumerate(lines):
        if line.request is not None and line.request.seed is None:
            line.request = line.request.twin(seed=image_seed(seed, number))
    return seed


def image_source(given: str, name: str, folder: Path, options: RunOptions) -> Any:
    """The file of a line's image: one beside the input file, or in the working folder, or what base64, bare
    or as a data: URL, stands for, which is then kept below the output folder. InputError.
    """
    if len(given) < 4096 and "\0" not in given and not given.startswith("data:"):
        for path in (folder / given, Path(given)):
            with contextlib.suppress(OSError):  # base64 is too long for a name
                if path.is_file():
                    return str(path)
    from PIL import Image

    from ldm.images.init_image import READABLE

    shown = given if len(given) <= 60 else f"{given[:59]}…"
    try:
        encoded = given.partition("base64,")[2] if given.startswith("data:") else given
        data = base64.b64decode("".join(encoded.split()), validate=True)
        with Image.open(io.BytesIO(data), formats=READABLE) as image:
            suffix = image.format.lower()
            if options.dry_run or options.plan:  # which write nothing
                image.load()
                return image
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{name} {shown} is neither a file that is there nor an image in base64") from error
    except Exception as error:  # Pillow raises at least OSError, SyntaxError, struct.error
        raise InputError(f"{name} {shown} is no image that can be read") from error
    from ldm.images.outputs import cannot_write

    path = Path(options.outdir) / INPUTS / f"{hashlib.sha256(data).hexdigest()[:16]}.{suffix}"
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, [data])
        except OSError as error:
            raise cannot_write(path, error) from error
    return str(path)


def report_faults(lines: Sequence[Line]) -> int:
    """Report the lines with faults, the first ones each by itself. Returns how many there are."""
    faulty = [line for line in lines if line.fault]
    for line in faulty[:SHOWN]:
        problem(f"{line.place}: {line.fault}")
    if len(faulty) > SHOWN:
        problem(f"{len(faulty) - SHOWN} more lines have faults; the answers name them")
    return len(faulty)


# Answers


def results(outdir: Path, run: str) -> dict[int, dict[str, Any]]:
    """The manifest's line of each image of a run, the newest of those that an image has."""
    from ldm.runs.manifest import read_manifest

    found: dict[int, dict[str, Any]] = {}
    for line in read_manifest(outdir, run):
        if line["file"] or not found.get(line["image"], {}).get("file"):
            found[line["image"]] = line
    return found


def write_answers(scoring: Scoring, sources: Sequence[Source], made: Mapping[int, dict[str, Any]]) -> None:
    """One file of answers for each input file. CannotWrite if one cannot be written."""
    from ldm.images.outputs import cannot_write

    outdir = Path(scoring.run.outdir)
    for source in sources:
        path = outdir / ANSWERS / f"{source.path.name}.json"
        answers = (answer_of(line, made, outdir, scoring.args.base64) for line in source.lines)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json_list(answers))
        except OSError as error:
            raise cannot_write(path, error) from error
        if not scoring.run.json:  # of which each line is an image
            print(path)


def answer_of(
    line: Line, made: Mapping[int, dict[str, Any]], outdir: Path, as_base64: bool
) -> dict[str, Any]:
    """A line's answer: in the contract's form, and with the key `error` if it has no image."""
    result = made.get(line.image, {})
    file = result.get("file")
    if file is None:
        why = "the image came out as NaN" if result.get("nan") else "the image was not made"
        fault = line.fault or result.get("error") or why
        return contract.answer(line.prompt, None, None, line.label) | {
            "nsfw_content_detected": None,
            "error": fault,
        }
    image = base64.b64encode((outdir / file).read_bytes()).decode() if as_base64 else file
    return contract.answer(line.prompt, image, result.get("nsfw_content_detected"), line.label)


def json_list(items: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    """A JSON list as text, one item a line: with images in base64 there is no room for all at once."""
    separator = "[\n"
    for item in items:
        yield (separator + json.dumps(item, ensure_ascii=False)).encode("utf-8", "replace")
        separator = ",\n"
    yield b"\n]\n"


def write_whole(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file that is there whole or not at all, in place of an older one."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> int:
    scoring = parse(sys.argv[1:] if argv is None else argv)
    sources = [] if is_follower() else [read_source(path) for path in input_files(scoring.args.input)]

    from ldm.images.outputs import resumable
    from ldm.runs.run import run  # imports torch: only now, as the files have been read

    pipeline = scoring.pipeline()
    if is_follower():  # which gets its requests from the leader
        return run(pipeline, (), scoring.run)
    add_requests(scoring, sources, pipeline)
    lines = [line for source in sources for line in source.lines]
    seed = add_seeds(scoring.run, lines)
    faulty = report_faults(lines)
    requests = [line.request for line in lines if line.request is not None]
    if scoring.run.dry_run or scoring.run.plan:
        return (run(pipeline, requests, scoring.run) if requests else 0) or (1 if faulty else 0)
    code, made = 0, {}
    if requests:
        own: list[str] = []  # this run's id: another run may start in the folder meanwhile
        # the folder's name is no result here, and --json does not print it
        quiet = contextlib.nullcontext() if scoring.run.json else contextlib.redirect_stdout(io.StringIO())
        with quiet:
            code = run(pipeline, requests, replace(scoring.run, seed=seed), started=own.append)
        if code not in (0, 1):
            return code
        made = results(Path(scoring.run.outdir), own[0])
    with resumable():
        write_answers(scoring, sources, made)
    if faulty:
        problem(f"{faulty} of {len(lines)} lines have no image, because of their faults")
    return 1 if faulty else code


if __name__ == "__main__":
    sys.exit(entry.run(main))
