"""Machines that write to each other, and can be held; a store that fails and crashes; a clock set by hand.

A counter goes round the machines: the first writes n, then the second, … then the first n + 1. At any one instant each
machine has what the next one has, or one more, and the first at most one more than the last. A machine that is held writes
nothing, so the counter stops in front of it. The world moves on at every step of a barrier.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from itertools import pairwise

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency
from farshore.replication.engine import Groups, JournalStore, Options, Pace
from farshore.replication.group_leg import GroupResult, run_group_leg
from farshore.replication.loop import LegPlan
from farshore.replication.ports import LEAF, Progress

from .fakes import START, Crash, Fuse, MemoryBackend, ModelCut, ModelSource, Through

PACE = Pace(workers=0, piece=2 * LEAF, poll=0.02)
DISK = "2000"
GROUP = "crm"


class Tagged(list):
    """Events of one machine, told to the world with its name."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self._tell = tell

    def append(self, event: str) -> None:
        super().append(event)
        self._tell(event)


class HeldSource(ModelSource):
    """Fills `BarrierSource`. `fail` names steps, also "cut" and "reap", that raise; `during` is called inside a step."""

    cannot_hold = ""

    def __init__(self, world: World, machine: str) -> None:
        super().__init__()
        self.world, self.name = world, machine
        self.fuse = world.fuse
        self.events = Tagged(lambda event: world.tell(f"{event} {machine}"))
        self.held = False
        self.label: Consistency | None = None
        self.fail: dict[str, list[FarshoreError]] = {}
        self.during: dict[str, Callable[[], None]] = {}
        self.add(DISK, 4)

    def tick(self) -> datetime:
        self.sequence += 1
        return self.world.wall()

    def step(self, what: str) -> None:
        self.burn()
        self.events.append(what)
        self.during.get(what, lambda: None)()
        errors = self.fail.get(what)
        if errors:
            raise errors.pop(0) if len(errors) > 1 else errors[0]

    def prepare(self, name: str, *, want: Consistency) -> ModelPrepared:
        self.step("prepare")
        return ModelPrepared(self, name, want)

    def cut(self, name: str, *, want: Consistency) -> ModelCut:
        if self.fail.get("cut"):
            self.step("cut")
        return super().cut(name, want=want)

    def reap(self, upto: str = "") -> list[str]:
        if self.fail.get("reap"):
            self.step("reap")
        self.held = False
        return super().reap(upto)


class ModelPrepared:
    def __init__(self, source: HeldSource, name: str, want: Consistency) -> None:
        self.source, self.name, self.want = source, name, want
        self.cut: ModelCut | None = None
        self.finished = False

    def quiesce(self) -> None:
        self._step("quiesce")

    def hold(self) -> None:
        self.source.held = True
        self._step("hold")

    def take(self) -> None:
        self._step("take")
        if not self.source.held:
            raise FarshoreError(Code.SNAPSHOT_FAILED, f"{self.source.name} did not stay stopped")
        with self.source.lock:
            self.cut = ModelCut(self.source, self.name, self.source.label or self.want)
            self.source.history[self.name] = self.cut.frozen
            self.source.cuts[self.name] = self.cut
        self.source.world.advance()

    def resume(self) -> None:
        self.source.held = False
        self._step("resume")

    def finish(self) -> ModelCut:
        self._step("finish")
        assert self.cut is not None
        self.finished = True
        return self.cut

    def abandon(self) -> None:
        self.source.burn()
        self.source.held = False
        if not self.finished:
            self.source.events.append("abandon")
            self.source.cuts.pop(self.name, None)

    def _step(self, what: str) -> None:
        self.source.step(what)
        self.source.world.advance()


class World:
    """Two machines or more, and what happens to them in the order in which it happens."""

    def __init__(self, machines: str = "ab") -> None:
        self.fuse = Fuse()
        self.events: list[str] = []
        self.time = 0.0
        self.lock = threading.RLock()
        self.turn = 0
        self.backend = MemoryBackend()
        self.before: Callable[[str, str], None] = lambda operation, name: None
        self.said: list[str] = []
        self.sources = {name: HeldSource(self, name) for name in machines}
        self.store = self.process()
        self.moments: list[str] = []
        self.advance(3)

    def process(self) -> JournalStore:
        """A new process: nothing but the backend survives."""
        return JournalStore(
            Through(self.backend, self._pass),
            clock=lambda: self.wall().timestamp(),
            options=Options(workers=0, grace=5.0),
        )

    def _pass(self, operation: str, args: tuple) -> bool:
        name = str(args[0]) if args else ""
        self.before(operation, name)
        burnt = self.fuse.burn()
        if operation in ("create", "put", "delete"):
            self.tell(f"{operation} {name}")
        return burnt

    def tell(self, event: str) -> None:
        with self.lock:
            self.events.append(event)

    def advance(self, writes: int = 5) -> None:
        """The counter goes on until it meets a machine that is held."""
        with self.lock:
            for _ in range(writes):
                number, who = divmod(self.turn, len(self.sources))
                source = list(self.sources.values())[who]
                if source.held:
                    return
                source.write(DISK, 0, (number + 1).to_bytes(8, "big") * (LEAF // 8))
                self.turn += 1

    def wall(self) -> datetime:
        return START + timedelta(seconds=self.time)

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        self.advance()

    # legs and points ----------------------------------------------------------------------------------------------

    def leg(self, sources=None, should_stop=lambda: False, **options) -> GroupResult:
        """One round, unless `until_s` says more; an interval is 10 s."""
        plan = LegPlan(
            GROUP, "wf run", 10.0, **{"until_s": 5.0, "pace": PACE, "scrub_every_s": None, **options}
        )

        def heard(progress: Progress) -> None:
            self.said.append(progress.stage)

        return run_group_leg(
            sources or self.sources,
            self.store,
            plan,
            deadline_s=20.0,
            progress=heard,
            should_stop=should_stop,
            clock=self.wall,
            monotonic=lambda: self.time,
            sleep=self.sleep,
        )

    def restart(self) -> None:
        """The process was killed: another one begins, the machines were resumed by their watchdogs."""
        self.fuse.arm(None)
        self.before = lambda operation, name: None
        for source in self.sources.values():
            source.held = False
            source.fail.clear()
            source.during.clear()
        self.time += 10.0
        self.store = self.process()

    @property
    def groups(self) -> Groups:
        def clock() -> float:
            return self.wall().timestamp()

        return Groups(JournalStore(self.backend, clock=clock), clock=clock)

    def counter(self, machine: str, point: str) -> int:
        return int.from_bytes(JournalStore(self.backend).read_point(machine, point, DISK).read(0, 8), "big")

    def check(self) -> int:
        """Every group point is whole, sound and of one instant; returns how many there are."""
        points = self.groups.points(GROUP)
        assert not self.groups.unusable(GROUP)
        store = JournalStore(self.backend)
        for point in points:
            assert {member.machine for member in point.members} == set(self.sources)
            counters: list[int] = []
            for member in point.members:
                manifest = store.manifest(member.machine, member.point)
                assert manifest.tags == {"group": GROUP, "barrier": point.barrier}
                assert manifest.taken_at == point.taken_at
                reader = store.read_point(member.machine, member.point, DISK)
                assert reader.read(0, reader.size) == self.sources[member.machine].history[manifest.cut][DISK]
                counters.append(self.counter(member.machine, member.point))
            assert one_instant(counters), (point.id, counters)
        return len(points)

    def keepers(self) -> dict[str, set[str]]:
        """Point ids that are held for the group, by machine."""
        found: dict[str, set[str]] = {name: set() for name in self.sources}
        for name, (data, _) in self.backend.objects.items():
            machine, kind, *_ = name.split("/")
            if kind == "h" and machine in found and json.loads(data)["holder"].startswith("group"):
                found[machine].add(json.loads(data)["point"])
        return found

    def kept(self) -> dict[str, set[str]]:
        """What should be held for it."""
        points = self.groups.points(GROUP)
        return {
            name: {m.point for point in points for m in point.members if m.machine == name}
            for name in self.sources
        }


def one_instant(counters: list[int]) -> bool:
    """See the module."""
    falling = all(first >= second for first, second in pairwise(counters))
    return falling and counters[0] <= counters[-1] + 1


def unreachable(text: str = "no route to the source") -> FarshoreError:
    return FarshoreError(Code.SOURCE_UNREACHABLE, text)


def at(events: list[str], text: str) -> list[int]:
    return [index for index, event in enumerate(events) if event.startswith(text)]


__all__ = ["Crash", "HeldSource", "ModelPrepared", "World", "at", "one_instant", "unreachable"]
