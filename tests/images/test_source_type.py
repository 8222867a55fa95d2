"""IPTC's digital source type in files: written, read back, and as other programs write it."""

import io
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from ldm.images.metadata import FORMATS, encode_image, read_source_type
from ldm.images.source_type import COMPOSITE, TRAINED, source_type, source_type_in, xmp_packet

NAMES = {
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "iptc": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
}


def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("texts", [None, ("a cat\nSteps: 3", "{}")])
def test_every_file_has_it(tmp_path, format, texts):
    for source in (TRAINED, COMPOSITE):
        path = tmp_path / f"image.{format}"
        path.write_bytes(encode_image(noise(), texts, format, source=source))
        assert read_source_type(path) == source
    path.write_bytes(encode_image(noise(), texts, format))
    assert read_source_type(path) == TRAINED


def test_where_other_programs_look_for_it():
    packet = xmp_packet(TRAINED)
    found = ElementTree.fromstring(re.sub(r"<\?xpacket.*?\?>", "", packet)).find(
        ".//iptc:DigitalSourceType", NAMES
    )
    assert found.text == "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    jpeg, webp, png = (encode_image(noise(), None, format) for format in ("jpg", "webp", "png"))
    assert b"http://ns.adobe.com/xap/1.0/\0" + packet.encode() in jpeg
    assert b"XMP " + len(packet.encode()).to_bytes(4, "little") + packet.encode() in webp
    assert b"iTXtXML:com.adobe.xmp\0\0\0\0\0" + packet.encode() in png


def test_the_a1111_text_stays_the_first_of_a_png_file():
    data = encode_image(noise(), ("a cat\nSteps: 3", "{}"))
    assert re.findall(rb"tEXt(\w+)|iTXt(XML)", data)[:1] == [(b"parameters", b"")]
    assert next(iter(Image.open(io.BytesIO(data)).info)) == "parameters"


def test_the_type_of_settings():
    made = {"sampler": "ddim", "init_img": "a.png"}
    assert source_type({}) == source_type(made) == source_type(made | {"mask": None}) == TRAINED
    assert source_type(made | {"mask": "mask.png"}) == COMPOSITE
    assert source_type(made | {"outpaint": (0, 0, 64, 0)}) == COMPOSITE
    assert source_type({"init_img": "a.png", "prompt": ""}) == COMPOSITE  # of a pixel upscaler


def test_other_forms():
    address = "http://cv.iptc.org/newscodes/digitalsourcetype/digitalCapture"
    attribute = f'<rdf:Description Iptc4xmpExt:DigitalSourceType="{address}" x="y"/>'
    assert source_type_in(attribute) == source_type_in(attribute.encode()) == "digitalCapture"
    assert source_type_in(f"<e:DigitalSourceType>\n{address}\n</e:DigitalSourceType>") == "digitalCapture"
    assert source_type_in("<e:DigitalSourceType>own</e:DigitalSourceType>") == "own"
    for nothing in (None, "", b"\xff\xfe", "<x/>", "<e:DigitalSourceType/>", "DigitalSourceTypes=5"):
        assert source_type_in(nothing) is None


def test_a_file_of_before_has_none(tmp_path):
    for format, name in FORMATS.items():
        path = tmp_path / f"old.{format}"
        Image.fromarray(noise()).save(path, format=name)
        assert read_source_type(path) is None
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", "DigitalSourceType=x")
    Image.fromarray(noise()).save(tmp_path / "prompt.png", pnginfo=chunks)
    assert read_source_type(tmp_path / "prompt.png") is None
