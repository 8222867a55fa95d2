"""Texts in image files of all formats."""

import struct
import subprocess
import sys
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import noise, png
from PIL import Image

from ldm.errors import InputError
from ldm.images.metadata import _comment_text, encode_image, exif, read_texts

ROOT = Path(__file__).parents[2]
PARAMETERS = 'a café, 8k: "夜" 🎸\nsecond line\nSteps: 50, Sampler: DPM++ 2M'
OWN = '{"prompt": "a caf\\u00e9", "steps": 50}'
TEXTS = (PARAMETERS, OWN)
FORMATS = ["png", "jpg", "webp"]
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def texts_or_error(path: Path) -> None:
    with suppress(InputError):
        assert all(text is None or isinstance(text, str) for text in read_texts(path))


@pytest.mark.parametrize("format", FORMATS)
def test_texts_come_back(tmp_path, format):
    path = tmp_path / f"image.{format}"
    path.write_bytes(encode_image(noise(), TEXTS, format))
    assert read_texts(path) == TEXTS
    with Image.open(path) as image:
        assert image.size == (24, 16)
        assert image.format == {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[format]


@pytest.mark.parametrize("format", FORMATS)
def test_images_without_texts(tmp_path, format):
    path = tmp_path / f"image.{format}"
    path.write_bytes(encode_image(noise(), None, format))
    assert read_texts(path) == (None, None)


def test_png_files_hold_the_pixels(tmp_path):
    (tmp_path / "image.png").write_bytes(encode_image(noise(), TEXTS))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "image.png")), noise())


def test_png_files_are_compressed_with_the_fastest_level():
    """Pillow's own level took longer than the watermark and all other work on an image's file together."""
    data = encode_image(noise(), None)
    start = data.index(b"IDAT") + 4
    assert data[start + 1] >> 6 == 0  # the level in zlib's header, RFC 1950
    assert len(zlib.decompress(data[start : start + struct.unpack_from(">I", data, start - 8)[0]])) == 16 * 73


def test_long_texts_in_a_jpeg_lose_the_copy_for_others_first(tmp_path):
    path = tmp_path / "image.jpg"
    for length, copied in [(20_000, True), (40_000, False)]:
        own = '{"prompt": "' + "x" * length + '"}'
        path.write_bytes(encode_image(noise(), ("x" * length, own), "jpg"))
        assert read_texts(path) == ("x" * length if copied else None, own)
    with pytest.raises(InputError, match=r"settings of 70,000 bytes do not fit into a JPEG file"):
        encode_image(noise(), ("", "x" * 70_000), "jpg")


def test_exif_is_what_a1111_reads():
    """With piexif, which takes a UserComment of the type UNDEFINED, in UTF-16 with the high bytes first."""
    block = exif(TEXTS, "jpg")
    assert block.startswith(b"Exif\0\0MM\0*")
    tag = block.index(struct.pack(">HH", 0x9286, 7))
    count, offset = struct.unpack_from(">II", block, tag + 4)
    comment = block[6 + offset :][:count]
    assert comment == b"UNICODE\0" + PARAMETERS.encode("utf-16-be")
    assert 6 + offset + count == len(block)


def test_quality_is_the_files():
    sizes = [len(encode_image(noise(64, 64), None, "jpg", quality)) for quality in (40, 80, 95)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2] / 2


def test_texts_of_many_encodings():
    for encoding in ("utf-16-be", "utf-16-le", "utf-16"):
        assert _comment_text(b"UNICODE\0" + "夜 Steps: 3\n".encode(encoding)) == "夜 Steps: 3\n"
    for prefix in (b"ASCII\0\0\0", bytes(8), b""):
        assert _comment_text(prefix + "a café, Steps: 3".encode()) == "a café, Steps: 3"
    for nothing in (b"", bytes(20), b"UNICODE\0"):
        assert _comment_text(nothing) is None


def test_other_peoples_captions_are_no_settings(tmp_path):
    for caption in ("holiday", '{"a": 1}', '{"stable-diffusion'):
        block = Image.Exif()
        block[0x010E] = caption
        Image.fromarray(noise()).save(tmp_path / "photo.jpg", exif=block)
        assert read_texts(tmp_path / "photo.jpg") == (None, None)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    for name in ("nowhere.png", "text.png"):
        with pytest.raises(InputError, match=rf"cannot read the image .*{name}: "):
            read_texts(tmp_path / name)


def test_huge_and_broken_chunks(tmp_path):
    bomb = zlib.compress(b"x" * 100_000_000, 9)
    for kind, data in [
        (b"zTXt", b"parameters\0\0" + bomb),
        (b"zTXt", b"parameters\0\0" + bomb[:50]),
        (b"zTXt", b"stable-diffusion\0\x07rubbish"),
        (b"iTXt", b"parameters\0\1\0\0\0" + bomb),
        (b"iTXt", b"stable-diffusion"),
        (b"eXIf", b"MM\0*\xff\xff\xff\xff"),
    ]:
        texts_or_error(png(tmp_path / "image.png", (kind, data)))
    whole = encode_image(noise(), TEXTS, "jpg")
    for data in (b"", whole[:3], whole[:200], whole[:-1000], b"\x89PNG\r\n\x1a\n" + bytes(50)):
        (tmp_path / "torn").write_bytes(data)
        texts_or_error(tmp_path / "torn")


def test_an_image_too_large_to_decode_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "image.jpg"
    path.write_bytes(encode_image(noise(), TEXTS, "jpg"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match=r"cannot read the image .*image\.jpg: Image size"):
        read_texts(path)


@FUZZ
@given(
    st.sampled_from([b"tEXt", b"zTXt", b"iTXt", b"eXIf"]),
    st.sampled_from([b"parameters\0", b"stable-diffusion\0", b"parameters\0\0", b"MM\0*\0\0\0\x08", b""]),
    st.binary(max_size=200) | st.text().map(str.encode) | st.binary().map(zlib.compress),
)
def test_no_chunk_breaks_the_reader(tmp_path, kind, keyword, data):
    texts_or_error(png(tmp_path / "image.png", (kind, keyword + data)))


@FUZZ
@given(st.sampled_from(["jpg", "webp"]), st.data())
def test_no_damaged_file_breaks_the_reader(tmp_path, format, data):
    whole = bytearray(encode_image(noise(), TEXTS, format))
    for at in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=5)):
        whole[at] = data.draw(st.integers(0, 255))
    (tmp_path / "image").write_bytes(whole)
    texts_or_error(tmp_path / "image")


def test_plain_values_only():
    """The room of image files knows no model, no sampler and no run."""
    names = ("init_image", "metadata", "names", "outputs", "pixels", "sheets", "watermark")
    code = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module("ldm.images." + name)
print(sorted(name for name in sys.modules if name.startswith("ldm.") and name.count(".") == 1))
print({{"torch", "cv2", "imwatermark"}} & {{*sys.modules}})
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["['ldm.errors', 'ldm.images', 'ldm.log']", "set()"]


@pytest.mark.parametrize(("format", "longest"), [("webp", 16_383), ("jpg", 65_500)])
def test_sides_that_a_format_cannot_hold(format: str, longest: int) -> None:
    """They raised whatever Pillow says of them, which no command and no service made a clear line of."""
    assert encode_image(np.zeros((8, longest, 3), np.uint8), None, format)
    words = f"an image of {longest + 1}x8 pixels does not fit into a .* file, whose sides have {longest:,} at"
    with pytest.raises(InputError, match=words):
        encode_image(np.zeros((8, longest + 1, 3), np.uint8), None, format)
