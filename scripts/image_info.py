#!/usr/bin/env python3
"""What is in image files: settings, seed, model, watermark, safety flag, source type and C2PA manifest."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
from typing import Any

from ldm.cli import entry
from ldm.cli import parser as cli
from ldm.errors import InputError
from ldm.log import notice, one_line, printable

STATED = ("generator", "source_type", "model", "model_hash", "prompt")  # in a C2PA manifest
SHOWN_FIRST = {"seed", "model_hash", "nsfw_content_detected"}  # not once more among the settings


def info_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="image_info.py", description="Settings, seed, model and marks of image files.")
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="PNG, JPEG or WebP files")
    add("--json", action="store_true", help="one JSON object per file and line")
    add(
        "--watermark",
        action="append",
        default=[],
        metavar="TEXT",
        help="look for this message, too, besides the published ones and the one that the settings name",
    )
    add(
        "--trust",
        metavar="CERTS.pem",
        help="certificates of the authorities whose signers of C2PA manifests you trust",
    )
    add("--debug", action="store_true", help="show where an error comes from")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = info_parser().parse_args(argv)
    trusted = None
    if args.trust:
        from ldm.images.provenance import trusted_certificates

        trusted = trusted_certificates(args.trust)
    unread = wrong = 0
    for file in args.files:
        try:
            facts = image_facts(file, args.watermark, trusted)
        except InputError as error:
            unread += 1
            notice(f"image_info.py: error: {one_line(error)}")
            continue
        if "error" in facts:
            wrong += 1
            notice(f"image_info.py: error: {one_line(facts['error'])}")
        print(json.dumps(facts) if args.json else as_text(facts), flush=True)
    if unread == len(args.files):
        return 2
    return 1 if unread or wrong else 0


def image_facts(file: str, expected: list[str], trusted: str | None = None) -> dict[str, Any]:
    """What is in an image file; with an `error` if its settings are malformed or its manifest does not hold.

    InputError if it is none.
    """
    import numpy as np

    from ldm.images.metadata import open_image, read_source_type
    from ldm.images.provenance import ALTERED, INVALID, read_provenance
    from ldm.images.watermark import NO_WATERMARK, read_watermark
    from ldm.pipeline.infotext import NoSettings, read_settings

    with open_image(file) as image:
        width, height = image.size
        pixels = np.asarray(image.convert("RGB"))
    facts: dict[str, Any] = {"file": file, "width": width, "height": height}
    settings, error = None, {}
    try:
        settings = read_settings(file)
    except NoSettings:
        pass
    except InputError as malformed:
        error = {"error": str(malformed)}
    known = settings or {}
    facts |= {name: known.get(name) for name in ("seed", "model_hash")}
    mark = known.get("watermark")
    if isinstance(mark, str) and mark.isprintable() and mark not in ("", NO_WATERMARK):
        expected = [*expected, mark]
    facts |= {"watermark": read_watermark(pixels, expected)}
    manifest = read_provenance(file, trusted)
    if manifest.state in (ALTERED, INVALID) and not error:
        error = {"error": f"{file}: its C2PA manifest is {manifest}"}
    facts |= {"digital_source_type": read_source_type(file), "c2pa": manifest.facts}
    facts |= {"nsfw_content_detected": known.get("nsfw_content_detected")}
    return facts | {"settings": settings} | error


def as_text(facts: dict[str, Any]) -> str:
    """The facts of one file for a reader, without what only a terminal would obey."""
    from ldm.images.provenance import Provenance

    lines = [f"{_plain(facts['file'])}: {facts['width']}x{facts['height']}"]
    flag = facts["nsfw_content_detected"]
    safety = {None: "not checked", True: "flagged", False: "nothing found"}.get(flag, flag)
    first = {name: facts[name] for name in ("seed", "model_hash", "watermark")}
    lines += [f"  {name}: {'none' if value is None else _plain(value)}" for name, value in first.items()]
    manifest = facts["c2pa"]
    lines.append(f"  digital source type: {_plain(facts['digital_source_type'] or 'none')}")
    lines.append(f"  c2pa: {_plain(str(Provenance(**manifest)))}")
    lines += [f"    {name}: {_plain(manifest[name])}" for name in STATED if name in manifest]
    lines.append(f"  safety: {_plain(safety)}")
    settings = facts["settings"] or {}
    names = sorted(settings.keys() - SHOWN_FIRST, key=lambda name: (not name.endswith("prompt"), name))
    lines += [f"  {name}: {_plain(settings[name])}" for name in names]
    if facts["settings"] is None:
        lines.append("  no settings")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    return printable(value if isinstance(value, str) else json.dumps(value))


if __name__ == "__main__":
    sys.exit(entry.run(main))
