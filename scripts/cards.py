#!/usr/bin/env python3
"""The cards of the bundled models: bring their figures up to date with the files of evaluations."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import entry
from ldm.cli import parser as cli
from ldm.errors import InputError


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser(prog="cards.py", description=__doc__)
    parser.add_argument(
        "--add",
        nargs=2,
        metavar=("MODEL", "SCORES"),
        help="put the scores.json of evaluate_scenes.py or evaluate_siblings.py into models/MODEL first",
    )
    parser.add_argument(
        "--scale",
        type=cli.number(float, -1e4, 1e4),
        default=3.0,
        help="guidance scale that biases are of (3)",
    )
    parser.add_argument("--check", action="store_true", help="only say which cards are out of date")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    args = parser.parse_args(argv)

    from ldm.evaluation import cards

    if args.add:
        model, path = args.add
        scores = cards.read(Path(path))
        if scores is None:
            raise InputError(f"--add {model} {path}: there is no such file")
        print(cards.add(model, scores, args.scale))
    stale = 0
    for path in cards.cards():
        text = cards.filled(path)
        if text != path.read_text():
            stale += 1
            print(path)
            if not args.check:
                path.write_text(text)
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(entry.run(main))
