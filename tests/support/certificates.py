"""A certificate authority of the test's own, and a certificate that may sign pictures."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

USAGES = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
USAGES += ("key_cert_sign", "crl_sign", "encipher_only", "decipher_only")


def write_chain(folder: Path) -> tuple[Path, Path, str]:
    """Write `chain.pem` and `key.pem`; returns both paths and the authority's certificate."""
    authority, signer = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = _certificate("authority", authority, None, authority, "key_cert_sign", "crl_sign")
    signing = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
    leaf = _certificate("signer", signer, signing, authority, "digital_signature")
    chain, key = folder / "chain.pem", folder / "key.pem"
    chain.write_bytes(leaf + root)
    key.write_bytes(signer.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return chain, key, root.decode()


def _certificate(name: str, key: Any, usage: x509.ExtendedKeyUsage | None, issuer: Any, *may: str) -> bytes:
    now = dt.datetime.now(dt.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name("authority"))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.BasicConstraints(usage is None, None), critical=True)
        .add_extension(x509.KeyUsage(**{name: name in may for name in USAGES}), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key()), critical=False)
    )
    if usage is not None:
        builder = builder.add_extension(usage, critical=False)
    return builder.sign(issuer, hashes.SHA256()).public_bytes(Encoding.PEM)


def _name(common: str) -> x509.Name:
    attributes = {NameOID.ORGANIZATION_NAME: "test", NameOID.COMMON_NAME: common}
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in attributes.items()])
