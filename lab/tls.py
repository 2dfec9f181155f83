"""Certificates for the laboratory: one throw-away authority per root directory, and server certificates it signed.

Everything is created once and found again on the next start, so that clients may pin what they saw. Several
processes may call this on the same root at once: a lock file makes the first one the author.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import hashlib
import ipaddress
import os
import ssl
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LOOPBACK_NAMES = ("127.0.0.1", "localhost")
_LIFETIME = dt.timedelta(days=365)


@dataclass(frozen=True, slots=True)
class CA:
    """A laboratory certificate authority on disk."""

    ca_file: Path
    """PEM certificate; hand this to clients as their trust anchor."""
    key_file: Path
    """PEM private key (mode 0600)."""


def ensure_ca(root: Path) -> CA:
    """Return the authority of `root`, creating `ca.pem` and `ca-key.pem` there if they are absent."""
    root.mkdir(parents=True, exist_ok=True)
    ca = CA(root / "ca.pem", root / "ca-key.pem")
    with _locked(root):
        if ca.ca_file.exists() and ca.key_file.exists():
            return ca
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name("Farshore laboratory CA")
        now = dt.datetime.now(dt.UTC)
        usage = x509.KeyUsage(
            digital_signature=True,
            key_cert_sign=True,
            crl_sign=True,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            encipher_only=False,
            decipher_only=False,
        )
        cert = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + _LIFETIME)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        _write(ca.key_file, _key_pem(key), 0o600)
        _write(ca.ca_file, cert.public_bytes(serialization.Encoding.PEM), 0o644)
    return ca


def ensure_server_cert(root: Path, names: Sequence[str] = LOOPBACK_NAMES) -> tuple[Path, Path]:
    """Return (certificate chain, private key) for a server answering to `names`, signed by the CA of `root`.

    `names` are DNS names (wildcards allowed) or IP addresses. One pair is kept for each set of names.
    """
    ca = ensure_ca(root)
    tag = hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:12]
    cert_file, key_file = root / f"server-{tag}.pem", root / f"server-{tag}-key.pem"
    with _locked(root):
        if cert_file.exists() and key_file.exists():
            return cert_file, key_file
        ca_cert = x509.load_pem_x509_certificate(ca.ca_file.read_bytes())
        ca_key = serialization.load_pem_private_key(ca.key_file.read_bytes(), None)
        assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
        key = ec.generate_private_key(ec.SECP256R1())
        now = dt.datetime.now(dt.UTC)
        cert = (
            x509.CertificateBuilder()
            .subject_name(_name(names[0]))
            .issuer_name(ca_cert.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + _LIFETIME - dt.timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([_general_name(n) for n in names]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
            )
            .sign(ca_key, hashes.SHA256())
        )
        chain = cert.public_bytes(serialization.Encoding.PEM) + ca.ca_file.read_bytes()
        _write(key_file, _key_pem(key), 0o600)
        _write(cert_file, chain, 0o644)
    return cert_file, key_file


def server_context(root: Path, names: Sequence[str] = LOOPBACK_NAMES) -> ssl.SSLContext:
    """A TLS context for a laboratory server answering to `names`."""
    cert_file, key_file = ensure_server_cert(root, names)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(cert_file, key_file)
    return context


def thumbprint(cert_file: Path, algorithm: str = "sha256") -> str:
    """Digest of the first certificate of a PEM file as `AA:BB:…` (the form vSphere shows)."""
    cert = x509.load_pem_x509_certificate(cert_file.read_bytes())
    digest = hashlib.new(algorithm, cert.public_bytes(serialization.Encoding.DER)).hexdigest().upper()
    return ":".join(digest[i : i + 2] for i in range(0, len(digest), 2))


@contextlib.contextmanager
def _locked(root: Path) -> Generator[None]:
    fd = os.open(root / ".tls.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, data: bytes, mode: int) -> None:
    """Write atomically: a reader sees the whole file or none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
    temporary.replace(path)
