"""Operations on block blobs. A blob's bytes are one file, complete before the catalogue names it."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterable
from pathlib import Path

from . import conditions
from .conditions import NONE, Conditions
from .errors import StorageError
from .page_ops import PageOps, refuse_pending
from .pages import sync_folder
from .rows import BLOCK_BLOB, BlobRow

MAX_BLOCKS = 50_000
MAX_UNCOMMITTED = 100_000


class BlockOps(PageOps):
    def put_block_blob(
        self,
        container: str,
        name: str,
        data: bytes,
        *,
        props: dict[str, str] | None = None,
        metadata: dict[str, str] | None = None,
        cond: Conditions = NONE,
    ) -> BlobRow:
        """Put Blob (block). With `if_none_match="*"` exactly one of any number of writers wins, the others get
        409 BlobAlreadyExists."""
        self.need_container(container)
        store = self.catalog.new_store(BLOCK_BLOB)
        try:
            self._write_file(self.block_file(store), [data])
            return self._commit(
                container, name, store, size=len(data), blocks=[], props=props, metadata=metadata, cond=cond
            )
        except BaseException:
            self.drop_if_unreferenced(store)
            raise

    def put_block(self, container: str, name: str, block: str, data: bytes, cond: Conditions = NONE) -> None:
        """Put Block: bytes wait, uncommitted, under an id of the caller's."""
        _check_block_id(block)
        with self.path_lock(container, name):
            self.need_container(container)
            row = self.catalog.blob(container, name)
            if row is not None:
                if row.kind != BLOCK_BLOB:
                    raise StorageError("InvalidBlobType")
                conditions.check_write(row, Conditions(lease_id=cond.lease_id), self.clock())
            waiting = self._uncommitted(container, name)
            if waiting and len(base64.b64decode(next(iter(waiting)))) != len(base64.b64decode(block)):
                raise StorageError("InvalidBlobOrBlock", "Block ids of a blob must have the same length.")
            if len(waiting) >= MAX_UNCOMMITTED:
                raise StorageError("BlockCountExceedsLimit")
            store = self.catalog.new_store(BLOCK_BLOB)
            try:
                self._write_file(self.block_file(store), [data])
                with self.catalog.transaction() as db:
                    db.execute(
                        "INSERT OR REPLACE INTO blocks SELECT ?,?,?, COALESCE(MAX(seq), 0) + 1, ?, ? FROM blocks"
                        " WHERE container=? AND name=?",
                        (container, name, block, len(data), store, container, name),
                    )
            except BaseException:
                self.drop_if_unreferenced(store)
                raise
            if block in waiting:
                self.drop_if_unreferenced(waiting[block][1])

    def put_block_list(
        self,
        container: str,
        name: str,
        wanted: list[tuple[str, str]],
        *,
        props: dict[str, str] | None = None,
        metadata: dict[str, str] | None = None,
        cond: Conditions = NONE,
    ) -> BlobRow:
        """Put Block List: `wanted` are (Committed | Uncommitted | Latest, block id) in order."""
        if len(wanted) > MAX_BLOCKS:
            raise StorageError("BlockCountExceedsLimit")
        with self.path_lock(container, name):
            self.need_container(container)
            old = self.catalog.blob(container, name)
            conditions.check_write(old, cond, self.clock())
            if old is not None and old.kind != BLOCK_BLOB:
                raise StorageError("InvalidBlobType")
            waiting = self._uncommitted(container, name)
            present: dict[str, tuple[int, int]] = {}
            position = 0
            for block, size in old.blocks if old else []:
                present[block] = (position, size)
                position += size
            parts: list[bytes] = []
            blocks: list[tuple[str, int]] = []
            for where, block in wanted:
                _check_block_id(block)
                if where != "Committed" and block in waiting:
                    size, store = waiting[block]
                    parts.append(self.block_file(store).read_bytes())
                elif where != "Uncommitted" and block in present and old is not None:
                    offset, size = present[block]
                    parts.append(_read_file(self.block_file(old.store), offset, size))
                else:
                    raise StorageError("InvalidBlockList", "The specified block list is invalid.")
                blocks.append((block, size))
            store = self.catalog.new_store(BLOCK_BLOB)
            try:
                self._write_file(self.block_file(store), parts)
                return self._commit(
                    container,
                    name,
                    store,
                    size=sum(size for _, size in blocks),
                    blocks=blocks,
                    props=props,
                    metadata=metadata,
                    cond=cond,
                )
            except BaseException:
                self.drop_if_unreferenced(store)
                raise

    def block_list(
        self, container: str, name: str, snapshot: str = "", cond: Conditions = NONE
    ) -> tuple[BlobRow | None, list[tuple[str, int]], list[tuple[str, int]]]:
        """Committed blocks and those waiting, each (id, size)."""
        with self.path_lock(container, name):
            row = self.catalog.blob(container, name, snapshot)
            waiting = [] if snapshot else [(b, s) for b, (s, _) in self._uncommitted(container, name).items()]
            if row is None and not waiting:
                self.need_blob(container, name, snapshot)
            if row is not None:
                if row.kind != BLOCK_BLOB:
                    raise StorageError("InvalidBlobType")
                conditions.check_read(row, cond, self.clock())
            return row, (row.blocks if row else []), waiting

    def read_block(self, row: BlobRow, offset: int, length: int) -> bytes:
        return _read_file(self.block_file(row.store), offset, length)

    # --- inside ---------------------------------------------------------------------------------------------

    def _commit(
        self,
        container: str,
        name: str,
        store: int,
        *,
        size: int,
        blocks: list[tuple[str, int]],
        props: dict[str, str] | None,
        metadata: dict[str, str] | None,
        cond: Conditions,
    ) -> BlobRow:
        with self.path_lock(container, name):
            old = self.catalog.blob(container, name)
            conditions.check_write(old, cond, self.clock())
            refuse_pending(old)
            spent = self._uncommitted(container, name)
            row = self.replacement(container, name, BLOCK_BLOB, store, size=size, old=old)
            row.props, row.metadata, row.blocks = props or {}, metadata or {}, blocks
            with self.catalog.transaction() as db:
                self.need_container(container)
                self.catalog.save_blob(row)
                db.execute("DELETE FROM blocks WHERE container=? AND name=?", (container, name))
            if old is not None:
                self.retire(old)
            for _, block_store in spent.values():
                self.drop_if_unreferenced(block_store)
            return row

    def _uncommitted(self, container: str, name: str) -> dict[str, tuple[int, int]]:
        rows = self.catalog.query(
            "SELECT block, size, store FROM blocks WHERE container=? AND name=? ORDER BY seq",
            (container, name),
        )
        return {r[0]: (r[1], r[2]) for r in rows}

    def _write_file(self, path: Path, parts: Iterable[bytes]) -> None:
        with path.open("wb") as f:
            for part in parts:
                f.write(part)
            if self.durable:
                f.flush()
                os.fsync(f.fileno())
        if self.durable:
            sync_folder(path.parent)


def _read_file(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as f:
        f.seek(offset)
        data = f.read(length)
    if len(data) != length:
        raise OSError(f"{path.name} is shorter than its catalogue")
    return data


def _check_block_id(block: str) -> None:
    try:
        raw = base64.b64decode(block, validate=True)
    except binascii.Error as e:
        raise StorageError("InvalidQueryParameterValue", "A block id is Base64.") from e
    if not 0 < len(raw) <= 64:
        raise StorageError("OutOfRangeInput", "A block id has 1 to 64 bytes.")
