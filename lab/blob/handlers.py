"""The operations of the REST interface, one function each. They block: the server runs them in threads."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable

from . import leases, xml
from .auth import check_sas, parse_url
from .call import Call, Reply, properties, validators
from .core import MAX_PUT_PAGE
from .crc64 import crc64
from .errors import BlobAuthError, BlobNotFound, StorageError
from .rows import BlobRow, Lease
from .store import BlobStore

XML = {"Content-Type": "application/xml"}


# --- account ----------------------------------------------------------------------------------------------------


def list_containers(c: Call) -> Reply:
    limit = c.query_number("maxresults", 5000, 5000)
    rows, marker = c.store.list_containers(c.query.get("prefix", ""), c.query.get("marker", ""), limit)
    body = xml.container_listing(
        rows,
        marker,
        endpoint=c.endpoint,
        query=c.query,
        metadata="metadata" in c.query.get("include", ""),
        now=c.store.clock(),
    )
    return Reply(200, dict(XML), body)


def account_information(c: Call) -> Reply:
    """Get Account Information, and with restype=service an account's (empty) service properties."""
    if c.query.get("restype") == "service":
        return Reply(200, dict(XML), xml.SERVICE_PROPERTIES)
    sku = "Premium_LRS" if c.store.premium.max_snapshots is not None else "Standard_LRS"
    return Reply(
        200, {"x-ms-sku-name": sku, "x-ms-account-kind": "StorageV2", "x-ms-is-hns-enabled": "false"}
    )


# --- containers -------------------------------------------------------------------------------------------------


def create_container(c: Call) -> Reply:
    return Reply(201, validators(c.store.create_container(c.container, c.metadata)))


def container_properties(c: Call) -> Reply:
    row = c.store.need_container(c.container)
    leases.check_read(row.lease, c.store.clock(), c.header("x-ms-lease-id"), what="Container")
    headers = {**validators(row), **leases.headers(row.lease, c.store.clock())}
    headers.update({f"x-ms-meta-{k}": v for k, v in row.metadata.items()})
    return Reply(200, {**headers, "x-ms-has-immutability-policy": "false", "x-ms-has-legal-hold": "false"})


def set_container_metadata(c: Call) -> Reply:
    return Reply(200, validators(c.store.set_container_metadata(c.container, c.metadata)))


def delete_container(c: Call) -> Reply:
    c.store.delete_container(c.container, c.conditions())
    return Reply(202)


def lease_container(c: Call) -> Reply:
    status, headers, act = _lease_act(c)
    row = c.store.lease_container(c.container, act)
    return Reply(status, {**validators(row), **headers})


def list_blobs(c: Call) -> Reply:
    include = c.query.get("include", "").split(",")
    listing = c.store.list_blobs(
        c.container,
        prefix=c.query.get("prefix", ""),
        delimiter=c.query.get("delimiter", ""),
        marker=xml.from_marker(c.query.get("marker", "")),
        limit=c.query_number("maxresults", 5000, 5000),
        snapshots="snapshots" in include,
    )
    body = xml.blob_listing(
        listing,
        endpoint=c.endpoint,
        container=c.container,
        query=c.query,
        metadata="metadata" in include,
        copy="copy" in include,
        now=c.store.clock(),
    )
    return Reply(200, dict(XML), body)


# --- any blob ---------------------------------------------------------------------------------------------------


def put_blob(c: Call) -> Reply:
    kind = c.need("x-ms-blob-type")
    _refuse_overwrite(c)
    if kind == "PageBlob":
        if c.body:
            raise StorageError("InvalidHeaderValue", "Put Blob of a page blob has no body.")
        size = c.number("x-ms-blob-content-length")
        if size is None:
            c.need("x-ms-blob-content-length")
        row = c.store.put_page_blob(
            c.container,
            c.blob,
            size or 0,
            props=c.props(),
            metadata=c.metadata,
            seq=c.number("x-ms-blob-sequence-number") or 0,
            cond=c.conditions(),
        )
        return Reply(201, validators(row))
    if kind != "BlockBlob":
        raise StorageError("InvalidHeaderValue", f"x-ms-blob-type {kind} is not served here.")
    if c.header("x-ms-copy-source"):
        raise StorageError("UnsupportedHeader", "Put Blob From URL is not served here.")
    checks = c.check_body()
    props = c.props()
    if c.header("content-type"):
        props.setdefault("Content-Type", c.header("content-type"))
    md5 = base64.b64encode(hashlib.md5(c.body).digest()).decode()
    if props.setdefault("Content-MD5", md5) != md5:
        raise StorageError("Md5Mismatch", "x-ms-blob-content-md5 did not match that of the received body.")
    row = c.store.put_block_blob(
        c.container, c.blob, bytes(c.body), props=props, metadata=c.metadata, cond=c.conditions()
    )
    return Reply(
        201, {**validators(row), **checks, "Content-MD5": md5, "x-ms-request-server-encrypted": "true"}
    )


def get_blob(c: Call) -> Reply:
    row = c.store.get(c.container, c.blob, c.snapshot, c.conditions())
    headers = properties(row, c.store.clock())
    wanted = c.range()
    if wanted is None:
        return Reply(200, headers, row=row, start=0, length=row.size)
    start, end = wanted
    if start >= row.size:
        raise StorageError(
            "InvalidRange",
            "The range specified is invalid for the current size of the resource.",
            headers={"Content-Range": f"bytes */{row.size}"},
        )
    end = row.size if end is None else min(end, row.size)
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{row.size}"
    if "Content-MD5" in headers:
        headers["x-ms-blob-content-md5"] = headers.pop("Content-MD5")
    md5 = c.header("x-ms-range-get-content-md5").lower() == "true"
    crc = c.header("x-ms-range-get-content-crc64").lower() == "true"
    if md5 or crc:
        if end - start > MAX_PUT_PAGE:
            raise StorageError("OutOfRangeInput", "A checksum is given for ranges of at most 4 MiB.")
        body = c.store.read(row, start, end - start)
        if md5:
            headers["Content-MD5"] = base64.b64encode(hashlib.md5(body).digest()).decode()
        if crc:
            headers["x-ms-content-crc64"] = base64.b64encode(crc64(body).to_bytes(8, "little")).decode()
        return Reply(206, headers, body)
    return Reply(206, headers, row=row, start=start, length=end - start)


def blob_properties(c: Call) -> Reply:
    row = c.store.get(c.container, c.blob, c.snapshot, c.conditions())
    headers = properties(row, c.store.clock())
    headers["Content-Length"] = str(row.size)
    return Reply(200, headers)


def blob_metadata(c: Call) -> Reply:
    row = c.store.get(c.container, c.blob, c.snapshot, c.conditions())
    return Reply(200, {**validators(row), **{f"x-ms-meta-{k}": v for k, v in row.metadata.items()}})


def set_metadata(c: Call) -> Reply:
    _base_only(c)
    return Reply(200, validators(c.store.set_metadata(c.container, c.blob, c.metadata, c.conditions())))


def set_properties(c: Call) -> Reply:
    _base_only(c)
    size = c.number("x-ms-blob-content-length")
    action = c.header("x-ms-sequence-number-action")
    props = c.props()
    # Resizing and numbering alone leave the content headers; setting any of them replaces all of them.
    row = c.store.set_properties(
        c.container,
        c.blob,
        props=None if not props and (size is not None or action) else props,
        size=size,
        seq_action=action,
        seq=c.number("x-ms-blob-sequence-number"),
        cond=c.conditions(),
    )
    return Reply(200, validators(row))


def delete_blob(c: Call) -> Reply:
    c.store.delete(
        c.container,
        c.blob,
        c.snapshot,
        snapshots=c.header("x-ms-delete-snapshots").lower(),
        cond=c.conditions(),
    )
    return Reply(202, {"x-ms-delete-type-permanent": "true"})


def snapshot_blob(c: Call) -> Reply:
    _base_only(c)
    row = c.store.snapshot(c.container, c.blob, c.metadata, c.conditions())
    return Reply(
        201, {**validators(row), "x-ms-snapshot": row.snapshot, "x-ms-request-server-encrypted": "false"}
    )


def lease_blob(c: Call) -> Reply:
    _base_only(c)
    status, headers, act = _lease_act(c)
    row = c.store.lease_blob(c.container, c.blob, act, c.conditions())
    return Reply(status, {**validators(row), **headers})


def _lease_act(c: Call) -> tuple[int, dict[str, str], Callable[[Lease, float], None]]:
    """Status, headers (filled when the action runs) and the action."""
    headers: dict[str, str] = {}
    action = c.need("x-ms-lease-action").lower()
    lease_id = c.header("x-ms-lease-id")
    proposed = c.header("x-ms-proposed-lease-id")

    def acquire(lease: Lease, now: float) -> None:
        duration = c.number("x-ms-lease-duration")
        headers["x-ms-lease-id"] = leases.acquire(lease, now, -1 if duration is None else duration, proposed)

    def renew(lease: Lease, now: float) -> None:
        headers["x-ms-lease-id"] = leases.renew(lease, now, lease_id)

    def change(lease: Lease, now: float) -> None:
        headers["x-ms-lease-id"] = leases.change(lease, now, lease_id, c.need("x-ms-proposed-lease-id"))

    def release(lease: Lease, now: float) -> None:
        leases.release(lease, now, lease_id)

    def break_(lease: Lease, now: float) -> None:
        headers["x-ms-lease-time"] = str(leases.break_(lease, now, c.number("x-ms-lease-break-period")))

    table: dict[str, tuple[int, Callable[[Lease, float], None]]] = {
        "acquire": (201, acquire),
        "renew": (200, renew),
        "change": (200, change),
        "release": (200, release),
        "break": (202, break_),
    }
    if action not in table:
        raise StorageError("InvalidHeaderValue", "x-ms-lease-action")
    if action in ("renew", "change", "release"):
        c.need("x-ms-lease-id")
    status, act = table[action]
    return status, headers, act


# --- page blobs -------------------------------------------------------------------------------------------------


def put_page(c: Call) -> Reply:
    _base_only(c)
    start, end = _page_range(c)
    kind = c.need("x-ms-page-write").lower()
    if kind == "clear":
        if c.body:
            raise StorageError("InvalidHeaderValue", "Clearing pages has no body.")
        return Reply(201, validators(c.store.clear_pages(c.container, c.blob, start, end, c.conditions())))
    if kind != "update":
        raise StorageError("InvalidHeaderValue", "x-ms-page-write is update or clear.")
    if c.header("x-ms-copy-source"):
        return _put_page_from_url(c, start, end)
    if len(c.body) != end - start:
        raise StorageError("InvalidHeaderValue", "Content-Length is not the length of the range.")
    checks = c.check_body()
    row = c.store.put_pages(c.container, c.blob, start, c.body, c.conditions())
    return Reply(201, {**validators(row), **checks, "x-ms-request-server-encrypted": "true"})


def _put_page_from_url(c: Call, start: int, end: int) -> Reply:
    if end - start > MAX_PUT_PAGE:
        raise StorageError("RequestBodyTooLarge", "Put Page From URL takes at most 4 MiB.")
    store, row = _source(c, need_sas=True)
    wanted = c.range("x-ms-source-range")
    if wanted is None:
        c.need("x-ms-source-range")
    low, high = wanted or (0, None)
    if high is None or high - low != end - start or high > row.size:
        raise StorageError("InvalidHeaderValue", "x-ms-source-range does not fit.")
    data = store.read(row, low, high - low)
    md5 = base64.b64encode(hashlib.md5(data).digest()).decode()
    if c.header("x-ms-source-content-md5") not in ("", md5):
        raise StorageError("Md5Mismatch")
    done = c.store.put_pages(c.container, c.blob, start, data, c.conditions())
    return Reply(201, {**validators(done), "Content-MD5": md5, "x-ms-request-server-encrypted": "true"})


def page_ranges(c: Call) -> Reply:
    wanted = c.range() or (0, None)
    start, end = wanted
    marker = c.query.get("marker", "")
    if marker:
        if not marker.isdigit():
            raise StorageError("OutOfRangeQueryParameterValue", "marker")
        start = max(start, int(marker))
    row, ranges, rest = c.store.page_ranges(
        c.container,
        c.blob,
        c.snapshot,
        prev=c.query.get("prevsnapshot", ""),
        start=start,
        end=end,
        limit=c.query_number("maxresults", 10_000, 10_000),
        cond=c.conditions(),
    )
    headers = {**validators(row), **XML, "x-ms-blob-content-length": str(row.size)}
    return Reply(200, headers, xml.page_list(ranges, rest))


def _page_range(c: Call) -> tuple[int, int]:
    wanted = c.range()
    if wanted is None:
        c.need("x-ms-range")
    start, end = wanted or (0, None)
    if end is None:
        raise StorageError("InvalidHeaderValue", "Put Page needs both ends of the range.")
    return start, end


# --- copies -----------------------------------------------------------------------------------------------------


def copy_blob(c: Call) -> Reply:
    if c.header("x-ms-requires-sync"):
        raise StorageError("UnsupportedHeader", "Only asynchronous copies are served here.")
    _refuse_overwrite(c)
    url = c.need("x-ms-copy-source")
    source, origin = _source(c, need_sas=False)
    row = c.store.start_copy(
        c.container,
        c.blob,
        source,
        (origin.container, origin.name, origin.snapshot),
        url.split("&sig=")[0],
        metadata=c.metadata,
        cond=c.conditions(),
        source_cond=c.conditions("x-ms-source-"),
    )
    copy_id = row.copy.id if row.copy else ""
    return Reply(202, {**validators(row), "x-ms-copy-id": copy_id, "x-ms-copy-status": "pending"})


def abort_copy(c: Call) -> Reply:
    if c.need("x-ms-copy-action").lower() != "abort":
        raise StorageError("InvalidHeaderValue", "x-ms-copy-action")
    c.store.abort_copy(c.container, c.blob, c.query.get("copyid", ""), c.conditions())
    return Reply(204)


def _source(c: Call, *, need_sas: bool) -> tuple[BlobStore, BlobRow]:
    """The blob x-ms-copy-source names. Its SAS must allow reading; without one only the owner of the same account
    may copy, and From-URL writes always need one."""
    target = parse_url(c.need("x-ms-copy-source"))
    store = c.store if target.account == c.store.account else c.peers.get(target.account)
    if store is None:
        raise BlobNotFound("CannotVerifyCopySource", "The specified resource does not exist.")
    if "sig" in target.query:
        try:
            check_sas(store, target, permission="r", resource="o")
        except BlobAuthError as e:
            raise StorageError("CannotVerifyCopySource", e.message, status=403) from e
    elif need_sas or store is not c.store or c.granted != "*":
        raise StorageError("CannotVerifyCopySource", "The specified resource does not exist.")
    row = store.catalog.blob(target.container, target.blob, target.query.get("snapshot", ""))
    if row is None:
        raise BlobNotFound("CannotVerifyCopySource", "The specified blob does not exist.")
    return store, row


# --- block blobs ------------------------------------------------------------------------------------------------


def put_block(c: Call) -> Reply:
    if c.header("x-ms-copy-source"):
        raise StorageError("UnsupportedHeader", "Put Block From URL is not served here.")
    block = c.query.get("blockid", "")
    if not block:
        raise StorageError("MissingRequiredQueryParameter", "blockid")
    checks = c.check_body()
    c.store.put_block(c.container, c.blob, block, bytes(c.body), c.conditions())
    return Reply(201, {**checks, "x-ms-request-server-encrypted": "true"})


def put_block_list(c: Call) -> Reply:
    _refuse_overwrite(c)
    checks = c.check_body()
    row = c.store.put_block_list(
        c.container,
        c.blob,
        xml.parse_block_list(bytes(c.body)),
        props=c.props(),
        metadata=c.metadata,
        cond=c.conditions(),
    )
    return Reply(201, {**validators(row), **checks, "x-ms-request-server-encrypted": "true"})


def block_list(c: Call) -> Reply:
    wanted = c.query.get("blocklisttype", "committed").lower()
    row, committed, waiting = c.store.block_list(c.container, c.blob, c.snapshot, c.conditions())
    headers = dict(XML)
    if row is not None:
        headers.update(validators(row))
        headers["x-ms-blob-content-length"] = str(row.size)
    body = xml.block_list(
        committed if wanted in ("committed", "all") else None,
        waiting if wanted in ("uncommitted", "all") else None,
    )
    return Reply(200, headers, body)


# --- shared -----------------------------------------------------------------------------------------------------


def _base_only(c: Call) -> None:
    if c.snapshot:
        raise StorageError("InvalidQueryParameterValue", "A snapshot cannot be written.")


def _refuse_overwrite(c: Call) -> None:
    """A SAS that may only create must not replace."""
    if c.granted != "*" and "w" not in c.granted and c.store.catalog.blob(c.container, c.blob) is not None:
        raise StorageError("UnauthorizedBlobOverwrite", "This request is not authorized to overwrite blobs.")
