"""A process that replicates two files until it is killed. Argument: the folder. See test_kill."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import sys
import time
from pathlib import Path

from farshore.domain.points import Consistency
from farshore.domain.retention import keep_all
from farshore.replication.engine import Pace
from farshore.replication.filesource import FileCut, FileSource
from farshore.replication.filestore import FileReplicaStore
from farshore.replication.loop import LegPlan, run_leg
from farshore.replication.ports import LEAF, Progress


def note(path: Path, line: dict) -> None:
    """One line, whole and durable before anything else happens."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


class Busy(FileSource):
    """Writes to the files before each cut and tells what the cut holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = {"2000": folder / "a.img", "2001": folder / "b.img"}
        super().__init__(self.files, folder / "work")
        self.dice = random.Random(os.getpid() + time.time_ns())

    def cut(self, name: str, *, want: Consistency) -> FileCut:
        for _ in range(self.dice.randint(1, 12)):
            path = self.files[self.dice.choice(["2000", "2001"])]
            with path.open("r+b") as file:
                file.seek(self.dice.randrange(path.stat().st_size // LEAF) * LEAF)
                file.write(self.dice.choice([bytes(LEAF), self.dice.randbytes(9000), b"\x07" * LEAF]))
        cut = super().cut(name, want=want)
        sums = {key: hashlib.sha256(path.read_bytes()).hexdigest() for key, path in self.files.items()}
        note(self.folder / "cuts", {"cut": cut.name, "taken_at": cut.taken_at.isoformat(), "sums": sums})
        return cut


def main(folder: Path) -> None:
    store = FileReplicaStore(folder / "store", durable=False)  # a killed process loses no page of the cache
    seen = ""

    def progress(now: Progress) -> None:
        nonlocal seen
        if now.stage == "point committed" and now.newest_point != seen:
            seen = now.newest_point
            note(folder / "acknowledged", {"point": seen})

    plan = LegPlan(
        "vm", f"pid {os.getpid()}", 0.0, retention=keep_all(1.0), pace=Pace(2, 2 * LEAF, 8 * LEAF, poll=0.05)
    )
    with contextlib.suppress(KeyboardInterrupt):
        run_leg(Busy(folder), store, plan, progress=progress)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
