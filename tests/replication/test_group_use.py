"""Group points in use: chosen if all of their members are sound, and what ends a group."""

from __future__ import annotations

import pytest

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import PointChoice
from farshore.replication.groups import Groups
from farshore.replication.journal.groups import GroupLog

from .group_world import GROUP, Crash, World

# usable or not --------------------------------------------------------------------------------------------------------


def test_a_damaged_member_makes_the_group_point_unusable_and_it_says_so() -> None:
    world = World("abc")
    world.leg(until_s=25.0)
    first, second, third = world.groups.points(GROUP)
    newest = world.store.manifest("b", third.member("b").point)
    for name in [n for n in world.backend.objects if n.startswith("b/s/") and f"/{newest.cycle:010d}-" in n]:
        del world.backend.objects[name]
    writer = world.process().acquire("b", "scrubber")
    assert writer.scrub().findings
    (reason,) = world.groups.unusable(GROUP).values()
    assert reason.startswith("b: ") and third.id in world.groups.unusable(GROUP)
    assert world.groups.newest(GROUP) == third  # it is not hidden
    assert world.groups.choose(GROUP, PointChoice.LATEST) == second
    assert world.groups.choose(GROUP, first.id) == first
    with pytest.raises(FarshoreError, match=r"b: .*2 are sound") as refused:
        world.groups.choose(GROUP, third.id)
    assert refused.value.code is Code.REPLICA_DAMAGED
    assert world.leg(until_s=5.0).points == 1  # the living source heals it
    assert world.groups.choose(GROUP, "latest").number > third.number


def test_a_member_whose_replica_was_deleted_makes_all_points_unusable() -> None:
    world = World()
    world.leg(until_s=15.0)
    world.store.remove_machine("b")
    assert len(world.groups.unusable(GROUP)) == 2
    with pytest.raises(FarshoreError, match=r"b: its point .* is not there any more"):
        world.groups.choose(GROUP, "latest")
    with pytest.raises(FarshoreError) as missing:
        world.groups.hold(GROUP, world.groups.points(GROUP)[0].id, "run")
    assert missing.value.code is Code.POINT_NOT_FOUND
    result = world.leg()
    assert result.points == 1 and len(result.unusable) == 2 and result.newest_usable == result.newest


def test_a_group_without_points_and_an_unknown_id() -> None:
    world = World()
    assert world.groups.points(GROUP) == [] and world.groups.newest(GROUP) is None
    with pytest.raises(FarshoreError) as none:
        world.groups.choose(GROUP, "latest")
    assert none.value.code is Code.NO_RECOVERY_POINT
    world.leg()
    for unknown in ("g-0000000099-00000000", "p-0000000002-00000000"):
        with pytest.raises(FarshoreError) as absent:
            world.groups.point(GROUP, unknown)
        assert absent.value.code is Code.POINT_NOT_FOUND


def test_an_entry_that_was_altered_is_no_point_and_nothing_is_let_go_for_it() -> None:
    world = World()
    world.leg()
    (point,) = world.groups.points(GROUP)
    name = f"group%3Acrm/m/{point.number:010d}.json"
    data = world.backend.objects[name][0]
    world.backend.put(name, data.replace(b"crash", b"crush"))
    assert world.groups.points(GROUP) == []
    kept = world.keepers()
    world.time += 10.0
    world.leg()
    assert all(kept[name] <= held for name, held in world.keepers().items())
    world.backend.put(name, data)
    assert world.check() == 2


# the end of a group ---------------------------------------------------------------------------------------------------


def test_a_failover_of_the_group_keeps_one_point_and_fences_its_leg() -> None:
    world = World()
    world.leg(until_s=25.0)
    first, second, third = world.groups.points(GROUP)
    assert world.groups.keep_only(GROUP, second.id, "failover") == [first.id, third.id]
    for member in second.members:
        world.store.keep_only(member.machine, member.point)
    assert [point.id for point in world.groups.points(GROUP)] == [second.id] and world.check() == 1
    assert world.kept() == world.keepers()
    assert all(len(world.store.points(machine)) == 1 for machine in world.sources)


@pytest.mark.parametrize("moment", ["put group%3Acrm/x/", "delete a/h/", "delete b/h/"])
@pytest.mark.parametrize("after", [False, True])
def test_a_failover_of_the_group_that_died_is_repeated(moment: str, after: bool) -> None:
    world = World()
    world.leg(until_s=25.0)
    second = world.groups.points(GROUP)[1]

    def before(operation: str, name: str) -> None:
        if f"{operation} {name}".startswith(moment):
            world.before = lambda *_: None
            world.fuse.arm(1, after=after)

    world.before = before
    with pytest.raises(Crash):
        Groups(world.store, clock=lambda: world.wall().timestamp()).keep_only(GROUP, second.id, "failover")
    world.restart()
    world.groups.keep_only(GROUP, second.id, "failover")
    assert [point.id for point in world.groups.points(GROUP)] == [second.id] and world.check() == 1
    assert world.kept() == world.keepers()


def test_a_group_that_is_no_more_lets_its_machines_go() -> None:
    world = World()
    world.leg(until_s=15.0)
    for _ in range(2):
        world.groups.disband(GROUP, "me")
        assert not any(name.startswith("group") for name in world.backend.objects)
        assert not any(world.keepers().values())
        assert all(len(world.store.points(machine)) == 2 for machine in world.sources)


def test_two_groups_do_not_let_go_what_the_other_holds() -> None:
    """Names that begin alike."""
    world = World()
    world.leg()
    (point,) = world.groups.points(GROUP)
    for other in ("crm 2", "cr", "crm2"):
        log = GroupLog.open(world.store, other, "me")
        for machine in world.sources:
            assert log.tidy(world.store.acquire(machine, "me")) == 0
    assert world.kept() == world.keepers() == {name: {point.member(name).point} for name in "ab"}
