"""One cycle and one leg: order, what is read and shipped, waiting, stopping, errors."""

from __future__ import annotations

import threading
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency
from farshore.domain.retention import keep_all
from farshore.replication import replica
from farshore.replication.engine import Pace, Stopped, run_cycle
from farshore.replication.filesource import FileSource
from farshore.replication.filestore import FileReplicaStore
from farshore.replication.loop import LegPlan, run_leg
from farshore.replication.ports import LEAF, Progress
from farshore.replication.replica import BackendStore
from farshore.replication.verify import verify_point

from .fakes import START, MemoryBackend, ModelCut, ModelSource, Through, pattern

PACE = Pace(workers=2, piece=2 * LEAF, window=4 * LEAF, poll=0.02)
CRASH = Consistency.CRASH


class Recorded:
    """A store in memory whose operations are written down together with the source's."""

    def __init__(self) -> None:
        self.source = ModelSource()
        self.backend = MemoryBackend()
        self.store = BackendStore(Through(self.backend, self._note), clock=lambda: 1000.0)
        self.source.add("2000", 8)
        self.source.write("2000", 1, pattern(1))

    def _note(self, name: str, args) -> bool:
        self.source.events.append(f"{name} {args[0] if args else ''}")
        return False


def at(events: list[str], text: str) -> list[int]:
    return [index for index, event in enumerate(events) if event.startswith(text)]


def test_the_order_of_a_cycle() -> None:
    world = Recorded()
    world.source.add("2001", 4, 512)
    world.source.write("2001", 0, pattern(2))
    plan = LegPlan("vm", "me", 1.0, stop_after_first=True, pace=PACE)
    run_leg(world.source, world.store, plan)
    events = world.source.events
    opened, committed = at(events, "create vm/m/")
    (reaped,), (cut,), (released,) = at(events, "reap"), at(events, "cut"), at(events, "release")
    windows, writes, frozen = at(events, "put vm/w/"), at(events, "write"), at(events, "freeze")
    assert opened < reaped < cut < min(windows)
    for image in ("vm/d/2000", "vm/d/2001"):
        window = at(events, "put vm/w/0000000002/" + image[-4:])[0]
        data, table = at(events, f"write {image}.vhd"), at(events, f"write {image}.leaves")
        assert window < min(data) and max(data) < at(events, f"flush {image}.vhd")[0] < min(table)
    assert max(writes) < max(at(events, "flush")) < min(frozen)
    assert len(frozen) == 4 and max(frozen) < committed < released
    assert all(committed < index for index in at(events, "delete vm/w/"))


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
    removed = at(world.source.events, "delete vm/m/")[0]
    assert any(index < removed for index in at(world.source.events, "release"))
    assert at(world.source.events, "put vm/x/")[0] < removed < at(world.source.events, "drop")[0]


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
        verify_point(world.store, "vm", point.id)


def test_a_first_copy_that_was_stopped_goes_on_where_it_was() -> None:
    world = Recorded()
    for leaf in range(8):
        world.source.write("2000", leaf, pattern(leaf + 1))
    reads = []
    real = ModelCut.read
    calls = threading.Event()

    def read(self, key, offset, length):
        reads.append(offset)
        if offset >= 6 * LEAF:
            calls.set()
        return real(self, key, offset, length)

    ModelCut.read = read
    try:
        writer = world.store.acquire("vm", "me")
        with pytest.raises(Stopped):
            run_cycle(world.source, writer, machine="vm", want=CRASH, pace=PACE, should_stop=calls.is_set)
    finally:
        ModelCut.read = real
    assert world.store.points("vm") == [] and not world.source.cuts
    writer = world.store.acquire("vm", "next")
    result = run_cycle(world.source, writer, machine="vm", want=CRASH, pace=PACE)
    assert result.bytes_shipped <= 4 * LEAF, "the first window was shipped again"
    verify_point(world.store, "vm", result.point.id)


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
        if progress.stage == "freezing":
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
    verify_point(world.store, "vm", back.point.id)


class Clock:
    """Time that passes only in sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.sleeps: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds

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
    assert [o.owner for o in world.store.log("vm").read().openings][-1] == "successor"


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
    store = FileReplicaStore(tmp_path / "store", durable=False)
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


def test_a_file_store_finds_any_flipped_byte(tmp_path: Path) -> None:
    image = tmp_path / "a.img"
    image.write_bytes(b"\x01" * (3 * LEAF + 512))
    store = FileReplicaStore(tmp_path / "store")
    plan = LegPlan("vm", "me", 1.0, stop_after_first=True, pace=PACE)
    point = run_leg(FileSource({"2000": image}, tmp_path / "work"), store, plan).newest
    assert point is not None
    verify_point(store, "vm", point.id)
    for path in sorted((tmp_path / "store/vm").rglob("*@*")) + sorted(
        (tmp_path / "store/vm/m").glob("*2.json")
    ):
        whole = path.read_bytes()
        for index in (0, len(whole) // 2, 3 * LEAF + 511):
            if index >= len(whole) or (path.name.startswith("2000.leaves") and index):
                continue
            path.write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
            if "leaves@" in path.name:
                verify_point(store, "vm", point.id)  # a copy only: the manifest's digest decides
            else:
                with pytest.raises(FarshoreError) as caught:
                    verify_point(store, "vm", point.id)
                assert caught.value.code is Code.REPLICA_DAMAGED
            path.write_bytes(whole)


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
    run_cycle(world.source, world.store.acquire("vm", "next"), machine="vm", want=CRASH, pace=PACE)
    frozen = [s.cycle for s in world.backend.images("vm/d/2000.vhd")[0].snapshots]
    assert made[1].cycle in frozen, "what an unreadable manifest may name must not be reaped"


def test_an_entry_from_a_former_life_of_the_machine_is_no_point() -> None:
    world = Recorded()
    writer = world.store.acquire("vm", "me")
    run_cycle(world.source, writer, machine="vm", want=CRASH, pace=PACE)
    run_cycle(world.source, writer, machine="vm", want=CRASH, pace=PACE)
    name, entry = max(world.backend.objects.items())
    world.store.remove_machine("vm")
    young = BackendStore(world.backend, clock=lambda: 5000.0)
    writer = young.acquire("vm", "new life")
    only = run_cycle(world.source, writer, machine="vm", want=CRASH, pace=PACE).point
    world.backend.objects[name] = entry
    assert [point.id for point in young.points("vm")] == [only.id]


def test_a_hold_that_comes_too_late_says_so() -> None:
    world = Recorded()
    writer = world.store.acquire("vm", "me")
    first = run_cycle(world.source, writer, machine="vm", want=CRASH, pace=PACE).point
    run_cycle(world.source, writer, machine="vm", want=CRASH, pace=PACE)
    real = replica._delete_points

    def late(*args):
        with pytest.raises(FarshoreError) as caught:
            world.store.hold("vm", first.id, "run")
        assert caught.value.code in (Code.POINT_NOT_FOUND, Code.POINT_EXPIRED)
        real(*args)

    replica._delete_points = late
    try:
        assert writer.remove_points([first.cycle]) == [first.cycle]
    finally:
        replica._delete_points = real
    assert not [name for name in world.backend.objects if "/h/" in name]
