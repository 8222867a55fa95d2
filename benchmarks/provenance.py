#!/usr/bin/env python3
"""Which mark of an image survives what: invisible watermark, settings text, XMP and C2PA manifest.

    python benchmarks/provenance.py --sign CERT.pem KEY.pem [--images 24] [--size 512] [--folder FOLDER]
                                    [--output FILE.json]

Images are renders of random scenes with a photograph's grain, or those of a folder. Each is written with all
four marks, then changed as other programs do it, and read again. Other programs' JPEG files have half the
colour resolution, which is their default. The last lines say how long signing takes.
"""

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

Change = Callable[[Any], Any]  # of a PIL image
MESSAGE = "StableDiffusionV1"
MARKS = ("watermark", "settings", "XMP", "C2PA")
GRAIN = 4.0  # standard deviation of a render's noise, in levels
RUNS = 20  # of one file, for the time


def renders(images: int, size: int) -> Iterator[Any]:
    """Rendered scenes, uint8 [size, size, 3], the same ones each time."""
    import numpy as np

    from ldm.scenes.renderer import render
    from ldm.scenes.scene import random_scene

    for seed in range(images):
        rng = np.random.default_rng(seed)
        image = render(random_scene(rng), rng, size)
        yield np.clip(image + rng.normal(0, GRAIN, image.shape), 0, 255).round().astype(np.uint8)


def images_in(folder: Path) -> Iterator[Any]:
    """The pixels of the image files in a folder, uint8 [H, W, 3]."""
    import numpy as np

    from ldm.images.metadata import FORMATS, open_image

    for path in sorted(path for path in folder.iterdir() if path.suffix[1:] in FORMATS):
        with open_image(path) as image:
            yield np.asarray(image.convert("RGB"))


def saved(image: Any, format: str, **options: Any) -> bytes:
    """A file of a PIL image as a program writes it that knows of its pixels alone."""
    from PIL import Image

    bare = Image.frombytes("RGB", image.size, image.convert("RGB").tobytes())
    file = io.BytesIO()
    bare.save(file, format=format, **options)
    return file.getvalue()


def resized(image: Any, factor: float) -> Any:
    from PIL import Image

    return image.resize([round(side * factor) for side in image.size], Image.Resampling.LANCZOS)


def same(image: Any) -> Any:
    return image


def framed(image: Any) -> Any:
    """The image in a window, on a screen that is larger."""
    from PIL import Image

    width, height = image.size
    screen = Image.new("RGB", (width + 150, height + 210), (58, 64, 78))
    screen.paste(image, (37, 91))
    return screen


def with_texts(data: bytes) -> bytes:
    """A JPEG file of quality 75 to which a program copies the EXIF block and the XMP packet."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        image.load()
        packet = image.info["XML:com.adobe.xmp"].encode()
        block = Image.Exif()
        block.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + image.info["parameters"].encode("utf-16-be")
        return saved(image, "JPEG", quality=75, exif=block, xmp=packet)


def brighter(data: bytes) -> bytes:
    """A PNG file whose pixels were changed by a program that keeps all chunks that it does not know."""
    import zlib

    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        pixels = image.convert("RGB").point(lambda level: min(level + 1, 255))
    rows = pixels.tobytes()
    stride = 3 * pixels.width
    lines = b"".join(b"\0" + rows[at : at + stride] for at in range(0, len(rows), stride))
    written, at, content = data[:8], 8, zlib.compress(lines, 1)
    while at < len(data):
        name, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        if name == b"IDAT" and content:
            chunk, content = b"IDAT" + content, b""
            written += (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
        elif name != b"IDAT":
            written += data[at:end]
        at = end
    return written


def from_pixels(
    change: Callable[[Any], Any], format: str = "PNG", **options: Any
) -> Callable[[bytes], bytes]:
    """What a program does that decodes a file, changes its pixels and writes them as a new file."""
    from PIL import Image

    def run(data: bytes) -> bytes:
        with Image.open(io.BytesIO(data)) as image:
            return saved(change(image.convert("RGB")), format, **options)

    return run


def changes() -> dict[str, Callable[[bytes], bytes]]:
    """By name what is done to the bytes of a PNG file."""
    jpeg = {
        f"saved as JPEG {quality} by another program": from_pixels(same, "JPEG", quality=quality)
        for quality in (90, 75, 50)
    }
    return {
        "copied": lambda data: data,
        **jpeg,
        "saved as JPEG 75, EXIF and XMP copied": with_texts,
        "saved as WebP 80": from_pixels(same, "WEBP", quality=80),
        "resized to 0.75": from_pixels(lambda image: resized(image, 0.75)),
        "resized to 0.5": from_pixels(lambda image: resized(image, 0.5)),
        "the lowest eighth cut off": from_pixels(
            lambda image: image.crop((0, 0, image.width, image.height * 7 // 8))
        ),
        "20 pixels cut off on each side": from_pixels(
            lambda image: image.crop((20, 20, image.width - 20, image.height - 20))
        ),
        "screenshot, cut to the image": from_pixels(same),
        "screenshot with the window around it": from_pixels(framed),
        "one level brighter, all chunks kept": brighter,
    }


def marks_of(data: bytes, folder: Path) -> dict[str, str | None]:
    """Which marks a file's bytes have; None for each that it lacks, else a word."""
    import numpy as np

    from ldm.images.metadata import open_image, read_source_type, read_texts
    from ldm.images.provenance import NONE, TRUSTED, read_provenance
    from ldm.images.watermark import read_watermark

    path = folder / "image"
    path.write_bytes(data)
    with open_image(path) as image:
        found = read_watermark(np.asarray(image.convert("RGB")))
    state = read_provenance(path).state.replace(TRUSTED, "valid")
    return {
        "watermark": "there" if found == MESSAGE else None,
        "settings": "there" if any(read_texts(path)) else None,
        "XMP": "there" if read_source_type(path) else None,
        "C2PA": None if state == NONE else state,
    }


def measured(images: list[Any], sign: Any) -> dict[str, dict[str, dict[str, int]]]:
    """How often each mark is found after each change, by the word for it."""
    from tqdm import tqdm

    from ldm.images.metadata import encode_image
    from ldm.images.watermark import Watermarker

    settings = {"prompt": "a scene", "sampler": "ddim", "checkpoint": "model.safetensors"}
    texts = ("a scene\nSteps: 20, Sampler: DDIM", json.dumps(settings))
    mark = Watermarker(MESSAGE)

    def written(pixels: Any, format: str, quality: int = 95) -> bytes:
        return sign(encode_image(mark(pixels), texts, format, quality), format, settings)

    own = {"written as PNG": ("png", 95), "written as WebP 95": ("webp", 95)}
    own |= {f"written as JPEG {quality}": ("jpg", quality) for quality in (95, 90, 75, 50)}
    names = [*own, *changes()]
    found: dict[str, Any] = {name: {each: {} for each in MARKS} for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for pixels in tqdm(images, unit="image"):
            files = {name: written(pixels, *how) for name, how in own.items()}
            png = files["written as PNG"]
            files |= {name: change(png) for name, change in changes().items()}
            for name, data in files.items():
                for each, word in marks_of(data, Path(folder)).items():
                    if word:
                        found[name][each][word] = found[name][each].get(word, 0) + 1
    return found


def cost(pixels: Any, sign: Any) -> dict[str, dict[str, float]]:
    """Milliseconds to encode and to sign one file of each format, medians, and the bytes that are added."""
    from ldm.images.metadata import FORMATS, encode_image

    times: dict[str, dict[str, float]] = {}
    for format in FORMATS:
        encoding, signing = [], []
        for _ in range(RUNS):
            start = time.perf_counter()
            data = encode_image(pixels, None, format)
            middle = time.perf_counter()
            signed = sign(data, format, {})
            encoding.append(middle - start)
            signing.append(time.perf_counter() - middle)
        encode, signature = (round(1000 * statistics.median(each), 2) for each in (encoding, signing))
        times[format] = {"encode_ms": encode, "sign_ms": signature, "bytes": len(signed) - len(data)}
    return times


def table(found: dict[str, Any], images: int) -> str:
    """The counts as a table of Markdown."""

    def cell(counts: dict[str, int]) -> str:
        if counts == {"there": images} or counts == {"valid": images}:
            return "yes"
        return (
            ", ".join(
                f"{count} of {images}" + ("" if word in ("there", "valid") else f" {word}")
                for word, count in counts.items()
            )
            or "no"
        )

    rows = [
        f"| {name} | {' | '.join(cell(marks[each]) for each in MARKS)} |" for name, marks in found.items()
    ]
    return "\n".join([f"| after | {' | '.join(MARKS)} |", "|---|" + "---|" * len(MARKS), *rows])


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sign", nargs=2, metavar=("CERT.pem", "KEY.pem"), required=True)
    parser.add_argument("--images", type=int, default=24, help="renders, or the most of a folder's files")
    parser.add_argument("--size", type=int, default=512, help="pixels on a side of a render")
    parser.add_argument("--folder", type=Path, help="images to take in place of renders")
    parser.add_argument("--output", type=Path, help="a JSON file for the counts")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from ldm.images.provenance import signer_of

    sign = signer_of(*args.sign)
    images = list(images_in(args.folder) if args.folder else renders(args.images, args.size))[: args.images]
    found = measured(images, sign)
    print(table(found, len(images)))
    times = cost(images[0], sign)
    for format, facts in times.items():
        print(
            f"{format}: encoded in {facts['encode_ms']} ms, signed in {facts['sign_ms']} ms, "
            f"{facts['bytes']:,} bytes more"
        )
    if args.output:
        args.output.write_text(json.dumps({"images": len(images), "found": found, "cost": times}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
