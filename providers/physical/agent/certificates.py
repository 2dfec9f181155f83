"""A small certificate authority for agents and workers, by the `openssl` command (3.0 or newer).

The CA's key makes certificates and is needed nowhere else: keep it off the servers. An agent's certificate is good for
serving only, a worker's for asking only, so that a stolen one of the first kind cannot read another server's disks.
"""

from __future__ import annotations

import ipaddress
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path


class CertificateFailed(Exception):
    """openssl did not do it: its text."""


def make_ca(folder: Path, *, days: int = 3650) -> None:
    """`ca.crt` and `ca.key`. CertificateFailed, also when they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    _fresh(folder / "ca.key")
    _openssl(
        ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc", "-sha256",
         "-days", str(days), "-subj", "/CN=Farshore agents", "-keyout", str(folder / "ca.key"),
         "-out", str(folder / "ca.crt"), "-addext", "basicConstraints=critical,CA:TRUE,pathlen:0",
         "-addext", "keyUsage=critical,keyCertSign,cRLSign"]
    )  # fmt: skip


def make_certificate(
    folder: Path, name: str, *, client: bool, addresses: Sequence[str] = (), days: int = 825
) -> None:
    """`<name>.crt` and `<name>.key`, signed by the CA of the folder. `addresses`: host names and IPs of an agent."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        raise CertificateFailed(f"{name!r} is no name for a certificate")
    if not (client or addresses):
        raise CertificateFailed("an agent needs the addresses under which it is reached")
    key, out = folder / f"{name}.key", folder / f"{name}.crt"
    _fresh(key)
    extensions = ["basicConstraints=critical,CA:FALSE", "keyUsage=critical,digitalSignature"]
    extensions.append(f"extendedKeyUsage={'clientAuth' if client else 'serverAuth'}")
    if addresses:
        extensions.append("subjectAltName=" + ",".join(_alternative(address) for address in addresses))
    with tempfile.TemporaryDirectory(dir=folder) as work:
        request, names = Path(work, "request"), Path(work, "extensions")
        names.write_text("\n".join(extensions) + "\n")
        _openssl(
            ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc", "-sha256",
             "-subj", f"/CN={name}", "-keyout", str(key), "-out", str(request)]
        )  # fmt: skip
        _openssl(
            ["x509", "-req", "-in", str(request), "-CA", str(folder / "ca.crt"), "-CAkey", str(folder / "ca.key"),
             "-set_serial", str(int.from_bytes(os.urandom(16)) >> 1), "-days", str(days), "-sha256",
             "-extfile", str(names), "-out", str(out)]
        )  # fmt: skip


def _alternative(address: str) -> str:
    try:
        return f"IP:{ipaddress.ip_address(address)}"
    except ValueError:
        if not re.fullmatch(r"[A-Za-z0-9.-]{1,253}", address):
            raise CertificateFailed(f"{address!r} is neither a host name nor an IP address") from None
        return f"DNS:{address}"


def _fresh(key: Path) -> None:
    if key.exists():
        raise CertificateFailed(f"{key} exists; a key is never overwritten")
    # Made here with the rights it shall have: openssl writes into it.
    key.touch(mode=0o600)


def _openssl(arguments: Sequence[str]) -> None:
    try:
        done = subprocess.run(
            ["openssl", *arguments], capture_output=True, text=True, check=False, timeout=60
        )
    except OSError as error:
        raise CertificateFailed(f"openssl cannot be run: {error.strerror}") from error
    if done.returncode:
        raise CertificateFailed(done.stderr.strip()[-500:])
