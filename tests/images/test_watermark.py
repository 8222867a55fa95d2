"""The invisible watermark, written and read back."""

import io
import sys

import numpy as np
import pytest
from golden_files import case
from image_files import noise
from PIL import Image

from ldm.errors import InputError
from ldm.images.metadata import encode_image
from ldm.images.watermark import (
    CERTAIN,
    PUBLISHED,
    SDXL_BITS,
    Watermarker,
    block_values,
    read_watermark,
)

FORMATS = ["png", "jpg", "webp"]


def scene(seed: int, size: int) -> np.ndarray:
    """An image with nature's spectrum, smooth and coloured."""
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


# writing


def decode(pixels: np.ndarray, length: int) -> bytes:
    from imwatermark import WatermarkDecoder

    return WatermarkDecoder("bytes", 8 * length).decode(np.ascontiguousarray(pixels[..., ::-1]), "dwtDct")


def test_watermark_is_the_originals():
    tensors, _ = case("txt2img_plms")
    pixels, expected = np.asarray(tensors["image_0"]), np.asarray(tensors["watermarked_0"])
    before = pixels.copy()
    marked = Watermarker()(pixels)
    assert np.array_equal(marked, expected)
    assert np.array_equal(pixels, before)
    assert marked.flags.c_contiguous


@pytest.mark.parametrize("size", [(256, 256), (250, 333), (515, 264)])
def test_the_mark_is_the_packages_bit_by_bit(size):
    """The package's loop over blocks held the interpreter's lock while the next image's kernels waited."""
    from imwatermark import WatermarkEncoder

    image = np.ascontiguousarray(scene(1, 520)[: size[0], : size[1]])
    theirs = WatermarkEncoder(b"SDV2").encode(np.ascontiguousarray(image[..., ::-1]), "dwtDct")
    assert np.array_equal(Watermarker("SDV2")(image)[..., ::-1], theirs)


@pytest.mark.parametrize("message", ["StableDiffusionV1", "SDV2"])
@pytest.mark.parametrize("size", [(512, 512), (256, 256), (264, 520)])
def test_the_package_reads_it_from_the_file(message, size):
    """From a grey image; it loses bits in strong colours, with the original's own code as well."""
    grey = np.random.default_rng(0).integers(64, 192, size, dtype=np.uint8)
    pixels = np.stack([grey, grey, grey], axis=-1)
    assert decode(recoded(Watermarker(message)(pixels), "png"), len(message)) == message.encode()


def test_images_too_small_for_the_watermark_stay_as_they_are():
    """The original crashed at the first save of a run below 256 x 256 pixels."""
    sizes = [(256, 256), (128, 512), (248, 256), (64, 64)]
    assert [Watermarker.fits(*size) for size in sizes] == [True, True, False, False]
    for size in sizes:
        image = noise(*size)
        marked = Watermarker()(image)
        assert marked.shape == image.shape
        assert np.array_equal(marked, image) != Watermarker.fits(*size)


def test_none_marks_nothing():
    assert np.array_equal(Watermarker("none")(noise(256, 256)), noise(256, 256))


def test_one_watermarker_for_a_message():
    assert Watermarker.of("SDV2") is Watermarker.of("SDV2")
    assert Watermarker.of("SDV2").message == "SDV2"


def test_a_missing_package_ends_only_what_needs_it(monkeypatch):
    """It ended every run with a watermark, even one whose images are all too small for any."""
    monkeypatch.setitem(sys.modules, "imwatermark", None)
    mark = Watermarker()
    assert np.array_equal(mark(noise(64, 64)), noise(64, 64))
    Watermarker("none").check()
    for use in (mark.check, lambda: mark(noise(256, 256))):
        with pytest.raises(InputError, match=r"pip install invisible-watermark.*--watermark none"):
            use()


def test_an_empty_message_is_refused():
    with pytest.raises(InputError, match="message is empty"):
        Watermarker("")


# reading


def test_blocks_are_the_packages():
    from imwatermark import WatermarkDecoder

    for image in (noise(264, 520), Watermarker()(scene(0, 256))):
        values = block_values(image, 128.0)
        bgr = np.ascontiguousarray(image[..., ::-1])
        theirs = WatermarkDecoder("bits", len(values)).decode(bgr, "dwtDct")
        sure = values % 18 != 0  # else their rounding errors decide
        assert np.mean((values % 36 > 18)[sure] == theirs[sure]) > 0.999


@pytest.mark.parametrize("size", [256, 512])
@pytest.mark.parametrize("format", FORMATS)
def test_published_watermarks_are_found(size, format):
    """In webp, whose colours have half the resolution, not in every small image."""
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


def test_images_without_a_watermark_have_none(monkeypatch):
    """Not even nearly: with a much lower threshold, neither."""
    monkeypatch.setattr("ldm.images.watermark.CERTAIN", CERTAIN - 1)
    images = [scene(seed, size) for seed in range(20) for size in (256, 512)]
    images += [noise(256, 256, seed) for seed in range(10)]
    images += [np.full((256, 256, 3), level, np.uint8) for level in (0, 77, 255)]
    stripes = np.arange(512)[None, :, None] // 32 % 2 * 200 + np.zeros((256, 1, 3), int)
    images += [stripes.astype(np.uint8), stripes.swapaxes(0, 1).astype(np.uint8)]
    for image in images:
        assert read_watermark(image) is None
        assert read_watermark(recoded(image, "jpg"), ["my own"]) is None


def test_small_images_have_no_watermark():
    assert read_watermark(noise(248, 256)) is None


@pytest.mark.parametrize("text", ["mine", "Ann 2024", "© café", "letters, 29 of them, and an y"])
def test_expected_texts_are_found_in_any_image(text):
    grey = np.repeat(np.random.default_rng(0).integers(64, 192, (512, 512, 1), dtype=np.uint8), 3, axis=2)
    for image in (grey, noise(512, 512)):
        marked = Watermarker(text)(image)
        assert read_watermark(marked, ["another", text]) == text
        assert read_watermark(marked, ["another"]) is None


def test_an_expected_text_is_found_in_a_jpeg_file():
    image, text = scene(1, 256), "a text of my very own, in 38 letters"
    jpeg = recoded(Watermarker(text)(image), "jpg")
    assert read_watermark(jpeg, ["no", text]) == text
    assert read_watermark(jpeg, ["no", text[::-1]]) is None
    assert read_watermark(image, [text, "", "x" * 1000]) is None
