"""What the laboratory remembers: an SQLite file of JSON records and the digest log. Survives the death of the process.

`synchronous=OFF` is on purpose: the laboratory has to survive a killed process, not a power cut.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from pathlib import Path
from typing import Any


class Store:
    """Thread-safe key–value records by kind, plus digests."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=OFF")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS record (kind TEXT, id TEXT, body TEXT, PRIMARY KEY (kind, id)) WITHOUT ROWID"
        )
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS digest (seq INTEGER PRIMARY KEY, vm TEXT, snapshot TEXT, moref TEXT, "
            "disk INTEGER, label TEXT, bytes INTEGER, sha256 TEXT, time REAL, ledger_last INTEGER)"
        )

    def put(self, kind: str, key: str, body: Any) -> None:
        text = json.dumps(body, separators=(",", ":"))
        with self._lock:
            self._db.execute("INSERT OR REPLACE INTO record VALUES (?, ?, ?)", (kind, key, text))

    def put_many(self, kind: str, bodies: dict[str, Any]) -> None:
        rows = [(kind, key, json.dumps(body, separators=(",", ":"))) for key, body in bodies.items()]
        with self._lock:
            self._db.execute("BEGIN")
            self._db.executemany("INSERT OR REPLACE INTO record VALUES (?, ?, ?)", rows)
            self._db.execute("COMMIT")

    def delete(self, kind: str, key: str) -> None:
        with self._lock:
            self._db.execute("DELETE FROM record WHERE kind=? AND id=?", (kind, key))

    def get(self, kind: str, key: str) -> Any | None:
        with self._lock:
            row = self._db.execute("SELECT body FROM record WHERE kind=? AND id=?", (kind, key)).fetchone()
        return json.loads(row[0]) if row else None

    def all(self, kind: str) -> dict[str, Any]:
        with self._lock:
            rows = self._db.execute("SELECT id, body FROM record WHERE kind=?", (kind,)).fetchall()
        return {key: json.loads(body) for key, body in rows}

    def add_digest(self, row: dict[str, Any]) -> None:
        with self._lock:
            self._db.execute(
                "INSERT INTO digest (vm, snapshot, moref, disk, label, bytes, sha256, time, ledger_last) VALUES "
                "(:vm, :snapshot, :moref, :disk, :label, :bytes, :sha256, :time, :ledger_last)",
                row,
            )

    def digests(self, vm: str | None = None, snapshot: str | None = None) -> list[dict[str, Any]]:
        """Digest log, oldest first; filtered where given."""
        columns = ("vm", "snapshot", "moref", "disk", "label", "bytes", "sha256", "time", "ledger_last")
        with self._lock:
            rows = self._db.execute(
                f"SELECT {', '.join(columns)} FROM digest WHERE (:vm IS NULL OR vm=:vm) "
                "AND (:snapshot IS NULL OR snapshot=:snapshot) ORDER BY seq",
                {"vm": vm, "snapshot": snapshot},
            ).fetchall()
        return [dict(zip(columns, row, strict=True)) for row in rows]

    def close(self) -> None:
        with self._lock:
            self._db.close()
