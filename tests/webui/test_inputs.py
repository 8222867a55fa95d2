import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from exif_data import damaged_exif
from PIL import Image

from ldm.errors import InputError
from ldm.webui.inputs import read_editor, read_upload


def file_of(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_an_upload_stands_upright(tmp_path: Path) -> None:
    image, exif = Image.new("RGB", (4, 2), "red"), Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "a.png", exif=exif)
    found = read_upload(str(tmp_path / "a.png"), "Image", 100)
    assert (found.size, found.filename) == ((2, 4), "a.png")
    assert read_upload(None, "Image", 100) is None


def test_an_upload_with_damaged_exif_data_is_read(tmp_path: Path) -> None:
    """The page answered "'IFDRational' object has no attribute 'encode'"."""
    Image.new("RGB", (4, 2), "red").save(tmp_path / "a.jpg", exif=damaged_exif())
    assert read_upload(str(tmp_path / "a.jpg"), "Image", 100).size == (2, 4)


def test_an_upload_that_is_no_image_is_refused_without_its_folder(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(InputError, match=r"Image: cannot read the image a\.png") as caught:
        read_upload(str(tmp_path / "a.png"), "Image", 100)
    assert str(tmp_path) not in str(caught.value)


def test_a_large_upload_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    Image.new("1", (20_000, 5_000)).save(tmp_path / "bomb.png")
    with pytest.raises(InputError, match=r"^Image: (bomb\.png has too|20000x5000 is 100)"):
        read_upload(str(tmp_path / "bomb.png"), "Image", 4_000_000)
    with pytest.raises(InputError, match=r"^Image: 4x4 is 16 pixels; --max_pixels allows 15$"):
        read_editor({"background": file_of(Image.new("RGBA", (4, 4))), "layers": []}, 15)
    value = {"background": file_of(Image.new("RGB", (4, 4))), "layers": [file_of(Image.new("RGBA", (4, 5)))]}
    with pytest.raises(InputError, match=r"^Mask: 4x5 is 20 pixels"):
        read_editor(value, 16)


def test_the_mask_is_where_something_was_drawn() -> None:
    drawn, touched = Image.new("RGBA", (8, 8)), Image.new("RGBA", (8, 8))
    drawn.paste((214, 0, 108, 255), (0, 0, 4, 8))
    touched.paste((214, 0, 108, 10), (6, 6, 8, 8))  # the rim of a brush
    background = file_of(Image.new("RGBA", (8, 8), "blue"))
    drawn, touched = file_of(drawn), file_of(touched)
    image, mask = read_editor({"background": background, "layers": [drawn, touched]}, 100)
    assert (image.mode, mask.mode) == ("RGB", "L")
    expected = np.zeros((8, 8), np.uint8)
    expected[:, :4] = 255
    assert np.array_equal(np.asarray(mask), expected)
    assert read_editor({"background": background, "layers": [touched]}, 100)[1] is None
    assert read_editor(None, 100) == (None, None)


def test_transparency_of_the_image_stays() -> None:
    image, _ = read_editor({"background": file_of(Image.new("RGBA", (8, 8), (1, 2, 3, 4)))}, 100)
    assert image.mode == "RGBA"


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_an_image_of_print_is_converted(tmp_path: Path, format: str) -> None:
    """A JPEG file in CMYK could not be saved as the PNG file that the command starts from."""
    image = Image.new("CMYK" if format == "JPEG" else "I;16", (4, 4))
    image.save(tmp_path / "a.file", format)
    found = read_upload(str(tmp_path / "a.file"), "Image", 100)
    found.save(tmp_path / "init.png")
    if format == "JPEG":
        assert (found.mode, found.getpixel((0, 0))) == ("RGB", (255, 255, 255))
        found, _ = read_editor({"background": SimpleNamespace(path=str(tmp_path / "a.file"))}, 100)
        assert found.mode == "RGB"


def test_a_mistake_is_said_once(tmp_path: Path) -> None:
    """The place stood twice: "Image: Image: 4x4 is ..."."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"^Image: 4x4 is 16 pixels; --max_pixels allows 15$"):
        read_upload(str(tmp_path / "a.png"), "Image", 15)
    with pytest.raises(InputError, match=r"^Image: cannot read the image that was sent: it is no PNG"):
        read_editor({"background": b"no image"}, 15)
