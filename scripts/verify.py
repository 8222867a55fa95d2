#!/usr/bin/env python3
"""Make images again from the settings in their files, and say whether they are what the settings make.

Each is *identical*, *equal to rounding* or *altered*. The exit code is 0 if none is altered, 1 if one is, and
2 if one cannot be verified: it has no settings, its model is not here, or it cannot be made alone.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import json
from typing import Any

from ldm.cli import entry
from ldm.cli import parser as cli
from ldm.cli.again import Again, CannotRepeat
from ldm.errors import InputError
from ldm.images.names import unique_names
from ldm.log import log_to, one_line, problem

# The largest difference that rounding makes, in levels of 255, by the precision that an image records: twice
# what docs/verify.md has measured.
TOLERANCE = {"full": 2, "autocast": 12, "half": 12, "bf16": 12}
OWN = ("images", "folder", "diff", "tolerance", "json", "debug", "quality")


def parse(argv: list[str]) -> dict[str, Any]:
    parser = cli.Parser(
        prog="verify.py",
        description="Make images again from their own settings, and compare.",
        argument_default=cli.argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="PNG, JPEG or WebP files made here")
    add("--folder", action="append", metavar="DIR", help="where init images, LoRAs and the like are")
    add("--diff", metavar="DIR", help="write an image there of what is altered in each")
    add(
        "--tolerance",
        type=cli.number(int, 0, 255),
        metavar="LEVELS",
        help="take differences up to this one for rounding (by the precision, see docs/verify.md)",
    )
    add(
        "--quality",
        type=cli.number(int, 1, 100),
        metavar="N",
        help="what jpg and webp files were written with (95)",
    )
    add("--json", action="store_true", help="one JSON object per image and line")
    add("--debug", action="store_true", help="show where an error comes from")
    cli.add_model_options(parser)
    return vars(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> int:
    given = parse(sys.argv[1:] if argv is None else argv)
    log_to(None, quiet=True)  # what the commands that made the images had to say was said then
    own = {name: given.get(name) for name in OWN}
    again = Again({name: value for name, value in given.items() if name not in OWN}, own["folder"] or ())
    if own["diff"]:
        _make_folder(Path(own["diff"]))
    names = unique_names(f"{Path(file).stem}-difference" for file in own["images"])
    altered = unknown = 0
    for file, name in zip(own["images"], names, strict=True):
        try:
            line = verified(again, file, own, name)
        except InputError as error:
            unknown += 1
            reason = one_line(cli.in_flags(error)).removeprefix(f"--like {file}: ")
            problem(f"{file}: cannot be verified: {reason}")
            continue
        altered += line["verdict"] == "altered"
        print(json.dumps(line) if own["json"] else as_text(line), flush=True)
    return 1 if altered else 2 if unknown else 0


def verified(again: Again, file: str, own: dict[str, Any], name: str) -> dict[str, Any]:
    """What is found about one image; `name` is for the file of a difference. InputError if it cannot be made
    again.
    """
    recorded = again.recorded(file)
    command = again.command(file, recorded)
    request = again.request(command, recorded)

    import numpy as np

    from ldm.images.difference import difference, difference_image
    from ldm.images.metadata import encode_image, open_image
    from ldm.images.watermark import NO_WATERMARK, Watermarker

    line = {"file": file, "verdict": "altered"}
    with open_image(file) as image:
        found, format = np.asarray(image.convert("RGB")), image.format
        if (frames := getattr(image, "n_frames", 1)) > 1:
            return line | {"why": f"it has {frames} frames, and its settings make one"}
        if image.convert("RGBA").getchannel("A").getextrema()[0] < 255:
            return line | {"why": "it has transparent pixels, and its settings make none"}
    pipeline = again.pipeline(command)
    (made,) = pipeline.generate([request])
    if made.pixels is None:
        raise CannotRepeat("it comes out as NaN here")
    if recorded.get("nsfw_content_detected") and made.nsfw is None and not found.any():
        raise CannotRepeat("the safety checker blackened it, which is not here")
    expected = Watermarker.of(request.watermark)(made.pixels, made.painted)
    if found.shape != expected.shape:
        size, wanted = (f"{shape[1]}x{shape[0]}" for shape in (found.shape, expected.shape))
        if "image" not in recorded:
            raise CannotRepeat(f"it is a grid or a sheet: {size} pixels, and an image of it has {wanted}")
        return line | {"size": size, "expected_size": wanted}
    lossy = format != "PNG"
    if lossy:
        again_saved = _read(encode_image(expected, None, _suffix(format), own["quality"] or 95))
        expected = again_saved if np.array_equal(found, again_saved) else expected
    tolerance = own["tolerance"]
    if tolerance is None:
        tolerance = TOLERANCE.get(recorded.get("precision"), max(TOLERANCE.values()))
    marked = request.watermark != NO_WATERMARK and Watermarker.fits(*found.shape[:2])
    gaps = difference(found, expected, tolerance, marked=marked, lossy=lossy)
    verdict = "identical" if gaps.identical else "altered" if gaps.altered else "equal to rounding"
    line |= {"verdict": verdict, "largest": gaps.largest, "at": gaps.at, "share": round(gaps.share, 6)}
    if gaps.marks:
        line["moved_marks"] = gaps.marks
    if gaps.altered:
        line["box"] = [int(side) for side in gaps.box]
        if own["diff"]:
            path = Path(own["diff"]) / f"{name}.png"
            _write(difference_image(found, gaps), path)
            line["difference"] = str(path)
    return line


def as_text(line: dict[str, Any]) -> str:
    """A line for a reader."""
    text = f"{line['file']}: {line['verdict']}"
    if "why" in line:
        return f"{text}: {line['why']}"
    if "size" in line:
        return f"{text}: it is {line['size']} pixels, and its settings make {line['expected_size']}"
    if line["verdict"] == "identical":
        return text
    x, y = line["at"]
    if line["verdict"] == "altered":
        left, top, width, height = line["box"]
        text += f" in {width}x{height} pixels at ({left}, {top})"
    levels = "1 level" if line["largest"] == 1 else f"{line['largest']} levels"
    text += f": up to {levels}, at ({x}, {y}); {100 * line['share']:.2g} % of the pixels differ"
    if line.get("moved_marks"):
        text += f"; the watermark moved in {line['moved_marks']} blocks"
    return text + (f"; see {line['difference']}" if "difference" in line else "")


def _suffix(format: str) -> str:
    return {"JPEG": "jpg", "WEBP": "webp"}[format]


def _read(data: bytes) -> Any:
    """The pixels of an image file's bytes, uint8 [H, W, 3]."""
    import io

    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--diff {folder}: {error.strerror}") from error


def _write(image: Any, path: Path) -> None:
    from PIL import Image

    try:
        Image.fromarray(image).save(path)
    except OSError as error:
        raise InputError(f"--diff: cannot write {path}: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(entry.run(main))
