"""Damage and lies: found, named, never handed on, healed while the source lives."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency
from farshore.replication.journal import compose, damage, disks, mirror, table
from farshore.replication.journal.bandwidth import Bandwidth, Priority
from farshore.replication.journal.cycle import CycleResult, Pace, Stopped, run_cycle
from farshore.replication.journal.damage import Part
from farshore.replication.journal.store import JournalStore, Options
from farshore.replication.journal.writer import Writer
from farshore.replication.loop import LegPlan, run_leg
from farshore.replication.ports import LEAF

from .fakes import Crash, MemoryBackend, ModelSource, pattern

PACE = Pace(workers=0, piece=2 * LEAF)
CRASH = Consistency.CRASH


class World:
    """A machine with one disk of eight leaves, and a store in memory."""

    def __init__(self, leaves: int = 8, **options) -> None:
        self.now = 1000.0
        self.backend = MemoryBackend()
        self.options = Options(**{"workers": 0, "grace": 100.0, **options})
        self.source = ModelSource()
        self.source.add("2000", leaves)
        self.source.write("2000", 1, pattern(1))
        self.source.write("2000", 3, pattern(3))
        self.store = self.fresh()

    def fresh(self) -> JournalStore:
        """What another process sees."""
        return JournalStore(self.backend, clock=lambda: self.now, options=self.options)

    def open(self, owner: str = "me") -> Writer:
        self.now += 1
        return self.fresh().acquire("vm", owner)

    def cycle(self, writer: Writer, **options) -> CycleResult:
        return run_cycle(self.source, writer, machine="vm", want=CRASH, **{"pace": PACE, **options})

    def truth(self, point: str) -> bytes:
        return self.source.history[self.store.manifest("vm", point).cut]["2000"]

    def read(self, point: str) -> bytes:
        reader = self.fresh().read_point("vm", point, "2000")
        found = bytearray(reader.size)

        def sink(at: int, data: bytes | memoryview) -> None:
            found[at : at + len(data)] = data

        reader.write_out(sink)
        assert reader.read(0, reader.size) == found
        return bytes(found)

    def is_true(self, point: str) -> bool:
        """False: its damage is reported. Wrong bytes fail the test."""
        try:
            found = self.read(point)
        except FarshoreError as error:
            assert error.code is Code.REPLICA_DAMAGED, error  # noqa: PT017  wrong bytes must fail elsewhere
            return False
        assert found == self.truth(point), f"{point} was restored wrong"
        return True

    def objects(self, kind: str) -> list[str]:
        return sorted(name for name in self.backend.objects if name.startswith(f"vm/{kind}/"))

    def flip(self, name: str, at: int = -1) -> None:
        data = bytearray(self.backend.get(name) or b"")
        data[at] ^= 1
        self.backend.put(name, bytes(data))

    def flip_image(self, ending: str, at: int, snapshot: bool = False) -> str:
        name = next(name for name in self.backend.store if name.endswith(ending))
        image = self.backend.store[name]
        if snapshot:
            key, (what, data) = list(image.snapshots.items())[-1]
            torn = bytearray(data)
            torn[at] ^= 1
            image.snapshots[key] = (what, bytes(torn))
        else:
            image.now[at] ^= 1
            image.durable[at] ^= 1
        return name


@pytest.fixture
def world() -> World:
    return World()


# the journal ----------------------------------------------------------------------------------------------------------


def test_a_damaged_segment_is_found_named_and_healed_while_the_source_lives(world: World) -> None:
    writer = world.open()
    first = world.cycle(writer).point
    world.source.write("2000", 2, pattern(5))
    second = world.cycle(writer).point
    bad = world.objects("s")[-1]
    world.flip(bad)
    found = writer.scrub()
    assert found.complete and [f.subject for f in found.findings] == [bad.removeprefix("vm/")]
    assert found.findings[0].areas[0].start == 2 * LEAF
    assert list(world.store.damage("vm")) == [second.id]
    with pytest.raises(FarshoreError) as caught:
        writer.advance()
    assert caught.value.code is Code.REPLICA_DAMAGED
    third = world.cycle(writer)  # the guest wrote nothing
    assert third.bytes_shipped == LEAF
    assert writer.advance() == third.point.cycle
    assert [world.is_true(p.id) for p in (first, second, third.point)] == [True, False, True]
    assert list(world.store.damage("vm")) == [second.id], "the point in between stays damaged"
    writer.freeze()
    world.now += 1000
    writer.remove_points([first.cycle, second.cycle])
    world.now += 1000
    writer.sweep()
    assert not damage.read(world.backend, "vm/") and not world.store.damage("vm")
    assert not writer.scrub().findings


def test_damage_met_by_redo_is_healed_by_the_next_cycle(world: World) -> None:
    writer = world.open()
    world.cycle(writer)
    writer.advance()
    world.source.write("2000", 2, pattern(5))
    world.cycle(writer)
    world.backend.delete(world.objects("s")[-1])
    for _ in range(2):
        with pytest.raises(FarshoreError, match="damaged"):
            writer.advance()
    healed = world.cycle(writer)
    writer.advance()
    assert healed.bytes_shipped == LEAF and world.is_true(healed.point.id)
    writer.close()
    assert world.cycle(world.open()).bytes_shipped == 0, "it is shipped once"


@pytest.mark.parametrize("part", ["index", "page", "manifest"])
@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize("reopened", [False, True])
def test_damaged_lists_are_found_and_healed(part: str, based: bool, reopened: bool, monkeypatch) -> None:
    monkeypatch.setattr("farshore.replication.journal.entries.INLINE", 0 if part == "page" else 64)
    world = World()
    writer = world.open()
    first = world.cycle(writer).point
    if based:
        writer.freeze()
    world.source.write("2000", 2, pattern(5))
    second = world.cycle(writer).point
    world.source.write("2000", 4, pattern(6))
    third = world.cycle(writer).point
    name = {"index": "s", "page": "i", "manifest": "m"}[part]
    target = f"vm/m/{second.cycle:010d}.json"
    if part != "manifest":
        target = next(n for n in world.objects(name) if f"/{second.cycle:010d}-" in n)
    world.flip(target, 40)
    assert writer.scrub().findings
    assert world.is_true(first.id)
    assert second.id in world.store.damage("vm") or part == "manifest"
    assert not world.is_true(third.id)
    if reopened:
        writer.close()
        writer = world.open()
    world.source.write("2000", 6, pattern(7))
    healed = world.cycle(writer)
    assert world.is_true(healed.point.id)
    writer.freeze()
    assert world.is_true(healed.point.id) and world.is_true(first.id) and not world.is_true(third.id)
    last = world.cycle(writer).point
    assert world.is_true(last.id)


def test_any_flipped_byte_of_any_object_is_found_or_hurts_nobody(world: World) -> None:
    writer = world.open()
    world.cycle(writer)
    writer.freeze()
    world.source.write("2000", 2, random.Random(1).randbytes(LEAF))
    world.source.write("2000", 3, bytes(LEAF))
    world.cycle(writer)
    points = [p.id for p in world.store.points("vm")]
    dice = random.Random(2)
    for name, (data, _) in list(world.backend.objects.items()):
        if "/k/" in name:
            continue  # see test_formats
        for _ in range(12):
            world.flip(name, at := dice.randrange(len(data)))
            seen = [p.id for p in world.store.points("vm")]
            for point in set(points) & set(seen):
                world.is_true(point)
            if name.startswith("vm/s/"):
                assert writer.scrub().findings, f"scrub did not find byte {at} of {name}"
            world.flip(name, at)
    assert all(world.is_true(p) for p in points)


# replica and bases ----------------------------------------------------------------------------------------------------


def test_a_damaged_replica_is_found_and_healed_by_the_next_cycle(world: World) -> None:
    writer = world.open()
    world.cycle(writer)
    writer.advance()
    world.flip_image(".vhd", 3 * LEAF + 7)
    world.flip_image(".vhd", 6 * LEAF)  # where zeros should be
    (finding,) = writer.scrub().findings
    assert finding.part is Part.REPLICA and [e.start for e in finding.areas] == [3 * LEAF, 6 * LEAF]
    healed = world.cycle(writer)
    assert (healed.bytes_shipped, healed.bytes_cleared) == (LEAF, LEAF)
    writer.freeze()
    assert not writer.scrub().findings and not damage.read(world.backend, "vm/")
    assert world.is_true(healed.point.id)


def test_a_resync_reads_the_replica_back_and_heals_it(world: World) -> None:
    writer = world.open()
    world.cycle(writer)
    writer.freeze()
    world.flip_image(".vhd", 3 * LEAF + 7)
    result = world.cycle(writer, resync=True)
    assert result.full and result.bytes_read == 8 * LEAF and result.bytes_shipped == LEAF
    writer.freeze()
    assert world.is_true(result.point.id) and not writer.scrub().findings


def test_a_damaged_base_is_found_and_another_way_is_taken(world: World) -> None:
    writer = world.open()
    first = world.cycle(writer).point
    writer.freeze()
    world.source.write("2000", 2, pattern(5))
    second = world.cycle(writer).point
    world.flip_image(".vhd", 3 * LEAF + 7, snapshot=True)
    assert not world.is_true(first.id), "found on use"
    (finding,) = writer.scrub().findings
    assert finding.part is Part.BASE
    assert world.is_true(first.id) and world.is_true(second.id), "the journal goes back to the beginning"
    assert not world.store.damage("vm")
    writer.freeze()
    world.now += 1000
    writer.sweep()
    assert world.is_true(first.id) and world.is_true(second.id)


def test_a_base_whose_other_way_is_gone_hurts_only_its_points(world: World) -> None:
    writer = world.open()
    gone = world.cycle(writer).point
    world.source.write("2000", 2, pattern(5))
    first = world.cycle(writer).point
    writer.freeze()
    world.source.write("2000", 2, pattern(6))
    second = world.cycle(writer).point
    world.now += 1000
    writer.remove_points([gone.cycle])
    world.now += 1000
    assert writer.sweep().entries == 1
    world.flip_image(".leaves", 8192 + 3 * 16, snapshot=True)
    assert {f.part for f in writer.scrub().findings} == {Part.BASE}
    assert sorted(world.store.damage("vm")) == [first.id, second.id]
    third = world.cycle(writer).point
    writer.freeze()
    assert world.is_true(third.id) and not world.is_true(first.id)
    assert list(world.store.damage("vm")) == [first.id, second.id]


@pytest.mark.parametrize("what", [".vhd", ".leaves", "both"])
@pytest.mark.parametrize("based", [False, True])
def test_a_lost_replica_is_filled_again_without_the_source(world: World, what: str, based: bool) -> None:
    writer = world.open()
    world.cycle(writer)
    writer.freeze() if based else writer.advance()
    world.source.write("2000", 2, pattern(5))
    point = world.cycle(writer).point
    writer.advance()
    for name in list(world.backend.store):
        if what == "both" or name.endswith(what):
            if based:
                image = world.backend.store[name]
                image.now[:] = image.durable[:] = bytes(len(image.now))
            else:
                del world.backend.store[name]
    writer.close()
    writer = world.open()
    if what == ".vhd" and based:
        assert writer.scrub().findings, "the header cannot know it"
        point = world.cycle(writer).point
    assert writer.freeze() is not None
    assert world.is_true(point.id) and world.cycle(writer).bytes_shipped == 0


def target_not_noted(patch: pytest.MonkeyPatch) -> None:
    """A redo that dies does not tell after which point it was."""
    real = mirror._encode_header
    patch.setattr(mirror, "_encode_header", lambda h: real(replace(h, target=0, done=0)))


@pytest.mark.parametrize("mutant", [None, target_not_noted])
def test_a_redo_that_died_on_the_way_to_a_point_that_was_given_up(mutant, monkeypatch, world: World) -> None:
    """A failover is committed to an older point: what the dead redo wrote must not stay in the replica."""
    if mutant is not None:
        mutant(monkeypatch)
    writer = world.open()
    world.cycle(writer)
    writer.advance()
    kept = world.cycle(writer).point
    world.source.write("2000", 1, pattern(9))
    world.cycle(writer)
    real = MemoryBackend.flush

    def die(self, name, fence):
        if name.endswith(".vhd"):
            raise Crash
        real(self, name, fence)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryBackend, "flush", die)
        with pytest.raises(Crash):
            writer.advance()
    for (
        name,
        image,
    ) in (
        world.backend.store.items()
    ):  # and the power failed: of the disk all was written, of its table nothing
        image.durable[:] = image.now if name.endswith(".vhd") else image.durable
        image.now[:] = image.durable
        image.unflushed.clear()
    writer.close()
    world.store.keep_only("vm", kept.id)
    world.source.write("2000", 1, pattern(1))  # the source was rolled back, too
    writer = world.open()
    last = world.cycle(writer)
    writer.freeze()
    assert last.bytes_shipped == 0
    assert world.is_true(last.point.id) is (mutant is None)


def test_scrub_goes_on_where_it_was_and_tells_coverage_and_age(world: World) -> None:
    writer = world.open()
    for leaf in range(5):
        world.source.write("2000", leaf, random.Random(leaf).randbytes(LEAF))
        world.cycle(writer)
    writer.freeze()
    world.flip(world.objects("s")[-1])
    world.flip(world.objects("s")[0])
    found, calls = [], 0
    while True:
        calls += 1
        world.now += 10
        done = world.fresh().acquire("vm", "scrub").scrub(budget=LEAF)
        found += done.findings
        if done.complete:
            break
        assert done.checked <= 10 * LEAF and done.coverage.age(world.now) is None and calls < 50
    assert calls > 5 and len(found) == 2
    assert done.coverage.rounds == 1 and done.coverage.last_found == 2
    assert (
        done.coverage.age(world.now)
        == done.coverage.last_ended - done.coverage.last_began
        >= 10 * (calls - 1)
    )


def test_scrub_respects_its_rate_and_stops_when_told(world: World) -> None:
    writer = world.open()
    world.cycle(writer)
    writer.freeze()
    taken: list[int] = []
    done = writer.scrub(take=taken.append)
    assert sum(taken) >= done.checked - 8192 * 4 > 0

    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        writer.scrub(look=stop)


def test_a_first_copy_is_not_read_back_before_a_round_of_scrub_is_due(world: World) -> None:
    def leg(age: float) -> int:
        """A leg at this age of the replica; how many rounds of scrub have ended since ever."""
        rounds = iter(range(1000))
        plan = LegPlan("vm", f"at {age}", 1.0, scrub_every_s=3600.0, pace=Pace(workers=0))
        run_leg(
            world.source,
            world.fresh(),
            plan,
            clock=lambda: datetime.fromtimestamp(1000.0 + age, UTC),
            sleep=lambda _: None,
            should_stop=lambda: next(rounds) > 60,
        )
        return world.open().coverage().rounds

    assert leg(5.0) == 0
    assert leg(3000.0) == 0
    assert leg(4000.0) == 1


# the source -----------------------------------------------------------------------------------------------------------


def test_the_audit_catches_a_tracker_that_lies(world: World) -> None:
    writer = world.open()
    world.cycle(writer)
    world.source.write("2000", 6, pattern(9))
    world.source.machine["2000"].changes.pop()  # the tracker missed it
    lied = world.cycle(writer, pace=Pace(workers=0, piece=2 * LEAF, audit=3 * LEAF))
    assert not lied.full and lied.audited[0].cursor == 3 * LEAF
    caught = [world.cycle(writer, pace=Pace(workers=0, piece=2 * LEAF, audit=3 * LEAF)) for _ in range(2)]
    assert caught[-1].full and "lies" in caught[-1].reason and caught[-1].bytes_shipped == LEAF
    assert caught[-1].audited[0].lies == 1
    assert world.read(caught[-1].point.id) == bytes(world.source.machine["2000"].content)


def test_the_audit_goes_round_and_does_not_read_twice_what_changed(world: World) -> None:
    writer = world.open()
    world.cycle(writer)
    read = 0
    for number in range(4):
        world.source.write("2000", number, pattern(number))
        result = world.cycle(writer, pace=Pace(workers=0, piece=2 * LEAF, audit=2 * LEAF))
        assert not result.full
        read += result.bytes_read
    assert result.audited[0].rounds == 1 and read <= (4 + 8) * LEAF


def test_a_leg_audits_the_whole_source_in_the_time_that_is_given(world: World) -> None:
    world.cycle(world.open())
    world.source.write("2000", 6, pattern(9))
    world.source.machine["2000"].changes.pop()  # the tracker missed it
    rounds = iter(range(1000))
    plan = LegPlan("vm", "me", 1e-3, audit_every_s=8e-3, pace=Pace(workers=0))
    done = run_leg(world.source, world.store, plan, should_stop=lambda: next(rounds) > 100)
    points = world.store.points("vm")
    assert done.full_copies == 1 and done.points > 8
    assert world.read(points[-1].id) == bytes(world.source.machine["2000"].content)


# what dead cycles leave -----------------------------------------------------------------------------------------------


def filled(world: World) -> None:
    for leaf in range(8):
        world.source.write("2000", leaf, random.Random(leaf).randbytes(LEAF))


def test_a_first_copy_that_died_goes_on_where_it_was(world: World, monkeypatch) -> None:
    monkeypatch.setattr("farshore.replication.journal.segment.SEGMENT", LEAF)
    filled(world)
    looks = iter(range(100))
    with pytest.raises(Stopped):
        world.cycle(world.open(), should_stop=lambda: next(looks) > 3)
    stored = len(world.objects("s"))
    assert 0 < stored < 4 and world.store.points("vm") == []
    world.source.write("2000", 0, pattern(9))
    writer = world.open("next")
    result = world.cycle(writer)
    assert result.bytes_shipped == (8 - 2 * stored + 1) * LEAF, "what was there was shipped again"
    assert world.is_true(result.point.id)
    writer.freeze()
    world.now += 1000
    writer.sweep(thorough=True)
    assert world.is_true(result.point.id)
    last = world.cycle(writer).point
    writer.remove_points([result.point.cycle])
    world.now += 1000
    writer.freeze()
    world.now += 1000
    writer.sweep(thorough=True)
    assert world.is_true(last.id) and not world.objects("s")


def test_dead_segments_are_not_adopted_when_their_end_is_near(world: World, monkeypatch) -> None:
    monkeypatch.setattr("farshore.replication.journal.segment.SEGMENT", LEAF)
    filled(world)
    looks = iter(range(100))
    with pytest.raises(Stopped):
        world.cycle(world.open(), should_stop=lambda: next(looks) > 3)
    world.open("ends the epoch").close()
    world.now += 60
    writer = world.open("late")
    result = world.cycle(writer)
    assert result.bytes_shipped == 8 * LEAF
    world.now += 50
    assert writer.sweep(thorough=True).orphans > 0
    assert world.is_true(result.point.id)


# keys and moves -------------------------------------------------------------------------------------------------------


def test_the_store_tells_nothing_about_content(world: World) -> None:
    secret = b"secret " * 10000
    world.source.write("2000", 5, secret[:LEAF])
    writer = world.open()
    world.cycle(writer, pace=Pace(workers=0, level=0))
    everything = b"".join(data for data, _ in world.backend.objects.values())
    assert b"secret secret" not in everything


def test_a_segment_under_the_name_of_another_one_is_refused(world: World) -> None:
    writer = world.open()
    first = world.cycle(writer).point
    world.source.write("2000", 1, pattern(2))
    second = world.cycle(writer).point
    one, two = world.objects("s")
    data = world.backend.get(one) or b""
    world.backend.put(two, data)
    assert world.is_true(first.id) and not world.is_true(second.id)


# bandwidth ------------------------------------------------------------------------------------------------------------


class Time:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.01  # time passes while somebody waits
        return self.now


def test_a_bucket_gives_no_more_than_rate_and_burst() -> None:
    clock = Time()
    bucket = Bandwidth(50 << 20, burst=2 << 20, monotonic=clock)
    sent = 0
    for amount in [1 << 20, 5 << 20, 100, 3 << 20]:
        bucket.take(amount)
        sent += amount
        assert sent <= clock.now * (50 << 20) + (2 << 20) + (1 << 20)
    given_up = iter([False, True, True, True])
    bucket = Bandwidth(1.0, monotonic=clock, burst=1.0)
    bucket.take(100 << 20, given_up=lambda: next(given_up, True))


def test_a_final_cycle_goes_before_a_first_copy() -> None:
    import threading

    bucket = Bandwidth(8 << 20, burst=1)
    order: list[str] = []
    bucket.take(1 << 20)  # into debt: everybody waits now
    waiting = threading.Event()

    def work(name: str, priority: Priority) -> None:
        bucket.take(2 << 20, priority, lambda: bool(waiting.set()))
        order.append(name)

    first = threading.Thread(target=work, args=("initial", Priority.INITIAL))
    first.start()
    assert waiting.wait(20)
    final = threading.Thread(target=work, args=("final", Priority.FINAL))
    final.start()
    for thread in (first, final):
        thread.join(20)
    assert order == ["final", "initial"]


# caches ---------------------------------------------------------------------------------------------------------------


def test_a_leaf_table_is_kept_between_owners_and_never_believed_unproved(tmp_path: Path) -> None:
    world = World(cache=tmp_path)
    writer = world.open()
    world.cycle(writer)
    writer.close()
    reads = counted(world, "part")
    world.source.write("2000", 2, pattern(5))
    writer = world.open()
    assert world.cycle(writer).bytes_shipped == LEAF and not [n for n in reads if "/s/" in n]
    writer.close()
    (cache,) = tmp_path.glob("*.leaves")
    data = bytearray(cache.read_bytes())
    data[0:32] = data[16:48]
    cache.write_bytes(data)
    writer = world.open()
    world.source.write("2000", 0, pattern(1))
    result = world.cycle(writer)
    assert world.is_true(result.point.id) and result.bytes_shipped == LEAF
    # Another owner in the same folder at the same time has a file of its own.
    other = world.open("other")
    world.source.write("2000", 0, pattern(2))
    assert world.is_true(world.cycle(other).point.id)
    with pytest.raises(FarshoreError, match="took over"):
        world.cycle(writer)
    for one in (writer, other):
        one.close()
    assert len(list(tmp_path.glob("*.leaves"))) == 1


def test_tables_that_nobody_uses_go_and_a_folder_that_cannot_be_used_costs_only_time(tmp_path: Path) -> None:
    for name, age in (("old.leaves", 40), ("used.leaves", 40), ("young.leaves", 20)):
        (tmp_path / name).write_bytes(b"x")
        then = time.time() - age * 86400
        os.utime(tmp_path / name, (then, then))
    held = disks._lock(tmp_path / "used.leaves")
    assert held is not None
    world = World(cache=tmp_path)
    writer = world.open()
    world.cycle(writer)
    writer.close()
    os.close(held)
    left = {path.name for path in tmp_path.glob("*.leaves")}
    assert "old.leaves" not in left and {"used.leaves", "young.leaves"} < left
    (tmp_path / "file").write_bytes(b"")
    world = World(cache=tmp_path / "file" / "below")
    writer = world.open()
    assert world.is_true(world.cycle(writer).point.id)
    writer.close()


def counted(world: World, method: str) -> list[str]:
    calls: list[str] = []
    real: Callable[..., bytes | None] = getattr(world.backend, method)

    def call(name: str, *args):
        calls.append(name)
        return real(name, *args)

    setattr(world.backend, method, call)
    return calls


def test_regions_beyond_the_first_are_composed_alike(monkeypatch) -> None:
    """A disk of several regions, written all over, with threads."""
    monkeypatch.setattr(compose, "REGION", 4 * LEAF)
    monkeypatch.setattr(table, "PAGE", 3)
    monkeypatch.setattr(table, "_PAGE_BYTES", 48)
    world = World(leaves=21, workers=2)
    writer = world.open()
    dice = random.Random(4)
    for _ in range(6):
        for _ in range(6):
            world.source.write(
                "2000", dice.randrange(21), dice.choice([bytes(LEAF), dice.randbytes(LEAF), pattern(3)])
            )
        point = world.cycle(writer, pace=Pace(workers=2, piece=2 * LEAF)).point
        if dice.random() < 0.5:
            writer.freeze()
        assert world.is_true(point.id)
    assert all(world.is_true(p.id) for p in world.store.points("vm"))
