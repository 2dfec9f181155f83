"""Processes that replicate two files, apply, freeze, prune and materialise until they are killed. See test_kill.

Argument: the folder. Every line on standard input starts one: a child of this process, whose number is answered. It is for
the test to kill; when it has, its end is awaited here and the next line is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import time
from pathlib import Path

from farshore.domain.points import Consistency
from farshore.replication.filesource import FileCut, FileSource
from farshore.replication.filestore import FileBackend
from farshore.replication.journal import segment
from farshore.replication.journal.cycle import Pace, run_cycle
from farshore.replication.journal.keys import LocalKek
from farshore.replication.journal.store import JournalStore, Options
from farshore.replication.journal.writer import Writer
from farshore.replication.ports import LEAF

KEK = LocalKek(bytes(32))
GRACE = 0.2  # seconds: short, so that sweeps have something to do


def note(path: Path, line: dict) -> None:
    """One line, whole and durable before anything else happens."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def opened(folder: Path) -> JournalStore:
    """Not durable: a killed process loses no page of the cache."""
    return JournalStore(
        FileBackend(folder / "store", durable=False),
        kek=KEK,
        options=Options(grace=GRACE, workers=2, cache=folder / "cache"),
    )


class Busy(FileSource):
    """Writes to the files before each cut and tells what the cut holds."""

    def __init__(self, folder: Path, dice: random.Random) -> None:
        self.folder = folder
        self.files = {"2000": folder / "a.img", "2001": folder / "b.img"}
        super().__init__(self.files, folder / "work")
        self.dice = dice

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


def work(folder: Path) -> None:
    dice = random.Random(os.getpid() + time.time_ns())
    source, store = Busy(folder, dice), opened(folder)
    phase = os.open(folder / "phase", os.O_WRONLY | os.O_CREAT, 0o600)

    def now(what: str) -> None:
        os.pwrite(phase, what.ljust(16).encode(), 0)

    now("opening")
    writer = store.acquire("vm", f"pid {os.getpid()}")
    source.reap()
    while True:
        now("cycle")
        result = run_cycle(
            source,
            writer,
            machine="vm",
            want=Consistency.CRASH,
            pace=Pace(workers=2, piece=2 * LEAF, poll=0.05),
        )
        note(folder / "acknowledged", {"point": result.point.id})
        for step in dice.sample(["apply", "base", "prune", "materialise", "scrub", ""], 3):
            now(step or "cycle")
            other(step, folder, store, writer, dice)


def other(step: str, folder: Path, store: JournalStore, writer: Writer, dice: random.Random) -> None:
    match step:
        case "apply":
            writer.advance()
        case "base":
            writer.freeze()
        case "prune":
            points = writer.points()
            victims = [p for p in points[:-1] if len(points) > 6 and dice.random() < 0.5]
            if victims:
                note(folder / "removing", {"points": [p.id for p in victims]})
                writer.remove_points([p.cycle for p in victims])
            writer.sweep(thorough=dice.random() < 0.3)
        case "materialise":
            point = dice.choice(writer.points())
            store.hold("vm", point.id, "restore")
            for key in ("2000", "2001"):
                reader = store.read_point("vm", point.id, key)
                with (folder / f"out-{key}").open("wb") as out:
                    os.truncate(out.fileno(), reader.size)
                    reader.write_out(lambda at, data, file=out: os.pwrite(file.fileno(), data, at) and None)
            store.release("vm", "restore")
        case "scrub":
            done = writer.scrub(budget=1 << 20)
            assert not done.findings, done.findings
        case _:
            pass


def main(folder: Path) -> None:
    segment.SEGMENT = 4 * LEAF
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                work(folder)
            except BaseException as error:
                note(folder / "errors", {"error": repr(error)})
                raise
            finally:
                os._exit(1)
        print(child, flush=True)
        os.waitpid(child, 0)
        print("ended", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
