import base64
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.service.errors import BadRequest, LimitExceeded, ServiceError
from ldm.service.inputs import file_of, files_in, image_of, parsed, text_of

MOST = 10_000


def coloured(width: int = 20, height: int = 10) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def file(format: str = "PNG", image: Image.Image | None = None, **options: object) -> bytes:
    data = io.BytesIO()
    (image or coloured()).save(data, format=format, **options)
    return data.getvalue()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize(
    "prefix", ["", "data:image/png;base64,", "DATA:;base64,", "data:image/png;charset=utf-8;base64,"]
)
def test_base64_is_read_plain_and_as_a_data_url(prefix: str) -> None:
    image = image_of(prefix + text(file()), "mask", MOST)
    assert (np.asarray(image) == np.asarray(coloured())).all()


def test_line_ends_and_missing_padding_are_forgiven() -> None:
    given = base64.encodebytes(file()).decode().rstrip("=\n")
    assert image_of(given, "mask", MOST).size == (20, 10)


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_other_formats_of_photographs_are_read(format: str) -> None:
    assert image_of(text(file(format)), "mask", MOST).size == (20, 10)


def test_of_an_animation_the_first_frame_is_read() -> None:
    frames = [coloured(), Image.new("RGB", (20, 10))]
    data = file("PNG", frames[0], save_all=True, append_images=frames[1:])
    assert (np.asarray(image_of(text(data), "mask", MOST)) == np.asarray(frames[0])).all()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("/etc/passwd!", "not its name or its address"),
        ("http://127.0.0.1/x.png", "not its name or its address"),
        ("file:///etc/passwd", "not its name or its address"),
        ("", "not its name or its address"),
        ("data:image/png,abc", "not of the form"),
        ("data:text/html;base64,PGI+", "is no image"),
        ("aGVsbG8=", "is no image"),
        (text(b"%!PS-Adobe"), "is no image"),
        (7, "is no text"),
        (["x"], "is no text"),
    ],
)
def test_what_is_no_image_is_refused_by_its_field(value: object, words: str) -> None:
    with pytest.raises(BadRequest, match=f"mask: .*{words}"):
        image_of(value, "mask", MOST)


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "PPM"])
def test_formats_that_no_client_needs_are_refused(format: str) -> None:
    with pytest.raises(BadRequest, match="PNG, JPEG, WEBP"):
        image_of(text(file(format)), "mask", MOST)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_files_are_refused(format: str, share: float) -> None:
    data = file(format, coloured(100, 100))
    with pytest.raises(BadRequest, match="mask: "):
        image_of(text(data[: int(len(data) * share)]), "mask", MOST)


def bomb(width: int, height: int) -> bytes:
    """A PNG file whose header says more pixels than it has data for."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [101, 10_000, 60_000, 2**31 - 1])
def test_decompression_bombs_are_refused_by_their_header(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", None)  # nothing is decoded
    with pytest.raises(LimitExceeded, match=r"mask: .* more pixels than the 10,000"):
        image_of(text(bomb(side, side)), "mask", MOST)


def test_json_is_read_in_utf_8() -> None:
    assert parsed('{"prompt": "ein Würfel"}'.encode()) == {"prompt": "ein Würfel"}
    assert parsed(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "line 1, column 1"),
        (b'{"prompt": "a",\n}', "at line 2"),
        (b'{"prompt": "a", "scale": NaN}', "NaN is no JSON"),
        (b"[-Infinity]", "-Infinity is no JSON"),
        ("{}".encode("utf-16"), "not UTF-8"),
        (b"[" * 200_000, "nested too deeply"),
        (b"9" * 10_000, "a number in it is too long"),
        (b'{"a": [-1e400]}', "too long or too large"),  # it came back as Infinity, which is no JSON
    ],
)
def test_malformed_json_is_one_clear_line(body: bytes, words: str) -> None:
    with pytest.raises(ServiceError, match=words) as error:
        parsed(body)
    assert (error.value.status, error.value.code) == (400, "invalid_json")


@pytest.mark.parametrize("value", ["half \ud800", "nul \0", 7, None, {"a": 1}])
def test_texts_are_characters(value: object) -> None:
    with pytest.raises(BadRequest, match="prompt: "):
        text_of(value, "prompt")
    assert text_of("two lines\nand 🎨", "prompt")


def test_files_are_found_by_plain_names_in_their_folder_alone(tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    (folder / "styles").mkdir(parents=True)
    inside = [folder / "one.safetensors", folder / "styles" / "two.pt"]
    for path in (*inside, tmp_path / "secret.safetensors", folder / "notes.txt"):
        path.touch()
    there = files_in(str(folder), "lora")
    assert file_of("one", "lora", there) == inside[0]
    assert file_of("one.safetensors", "lora", there) == inside[0]
    assert file_of("two", "lora", there) == inside[1]
    outside = (
        "../secret",
        "../secret.safetensors",
        str(tmp_path / "secret.safetensors"),
        "notes.txt",
        "",
        ".",
    )
    for name in outside:
        with pytest.raises(BadRequest, match=r"lora: there is no .*; this service has one, two"):
            file_of(name, "lora", there)
    with pytest.raises(BadRequest, match="lora: this service has none"):
        files_in(None, "lora")
    with pytest.raises(BadRequest) as error:
        file_of("x", "lora", there)
    assert str(tmp_path) not in error.value.message
