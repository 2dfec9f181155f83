"""The catalogue: every container, blob, snapshot, block and chunk version of one account, in SQLite.

A write is acknowledged after its transaction has committed, and its bytes lie in fresh slots before that: a crash
between the two leaves unreferenced bytes, never a reference to missing ones. WAL pages are in the kernel once
COMMIT returns, so a SIGKILL of the process loses nothing; `durable=True` also asks the disk (power loss).
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .rows import BlobRow, ContainerRow

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta(key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS containers(name TEXT PRIMARY KEY, etag TEXT NOT NULL, modified REAL NOT NULL,
    doc TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS stores(id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS blobs(id INTEGER PRIMARY KEY, container TEXT NOT NULL, name TEXT NOT NULL,
    snapshot TEXT NOT NULL, kind TEXT NOT NULL, store INTEGER NOT NULL, gen INTEGER NOT NULL, size INTEGER NOT NULL,
    etag TEXT NOT NULL, modified REAL NOT NULL, created REAL NOT NULL, seq INTEGER NOT NULL, doc TEXT NOT NULL,
    UNIQUE(container, name, snapshot));
CREATE INDEX IF NOT EXISTS blobs_store ON blobs(store);
CREATE TABLE IF NOT EXISTS chunks(store INTEGER NOT NULL, chunk INTEGER NOT NULL, gen INTEGER NOT NULL,
    slot INTEGER NOT NULL, valid BLOB NOT NULL, written BLOB NOT NULL, PRIMARY KEY(store, chunk, gen)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS blocks(container TEXT NOT NULL, name TEXT NOT NULL, block TEXT NOT NULL,
    seq INTEGER NOT NULL, size INTEGER NOT NULL, store INTEGER NOT NULL, PRIMARY KEY(container, name, block))
    WITHOUT ROWID;
"""

COLUMNS = "id, container, name, snapshot, kind, store, gen, size, etag, modified, created, seq, doc"


class Catalog:
    """One SQLite connection behind one lock. Use `with catalog.transaction() as db:` for anything that writes."""

    def __init__(self, path: Path, *, durable: bool) -> None:
        self._lock = threading.RLock()
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=256)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute(f"PRAGMA synchronous={'FULL' if durable else 'OFF'}")
        self._db.execute("PRAGMA busy_timeout=10000")
        self._db.executescript(SCHEMA)
        self._depth = 0

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def transaction(self) -> Generator[sqlite3.Connection]:
        """All or nothing; nested use joins the outer transaction."""
        with self._lock:
            if self._depth:
                self._depth += 1
                try:
                    yield self._db
                finally:
                    self._depth -= 1
                return
            self._db.execute("BEGIN IMMEDIATE")
            self._depth = 1
            try:
                yield self._db
            except BaseException:
                self._depth = 0
                self._db.execute("ROLLBACK")
                raise
            self._depth = 0
            self._db.execute("COMMIT")

    def query(self, sql: str, args: Sequence[Any] = ()) -> list[Any]:
        with self._lock:
            return self._db.execute(sql, args).fetchall()

    # --- containers -----------------------------------------------------------------------------------------

    def container(self, name: str) -> ContainerRow | None:
        rows = self.query("SELECT name, etag, modified, doc FROM containers WHERE name=?", (name,))
        return _container(rows[0]) if rows else None

    def containers(self, prefix: str) -> list[ContainerRow]:
        rows = self.query("SELECT name, etag, modified, doc FROM containers ORDER BY name")
        return [_container(r) for r in rows if r[0].startswith(prefix)]

    def save_container(self, row: ContainerRow) -> None:
        with self.transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO containers VALUES(?,?,?,?)",
                (row.name, row.etag, row.modified, json.dumps(row.doc())),
            )

    # --- blobs ----------------------------------------------------------------------------------------------

    def blob(self, container: str, name: str, snapshot: str = "") -> BlobRow | None:
        rows = self.query(
            f"SELECT {COLUMNS} FROM blobs WHERE container=? AND name=? AND snapshot=?",
            (container, name, snapshot),
        )
        return _blob(rows[0]) if rows else None

    def snapshots(self, container: str, name: str) -> list[BlobRow]:
        """Snapshots of a blob name, oldest first, whichever store they belong to."""
        rows = self.query(
            f"SELECT {COLUMNS} FROM blobs WHERE container=? AND name=? AND snapshot<>'' ORDER BY snapshot",
            (container, name),
        )
        return [_blob(r) for r in rows]

    def blobs(
        self, container: str, prefix: str, after: tuple[str, str] | None, *, snapshots: bool
    ) -> Iterator[BlobRow]:
        """Rows in listing order: by name, each name's snapshots oldest first, then its base blob.

        `after` is the last (name, order key) already seen; the order key of a base blob is "~"."""
        name, order = after or ("", "")
        while True:
            rows = self.query(
                f"SELECT {COLUMNS}, CASE snapshot WHEN '' THEN '~' ELSE snapshot END AS ord FROM blobs"
                " WHERE container=? AND (name > ? OR (name = ? AND ord > ?)) AND name >= ?"
                + ("" if snapshots else " AND snapshot=''")
                + " ORDER BY name, ord LIMIT 500",
                (container, name, name, order, prefix),
            )
            for raw in rows:
                row = _blob(raw)
                if not row.name.startswith(prefix):
                    if row.name > prefix:
                        return
                    continue
                yield row
            if len(rows) < 500:
                return
            name, order = rows[-1][2], rows[-1][-1]

    def save_blob(self, row: BlobRow) -> None:
        """Insert (`id == 0`) or rewrite a row."""
        values = (
            row.container,
            row.name,
            row.snapshot,
            row.kind,
            row.store,
            row.gen,
            row.size,
            row.etag,
            row.modified,
            row.created,
            row.seq,
            json.dumps(row.doc()),
        )
        with self.transaction() as db:
            if row.id:
                db.execute(
                    "UPDATE blobs SET container=?, name=?, snapshot=?, kind=?, store=?, gen=?, size=?, etag=?,"
                    " modified=?, created=?, seq=?, doc=? WHERE id=?",
                    (*values, row.id),
                )
            else:
                cursor = db.execute(
                    "INSERT INTO blobs(container, name, snapshot, kind, store, gen, size, etag, modified, created,"
                    " seq, doc) VALUES(?,?,?,?,?,?,?,?,?,?,?,?)",
                    values,
                )
                row.id = int(cursor.lastrowid or 0)

    def touch_blob(self, row: BlobRow) -> None:
        """The cheap form for page writes: only the validators change."""
        with self.transaction() as db:
            db.execute("UPDATE blobs SET etag=?, modified=? WHERE id=?", (row.etag, row.modified, row.id))

    def delete_blob(self, row: BlobRow) -> None:
        with self.transaction() as db:
            db.execute("DELETE FROM blobs WHERE id=?", (row.id,))

    # --- stores ---------------------------------------------------------------------------------------------

    def new_store(self, kind: str) -> int:
        with self.transaction() as db:
            return int(db.execute("INSERT INTO stores(kind) VALUES(?)", (kind,)).lastrowid or 0)

    def live_gens(self, store: int) -> list[int]:
        return [r[0] for r in self.query("SELECT gen FROM blobs WHERE store=? ORDER BY gen", (store,))]

    def drop_store(self, store: int) -> None:
        with self.transaction() as db:
            db.execute("DELETE FROM chunks WHERE store=?", (store,))
            db.execute("DELETE FROM stores WHERE id=?", (store,))

    def unreferenced_stores(self) -> list[int]:
        rows = self.query(
            "SELECT id FROM stores WHERE id NOT IN (SELECT store FROM blobs) AND id NOT IN (SELECT store FROM blocks)"
        )
        return [r[0] for r in rows]

    # --- account facts --------------------------------------------------------------------------------------

    def get_meta(self, key: str) -> str | None:
        rows = self.query("SELECT value FROM meta WHERE key=?", (key,))
        return str(rows[0][0]) if rows else None

    def set_meta(self, key: str, value: str) -> None:
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES(?,?)", (key, value))


def _container(raw: Any) -> ContainerRow:
    row = ContainerRow(raw[0], raw[1], raw[2])
    row.load_doc(json.loads(raw[3]))
    return row


def _blob(raw: Any) -> BlobRow:
    row = BlobRow(
        id=raw[0],
        container=raw[1],
        name=raw[2],
        snapshot=raw[3],
        kind=raw[4],
        store=raw[5],
        gen=raw[6],
        size=raw[7],
        etag=raw[8],
        modified=raw[9],
        created=raw[10],
        seq=raw[11],
    )
    row.load_doc(json.loads(raw[12]))
    return row
