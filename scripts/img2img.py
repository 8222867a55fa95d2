#!/usr/bin/env python3
"""Image to image (SDEdit, Meng et al. 2021, https://arxiv.org/abs/2108.01073): the original's command."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import entry
from ldm.cli import parser as cli


def main(argv: list[str] | None = None) -> int:
    args = cli.img2img_parser().parse(sys.argv[1:] if argv is None else argv)

    from ldm.runs.render import render

    return render(args)


if __name__ == "__main__":
    sys.exit(entry.run(main))
