"""Who may do what: SharedKey signatures, service and account SAS, bearer tokens (REST reference, "Authorize").

Path-style addresses double the account in the SharedKey resource (`/ACCOUNT/ACCOUNT/container/blob`), as with
Azurite: the first is the account's name, the second the first segment of the path.
"""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import hashlib
import hmac
import ipaddress
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import unquote, urlsplit

from .errors import BlobAuthError, StorageError

MAX_SKEW = 15 * 60  # seconds between x-ms-date and the service's clock

_SIGNED_HEADERS = (
    "content-encoding",
    "content-language",
    "content-length",
    "content-md5",
    "content-type",
    "date",
    "if-modified-since",
    "if-match",
    "if-none-match",
    "if-unmodified-since",
    "range",
)


class Account(Protocol):
    """What checking a signature needs of an account."""

    account: str
    keys: list[str]
    clock: Callable[[], float]


@dataclass(frozen=True, slots=True)
class Target:
    """A request's address, taken apart."""

    account: str
    container: str
    blob: str
    raw_path: str  # still percent-encoded
    query: dict[str, str]


def parse_url(url: str) -> Target:
    """Path style or host style; raises InvalidUri."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    query = parse_query(parts.query)
    account, dot, rest = host.partition(".")
    if dot and rest.startswith("blob.") and not _is_address(host):
        return split_path(parts.path, query, account)
    return split_path(parts.path, query)


def parse_query(raw: str) -> dict[str, str]:
    """Query parameters; "+" is a plus sign here, as in the service's own canonical form."""
    out: dict[str, str] = {}
    for part in raw.split("&"):
        if part:
            name, _, value = part.partition("=")
            out[unquote(name)] = unquote(value)
    return out


def split_path(raw_path: str, query: dict[str, str], account: str = "") -> Target:
    segments = raw_path.lstrip("/").split("/", 2 if not account else 1)
    if not account:
        account = unquote(segments.pop(0))
    segments += [""] * (2 - len(segments))
    return Target(account, unquote(segments[0]), unquote(segments[1]), raw_path, query)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


# --- SharedKey ------------------------------------------------------------------------------------------------


def check_shared_key(account: Account, method: str, target: Target, headers: Mapping[str, str]) -> None:
    """Verify `Authorization: SharedKey account:signature` and the date of the request."""
    scheme, _, rest = headers.get("authorization", "").partition(" ")
    name, _, given = rest.partition(":")
    if scheme.lower() != "sharedkey" or name != account.account:
        raise _failed("The Authorization header is not of this account.")
    _check_date(account, headers)
    wanted = list(_strings_to_sign(account.account, method, target, headers))
    for key in account.keys:
        if any(hmac.compare_digest(sign(key, text), given) for text in wanted):
            return
    raise _failed(
        "Server failed to authenticate the request. Make sure the value of Authorization header is formed correctly"
        " including the signature."
    )


def sign(key: str, text: str) -> str:
    """Base64 of HMAC-SHA256 under a Base64 key."""
    try:
        raw = base64.b64decode(key)
    except binascii.Error as e:
        raise ValueError("an account key is Base64") from e
    return base64.b64encode(hmac.new(raw, text.encode(), hashlib.sha256).digest()).decode()


def _strings_to_sign(account: str, method: str, target: Target, headers: Mapping[str, str]) -> Iterable[str]:
    fixed = dict(headers)
    if fixed.get("content-length") == "0":
        fixed["content-length"] = ""
    head = method + "\n" + "\n".join(fixed.get(h, "") for h in _SIGNED_HEADERS) + "\n"
    resource = f"/{account}{target.raw_path}"
    for name, value in sorted((k.lower(), v) for k, v in target.query.items()):
        resource += f"\n{name}:{value}"
    special = [(k, v) for k, v in headers.items() if k.startswith("x-ms-")]
    seen: set[str] = set()
    # The service sorts in its own culture, where a hyphen weighs nothing at first; plain order is documented.
    for order in (_plain, _without_hyphen):
        text = head + "".join(f"{k}:{v}\n" for k, v in sorted(special, key=order)) + resource
        if text not in seen:
            seen.add(text)
            yield text


def _plain(item: tuple[str, str]) -> tuple[str, ...]:
    return (item[0],)


def _without_hyphen(item: tuple[str, str]) -> tuple[str, ...]:
    # Letters before digits do not occur in x-ms names that differ only there, so only hyphens need care.
    return (item[0].replace("-", ""), item[0])


def _check_date(account: Account, headers: Mapping[str, str]) -> None:
    text = headers.get("x-ms-date") or headers.get("date", "")
    try:
        when = dt.datetime.strptime(text, "%a, %d %b %Y %H:%M:%S GMT").replace(tzinfo=dt.UTC)
    except ValueError as e:
        raise _failed("The Date header in the request is incorrect.") from e
    if abs(when.timestamp() - account.clock()) > MAX_SKEW:
        raise _failed("Request date header too old.")


# --- SAS ------------------------------------------------------------------------------------------------------


def check_sas(
    account: Account, target: Target, *, permission: str, resource: str, https: bool = True, client: str = ""
) -> str:
    """Verify a SAS and that it allows one of the letters in `permission` on a resource of kind `resource`.

    `resource` is s (service), c (container) or o (object); `client` the caller's address. Returns the
    permissions granted. Raises BlobAuthError with the code that says what was wrong.
    """
    q = target.query
    if "sig" not in q or "sv" not in q:
        raise _failed("The SAS lacks sv or sig.")
    service = "ss" not in q
    texts = _service_text(account.account, target) if service else _account_text(account.account, q)
    if not any(hmac.compare_digest(sign(key, texts), q["sig"]) for key in account.keys):
        raise _failed("Signature did not match.")
    now = account.clock()
    if "se" not in q:
        raise _failed("Signature expiry is missing.")
    if now >= _moment(q["se"]):
        raise _failed("Signed expiry time is before now.")
    if "st" in q and now < _moment(q["st"]):
        raise _failed("Signed start time is after now.")
    if q.get("spr", "https,http") == "https" and not https:
        raise BlobAuthError(
            "AuthorizationProtocolMismatch", "This request is not authorized over this protocol."
        )
    if "sip" in q and client and not _in_range(client, q["sip"]):
        raise BlobAuthError("AuthorizationSourceIPMismatch")
    granted = q.get("sp", "")
    if service:
        # A service SAS speaks for blobs, and a container SAS for listing them; never for containers themselves.
        if resource != "o" and not (resource == "c" and q.get("sr") == "c" and permission == "l"):
            raise BlobAuthError("AuthorizationResourceTypeMismatch")
    else:
        if "b" not in q["ss"]:
            raise BlobAuthError("AuthorizationServiceMismatch")
        if resource not in q.get("srt", ""):
            raise BlobAuthError("AuthorizationResourceTypeMismatch")
    if not set(permission) & set(granted):
        raise BlobAuthError(
            "AuthorizationPermissionMismatch", "This request is not authorized to perform this operation."
        )
    return granted


def _account_text(account: str, q: Mapping[str, str]) -> str:
    names = ("sp", "ss", "srt", "st", "se", "sip", "spr", "sv", "ses")
    if q["sv"] < "2020-12-06":
        names = names[:-1]
    return account + "\n" + "".join(q.get(n, "") + "\n" for n in names)


def _service_text(account: str, target: Target) -> str:
    q = target.query
    kind = q.get("sr", "")
    if kind == "c":
        path, moment = target.container, ""
    elif kind == "b":
        path, moment = f"{target.container}/{target.blob}", ""
    elif kind == "bs":
        path, moment = f"{target.container}/{target.blob}", q.get("snapshot", "")
        if not moment:
            raise _failed("This SAS is for a snapshot.")
    else:
        raise _failed("Signed resource (sr) is missing or unknown.")
    lines = [
        q.get("sp", ""),
        q.get("st", ""),
        q.get("se", ""),
        f"/blob/{account}/{path}",
        q.get("si", ""),
        q.get("sip", ""),
        q.get("spr", ""),
        q["sv"],
    ]
    if q["sv"] >= "2018-11-09":
        lines += [kind, moment]
    if q["sv"] >= "2020-12-06":
        lines.append(q.get("ses", ""))
    lines += [q.get(n, "") for n in ("rscc", "rscd", "rsce", "rscl", "rsct")]
    return "\n".join(lines)


def _moment(text: str) -> float:
    try:
        when = dt.datetime.fromisoformat(text)
    except ValueError as e:
        raise _failed(f"{text} is no ISO 8601 time.") from e
    return (when if when.tzinfo else when.replace(tzinfo=dt.UTC)).timestamp()


def _in_range(client: str, allowed: str) -> bool:
    low, _, high = allowed.partition("-")
    try:
        me = int(ipaddress.ip_address(client))
        return int(ipaddress.ip_address(low)) <= me <= int(ipaddress.ip_address(high or low))
    except ValueError:
        return False


def _failed(why: str) -> StorageError:
    return BlobAuthError("AuthenticationFailed", why)
