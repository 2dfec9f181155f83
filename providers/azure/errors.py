"""From what Azure says to a `FarshoreError`: by error code, then message, then status.

The exception's class and the status are no diagnosis: 409 carries name conflicts, quota and capacity alike, and an
operation that failed late raises with status 200. Codes and texts come from published documents and issue threads,
they change: matching is loose, and Azure's own code and text always travel in `details`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any

from azure.core.exceptions import (
    AzureError,
    ClientAuthenticationError,
    DecodeError,
    HttpResponseError,
    ServiceRequestError,
    ServiceResponseError,
)

from farshore.domain.errors import Code, FarshoreError

_MAX_TEXT = 1500


def _table() -> dict[str, Code]:
    rows: dict[Code, str] = {
        Code.TARGET_THROTTLED: "TooManyRequests RequestRateTooLarge SubscriptionRequestsThrottled ResourceRequestsThrottled "
        "ServerBusy OperationRateExceeded SnapshotOperationRateExceeded IngressLimitExceeded",
        Code.TARGET_BUSY: "AnotherOperationInProgress RetryableErrorDueToAnotherOperation RetryableError "
        "ReferencedResourceNotProvisioned ConcurrentOperationInProgress OperationPreempted OperationInterrupted "
        "ConflictingUserInput NicReservedForAnotherVm PendingCopyOperation "
        "BlobBeingRehydrated ContainerBeingDeleted AttachDiskWhileBeingDetached ScopeBusy",
        Code.CAPACITY_EXHAUSTED: "SkuNotAvailable AllocationFailed ZonalAllocationFailed OverconstrainedAllocationRequest "
        "OverconstrainedZonalAllocationRequest CapacityNotAvailable",
        Code.QUOTA_EXCEEDED: "QuotaExceeded ResourceQuotaExceeded SubscriptionQuotaExceeded PublicIPCountLimitReached "
        "StaticPublicIPCountLimitReached PublicIPAddressCountLimitReached NetworkInterfaceCountLimitReached "
        "ResourceCountExceedsLimitDueToTemplate MaxStorageAccountsCountPerSubscriptionExceeded",
        Code.ADDRESS_IN_USE: "PrivateIPAddressInUse PrivateIPAddressIsAllocated IPAddressInUse SubnetIsFull "
        "PrivateIPAddressIsBeingUsed PublicIPAddressInUse",
        Code.ACTION_TIMEOUT: "VMExtensionProvisioningTimeout",
        Code.MACHINE_NOT_RUNNING: "VMAgentStatusCommunicationError",
        Code.REPLICA_DAMAGED: "InvalidVhd InvalidVhdFooter",
        Code.NETWORK_NOT_FOUND: "SubnetNotFound VirtualNetworkNotFound NetworkSecurityGroupNotFound",
        Code.ACCESS_DENIED: "AuthorizationFailed LinkedAuthorizationFailed LinkedAccessCheckFailed "
        "InvalidAuthenticationToken InvalidAuthenticationTokenTenant AuthenticationFailed "
        "AuthenticationFailedMissingToken AuthorizationPermissionMismatch AuthorizationFailure NoAuthenticationInformation "
        "InvalidAuthenticationInfo InsufficientAccountPermissions AccountIsDisabled SubscriptionNotFound "
        "ReadOnlyDisabledSubscription Forbidden KeyBasedAuthenticationNotPermitted",
        Code.TARGET_UNREACHABLE: "ServiceUnavailable ServerTimeout GatewayTimeout OperationTimedOut RequestTimeout BadGateway",
        Code.TARGET_REJECTED: "RequestDisallowedByPolicy MissingSubscriptionRegistration ScopeLocked ResourceGroupNotFound "
        "InvalidParameter InvalidRequestContent InvalidRequestFormat PropertyChangeNotAllowed ImageNotFound "
        "ResourceTypeNotSupported PrivateIPAddressNotInSubnet ResourceGroupBeingDeleted LocationNotAvailableForResourceType",
    }
    return {name.lower(): code for code, names in rows.items() for name in names.split()}


CODES: Mapping[str, Code] = _table()
EXPIRED = frozenset({"expiredauthenticationtoken", "invalidauthenticationtoken"})
MISSING = frozenset(
    {
        "resourcenotfound",
        "notfound",
        "blobnotfound",
        "invalidresourcereference",
        "parentresourcenotfound",
        "operationnotfound",
    }
)
IN_USE = frozenset(
    {
        "inusesubnetcannotbedeleted",
        "publicipaddresscannotbedeleted",
        "nicinuse",
        "diskinuse",
        "inuse",
        "networksecuritygroupinuse",
        "virtualnetworkinuse",
    }
)
_SERVER_FAULT = frozenset(
    {"internalservererror", "internalexecutionerror", "internaloperationerror", "internalerror"}
)

_QUOTA = re.compile(
    r"exceed\w*\s+(?:the\s+)?(?:approved|quota|limit)|quota\s+(?:limit|exceeded)|core\s?quota", re.IGNORECASE
)
_QUOTA_NUMBERS = {
    "limit": re.compile(r"current\s+limit:?\s*(\d+)", re.IGNORECASE),
    "usage": re.compile(r"current\s+usage:?\s*(\d+)", re.IGNORECASE),
    "required": re.compile(r"additional\s+required:?\s*(\d+)", re.IGNORECASE),
}
_QUOTA_NAME = re.compile(r"approved\s+(?:the\s+)?(.{3,80}?)\s+quota", re.IGNORECASE)
_BY_TEXT: tuple[tuple[re.Pattern[str], Code], ...] = (
    (re.compile(r"too many requests|throttl|rate limit", re.IGNORECASE), Code.TARGET_THROTTLED),
    (_QUOTA, Code.QUOTA_EXCEEDED),
    (
        re.compile(
            r"marked for deletion|being deleted|another operation|in progress|is updating", re.IGNORECASE
        ),
        Code.TARGET_BUSY,
    ),
    (
        re.compile(
            r"allocation failed|sufficient capacity|not available in (?:location|zone)", re.IGNORECASE
        ),
        Code.CAPACITY_EXHAUSTED,
    ),
    (
        re.compile(
            r"vm(?: is)? not running|requires the vm to be running|cannot .*unless .* is running",
            re.IGNORECASE,
        ),
        Code.MACHINE_NOT_RUNNING,
    ),
    (
        re.compile(r"ip address .* (?:is )?(?:already )?in use|is already allocated", re.IGNORECASE),
        Code.ADDRESS_IN_USE,
    ),
)
_HELD = re.compile(
    r"is attached to v(?:m|irtual machine)|used by existing resource|still allocated to", re.IGNORECASE
)
# Codes that say little: Azure uses them for unlike things, so that the text decides.
_VAGUE = frozenset(
    {
        "",
        "operationnotallowed",
        "conflict",
        "badrequest",
        "invalidoperation",
        "clientotherror",
        "conflicterror",
    }
)

_SECRETS = (
    (re.compile(r"(?i)([?&;\s\"']sig=)[^&\s\"'<>]+"), r"\1***"),
    (
        re.compile(
            r"(?i)(AccountKey|SharedAccessSignature|client_secret|access_token|refresh_token|password)([\"']?\s*[=:]\s*[\"']?)[^\s;&,\"']+"
        ),
        r"\1\2***",
    ),
    (re.compile(r"(?i)\b(Bearer|SharedKey)\s+[A-Za-z0-9._~+/=:-]+"), r"\1 ***"),
    (re.compile(r"\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9._-]*"), "***"),
)


def scrub(text: str) -> str:
    """`text` without signatures, keys and tokens, cut to a length a person reads."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…"


@dataclass(frozen=True, slots=True)
class Said:
    """What Azure answered, taken out of whichever shape the SDK gave it."""

    code: str
    message: str
    status: int | None
    retry_after: float | None
    request_id: str
    inner: tuple[str, ...] = ()  # codes of the error's details

    @property
    def key(self) -> str:
        return self.code.lower()


def said(error: BaseException) -> Said:
    """Read an SDK exception. Never raises."""
    status: int | None = None
    headers: Mapping[str, str] = {}
    code, message, inner = "", str(error), ()
    if isinstance(error, HttpResponseError):
        status = error.status_code
        response: Any = error.response
        found = getattr(response, "headers", None)
        headers = found if found is not None else {}
        message = str(error.message)
        if error.error is not None:
            code = str(error.error.code or "")
            message = str(error.error.message or message)
            inner = tuple(str(d.code) for d in (error.error.details or []) if getattr(d, "code", None))
        storage_code: Any = getattr(error, "error_code", None)
        if storage_code:  # storage services answer XML; the SDK puts the code here
            code = str(getattr(storage_code, "value", storage_code))
        code = code or str(headers.get("x-ms-error-code") or "")
    return Said(
        code=code,
        message=scrub(message.replace("\r", "").strip()),
        status=status,
        retry_after=retry_after(headers),
        request_id=str(headers.get("x-ms-request-id") or ""),
        inner=inner,
    )


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that Azure asks to wait: `retry-after-ms`, or Retry-After as seconds or as a date. None: nothing asked."""
    for name in ("retry-after-ms", "x-ms-retry-after-ms"):
        value = _number(headers.get(name))
        if value is not None:
            return value / 1000
    text = headers.get("Retry-After") or headers.get("retry-after")
    if not text:
        return None
    value = _number(text)
    if value is not None:
        return value
    try:
        when: datetime = parsedate_to_datetime(text)
        return max(0.0, when.timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


def _number(text: str | None) -> float | None:
    if text is None or not re.fullmatch(r"\s*\d{1,9}(?:\.\d{1,6})?\s*", text):
        return None
    return float(text)


def code_of(what: Said, *, late: bool) -> tuple[Code, bool | None]:
    """The catalogue's code for an answer, and whether retrying helps where that differs from the catalogue."""
    for key in (what.key, *(c.lower() for c in what.inner)):
        if key in _VAGUE:
            continue
        if key in EXPIRED:
            return Code.ACCESS_DENIED, True  # a new sign-in may cure it
        if key in CODES:
            return CODES[key], None
    if what.status == 429:
        return Code.TARGET_THROTTLED, None
    if what.key in _VAGUE or what.key in _SERVER_FAULT or late:
        for pattern, code in _BY_TEXT:
            if pattern.search(what.message):
                return code, None
    if late:
        return Code.TARGET_OPERATION_FAILED, None
    if what.key in _SERVER_FAULT or what.status in (408, 500, 502, 503, 504) or (what.status or 0) >= 500:
        return Code.TARGET_UNREACHABLE, None
    if what.status in (401, 403):
        return Code.ACCESS_DENIED, None
    return Code.TARGET_REJECTED, None


def classify(error: BaseException, *, doing: str, subject: str = "", late: bool = False) -> FarshoreError:
    """The error for a person on call.

    `doing` completes "Azure … while …" ("creating disk web1-disk0"); `late`: an accepted operation failed afterwards.
    """
    if isinstance(error, FarshoreError):
        return error
    what = said(error)
    details: dict[str, Any] = {"azure_code": what.code, "azure_message": what.message, "status": what.status}
    if what.request_id:
        details["request_id"] = what.request_id
    if isinstance(error, ClientAuthenticationError) and what.key not in CODES and what.key not in EXPIRED:
        if (what.status or 400) >= 500 or what.status == 429:
            return FarshoreError(
                Code.TARGET_UNREACHABLE,
                f"Azure's sign-in service failed while {doing}: {what.message}",
                subject=subject,
                retry_after=what.retry_after,
                details=details,
            )
        return FarshoreError(
            Code.ACCESS_DENIED,
            f"Azure refused the identity while {doing}: {what.message}",
            subject=subject,
            details=details,
        )
    if isinstance(error, (ServiceRequestError, ServiceResponseError)) or not isinstance(error, AzureError):
        # The answer is unknown: the next attempt reads before it acts.
        return FarshoreError(
            Code.TARGET_UNREACHABLE
            if isinstance(error, (AzureError, OSError, TimeoutError))
            else Code.INTERNAL,
            f"No answer from Azure while {doing}: {what.message or type(error).__name__}",
            subject=subject,
            details=details,
        )
    if (
        not isinstance(error, HttpResponseError)
        or isinstance(error, DecodeError)
        or (what.status is None and not what.code)
    ):
        return FarshoreError(
            Code.TARGET_UNREACHABLE,
            f"Azure's answer could not be read while {doing}: {what.message}",
            subject=subject,
            details=details,
        )
    code, retryable = code_of(what, late=late)
    action: str | None = None
    if code is Code.QUOTA_EXCEEDED:
        details.update(quota_numbers(what.message))
    if what.key == "missingsubscriptionregistration":
        action = "Register the resource provider that is named for the subscription, then run again."
    named = f"{what.code}: " if what.code and what.code.lower() not in what.message.lower() else ""
    verb = "failed" if late else "refused"
    return FarshoreError(
        code,
        f"Azure {verb} while {doing}: {named}{what.message}",
        subject=subject,
        action=action,
        retryable=retryable,
        retry_after=what.retry_after,
        details=details,
    )


def quota_numbers(message: str) -> dict[str, Any]:
    """`quota`, `limit`, `usage` and `required` as far as the text tells them."""
    out: dict[str, Any] = {}
    for name, pattern in _QUOTA_NUMBERS.items():
        found = pattern.search(message)
        if found:
            out[name] = int(found[1])
    named = _QUOTA_NAME.search(message)
    if named:
        out["quota"] = named[1]
    return out


def is_missing(error: BaseException) -> bool:
    """True when an answer says that what was asked for (or what the request refers to) is not there."""
    if not isinstance(error, HttpResponseError):
        return False
    what = said(error)
    if what.key in ("resourcegroupnotfound", "subscriptionnotfound", "containernotfound"):
        return False  # not lag of our own making: the surroundings are wrong
    return what.status == 404 or what.key in MISSING


def is_exists(error: BaseException) -> bool:
    """True when create-only was refused because something of that name is there."""
    return isinstance(error, HttpResponseError) and error.status_code == 412


def is_in_use(error: BaseException) -> bool:
    """True when a deletion was refused because something still refers to the resource."""
    what = said(error)
    return any(key.lower() in IN_USE for key in (what.key, *what.inner)) or bool(_HELD.search(what.message))
