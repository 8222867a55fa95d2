"""Images of every kind as a user may give them, and files that are none."""

import io
import random
import re
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from golden_files import golden_file
from PIL import Image, ImageCms, ImageFile

from ldm.errors import InputError
from ldm.images.init_image import (
    fit,
    open_init_image,
    parse_colour,
    read_init_image,
    target_size,
)

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
NOISE = np.random.default_rng(0).integers(0, 256, (20, 30, 4), np.uint8)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(header: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file with this header and these chunks, well-formed or not."""
    parts = ((b"IHDR", header), *chunks, (b"IEND", b""))
    frames = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(frames)


@pytest.fixture
def opened(tmp_path: Path):
    """Writes an image, or a file's bytes, and opens it: the pixels, int [H, W, 3]."""

    def call(
        image: Image.Image | bytes, kind: str = "PNG", background: str = "white", **options
    ) -> np.ndarray:
        data = image if isinstance(image, bytes) else encode(image, kind, **options)
        (tmp_path / "image").write_bytes(data)
        rgb = open_init_image(str(tmp_path / "image"), background)
        assert rgb.mode == "RGB"
        return np.asarray(rgb).astype(int)

    return call


def refusal(path: Path | str, *arguments) -> str:
    """What `open_init_image` has against this file: one line that names it."""
    with pytest.raises(InputError) as caught:
        open_init_image(str(path), *arguments)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


# --- modes and formats


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("PPM", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG2000", {}, 0),
        ("GIF", {}, 0),
        ("JPEG", {"quality": 95}, 12),
        ("AVIF", {"quality": 90}, 12),
    ],
)
def test_formats(opened, kind, options, tolerance) -> None:
    halves = Image.new("RGB", (32, 16), RED)
    halves.paste(BLUE, (16, 0, 32, 16))
    pixels = opened(halves, kind, **options)
    assert pixels.shape == (16, 32, 3)
    assert np.abs(pixels[8, [4, 28]] - (RED, BLUE)).max() <= tolerance


@pytest.mark.parametrize(
    ("mode", "kind", "colour", "expected"),
    [
        ("1", "PNG", 1, WHITE),
        ("L", "PNG", 77, (77, 77, 77)),
        ("P", "PNG", RED, RED),
        ("CMYK", "TIFF", (0, 255, 255, 0), RED),
        ("CMYK", "JPEG", (0, 255, 255, 0), RED),  # Adobe's files hold the inverse
        ("YCbCr", "JPEG", (76, 85, 255), RED),
        ("LAB", "TIFF", (255, 128, 128), WHITE),
    ],
)
def test_modes(opened, mode, kind, colour, expected) -> None:
    assert np.abs(opened(Image.new(mode, (16, 16), colour), kind)[3, 3] - expected).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "I;16B"])
def test_16_bit_grey_is_scaled(opened, kind) -> None:
    """Pillow's `convert` clips it: everything above 255 became white."""
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    if kind == "I;16B":
        image, kind = Image.frombytes(kind, (4, 1), values.astype(">u2").tobytes()), "TIFF"
    else:
        image = Image.fromarray(values)
    assert opened(image, kind)[0].tolist() == [[level] * 3 for level in (0, 1, 128, 255)]


def test_one_transparent_16_bit_grey(opened) -> None:
    image = Image.fromarray(np.array([[1000, 1001]], np.uint16))
    assert opened(image, transparency=1000, background="red")[0].tolist() == [[255, 0, 0], [4, 4, 4]]


def test_16_bit_colour(opened) -> None:
    data = png(
        struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0), (b"IDAT", zlib.compress(b"\0\xff\xff\x80\0\0\0"))
    )
    assert opened(data)[0, 0].tolist() == [255, 128, 0]


def test_floats_run_from_0_to_1(opened, tmp_path) -> None:
    assert opened(Image.fromarray(np.array([[0, 0.5, 1]], np.float32)), "TIFF")[0, :, 0].tolist() == [
        0,
        128,
        255,
    ]
    for value in (1.5, -0.1, float("nan")):
        Image.fromarray(np.array([[0, value]], np.float32)).save(tmp_path / "float.tif")
        assert "not within 0 … 1" in refusal(tmp_path / "float.tif")
    Image.fromarray(np.array([[0, 70000]], np.int32)).save(tmp_path / "int.tif")
    assert "run from 0 to 70000, not within 0 … 65535" in refusal(tmp_path / "int.tif")


def test_transparency_shows_the_background(opened) -> None:
    """`convert("RGB")` showed the hidden colours instead."""
    for background, colour in (("white", WHITE), ("#0000ff", BLUE), ("green", GREEN)):
        assert opened(Image.new("RGBA", (4, 4), (*RED, 0)), background=background)[1, 1].tolist() == [*colour]
    assert opened(Image.new("RGBA", (4, 4), (*RED, 255)))[1, 1].tolist() == [255, 0, 0]
    assert opened(Image.new("RGBA", (4, 4), (0, 0, 0, 51)))[1, 1].tolist() == [204] * 3
    assert opened(Image.new("RGBA", (4, 4), (*RED, 0)), "WEBP", lossless=True)[1, 1].tolist() == [255] * 3
    assert opened(Image.new("LA", (4, 4), (0, 51)))[1, 1].tolist() == [204] * 3
    assert opened(Image.new("L", (4, 4), 9), transparency=9)[1, 1].tolist() == [255] * 3


def test_a_transparent_colour(opened) -> None:
    image = Image.new("RGB", (4, 4), RED)
    image.putpixel((0, 0), BLUE)
    assert opened(image, transparency=RED)[0, :2].tolist() == [[0, 0, 255], [255, 255, 255]]
    palette = image.quantize(2)
    red = palette.getpixel((1, 1))
    for kind in ("PNG", "GIF"):
        assert opened(palette, kind, transparency=red)[0, :2].tolist() == [[0, 0, 255], [255, 255, 255]]
    shades = bytes(51 if index == red else 255 for index in range(2))
    assert opened(palette, transparency=shades, background="black")[1, 1].tolist() == [51, 0, 0]


def test_a_profile_is_followed_and_a_broken_one_is_not(opened) -> None:
    srgb = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    swapped = bytes(srgb).replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")
    palette = Image.new("RGB", (4, 4), RED).quantize(2)
    for image in (Image.new("RGB", (4, 4), RED), Image.new("RGBA", (4, 4), (*RED, 255)), palette):
        assert np.abs(opened(image, icc_profile=bytes(srgb))[1, 1] - RED).max() <= 1
        assert np.abs(opened(image, icc_profile=swapped)[1, 1] - (0, 255, 0)).max() <= 2
        for broken in (b"x", swapped[:200], bytes(500)):
            assert opened(image, icc_profile=broken)[1, 1].tolist() == [255, 0, 0]
    assert opened(Image.new("RGBA", (4, 4), (*RED, 0)), icc_profile=swapped)[1, 1].tolist() == [255] * 3
    assert opened(Image.new("L", (4, 4), 9), icc_profile=swapped)[1, 1].tolist() == [9] * 3  # not for grey


def test_a_photo_is_turned_upright(opened) -> None:
    """Cameras store the image lying and say so; the original painted it lying."""
    image = Image.new("RGB", (32, 16), WHITE)
    image.paste(RED, (0, 0, 16, 16))  # the left half, upright the upper one
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind, options in (("JPEG", {"quality": 95}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        pixels = opened(image, kind, exif=exif, **options)
        assert pixels.shape == (32, 16, 3), kind
        assert np.abs(pixels[[4, 28], 8] - (RED, WHITE)).max() <= 12, kind
    exif[0x0112] = 3
    assert opened(image, exif=exif)[8, [4, 28]].tolist() == [[*WHITE], [*RED]]


@pytest.mark.parametrize("cut", range(0, 40, 3))
def test_broken_exif_is_passed_over(opened, cut) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a maker with a long name"
    image = Image.new("RGB", (8, 4), RED)
    with warnings.catch_warnings(action="error"):
        assert opened(image, "JPEG", exif=exif.tobytes()[:cut] + b"\xff" * 9).size == 8 * 4 * 3


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_images_the_first_is_used(opened, caplog, kind) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE, WHITE)]
    pixels = opened(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(pixels[4, 4] - RED).max() <= 2
    assert caplog.messages[0].endswith("holds 3 images; the first one is used")


def test_previews_in_a_photo_are_not_worth_a_word(opened, capsys) -> None:
    opened(
        Image.new("RGB", (8, 8), RED), "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8), BLUE)]
    )
    assert capsys.readouterr().err == ""


# --- files that are refused


def test_files_that_are_no_images(tmp_path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "page.png").write_text("<html>404</html>")
    (tmp_path / "drawing.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    assert "is empty" in refusal(tmp_path / "empty.png")
    assert "not an image; these can be read: PNG, JPEG," in refusal(tmp_path / "page.png")
    assert "not an image; these can be read: PNG, JPEG," in refusal(tmp_path / "drawing.eps")
    assert "No such file" in refusal(tmp_path / "nowhere.png")
    assert "directory" in refusal(tmp_path)
    assert "null" in refusal("a\0b.png")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (MemoryError(), "damaged or not supported (MemoryError)"),
        (struct.error("unpack"), "damaged or not supported (unpack)"),
        (RecursionError("too deep"), "too deep"),
    ],
)
def test_whatever_pillow_raises(tmp_path, monkeypatch, error, words) -> None:
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Image, "open", fail)
    assert words in refusal(tmp_path / "secret.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
def test_half_a_file(tmp_path, kind) -> None:
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    data = encode(Image.fromarray(NOISE[..., :3]), kind)
    (tmp_path / "half").write_bytes(data[: len(data) // 2])
    refusal(tmp_path / "half")


def test_no_pixels(tmp_path) -> None:
    for k, data in enumerate([png(struct.pack(">IIBBBBB", 0, 5, 8, 2, 0, 0, 0)), b"P6 0 5 255\n"]):
        (tmp_path / str(k)).write_bytes(data)
        refusal(tmp_path / str(k))


def test_a_colour_that_is_none(tmp_path) -> None:
    for colour in ("nocolour", "#12", "", "rgb(1,2)", "x" * 200):
        with pytest.raises(InputError, match=re.escape(f"--background {colour!r} is no colour")):
            open_init_image(str(tmp_path / "nowhere"), colour)
    assert parse_colour("Navy") == (0, 0, 128)
    assert parse_colour("#fF8000") == (255, 128, 0)


def test_damaged_files_end_in_one_line(tmp_path) -> None:
    """Bytes are changed and cut off at random: an image comes out, or one line."""
    rgba, exif = Image.fromarray(NOISE), Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    rgb = rgba.convert("RGB")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    files = [
        encode(rgba, "PNG", exif=exif, icc_profile=profile),
        encode(rgb.quantize(8), "PNG", transparency=3),
        encode(rgb, "PNG", save_all=True, append_images=[rgba]),
        encode(Image.fromarray(NOISE[..., 0].astype(np.uint16)), "PNG"),
        encode(rgb, "JPEG", exif=exif, icc_profile=profile),
        encode(rgb.convert("CMYK"), "JPEG", progressive=True),
        encode(rgb, "GIF", save_all=True, append_images=[rgb.rotate(180)]),
        encode(rgba, "WEBP", exif=exif),
        encode(rgba, "WEBP", lossless=True, save_all=True, append_images=[rgb]),
        *(encode(rgba.convert("RGB"), "TIFF", compression=name) for name in ("raw", "tiff_lzw", "jpeg")),
        encode(Image.fromarray(NOISE[..., 0] / np.float32(255)), "TIFF"),
        *(encode(rgb, kind) for kind in ("BMP", "PPM", "JPEG2000", "AVIF")),
    ]
    rng, path = random.Random(0), tmp_path / "damaged"
    opened, messages = 0, []
    for turn in range(400):
        data = bytearray(files[turn % len(files)])
        if rng.random() < 0.3:
            del data[rng.randrange(1, len(data)) :]
        for _ in range(rng.choice([0, 1, 1, 2, 5, 30])):
            data[rng.randrange(min(len(data), rng.choice([40, 200, 10**6])))] = rng.choice(
                [0, 255, rng.randrange(256)]
            )
        path.write_bytes(data)
        try:
            assert open_init_image(str(path), max_pixels=10**6).mode == "RGB"
            opened += 1
        except InputError as error:
            messages.append(str(error))
    assert all(str(path) in message and "\n" not in message for message in messages)
    assert min(opened, len(messages)) > 50


# --- too many pixels


@pytest.fixture
def pillow_limit():
    """Pillow's own limit, which must be as it was."""
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings(action="error"):
        yield
    assert before == Image.MAX_IMAGE_PIXELS


def test_a_huge_claim_is_refused_before_decoding(tmp_path, pillow_limit, monkeypatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    vp8x = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (99_999).to_bytes(3, "little") * 2
    claims = {
        "bomb.png": png(struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0), (b"IDAT", bytes(9))),
        "bomb.ppm": b"P6 100000 100000 255\n",
        "bomb.webp": b"RIFF" + struct.pack("<I", 4 + len(vp8x)) + b"WEBP" + vp8x,
    }
    for name, data in claims.items():
        (tmp_path / name).write_bytes(data)
        words = "has 10,000,000,000 pixels, more than --max_pixels 64,000,000"
        # Pillow 12 opens a WebP file only if its decoder takes the first frame, which this one lacks
        accepted = (words, "(could not create decoder object)") if name == "bomb.webp" else words
        assert refusal(tmp_path / name).endswith(accepted)


def test_the_limit_is_exact_and_the_users(tmp_path, pillow_limit, monkeypatch) -> None:
    path = tmp_path / "image.png"
    Image.new("RGB", (7, 9)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)  # smaller than the user's: no say
    assert open_init_image(str(path), max_pixels=63).size == (7, 9)
    assert "63 pixels, more than --max_pixels 62" in refusal(path, "white", 62)
    assert Image.MAX_IMAGE_PIXELS == 5


def test_a_frame_larger_than_the_header_says(tmp_path, pillow_limit) -> None:
    data = bytearray(encode(Image.new("P", (8, 8)), "GIF"))
    at = data.index(b",")
    data[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    (tmp_path / "frame.gif").write_bytes(data)
    assert "more than --max_pixels" in refusal(tmp_path / "frame.gif")


# --- sizes


@pytest.mark.parametrize(
    ("size", "height", "width", "expected"),
    [
        ((200, 140), None, None, (192, 128)),  # the original's
        ((64, 64), None, None, (64, 64)),
        ((127, 128), None, None, (64, 128)),
        ((10, 500), None, None, (64, 448)),  # never below 64
        ((200, 140), 256, None, (368, 256)),
        ((200, 140), None, 256, (256, 176)),
        ((1000, 3), None, 64, (64, 8)),
        ((3, 1000), 64, None, (8, 64)),
        ((200, 140), 24, 16, (16, 24)),
    ],
)
def test_target_size(size, height, width, expected) -> None:
    assert target_size(size, height, width) == expected


def test_the_default_is_the_originals() -> None:
    path = golden_file("cases/init_200x140.png")
    pixels = read_init_image(str(path), None, None, "stretch", "white", 64_000_000)
    expected = Image.open(path).convert("RGB").resize((192, 128), resample=Image.Resampling.LANCZOS)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, np.asarray(expected))


@pytest.mark.parametrize("upright", [False, True])
def test_stretch_crop_and_pad(upright) -> None:
    """Three stripes of 32 pixels, along the long side of an image of 96x32, on 64x64."""
    stripes = np.repeat(np.array([[RED, GREEN, BLUE]], np.uint8), 32, 1).repeat(32, 0)
    image = Image.fromarray(stripes.transpose(1, 0, 2) if upright else stripes)

    def fitted(how: str) -> np.ndarray:
        pixels = np.asarray(fit(image, 64, 64, how, "white"))
        assert pixels.shape == (64, 64, 3)
        return pixels.transpose(1, 0, 2) if upright else pixels

    stretched, cropped, padded = fitted("stretch"), fitted("crop"), fitted("pad")
    for row in (0, 63):
        assert stretched[row, [2, 32, 61]].tolist() == [[*RED], [*GREEN], [*BLUE]]
        assert padded[row, [2, 32, 61]].tolist() == [[*WHITE]] * 3
    assert (cropped[:, 8:-8] == GREEN).all()
    assert padded[32, [2, 32, 61]].tolist() == [[*RED], [*GREEN], [*BLUE]]
    inside = (padded != 255).any(2).all(1)
    assert np.flatnonzero(inside)[[0, -1]].tolist() == [22, 42]  # 64/3 rows, centred


@pytest.mark.parametrize("how", ["stretch", "crop", "pad"])
def test_the_size_asked_for(tmp_path, how) -> None:
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    for height, width, shape in [(40, 24, (40, 24, 3)), (40, None, (40, 64, 3)), (None, None, (64, 64, 3))]:
        pixels = read_init_image(str(tmp_path / "a.png"), height, width, how, "black", 10**6)
        assert pixels.shape == shape
        assert pixels.dtype == np.uint8


def test_a_result_that_would_be_too_large(tmp_path) -> None:
    Image.new("RGB", (10_000, 1)).save(tmp_path / "line.png")
    with pytest.raises(InputError, match=r"line\.png would become 5120000x512: more than --max_pixels"):
        read_init_image(str(tmp_path / "line.png"), 512, None, "stretch", "white", 64_000_000)


# PIL images, and sizes


def turned(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {} if kind != "MPO" else {"save_all": True, "append_images": [Image.new("RGB", (8, 8))]}
    return encode(Image.new("RGB", (320, 130), RED), kind, exif=exif, **options)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "I;16", "F"])
def test_pil_images(tmp_path, mode) -> None:
    """They come out as their files do, and stay as they are."""
    values = {"I;16": NOISE[..., 0].astype(np.uint16) * 257, "F": NOISE[..., 0] / np.float32(255)}
    image = Image.fromarray(values[mode]) if mode in values else Image.fromarray(NOISE).convert(mode)
    path = tmp_path / ("image.tif" if mode == "F" else "image.png")
    image.save(path)
    before = image.copy()
    assert np.array_equal(read_init_image(image, background="red"), read_init_image(path, background="red"))
    assert (image.mode, image.info) == (before.mode, before.info)
    assert image.tobytes() == before.tobytes()


def test_an_opened_photo_is_turned_and_stays_as_it_is(tmp_path) -> None:
    (tmp_path / "photo.jpg").write_bytes(turned("JPEG", 6))
    with Image.open(tmp_path / "photo.jpg") as image:
        pixels = read_init_image(image)
        assert image.size == (320, 130)
        assert image.getexif()[0x0112] == 6
    assert np.array_equal(pixels, read_init_image(tmp_path / "photo.jpg"))


def test_refused_pil_images(tmp_path) -> None:
    (tmp_path / "half.png").write_bytes(turned("PNG", 1)[:-40])
    with Image.open(tmp_path / "half.png") as image, pytest.raises(InputError, match=r"half\.png: "):
        read_init_image(image)
    with pytest.raises(InputError, match="the init image has 320 pixels, more than --max_pixels 319"):
        read_init_image(Image.new("L", (320, 1)), max_pixels=319)
    with pytest.raises(InputError, match="cannot read the image 7: "):
        read_init_image(7)


def test_torch_is_not_needed() -> None:
    code = "import ldm.images.init_image, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
