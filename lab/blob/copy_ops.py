"""Copy Blob: asynchronous, sparse, abortable, resumed after a restart.

The destination row exists at once with the new size and `pending`; a worker thread moves the bytes. A copy from
a base blob that is written meanwhile fails, as its source's ETag no longer holds; a snapshot cannot change.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable

from . import conditions
from .block_ops import BlockOps
from .conditions import NONE, Conditions
from .errors import StorageError
from .page_ops import refuse_pending
from .pages import PageRange
from .rows import BLOCK_BLOB, PAGE_BLOB, BlobRow, CopyState

PIECE = 1024 * 1024


class CopyOps(BlockOps):
    """`peer` finds the store of another account of the same laboratory (set by the server)."""

    peer: Callable[[str], CopyOps | None] | None = None

    def start_copy(
        self,
        container: str,
        name: str,
        source: CopyOps,
        source_path: tuple[str, str, str],
        source_url: str,
        *,
        metadata: dict[str, str] | None = None,
        cond: Conditions = NONE,
        source_cond: Conditions = NONE,
    ) -> BlobRow:
        """Begin; the returned row's copy status is `pending`. `source_path`: container, blob, snapshot."""
        origin = source.need_blob(*source_path)
        conditions.check_dates(origin, source_cond, "SourceConditionNotMet")
        refuse_pending(origin)
        with self.path_lock(container, name):
            old = self.catalog.blob(container, name)
            conditions.check_write(old, cond, self.clock())
            refuse_pending(old)
            if old is not None and old.kind != origin.kind:
                raise StorageError("InvalidBlobType", "Source and destination are blobs of different types.")
            if old is not None and old.store == origin.store and not origin.snapshot:
                raise StorageError("InvalidSourceBlobUrl", "Source and destination are the same blob.")
            with self.catalog.transaction():
                self.need_container(container)
                store = self.catalog.new_store(origin.kind)
                row = self.replacement(container, name, origin.kind, store, size=origin.size, old=old)
                row.seq = origin.seq
                row.props = dict(origin.props)
                row.metadata = metadata or dict(origin.metadata)
                row.blocks = list(origin.blocks)
                row.copy = CopyState(
                    id=str(uuid.uuid4()),
                    source=source_url,
                    status="pending",
                    total=origin.size,
                    account=source.account,
                    container=source_path[0],
                    blob=source_path[1],
                    snapshot=source_path[2],
                    etag="" if origin.snapshot else origin.etag,
                )
                if origin.kind == BLOCK_BLOB:
                    self._write_file(self.block_file(store), [])
                self.catalog.save_blob(row)
            if old is not None:
                self.retire(old)
            copy_id = row.copy.id
        self._spawn(container, name, copy_id)
        return row

    def abort_copy(self, container: str, name: str, copy_id: str, cond: Conditions = NONE) -> None:
        """Abort Copy Blob: the destination stays, empty."""
        with self.path_lock(container, name):
            row = self.need_blob(container, name)
            conditions.check_write(row, Conditions(lease_id=cond.lease_id), self.clock())
            if row.copy is None or row.copy.status != "pending":
                raise StorageError("NoPendingCopyOperation", "There is currently no pending copy operation.")
            if row.copy.id != copy_id:
                raise StorageError("CopyIdMismatch")
            self._finish(row, "aborted", "")

    def resume_copies(self) -> None:
        """After a restart: begin pending copies again, from the start; they are idempotent."""
        for container, name in self.catalog.query("SELECT container, name FROM blobs WHERE snapshot=''"):
            row = self.catalog.blob(container, name)
            if row is not None and row.copy is not None and row.copy.status == "pending":
                self._spawn(container, name, row.copy.id)

    # --- the worker -----------------------------------------------------------------------------------------

    def _spawn(self, container: str, name: str, copy_id: str) -> None:
        threading.Thread(
            target=self._run, args=(container, name, copy_id), name=f"copy-{copy_id[:8]}", daemon=True
        ).start()

    def _run(self, container: str, name: str, copy_id: str) -> None:
        try:
            self._copy(container, name, copy_id)
        except StorageError as e:
            self._fail(
                container, name, copy_id, f'{e.status} {e.code} "Copy failed when reading the source."'
            )
        except (
            Exception
        ) as e:  # a dead thread would leave the copy pending for ever; a closed store is no failure
            if not self.closed.is_set():
                self._fail(container, name, copy_id, f'500 InternalError "{type(e).__name__}"')

    def _copy(self, container: str, name: str, copy_id: str) -> None:
        row = self._pending(container, name, copy_id)
        if row is None or row.copy is None:
            return
        policy = self.copy_policy
        if not self._wait(container, name, copy_id, policy.delay):
            return
        if policy.fail:
            self._fail(container, name, copy_id, policy.fail)
            return
        state = row.copy
        source = self if state.account == self.account else (self.peer(state.account) if self.peer else None)
        if source is None:
            raise StorageError("CannotVerifyCopySource")
        moved = 0
        for piece in source.copy_pieces(state):
            while self.copy_policy.hold:
                if not self._wait(container, name, copy_id, 0.02):
                    return
            data = source.read_source(state, piece)
            if not self._land(container, name, copy_id, piece, data):
                return
            moved += len(data)
            speed = self.copy_policy.bytes_per_s
            if speed and not self._wait(container, name, copy_id, len(data) / speed):
                return
            if self.copy_policy.fail:
                self._fail(container, name, copy_id, self.copy_policy.fail)
                return
        while self.copy_policy.hold:
            if not self._wait(container, name, copy_id, 0.02):
                return
        source.check_source(state)
        with self.path_lock(container, name):
            row = self._pending(container, name, copy_id)
            if row is not None:
                self._finish(row, "success", "")

    def copy_pieces(self, state: CopyState) -> list[PageRange]:
        """What there is to copy, in pieces of at most 1 MiB."""
        row = self.check_source(state)
        if row.kind == PAGE_BLOB:
            with self.path_lock(row.container, row.name):
                pages = self.pages(row.store)
                with pages.lock:
                    found = list(pages.ranges(row.gen, 0, row.size))
        else:
            found = [PageRange(0, row.size)]
        return [PageRange(at, min(at + PIECE, r.end)) for r in found for at in range(r.start, r.end, PIECE)]

    def read_source(self, state: CopyState, piece: PageRange) -> bytes:
        with self.path_lock(state.container, state.blob):
            row = self.check_source(state)
            if row.kind == BLOCK_BLOB:
                return self.read_block(row, piece.start, piece.end - piece.start)
            return self.pages(row.store).read(row.gen, piece.start, piece.end - piece.start)

    def check_source(self, state: CopyState) -> BlobRow:
        row = self.need_blob(state.container, state.blob, state.snapshot)
        if state.etag and row.etag != state.etag:
            raise StorageError("ConditionNotMet")
        return row

    def _land(self, container: str, name: str, copy_id: str, piece: PageRange, data: bytes) -> bool:
        with self.path_lock(container, name):
            row = self._pending(container, name, copy_id)
            if row is None or row.copy is None:
                return False
            # Progress counts bytes of the blob passed by, holes included, as a client sees it.
            row.copy.done = piece.end
            if row.kind == BLOCK_BLOB:
                with self.block_file(row.store).open("r+b") as f:
                    f.seek(piece.start)
                    f.write(data)
                self.catalog.save_blob(row)
            else:
                self.change(row, lambda p: p.plan_write(row.gen, piece.start, data), self.catalog.save_blob)
            return True

    def _pending(self, container: str, name: str, copy_id: str) -> BlobRow | None:
        if self.closed.is_set():
            return None
        row = self.catalog.blob(container, name)
        if row is None or row.copy is None or row.copy.id != copy_id or row.copy.status != "pending":
            return None
        return row

    def _wait(self, container: str, name: str, copy_id: str, seconds: float) -> bool:
        """False when the copy was aborted, or its destination is gone, or the store is closing."""
        while seconds > 0:
            part = min(seconds, 0.05)
            if self.closed.wait(part):
                return False
            seconds -= part
            if self._pending(container, name, copy_id) is None:
                return False
        return True

    def _fail(self, container: str, name: str, copy_id: str, why: str) -> None:
        with self.path_lock(container, name):
            row = self._pending(container, name, copy_id)
            if row is not None:
                self._finish(row, "failed", why)

    def _finish(self, row: BlobRow, status: str, description: str) -> None:
        assert row.copy is not None
        row.copy.status, row.copy.description = status, description
        row.copy.finished = self.clock()
        self.stamp(row)
        if status == "success":
            row.copy.done = row.size
            self.catalog.save_blob(row)
            return
        old, row.size, row.blocks = row.size, 0, []
        if row.kind == PAGE_BLOB:
            self.change(row, lambda p: p.plan_clear(row.gen, 0, max(old, 1)), self.catalog.save_blob)
        else:
            self.catalog.save_blob(row)
