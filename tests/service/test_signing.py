"""--sign of a service: its options, and the files that it answers with."""

import io
from types import SimpleNamespace

import pytest

pytest.importorskip("c2pa")

from certificates import Authority
from image_files import noise

from ldm.cli.parser import serve_parser
from ldm.errors import FieldError
from ldm.images.metadata import read_source_type, read_texts
from ldm.images.provenance import TRUSTED, read_provenance, signer_of
from ldm.images.source_type import COMPOSITE
from ldm.pipeline.generated import GeneratedImage
from ldm.pipeline.request import ImageRequest
from ldm.service.options import ServiceOptions
from ldm.service.outputs import encoded


@pytest.mark.parametrize("format", ["png", "jpg", "webp"])
def test_answers_are_signed(tmp_path, format):
    authority = Authority()
    request = ImageRequest(
        "a cat", width=24, height=16, init_img="a.png", mask="b.png", strength=1.0, watermark="none"
    )
    image = GeneratedImage(request, noise(16, 24), None, 0.1, SimpleNamespace(facts={}))
    path = tmp_path / f"image.{format}"
    path.write_bytes(encoded(image, format, signer_of(*authority.files(tmp_path))))
    found = read_provenance(path, authority.pem.decode())
    assert (found.state, found.source_type, read_source_type(path)) == (TRUSTED, COMPOSITE, COMPOSITE)
    assert read_texts(path) == read_texts(io.BytesIO(encoded(image, format)))


def test_options():
    args = serve_parser().parse_args(["--sign", "cert.pem", "key.pem", "--sign_prompt"])
    assert (args.sign, args.sign_prompt) == (["cert.pem", "key.pem"], True)
    assert ServiceOptions(sign=args.sign, sign_prompt=True).sign == ("cert.pem", "key.pem")
    with pytest.raises(FieldError, match="sign_prompt without sign"):
        ServiceOptions(sign_prompt=True)
