"""Any story of writes, cycles, redo, bases, crashes, power cuts, removals and changes of disks leaves only true points."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
import sys
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency
from farshore.replication.journal import compose, cycle, disks, log, mirror, packer, prune, writer
from farshore.replication.journal.cycle import Pace, run_cycle
from farshore.replication.journal.entries import Base, Manifest
from farshore.replication.journal.keys import LocalKek
from farshore.replication.journal.store import JournalStore, Options
from farshore.replication.ports import LEAF

from .fakes import Crash, MemoryBackend, ModelCut, ModelSource, Through, pattern

# No workers: a story told twice must go the same way.
PACE = Pace(workers=0, piece=2 * LEAF, poll=0.05)
KEYS = ["2000", "2001"]
TAILS = [0, 512, 33 * 512]
GRACE = 100.0
KEK = LocalKek(bytes(range(32)), random=random.Random(1).randbytes)


@pytest.fixture(autouse=True)
def small_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disks of a few leaves are to have several regions."""
    monkeypatch.setattr(compose, "REGION", 4 * LEAF)
    monkeypatch.setattr(mirror, "_LONG", 2 * LEAF)


class Story(RuleBasedStateMachine):
    """The model is the source's memory of each cut."""

    def __init__(self) -> None:
        super().__init__()
        self.backend = MemoryBackend()
        self.source = ModelSource()
        self.acknowledged: set[str] = set()
        self.maybe_removed: set[str] = set()
        self.held: dict[str, set[str]] = {}
        self.wished: set[str] = set()  # victims of any removal
        self.now = 1000.0
        self.failing: int | None = None
        self.random = random.Random(7)

    def store(self) -> JournalStore:
        """A new process: nothing but the backend survives."""
        return JournalStore(
            Through(self.backend, lambda *_: self.obstacle()),
            kek=KEK,
            clock=lambda: self.now,
            options=Options(grace=GRACE, workers=0, random=self.random.randbytes),
        )

    def obstacle(self) -> bool:
        """Every operation passes here; returns whether to crash after it."""
        if self.failing is not None:
            self.failing -= 1
            if self.failing == 0:
                self.failing = None
                raise FarshoreError(Code.TARGET_UNREACHABLE, "the storage did not answer")
        return self.source.fuse.burn()

    def attempt(self, fuse: int | None, after: bool, power: int | None, work: Callable[[], None]) -> None:
        self.now += 1
        self.source.fuse.arm(fuse, after=after)
        with contextlib.suppress(Crash):
            work()
        if self.source.fuse.dead and power is not None:
            self.backend.power_cut(random.Random(power))
        self.source.fuse.arm(None)

    @initialize(leaves=st.integers(1, 9), tail=st.sampled_from(TAILS))
    def first_disk(self, leaves: int, tail: int) -> None:
        self.source.add("2000", leaves, tail)

    @rule(key=st.sampled_from(KEYS), leaf=st.integers(0, 9), content=st.integers(0, 2))
    def guest_writes(self, key: str, leaf: int, content: int) -> None:
        disk = self.source.machine.get(key)
        if disk is not None and leaf * LEAF < len(disk.content):
            self.source.write(key, leaf, pattern(content))

    @rule(seconds=st.sampled_from([1.0, 30.0, 60.0, 150.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(
        fuse=st.none() | st.integers(1, 80),
        after=st.booleans(),
        power=st.none() | st.integers(0, 99),
        cycles=st.integers(1, 3),
        resync=st.booleans(),
        stop=st.none() | st.integers(1, 8),
        failing=st.none() | st.integers(8, 60),
        between=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=3),
        then=st.sampled_from(["", "a", "f", "s", "af", "as", "afs", "fas"]),
    )
    def replicate(self, fuse, after, power, cycles, resync, stop, failing, between, then) -> None:
        looks = iter(range(1000))

        def work() -> None:
            mine = self.store().acquire("vm", "me")
            try:
                self.source.reap()
                for number in range(cycles):
                    try:
                        result = run_cycle(
                            self.source,
                            mine,
                            machine="vm",
                            want=Consistency.CRASH,
                            resync=resync and number == 0,
                            pace=PACE,
                            should_stop=(lambda: next(looks) >= stop) if stop else cycle.never,
                        )
                        self.acknowledged.add(result.point.id)
                    except cycle.Stopped:
                        pass
                    except FarshoreError as error:
                        if error.code is Code.REPLICA_FENCED:
                            return  # the outcome of a commit was unknown: this writer is done
                        if error.code is not Code.TARGET_UNREACHABLE:
                            raise
                    for leaf, content in between:
                        self.guest_writes("2000", leaf, content)
                    self.other_layers(mine, then)
            finally:
                mine.close()

        self.failing = failing
        with contextlib.suppress(FarshoreError):  # the failure met the opening
            self.attempt(fuse, after, power, work)
        self.failing = None
        self.source.fuse.arm(None)

    def other_layers(self, mine: writer.Writer, then: str) -> None:
        for step in then:
            try:
                if step == "a":
                    mine.advance()
                elif step == "f":
                    mine.freeze()
                else:
                    mine.sweep(thorough=True)
            except FarshoreError as error:
                if error.code not in (Code.TARGET_UNREACHABLE, Code.REPLICA_FENCED):
                    raise

    @rule(choice=st.randoms(use_true_random=False), fuse=st.none() | st.integers(1, 40), after=st.booleans())
    def prune(self, choice: random.Random, fuse, after) -> None:
        def work() -> None:
            mine = self.store().acquire("vm", "me")
            try:
                victims = [point for point in mine.points()[:-1] if choice.random() < 0.5]
                free = {point.id for point in victims if not self.held.get(point.id)}
                self.maybe_removed |= free
                self.wished |= {point.id for point in victims}
                removed = mine.remove_points([point.cycle for point in victims])
                assert removed == [point.cycle for point in victims if point.id in free]
                mine.sweep()
            finally:
                mine.close()

        self.attempt(fuse, after, None, work)

    @rule(choice=st.randoms(use_true_random=False), fuse=st.none() | st.integers(1, 30))
    def keep_only(self, choice: random.Random, fuse) -> None:
        points = self.store().points("vm")
        if points:
            kept = choice.choice(points)
            self.maybe_removed |= {p.id for p in points if p.id != kept.id and not self.held.get(p.id)}
            self.wished |= {p.id for p in points if p.id != kept.id}
            self.attempt(fuse, False, None, lambda: self.store().keep_only("vm", kept.id) and None)

    @rule(choice=st.randoms(use_true_random=False), holder=st.sampled_from(["run-1", "run-2"]))
    def hold(self, choice: random.Random, holder: str) -> None:
        points = self.store().points("vm")
        if points:
            point = choice.choice(points).id
            try:
                self.store().hold("vm", point, holder)
            except FarshoreError as error:
                if error.code is Code.POINT_EXPIRED and point in self.wished:
                    # The holder has nothing now, also of an earlier hold: it is told to choose again.
                    self.held.get(point, set()).discard(holder)
                    if not self.held.get(point):
                        self.maybe_removed.add(point)
                    return
                raise
            self.held.setdefault(point, set()).add(holder)

    @rule(holder=st.sampled_from(["run-1", "run-2"]))
    def give_back(self, holder: str) -> None:
        self.store().release("vm", holder)
        for holders in self.held.values():
            holders.discard(holder)
        # A removal that died on the way is finished once nobody holds the point any more.
        self.maybe_removed |= {point for point in self.wished if not self.held.get(point)}

    @rule(leaves=st.integers(1, 9), tail=st.sampled_from(TAILS))
    def second_disk(self, leaves: int, tail: int) -> None:
        if "2001" not in self.source.machine:
            self.source.add("2001", leaves, tail, identity=f"at {self.source.sequence}")

    @precondition(lambda self: "2001" in self.source.machine)
    @rule()
    def remove_disk(self) -> None:
        del self.source.machine["2001"]

    @rule(key=st.sampled_from(KEYS), leaves=st.integers(1, 9), tail=st.sampled_from(TAILS))
    def resize(self, key: str, leaves: int, tail: int) -> None:
        if key in self.source.machine:
            self.source.resize(key, leaves, tail)

    @rule(key=st.sampled_from(KEYS))
    def lose_tracking(self, key: str) -> None:
        if key in self.source.machine:
            self.source.reset_tracking(key)

    @rule(which=st.integers(0, 3))
    def damage_leaf_table(self, which: int) -> None:
        """Somebody flips a byte of a replica's leaf table: no point may become wrong by it."""
        for name, image in self.backend.store.items():
            if name.startswith("vm/d/2000") and name.endswith(".leaves"):
                at = (mirror.HEADER + which * 16) % len(image.now)
                image.now[at] ^= 1
                image.durable[at] ^= 1

    @invariant()
    def every_listed_point_is_true(self) -> None:
        store = self.store()
        points = store.points("vm")
        listed = {point.id for point in points}
        missing = self.acknowledged - listed - self.maybe_removed
        assert not missing, f"acknowledged points vanished: {missing}"
        assert all(holders <= set() or point in listed for point, holders in self.held.items()), (
            "a held point vanished"
        )
        assert [p.taken_at for p in points] == sorted(p.taken_at for p in points)
        for point in points:
            manifest = store.manifest("vm", point.id)
            truth = self.source.history[manifest.cut]
            assert {disk.state.key for disk in manifest.disks} == set(truth)
            for disk in manifest.disks:
                self.is_true(store, point.id, disk.state.key, truth[disk.state.key])

    def is_true(self, store: JournalStore, point: str, key: str, truth: bytes) -> None:
        reader = store.read_point("vm", point, key)
        written = bytearray(reader.size)

        def sink(offset: int, data: bytes | memoryview) -> None:
            written[offset : offset + len(data)] = data

        reader.write_out(sink)
        assert written == truth, f"{point} {key}"
        if reader.base is not None:
            image, snapshot = reader.base
            frozen = self.backend.store[image].snapshots[snapshot][1]
            written[:] = frozen[: len(truth)].ljust(len(truth), b"\0")
            reader.write_out(sink, clear=lambda at, length: sink(at, bytes(length)), on_base=True)
            assert written == truth, f"{point} {key} on its base"

    def teardown(self) -> None:
        """After all of it one more cycle works, and nothing is left behind."""
        if not self.source.machine:
            return
        self.give_back("run-1")
        self.give_back("run-2")
        self.replicate(None, False, None, 2, False, None, None, [], "af")
        self.every_listed_point_is_true()
        store = self.store()
        mine = store.acquire("vm", "last")
        for _ in range(2):
            self.now += GRACE + 1
            mine.sweep(thorough=True)
        self.every_listed_point_is_true()
        view = mine.view()
        head = view.head
        assert head is not None
        oldest = min(m.cycle for m, _ in view.points)
        bases = [b.cycle for b in view.bases if b.cycle <= oldest]
        if bases:
            kept = [c for c in view.manifests if c < max(bases)]
            assert not kept, f"entries {kept} are below the base {max(bases)} of the oldest point {oldest}"
        named = {s.name for m, _ in view.manifests.values() for d in m.disks for s in mine.journal.refs(d)}
        stored = {n.removeprefix("vm/") for n in self.backend.objects if n.startswith("vm/s/")}
        assert stored == named, "orphans, or points without bytes"
        frozen = {t for b in view.bases for d in b.disks for t in (d.snapshot, d.table)}
        assert {f"{i.name}@{s.id}" for i in self.backend.images("vm/") for s in i.snapshots} == frozen
        mine.close()
        store.remove_machine("vm")
        assert not self.backend.objects and not self.backend.store


def run(examples: int) -> None:
    run_state_machine_as_test(
        Story,
        settings=settings(
            max_examples=examples,
            stateful_step_count=25,
            deadline=None,
            phases=(Phase.explicit, Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            database=None,
            print_blob=False,
        ),
    )


def test_every_story_leaves_only_true_points() -> None:
    run(40)


@pytest.mark.slow
def test_many_stories_leave_only_true_points() -> None:
    run(1500)


def tell(seed: int) -> None:
    """One story by dice, much cheaper than a drawn one: many crashes, few leaves, writes that go back and forth."""
    dice = random.Random(seed)
    story = Story()
    story.first_disk(dice.randint(1, 6), dice.choice(TAILS))
    for _ in range(14):
        for _ in range(dice.randint(0, 3)):
            story.guest_writes(dice.choice(KEYS), dice.randint(0, 5), dice.randint(0, 2))
        match dice.choices(range(10), weights=[12, 3, 1, 2, 1, 2, 1, 1, 1, 3])[0]:
            case 0:
                story.replicate(
                    fuse=dice.choice([None, None, dice.randint(5, 90)]),
                    after=dice.random() < 0.5,
                    power=dice.choice([None, dice.randint(0, 99)]),
                    cycles=dice.randint(1, 3),
                    resync=dice.random() < 0.05,
                    stop=dice.choice([None, None, None, dice.randint(1, 8)]),
                    failing=dice.choice([None, None, dice.randint(8, 60)]),
                    between=[(dice.randint(0, 5), dice.randint(0, 2)) for _ in range(dice.randint(0, 3))],
                    then=dice.choice(["", "a", "a", "f", "s", "af", "as", "afs", "fas"]),
                )
            case 1:
                story.prune(dice, dice.choice([None, dice.randint(1, 40)]), dice.random() < 0.5)
            case 2:
                story.keep_only(dice, dice.choice([None, dice.randint(1, 30)]))
            case 3:
                story.hold(dice, "run-1")
            case 4:
                story.give_back("run-1")
            case 5 if "2001" in story.source.machine:
                story.remove_disk()
            case 5:
                story.second_disk(dice.randint(1, 4), dice.choice(TAILS))
            case 6:
                story.resize(dice.choice(KEYS), dice.randint(1, 7), dice.choice(TAILS))
            case 7:
                story.lose_tracking(dice.choice(KEYS))
            case 8:
                story.damage_leaf_table(dice.randint(0, 3))
            case _:
                story.time_passes(dice.choice([30.0, 60.0, 150.0]))
        story.every_listed_point_is_true()
    story.teardown()


def test_stories_by_dice_leave_only_true_points() -> None:
    for seed in range(40):
        tell(seed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_stories_by_dice_leave_only_true_points() -> None:
    for seed in range(40, 2000):
        tell(seed)


# mutants --------------------------------------------------------------------------------------------------------------


def manifest_before_segments(patch: pytest.MonkeyPatch) -> None:
    """The point is committed while its segments are still under way."""
    waiting: list[tuple[object, str, bytes]] = []
    patch.setattr(packer, "store", lambda backend, name, data: waiting.append((backend, name, data)))
    real = writer.Writer.commit

    def commit(self, manifest):
        point = real(self, manifest)
        while waiting:
            backend, name, data = waiting.pop(0)
            backend.create(name, data)
        return point

    patch.setattr(writer.Writer, "commit", commit)


def tracker_advanced_before_commit(patch: pytest.MonkeyPatch) -> None:
    """The next cycle starts from the last cut, committed or not."""
    real = ModelCut.changed
    last: dict[tuple[int, str], object] = {}

    def changed(self, disk_key, since):
        known = last.get((id(self._source), disk_key))
        last[id(self._source), disk_key] = next(disk for disk in self.disks if disk.key == disk_key)
        return real(self, disk_key, known if since is not None and known is not None else since)

    patch.setattr(ModelCut, "changed", changed)


def applied_before_flush(patch: pytest.MonkeyPatch) -> None:
    """The header says that a point was applied although its bytes may still get lost."""
    real = MemoryBackend.flush
    patch.setattr(
        MemoryBackend,
        "flush",
        lambda self, name, fence: None if name.endswith(".vhd") else real(self, name, fence),
    )


def applied_before_redo(patch: pytest.MonkeyPatch) -> None:
    """The header is written first."""
    real = mirror.Mirror._begin

    def begin(self, line, goal, leaves, header, **rest):
        header = real(self, line, goal, leaves, header, **rest)
        done = dataclasses.replace(header, applied=goal.cycle, size=line.size, target=0, clean=False)
        self._write_header(leaves, done)
        return dataclasses.replace(header, sequence=header.sequence + 1)

    patch.setattr(mirror.Mirror, "_begin", begin)


def sweep_below_points(patch: pytest.MonkeyPatch) -> None:
    """What was removed is deleted although younger points need it."""
    patch.setattr(
        prune,
        "needs",
        lambda view, *_: prune.Needs({m.cycle for m, _ in view.points}, {b.number for b in view.bases}),
    )


def sweep_by_head(patch: pytest.MonkeyPatch) -> None:
    """Only what the newest point needs is kept."""
    real = prune.needs

    def needs(view, applied, now, grace, avoid):
        head = view.head
        alone = {head.cycle: view.manifests[head.cycle]} if head else {}
        lonely = dataclasses.replace(view, manifests={**alone}, bases=view.bases)
        found = prune.Needs()
        for disk in head.disks if head else ():
            line = compose.line(view, head.cycle, disk.state.key, usable=avoid)
            found.cycles.update(step.cycle for step in line.steps)
        found.cycles.update(m.cycle for m, _ in view.points)
        found.bases = real(lonely, {}, now, 0.0, avoid).bases if alone and len(alone) > 9 else set()
        found.bases.update(b.number for b in view.bases[-1:])
        return found

    patch.setattr(prune, "needs", needs)


def base_while_applying(patch: pytest.MonkeyPatch) -> None:
    """The replica is frozen as the base of the newest point, wherever it is."""

    def freeze(self, head):
        images = {image.name for image in self._backend.images(self._journal.prefix)}
        frozen = []
        for disk in head.disks:
            image, leaves = mirror.names(self._journal.prefix, disk.state.key, disk.life)
            if image not in images or leaves not in images:
                raise FarshoreError(Code.TARGET_UNREACHABLE, "not yet")
            ice = self._backend.freeze(image, head.cycle, self._epoch, self._epoch)
            cold = self._backend.freeze(leaves, head.cycle, self._epoch, self._epoch)
            frozen.append((disk, mirror.handle(image, ice), mirror.handle(leaves, cold)))
        return frozen

    patch.setattr(mirror.Mirror, "freeze", freeze)
    patch.setattr(mirror.Mirror, "table_is_true", lambda self, disk: True)
    real = writer.Writer._bring

    def bring(self, its_mirror, head) -> None:
        if sys._getframe(1).f_code.co_name != "cool":
            real(self, its_mirror, head)

    patch.setattr(writer.Writer, "_bring", bring)


def base_without_entry_of_the_log(patch: pytest.MonkeyPatch) -> None:
    """What a base froze is dropped before the entry that names it."""

    def delete(self, base: Base) -> None:
        for disk in base.disks:
            self._backend.drop(*mirror.parse_handle(disk.snapshot))
        for disk in base.disks:
            self._backend.drop(*mirror.parse_handle(disk.table))

    patch.setattr(prune.Sweeper, "_delete_base", delete)


def leaf_table_not_updated(patch: pytest.MonkeyPatch) -> None:
    """What a cycle shipped is not in the table."""
    real = cycle._Run._piece

    def piece(self, task, where, its_packer, forced) -> None:
        put = task.opened.table.put
        task.opened.table.put = lambda first, entries: None
        try:
            real(self, task, where, its_packer, forced)
        finally:
            task.opened.table.put = put

    patch.setattr(cycle._Run, "_piece", piece)


def table_kept_after_failure(patch: pytest.MonkeyPatch) -> None:
    """After a stopped cycle the writer goes on with the table as it is."""

    def forget(self) -> None:
        for opened in self._open.values():
            opened.table.accept()
        self._open.clear()

    patch.setattr(disks.Disks, "forget", forget)


def holds_ignored(patch: pytest.MonkeyPatch) -> None:
    """A removal does not look whether somebody uses the point."""

    def doom(self, name, cycles, now):
        wanted = sorted(set(cycles))
        self._put_doom(name, wanted, decided=True, now=now)
        return wanted

    patch.setattr(log.Log, "doom", doom)


def adopted_but_not_visited(patch: pytest.MonkeyPatch) -> None:
    """What dead cycles left is taken for what the source has now."""
    real = disks.Disks._adopt

    def adopt(self, opened) -> None:
        real(self, opened)
        opened.visit = []

    patch.setattr(disks.Disks, "_adopt", adopt)


def adopted_from_removed_points(patch: pytest.MonkeyPatch) -> None:
    """Segments of a point that is being removed are taken for a dead cycle's."""
    real = disks.Disks._adopt

    def adopt(self, opened) -> None:
        owner = self._writer
        view = owner.view()
        gone = view.doomed
        left = {cycle: pair for cycle, pair in view.manifests.items() if cycle not in gone}
        owner.view = lambda: dataclasses.replace(view, manifests=left, dooms={})
        try:
            real(self, opened)
        finally:
            del owner.view

    patch.setattr(disks.Disks, "_adopt", adopt)


def line_by_number(patch: pytest.MonkeyPatch) -> None:
    """A point is taken to follow the one before it in the log, also if a failover was committed to an older one."""
    real = cycle._Run.copy

    def copy(self, *args) -> Manifest:
        manifest = real(self, *args)
        below = [c for c in self._writer.view().manifests if c < manifest.cycle]
        return dataclasses.replace(manifest, previous=max(below, default=0))

    patch.setattr(cycle._Run, "copy", copy)


def dead_branch_applied(patch: pytest.MonkeyPatch) -> None:
    """Redo goes on from what the replica has, whether or not the point descends from it, and nobody looks at the root."""
    real = compose.line

    def line(view, number, key, *, stop_at=None, stop_size=None, usable=lambda _: True):
        if stop_at is None:
            return real(view, number, key, usable=usable)
        found = real(view, number, key, stop_at=stop_at, stop_size=stop_size, usable=usable)
        if found.present:
            return found
        steps = tuple(step for step in found.steps if step.cycle > stop_at)
        return dataclasses.replace(found, steps=steps, present=True, base_cycle=stop_at, start_size=stop_size)

    patch.setattr(compose, "line", line)
    patch.setattr(mirror.Mirror, "table_is_true", lambda self, disk: True)


MUTANTS = [
    manifest_before_segments,
    tracker_advanced_before_commit,
    applied_before_flush,
    applied_before_redo,
    sweep_below_points,
    sweep_by_head,
    base_while_applying,
    base_without_entry_of_the_log,
    leaf_table_not_updated,
    table_kept_after_failure,
    holds_ignored,
    adopted_but_not_visited,
    adopted_from_removed_points,
    line_by_number,
    dead_branch_applied,
]

SEEDS: dict[str, tuple[int, ...]] = {
    "manifest_before_segments": (6, 9),
    "tracker_advanced_before_commit": (6, 7),
    "applied_before_flush": (0, 1),
    "applied_before_redo": (23, 177),
    "sweep_below_points": (0, 5),
    "sweep_by_head": (0, 1),
    "base_while_applying": (0, 7),
    "base_without_entry_of_the_log": (1, 15),
    "leaf_table_not_updated": (0, 1),
    "table_kept_after_failure": (67, 192),
    "holds_ignored": (8, 17),
    "adopted_but_not_visited": (64, 232),
    "adopted_from_removed_points": (59, 71),
    "line_by_number": (73, 77),
    "dead_branch_applied": (16, 17),
}
"""Stories that catch a mutant. They go the same way every time, so each of these must catch it every time."""


def caught(seed: int) -> str:
    """How the story noticed that something is wrong; nothing: it did not."""
    try:
        tell(seed)
    except (AssertionError, FarshoreError) as error:
        if isinstance(error, FarshoreError) and error.code is not Code.REPLICA_DAMAGED:
            raise
        return str(error) or "an assertion"
    return ""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_stories_catch(
    mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = SEEDS[mutant.__name__]
    for seed in kept:
        tell(seed)  # without the mutant it is true
    mutant(monkeypatch)
    blind = [seed for seed in kept if not caught(seed)]
    assert not blind, (
        f"stories {blind} no longer notice: find others "
        f"(python -m tests.replication.test_story {mutant.__name__})"
    )


if __name__ == "__main__":  # a search for stories that notice a mutant: some need hundreds
    for wanted in MUTANTS:
        if wanted.__name__ in sys.argv[1:] or not sys.argv[1:]:
            with pytest.MonkeyPatch.context() as context:
                context.setattr(compose, "REGION", 4 * LEAF)
                context.setattr(mirror, "_LONG", 2 * LEAF)
                wanted(context)
                found = itertools.islice(filter(caught, range(600)), 2)
                print(f'    "{wanted.__name__}": {tuple(found)},', flush=True)
