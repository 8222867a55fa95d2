"""Files into arrays, and arrays into the size of a batch."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from image_sets import encoded, image
from PIL import Image

from ldm.training.data.example import DamagedExample, Example
from ldm.training.data.images import (
    crop_box,
    decode,
    decode_map,
    decode_size,
    fitted,
    mirrored,
    part,
    tensors,
)


def saved(picture: Image.Image, form: str = "png", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def test_an_image_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(7, 20, 10))
    for data in (tmp_path / "a.png", encoded(7, 20, 10), encoded(7, 20, 10, "webp")):
        assert decode(data, "a").shape == (10, 20, 3)
        assert decode_size(data, "a") == (20, 10)
    assert np.array_equal(decode(tmp_path / "a.png", "a"), image(7, 20, 10))


def test_transparent_pixels_become_white() -> None:
    picture = np.zeros((4, 4, 4), np.uint8)
    picture[:2] = 10, 20, 30, 255
    pixels = decode(saved(Image.fromarray(picture)), "a")
    assert (pixels[:2] == (10, 20, 30)).all()
    assert (pixels[2:] == 255).all()


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "CMYK", "RGB"])
def test_every_mode_has_three_channels(mode: str) -> None:
    picture = Image.fromarray(image(3)).convert(mode)
    assert decode(saved(picture, "jpeg" if mode == "CMYK" else "png"), "a").shape == (32, 32, 3)


def test_sixteen_bits_become_eight() -> None:
    values = np.array([[0, 257, 65535]], np.uint16)
    assert decode(saved(Image.fromarray(values)), "a")[0, :, 0].tolist() == [0, 1, 255]


def test_a_photograph_on_its_side_is_turned() -> None:
    """Cameras write how they were held into EXIF data."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = np.zeros((20, 40, 3), np.uint8)
    picture[:, :20] = 255
    data = saved(Image.fromarray(picture), "jpeg", exif=exif)
    pixels = decode(data, "a")
    assert pixels.shape == (40, 20, 3)
    assert decode_size(data, "a") == (20, 40)
    assert pixels[:15].mean() > 200 > 50 > pixels[25:].mean()


@pytest.mark.parametrize(
    "data",
    [b"", b"not an image", encoded(1)[:60], encoded(1, form="jpeg")[:-300], encoded(2)[:40] + b"x" * 3000],
    ids=["empty", "text", "header alone", "truncated jpeg", "garbage inside"],
)
def test_damaged_files_are_named(data: bytes) -> None:
    with pytest.raises(DamagedExample) as error:
        decode(data, "folder/a.jpg")
    assert error.value.key == "folder/a.jpg"
    assert "0x" not in error.value.why


def test_a_missing_file_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(DamagedExample, match=r"gone\.png: No such file"):
        decode_size(tmp_path / "gone.png", "gone.png")


def test_maps() -> None:
    shades = Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8))
    assert decode_map(saved(shades), "mask", "a").tolist() == [[0, 0, 1, 1]]
    assert decode_map(saved(shades), "depth", "a").tolist() == [[0, 127, 128, 255]]
    deep = Image.fromarray(np.array([[1, 40000]], np.uint16))
    assert decode_map(saved(deep), "depth", "a").tolist() == [[1, 40000]]
    assert decode_map(encoded(4), "control", "a").shape == (32, 32, 3)


@pytest.mark.parametrize("wanted", [(8, 8), (16, 8), (8, 16), (64, 64)])
@pytest.mark.parametrize("size", [(32, 32), (40, 30), (30, 41)])
def test_the_largest_part_of_the_shape_is_kept(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    for x, y in ((0, 0), (0.5, 0.5), (1, 1)):
        left, top, right, bottom = crop_box(size, wanted, x, y)
        assert (right - left) / (bottom - top) == pytest.approx(wanted[0] / wanted[1])
        assert right - left == pytest.approx(size[0]) or bottom - top == pytest.approx(size[1])
        assert 0 <= left <= right <= size[0]
        assert 0 <= top <= bottom <= size[1]
    left, top, right, bottom = crop_box(size, wanted, 0.5, 0.5)
    assert left + right == pytest.approx(size[0])
    assert top + bottom == pytest.approx(size[1])


def test_an_image_of_the_right_size_stays_as_it_is() -> None:
    example = Example("a", image(1), "")
    assert fitted(example, (32, 32)).image is example.image


def test_the_shorter_side_is_resized_and_the_rest_cut_off() -> None:
    example = Example("a", image(1, 64, 32), "")
    whole = np.asarray(Image.fromarray(example.image).resize((32, 16), Image.Resampling.LANCZOS))
    assert np.array_equal(fitted(example, (16, 16)).image, whole[:, 8:24])
    assert np.array_equal(fitted(example, (16, 16), x=0.0).image, whole[:, :16])
    assert np.array_equal(fitted(example, (16, 16), x=1.0).image, whole[:, 16:])


def with_maps(width: int = 32, height: int = 24) -> Example:
    rows = np.linspace(0, 1, height, dtype=np.float32)[:, None].repeat(width, 1)
    maps = {
        "mask": (rows > 0.5).astype(np.float32),
        "depth": rows,
        "control": image(5, width, height),
        "small": image(6, width // 4, height // 4),
    }
    return Example("a", image(4, width, height), "words", maps)


def test_maps_follow_their_image() -> None:
    shrunk = fitted(with_maps(), (16, 16))
    assert {name: x.shape for name, x in shrunk.maps.items()} == {
        "mask": (16, 16),
        "depth": (16, 16),
        "control": (16, 16, 3),
        "small": (4, 4, 3),
    }
    assert set(np.unique(shrunk.maps["mask"])) == {0.0, 1.0}
    assert (np.diff(shrunk.maps["depth"][:, 0]) > 0).all()


def test_mirroring_twice_changes_nothing() -> None:
    example = with_maps()
    once, twice = mirrored(example), mirrored(mirrored(example))
    assert np.array_equal(once.image[:, 0], example.image[:, -1])
    for name, values in example.maps.items():
        assert np.array_equal(once.maps[name][:, ::-1], values)
        assert np.array_equal(twice.maps[name], values)


@pytest.mark.parametrize(("x", "y"), [(0, 0), (0.3, 0.6), (0.999, 0.999)])
def test_parts_of_image_and_maps_lie_at_one_place(x: float, y: float) -> None:
    example = with_maps()
    cut = part(example, 8, x, y)
    places = [
        (top, left)
        for top in range(0, 17, 4)
        for left in range(0, 25, 4)
        if np.array_equal(example.image[top : top + 8, left : left + 8], cut.image)
    ]
    ((top, left),) = places
    assert np.array_equal(cut.maps["control"], example.maps["control"][top : top + 8, left : left + 8])
    small = example.maps["small"][top // 4 : top // 4 + 2, left // 4 : left // 4 + 2]
    assert np.array_equal(cut.maps["small"], small)


def test_tensors() -> None:
    found = tensors(with_maps())
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "image": (3, 24, 32),
        "mask": (1, 24, 32),
        "depth": (1, 24, 32),
        "control": (3, 24, 32),
        "small": (3, 6, 8),
    }
    assert all(x.dtype == torch.float32 for x in found.values())
    assert found["image"][:, 0, 0].tolist() == pytest.approx([4 / 127.5 - 1, -1, 200 / 127.5 - 1])
    assert found["control"][:, 0, 0].tolist() == pytest.approx([5 / 255, 0, 200 / 255])


@pytest.mark.parametrize("size", [(32, 24), (16, 12), (64, 48), (33, 25)])
def test_maps_of_another_size_become_as_large_as_their_image(size: tuple[int, int]) -> None:
    """They stayed smaller or larger by their factor, and examples of different ones made no batch."""
    alike = with_maps()
    maps = with_maps(*size).maps | {"small": image(6, *size)}
    found = fitted(Example("a", alike.image, "", maps), (16, 16)).maps
    shapes = {name: x.shape for name, x in found.items()}
    assert shapes == {"mask": (16, 16), "depth": (16, 16), "control": (16, 16, 3), "small": (4, 4, 3)}
    assert set(np.unique(found["mask"])) == {0.0, 1.0}
    depths = fitted(alike, (16, 16)).maps["depth"]
    assert np.abs(found["depth"] - depths).max() < 0.05, "it shows the same part"


def test_a_map_of_another_aspect_ratio_is_damaged() -> None:
    """It was cut to another part than its image."""
    example = Example("a", image(1, 32, 24), "", {"depth": np.zeros((32, 32), np.float32)})
    with pytest.raises(DamagedExample) as error:
        fitted(example, (16, 16))
    assert str(error.value) == "a: its depth has another aspect ratio: 32x32 pixels, and the image 32x24"


@pytest.mark.parametrize("name", ["mask", "depth", "control"])
def test_maps_are_turned_upright_as_images_are(name: str) -> None:
    """A mask that a camera's program had turned by EXIF lay on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(Image.new("L", (8, 4)), exif=exif)
    assert decode_map(data, name, "a").shape[:2] == (8, 4)
