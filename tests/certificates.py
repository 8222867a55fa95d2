"""Certificates for tests of signatures: an authority, and what it issues."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

USAGES = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
OTHER_USAGES = ("crl_sign", "encipher_only", "decipher_only")


class Authority:
    """A certificate authority whose own certificate is `pem`."""

    def __init__(self, name: str = "Test authority"):
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = _name(name)
        self.certificate = self._built(self.name, self.key, 3650, authority=True)
        self.pem = self.certificate.public_bytes(Encoding.PEM)

    def issue(
        self, key: Any = None, days: int = 30, usage: Any = ExtendedKeyUsageOID.EMAIL_PROTECTION
    ) -> tuple[bytes, Any]:
        """The certificate of a key, and the authority's behind it, in PEM form, and the key.

        It ends in so many `days`. A P-256 key is made if there is none.
        """
        key = key or ec.generate_private_key(ec.SECP256R1())
        issued = self._built(_name("Test signer"), key, days, usage=usage)
        return issued.public_bytes(Encoding.PEM) + self.pem, key

    def files(self, folder: Path, **how: Any) -> tuple[Path, Path]:
        """cert.pem and key.pem in a folder, issued as `how` says."""
        certificate, key = self.issue(**how)
        return written(folder, certificate, key)

    def _built(
        self, subject: x509.Name, key: Any, days: int, usage: Any = None, authority: bool = False
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        usages = dict.fromkeys((*USAGES, *OTHER_USAGES), False)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=400))
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(
                x509.KeyUsage(digital_signature=not authority, key_cert_sign=authority, **usages),
                critical=True,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False
            )
        )
        if usage:
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        return builder.sign(self.key, hashes.SHA256())


def key_pem(key: Any, password: bytes | None = None, format: PrivateFormat = PrivateFormat.PKCS8) -> bytes:
    hidden = BestAvailableEncryption(password) if password else NoEncryption()
    return key.private_bytes(Encoding.PEM, format, hidden)


def written(folder: Path, certificate: bytes, key: Any) -> tuple[Path, Path]:
    """cert.pem and key.pem in a folder; the key may be given as the bytes of its file."""
    cert, file = folder / "cert.pem", folder / "key.pem"
    cert.write_bytes(certificate)
    file.write_bytes(key if isinstance(key, bytes) else key_pem(key))
    return cert, file


def _name(common: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, common),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Tests"),
        ]
    )
