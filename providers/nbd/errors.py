"""Every failure of NBD, QMP, the guest agent and TLS becomes a FarshoreError of the catalogue."""

from __future__ import annotations

import errno
import ssl

from farshore.domain.errors import Code, FarshoreError


class Malformed(Exception):
    """The other side sent what the protocol does not allow. The connection cannot be used any more."""


def unreachable(where: str, doing: str, what: object) -> FarshoreError:
    """SourceUnreachable: `where` does not answer while `doing` (a participle phrase)."""
    return FarshoreError(
        Code.SOURCE_UNREACHABLE,
        f"{where} does not answer while {doing}: {told(what)}.",
        causes=(
            "The machine was shut down or its process ended.",
            "Another program holds the socket: it serves one client at a time.",
            "The path or address in the settings is not the machine's.",
        ),
    )


def read_failed(where: str, what: object, *, reason: str = "") -> FarshoreError:
    """SourceReadFailed: nothing of the request is used. `reason` is a short word for programs."""
    return FarshoreError(
        Code.SOURCE_READ_FAILED,
        f"Reading {where} failed: {told(what)}.",
        details={"reason": reason} if reason else None,
    )


def untrusted(where: str, what: object) -> FarshoreError:
    """ConfigurationInvalid: TLS did not come about."""
    return FarshoreError(
        Code.CONFIGURATION_INVALID,
        f"TLS with {where} did not come about: {told(what)}.",
        causes=(
            "The server's certificate is not of the authority in the settings, or is for another name.",
            "The server wants a client certificate that the settings do not have.",
            "One side wants TLS and the other one does not.",
        ),
        action="Compare certificates and settings of both sides and correct them.",
    )


def told(what: object) -> str:
    """An exception or a text on one line, without its final stop."""
    if isinstance(what, TimeoutError):
        return (str(what) or "no answer in time").rstrip(".")
    if isinstance(what, ssl.SSLCertVerificationError):
        return str(what.verify_message or what).rstrip(".")
    if isinstance(what, BaseException):
        text = str(what)
        return (f"{type(what).__name__}: {text}" if text else type(what).__name__).rstrip(".")
    return str(what).rstrip(".")


def error_name(number: int) -> str:
    """An NBD error number (they are Linux's) as its name."""
    return errno.errorcode.get(number, f"error {number}")
