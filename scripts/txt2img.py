#!/usr/bin/env python3
"""Text to image: the original's command, on linked Stable Diffusion weights or on the bundled model."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import entry
from ldm.cli import parser as cli


def main(argv: list[str] | None = None) -> int:
    args = cli.txt2img_parser().parse(sys.argv[1:] if argv is None else argv)

    from ldm.runs.render import render

    return render(args)


if __name__ == "__main__":
    sys.exit(entry.run(main))
