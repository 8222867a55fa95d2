#!/usr/bin/env python3
"""Enlarge images: four times by the x4 diffusion model, or by a pixel upscaler such as ESRGAN (--model)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import arguments, entry
from ldm.cli.parser import upscale_parser


def main(argv: list[str] | None = None) -> int:
    command = arguments.parse(upscale_parser(), sys.argv[1:] if argv is None else argv)
    command.check_files()

    from ldm.runs.run import run  # imports torch: only now, as all arguments are checked

    pipeline = command.pipeline()
    requests = command.requests(pipeline)
    return run(pipeline, requests, command.run)


if __name__ == "__main__":
    sys.exit(entry.run(main))
