"""C2PA manifests: signed, read back, and refused, with certificates made here."""

import io
import json
import re
import shutil
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("c2pa")

from certificates import Authority, key_pem, written
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa, x25519
from cryptography.hazmat.primitives.serialization import PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID
from PIL import Image

from ldm.errors import InputError
from ldm.images import provenance
from ldm.images.metadata import FORMATS, encode_image, read_source_type, read_texts
from ldm.images.provenance import (
    ALTERED,
    INVALID,
    NONE,
    TRUSTED,
    UNCHECKED,
    VALID,
    Provenance,
    read_provenance,
    signer_of,
    trusted_certificates,
)
from ldm.images.source_type import COMPOSITE, TRAINED

TEXTS = ("a cat\nSteps: 3", '{"prompt": "a cat"}')
SETTINGS = {
    "prompt": "a cat",
    "negative_prompt": "a dog",
    "sampler": "ddim",
    "checkpoint": "/home/me/model.safetensors",
    "model_hash": "fe4efff1e1",
    "version": "0.1.0",
}


@pytest.fixture(scope="module")
def authority():
    return Authority()


@pytest.fixture(scope="module")
def signed_by(authority, tmp_path_factory):
    return authority.files(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def sign(signed_by):
    return signer_of(*signed_by)


def noise(height: int = 32, width: int = 48) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def saved(path, data: bytes):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("format", FORMATS)
def test_a_signed_file_is_the_same_image_with_a_manifest(tmp_path, sign, authority, format):
    plain = saved(tmp_path / f"plain.{format}", encode_image(noise(), TEXTS, format))
    signed = saved(tmp_path / f"signed.{format}", sign(plain.read_bytes(), format, SETTINGS))
    with Image.open(plain) as one, Image.open(signed) as other:
        assert one.format == other.format == FORMATS[format]
        assert np.array_equal(np.asarray(one), np.asarray(other))
    assert read_texts(signed) == TEXTS
    assert read_source_type(signed) == TRAINED
    assert read_provenance(plain) == Provenance(NONE)
    known = {
        "signer": "Test signer, Tests",
        "generator": "stable-diffusion-toolkit 0.1.0",
        "source_type": TRAINED,
        "model": "model.safetensors",
        "model_hash": "fe4efff1e1",
    }
    assert read_provenance(signed) == Provenance(VALID, **known)
    assert read_provenance(signed, authority.pem.decode()) == Provenance(TRUSTED, **known)
    assert read_provenance(signed, Authority().pem.decode()).state == VALID


def test_prompts_are_named_where_that_is_asked_for(tmp_path, sign, signed_by):
    data = encode_image(noise(), None)
    assert b"a cat" not in sign(data, "png", SETTINGS)
    assert b"/home" not in sign(data, "png", SETTINGS)
    named = sign(data, "png", SETTINGS), signer_of(*signed_by, prompt=True)(data, "png", SETTINGS)
    found = [read_provenance(saved(tmp_path / "image.png", each)).prompt for each in named]
    assert found == [None, "a cat"]
    typed = signer_of(*signed_by, prompt=True)(data, "png", {"prompt": "caf\udce9", "sampler": "ddim"})
    assert read_provenance(saved(tmp_path / "image.png", typed)).prompt == "caf?"


def test_a_part_that_was_kept(tmp_path, sign):
    settings = SETTINGS | {"mask": "mask.png"}
    path = saved(tmp_path / "image.png", sign(encode_image(noise(), None), "png", settings))
    assert read_provenance(path).source_type == COMPOSITE


@pytest.mark.parametrize("format", FORMATS)
def test_altered_files(tmp_path, sign, authority, format):
    whole = sign(encode_image(noise(), TEXTS, format), format, SETTINGS)
    trust = authority.pem.decode()
    start = {"png": whole.rfind(b"IDAT"), "jpg": len(whole) - 120, "webp": whole.rfind(b"VP8 ")}[format]
    places = {
        "pixels": (start + 60, "the file's pixels or texts"),
        "texts": (whole.index(b"Iptc4xmpExt:DigitalSourceType>http"), "the file's pixels or texts"),
        "statement": (whole.index(b"model.safetensors"), "a statement of the manifest"),
    }
    for name, (at, what) in places.items():
        data = bytearray(whole)
        data[at] ^= 1
        found = read_provenance(saved(tmp_path / f"{name}.{format}", recounted(data, format)), trust)
        assert (found.state, found.detail) == (ALTERED, what), name


def recounted(data: bytearray, format: str) -> bytes:
    """A PNG file whose chunks have their right checksums."""
    import zlib

    at = 8
    while format == "png" and at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        end = at + 8 + length
        data[end : end + 4] = zlib.crc32(data[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(data)


def test_a_manifest_put_into_another_image(tmp_path, sign):
    signed = sign(encode_image(noise(), None), "png", SETTINGS)
    start = signed.index(b"caBX") - 4
    chunk = signed[start : start + 12 + int.from_bytes(signed[start : start + 4], "big")]
    other = encode_image(noise()[::-1], None)
    path = saved(tmp_path / "image.png", other[:33] + chunk + other[33:])
    assert read_provenance(path).state == ALTERED


def test_a_damaged_manifest_is_invalid_and_names_no_signer(tmp_path, sign):
    data = bytearray(sign(encode_image(noise(), None), "png", SETTINGS))
    data[data.index(b"caBX") + 10] ^= 0xFF
    found = read_provenance(saved(tmp_path / "image.png", recounted(data, "png")))
    assert found.state in (NONE, INVALID)
    assert found.signer is None


def test_a_file_that_only_mentions_c2pa_has_no_manifest(tmp_path):
    path = saved(tmp_path / "image.png", encode_image(noise(), ("c2pa", "{}")))
    assert read_provenance(path) == Provenance(NONE)


def test_keys_of_every_algorithm(tmp_path, authority):
    keys = {
        "es256": ec.generate_private_key(ec.SECP256R1()),
        "es384": ec.generate_private_key(ec.SECP384R1()),
        "es512": ec.generate_private_key(ec.SECP521R1()),
        "ed25519": ed25519.Ed25519PrivateKey.generate(),
        "ps256": rsa.generate_private_key(65537, 2048),
    }
    for algorithm, key in keys.items():
        sign = signer_of(*authority.files(tmp_path, key=key))
        assert sign.algorithm == algorithm
        path = saved(tmp_path / "image.png", sign(encode_image(noise(), None), "png", {}))
        assert read_provenance(path, authority.pem.decode()).state == TRUSTED


def test_the_older_form_of_a_key(tmp_path, authority):
    certificate, key = authority.issue()
    cert, file = written(tmp_path, certificate, key_pem(key, format=PrivateFormat.TraditionalOpenSSL))
    assert b"BEGIN EC PRIVATE KEY" in file.read_bytes()
    assert signer_of(cert, file).algorithm == "es256"


def unfit(authority: Authority) -> dict[str, tuple[bytes, object, str]]:
    """Certificates and keys that cannot be used, with what is said of them."""
    certificate, key = authority.issue()
    leaf, end = certificate.split(b"-----END CERTIFICATE-----\n")[0], b"-----END CERTIFICATE-----\n"
    other = ec.generate_private_key(ec.SECP256R1())
    koblitz, small = ec.generate_private_key(ec.SECP256K1()), rsa.generate_private_key(65537, 1024)
    exchange = x25519.X25519PrivateKey.generate()
    return {
        "other key": (
            certificate,
            other,
            r"cert\.pem: this certificate does not belong to the key .*key\.pem",
        ),
        "order": (authority.pem + leaf + end, key, "the certificate of the key must be the first"),
        "expired": (*authority.issue(days=-1), r"cert\.pem: the certificate expired on 20\d\d-"),
        "of a web server": (
            *authority.issue(usage=ExtendedKeyUsageOID.SERVER_AUTH),
            "C2PA does not allow this certificate .* emailProtection",
        ),
        "no usage": (*authority.issue(usage=None), "C2PA does not allow this certificate"),
        "of an authority": (authority.pem, authority.key, "signed by itself, which C2PA does not allow"),
        "curve": (*authority.issue(koblitz), r"key\.pem: C2PA knows no EC keys on secp256k1; it takes an EC"),
        "short": (*authority.issue(small), r"key\.pem: an RSA key of 1,024 bits; C2PA takes"),
        "no signatures": (*authority.issue(exchange), r"key\.pem: C2PA has no signatures of such a key"),
        "no certificate": (b"rubbish", key, r"cert\.pem: this file holds no certificate in PEM form$"),
        "no key": (certificate, b"rubbish", r"key\.pem: this file holds no private key in PEM form"),
        "exchanged": (key_pem(key), certificate, r"it is a private key: the certificate comes first"),
        "password": (certificate, key_pem(key, b"secret"), r"key\.pem: the key has a password; `openssl"),
    }


def test_what_cannot_be_used_is_said_in_one_line(tmp_path, authority):
    for name, (certificate, key, message) in unfit(authority).items():
        with pytest.raises(InputError) as caught:
            signer_of(*written(tmp_path, certificate, key))
        text = str(caught.value)
        assert text.startswith("--sign "), name
        assert re.search(message, text), (name, text)
        assert "\n" not in text
        assert "PRIVATE" not in text


def test_files_that_are_not_there(tmp_path, signed_by):
    for pair in ((tmp_path / "nowhere.pem", signed_by[1]), (signed_by[0], tmp_path / "nowhere.pem")):
        with pytest.raises(InputError, match=r"--sign .*nowhere\.pem: No such file"):
            signer_of(*pair)
    with pytest.raises(InputError, match=r"--sign .*: Is a directory"):
        signer_of(tmp_path, signed_by[1])
    with pytest.raises(InputError, match=r"--trust .*key\.pem: this file holds no certificate"):
        trusted_certificates(signed_by[1])


def test_without_the_package(tmp_path, signed_by, sign, monkeypatch):
    path = saved(tmp_path / "image.png", sign(encode_image(noise(), None), "png", {}))
    monkeypatch.setitem(__import__("sys").modules, "c2pa", None)
    with pytest.raises(InputError, match=r'c2pa-python .*; run `pip install -e "\.\[provenance\]"`'):
        signer_of(*signed_by)
    assert read_provenance(path).state == UNCHECKED


def test_a_certificate_that_expires_during_a_run(sign, authority, tmp_path):
    certificate, key = authority.issue(days=-1)
    late = provenance.Signer(certificate, key_pem(key), "es256")
    with pytest.raises(InputError, match="--sign: the file cannot be signed: "):
        late(encode_image(noise(), None), "png", SETTINGS)


def test_threads_share_a_signer(sign, tmp_path):
    data = encode_image(noise(), None)
    models = [f"{i}.ckpt" for i in range(24)]
    with ThreadPoolExecutor(4) as threads:
        files = list(threads.map(lambda model: sign(data, "png", SETTINGS | {"checkpoint": model}), models))
    found = [read_provenance(saved(tmp_path / "image.png", each)).model for each in files]
    assert found == models


def test_an_address_in_a_file_is_never_visited(tmp_path):
    """XMP may say that the manifest is kept elsewhere; reading a file must not tell its author so."""
    visits = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)

        def wait() -> None:
            while True:
                connection, _ = server.accept()
                with connection:
                    if connection.recv(4) == b"done":
                        return
                    visits.append(connection)

        thread = threading.Thread(target=wait)
        thread.start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}/manifest.c2pa"
        packet = (
            '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
            '<rdf:Description rdf:about="" xmlns:dcterms="http://purl.org/dc/terms/" '
            f'dcterms:provenance="{address}"/></rdf:RDF></x:xmpmeta>'
        )
        file = io.BytesIO()
        Image.fromarray(noise()).save(file, format="JPEG", xmp=packet.encode())
        found = read_provenance(saved(tmp_path / "c2pa.jpg", file.getvalue()))
        with socket.create_connection(server.getsockname()) as last:
            last.send(b"done")
        thread.join()
    assert visits == []
    assert found.state in (NONE, INVALID)


def test_statements_of_other_programs_cannot_break_the_reader():
    odd = {"action": "c2pa.created", "digitalSourceType": 3, "parameters": None}
    manifest = {
        "claim_generator_info": [],
        "assertions": [
            {"label": "c2pa.actions", "data": {"actions": ["text", odd]}},
            {"label": "c2pa.ai-disclosure", "data": {"modelName": ["x"], "modelIdentifier": "urn:model"}},
        ],
    }
    store = {"active_manifest": "a", "manifests": {"a": manifest}, "validation_state": "Valid"}
    assert provenance._judged(json.loads(json.dumps(store))) == Provenance(VALID, model_hash="urn:model")


def test_the_certificate_of_the_documentation(tmp_path):
    """C2PA refuses many that openssl makes; the page's lines are run as they stand there."""
    if (
        shutil.which("openssl") is None
        or b"-CA" not in subprocess.run(["openssl", "req", "-help"], capture_output=True).stderr
    ):
        pytest.skip("there is no openssl of version 3")
    page = (Path(__file__).parents[2] / "docs/provenance.md").read_text()
    lines = re.search(r"```sh\n(openssl .*?)```", page, re.S)[1]
    subprocess.run(["sh", "-ec", lines], cwd=tmp_path, check=True, capture_output=True)
    sign = signer_of(tmp_path / "cert.pem", tmp_path / "key.pem")
    path = saved(tmp_path / "image.png", sign(encode_image(noise(), None), "png", SETTINGS))
    found = read_provenance(path, trusted_certificates(tmp_path / "authority.pem"))
    assert (found.state, found.signer) == (TRUSTED, "My images, Me")
