"""Whose turn it is, what must not stop a take-over, and what a jumping clock must not cost."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency
from farshore.domain.retention import keep_all
from farshore.replication.engine import JournalStore, Options, Pace, Writer, run_cycle
from farshore.replication.filestore import FileReplicaStore
from farshore.replication.journal.log import holder_hash
from farshore.replication.loop import LegPlan, LegResult, run_leg
from farshore.replication.ports import LEAF, Progress
from farshore.replication.verify import verify_point

from .fakes import START, MemoryBackend, ModelSource, Through, pattern

PACE = Pace(workers=1, piece=2 * LEAF, poll=0.02)
HOW = Options(workers=0, grace=0.0)
CRASH = Consistency.CRASH
ASKED = datetime.fromtimestamp(1000.0, UTC)
ATTEMPT, OTHER_ATTEMPT = "wf run#0123456789ab", "wf run#ba9876543210"


class World:
    """A machine, a store in memory whose clock is set by hand, and operations that can be made to fail."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.backend = MemoryBackend()
        self.before: Callable[[str, tuple], None] = lambda name, args: None
        self.store = JournalStore(Through(self.backend, self._pass), clock=lambda: self.now, options=HOW)
        self.source = ModelSource()
        self.source.add("2000", 8)
        self.source.write("2000", 1, pattern(1))

    def _pass(self, name: str, args: tuple) -> bool:
        self.before(name, args)
        return False

    def fail(self, *what: str) -> None:
        def before(name: str, args: tuple) -> None:
            if any(f"{name} {args[0] if args else ''}".startswith(text) for text in what):
                raise FarshoreError(Code.TARGET_UNREACHABLE, f"no answer to {name}")

        self.before = before

    def heal(self) -> None:
        self.before = lambda name, args: None

    def cycle(self, writer: Writer):
        return run_cycle(self.source, writer, machine="vm", want=CRASH, pace=PACE)

    def opened(self, at: float, owner: str) -> Writer:
        self.now = at
        return self.store.acquire("vm", owner)

    def owners(self) -> list[str]:
        return [opening.owner.partition("#")[0] for opening in self.store.log("vm").read(self.now).openings]

    def leg(self, sleep: Callable[[float], None] = lambda _: None, **options) -> LegResult:
        plan = LegPlan("vm", "wf run", 1.0, **{"stop_after_first": True, "pace": PACE, **options})
        return run_leg(self.source, self.store, plan, sleep=sleep)


@pytest.fixture
def world() -> World:
    return World()


def refused(call: Callable[[], object], text: str = "") -> None:
    with pytest.raises(FarshoreError) as caught:
        call()
    assert caught.value.code is Code.REPLICA_FENCED and not caught.value.retryable
    assert text in str(caught.value)


# late legs ------------------------------------------------------------------------------------------------------------


def test_a_leg_that_wakes_after_a_promotion_does_not_take_the_epoch(world: World) -> None:
    world.opened(1001.0, "failover")
    world.now = 1002.0
    refused(lambda: world.leg(asked_at=ASKED), "a newer owner came after this leg was asked for")
    assert world.owners() == ["failover"] and not world.store.points("vm")


def test_a_leg_that_was_asked_for_after_the_last_opening_starts(world: World) -> None:
    world.opened(999.0, "failover")
    world.opened(1000.0, "another")
    world.now = 1002.0
    assert world.leg(asked_at=ASKED).points == 1


def test_a_file_store_refuses_a_late_leg_as_well(tmp_path: Path) -> None:
    store = FileReplicaStore(tmp_path, durable=False, clock=lambda: 1001.0)
    store.acquire("vm", "failover")
    refused(lambda: store.acquire("vm", ATTEMPT, asked_at=ASKED))
    assert store.acquire("vm", ATTEMPT).epoch > 1001


def test_another_attempt_of_the_same_activity_is_no_newer_owner(world: World) -> None:
    """It may have opened the epoch anew, in its error pause, after we were scheduled."""
    world.opened(1001.0, OTHER_ATTEMPT)
    assert world.store.acquire("vm", ATTEMPT, asked_at=ASKED).epoch > 1001


@pytest.mark.parametrize("owner", ["wf run", "wf ru#0123456789ab", "wf run#step", "commit of p-1"])
def test_everything_that_is_no_attempt_of_the_same_activity_is(world: World, owner: str) -> None:
    """Also a step of the same run that fences under the run's name."""
    world.opened(1001.0, owner)
    refused(lambda: world.store.acquire("vm", ATTEMPT, asked_at=ASKED), owner)


def test_a_fence_counts_although_an_attempt_came_after_it(world: World) -> None:
    world.opened(1001.0, "failover")
    world.opened(1002.0, OTHER_ATTEMPT)
    refused(lambda: world.store.acquire("vm", ATTEMPT, asked_at=ASKED), "failover")


def test_whoever_passes_no_time_always_gets_the_epoch(world: World) -> None:
    world.opened(1001.0, ATTEMPT)
    assert world.store.acquire("vm", "failover").epoch > 1001


def test_an_owner_goes_on_with_its_own_epoch_whenever_it_was_asked_for(world: World) -> None:
    first = world.opened(1001.0, "failover")
    second = world.store.acquire("vm", "later", succeeding=first.epoch, asked_at=ASKED)
    assert world.store.acquire("vm", "later", asked_at=ASKED).epoch > second.epoch


def test_who_opens_between_the_look_and_the_opening_is_seen(world: World) -> None:
    world.opened(999.0, "former")
    world.now = 1001.0
    rival = JournalStore(world.backend, clock=lambda: 1001.0)

    def before(name: str, args: tuple) -> None:
        if name == "create":
            world.heal()
            rival.acquire("vm", "failover")

    world.before = before
    refused(lambda: world.store.acquire("vm", ATTEMPT, asked_at=ASKED), "failover")
    assert world.owners() == ["former", "failover"]


@pytest.mark.parametrize("half", ["create vm/m/", "images", "raise_fence vm/d/2000"])
def test_a_leg_whose_first_opening_failed_halfway_does_not_fence_its_successor(
    world: World, half: str
) -> None:
    former = world.opened(900.0, "former")
    world.cycle(former)
    former.advance()
    world.now = 1001.0
    world.fail(half)

    def sleep(_: float) -> None:
        world.heal()
        if "failover" not in world.owners():
            world.opened(1002.0, "failover")

    refused(lambda: world.leg(sleep, asked_at=ASKED), "failover")
    assert world.owners()[-1] == "failover"


@pytest.mark.parametrize("half", ["create vm/m/", "images", "raise_fence vm/d/2000"])
def test_a_leg_whose_first_opening_failed_halfway_tries_again(world: World, half: str) -> None:
    former = world.opened(900.0, "former")
    world.cycle(former)
    former.advance()
    world.now = 1001.0
    world.fail(half)
    result = world.leg(lambda _: world.heal(), asked_at=ASKED)
    assert (result.points, result.errors) == (1, 1)


def test_a_removed_machine_is_not_reborn_by_a_leg_that_waits(world: World) -> None:
    world.source.fail_cuts = [FarshoreError(Code.SOURCE_UNREACHABLE, "no route")]
    refused(lambda: world.leg(lambda _: world.store.remove_machine("vm")), "removed")
    assert not world.backend.objects and not world.backend.store


# taking over although reaping fails -----------------------------------------------------------------------------------


def litter(world: World) -> None:
    """An interrupted removal, a frozen state that nothing names, segments of a dead cycle, and the images of a disk that
    left."""
    world.source.add("2001", 4)
    world.source.write("2001", 2, pattern(7))
    writer = world.opened(900.0, "former")
    gone = world.cycle(writer).point
    writer.freeze()
    world.source.write("2000", 2, pattern(3))
    old = world.cycle(writer).point
    del world.source.machine["2001"]
    world.source.write("2000", 3, pattern(4))
    world.cycle(writer)
    writer.cool()
    world.source.write("2000", 4, pattern(5))
    world.fail("create vm/m/")
    with pytest.raises(FarshoreError):
        world.cycle(writer)
    looked = []

    def before(name: str, args: tuple) -> None:
        looked.extend([name] if name == "put" else [])
        if len(looked) == 2:
            raise FarshoreError(Code.TARGET_UNREACHABLE, "no answer")

    world.before = before
    with pytest.raises(FarshoreError):
        writer.remove_any([gone.cycle, old.cycle])
    world.heal()
    assert any("/x/" in name for name in world.backend.objects)
    assert any(name.startswith("vm/s/") and "/0000000006-" in name for name in world.backend.objects)


REAPING = ["delete vm/", "drop", "delete_image", "put vm/x/"]


@pytest.mark.parametrize("what", [[one] for one in REAPING] + [REAPING])
def test_reaping_that_fails_does_not_fail_a_take_over(world: World, what: list[str]) -> None:
    litter(world)
    world.fail(*what)
    writer = world.opened(1001.0, "failover")
    assert {image.fence for image in world.backend.images("vm/")} == {writer.epoch}
    assert writer.head() is not None
    world.heal()
    last = world.opened(1002.0, "last")
    verify_point(world.store, "vm", world.cycle(last).point.id)
    last.freeze()
    last.remove_points([point.cycle for point in last.points()])
    for _ in range(3):
        world.now += 10.0
        last.sweep(thorough=True)
    view = last.view()
    named = {t for b in view.bases for d in b.disks for t in (d.snapshot, d.table)}
    kept = {f"{image.name}@{s.id}" for image in world.backend.images("vm/") for s in image.snapshots}
    assert kept == named and not view.dooms and len(view.points) == 1
    assert not any("2001" in image.name for image in world.backend.images("vm/"))
    listed = {row.name for m, _ in view.manifests.values() for d in m.disks for row in last.journal.refs(d)}
    assert {n.removeprefix("vm/") for n in world.backend.objects if n.startswith("vm/s/")} == listed


def test_a_fence_that_cannot_be_raised_fails_the_take_over(world: World) -> None:
    litter(world)
    world.fail("raise_fence vm/d/2001")
    with pytest.raises(FarshoreError, match="raise_fence"):
        world.opened(1001.0, "failover")


@pytest.mark.parametrize("first", [".leaves", ".vhd"])
def test_a_disk_whose_images_were_half_deleted_starts_from_nothing(world: World, first: str) -> None:
    """One image without the other would make the engine believe what is not so."""
    litter(world)
    (half,) = [
        image.name
        for image in world.backend.images("vm/")
        if "2001" in image.name and image.name.endswith(first)
    ]
    world.backend.delete_image(half, 10**10)
    writer = world.opened(1001.0, "next")
    world.source.add("2001", 4)
    world.source.write("2001", 1, pattern(9))
    back = world.cycle(writer)
    writer.freeze()
    truth = bytes(world.source.machine["2001"].content)
    assert world.store.read_point("vm", back.point.id, "2001").read(0, 4 * LEAF) == truth
    verify_point(world.store, "vm", back.point.id)


# holds ----------------------------------------------------------------------------------------------------------------


def test_a_hold_whose_maker_died_before_it_looked_is_checked_when_it_is_asked_for_again(world: World) -> None:
    writer = world.opened(1000.0, "me")
    first = world.cycle(writer).point
    world.cycle(writer)
    log = JournalStore(world.backend).log("vm")
    seen = log.manifest(first.id, log.read(world.now))
    log.manifest = lambda *_: seen  # the run chose before the doom was written
    puts = iter([False, True])

    def before(operation: str, args: tuple) -> None:
        if operation == "put" and "/x/" in args[0] and next(puts):  # the remover has looked, and saw no hold
            world.heal()
            world.backend.put(f"vm/h/{holder_hash('run')}-{first.cycle:010d}", b"{}")  # here its maker died
            with pytest.raises(FarshoreError) as caught:
                log.hold(first.id, "run", world.now)
            assert caught.value.code is Code.POINT_EXPIRED

    world.before = before
    assert writer.remove_points([first.cycle]) == [first.cycle]
    assert not any("/h/" in name for name in world.backend.objects)


def test_a_hold_that_stands_can_be_asked_for_again(world: World) -> None:
    writer = world.opened(1000.0, "me")
    first = world.cycle(writer).point
    world.cycle(writer)
    world.store.hold("vm", first.id, "run")
    world.store.hold("vm", first.id, "run")
    assert writer.remove_points([first.cycle]) == []


# a clock that jumps ---------------------------------------------------------------------------------------------------


class Wall:
    """The wall clock of the leg follows the source's cuts, plus an error; time itself passes in sleeps and cuts."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.error = 0.0
        self.time = 0.0
        self.slow = 0.0
        world.source.tick = self.tick

    def tick(self) -> datetime:
        at = START + timedelta(seconds=self.time)
        self.time += self.slow
        return at

    def now(self) -> datetime:
        return START + timedelta(seconds=self.time + self.error)

    def sleep(self, seconds: float) -> None:
        self.time += seconds

    def leg(self, points: int, **options) -> tuple[LegResult, list[str]]:
        said: list[str] = []
        made = len(self.world.store.points("vm"))

        def heard(progress: Progress) -> None:
            said.append(progress.stage)

        plan = LegPlan("vm", "wf run", 60.0, **{"until_s": 60.0 * points, "pace": PACE, **options})
        result = run_leg(
            self.world.source,
            self.world.store,
            plan,
            progress=heard,
            clock=self.now,
            monotonic=lambda: self.time,
            sleep=self.sleep,
        )
        assert result.points and made <= len(self.world.store.points("vm")) + result.pruned
        return result, said


def test_a_clock_that_jumps_forward_prunes_nothing(world: World) -> None:
    wall = Wall(world)
    wall.leg(8, retention=keep_all(7200.0))
    wall.error = 400 * 86400.0
    result, said = wall.leg(3, retention=keep_all(7200.0))
    assert result.pruned == 0 and len(world.store.points("vm")) == 11
    assert any("old points stay" in stage for stage in said)


def test_a_cycle_that_takes_long_is_no_jump(world: World) -> None:
    wall = Wall(world)
    wall.slow = 3 * 3600.0
    result, _ = wall.leg(1000, retention=keep_all(1.0))
    assert result.points > 2 and result.pruned == result.points - 1


def test_one_pruning_of_a_leg_takes_at_most_half(world: World) -> None:
    wall = Wall(world)
    wall.leg(9, retention=keep_all(7200.0))
    wall.time += 86400.0  # an honest day without replication
    result, _ = wall.leg(1, retention=keep_all(7200.0))
    assert result.pruned == 5 and len(world.store.points("vm")) == 5
    result, _ = wall.leg(3, retention=keep_all(7200.0))
    assert len(world.store.points("vm")) == 4
