"""A writer on a mounted file system whose records prove themselves, and the check of what a recovery point holds of it.

Run as a program it appends to an SQLite ledger until it is told to stop (its standard input ends). Each row carries a hash
over itself and the row before, so a lost or foreign row in the middle shows. After each commit the row's number goes to
standard output: what was printed before a barrier must be in the point.
"""

from __future__ import annotations

import hashlib
import os
import select
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path


def write(folder: Path) -> None:
    database = sqlite3.connect(folder / "ledger.db", isolation_level=None)
    database.execute("pragma journal_mode=wal")
    database.execute("pragma synchronous=full")
    database.execute("create table if not exists t(id integer primary key, body blob, chain text)")
    newest, chain = database.execute(
        "select max(id), (select chain from t order by id desc limit 1) from t"
    ).fetchone()
    number, chain = newest or 0, chain or ""
    while not select.select([sys.stdin], [], [], 0.002)[0]:  # a pace, so that the disk does not fill
        number += 1
        body = os.urandom(2000)
        chain = hashlib.sha256(chain.encode() + body).hexdigest()
        database.execute("insert into t values(?,?,?)", (number, body, chain))
        if number % 50 == 0:  # bodies come and go, so that pages are freed and used again; chains stay
            database.execute("update t set body=x'' where id between ? and ?", (number - 200, number - 100))
        print(number, flush=True)
        if number % 40 == 0:
            junk = folder / f"junk-{number // 40 % 6}"
            if junk.exists():
                junk.unlink()
            else:
                junk.write_bytes(os.urandom(1 << 20))
    database.close()


class Writer:
    """The writer as a process; `committed` is the newest row that it said was committed."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.committed = 0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._changed:
                self.committed = int(line)
                self._changed.notify_all()

    def wait(self, rows: int, timeout: float = 60.0) -> None:
        """Until so many more rows are committed."""
        with self._changed:
            goal = self.committed + rows
            assert self._changed.wait_for(lambda: self.committed >= goal, timeout), "the writer stands still"

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> None:
        assert self._process.stdin is not None
        if self._process.poll() is None:
            self._process.stdin.close()
            try:
                self._process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._thread.join(timeout=10)


def check(folder: Path, *, at_least: int) -> int:
    """Integrity, chain and prefix of a ledger; returns its newest row."""
    database = sqlite3.connect(folder / "ledger.db")
    try:
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)
        number, chain = 0, ""
        for number, (row, body, link) in enumerate(
            database.execute("select id, body, chain from t order by id"), 1
        ):
            assert row == number, f"row {number} is missing"
            if body:
                assert link == hashlib.sha256(chain.encode() + body).hexdigest(), f"row {number} is damaged"
            chain = link
        assert number >= at_least, f"row {at_least} was committed before the point, which ends at {number}"
        return number
    finally:
        database.close()


if __name__ == "__main__":
    write(Path(sys.argv[1]))
