"""One cycle and one leg: order, what is read and shipped, waiting, stopping, errors."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency
from farshore.domain.retention import keep_all
from farshore.replication.filesource import FileSource
from farshore.replication.filestore import FileBackend
from farshore.replication.journal import cycle as cycles
from farshore.replication.journal import packer
from farshore.replication.journal import writer as writers
from farshore.replication.journal.cycle import Pace, run_cycle
from farshore.replication.journal.store import JournalStore, Options
from farshore.replication.loop import LegPlan, run_leg
from farshore.replication.ports import LEAF, Progress

from .fakes import START, MemoryBackend, ModelCut, ModelSource, Through, pattern

PACE = Pace(workers=2, piece=2 * LEAF, poll=0.02)
CRASH = Consistency.CRASH


class Recorded:
    """A store in memory whose operations are written down together with the source's."""

    def __init__(self) -> None:
        self.source = ModelSource()
        self.backend = MemoryBackend()
        self.store = JournalStore(
            Through(self.backend, self._note), clock=lambda: 1000.0, options=Options(workers=0)
        )
        self.source.add("2000", 8)
        self.source.write("2000", 1, pattern(1))

    def _note(self, name: str, args) -> bool:
        self.source.events.append(f"{name} {args[0] if args else ''}")
        return False


def proved(world: Recorded, point: str) -> None:
    """Every byte of a point is what its cut held."""
    manifest = world.store.manifest("vm", point)
    for key, truth in world.source.history[manifest.cut].items():
        reader = world.store.read_point("vm", point, key)
        found = bytearray(reader.size)

        def sink(offset: int, data: bytes | memoryview, into: bytearray = found) -> None:
            into[offset : offset + len(data)] = data

        reader.write_out(sink)
        assert found == truth


def at(events: list[str], text: str) -> list[int]:
    return [index for index, event in enumerate(events) if event.startswith(text)]


def test_the_order_of_a_cycle() -> None:
    world = Recorded()
    world.source.add("2001", 4, 512)
    world.source.write("2001", 0, pattern(2))
    plan = LegPlan("vm", "me", 1.0, stop_after_first=True, pace=PACE)
    run_leg(world.source, world.store, plan)
    check_order(world.source.events)


def check_order(events: list[str]) -> None:
    opened, committed = at(events, "create vm/m/")[:2]
    (reaped,), (cut,), released = at(events, "reap"), at(events, "cut"), min(at(events, "release"))
    stored = at(events, "create vm/s/")
    assert opened < reaped < cut < min(stored) and len(stored) == 2
    assert max(stored) < committed < released
    assert all(committed < index for index in at(events, "ensure_image") + at(events, "write "))


def release_before_commit(patch: pytest.MonkeyPatch) -> None:
    """The source may forget before the point exists."""
    real = cycles._Run.copy

    def copy(self, *args):
        manifest = real(self, *args)
        self._cut.release()
        return manifest

    patch.setattr(cycles._Run, "copy", copy)


def commit_before_segments(patch: pytest.MonkeyPatch) -> None:
    """The manifest is created while segments are under way."""
    waiting = []
    real = writers.Writer.commit
    patch.setattr(packer, "store", lambda *args: waiting.append(args))

    def commit(self, manifest):
        point = real(self, manifest)
        for backend, name, data in waiting:
            backend.create(name, data)
        return point

    patch.setattr(writers.Writer, "commit", commit)


@pytest.mark.parametrize("mutant", [release_before_commit, commit_before_segments])
def test_the_order_notices(mutant, monkeypatch) -> None:
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        test_the_order_of_a_cycle()


def test_retention_follows_the_release() -> None:
    world = Recorded()
    now = [START]

    def clock() -> datetime:
        now[0] += timedelta(seconds=100)
        return now[0]

    rounds = iter(range(100))
    plan = LegPlan("vm", "me", 0.0, retention=keep_all(250), pace=PACE)
    result = run_leg(world.source, world.store, plan, clock=clock, should_stop=lambda: next(rounds) > 60)
    assert result.points > 3 and result.pruned
    removed = at(world.source.events, "put vm/x/")[0]
    assert any(index < removed for index in at(world.source.events, "release"))


def test_a_delta_reads_and_ships_only_what_changed() -> None:
    world = Recorded()
    writer = world.store.acquire("vm", "me")
    first = run_cycle(world.source, writer, machine="vm", want=CRASH, pace=PACE)
    assert (first.bytes_read, first.bytes_shipped, first.full) == (LEAF, LEAF, False)
    world.source.write("2000", 3, pattern(2))
    world.source.write("2000", 1, pattern(1))  # written, but not changed
    second = run_cycle(world.source, writer, machine="vm", want=CRASH, pace=PACE)
    assert (second.bytes_changed, second.bytes_shipped) == (2 * LEAF, LEAF)
    world.source.write("2000", 3, pattern(0))
    third = run_cycle(world.source, writer, machine="vm", want=CRASH, pace=PACE)
    assert (third.bytes_shipped, third.bytes_cleared) == (0, LEAF)
    fourth = run_cycle(world.source, writer, machine="vm", want=CRASH, pace=PACE)
    assert (fourth.bytes_read, fourth.manifest.parent) == (0, third.point.digest)


def test_neighbouring_changes_are_one_read_and_what_lies_between_is_not_shipped() -> None:
    world = Recorded()
    writer = world.store.acquire("vm", "me")
    for leaf in range(7):
        world.source.write("2000", leaf, pattern(leaf + 1))
    run_cycle(world.source, writer, machine="vm", want=CRASH, pace=PACE)
    world.source.write("2000", 0, pattern(21))
    world.source.write("2000", 2, pattern(22))
    result = run_cycle(world.source, writer, machine="vm", want=CRASH, pace=PACE)
    assert (result.bytes_changed, result.bytes_read, result.bytes_shipped) == (2 * LEAF, 3 * LEAF, 2 * LEAF)
    proved(world, result.point.id)
    world.source.whole = False  # of what did not change nobody kept the bytes of this instant
    for leaf in (0, 2):
        world.source.write("2000", leaf, pattern(30 + leaf))
    result = run_cycle(
        world.source, writer, machine="vm", want=CRASH, pace=replace(PACE, audit=8 * LEAF, audit_share=1.0)
    )
    assert (result.bytes_read, result.audited) == (2 * LEAF, ())


def test_a_disk_is_not_dropped_in_silence_and_one_that_was_taken_away_is_no_error() -> None:
    world = Recorded()
    world.source.add("2001", 4)
    writer = world.store.acquire("vm", "me")
    first = run_cycle(world.source, writer, machine="vm", want=CRASH, pace=PACE)
    del world.source.machine["2001"]
    world.source.left_out = {"2001": "it is an independent disk"}
    with pytest.raises(FarshoreError, match="cannot be any more: it is an independent disk"):
        run_cycle(world.source, writer, machine="vm", want=CRASH, pace=PACE)
    assert [point.id for point in writer.points()] == [first.point.id]
    assert sum(event.startswith("release") for event in world.source.events) == 2
    world.source.left_out = {"3000": "it was never replicated"}
    assert len(run_cycle(world.source, writer, machine="vm", want=CRASH, pace=PACE).manifest.disks) == 1


def test_what_the_source_does_not_confirm_makes_no_point(monkeypatch) -> None:
    world = Recorded()
    writer = world.store.acquire("vm", "me")
    first = run_cycle(world.source, writer, machine="vm", want=CRASH, pace=PACE)
    world.source.write("2000", 3, pattern(2))

    def gone(self: object) -> None:
        raise FarshoreError(Code.SOURCE_READ_FAILED, "the snapshot vanished")

    with monkeypatch.context() as patch:
        patch.setattr(ModelCut, "confirm", gone)
        with pytest.raises(FarshoreError, match="vanished"):
            run_cycle(world.source, writer, machine="vm", want=CRASH, pace=PACE)
    assert [point.id for point in writer.points()] == [first.point.id]
    proved(world, run_cycle(world.source, writer, machine="vm", want=CRASH, pace=PACE).point.id)


def test_a_full_comparison_ships_only_what_differs_and_older_points_stay() -> None:
    world = Recorded()
    writer = world.store.acquire("vm", "me")
    first = run_cycle(world.source, writer, machine="vm", want=CRASH, pace=PACE)
    world.source.write("2000", 5, pattern(2))
    world.source.reset_tracking("2000")
    second = run_cycle(world.source, writer, machine="vm", want=CRASH, pace=PACE)
    assert second.full and "tracking" in second.reason
    assert (second.bytes_read, second.bytes_shipped) == (8 * LEAF, LEAF)
    for point in (first.point, second.point):
        proved(world, point.id)


def test_a_cut_is_released_after_any_error_and_a_failed_release_costs_no_point(monkeypatch) -> None:
    world = Recorded()
    writer = world.store.acquire("vm", "me")

    def broken(self, *_):
        raise FarshoreError(Code.SOURCE_READ_FAILED, "the host went away")

    with monkeypatch.context() as patch:
        patch.setattr(ModelCut, "read", broken)
        with pytest.raises(FarshoreError, match="went away"):
            run_cycle(world.source, writer, machine="vm", want=CRASH, pace=PACE)
    assert not world.source.cuts
    monkeypatch.setattr(ModelCut, "release", broken)
    result = run_cycle(world.source, writer, machine="vm", want=CRASH, pace=PACE)
    assert "went away" in result.release_error
    assert world.store.points("vm")[-1].id == result.point.id


def test_a_progress_sink_that_raises_ends_the_cycle_cleanly() -> None:
    world = Recorded()

    def sink(progress: Progress) -> None:
        if progress.stage == "committing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cycle(
            world.source, world.store.acquire("vm", "me"), machine="vm", want=CRASH, pace=PACE, progress=sink
        )
    assert not world.source.cuts and world.store.points("vm") == []


def test_a_disk_that_leaves_and_returns_keeps_nothing_of_its_past() -> None:
    world = Recorded()
    world.source.add("2001", 4)
    world.source.write("2001", 2, pattern(7))
    writer = world.store.acquire("vm", "me")
    run_cycle(world.source, writer, machine="vm", want=CRASH, pace=PACE)
    gone = world.source.machine.pop("2001")
    run_cycle(world.source, writer, machine="vm", want=CRASH, pace=PACE)
    world.source.machine["2001"] = gone
    gone.content[:] = bytes(len(gone.content))
    back = run_cycle(world.source, writer, machine="vm", want=CRASH, pace=PACE)
    assert world.store.read_point("vm", back.point.id, "2001").read(0, 4 * LEAF) == bytes(4 * LEAF)
    proved(world, back.point.id)


class Clock:
    """Time that passes only in sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.sleeps: list[float] = []
        self.really = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds
        time.sleep(self.really)

    def wall(self) -> datetime:
        return START + timedelta(seconds=self.now)


def leg(world: Recorded, clock: Clock, **options):
    said: list[Progress] = []
    plan = LegPlan("vm", "me", **{"interval_s": 30.0, "until_s": 100.0, "pace": PACE, **options})
    result = run_leg(
        world.source,
        world.store,
        plan,
        progress=said.append,
        clock=clock.wall,
        monotonic=clock.monotonic,
        sleep=clock.sleep,
    )
    return result, said


def test_a_leg_makes_a_point_every_interval_until_its_time_is_over() -> None:
    world, clock = Recorded(), Clock()
    result, said = leg(world, clock)
    assert (result.points, result.stopped_because) == (4, "time")
    assert max(clock.sleeps) <= 0.5, "a request to stop would be heard late"
    assert result.newest and said[-1].newest_point == result.newest.id
    assert result.newest_recoverable_at == result.newest.taken_at


def test_a_cycle_longer_than_the_interval_is_followed_at_once(monkeypatch) -> None:
    world, clock = Recorded(), Clock()
    real = ModelSource.cut

    def slow(self, name, *, want):
        clock.now += 40
        return real(self, name, want=want)

    monkeypatch.setattr(ModelSource, "cut", slow)
    result, _ = leg(world, clock)
    assert result.points == 3 and clock.sleeps == []


def test_errors_that_may_pass_are_waited_out_with_growing_patience() -> None:
    world, clock = Recorded(), Clock()
    world.source.fail_cuts = [FarshoreError(Code.SOURCE_UNREACHABLE, "no route") for _ in range(5)]
    result, said = leg(world, clock, until_s=1000.0, stop_after_first=True, backoff_cap_s=6.0)
    assert (result.errors, result.points, result.last_error) == (5, 1, "")
    assert clock.now == pytest.approx(1 + 2 + 4 + 6 + 6)
    waits = [
        progress.stage
        for progress in said
        if progress.stage.startswith("waiting") and "after" in progress.stage
    ]
    assert waits == [f"waiting {seconds} s after: no route" for seconds in (1, 2, 4, 6, 6)]


def test_errors_that_stay_end_the_leg() -> None:
    world, clock = Recorded(), Clock()
    world.source.fail_cuts = [FarshoreError(Code.SOURCE_NOT_ELIGIBLE, "a shared disk")]
    with pytest.raises(FarshoreError, match="shared disk"):
        leg(world, clock)


def test_a_leg_ends_for_its_successor_and_does_not_take_the_epoch_back() -> None:
    world, clock = Recorded(), Clock()
    real_cut = world.source.cut

    def cut(name, *, want):
        world.source.cut = real_cut
        world.store.acquire("vm", "successor")
        raise FarshoreError(Code.SOURCE_UNREACHABLE, "no route")

    world.source.cut = cut
    with pytest.raises(FarshoreError) as caught:
        leg(world, clock)
    assert caught.value.code is Code.REPLICA_FENCED
    assert [o.owner for o in world.store.log("vm").read(1000.0).openings][-1] == "successor"


def test_app_consistent_points_come_when_due_and_never_cost_a_crash_consistent_one() -> None:
    world, clock = Recorded(), Clock()
    result, _ = leg(world, clock, app_consistent_every_s=60.0)
    kinds = [point.consistency for point in world.store.points("vm")]
    app = Consistency.APPLICATION
    assert kinds == [app, CRASH, app, CRASH]
    world.source.fail_cuts = [FarshoreError(Code.SNAPSHOT_FAILED, "the guest does not freeze")]
    clock.now += 1000
    result, said = leg(world, clock, app_consistent_every_s=60.0, stop_after_first=True)
    assert result.newest.consistency is CRASH and result.errors == 0
    assert any("does not freeze" in progress.stage for progress in said)


def test_final_points_are_marked() -> None:
    world, clock = Recorded(), Clock()
    result, _ = leg(world, clock, final=True, stop_after_first=True)
    assert result.newest.final and result.stopped_because == "first point"


def test_a_final_point_of_a_running_machine_is_refused_and_its_cut_released() -> None:
    world, clock = Recorded(), Clock()
    world.source.powered_off = False
    with pytest.raises(FarshoreError, match="was not off") as caught:
        leg(world, clock, final=True, stop_after_first=True)
    assert (caught.value.code, caught.value.retryable) == (Code.FENCE_NOT_PROVEN, False)
    assert world.store.points("vm") == [] and world.source.cuts == {}
    result, _ = leg(world, clock, stop_after_first=True)
    assert result.points == 1, "ordinary points are taken of running machines"


def test_a_leg_that_slept_before_reaping_leaves_the_cut_of_its_successor_alone(monkeypatch) -> None:
    world, clock = Recorded(), Clock()
    world.source.cut("farshore-vm-0-7", want=CRASH)
    real = world.store.acquire
    successors = []

    def acquire(machine, owner, **options):
        writer = real(machine, owner, **options)
        if not successors:
            successor = real(machine, "successor")
            successors.append(world.source.cut(f"farshore-vm-{successor.epoch}-1", want=CRASH))
        return writer

    monkeypatch.setattr(world.store, "acquire", acquire)
    with pytest.raises(FarshoreError) as caught:
        leg(world, clock)
    assert caught.value.code is Code.REPLICA_FENCED
    assert list(world.source.cuts.values()) == successors


def test_files_reap_cuts_up_to_their_own_epoch(tmp_path: Path) -> None:
    image = tmp_path / "a.img"
    image.write_bytes(bytes(LEAF))
    source = FileSource({"2000": image}, tmp_path / "work")
    for name in ("farshore-a b-9-3", "farshore-a b-10-1", "farshore-a b-11-1"):
        source.cut(name, want=CRASH)
    assert source.reap("farshore-a b-10-0") == ["farshore-a%20b-10-1", "farshore-a%20b-9-3"]
    assert source.reap() == ["farshore-a%20b-11-1"]


def test_a_leg_hears_within_a_second_that_it_shall_stop(tmp_path: Path, monkeypatch) -> None:
    """In the middle of a copy."""
    image = tmp_path / "a.img"
    image.write_bytes(bytes(range(256)) * (64 * LEAF // 256))
    source = FileSource({"2000": image}, tmp_path / "work")
    store = JournalStore(FileBackend(tmp_path / "store", durable=False))
    stop, reading = threading.Event(), threading.Event()
    from farshore.replication.filesource import FileCut

    real = FileCut.read

    def slow(self, *args):
        reading.set()
        time.sleep(0.05)
        return real(self, *args)

    monkeypatch.setattr(FileCut, "read", slow)
    results = []
    plan = LegPlan("vm", "me", 1.0, pace=PACE)
    thread = threading.Thread(
        target=lambda: results.append(run_leg(source, store, plan, should_stop=stop.is_set)), daemon=True
    )
    thread.start()
    assert reading.wait(10)
    asked = time.monotonic()
    stop.set()
    thread.join(5)
    assert time.monotonic() - asked < 1.5 and results[0].stopped_because == "asked"
    assert store.points("vm") == [] and not list((tmp_path / "work" / "cuts").iterdir())


def test_a_damaged_opening_hides_no_point_and_a_damaged_manifest_only_its_own() -> None:
    world = Recorded()
    writer = world.store.acquire("vm", "me")
    made = [run_cycle(world.source, writer, machine="vm", want=CRASH, pace=PACE).point for _ in range(3)]
    for number, listed in ((1, made), (3, [made[0], made[2]])):
        name = f"vm/m/{number:010d}.json"
        data, version = world.backend.objects[name]
        world.backend.objects[name] = (data[:-9] + b"X" + data[-8:], version + 10_000)
        assert [p.id for p in world.store.points("vm")] == [p.id for p in listed]
        if number == 3:
            with pytest.raises(FarshoreError) as caught:
                world.store.manifest("vm", made[1].id)
            assert caught.value.code is Code.REPLICA_DAMAGED
    kept = [name for name in world.backend.objects if "/s/" in name]
    writer = world.store.acquire("vm", "next")
    run_cycle(world.source, writer, machine="vm", want=CRASH, pace=PACE)
    writer.sweep(thorough=True)
    assert set(kept) <= set(world.backend.objects), "what an unreadable manifest may name must not be reaped"


def test_an_entry_from_a_former_life_of_the_machine_is_no_point() -> None:
    world = Recorded()
    writer = world.store.acquire("vm", "me")
    run_cycle(world.source, writer, machine="vm", want=CRASH, pace=PACE)
    run_cycle(world.source, writer, machine="vm", want=CRASH, pace=PACE)
    name, entry = max((n, e) for n, e in world.backend.objects.items() if "/m/" in n)
    world.store.remove_machine("vm")
    young = JournalStore(world.backend, clock=lambda: 5000.0)
    writer = young.acquire("vm", "new life")
    only = run_cycle(world.source, writer, machine="vm", want=CRASH, pace=PACE).point
    world.backend.objects[name] = entry
    assert [point.id for point in young.points("vm")] == [only.id]


def test_a_hold_that_comes_too_late_says_so() -> None:
    world = Recorded()
    writer = world.store.acquire("vm", "me")
    first = run_cycle(world.source, writer, machine="vm", want=CRASH, pace=PACE).point
    run_cycle(world.source, writer, machine="vm", want=CRASH, pace=PACE)
    assert writer.remove_points([first.cycle]) == [first.cycle]
    with pytest.raises(FarshoreError) as caught:
        world.store.hold("vm", first.id, "run")
    assert caught.value.code in (Code.POINT_NOT_FOUND, Code.POINT_EXPIRED)
    assert not [name for name in world.backend.objects if "/h/" in name]


# holds and grace ------------------------------------------------------------------------------------------------------


class Late:
    """A store whose clock a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.world = Recorded()
        self.store = JournalStore(
            self.world.backend, clock=lambda: self.now, options=Options(grace=100.0, workers=0)
        )
        self.writer = self.store.acquire("vm", "me")

    def point(self, leaf: int, content: int, want: Consistency = CRASH):
        self.world.source.write("2000", leaf, pattern(content))
        self.now += 1
        return run_cycle(self.world.source, self.writer, machine="vm", want=want, pace=PACE).point

    def read(self, reader) -> bytes:
        found = bytearray(reader.size)

        def sink(at: int, data: bytes | memoryview) -> None:
            found[at : at + len(data)] = data

        reader.write_out(sink)
        return bytes(found)


def test_a_lease_runs_out_unless_it_is_renewed() -> None:
    late = Late()
    first = late.point(1, 1)
    late.point(1, 2)
    late.store.hold("vm", first.id, "run", seconds=50)
    late.now += 40
    late.store.hold("vm", first.id, "run", seconds=50)
    late.now += 40
    assert late.writer.remove_points([first.cycle]) == []
    assert late.store.points("vm")[0].pinned
    late.now += 20
    assert not late.store.points("vm")[0].pinned
    assert late.writer.remove_points([first.cycle]) == [first.cycle]


def test_a_reader_finishes_although_its_point_is_removed_meanwhile() -> None:
    late = Late()
    first = late.point(1, 1)
    late.writer.freeze()
    late.point(1, 2)
    truth = late.world.source.history[late.store.manifest("vm", first.id).cut]["2000"]
    reader = late.store.read_point("vm", first.id, "2000")
    late.writer.remove_points([first.cycle])
    late.writer.freeze()
    late.now += 99
    late.writer.sweep(thorough=True)
    assert late.read(reader) == truth
    late.now += 101
    late.writer.sweep(thorough=True)
    with pytest.raises(FarshoreError):
        late.read(reader)


def test_a_held_reader_may_take_as_long_as_it_likes() -> None:
    """Younger bases do not take away the journal that it began with."""
    late = Late()
    late.point(1, 1)
    late.writer.freeze()
    late.point(2, 2)
    held = late.point(3, 3)
    late.store.hold("vm", held.id, "run")
    truth = late.world.source.history[late.store.manifest("vm", held.id).cut]["2000"]
    reader = late.store.read_point("vm", held.id, "2000")
    late.writer.freeze()
    points = [p.cycle for p in late.store.points("vm")]
    late.point(4, 4)
    late.writer.freeze()
    late.writer.remove_points(points)
    for _ in range(3):
        late.now += 1000
        late.writer.sweep(thorough=True)
    assert late.read(reader) == truth
    late.store.release("vm", "run")
    late.writer.remove_points(points)
    for _ in range(2):
        late.now += 1000
        late.writer.sweep(thorough=True)
    with pytest.raises(FarshoreError):
        late.read(reader)


def test_neither_the_newest_nor_the_last_app_consistent_point_is_removed() -> None:
    late = Late()
    app = late.point(1, 1, Consistency.APPLICATION)
    other = late.point(1, 2)
    newest = late.point(1, 3)
    assert late.writer.remove_points([app.cycle, other.cycle, newest.cycle]) == [other.cycle]
    younger = late.point(1, 4, Consistency.APPLICATION)
    assert late.writer.remove_points([app.cycle, younger.cycle]) == [app.cycle]


def test_a_removed_point_is_gone_from_the_lists_at_once_and_its_bytes_stay_while_younger_ones_need_them() -> (
    None
):
    late = Late()
    first, second = late.point(1, 1), late.point(2, 2)
    late.writer.remove_points([first.cycle])
    assert [p.id for p in late.store.points("vm")] == [second.id]
    late.now += 1000
    assert late.writer.sweep().entries == 0, (
        "there is no base: the second point needs the first one's journal"
    )
    reader = late.store.read_point("vm", second.id, "2000")
    assert late.read(reader) == late.world.source.history[late.store.manifest("vm", second.id).cut]["2000"]
    late.writer.freeze()
    late.now += 1000
    assert late.writer.sweep().entries == 1


# the replica behind ---------------------------------------------------------------------------------------------------


def test_a_leg_brings_the_replica_along_and_makes_bases() -> None:
    world, clock = Recorded(), Clock()
    result, _ = leg(world, clock, until_s=200.0, interval_s=10.0, base_every_s=50.0)
    assert result.points == 20
    view = world.store.log("vm").read(1000.0)
    assert 2 <= len(view.bases) == result.bases <= 6


def test_a_final_leg_ends_with_a_base_of_its_point() -> None:
    world, clock = Recorded(), Clock()
    leg(world, clock, until_s=50.0, base_every_s=1e9)
    world.source.write("2000", 5, pattern(5))
    result, _ = leg(world, clock, final=True, stop_after_first=True, base_every_s=1e9)
    assert result.newest and result.newest.final
    reader = world.store.read_point("vm", result.newest.id, "2000")
    assert reader.line.steps == () and reader.base is not None
    assert result.newest_applied_at == result.newest.taken_at


def test_damage_costs_no_point_and_is_told() -> None:
    world, clock = Recorded(), Clock()
    world.source.write("2000", 2, pattern(2))
    leg(world, clock, stop_after_first=True)
    world.source.write("2000", 3, pattern(3))
    leg(world, clock, stop_after_first=True)
    (name,) = [n for n in world.backend.objects if "/s/" in n and "/0000000004-" in n]
    data, version = world.backend.objects[name]
    world.backend.objects[name] = (data[:-1] + bytes([data[-1] ^ 1]), version + 10_000)
    for image in world.backend.store.values():
        image.now[:] = image.durable[:] = bytes(len(image.now))  # the replica is lost as well
        image.snapshots.clear()
    clock.really = 0.0005  # per sleep: redo has a thread of its own
    result, said = leg(world, clock, until_s=600.0)
    assert result.points > 3 and result.errors == 0 and result.bases
    assert result.newest and result.newest.id not in result.damage
    newest = world.store.read_point("vm", result.newest.id, "2000")
    assert newest.read(0, newest.size) == bytes(world.source.machine["2000"].content)
    assert any("damaged" in progress.stage for progress in said)


def test_a_slow_target_costs_no_points(monkeypatch) -> None:
    """Redo stands still; cycles go on."""
    world = Recorded()
    stop, redo = threading.Event(), threading.Event()
    real = MemoryBackend.write

    def write(self, name, *args):
        if name.endswith(".vhd"):
            redo.set()
            assert stop.wait(60)
        return real(self, name, *args)

    monkeypatch.setattr(MemoryBackend, "write", write)
    said: list[Progress] = []

    def heard(progress: Progress) -> None:
        said.append(progress)
        if progress.points > 3:
            stop.set()

    plan = LegPlan("vm", "me", 0.01, until_s=120.0, pace=PACE)
    result = run_leg(world.source, world.store, plan, progress=heard, should_stop=stop.is_set)
    assert result.points > 3 and redo.is_set()
