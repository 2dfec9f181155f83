"""Every failure of an agent, of the network and of TLS becomes a FarshoreError of the catalogue."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any

from farshore.domain.errors import Code, FarshoreError

NETWORK_ERRORS = (OSError, HTTPException)
"""What a broken connection looks like: refused, reset, timed out, closed, cut in the middle of an answer."""

# What the agent says (agent/wire.py) → code, and whether to try again where the catalogue's default does not fit.
_CODES: dict[str, tuple[Code, bool | None]] = {
    "bad-request": (Code.INTERNAL, False),
    "forbidden": (Code.ACCESS_DENIED, None),
    "not-found": (Code.INTERNAL, False),
    "busy": (Code.SOURCE_BUSY, None),
    "gone": (Code.SOURCE_READ_FAILED, None),
    "overwritten": (Code.SOURCE_READ_FAILED, None),
    "not-eligible": (Code.SOURCE_NOT_ELIGIBLE, None),
    "seed-needed": (Code.SOURCE_NOT_ELIGIBLE, None),
    "snapshot-failed": (Code.SNAPSHOT_FAILED, None),
    "read-failed": (Code.SOURCE_READ_FAILED, None),
    "internal": (Code.SNAPSHOT_FAILED, None),
}


class AgentRefused(Exception):
    """The agent's own word, before it is classified."""

    def __init__(self, code: str, message: str, details: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.code, self.message, self.details = code, message, dict(details)


def classify(error: BaseException, *, doing: str, subject: str) -> FarshoreError:
    """The FarshoreError for `error`, which happened while `doing` (a participle phrase)."""
    if isinstance(error, FarshoreError):
        return error
    if isinstance(error, AgentRefused):
        code, retryable = _CODES.get(error.code, (Code.INTERNAL, None))
        return FarshoreError(
            code,
            f"The agent refused while {doing}: {error.message}",
            subject=subject,
            retryable=retryable,
            details={"agent_code": error.code},
            causes=_causes(error.code),
            action=_action(error.code),
        )
    if isinstance(error, ssl.SSLCertVerificationError):
        return FarshoreError(
            Code.CONFIGURATION_INVALID,
            f"The agent's certificate is not trusted while {doing}: {error.verify_message or error}.",
            subject=subject,
            causes=(
                "The agent has a certificate of another authority.",
                "The host name is not in the certificate.",
            ),
            action="Compare the agent's certificate with the CA file in the settings.",
        )
    if isinstance(error, ssl.SSLError) and "ALERT" in str(error).upper():
        return FarshoreError(
            Code.ACCESS_DENIED,
            f"The agent does not accept the worker's certificate ({error.reason}).",
            subject=subject,
            causes=("The worker's certificate has expired or is of another authority.",),
            action="Make a client certificate with the authority that the agent trusts.",
        )
    if isinstance(error, NETWORK_ERRORS):
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return FarshoreError(
            Code.SOURCE_UNREACHABLE,
            f"The agent does not answer while {doing}: {what}.",
            subject=subject,
            causes=(
                "The server is down or its agent is not running.",
                "The network between worker and server is cut.",
            ),
        )
    return FarshoreError(
        Code.INTERNAL, f"Unexpected {type(error).__name__} while {doing}: {error}", subject=subject
    )


def _causes(code: str) -> tuple[str, ...] | None:
    return {
        "overwritten": (
            "The disk was written where the cut had kept nothing; it has no snapshot device that would keep it.",
        ),
        "gone": ("The agent was started anew.", "A later owner released the cut."),
        "forbidden": ("The worker's name is not among tls.clients of the agent.",),
        "snapshot-failed": (
            "The disks are written faster than they can be read.",
            "A file system is frozen by somebody else.",
        ),
    }.get(code)


def _action(code: str) -> str | None:
    return {
        "overwritten": "None needed: the next cut keeps everything that it has to.",
        "seed-needed": "Give the worker a seed folder with room for the disk, or the agent a larger spool, or put the "
        "disk on LVM thin.",
        "forbidden": "Add the worker's common name to tls.clients and restart the agent.",
    }.get(code)
