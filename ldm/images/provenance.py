"""C2PA manifests: who signed an image file, what made it, and whether it has been altered since.

A manifest is a signed list of statements inside a file ("Content Credentials"). The signature covers every
other byte of the file: pixels, settings and XMP. Source: C2PA Technical Specification 2.4,
https://spec.c2pa.org. The package c2pa-python writes and checks manifests; nothing here uses the network, so
there is no time stamp of an authority, no manifest kept elsewhere and no question about revocation.

`signer_of(cert, key)` gives a function that signs the bytes of a PNG, JPEG or WebP file; `read_provenance`
says what is known about a file's manifest.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from PIL import Image

from ldm import __version__
from ldm.errors import InputError
from ldm.images.metadata import open_image
from ldm.images.source_type import source_address, source_type

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

GENERATOR = "stable-diffusion-toolkit"
MIME_TYPES = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}  # of the formats that we write
ACTIONS, DISCLOSURE = "c2pa.actions.v2", "c2pa.ai-disclosure"  # labels of the statements
# Of everything that would use the network, and of images inside the manifest.
_SETTINGS = {
    "version": 1,
    "builder": {"thumbnail": {"enabled": False}},
    "core": {"allowed_network_hosts": []},
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
}
_CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
_KEYS = "an EC key on P-256, P-384 or P-521, an Ed25519 key, or an RSA key of at least 2,048 bits"
_HELP = "docs/provenance.md shows how to make a certificate"

# What `read_provenance` can find.
NONE = "none"
TRUSTED = "trusted"  # valid, and signed with a certificate that a trusted authority issued
VALID = "valid"  # whoever signed it: the certificate is not known to be trusted
ALTERED = "altered"  # after it was signed
INVALID = "invalid"  # for another reason, such as a certificate that has expired
UNCHECKED = "not checked"  # there is one, and c2pa-python is not installed

_ALTERED = {
    "assertion.dataHash.mismatch": "the file's pixels or texts",
    "assertion.hashedURI.mismatch": "a statement of the manifest",
    "claimSignature.mismatch": "the manifest's claim or its signature",
    "assertion.missing": "a statement of the manifest is missing",
}
_UNTRUSTED = "signingCredential.untrusted"


def _library() -> Any:
    """The package c2pa; InputError if it is not installed."""
    try:
        import c2pa
    except ImportError as error:
        raise InputError(
            f'C2PA manifests need the package c2pa-python ({error}); run `pip install -e ".[provenance]"`'
        ) from error
    return c2pa


class Signer:
    """Signs image files. It may be called by several threads; see `signer_of`.

    `prompt` says whether manifests name the prompts, too.
    """

    def __init__(self, chain: bytes, key: bytes, algorithm: str, prompt: bool = False):
        self._chain, self._key, self.algorithm, self.prompt = chain, key, algorithm, prompt

    def __call__(self, data: bytes, format: str, settings: Mapping[str, Any]) -> bytes:
        """A file's bytes, of a format of `MIME_TYPES`, with a manifest; the pixels stay as they are.

        The `settings` of the image say what made it. InputError if it cannot be signed, as with a certificate
        that has expired since the start.
        """
        try:
            return self._signed(data, format, self.manifest(settings))
        except _library().C2paError as error:
            raise InputError(f"--sign: the file cannot be signed: {_reason(error)}") from None

    def manifest(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The statements of a manifest, as c2pa takes them."""
        created = {"action": "c2pa.created", "digitalSourceType": source_address(source_type(settings))}
        if self.prompt:
            prompts = {name: settings.get(name) for name in ("prompt", "negative_prompt")}
            created["parameters"] = {name: _encodable(text) for name, text in prompts.items() if text}
        assertions = [{"label": ACTIONS, "data": {"actions": [created]}}]
        if settings.get("checkpoint"):
            model = {
                "modelType": "c2pa.types.model",
                "modelName": _encodable(PurePath(str(settings["checkpoint"])).name),
            }
            if settings.get("model_hash"):
                model["modelIdentifier"] = f"sha256:{settings['model_hash']}"
            assertions.append({"label": DISCLOSURE, "data": model})
        generator = {"name": GENERATOR, "version": settings.get("version") or __version__}
        return {"claim_generator_info": [generator], "assertions": assertions}

    def _signed(self, data: bytes, format: str, manifest: dict[str, Any]) -> bytes:
        c2pa = _library()
        info = c2pa.C2paSignerInfo(
            alg=self.algorithm.encode(), sign_cert=self._chain, private_key=self._key, ta_url=None
        )
        signed = io.BytesIO()
        verify = _SETTINGS["verify"] | {"verify_trust": False}  # whom readers trust is theirs to say
        with (
            c2pa.Settings.from_dict(_SETTINGS | {"verify": verify}) as settings,
            c2pa.Context(settings) as context,
            c2pa.Signer.from_info(info) as signer,
            c2pa.Builder(manifest, context=context) as builder,
        ):
            builder.sign(signer, MIME_TYPES[format], io.BytesIO(data), signed)
        return signed.getvalue()


def signer_of(cert: str | Path, key: str | Path, prompt: bool = False) -> Signer:
    """What signs with a certificate, followed by those that lead to its authority, and its private key.

    Both are PEM files, the key without a password. InputError, of one line, for files that cannot be read, a
    certificate that has expired, that does not belong to the key or that C2PA does not allow. A small image
    is signed to try them.
    """
    library = _library()
    from cryptography.hazmat.primitives import serialization

    chain, private = _certificates(cert), _private_key(key)
    leaf = chain[0]
    public = private.public_key()
    if leaf.public_key() != public:
        if any(other.public_key() == public for other in chain[1:]):
            raise InputError(f"--sign {cert}: the certificate of the key must be the first in the file")
        raise InputError(f"--sign {cert}: this certificate does not belong to the key {key}")
    algorithm = _algorithm(private, key)
    now = datetime.now(UTC)
    if now >= leaf.not_valid_after_utc:
        raise InputError(f"--sign {cert}: the certificate expired on {leaf.not_valid_after_utc:%Y-%m-%d}")
    if now < leaf.not_valid_before_utc:
        raise InputError(f"--sign {cert}: the certificate is valid from {leaf.not_valid_before_utc:%Y-%m-%d}")
    if leaf.issuer == leaf.subject:
        raise InputError(
            f"--sign {cert}: the certificate is signed by itself, which C2PA does not allow; {_HELP}"
        )
    pem = serialization.Encoding.PEM
    signer = Signer(
        b"".join(each.public_bytes(pem) for each in chain),
        private.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        algorithm,
        prompt,
    )
    tried = io.BytesIO()
    Image.new("RGB", (8, 8)).save(tried, format="PNG")
    try:
        signer._signed(tried.getvalue(), "png", signer.manifest({}))
    except library.C2paError as error:
        raise InputError(
            f"--sign {cert}: C2PA does not allow this certificate ({_reason(error)}); it needs the key usage "
            f"digitalSignature, the extended key usage emailProtection, and no authority of its own; {_HELP}"
        ) from None
    return signer


def _certificates(path: str | Path) -> list[Certificate]:
    from cryptography import x509

    data = _file(path)
    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError:
        other = "; it is a private key: the certificate comes first" if b"PRIVATE KEY-----" in data else ""
        raise InputError(f"--sign {path}: this file holds no certificate in PEM form{other}") from None


def _private_key(path: str | Path) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    data = _file(path)
    try:
        return serialization.load_pem_private_key(data, None)
    except TypeError:
        raise InputError(
            f"--sign {path}: the key has a password; `openssl pkey -in KEY.pem -out PLAIN.pem` takes it off"
        ) from None
    except (ValueError, UnsupportedAlgorithm):  # whose messages are not shown: they may quote the file
        raise InputError(
            f"--sign {path}: this file holds no private key in PEM form; needed is {_KEYS}"
        ) from None


def _algorithm(key: Any, path: str | Path) -> str:
    """C2PA's name of the algorithm that a key signs with."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if isinstance(key, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(key, ec.EllipticCurvePrivateKey):
        if key.curve.name not in _CURVES:
            raise InputError(f"--sign {path}: C2PA knows no EC keys on {key.curve.name}; it takes {_KEYS}")
        return _CURVES[key.curve.name]
    if isinstance(key, rsa.RSAPrivateKey):
        if key.key_size < 2048:
            raise InputError(f"--sign {path}: an RSA key of {key.key_size:,} bits; C2PA takes {_KEYS}")
        return "ps256"
    raise InputError(f"--sign {path}: C2PA has no signatures of such a key; it takes {_KEYS}")


def _file(path: str | Path, option: str = "--sign") -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise InputError(f"{option} {path}: {getattr(error, 'strerror', None) or error}") from None


def _reason(error: Exception) -> str:
    """c2pa's message in one line, without the name of its class and the addresses inside the manifest."""
    lines = [line.strip() for line in str(error).split("\n")]
    return " ".join(line.split(" (self#")[0] for line in lines).split(": ", 1)[-1]


def _encodable(text: str) -> str:
    """A text without the lone surrogates of a prompt that was typed in another encoding than UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


@dataclass(frozen=True)
class Provenance:
    """What a file's manifest says, and whether it can be believed."""

    state: str  # NONE, TRUSTED, VALID, ALTERED, INVALID or UNCHECKED
    detail: str | None = None  # what was altered, or is invalid
    signer: str | None = None  # common name and organisation of the certificate
    generator: str | None = None  # name and version of the program
    source_type: str | None = None
    model: str | None = None
    model_hash: str | None = None
    prompt: str | None = None

    @property
    def facts(self) -> dict[str, str]:
        """What is known, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        trust = {VALID: "; the certificate is not known to be trusted", TRUSTED: "; trusted"}
        by = f", signed by {self.signer}" if self.signer else ""
        state = VALID if self.state == TRUSTED else self.state
        return f"{state}{detail}{by}{trust.get(self.state, '')}"


def trusted_certificates(path: str | Path) -> str:
    """The certificates of a PEM file, as text. InputError if it cannot be read or holds none."""
    _library()
    from cryptography.hazmat.primitives.serialization import Encoding

    try:
        return b"".join(each.public_bytes(Encoding.PEM) for each in _certificates(path)).decode()
    except InputError as error:
        raise InputError(str(error).replace("--sign", "--trust", 1)) from None


def read_provenance(path: str | Path, trusted: str | None = None) -> Provenance:
    """What is known about the manifest of an image file.

    `trusted` are certificates of authorities in PEM form: who was issued one by them is trusted.
    InputError if the file cannot be read.
    """
    data = _file(path, "cannot read the image")
    if b"c2pa" not in data:  # a manifest's label; the package need not be imported for other files
        return Provenance(NONE)
    try:
        c2pa = _library()
    except InputError:
        return Provenance(UNCHECKED, "c2pa-python is not installed")
    settings = dict(_SETTINGS)
    if trusted:
        settings["trust"] = {"trust_anchors": trusted}
    with open_image(path) as image:
        format = image.get_format_mimetype()
    try:
        with (
            c2pa.Settings.from_dict(settings) as chosen,
            c2pa.Context(chosen) as context,
            c2pa.Reader(format, io.BytesIO(data), context=context) as reader,
        ):
            store = json.loads(reader.json())
    except c2pa.C2paError.ManifestNotFound:
        return Provenance(NONE)
    except c2pa.C2paError as error:
        return Provenance(INVALID, f"the manifest cannot be read: {_reason(error)}")
    return _judged(store)


def _judged(store: Mapping[str, Any]) -> Provenance:
    """The state of a manifest store as c2pa reports it, and its statements."""
    results = store.get("validation_results", {}).get("activeManifest", {})
    failures = {each["code"]: each.get("explanation", "") for each in results.get("failure", ())}
    others = {code: text for code, text in failures.items() if code != _UNTRUSTED}
    detail = None
    if altered := [words for code, words in _ALTERED.items() if code in others]:
        state, detail = ALTERED, ", ".join(altered)
    elif others or store.get("validation_state") == "Invalid":
        state, detail = INVALID, ", ".join(text or code for code, text in others.items()) or None
    else:
        state = VALID if _UNTRUSTED in failures or store.get("validation_state") != "Trusted" else TRUSTED
    manifest = store.get("manifests", {}).get(store.get("active_manifest"), {})
    return Provenance(state, detail, **_statements(manifest))


def _statements(manifest: Mapping[str, Any]) -> dict[str, str | None]:
    signed = manifest.get("signature_info") or {}
    names = [signed[name] for name in ("common_name", "issuer") if signed.get(name)]
    generators = manifest.get("claim_generator_info") or [{}]
    program = [generators[0][name] for name in ("name", "version") if generators[0].get(name)]
    stated = {each["label"]: each.get("data") or {} for each in manifest.get("assertions", ())}
    actions = [action for label in ("c2pa.actions", ACTIONS) for action in _actions(stated.get(label))]
    created = next((each for each in actions if each.get("digitalSourceType")), {})
    model = stated.get(DISCLOSURE, {})
    return {
        "signer": ", ".join(map(str, dict.fromkeys(names))) or None,
        "generator": " ".join(map(str, program)) or None,
        "source_type": _text(created.get("digitalSourceType"), "/"),
        "model": _text(model.get("modelName")),
        "model_hash": _text(model.get("modelIdentifier"), "sha256:"),
        "prompt": _text((created.get("parameters") or {}).get("prompt")),
    }


def _actions(data: Any) -> list[dict[str, Any]]:
    return [each for each in (data or {}).get("actions", ()) if isinstance(each, dict)]


def _text(value: Any, after: str = "") -> str | None:
    """A text of another program's manifest, from behind the last `after` on; None if it is no text."""
    return (value.rpartition(after)[2] if after else value) if isinstance(value, str) else None
