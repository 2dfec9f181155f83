"""Conditional requests: ETags, dates, lease and sequence number (REST reference, "conditional headers")."""

from __future__ import annotations

from dataclasses import dataclass

from . import leases
from .errors import NotModified, StorageError
from .rows import BlobRow


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a request demands of the blob it addresses. Times are Unix seconds (HTTP dates: whole seconds)."""

    if_match: str = ""
    if_none_match: str = ""
    if_modified_since: float | None = None
    if_unmodified_since: float | None = None
    lease_id: str = ""
    seq_le: int | None = None
    seq_lt: int | None = None
    seq_eq: int | None = None


NONE = Conditions()


def _same(tag: str, etag: str) -> bool:
    return tag == "*" or tag.strip().removeprefix("W/").strip('"') == etag.strip('"')


def check_read(row: BlobRow, cond: Conditions, now: float) -> None:
    """412 or `NotModified` for a read."""
    leases.check_read(row.lease, now, cond.lease_id)
    if cond.if_match and not _same(cond.if_match, row.etag):
        raise StorageError("ConditionNotMet")
    if cond.if_unmodified_since is not None and int(row.modified) > cond.if_unmodified_since:
        raise StorageError("ConditionNotMet")
    if cond.if_none_match and _same(cond.if_none_match, row.etag):
        raise NotModified(row.etag)
    if cond.if_modified_since is not None and int(row.modified) <= cond.if_modified_since:
        raise NotModified(row.etag)


def check_dates(row: BlobRow | None, cond: Conditions, code: str = "ConditionNotMet") -> None:
    """The ETag and date part of a write's conditions, also for a blob that is not there yet."""
    if row is None:
        if cond.if_match:
            raise StorageError(code)
        return
    if cond.if_none_match.strip() == "*":
        raise StorageError("BlobAlreadyExists", "The specified blob already exists.")
    if cond.if_match and not _same(cond.if_match, row.etag):
        raise StorageError(code)
    if cond.if_none_match and _same(cond.if_none_match, row.etag):
        raise StorageError(code)
    if cond.if_modified_since is not None and int(row.modified) <= cond.if_modified_since:
        raise StorageError(code)
    if cond.if_unmodified_since is not None and int(row.modified) > cond.if_unmodified_since:
        raise StorageError(code)


def check_write(row: BlobRow | None, cond: Conditions, now: float) -> None:
    """Everything a write must satisfy; `row` is None when the blob does not exist."""
    if row is None:
        if cond.lease_id:
            raise StorageError("LeaseNotPresentWithBlobOperation")
        check_dates(row, cond)
        return
    check_dates(row, cond)
    leases.check_write(row.lease, now, cond.lease_id)
    for bound, holds in (
        (cond.seq_le, cond.seq_le is None or row.seq <= cond.seq_le),
        (cond.seq_lt, cond.seq_lt is None or row.seq < cond.seq_lt),
        (cond.seq_eq, cond.seq_eq is None or row.seq == cond.seq_eq),
    ):
        if not holds:
            raise StorageError(
                "SequenceNumberConditionNotMet",
                f"The blob's sequence number is {row.seq}, asked for {bound}.",
            )


def after_write(row: BlobRow, now: float) -> None:
    """A write to a blob whose lease has ended makes the blob available again."""
    if row.lease.id and leases.state_at(row.lease, now) in ("expired", "broken"):
        row.lease.id = ""
        row.lease.expires = row.lease.breaks = None
