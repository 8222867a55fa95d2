"""Settings in pictures of all formats, those of other tools, and the watermark read back."""

import io
import json
import struct
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from golden_files import case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.errors import InputError
from ldm.images.metadata import (
    NoSettings,
    _comment_text,
    a1111_parameters,
    encode_image,
    exif,
    parse_a1111,
    read_metadata,
    read_texts,
    settings_from_picture,
)
from ldm.images.outputs import Watermarker
from ldm.images.watermark import CERTAIN, PUBLISHED, SDXL_BITS, block_values, read_watermark

SETTINGS = {
    "prompt": 'a café, 8k: "夜" 🎸\nsecond line',
    "negative_prompt": "blurry,\ndark",
    "steps": 50,
    "sampler": "dpmpp_2m",
    "schedule": "karras",
    "scale": 7.5,
    "seed": 42,
    "width": 24,
    "height": 16,
    "model_hash": "fe4efff1e1",
    "checkpoint": "sd, v1.ckpt",
    "version": "0.1.0",
    "nsfw_content_detected": False,
}
FORMATS = ["png", "jpg", "webp"]
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def pixels(height: int = 16, width: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def scene(seed: int, size: int) -> np.ndarray:
    """A picture with nature's spectrum, smooth and coloured."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = np.inf
    layers = rng.normal(size=(3, *frequency.shape)) + 1j * rng.normal(size=(3, *frequency.shape))
    layers = np.fft.irfft2(layers / frequency**1.3, (size, size))
    light, *colour = layers / layers.std(axis=(1, 2), keepdims=True)
    image = np.stack([light + 0.3 * colour[0], light, light + 0.3 * colour[1]], axis=-1)
    return (image * 40 + rng.uniform(80, 170, 3)).clip(0, 255).round().astype(np.uint8)


def recoded(image: np.ndarray, format: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encode_image(image, None, format))))


def png(path: Path, *chunks: tuple[bytes, bytes]) -> Path:
    """A PNG file with these chunks after its pixels."""
    file = io.BytesIO()
    Image.fromarray(pixels()).save(file, "PNG")
    head, end = file.getvalue()[:-12], file.getvalue()[-12:]
    for kind, data in chunks:
        head += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(head + end)
    return path


def dict_or_error(function, *args) -> None:
    with suppress(InputError):
        assert isinstance(function(*args), dict)


# --- what we write


@pytest.mark.parametrize("format", FORMATS)
def test_settings_come_back(tmp_path, format):
    path = tmp_path / f"picture.{format}"
    path.write_bytes(encode_image(pixels(), SETTINGS, format))
    assert read_metadata(path) == settings_from_picture(path) == SETTINGS
    assert read_texts(path)[1] == a1111_parameters(SETTINGS)
    with Image.open(path) as image:
        assert image.size == (24, 16)
        assert image.format == {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[format]


@pytest.mark.parametrize("format", FORMATS)
def test_pictures_without_settings(tmp_path, format):
    path = tmp_path / f"picture.{format}"
    path.write_bytes(encode_image(pixels(), None, format))
    assert read_metadata(path) is None
    with pytest.raises(NoSettings, match=r"picture\.\w+ carries no settings"):
        settings_from_picture(path)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("prompt", ["", "x" * 20_000, "夜" * 5_000, "first\r\n\x00\nSteps: 3", "caf\udce9"])
def test_prompts_come_back_from_every_format(tmp_path, format, prompt):
    told = SETTINGS | {"prompt": prompt, "negative_prompt": prompt}
    path = tmp_path / "picture"
    if format == "jpg" and len(prompt) == 5_000:  # \u escapes: 60 kB
        told["negative_prompt"] = ""
    path.write_bytes(encode_image(pixels(), told, format))
    assert read_metadata(path) == told


def test_long_settings_in_a_jpeg_lose_the_copy_for_others_first(tmp_path):
    path = tmp_path / "picture.jpg"
    for length, copied in [(20_000, True), (40_000, False)]:
        told = SETTINGS | {"prompt": "x" * length}
        path.write_bytes(encode_image(pixels(), told, "jpg"))
        own, others = read_texts(path)
        assert (json.loads(own), others is not None) == (told, copied)
    with pytest.raises(InputError, match=r"settings of 70,\d+ bytes do not fit into a JPEG file"):
        encode_image(pixels(), SETTINGS | {"prompt": "x" * 70_000}, "jpg")


def test_exif_is_what_a1111_reads(tmp_path):
    """With piexif, which takes a UserComment of the type UNDEFINED, in UTF-16 with the high bytes first."""
    block = exif(SETTINGS, "jpg")
    assert block.startswith(b"Exif\0\0MM\0*")
    tag = block.index(struct.pack(">HH", 0x9286, 7))
    count, offset = struct.unpack_from(">II", block, tag + 4)
    comment = block[6 + offset :][:count]
    assert comment == b"UNICODE\0" + a1111_parameters(SETTINGS).encode("utf-16-be")
    assert 6 + offset + count == len(block)


def test_quality_is_the_files():
    sizes = [len(encode_image(pixels(64, 64), None, "jpg", quality)) for quality in (40, 80, 95)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2] / 2


# --- what others write

FOREIGN = """masterpiece, (best quality:1.2),
a castle: at night

Negative prompt: blurry, EasyNegative
bad hands
Steps: 28, Sampler: DPM++ 2M Karras, CFG scale: 6.5, Seed: 1234567890123, Size: 512x768, \
Model hash: 6ce0161689, Model: v1-5-pruned, Variation seed: 7, Variation seed strength: 0.25, Clip skip: 2, \
Lora hashes: "a: 1234, b: 5678", TI hashes: "say \\"x\\", y", Version: v1.6.0"""


def test_the_web_uis_text():
    assert parse_a1111(FOREIGN) == {
        "prompt": "masterpiece, (best quality:1.2),\na castle: at night\n",
        "negative_prompt": "blurry, EasyNegative\nbad hands",
        "steps": 28,
        "sampler": "dpmpp_2m",
        "schedule": "karras",
        "scale": 6.5,
        "seed": 1234567890123,
        "width": 512,
        "height": 768,
        "model_hash": "6ce0161689",
        "checkpoint": "v1-5-pruned",
        "variation_seed": 7,
        "variation_strength": 0.25,
        "version": "v1.6.0",
        "other": {"Clip skip": "2", "Lora hashes": "a: 1234, b: 5678", "TI hashes": 'say "x", y'},
    }


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Sampler: Euler a", {"sampler": "euler_ancestral"}),
        ("Sampler: DPM++ 2M SDE Exponential", {"sampler": "dpmpp_2m_sde", "schedule": "exponential"}),
        ("Sampler: DPM++ 2M, Schedule type: Karras", {"sampler": "dpmpp_2m", "schedule": "karras"}),
        ("Sampler: Euler, Schedule type: Automatic", {"sampler": "euler"}),
        ("Sampler: Euler, Schedule type: Uniform", {"sampler": "euler", "schedule": "linspace"}),
        ("Sampler: Euler, Schedule type: Align Your Steps", {"sampler": "euler", "schedule": "ays"}),
        ("Sampler: Restart, Schedule type: Beta", {"sampler": "Restart", "schedule": "Beta"}),
        ("Denoising strength: 0.4", {"strength": 0.4}),
        (
            "Steps: 9, Denoising strength: 0.4, Hires upscale: 2",
            {"steps": 9, "other": {"Hires upscale": "2"}},
        ),
        ('Steps: 3, Model: "a, b", Steps: 4', {"steps": 3, "checkpoint": "a, b"}),
        ("Steps: 3, nonsense, Seed: 5", {"steps": 3, "seed": 5}),
        ('Steps: 3, Model: "open, Seed: 5', {"steps": 3, "checkpoint": '"open', "seed": 5}),
        ("Size: 8x8", {"width": 8, "height": 8}),
        ("Seed: 1\r", {"seed": 1}),
    ],
)
def test_lines_of_settings(line, expected):
    assert parse_a1111(f"a cat\n{line}") == {"prompt": "a cat"} | expected


def test_a_text_of_prompts_only():
    assert parse_a1111("a cat, dog: 3") == {"prompt": "a cat, dog: 3"}
    assert parse_a1111("a\nNegative prompt:b\nc") == {"prompt": "a", "negative_prompt": "b\nc"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Steps: many", "Steps: 'many', which is not a whole number"),
        ("Steps: 2.5", "Steps: '2.5', which is not a whole number"),
        ("Seed: " + "9" * 5000, "Seed: '9{40}…', which"),
        ("CFG scale: nan", "CFG scale: 'nan', which is not a number"),
        ("Size: 512", "Size: '512', which is not WIDTHxHEIGHT"),
        ("Size: 512x-8", "Size: '512x-8', which"),
    ],
)
def test_malformed_values_are_named(tmp_path, line, message):
    with pytest.raises(InputError, match=message):
        parse_a1111(f"a cat\n{line}")
    path = png(tmp_path / "picture.png", (b"tEXt", b"parameters\0a cat\n" + line.encode()))
    with pytest.raises(InputError, match=rf"picture\.png: the A1111 text has {message}"):
        settings_from_picture(path)


@FUZZ
@given(st.text(), st.text(), st.sampled_from(["euler", "plms", "dpmpp_2m"]), st.integers(0, 2**63 - 1))
def test_our_own_text_is_read_back(prompt, model, sampler, seed):
    told = {"prompt": prompt, "sampler": sampler, "seed": seed, "width": 8, "height": 16, "steps": 3}
    text = a1111_parameters(told | {"checkpoint": "x" + model})
    found = parse_a1111(text)
    if not any(line.startswith("Negative prompt:") for line in prompt.split("\n")):
        assert found.items() >= told.items()


def test_texts_of_many_encodings():
    for encoding in ("utf-16-be", "utf-16-le", "utf-16"):
        assert _comment_text(b"UNICODE\0" + "夜 Steps: 3\n".encode(encoding)) == "夜 Steps: 3\n"
    for prefix in (b"ASCII\0\0\0", bytes(8), b""):
        assert _comment_text(prefix + "a café, Steps: 3".encode()) == "a café, Steps: 3"
    for nothing in (b"", bytes(20), b"UNICODE\0"):
        assert _comment_text(nothing) is None


def test_a_damaged_own_text_gives_way_to_the_other(tmp_path):
    for text in ("{", "[1]", "3", "null", "[" * 100_000, "9" * 5000):
        chunks = PngInfo()
        chunks.add_text("stable-diffusion", text)
        path = tmp_path / "own.png"
        Image.fromarray(pixels()).save(path, pnginfo=chunks)
        with pytest.raises(InputError, match="are damaged"):
            read_metadata(path)
        with pytest.raises(NoSettings):
            settings_from_picture(path)
        chunks.add_text("parameters", "a cat\nSteps: 3")
        Image.fromarray(pixels()).save(path, pnginfo=chunks)
        assert settings_from_picture(path) == {"prompt": "a cat", "steps": 3}


def test_other_peoples_captions_are_no_settings(tmp_path):
    for caption in ("holiday", '{"a": 1}', '{"stable-diffusion'):
        block = Image.Exif()
        block[0x010E] = caption
        Image.fromarray(pixels()).save(tmp_path / "photo.jpg", exif=block)
        assert read_metadata(tmp_path / "photo.jpg") is None


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
        dict_or_error(settings_from_picture, png(tmp_path / "picture.png", (kind, data)))
    whole = encode_image(pixels(), SETTINGS, "jpg")
    for data in (b"", whole[:3], whole[:200], whole[:-1000], b"\x89PNG\r\n\x1a\n" + bytes(50)):
        (tmp_path / "torn").write_bytes(data)
        dict_or_error(settings_from_picture, tmp_path / "torn")


def test_a_picture_too_large_to_decode_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "picture.jpg"
    path.write_bytes(encode_image(pixels(), SETTINGS, "jpg"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match=r"cannot read the picture .*picture\.jpg: Image size"):
        read_metadata(path)


def test_a_long_line_takes_no_time():
    for text in (
        "a" * 300_000,
        " " * 300_000,
        'a:"' * 100_000,
        "a: b, " * 50_000,
        "Steps: " + '"\\' * 100_000,
    ):
        dict_or_error(parse_a1111, f"x\nSteps: 3, {text}")
        dict_or_error(parse_a1111, text)


@FUZZ
@given(st.text())
def test_no_text_breaks_the_parser(text):
    dict_or_error(parse_a1111, text)


VALUES = st.one_of(
    st.text(max_size=20), st.sampled_from(['"', '"\\', "1", "1e999", "512x512", "Euler a", "0x1"])
)
NAMES = st.sampled_from(
    ["Steps", "Size", "Sampler", "Seed", "Model", "Hires x", "Negative prompt", "CFG scale"]
)


@FUZZ
@given(st.text(max_size=20), st.lists(st.tuples(NAMES, VALUES)), st.sampled_from([", ", ",", "\n"]))
def test_no_fields_break_the_parser(prompt, fields, separator):
    dict_or_error(parse_a1111, prompt + "\n" + separator.join(f"{name}: {value}" for name, value in fields))


@FUZZ
@given(
    st.sampled_from([b"tEXt", b"zTXt", b"iTXt", b"eXIf"]),
    st.sampled_from([b"parameters\0", b"stable-diffusion\0", b"parameters\0\0", b"MM\0*\0\0\0\x08", b""]),
    st.binary(max_size=200) | st.text().map(str.encode) | st.binary().map(zlib.compress),
)
def test_no_chunk_breaks_the_reader(tmp_path, kind, keyword, data):
    dict_or_error(settings_from_picture, png(tmp_path / "picture.png", (kind, keyword + data)))


@FUZZ
@given(st.sampled_from(["jpg", "webp"]), st.data())
def test_no_damaged_file_breaks_the_reader(tmp_path, format, data):
    whole = bytearray(encode_image(pixels(), SETTINGS, format))
    for at in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=5)):
        whole[at] = data.draw(st.integers(0, 255))
    (tmp_path / "picture").write_bytes(whole)
    dict_or_error(settings_from_picture, tmp_path / "picture")


# --- the watermark


def test_blocks_are_the_packages():
    from imwatermark import WatermarkDecoder

    for image in (pixels(264, 520), Watermarker()(scene(0, 256))):
        values = block_values(image, 128.0)
        bgr = np.ascontiguousarray(image[..., ::-1])
        theirs = WatermarkDecoder("bits", len(values)).decode(bgr, "dwtDct")
        sure = values % 18 != 0  # else their rounding errors decide
        assert np.mean((values % 36 > 18)[sure] == theirs[sure]) > 0.999


@pytest.mark.parametrize("size", [256, 512])
@pytest.mark.parametrize("format", FORMATS)
def test_published_watermarks_are_found(size, format):
    """In webp, whose colours have half the resolution, not in every small picture."""
    found = []
    for seed, message in enumerate([*PUBLISHED] * 3):
        marked = recoded(Watermarker(message)(scene(seed, size)), format)
        found.append(read_watermark(marked) == message)
    assert sum(found) >= (5 if format == "webp" and size == 256 else 8)


def test_sdxls_watermark_is_found():
    """diffusers writes it into floating-point pixels, where U has another zero."""
    from imwatermark import WatermarkEncoder

    encoder = WatermarkEncoder()
    encoder.set_watermark("bits", [int(bit) for bit in f"{SDXL_BITS:048b}"])
    for seed in range(4):
        image = scene(seed, 512)[..., ::-1].astype(np.float32)
        marked = encoder.encode(np.ascontiguousarray(image), "dwtDct")[..., ::-1]
        marked = marked.clip(0, 255).round().astype(np.uint8)
        assert read_watermark(marked) == read_watermark(recoded(marked, "jpg")) == "SDXL"


def test_the_golden_watermark_is_found():
    """The package's own reader makes "StafleDifvusionV1" of it: pixel values have wrapped."""
    tensors, _ = case("txt2img_plms")
    assert read_watermark(np.asarray(tensors["watermarked_0"])) == "StableDiffusionV1"
    assert read_watermark(np.asarray(tensors["image_0"])) is None


def test_pictures_without_a_watermark_have_none(monkeypatch):
    """Not even nearly: with a much lower threshold, neither."""
    monkeypatch.setattr("ldm.images.watermark.CERTAIN", CERTAIN - 1)
    images = [scene(seed, size) for seed in range(20) for size in (256, 512)]
    images += [pixels(256, 256, seed) for seed in range(10)]
    images += [np.full((256, 256, 3), level, np.uint8) for level in (0, 77, 255)]
    stripes = np.arange(512)[None, :, None] // 32 % 2 * 200 + np.zeros((256, 1, 3), int)
    images += [stripes.astype(np.uint8), stripes.swapaxes(0, 1).astype(np.uint8)]
    for image in images:
        assert read_watermark(image) is None
        assert read_watermark(recoded(image, "jpg"), ["my own"]) is None


def test_small_pictures_have_no_watermark():
    assert read_watermark(pixels(248, 256)) is None


def test_own_texts_of_any_length_are_read():
    grey = np.repeat(np.random.default_rng(0).integers(64, 192, (512, 512, 1), dtype=np.uint8), 3, axis=2)
    for text in (
        "me",
        "abc",
        "Ann 2024",
        "© café",
        "letters, 29 of them, and an y",
        "".join(map(chr, range(33, 97))),
    ):
        assert read_watermark(Watermarker(text)(grey)) == text
        assert read_watermark(Watermarker(text)(pixels(512, 512))) == text or len(text) > 20
        assert read_watermark(Watermarker(text)(grey), ["another"]) == text


def test_an_expected_text_is_found_where_it_cannot_be_read():
    image, text = scene(1, 256), "a text of my very own, in 38 letters"
    jpeg = recoded(Watermarker(text)(image), "jpg")
    assert read_watermark(jpeg, ["no", text]) == text
    assert read_watermark(jpeg, ["no", text[::-1]]) != text[::-1]
    assert read_watermark(image, [text, "", "x" * 1000]) is None
