"""Every failure of vSphere, of the network and of TLS becomes a FarshoreError of the catalogue.

Classification is by the type of the fault (a fault's subclasses go with it), never by its text, which is localised.
"""

from __future__ import annotations

import ssl
from http.client import HTTPException
from typing import Any
from xml.parsers.expat import ExpatError

from pyVmomi import vim as _vim
from pyVmomi import vmodl as _vmodl

from farshore.domain.errors import Code, FarshoreError

vim: Any = _vim
vmodl: Any = _vmodl

NETWORK_ERRORS = (OSError, HTTPException, ExpatError)
"""What a broken connection looks like: refused, reset, timed out, closed, cut in the middle of an answer."""


def fault_text(fault: Any) -> str:
    """Type and message of a fault on one line, without its stack."""
    kind = type(fault).__name__.rpartition(".")[2]
    text = str(getattr(fault, "msg", None) or "").strip()
    if isinstance(fault, vim.fault.NoPermission):
        privilege = getattr(fault, "privilegeId", None)
        text = f"privilege {privilege} is missing" if privilege else text
    return f"{text} ({kind})" if text else kind


# First match wins, so a subclass stands before its base. The last field overrides the catalogue's "retryable".
_TABLE: tuple[tuple[Any, Code, bool | None], ...] = (
    (
        vim.fault.NotAuthenticated,
        Code.ACCESS_DENIED,
        True,
    ),  # the session died twice in a row: try again later
    (vim.fault.RestrictedVersion, Code.SOURCE_NOT_ELIGIBLE, None),  # the licence lacks the function
    (vim.fault.InvalidLogin, Code.ACCESS_DENIED, None),
    (vim.fault.NoPermission, Code.ACCESS_DENIED, None),
    (vim.fault.TaskInProgress, Code.SOURCE_BUSY, None),
    (vim.fault.ConcurrentAccess, Code.SOURCE_BUSY, None),
    (vim.fault.ResourceInUse, Code.SOURCE_BUSY, None),
    (vim.fault.InvalidState, Code.SOURCE_BUSY, None),
    (vmodl.fault.HostCommunication, Code.SOURCE_UNREACHABLE, None),  # vCenter lives, the host does not
    (vim.fault.HostConnectFault, Code.SOURCE_UNREACHABLE, None),
    (vim.fault.Timedout, Code.SOURCE_BUSY, None),
    (
        vmodl.fault.ManagedObjectNotFound,
        Code.SOURCE_MACHINE_NOT_FOUND,
        True,
    ),  # asked anew, it is looked up anew
    (vmodl.fault.NotSupported, Code.SOURCE_NOT_ELIGIBLE, None),
    (vim.fault.SnapshotFault, Code.SNAPSHOT_FAILED, None),
)


def classify(
    exc: BaseException, *, doing: str, subject: str = "", fallback: Code = Code.SOURCE_BUSY
) -> FarshoreError:
    """The FarshoreError for `exc`, which happened while `doing` (a participle phrase: "removing the snapshot").

    `fallback` is the code of faults that the table does not know; it is made retryable when the catalogue says so.
    """
    if isinstance(exc, FarshoreError):
        return exc
    if isinstance(exc, ssl.SSLCertVerificationError):
        return FarshoreError(
            Code.CONFIGURATION_INVALID,
            f"The certificate of vCenter is not trusted while {doing}: {getattr(exc, 'verify_message', '') or exc}.",
            subject=subject,
            causes=(
                "The certificate was renewed.",
                "The CA file or thumbprint in the settings is not vCenter's.",
            ),
            action="Compare the certificate with the settings of the site and correct them.",
        )
    if isinstance(exc, NETWORK_ERRORS):
        what = f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__
        return FarshoreError(
            Code.SOURCE_UNREACHABLE, f"vCenter does not answer while {doing}: {what}.", subject=subject
        )
    if isinstance(exc, vmodl.MethodFault):
        text = f"vSphere refused while {doing}: {fault_text(exc)}."
        for kind, code, retryable in _TABLE:
            if isinstance(exc, kind):
                return FarshoreError(code, text, subject=subject, retryable=retryable)
        return FarshoreError(fallback, text, subject=subject, details={"fault": type(exc).__name__})
    return FarshoreError(
        Code.INTERNAL, f"Unexpected {type(exc).__name__} while {doing}: {exc}", subject=subject
    )
