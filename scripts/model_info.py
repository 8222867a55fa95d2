#!/usr/bin/env python3
"""What a model file is: family, size, precision, hashes, what it can do and with which command."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
from typing import Any

from ldm.cli import entry
from ldm.cli import parser as cli
from ldm.errors import InputError
from ldm.log import notice, one_line


def info_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="model_info.py", description="Family, size, precision, hashes and use of model files."
    )
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help=".safetensors or .ckpt files, or diffusers folders")
    add("--json", action="store_true", help="one JSON object per file and line")
    add("--hash", action="store_true", help="compute the model hash, which takes reading the whole file")
    add("--debug", action="store_true", help="show where an error comes from")
    return parser


def main(argv: list[str] | None = None) -> int:
    from ldm.weights.info import model_info

    args = info_parser().parse_args(argv)
    unread = 0
    for file in args.files:
        try:
            facts = model_info(file)
            if args.hash:
                facts["model_hash"] = computed_hash(facts["hashed_file"])
        except InputError as error:
            unread += 1
            notice(f"model_info.py: error: {one_line(error)}")
            if args.debug:
                raise
            continue
        print(json.dumps(facts) if args.json else as_text(facts), flush=True)
    if unread == len(args.files):
        return 2
    return 1 if unread else 0


def computed_hash(file: str) -> str:
    """The file's hash, with a bar on stderr while it is read."""
    from tqdm import tqdm

    from ldm.weights.hashes import file_hash

    size = Path(file).stat().st_size
    with tqdm(total=size, desc="hash", unit="B", unit_scale=True, leave=False) as bar:
        return file_hash(file, bar.update)


def as_text(facts: dict[str, Any]) -> str:
    """The facts of one file for a reader, without what only a terminal would obey."""
    config = f"config {facts['config']}" if facts["config"] else ""
    if not config and not facts["uses"]:
        config = "cannot be run here"
    weights = {"raw": "no EMA", "ema": "EMA alone", "raw and ema": "raw and EMA"}.get(facts["weights"])
    total = sum(facts["precision"].values()) or 1
    shares = {name: 100 * count / total for name, count in facts["precision"].items()}
    precision = [
        name if share > 99.5 else f"{name} ({share:.0f} %)" for name, share in shares.items() if share > 0.5
    ]
    lines = [
        f"{facts['file']}: {facts['family']}",
        *([f"  {config}"] if config else []),
        f"  size: {_bytes(facts['size'])}, {facts['format']}",
        f"  precision: {', '.join(precision) or 'none'}",
        f"  parameters: {_count(facts['parameters'])}",
        *(f"    {part}: {_count(count)}" for part, count in facts["parts"].items()),
    ]
    if weights:
        lines.append(f"  UNet weights: {weights}")
    if facts["global_step"] is not None:
        lines.append(f"  steps of training: {facts['global_step']:,}")
    if facts["prediction_known_by"]:
        lines.append(f"  predicts: {facts['prediction'] or 'eps or v'}, by {facts['prediction_known_by']}")
    lines.append(f"  model hash: {facts['model_hash'] or 'not computed (--hash)'}")
    lines.append(f"  model hash of 2022: {facts['quick_hash']}")
    lines += [f"  makes {use['makes']}: {use['command']}" for use in facts["uses"]]
    return "\n".join(map(_plain, lines))


def _bytes(size: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size} bytes"


def _count(number: int) -> str:
    return f"{number / 1e6:,.1f} million" if number >= 100_000 else f"{number:,}"


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)


if __name__ == "__main__":
    sys.exit(entry.run(main))
