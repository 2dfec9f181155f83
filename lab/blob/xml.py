"""XML bodies of the blob service: errors, listings, page lists, block lists."""

from __future__ import annotations

import base64
import datetime as dt
import re
from collections.abc import Iterable
from urllib.parse import quote
from xml.etree import ElementTree
from xml.sax.saxutils import escape, quoteattr

from . import leases
from .errors import StorageError
from .pages import PageRange
from .rows import PAGE_BLOB, BlobRow, ContainerRow, CopyState
from .store import Listing

_HEAD = '<?xml version="1.0" encoding="utf-8"?>'
_UNSAFE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")

SERVICE_PROPERTIES = f"{_HEAD}<StorageServiceProperties><Cors/></StorageServiceProperties>".encode()

PROPS = {
    "Content-Type": "x-ms-blob-content-type",
    "Content-Encoding": "x-ms-blob-content-encoding",
    "Content-Language": "x-ms-blob-content-language",
    "Content-MD5": "x-ms-blob-content-md5",
    "Cache-Control": "x-ms-blob-cache-control",
    "Content-Disposition": "x-ms-blob-content-disposition",
}
"""Content properties of a blob, and the request header that sets each."""


def http_date(moment: float) -> str:
    """RFC 1123 in GMT, whole seconds."""
    return dt.datetime.fromtimestamp(int(moment), dt.UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")


def error(e: StorageError, request_id: str, now: float) -> bytes:
    when = dt.datetime.fromtimestamp(now, dt.UTC).isoformat()
    text = f"{e.message}\nRequestId:{request_id}\nTime:{when}"
    return f"{_HEAD}<Error><Code>{e.code}</Code><Message>{escape(text)}</Message></Error>".encode()


def page_list(ranges: Iterable[PageRange], next_start: int | None) -> bytes:
    parts = [_HEAD, "<PageList>"]
    for r in ranges:
        tag = "ClearRange" if r.cleared else "PageRange"
        parts.append(f"<{tag}><Start>{r.start}</Start><End>{r.end - 1}</End></{tag}>")
    if next_start is not None:
        parts.append(f"<NextMarker>{next_start}</NextMarker>")
    return "".join([*parts, "</PageList>"]).encode()


def block_list(committed: list[tuple[str, int]] | None, waiting: list[tuple[str, int]] | None) -> bytes:
    parts = [_HEAD, "<BlockList>"]
    for tag, blocks in (("CommittedBlocks", committed), ("UncommittedBlocks", waiting)):
        if blocks is not None:
            inner = "".join(f"<Block><Name>{b}</Name><Size>{s}</Size></Block>" for b, s in blocks)
            parts.append(f"<{tag}>{inner}</{tag}>")
    return "".join([*parts, "</BlockList>"]).encode()


def parse_block_list(body: bytes) -> list[tuple[str, str]]:
    """(Committed | Uncommitted | Latest, id) in order."""
    try:
        root = ElementTree.fromstring(body)
    except ElementTree.ParseError as e:
        raise StorageError("InvalidXmlDocument", str(e)) from e
    out = [(child.tag, (child.text or "").strip()) for child in root]
    if root.tag != "BlockList" or any(tag not in ("Committed", "Uncommitted", "Latest") for tag, _ in out):
        raise StorageError("InvalidXmlDocument")
    return out


def copy_fields(copy: CopyState) -> dict[str, str]:
    """Header name without `x-ms-` → value."""
    out = {
        "copy-id": copy.id,
        "copy-source": copy.source,
        "copy-status": copy.status,
        "copy-progress": f"{copy.done}/{copy.total}",
    }
    if copy.finished is not None:
        out["copy-completion-time"] = http_date(copy.finished)
    if copy.description:
        out["copy-status-description"] = copy.description
    return out


def blob_listing(
    listing: Listing,
    *,
    endpoint: str,
    container: str,
    query: dict[str, str],
    metadata: bool,
    copy: bool,
    now: float,
) -> bytes:
    parts = [
        _HEAD,
        f"<EnumerationResults ServiceEndpoint={quoteattr(endpoint)} ContainerName={quoteattr(container)}>",
    ]
    for tag, key in (
        ("Prefix", "prefix"),
        ("Marker", "marker"),
        ("MaxResults", "maxresults"),
        ("Delimiter", "delimiter"),
    ):
        if query.get(key):
            parts.append(f"<{tag}>{escape(query[key])}</{tag}>")
    parts.append("<Blobs>")
    for item in listing.items:
        if isinstance(item, str):
            parts.append(f"<BlobPrefix>{_name(item)}</BlobPrefix>")
        else:
            parts.append(_blob(item, metadata=metadata, copy=copy, now=now))
    parts.append(f"</Blobs><NextMarker>{marker_of(listing.next_marker)}</NextMarker></EnumerationResults>")
    return "".join(parts).encode()


def container_listing(
    rows: list[ContainerRow],
    next_marker: str,
    *,
    endpoint: str,
    query: dict[str, str],
    metadata: bool,
    now: float,
) -> bytes:
    parts = [_HEAD, f"<EnumerationResults ServiceEndpoint={quoteattr(endpoint)}>"]
    for tag, key in (("Prefix", "prefix"), ("Marker", "marker"), ("MaxResults", "maxresults")):
        if query.get(key):
            parts.append(f"<{tag}>{escape(query[key])}</{tag}>")
    parts.append("<Containers>")
    for row in rows:
        lease = _lease_tags(leases.headers(row.lease, now))
        parts.append(
            f"<Container><Name>{row.name}</Name><Properties><Last-Modified>{http_date(row.modified)}</Last-Modified>"
            f"<Etag>{escape(row.etag)}</Etag>{lease}</Properties>"
            + (_metadata(row.metadata) if metadata else "")
            + "</Container>"
        )
    parts.append(f"</Containers><NextMarker>{next_marker}</NextMarker></EnumerationResults>")
    return "".join(parts).encode()


def marker_of(text: str) -> str:
    """An opaque continuation token."""
    return base64.urlsafe_b64encode(text.encode()).decode() if text else ""


def from_marker(marker: str) -> str:
    if not marker:
        return ""
    try:
        return base64.urlsafe_b64decode(marker).decode()
    except ValueError as e:
        raise StorageError("OutOfRangeQueryParameterValue", "marker") from e


def _blob(row: BlobRow, *, metadata: bool, copy: bool, now: float) -> str:
    props = {
        "Creation-Time": http_date(row.created),
        "Last-Modified": http_date(row.modified),
        "Etag": row.etag.strip('"'),
        "Content-Length": str(row.size),
        "Content-Type": "application/octet-stream",
        **row.props,
        "BlobType": row.kind,
        "ServerEncrypted": "true",
    }
    if row.kind == PAGE_BLOB:
        props["x-ms-blob-sequence-number"] = str(row.seq)
    inner = "".join(f"<{k}>{escape(v)}</{k}>" for k, v in props.items())
    if not row.snapshot:
        inner += _lease_tags(leases.headers(row.lease, now))
    if copy and row.copy is not None:
        for key, value in copy_fields(row.copy).items():
            tag = "".join(part.capitalize() for part in key.split("-"))
            inner += f"<{tag}>{escape(value)}</{tag}>"
    snapshot = f"<Snapshot>{row.snapshot}</Snapshot>" if row.snapshot else ""
    extra = _metadata(row.metadata) if metadata else ""
    return f"<Blob>{_name(row.name)}{snapshot}<Properties>{inner}</Properties>{extra}</Blob>"


def _name(name: str) -> str:
    if _UNSAFE.search(name):
        return f'<Name Encoded="true">{quote(name)}</Name>'
    return f"<Name>{escape(name)}</Name>"


def _metadata(metadata: dict[str, str]) -> str:
    return "<Metadata>" + "".join(f"<{k}>{escape(v)}</{k}>" for k, v in metadata.items()) + "</Metadata>"


def _lease_tags(headers: dict[str, str]) -> str:
    tags = {
        "x-ms-lease-status": "LeaseStatus",
        "x-ms-lease-state": "LeaseState",
        "x-ms-lease-duration": "LeaseDuration",
    }
    return "".join(f"<{tags[k]}>{v}</{tags[k]}>" for k, v in headers.items())
