"""TLS connections to vCenter: verified against the settings of this site only, quick to give up on a dead one.

pyVmomi's own pinning is not used: after the first mismatch with the CA it disables verification on the shared context
and never looks at the thumbprint of later connections again.
"""

from __future__ import annotations

import hashlib
import hmac
import socket
import ssl
from http.client import HTTPSConnection
from typing import Any

from farshore.domain.errors import Code, FarshoreError
from farshore.providers.vsphere.settings import VSphereSettings


def tls_context(settings: VSphereSettings) -> ssl.SSLContext:
    """The trust of one site. ConfigurationInvalid when the CA file cannot be used."""
    try:
        if settings.ca_file is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.load_verify_locations(cafile=settings.ca_file)
        elif settings.thumbprint is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE  # the pin is compared on every connection instead
        else:
            context = ssl.create_default_context()
    except OSError as exc:
        raise FarshoreError(
            Code.CONFIGURATION_INVALID,
            f"The CA file {settings.ca_file} of vCenter {settings.host} cannot be used: {exc}.",
        ) from exc
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


class PinnedConnection(HTTPSConnection):
    """An HTTPS connection with a short time to connect, a time of silence, and an optional pin.

    Proxies of the environment are not looked at.
    """

    def __init__(
        self, host: str, port: int, *, settings: VSphereSettings, context: ssl.SSLContext, **_: Any
    ) -> None:
        super().__init__(host, port, timeout=settings.connect_timeout, context=context)
        self._silence = settings.call_timeout
        self._pin = settings.thumbprint.replace(":", "").lower() if settings.thumbprint else None

    def connect(self) -> None:
        super().connect()
        sock: Any = self.sock
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(self._silence)
        if self._pin is None:
            return
        certificate: bytes = sock.getpeercert(binary_form=True) or b""
        if not hmac.compare_digest(hashlib.sha256(certificate).hexdigest(), self._pin):
            self.close()
            error = ssl.SSLCertVerificationError(
                "the certificate's SHA-256 thumbprint differs from the pinned one"
            )
            error.verify_message = "its SHA-256 thumbprint differs from the pinned one"
            raise error
