"""One request, taken apart, and its reply."""

from __future__ import annotations

import base64
import binascii
import email.utils
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from . import leases
from .auth import Target
from .conditions import Conditions
from .crc64 import crc64
from .errors import StorageError
from .rows import PAGE_BLOB, BlobRow, ContainerRow
from .store import BlobStore
from .xml import PROPS, copy_fields, http_date

_META_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
MAX_METADATA = 8 * 1024


@dataclass(slots=True)
class Reply:
    """Status, headers and either a body or (for Get Blob) what to stream."""

    status: int
    headers: dict[str, str] = field(default_factory=dict[str, str])
    body: bytes = b""
    row: BlobRow | None = None  # stream [start, start+length) of this row
    start: int = 0
    length: int = 0


@dataclass(slots=True)
class Call:
    """A request after its body was read. `headers` has lower-case names; `metadata` the caller's spelling."""

    store: BlobStore
    op: str
    method: str
    target: Target
    headers: Mapping[str, str]
    metadata: dict[str, str]
    endpoint: str
    body: bytes | bytearray = b""
    granted: str = "*"  # permissions of a SAS; "*" = the account's owner
    peers: Mapping[str, BlobStore] = field(default_factory=dict[str, BlobStore])

    @property
    def container(self) -> str:
        return self.target.container

    @property
    def blob(self) -> str:
        return self.target.blob

    @property
    def snapshot(self) -> str:
        return self.target.query.get("snapshot", "")

    @property
    def query(self) -> dict[str, str]:
        return self.target.query

    def header(self, name: str) -> str:
        return self.headers.get(name, "")

    def need(self, name: str) -> str:
        value = self.headers.get(name, "")
        if not value:
            raise StorageError(
                "MissingRequiredHeader", f"An HTTP header that's mandatory is missing: {name}."
            )
        return value

    def number(self, name: str) -> int | None:
        text = self.headers.get(name, "")
        if not text:
            return None
        try:
            return int(text)
        except ValueError as e:
            raise StorageError("InvalidHeaderValue", f"{name} is no number.") from e

    def query_number(self, name: str, default: int, top: int) -> int:
        text = self.query.get(name, "")
        if not text:
            return default
        if not text.isdigit():
            raise StorageError("InvalidQueryParameterValue", name)
        value = int(text)
        if value < 1:
            raise StorageError("OutOfRangeQueryParameterValue", name)
        return min(value, top)

    def conditions(self, prefix: str = "") -> Conditions:
        """Of the addressed blob, or with `x-ms-source-` of a copy's source."""
        return Conditions(
            if_match=self.header(prefix + "if-match"),
            if_none_match=self.header(prefix + "if-none-match"),
            if_modified_since=self._date(prefix + "if-modified-since"),
            if_unmodified_since=self._date(prefix + "if-unmodified-since"),
            lease_id="" if prefix else self.header("x-ms-lease-id"),
            seq_le=None if prefix else self.number("x-ms-if-sequence-number-le"),
            seq_lt=None if prefix else self.number("x-ms-if-sequence-number-lt"),
            seq_eq=None if prefix else self.number("x-ms-if-sequence-number-eq"),
        )

    def _date(self, name: str) -> float | None:
        text = self.headers.get(name)
        if not text:
            return None
        try:
            return email.utils.parsedate_to_datetime(text).timestamp()
        except ValueError as e:
            raise StorageError("InvalidHeaderValue", f"{name} is no HTTP date.") from e

    def props(self) -> dict[str, str]:
        return {name: self.headers[h] for name, h in PROPS.items() if self.headers.get(h)}

    def range(self, name: str = "") -> tuple[int, int | None] | None:
        """Half-open (start, end or None) of x-ms-range or Range; None without either."""
        text = self.header(name) if name else self.header("x-ms-range") or self.header("range")
        if not text:
            return None
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", text.strip())
        if match is None:
            raise StorageError(
                "InvalidHeaderValue", "Only ranges of the form bytes=start-end are understood."
            )
        end = int(match[2]) + 1 if match[2] else None
        if end is not None and end <= int(match[1]):
            raise StorageError("InvalidHeaderValue", "A range ends before it starts.")
        return int(match[1]), end

    def check_body(self) -> dict[str, str]:
        """Compare the body with Content-MD5 and x-ms-content-crc64; returns them for the answer."""
        out: dict[str, str] = {}
        if given := self.header("content-md5"):
            if self._decode(given, 16) != hashlib.md5(self.body).digest():
                raise StorageError(
                    "Md5Mismatch", "The MD5 value specified did not match that of the received body."
                )
            out["Content-MD5"] = given
        if given := self.header("x-ms-content-crc64"):
            if self._decode(given, 8) != crc64(self.body).to_bytes(8, "little"):
                raise StorageError(
                    "Crc64Mismatch", "The CRC64 value specified did not match that of the body."
                )
            out["x-ms-content-crc64"] = given
        return out

    def _decode(self, text: str, size: int) -> bytes:
        try:
            raw = base64.b64decode(text, validate=True)
        except binascii.Error as e:
            raise StorageError("InvalidMd5", "The checksum is no Base64.") from e
        if len(raw) != size:
            raise StorageError("InvalidMd5", f"The checksum has {len(raw)} bytes.")
        return raw


def read_metadata(headers: list[tuple[str, str]]) -> dict[str, str]:
    """`x-ms-meta-*` with names as spelt by the caller."""
    out = {k[10:]: v for k, v in headers if k.lower().startswith("x-ms-meta-")}
    for name in out:
        if not _META_NAME.match(name):
            raise StorageError("InvalidMetadata", f"{name!r} is no valid metadata name.")
    if sum(len(k) + len(v) for k, v in out.items()) > MAX_METADATA:
        raise StorageError("MetadataTooLarge", "Metadata is at most 8 KiB.")
    return out


def validators(row: BlobRow | ContainerRow) -> dict[str, str]:
    """ETag, Last-Modified and, for a page blob, its sequence number."""
    out = {"ETag": row.etag, "Last-Modified": http_date(row.modified)}
    if isinstance(row, BlobRow) and row.kind == PAGE_BLOB:
        out["x-ms-blob-sequence-number"] = str(row.seq)
    return out


def properties(row: BlobRow, now: float) -> dict[str, str]:
    """Everything Get Blob and Get Blob Properties say in headers, without the length."""
    out = validators(row)
    out["x-ms-blob-type"] = row.kind
    out["x-ms-creation-time"] = http_date(row.created)
    out["x-ms-server-encrypted"] = "true"
    out["Accept-Ranges"] = "bytes"
    out["Content-Type"] = "application/octet-stream"
    out.update(row.props)
    if not row.snapshot:
        out.update(leases.headers(row.lease, now))
    if row.copy is not None:
        out.update({f"x-ms-{k}": v for k, v in copy_fields(row.copy).items()})
    out.update({f"x-ms-meta-{k}": v for k, v in row.metadata.items()})
    return out
