"""A leg of a group: a member that misses the barrier costs the group's point and nobody's own."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency
from farshore.domain.retention import keep_all
from farshore.replication import group_leg
from farshore.replication.barrier import Barrier
from farshore.replication.engine import JournalStore
from farshore.replication.journal.groups import GroupLog
from farshore.replication.ports import NoCommonInstant

from .group_world import GROUP, World, at, unreachable


def points(world: World) -> dict[str, int]:
    return {machine: len(world.store.points(machine)) for machine in world.sources}


# members that miss the barrier ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["prepare", "hold", "take", "resume", "finish"])
def test_a_member_that_misses_the_barrier_costs_no_machine_its_point(step: str) -> None:
    """It can be cut, but not held: all make points of their own, none of them is the group's."""
    world = World("abc")
    world.sources["b"].fail[step] = [FarshoreError(Code.SNAPSHOT_FAILED, f"b cannot {step}")]
    result = world.leg(until_s=15.0)
    assert (result.rounds, result.points, result.missed) == (2, 0, 2)
    assert result.missed_by == {"b": 2} and result.last_missed == {"b": f"b cannot {step}"}
    assert sum(f"no point of the group: b: b cannot {step}" in stage for stage in world.said) == 2
    assert points(world) == dict.fromkeys("abc", 2) and world.groups.points(GROUP) == []
    for machine in "abc":
        for point in world.store.points(machine):
            assert "group" not in world.store.manifest(machine, point.id).tags
    assert not any(world.keepers().values())
    assert not any(source.held for source in world.sources.values())


def test_an_app_consistent_point_that_was_missed_for_another_reason_is_tried_again() -> None:
    world = World()
    world.sources["b"].fail["prepare"] = [unreachable()]
    real = world.sleep

    def sleep(seconds: float) -> None:
        real(seconds)
        if world.time >= 15.0:
            world.sources["b"].fail.clear()

    world.sleep = sleep  # type: ignore[method-assign]
    assert world.leg(until_s=45.0, app_consistent_every_s=3600.0).missed >= 2
    labels = [point.consistency for point in world.groups.points(GROUP)]
    assert labels[0] is Consistency.APPLICATION and Consistency.APPLICATION not in labels[1:]


def test_a_machine_may_have_the_groups_name() -> None:
    world = World()
    world.sources = {GROUP: world.sources["a"], "b": world.sources["b"]}
    world.sources[GROUP].fail["hold"] = [FarshoreError(Code.SNAPSHOT_FAILED, "no")]
    missed = world.leg(until_s=15.0)
    assert missed.missed_by == {GROUP: 2}
    world.sources[GROUP].fail.clear()
    world.time += 10.0
    assert world.leg().points == 1 and len(world.store.points(GROUP)) == 3
    assert world.check() == 1


def test_a_source_that_cannot_be_reached_is_asked_again_and_joins_again() -> None:
    world = World("abc")
    broken = world.sources["b"].fail
    broken |= {step: [unreachable()] for step in ("prepare", "cut", "reap")}
    real = world.sleep

    def sleep(seconds: float) -> None:
        real(seconds)
        if world.time >= 25.0:
            broken.clear()

    world.sleep = sleep  # type: ignore[method-assign]
    result = world.leg(until_s=95.0)
    assert result.points > 3 and result.missed > 2 and result.points + result.missed == result.rounds
    assert result.missed_by == {"b": result.missed} and not result.last_missed
    # The others have a point of every round: their RPO is an interval.
    assert points(world)["a"] == points(world)["c"] == result.rounds == 10
    assert result.members["a"].worst_rpo_s == 10.0 and result.members["b"].errors >= 2
    assert world.check() == result.points
    assert result.worst_rpo_s == 10.0  # of the group, once it had a point


def test_the_time_that_the_group_was_without_a_point_is_told() -> None:
    world = World()
    world.leg()
    world.time = 10.0
    world.sources["a"].fail["hold"] = [FarshoreError(Code.SNAPSHOT_FAILED, "no")] * 2
    world.sources["a"].during["hold"] = lambda: world.sources["a"].fail.clear() if world.time > 40.0 else None
    result = world.leg(until_s=55.0)
    assert result.points >= 1 and result.worst_rpo_s >= 40.0
    assert result.members["a"].worst_rpo_s == result.members["b"].worst_rpo_s == 10.0


def slowly(world: World, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """b's first copy lasts until the others have made four points; a second passes at each look of the leg. Returns what
    the leg asks whether to stop."""
    reading, others = threading.Event(), threading.Event()

    def before(operation: str, name: str) -> None:
        if operation == "create" and name.startswith("b/s/") and not reading.is_set():
            reading.set()
            assert others.wait(60)

    def passing() -> bool:
        if threading.current_thread() is threading.main_thread() and reading.is_set() and not others.is_set():
            world.time += 1.0
            if all(len(at(world.events, f"release {machine}")) >= 4 for machine in "ac"):
                others.set()
        return False

    monkeypatch.setattr(group_leg, "_POLL", 0.02)
    world.before = before
    return passing


def test_a_member_that_still_copies_does_not_hold_up_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first copy takes hours: meanwhile the others have points of their own, and in the end all are a group point."""
    world = World("abc")
    asked = slowly(world, monkeypatch)
    result = world.leg(until_s=400.0, stop_after_first=True, should_stop=asked)
    assert result.points == 1 and result.missed >= 3 and result.missed_by["b"] == result.missed
    assert sum("b: it is still copying" in stage for stage in world.said) == result.missed
    assert world.check() == 1
    (point,) = world.groups.points(GROUP)
    for machine in "ac":
        listed = [one.id for one in world.store.points(machine)]
        # The group's is the oldest of them: what came later is the machine's own.
        assert len(listed) >= 4 and listed[0] == point.member(machine).point
    assert points(world)["b"] == 1


def test_what_is_held_for_a_barrier_under_way_outlives_a_new_epoch_of_the_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The group's log fails for a while and is opened anew, while a member still copies."""
    world = World("abc")
    asked = slowly(world, monkeypatch)
    copying = world.before
    failed: list[float] = []

    def before(operation: str, name: str) -> None:
        copying(operation, name)
        if operation == "get" and name.startswith("group%3A") and 10.0 <= world.time < 15.0:
            failed.append(world.time)
            raise FarshoreError(Code.TARGET_UNREACHABLE, "no answer for the group")

    world.before = before
    result = world.leg(until_s=400.0, stop_after_first=True, should_stop=asked, retention=keep_all(1.0))
    assert failed and result.points == 1 and result.missed_by["group:crm"] == 1
    assert len(world.store.log("group:crm").read(0.0).openings) == 2
    assert world.check() == 1 and world.kept() == world.keepers()


def test_a_member_that_failed_for_good_is_out_and_the_others_go_on() -> None:
    world = World("abc")
    world.sources["b"].fail |= {
        step: [FarshoreError(Code.SOURCE_NOT_ELIGIBLE, "a shared disk")] for step in ("prepare", "cut")
    }
    result = world.leg(until_s=35.0)
    assert (result.points, result.missed, result.missed_by) == (0, 4, {"b": 4})
    assert "failed for good: a shared disk" in result.last_missed["b"]
    assert points(world) == {"a": 4, "b": 0, "c": 4}
    assert len(at(world.events, "prepare b")) == 1  # nobody is stopped for what cannot be


def test_the_leg_ends_with_the_last_member() -> None:
    world = World()
    for source in world.sources.values():
        source.fail |= {
            step: [FarshoreError(Code.SOURCE_NOT_ELIGIBLE, "a shared disk")] for step in ("prepare", "cut")
        }
    with pytest.raises(FarshoreError, match="a shared disk"):
        world.leg(until_s=1000.0)


def test_a_machine_that_was_failed_over_alone_leaves_the_group() -> None:
    """Its epoch is somebody else's: it is out, the others are protected on."""
    world = World("abc")

    def before(operation: str, name: str) -> None:
        if world.time >= 10.0 and at(world.events, "take"):
            world.before = lambda *_: None
            world.process().acquire("b", "failover").close()

    world.before = before
    result = world.leg(until_s=35.0)
    assert result.points == 1 and result.missed == 3 and set(result.missed_by) == {"b"}
    assert points(world) == {"a": 4, "b": 1, "c": 4} and world.check() == 1
    assert [opening.owner for opening in world.store.log("b").read(0.0).openings][-1] == "failover"


def test_members_are_not_stopped_again_and_again_for_nothing() -> None:
    world = World()
    world.sources["a"].fail["take"] = [FarshoreError(Code.SNAPSHOT_FAILED, "no")]
    result = world.leg(until_s=395.0)
    assert result.rounds == result.missed == 40 and points(world) == {"a": 40, "b": 40}
    # 1, 2, 4 … 60 s apart.
    assert 8 <= len(at(world.events, "hold b")) <= 14
    assert result.missed_by["a"] + result.missed_by["group:crm"] == 40


# what is refused ------------------------------------------------------------------------------------------------------


def test_a_source_that_cannot_be_held_is_refused_before_anything_is_opened() -> None:
    world = World("abc")
    world.sources["c"].cannot_hold = "it takes snapshots of single machines"
    with pytest.raises(NoCommonInstant, match="c: it takes snapshots"):
        world.leg()
    assert not world.backend.objects and not world.events


def test_a_group_has_members() -> None:
    world = World()
    world.sources = {}
    with pytest.raises(ValueError, match="has members"):
        world.leg()


# whose turn it is -----------------------------------------------------------------------------------------------------


def test_another_leg_of_the_group_ends_this_one() -> None:
    world = World()

    def before(operation: str, name: str) -> None:
        if world.time >= 10.0:
            world.before = lambda *_: None
            GroupLog.open(world.process(), GROUP, "another run").close()

    world.before = before
    with pytest.raises(FarshoreError) as fenced:
        world.leg(until_s=100.0)
    assert fenced.value.code is Code.REPLICA_FENCED
    assert world.check() == 1 and world.time <= 20.0


def test_a_leg_whose_log_failed_does_not_take_the_group_from_its_successor() -> None:
    """It has to open the log anew, and may not if somebody else did meanwhile."""
    world = World()
    came: list[str] = []

    def before(operation: str, name: str) -> None:
        if operation == "get" and name.startswith("group%3A") and world.time >= 10.0 and not came:
            came.append("another run")
            GroupLog.open(JournalStore(world.backend), GROUP, "another run").close()
            raise FarshoreError(Code.TARGET_UNREACHABLE, "no answer")

    world.before = before
    with pytest.raises(FarshoreError) as fenced:
        world.leg(until_s=100.0)
    assert came and fenced.value.code is Code.REPLICA_FENCED
    owners = [opening.owner for opening in world.store.log("group:crm").read(0.0).openings]
    assert owners[-1] == "another run" and world.check() == 1


def test_a_leg_that_wakes_late_does_not_take_the_group_from_its_successor() -> None:
    world = World()
    asked = world.wall()
    world.time = 5.0
    GroupLog.open(world.store, GROUP, "another run").close()
    world.time = 10.0
    with pytest.raises(FarshoreError) as fenced:
        world.leg(asked_at=asked)
    assert fenced.value.code is Code.REPLICA_FENCED and world.groups.points(GROUP) == []


def test_the_next_leg_goes_on_where_the_last_one_ended() -> None:
    world = World()
    first = world.leg(until_s=15.0)
    world.time += 10.0
    world.store = world.process()
    second = world.leg(until_s=15.0)
    assert second.newest is not None and first.newest is not None
    assert second.newest.epoch > first.newest.epoch and second.newest.number > first.newest.number
    assert world.check() == 4 and second.worst_rpo_s >= 10.0
    assert [leg.full_copies for leg in second.members.values()] == [0, 0]


def test_a_store_that_fails_for_the_group_only_costs_group_points_only() -> None:
    world = World()

    def before(operation: str, name: str) -> None:
        if name.startswith("group%3A") and world.time < 15.0:
            raise FarshoreError(Code.TARGET_UNREACHABLE, "no answer for the group")

    world.before = before
    result = world.leg(until_s=35.0)
    assert (result.points, result.missed, result.missed_by) == (2, 2, {"group:crm": 2})
    assert points(world) == {"a": 4, "b": 4} and world.check() == 2


# what is wanted -------------------------------------------------------------------------------------------------------


def test_app_consistent_points_are_tried_in_their_interval() -> None:
    world = World()
    world.leg(until_s=45.0, app_consistent_every_s=20.0)
    labels = [point.consistency for point in world.groups.points(GROUP)]
    app, crash = Consistency.APPLICATION, Consistency.CRASH
    assert labels == [app, crash, app, crash, app]


def test_the_groups_label_is_the_weakest_and_the_members_are_their_own() -> None:
    world = World()
    world.sources["b"].label = Consistency.CRASH
    world.leg(app_consistent_every_s=20.0)
    (point,) = world.groups.points(GROUP)
    assert point.consistency is Consistency.CRASH
    assert [member.consistency for member in point.members] == [Consistency.APPLICATION, Consistency.CRASH]
    assert world.store.points("a")[0].consistency is Consistency.APPLICATION


def test_guests_that_cannot_be_quiesced_cost_no_crash_consistent_point() -> None:
    world = World()
    b = world.sources["b"]
    real = b.prepare

    def prepare(name: str, *, want: Consistency):
        if want is Consistency.APPLICATION:
            raise FarshoreError(Code.SNAPSHOT_FAILED, "the guest cannot be quiesced")
        return real(name, want=want)

    b.prepare = prepare  # type: ignore[method-assign]
    result = world.leg(app_consistent_every_s=20.0)
    assert (result.points, result.missed) == (1, 0) and world.check() == 1
    assert any("no app-consistent point" in stage for stage in world.said)


def test_a_final_point_of_the_group_is_one_of_machines_that_are_off() -> None:
    world = World("abc")
    result = world.leg(final=True, stop_after_first=True, until_s=60.0)
    assert result.stopped_because == "first point" and result.newest is not None and result.newest.final
    assert world.check() == 1 and all(leg.bases for leg in result.members.values())
    world.sources["b"].powered_off = False
    world.time += 10.0
    with_one_on = world.leg(final=True, stop_after_first=True, until_s=25.0)
    assert with_one_on.points == 0 and "was not off" in str(with_one_on.last_missed["b"])


# stopping -------------------------------------------------------------------------------------------------------------


def test_a_leg_stops_when_asked_and_leaves_nothing_held() -> None:
    world = World("abc")
    looks = iter(range(10**6))
    result = world.leg(until_s=1000.0, should_stop=lambda: next(looks) > 40)
    assert result.stopped_because == "asked"
    assert world.kept() == world.keepers() and world.check() == result.points
    assert not any(source.held or source.cuts for source in world.sources.values())


def test_whoever_hears_of_progress_may_end_the_leg() -> None:
    world = World("abc")

    class Enough(Exception):
        pass

    class Said(list):
        def append(self, stage: str) -> None:
            super().append(stage)
            if stage == "b: committing":
                raise Enough

    world.said = Said()
    with pytest.raises(Enough):
        world.leg(until_s=1000.0)
    assert not any(source.held or source.cuts for source in world.sources.values())
    assert world.groups.points(GROUP) == [] and not any(world.keepers().values())


def test_a_leg_tells_names_and_the_newest_point() -> None:
    world = World()
    world.leg(until_s=15.0)
    assert any(stage.startswith("a: copying") or stage == "a: committing" for stage in world.said)
    assert world.said.count("group:crm: point of 2 machines committed") == 2


def test_a_defect_in_the_barrier_is_not_waited_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(Barrier, "take", broken)
    world = World()
    with pytest.raises(RuntimeError, match="a defect"):
        world.leg(until_s=1000.0)
    assert not any(source.held for source in world.sources.values())
