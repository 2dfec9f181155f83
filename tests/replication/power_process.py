"""Processes that replicate into a folder on a disk whose power is cut. See test_power_cut and power_rig.

Every line on standard input is a plan and starts one, a child of this process whose number is answered. It ends by a kill
or with its plan, and is awaited here; then "ended" is answered. In between it may say "cut": it is where the plan wants the
power to go, and its thread waits there.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from kill_process import GRACE, KEK, Busy, note, other
from power_plan import STEPS, Plan

from farshore.domain.points import Consistency
from farshore.replication.backend import Kind
from farshore.replication.filestore import FileBackend
from farshore.replication.journal import segment
from farshore.replication.journal.cycle import Pace, run_cycle
from farshore.replication.journal.store import JournalStore, Options
from farshore.replication.ports import LEAF


class Moments:
    """Counts them, and stops at the one."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self._folder = folder
        self._plan = plan
        self._left = plan.cut_after
        self._lock = threading.Lock()

    def __call__(self, name: str) -> None:
        with self._lock:
            if self._left < 0 or not name.startswith(self._plan.cut_at):
                return
            self._left -= 1
            if self._left >= 0:
                return
        if self._plan.pull:
            os.kill(self._plan.pull, signal.SIGKILL)
            return
        (self._folder / "moment").write_text(name)
        print("cut", flush=True)
        threading.Event().wait()


class Watched(FileBackend):
    """The durable backend of the product. Names its moments: before and after each change and each sync."""

    def __init__(self, root: Path, moments: Callable[[str], None]) -> None:
        self.moments = moments
        self._now = threading.local()
        super().__init__(root)

    @contextmanager
    def at(self, what: str) -> Generator[None]:
        """The thread is in a change; its syncs are named after it."""
        self._now.what = what
        self.moments(f"before {what}")
        yield
        self.moments(f"after {what}")
        self._now.what = ""

    def create(self, name: str, data: bytes) -> bool:
        with self.at(f"create {part_of(name)}"):
            return super().create(name, data)

    def put(self, name: str, data: bytes) -> None:
        with self.at(f"put {part_of(name)}"):
            super().put(name, data)

    def delete(self, name: str) -> None:
        with self.at(f"delete {part_of(name)}"):
            super().delete(name)

    def ensure_image(self, name: str, kind: Kind, size: int, fence: int) -> int:
        with self.at(f"ensure {image(name)}"):
            return super().ensure_image(name, kind, size, fence)

    def write(self, name: str, offset: int, data: bytes | memoryview, fence: int) -> None:
        with self.at(f"write {image(name)}"):
            super().write(name, offset, data, fence)

    def flush(self, name: str, fence: int) -> None:
        with self.at(f"flush {image(name)}"):
            super().flush(name, fence)

    def freeze(self, name: str, cycle: int, epoch: int, fence: int) -> str:
        with self.at(f"freeze {image(name)}"):
            return super().freeze(name, cycle, epoch, fence)

    def drop(self, name: str, snapshot: str) -> None:
        with self.at(f"drop {image(name)}"):
            super().drop(name, snapshot)

    def _sync(self, file: int) -> None:
        what = getattr(self._now, "what", "")
        self.moments(f"sync in {what}")
        super()._sync(file)

    def _sync_folder(self, folder: Path) -> None:
        what = getattr(self._now, "what", "")
        self.moments(f"folder {folder.name} in {what}")
        super()._sync_folder(folder)


def part_of(name: str) -> str:
    """`vm/m/0000000004.json` → `m`."""
    return name.split("/")[1]


def image(name: str) -> str:
    return "leaves" if name.endswith(".leaves") else "disk"


# what must not go unnoticed ---------------------------------------------------------------------------------------------


class UnsyncedSegments(Watched):
    """The bytes of a segment are not synced, its name is."""

    def _sync(self, file: int) -> None:
        if getattr(self._now, "what", "") != "create s":
            super()._sync(file)


class UnsyncedFolders(Watched):
    """Names are not synced."""

    def _sync_folder(self, folder: Path) -> None:
        self.moments("folder not synced")


class SegmentsLate(Watched):
    """Segments are synced, but after the manifest that names them."""

    def __init__(self, root: Path, moments: Callable[[str], None]) -> None:
        self._late: list[Path] = []
        super().__init__(root, moments)

    def create(self, name: str, data: bytes) -> bool:
        if part_of(name) == "s":
            self._late.append(self._root / name)
        created = super().create(name, data)
        if part_of(name) == "m":
            self.moments("segments not yet synced")
            sync(self._late)
        return created

    def _sync(self, file: int) -> None:
        if getattr(self._now, "what", "") != "create s":
            super()._sync(file)


class HeaderFirst(Watched):
    """The data of a replica disk are synced, but after the header that tells of them."""

    def __init__(self, root: Path, moments: Callable[[str], None]) -> None:
        self._late: list[Path] = []
        super().__init__(root, moments)

    def flush(self, name: str, fence: int) -> None:
        if image(name) == "disk":
            self._late.append(self._root / name)
            return
        super().flush(name, fence)
        # The first flush of a table after data is of the table itself, the next one of the header.
        if self._late and self._late[0] == Path():
            self.moments("data not yet synced")
            sync(self._late[1:])
            self._late.clear()
        elif self._late:
            self._late.insert(0, Path())


class UnsyncedIce(Watched):
    """A frozen copy of a disk is not synced, its name is."""

    def _sync(self, file: int) -> None:
        if not getattr(self._now, "what", "").startswith("freeze"):
            super()._sync(file)


class UnsyncedPuts(Watched):
    """What replaces an object is synced, its name is not."""

    def _sync_folder(self, folder: Path) -> None:
        if not getattr(self._now, "what", "").startswith("put"):
            super()._sync_folder(folder)


def sync(paths: list[Path]) -> None:
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.close(file)
    paths.clear()


MUTANTS: dict[str, type[Watched]] = {
    "": Watched,
    "segments unsynced": UnsyncedSegments,
    "folders unsynced": UnsyncedFolders,
    "segments late": SegmentsLate,
    "header first": HeaderFirst,
    "ice unsynced": UnsyncedIce,
    "puts unsynced": UnsyncedPuts,
}


# a life -----------------------------------------------------------------------------------------------------------------


def work(plan: Plan) -> None:
    folder = Path(plan.outside)
    dice = random.Random(plan.seed)
    moments = Moments(folder, plan)
    root = Path(plan.store)
    workers = 0 if plan.steps else 2  # a whole life that is written down takes the same course every time
    store = JournalStore(
        MUTANTS[plan.mutant](root, moments),
        kek=KEK,
        # Leaf tables are never synced: on the same disk, so that a cut hits them as well.
        options=Options(grace=GRACE, workers=workers, cache=root.parent / "leaves"),
    )
    source = Busy(folder, dice)

    def cycle() -> None:
        result = run_cycle(
            source,
            writer,
            machine="vm",
            want=Consistency.CRASH,
            pace=Pace(workers=max(1, workers), piece=2 * LEAF, poll=0.05),
        )
        note(folder / "acknowledged", {"point": result.point.id})
        moments("acknowledged")

    def remove() -> None:
        points = writer.points()
        victims = {p.cycle: p.id for p in points[:1]} if plan.steps or len(points) > 6 else {}
        note(folder / "removing", {"points": list(victims.values())})
        gone = writer.remove_points(list(victims))
        note(folder / "removed", {"points": [victims[cycle] for cycle in gone]})
        moments("removed")

    def hold() -> None:
        point = writer.points()[-1].id
        store.hold("vm", point, "a run that goes on")
        note(folder / "held", {"point": point})
        moments("held")

    def now(what: str) -> None:
        (folder / "phase").write_text(what)

    now("opening")
    writer = store.acquire("vm", f"pid {os.getpid()}")
    source.reap()
    steps = iter(plan.steps or by_chance(dice))
    for step in steps:
        now(step or "pause")
        if step == "cycle":
            cycle()
        elif step == "remove":
            remove()
        elif step == "hold":
            hold()
        else:
            other(step, folder, store, writer, dice)
            moments(f"done {step}")


def by_chance(dice: random.Random) -> Generator[str]:
    while True:
        yield "cycle"
        yield from dice.sample(STEPS, 3)


def main() -> None:
    segment.SEGMENT = 4 * LEAF
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status, plan = 1, Plan.of(line)
            try:
                work(plan)
                status = 0
            except BaseException as error:
                note(Path(plan.outside, "errors"), {"error": repr(error)})
                raise
            finally:
                os._exit(status)
        print(child, flush=True)
        os.waitpid(child, 0)
        print("ended", flush=True)


if __name__ == "__main__":
    main()
