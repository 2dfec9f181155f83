"""Power cuts at any moment, with what was not flushed lost or torn, lose no acknowledged point and leave no wrong one."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from farshore.domain.errors import FarshoreError
from farshore.replication.backend import parse_handle
from farshore.replication.filestore import FileBackend
from farshore.replication.journal.mirror import Mirror, names
from farshore.replication.journal.reader import PointReader
from farshore.replication.journal.store import JournalStore
from farshore.replication.ports import LEAF

from . import power_rig
from .kill_process import KEK
from .power_plan import Plan
from .power_rig import MODELS, PowerDisk, Survival, everything, nothing, some_sectors

SCRIPT = Path(__file__).with_name("power_process.py")
KEYS = ("2000", "2001")

MISSING = power_rig.missing()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@pytest.fixture
def disk(tmp_path: Path) -> Generator[PowerDisk]:
    made = PowerDisk(tmp_path / "disk", mib=64)
    try:
        yield made
    finally:
        made.close()


# the rig ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("survival", [nothing, some_sectors, everything])
def test_the_disk_forgets_what_was_not_flushed(disk: PowerDisk, survival: Survival) -> None:
    disk.attach()
    file = os.open(disk.file, os.O_RDWR)
    try:
        os.pwrite(file, b"\1" * LEAF, 0)
        os.fsync(file)
        os.pwrite(file, b"\2" * LEAF, LEAF)
        assert os.pread(file, LEAF, LEAF) == b"\2" * LEAF
        assert disk.cut(survival, random.Random(1)) == LEAF
    finally:
        with contextlib.suppress(OSError):  # there is nobody any more to close it
            os.close(file)
    found = disk.image.read_bytes()
    assert found[:LEAF] == b"\1" * LEAF
    survived = found[LEAF : 2 * LEAF].count(2)
    assert survived == {nothing: 0, everything: LEAF}.get(survival, survived)
    assert survival is not some_sectors or (0 < survived < LEAF and survived % power_rig.SECTOR == 0)


def test_files_without_fsync_are_gone_and_those_with_it_stay(disk: PowerDisk) -> None:
    disk.format()
    dice = random.Random(2)
    torn = 0
    for number, survival in enumerate(MODELS):
        folder = disk.start(examine=True)
        for name in (f"synced-{number}", f"loose-{number}"):
            (folder / name).write_bytes(b"x" * 3 * LEAF)
        sync(folder / f"synced-{number}")
        sync(folder)  # also the name of the loose one: of that file only the bytes are missing
        disk.cut(survival, dice)
        folder = disk.start()
        for earlier in range(number + 1):
            assert (folder / f"synced-{earlier}").read_bytes() == b"x" * 3 * LEAF, survival
        torn += (folder / f"loose-{number}").read_bytes() != b"x" * 3 * LEAF
        disk.cut(nothing, dice)
    assert torn == len(MODELS)


def sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)


# replication on it ------------------------------------------------------------------------------------------------------


class Lives:
    """Starts processes, one after the other."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, plan: Plan) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(plan.text() + "\n")
        self._process.stdin.flush()

    def said(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "there is nobody who starts processes"
        return line.strip()

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        try:
            self._process.wait(30)
        finally:
            self._process.kill()


@pytest.fixture(scope="module")
def lives() -> Generator[Lives]:
    made = Lives()
    try:
        yield made
    finally:
        made.close()


class Site:
    """A store on the disk, and beside it what outlives its power: the source, and what it was told."""

    def __init__(self, folder: Path, lives: Lives, seed: int, system: str = "ext4") -> None:
        self.dice = random.Random(seed)
        self.outside = folder / "outside"
        self.outside.mkdir()
        (self.outside / "a.img").write_bytes(self.dice.randbytes(24 * LEAF + 512))
        (self.outside / "b.img").write_bytes(bytes(16 * LEAF))
        self.disk = PowerDisk(folder / "disk", system=system)
        self.disk.format()
        self.store = self.disk.mount / "store"
        self._lives = lives
        self._child: int | None = None

    def begin(self, plan: Plan) -> int:
        """The process of a life."""
        self._lives.ask(plan)
        self._child = int(self.said())
        return self._child

    def said(self) -> str:
        line = self._lives.said()
        if line == "ended":
            self._child = None
        return line

    def plan(self, **more: Any) -> Plan:
        return Plan(str(self.store), str(self.outside), self.dice.getrandbits(32), **more)

    def kill(self, child: int) -> None:
        """Without a cut: the disk stays, and its cache."""
        end(child)
        assert self.said() == "ended"

    def cut(self, child: int, survival: Survival) -> int:
        """The process first: what is dead acknowledges nothing."""
        end(child)
        return self.disk.cut(survival, self.dice, gone=self.said)

    def notes(self, name: str) -> list[dict[str, Any]]:
        path = self.outside / name
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def wait_for_a_point(self, known: int) -> None:
        deadline = time.monotonic() + 60
        while len(self.notes("acknowledged")) == known:
            assert not self.notes("errors") and time.monotonic() < deadline, "the process does not get going"
            time.sleep(0.003)  # it says so in a file

    def wrong(self, *, every: bool = True) -> list[str]:
        """What is not as it was acknowledged; `every`: all points are read, else the newest and a few others."""
        found = [f"a process failed: {line}" for line in self.notes("errors")]
        truth = {(line["cut"], line["taken_at"]): line["sums"] for line in self.notes("cuts")}
        removing = {point for line in self.notes("removing") for point in line["points"]}
        backend = FileBackend(self.store, durable=False)
        store = JournalStore(backend, kek=KEK)
        points = store.points("vm")
        listed = {point.id for point in points}
        for line in self.notes("acknowledged"):
            if line["point"] not in listed | removing:
                found.append(f"lost: {line['point']}")
        removed = {point for line in self.notes("removed") for point in line["points"]}
        found += [f"back: {point}" for point in sorted(removed & listed)]
        held = {line["point"] for line in self.notes("held")}
        found += [f"not held: {point.id}" for point in points if point.id in held and not point.pinned]
        if not points:
            return found
        found += [f"damaged: {point}: {why}" for point, why in store.known_damage("vm").items()]
        chosen = points if every else [*points[-2:], *self.dice.sample(points, min(2, len(points)))]
        for point in chosen:
            try:
                manifest = store.manifest("vm", point.id)
                sums = truth[manifest.cut, manifest.taken_at.isoformat()]
                for key in KEYS:
                    if sum_of(store.read_point("vm", point.id, key)) != sums[key]:
                        found.append(f"wrong: {point.id} {key}")
            except FarshoreError as error:
                found.append(f"damaged: {point.id}: {error.info.message}")
        return found + self._wrong_images(store, backend, truth)

    def _wrong_images(
        self, store: JournalStore, backend: FileBackend, truth: dict[tuple[str, str], dict[str, str]]
    ) -> list[str]:
        """Replica disks that are not what their header says, bases that are not what their entry says."""
        view = store.log("vm").read(time.time())
        head = view.head
        assert head is not None
        mirror = Mirror(backend, store.journal("vm"), 0)
        images = {image.name for image in backend.images("vm/")}
        found: list[str] = []

        def same(data: bytes, cycle: int, key: str) -> bool:
            then = view.manifests[cycle][0]
            return hashlib.sha256(data).hexdigest() == truth[then.cut, then.taken_at.isoformat()][key]

        for disk in head.disks:
            header = mirror.applied(disk, images)
            if header is None or header.target or header.applied not in view.manifests:
                continue  # nothing is claimed, or parts of it are at the target already
            data = backend.read(names("vm/", disk.state.key, disk.life)[0], 0, header.size)
            if not same(data, header.applied, disk.state.key):
                found.append(f"wrong: replica of {disk.state.key} at {header.applied}")
        for base in view.bases:
            for frozen in base.disks if base.cycle in view.manifests else ():
                name, snapshot = parse_handle(frozen.snapshot)
                if not same(backend.read(name, 0, frozen.size, snapshot), base.cycle, frozen.key):
                    found.append(f"wrong: base of {frozen.key} at {base.cycle}")
        return found

    def close(self) -> None:
        try:
            if self._child is not None:
                end(self._child)
                self.disk.power_off()  # who waits for the disk cannot die
                while self.said() != "ended":
                    pass
        finally:
            self.disk.close()


def end(child: int) -> None:
    """It may have failed already, which it has told then."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)


def sum_of(reader: PointReader) -> str:
    found = bytearray(reader.size)

    def sink(at: int, data: bytes | memoryview) -> None:
        found[at : at + len(data)] = data

    reader.write_out(sink)
    return hashlib.sha256(found).hexdigest()


@pytest.fixture
def site(tmp_path: Path, lives: Lives) -> Generator[Site]:
    made = Site(tmp_path, lives, seed=1)  # nothing is mounted yet
    try:
        yield made
    finally:
        made.close()


def cut_again_and_again(site: Site, cuts: int) -> collections.Counter[str]:
    """How often a cut met which phase; "unflushed" counts those that cost bytes."""
    met: collections.Counter[str] = collections.Counter()
    site.disk.start()
    for number in range(cuts):
        dice = site.dice
        if dice.random() < 0.25:
            # A process alone dies first: its successor builds upon what may be in the machine's memory only.
            child = site.begin(site.plan(cut_after=dice.randrange(150)))
            assert site.said() == "cut", site.notes("errors")
            site.kill(child)
        survival = dice.choice(MODELS)
        way = dice.choice(["moment", "dark", "dark", "time"])
        plan = site.plan(cut_after=dice.randrange(400) if way == "moment" else -1)
        known = len(site.notes("acknowledged"))
        if way == "dark":
            site.disk.darken(dice.randrange(1500))
        child = site.begin(plan)
        if way == "moment":
            assert site.said() == "cut", site.notes("errors")
        elif way == "dark":
            site.disk.wait_for_the_dark()
        else:
            site.wait_for_a_point(known)
            time.sleep(dice.random() * 0.5)  # the moment of the cut: anywhere in what follows
        if site.cut(child, survival):
            met["unflushed"] += 1
        met[(site.outside / "phase").read_text()] += 1
        site.disk.start(examine=number % 5 == 4)
        assert site.wrong(every=number % 5 == 4) == [], f"cut {number}: {survival.__name__}, {way}, {plan}"
    # And the next owner goes on.
    known = len(site.notes("acknowledged"))
    site.begin(site.plan(steps=("cycle", "hold", "base", "cycle", "prune", "apply", "scrub")))
    assert site.said() == "ended"
    assert len(site.notes("acknowledged")) == known + 2
    assert site.wrong() == []
    return met


def test_five_power_cuts_cost_nothing(site: Site) -> None:
    cut_again_and_again(site, 5)
    assert len(site.notes("acknowledged")) > 4


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("system", "cuts"), [("ext4", 150), ("xfs", 40), ("btrfs", 40)])
def test_many_power_cuts_cost_nothing(tmp_path: Path, lives: Lives, system: str, cuts: int) -> None:
    """XFS and Btrfs freeze by reflinks, and order what they make durable in ways of their own."""
    reason = power_rig.missing(system)
    if reason:
        pytest.skip(reason)
    site = Site(tmp_path, lives, seed=2, system=system)
    try:
        met = cut_again_and_again(site, cuts)
        acknowledged = len(site.notes("acknowledged"))
        print(system, cuts, acknowledged, met)
        assert acknowledged > cuts
        assert met["unflushed"] > cuts // 20
        assert system != "ext4" or min(met[p] for p in ("cycle", "apply", "base", "prune", "materialise")) > 1
    finally:
        site.close()


@pytest.mark.parametrize(
    ("mutant", "cut_at", "cut_after", "steps", "expected"),
    [
        ("segments unsynced", "acknowledged", 1, ("cycle", "cycle"), "damaged"),
        ("folders unsynced", "acknowledged", 1, ("cycle", "cycle"), "lost"),
        ("segments late", "segments not yet synced", 1, ("cycle",), "damaged"),
        ("header first", "data not yet synced", 0, ("cycle", "apply"), "wrong: replica"),
        ("ice unsynced", "done base", 0, ("cycle", "base"), "wrong: base"),
        ("puts unsynced", "held", 0, ("cycle", "hold"), "not held"),
    ],
)
def test_a_power_cut_finds_a_missing_sync(
    site: Site, mutant: str, cut_at: str, cut_after: int, steps: tuple[str, ...], expected: str
) -> None:
    site.disk.start()
    child = site.begin(site.plan(mutant=mutant, cut_at=cut_at, cut_after=cut_after, steps=steps))
    assert site.said() == "cut", site.notes("errors")
    site.cut(child, nothing)
    site.disk.start()
    assert [line for line in site.wrong() if line.startswith(expected)]


@pytest.mark.parametrize("moment", ["after delete s", "before delete m"])
def test_a_cut_in_a_sweep_is_no_damage(site: Site, moment: str) -> None:
    """Segments go before the entry that names them: what nobody needs any more is half gone."""
    site.disk.start()
    until_the_grace_is_over = ("cycle", "prune") * 12
    steps = ("cycle", "cycle", "base", "remove", *until_the_grace_is_over)
    child = site.begin(site.plan(steps=steps, cut_at=moment, cut_after=0))
    assert site.said() == "cut", site.notes("errors")
    site.cut(child, nothing)
    site.disk.start()
    assert site.wrong() == []
    site.begin(site.plan(steps=("scrub", "cycle", "prune", "scrub")))
    assert site.said() == "ended"
    assert site.wrong() == []


@pytest.mark.parametrize(
    "moment",
    [
        "sync in create s",
        "folder 0",  # of the segments of an epoch
        "sync in create m",
        "folder m in create m",
        "before flush disk",
    ],
)
def test_a_disk_that_fails_before_the_machine_does(site: Site, moment: str) -> None:
    """The syncs of a process that lives on fail: it must not take for durable what it only reads from memory."""
    site.disk.start()
    site.begin(site.plan(steps=("cycle",)))
    assert site.said() == "ended"
    assert site.disk.server is not None
    plan = site.plan(
        steps=("cycle", "apply"),
        cut_at=moment,
        cut_after=int(moment.endswith("create m")),
        pull=site.disk.server.pid,
    )
    site.begin(plan)
    assert site.said() == "ended"
    site.disk.server.wait(10)
    (site.outside / "errors").unlink()  # it told so
    site.disk.cut(nothing, site.dice)
    site.disk.start()
    assert site.wrong() == []
    site.begin(site.plan(steps=("cycle", "apply")))
    assert site.said() == "ended"
    assert site.wrong() == []
