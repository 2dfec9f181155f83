"""One storage account: containers, blobs, snapshots, leases, listing, and the way in for the ARM laboratory."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from . import conditions, leases
from .auth import check_sas, parse_url
from .conditions import NONE, Conditions
from .copy_ops import CopyOps
from .errors import BlobAuthError, BlobNotFound, StorageError
from .rows import BLOCK_BLOB, PAGE_BLOB, BlobRow, ContainerRow, Lease

__all__ = ["BlobAuthError", "BlobNotFound", "BlobStore", "BlobView", "Listing"]

_CONTAINER_NAME = re.compile(r"^(\$root|\$logs|[a-z0-9](?:-?[a-z0-9]){2,62})$")


@dataclass(slots=True)
class Listing:
    """One page of List Blobs: rows and prefixes in order, and where to go on (empty = finished)."""

    items: list[BlobRow | str] = field(default_factory=list["BlobRow | str"])
    next_marker: str = ""


class BlobView:
    """Read access to one blob or snapshot, fixed at the moment it was opened as to what it names."""

    def __init__(self, store: BlobStore, row: BlobRow) -> None:
        self._store = store
        self.row = row

    @property
    def size(self) -> int:
        return self.row.size

    def read(self, offset: int, length: int) -> bytes:
        """Bytes [offset, offset+length); short at the end of the blob; holes read as zeros."""
        length = max(0, min(length, self.row.size - offset))
        return self._store.read(self.row, offset, length) if length else b""

    def extents(self) -> Iterator[tuple[int, int]]:
        """(start, length) of everything that holds data, in order."""
        if self.row.kind != PAGE_BLOB:
            if self.row.size:
                yield 0, self.row.size
            return
        at: int | None = 0
        while at is not None:
            _, ranges, at = self._store.page_ranges(
                self.row.container, self.row.name, self.row.snapshot, start=at, limit=100_000
            )
            for r in ranges:
                yield r.start, r.end - r.start


class BlobStore(CopyOps):
    """A storage account on disk. Thread-safe; blocking, so call it from threads, not from an event loop.

    Raises `StorageError` (`BlobNotFound`, `BlobAuthError`) with the service's own codes. Opening resumes copies
    that were pending when the process died.
    """

    def __init__(
        self,
        root: Path,
        account: str,
        key: str,
        *,
        durable: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(root, account, key, durable=durable, clock=clock)
        self.resume_copies()

    # --- for the ARM laboratory -----------------------------------------------------------------------------

    def open_url(self, url: str) -> BlobView:
        """Open a blob by URL (path style `…/ACCOUNT/container/blob` or host style `ACCOUNT.blob.…/container/blob`).

        `snapshot=` is honoured. A SAS in the query must allow reading; a URL without one is taken as asked by the
        account's owner, as ARM does with its own rights. Raises BlobAuthError, BlobNotFound.
        """
        target = parse_url(url)
        if target.account != self.account:
            raise BlobNotFound(
                "ResourceNotFound", f"The storage account {target.account} does not exist here."
            )
        if "sig" in target.query:
            check_sas(self, target, permission="r", resource="o")
        return self.open(target.container, target.blob, target.query.get("snapshot", ""))

    def open(self, container: str, name: str, snapshot: str = "") -> BlobView:
        return BlobView(self, self.need_blob(container, name, snapshot))

    # --- containers -----------------------------------------------------------------------------------------

    def create_container(self, name: str, metadata: dict[str, str] | None = None) -> ContainerRow:
        if not _CONTAINER_NAME.match(name):
            raise StorageError(
                "InvalidResourceName", "The specified resource name contains invalid characters."
            )
        row = ContainerRow(name, "", 0.0, metadata or {})
        with self.catalog.transaction():
            if self.catalog.container(name) is not None:
                raise StorageError("ContainerAlreadyExists", "The specified container already exists.")
            self.stamp(row)
            self.catalog.save_container(row)
        return row

    def delete_container(self, name: str, cond: Conditions = NONE) -> None:
        """The container and all in it, at once."""
        with self.catalog.transaction() as db:
            row = self.need_container(name)
            leases.check_write(row.lease, self.clock(), cond.lease_id, what="Container")
            stores = {
                r[0]
                for r in self.catalog.query(
                    "SELECT store FROM blobs WHERE container=? UNION SELECT store FROM blocks WHERE container=?",
                    (name, name),
                )
            }
            db.execute("DELETE FROM blobs WHERE container=?", (name,))
            db.execute("DELETE FROM blocks WHERE container=?", (name,))
            db.execute("DELETE FROM containers WHERE name=?", (name,))
        for store in stores:
            self.drop_if_unreferenced(store)

    def set_container_metadata(self, name: str, metadata: dict[str, str]) -> ContainerRow:
        with self.catalog.transaction():
            row = self.need_container(name)
            row.metadata = metadata
            self.stamp(row)
            self.catalog.save_container(row)
        return row

    def list_containers(
        self, prefix: str = "", marker: str = "", limit: int = 5000
    ) -> tuple[list[ContainerRow], str]:
        rows = [r for r in self.catalog.containers(prefix) if r.name >= marker]
        return rows[:limit], rows[limit].name if len(rows) > limit else ""

    # --- reading --------------------------------------------------------------------------------------------

    def get(self, container: str, name: str, snapshot: str = "", cond: Conditions = NONE) -> BlobRow:
        """The row behind Get Blob and Get Properties; checks the conditions of a read."""
        row = self.need_blob(container, name, snapshot)
        conditions.check_read(row, cond, self.clock())
        return row

    def read(self, row: BlobRow, offset: int, length: int) -> bytes:
        """Bytes of a row got before; raises BlobNotFound if the blob has gone or was replaced meanwhile."""
        with self.path_lock(row.container, row.name):
            now = self.need_blob(row.container, row.name, row.snapshot)
            if now.store != row.store:
                raise BlobNotFound("BlobNotFound", "The blob was replaced.")
            if row.kind == BLOCK_BLOB:
                return self.read_block(row, offset, length)
            return self.pages(row.store).read(now.gen, offset, length)

    # --- snapshots and deletion -----------------------------------------------------------------------------

    def snapshot(
        self, container: str, name: str, metadata: dict[str, str] | None = None, cond: Conditions = NONE
    ) -> BlobRow:
        """Snapshot Blob: returns the snapshot's row. Instant; its metadata is the base's unless given."""
        with self.path_lock(container, name):
            base = self.need_blob(container, name)
            now = self.clock()
            conditions.check_dates(base, cond)
            leases.check_read(base.lease, now, cond.lease_id)
            if base.copy is not None and base.copy.status == "pending":
                raise StorageError("PendingCopyOperation", "There is currently a pending copy operation.")
            self._premium_rules(base, now)
            snap = BlobRow(
                container,
                name,
                base.kind,
                base.store,
                base.size,
                base.etag,
                base.modified,
                base.created,
                snapshot=self.snapshot_id(),
                gen=base.gen,
                seq=base.seq,
                props=base.props,
                metadata=metadata or base.metadata,
                copy=base.copy,
                blocks=base.blocks,
            )
            if metadata:
                self.stamp(snap)  # a snapshot with metadata of its own has validators of its own
            base.gen += 1
            with self.catalog.transaction():
                self.catalog.save_blob(snap)
                self.catalog.save_blob(base)
            return snap

    def _premium_rules(self, base: BlobRow, now: float) -> None:
        if base.kind != PAGE_BLOB or (
            self.premium.max_snapshots is None and self.premium.min_interval is None
        ):
            return
        snaps = self.catalog.snapshots(base.container, base.name)
        if self.premium.max_snapshots is not None and len(snaps) >= self.premium.max_snapshots:
            raise StorageError("SnapshotCountExceeded", "The snapshot count limit is exceeded.")
        if snaps and self.premium.min_interval is not None:
            taken = self.catalog.get_meta(f"snapped:{base.path}")
            if taken is not None and now - float(taken) < self.premium.min_interval:
                raise StorageError(
                    "SnapshotOperationRateExceeded", "The rate of snapshot operations is exceeded."
                )
        self.catalog.set_meta(f"snapped:{base.path}", str(now))

    def delete(
        self, container: str, name: str, snapshot: str = "", *, snapshots: str = "", cond: Conditions = NONE
    ) -> None:
        """Delete Blob. `snapshots` is x-ms-delete-snapshots: "", "include" or "only"."""
        if snapshots not in ("", "include", "only") or (snapshot and snapshots):
            raise StorageError("InvalidHeaderValue", "x-ms-delete-snapshots")
        with self.path_lock(container, name):
            row = self.need_blob(container, name, snapshot)
            conditions.check_dates(row, cond)
            if snapshot:
                self._remove([row])
                return
            leases.check_write(row.lease, self.clock(), cond.lease_id)
            snaps = self.catalog.snapshots(container, name)
            if snapshots == "only":
                self._remove(snaps)
                return
            if row.copy is not None and row.copy.status == "pending":
                raise StorageError("PendingCopyOperation", "There is currently a pending copy operation.")
            if snaps and snapshots != "include":
                raise StorageError(
                    "SnapshotsPresent", "This operation is not permitted while the blob has snapshots."
                )
            self._remove([*snaps, row])

    def _remove(self, rows: list[BlobRow]) -> None:
        """Rows first, in one transaction; then what only they needed."""
        with self.catalog.transaction():
            for row in rows:
                self.catalog.delete_blob(row)
        for row in rows:
            self.retire(row)

    # --- properties, leases ---------------------------------------------------------------------------------

    def set_metadata(
        self, container: str, name: str, metadata: dict[str, str], cond: Conditions = NONE
    ) -> BlobRow:
        with self.path_lock(container, name):
            row = self.need_blob(container, name)
            self.check_writable(row, cond)
            row.metadata = metadata
            conditions.after_write(row, self.clock())
            self.stamp(row)
            self.catalog.save_blob(row)
            return row

    def set_properties(
        self,
        container: str,
        name: str,
        *,
        props: dict[str, str] | None,
        size: int | None = None,
        seq_action: str = "",
        seq: int | None = None,
        cond: Conditions = NONE,
    ) -> BlobRow:
        """Set Blob Properties: content headers (None leaves them), resize, sequence number."""
        with self.path_lock(container, name):
            row = self.need_blob(container, name)
            self.check_writable(row, cond)
            if (size is not None or seq_action) and row.kind != PAGE_BLOB:
                raise StorageError("InvalidBlobType")
            if seq_action:
                self.set_sequence(row, seq_action, seq)
            if props is not None:
                row.props = props
            conditions.after_write(row, self.clock())
            self.stamp(row)
            if size is not None:
                self.resize(row, size)
            else:
                self.catalog.save_blob(row)
            return row

    def lease_blob(
        self, container: str, name: str, act: Callable[[Lease, float], None], cond: Conditions = NONE
    ) -> BlobRow:
        """Do one lease operation; leases change neither ETag nor Last-Modified."""
        with self.path_lock(container, name):
            row = self.need_blob(container, name)
            conditions.check_dates(row, cond)
            act(row.lease, self.clock())
            self.catalog.save_blob(row)
            return row

    def lease_container(self, name: str, act: Callable[[Lease, float], None]) -> ContainerRow:
        with self.catalog.transaction():
            row = self.need_container(name)
            act(row.lease, self.clock())
            self.catalog.save_container(row)
            return row

    # --- listing --------------------------------------------------------------------------------------------

    def list_blobs(
        self,
        container: str,
        *,
        prefix: str = "",
        delimiter: str = "",
        marker: str = "",
        limit: int = 5000,
        snapshots: bool = False,
    ) -> Listing:
        """List Blobs in name order, each name's snapshots oldest first and before its base blob."""
        self.need_container(container)
        out = Listing()
        name, _, order = marker.partition("\n")
        after = (name, order) if marker else None
        last = ("", "")
        for row in self.catalog.blobs(container, prefix, after, snapshots=snapshots):
            group = ""
            if delimiter:
                head, found, _ = row.name[len(prefix) :].partition(delimiter)
                group = prefix + head + found if found else ""
            if group and out.items and out.items[-1] == group:
                last = (row.name, row.snapshot or "~")
                continue
            if group and after is not None and after[0].startswith(group):
                continue  # this prefix ended the page before
            if len(out.items) >= limit:
                out.next_marker = "\n".join(last)
                break
            out.items.append(group or row)
            last = (row.name, row.snapshot or "~")
        return out

    # --- statistics for tests and the control API -----------------------------------------------------------

    def allocated_bytes(self, container: str, name: str) -> int:
        """Disk space of a page blob and the snapshots that share its store."""
        row = self.need_pages(container, name)
        return self.pages(row.store).allocated
