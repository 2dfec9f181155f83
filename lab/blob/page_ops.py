"""Operations on page blobs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

from . import conditions
from .conditions import NONE, Conditions
from .core import MAX_PAGE_BLOB, MAX_PUT_PAGE, StoreCore
from .errors import StorageError
from .pages import PAGE, Change, PageRange, PageStore
from .rows import PAGE_BLOB, BlobRow

MAX_SEQ = 2**63 - 1


class PageOps(StoreCore):
    def put_page_blob(
        self,
        container: str,
        name: str,
        size: int,
        *,
        props: dict[str, str] | None = None,
        metadata: dict[str, str] | None = None,
        seq: int = 0,
        cond: Conditions = NONE,
    ) -> BlobRow:
        """Put Blob (page): an empty blob of `size` bytes, in place of whatever had the name. Snapshots stay."""
        check_size(size)
        _check_seq(seq)
        with self.path_lock(container, name):
            old = self.catalog.blob(container, name)
            conditions.check_write(old, cond, self.clock())
            refuse_pending(old)
            with self.catalog.transaction():
                self.need_container(container)
                store = self.catalog.new_store(PAGE_BLOB)
                row = self.replacement(container, name, PAGE_BLOB, store, size=size, old=old)
                row.seq = seq
                row.props, row.metadata = props or {}, metadata or {}
                self.catalog.save_blob(row)
            if old is not None:
                self.retire(old)
            return row

    def put_pages(
        self,
        container: str,
        name: str,
        start: int,
        data: bytes | bytearray | memoryview,
        cond: Conditions = NONE,
    ) -> BlobRow:
        """Put Page (update). Atomic: all of it or nothing is in the blob, also after a crash."""
        if len(data) > MAX_PUT_PAGE:
            raise StorageError(
                "RequestBodyTooLarge", "Put Page takes at most 4 MiB.", headers={"x-ms-max": "4194304"}
            )
        return self._mutate(
            container,
            name,
            (start, start + len(data)),
            cond,
            lambda p, row: p.plan_write(row.gen, start, data),
        )

    def clear_pages(
        self, container: str, name: str, start: int, end: int, cond: Conditions = NONE
    ) -> BlobRow:
        """Put Page (clear) of [start, end), any length."""
        return self._mutate(
            container, name, (start, end), cond, lambda p, row: p.plan_clear(row.gen, start, end)
        )

    def _mutate(
        self,
        container: str,
        name: str,
        span: tuple[int, int],
        cond: Conditions,
        plan: Callable[[PageStore, BlobRow], Change],
    ) -> BlobRow:
        start, end = span
        if start % PAGE or end % PAGE or start >= end:
            raise StorageError("InvalidPageRange", "The page range is not aligned to 512 bytes.")
        with self.path_lock(container, name):
            row = self.need_pages(container, name)
            if end > row.size:
                raise StorageError("InvalidPageRange", "The page range is beyond the end of the blob.")
            self.check_writable(row, cond)
            lease = row.lease.id
            conditions.after_write(row, self.clock())
            self.stamp(row)
            save = self.catalog.touch_blob if row.lease.id == lease else self.catalog.save_blob
            self.change(row, lambda p: plan(p, row), save)
            return row

    def change(
        self, row: BlobRow, plan: Callable[[PageStore], Change], save: Callable[[BlobRow], None]
    ) -> None:
        """Bytes first, then one transaction for map and row, then the map in memory."""
        pages = self.pages(row.store)
        with pages.lock:
            change = plan(pages)
            try:
                with self.catalog.transaction() as db:
                    change.persist(db, row.store)
                    save(row)
            except BaseException:
                pages.abandon(change)
                raise
            pages.apply(change)

    def page_ranges(
        self,
        container: str,
        name: str,
        snapshot: str = "",
        *,
        prev: str = "",
        start: int = 0,
        end: int | None = None,
        limit: int = 10_000,
        cond: Conditions = NONE,
    ) -> tuple[BlobRow, list[PageRange], int | None]:
        """Get Page Ranges, or with `prev` the difference to that snapshot; the last value is where to go on."""
        with self.path_lock(container, name):
            row = self.need_pages(container, name, snapshot)
            conditions.check_read(row, cond, self.clock())
            stop = row.size if end is None else min(end, row.size)
            pages = self.pages(row.store)
            with pages.lock:
                if prev:
                    then = self._previous(row, prev)
                    found = pages.diff(then.gen, row.gen, start, stop)
                else:
                    found = pages.ranges(row.gen, start, stop)
                ranges = list(islice(found, limit + 1))
            if len(ranges) > limit:
                return row, ranges[:limit], ranges[limit].start
            return row, ranges, None

    def _previous(self, row: BlobRow, prev: str) -> BlobRow:
        then = self.catalog.blob(row.container, row.name, prev)
        if then is None:
            raise StorageError("PreviousSnapshotNotFound", "The previous snapshot is not found.")
        if row.snapshot and prev > row.snapshot:
            raise StorageError(
                "PreviousSnapshotCannotBeNewer", "The previous snapshot is newer than the snapshot."
            )
        if then.store != row.store:
            raise StorageError(
                "BlobOverwritten", "The blob has been overwritten since the previous snapshot."
            )
        return then

    def resize(self, row: BlobRow, size: int) -> None:
        """Part of Set Blob Properties; pages beyond a smaller size are gone for good."""
        check_size(size)
        if size < row.size:
            old, row.size = row.size, size
            self.change(row, lambda p: p.plan_clear(row.gen, size, old), self.catalog.save_blob)
        else:
            row.size = size
            self.catalog.save_blob(row)

    def set_sequence(self, row: BlobRow, action: str, number: int | None) -> None:
        """Part of Set Blob Properties: max, update or increment."""
        action = action.lower()
        if action == "increment":
            if number is not None:
                raise StorageError("InvalidHeaderValue", "increment takes no x-ms-blob-sequence-number.")
            if row.seq == MAX_SEQ:
                raise StorageError("SequenceNumberIncrementTooLarge")
            row.seq += 1
            return
        if number is None:
            raise StorageError("MissingRequiredHeader", "x-ms-blob-sequence-number")
        _check_seq(number)
        if action == "max":
            row.seq = max(row.seq, number)
        elif action == "update":
            row.seq = number
        else:
            raise StorageError("InvalidHeaderValue", "x-ms-sequence-number-action")

    # --- shared with the other operations -------------------------------------------------------------------

    def replacement(
        self, container: str, name: str, kind: str, store: int, *, size: int, old: BlobRow | None
    ) -> BlobRow:
        """A fresh base row that takes the place of `old` (same row id and lease)."""
        row = BlobRow(container, name, kind, store, size, "", 0.0, self.clock())
        if old is not None:
            row.id = old.id
            row.lease = old.lease
            conditions.after_write(row, self.clock())
        self.stamp(row)
        return row

    def retire(self, old: BlobRow) -> None:
        """`old` is no longer in the catalogue: keep only what snapshots still need of its store."""
        if old.kind == PAGE_BLOB and self.catalog.live_gens(old.store):
            self.drop_gen(self.pages(old.store), old.gen)
            return
        self.drop_if_unreferenced(old.store)


def check_size(size: int) -> None:
    if size < 0 or size % PAGE:
        raise StorageError("InvalidHeaderValue", "A page blob's size is a multiple of 512 bytes.")
    if size > MAX_PAGE_BLOB:
        raise StorageError("OutOfRangeInput", "A page blob holds at most 8 TiB.")


def refuse_pending(row: BlobRow | None) -> None:
    """Nothing replaces a blob while a copy into it is on its way."""
    if row is not None and row.copy is not None and row.copy.status == "pending":
        raise StorageError("PendingCopyOperation", "There is currently a pending copy operation.")


def _check_seq(number: int) -> None:
    if not 0 <= number <= MAX_SEQ:
        raise StorageError("InvalidHeaderValue", "x-ms-blob-sequence-number")
