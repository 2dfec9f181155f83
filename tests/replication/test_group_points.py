"""Group points: made last or not at all, kept and given up as a whole, usable if all of their members are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.retention import keep_all
from farshore.replication import group_leg
from farshore.replication.journal import groups, prune
from farshore.replication.journal import writer as writers
from farshore.replication.journal.groups import GroupLog
from farshore.replication.journal.log import Doom, Hold
from farshore.replication.loop import LegPlan, run_leg
from farshore.replication.verify import verify_point

from .group_world import GROUP, PACE, Crash, World, at


def test_points_of_a_group_are_whole_and_of_one_instant() -> None:
    world = World("abc")
    result = world.leg(until_s=35.0)
    assert (result.rounds, result.points, result.missed) == (4, 4, 0) and not result.last_missed
    assert world.check() == 4
    points = world.groups.points(GROUP)
    assert result.newest == points[-1] == world.groups.newest(GROUP) == result.newest_usable
    assert [point.number for point in points] == sorted(point.number for point in points)
    assert len({point.barrier for point in points}) == 4
    assert world.kept() == world.keepers()
    assert {name: leg.points for name, leg in result.members.items()} == dict.fromkeys("abc", 4)
    # The log is a chain: each entry names the digest of the one before.
    view = world.store.log("group:crm").read(0.0)
    entries = [view.entries[number] for number in sorted(view.entries)]
    assert all(entry.parent == before[1] for before, (entry, _) in pairwise(entries))
    for point in points:
        for member in point.members:
            verify_point(world.store, member.machine, member.point)


# all or nothing -------------------------------------------------------------------------------------------------------


def check_order(world: World) -> None:
    """A group's manifest comes after its members' ones, and after the holds on their points."""
    world.events.clear()
    world.leg()
    (made,) = [i for i in at(world.events, "create group%3Acrm/m/") if i > min(at(world.events, "take"))]
    for machine in world.sources:
        committed = at(world.events, f"create {machine}/m/")
        assert len(committed) == 2 and committed[-1] < made, machine  # the opening, and the point
        (kept,) = at(world.events, f"put {machine}/h/")
        assert committed[-1] < kept < made
    assert world.check() == 1


def test_the_group_manifest_comes_last() -> None:
    check_order(World("abc"))


def before_a_commit(patch: pytest.MonkeyPatch) -> None:
    """A mutant: a member's manifest is under way while the group's is made."""
    real, waiting = writers.Writer._append, []

    def append(self, entry):
        if self.machine == "b" and hasattr(entry, "disks") and entry.number > 1:
            waiting.append((self, entry))
            self._parent, self._next = writers.digest_of(entry), entry.number + 1
            return self._parent
        digest = real(self, entry)
        if self.machine == "group:crm" and entry.number > 1:
            for late, kept in waiting:
                late.log.create(kept)
        return digest

    patch.setattr(writers.Writer, "_append", append)


def silent_partial(patch: pytest.MonkeyPatch) -> None:
    """A mutant: the group point is made of those who are there."""
    real = group_leg._GroupLeg._finish

    def finish(self, pending) -> None:
        if pending.results:
            pending.reasons.clear()
            for machine in set(pending.cut.cuts) - set(pending.results):
                del pending.cut.cuts[machine]
        real(self, pending)

    patch.setattr(group_leg._GroupLeg, "_finish", finish)


def check_failure(world: World) -> None:
    """A member that fails while it is copied costs the group point and no other."""
    fail_copy(world, "b")
    result = world.leg()
    assert (result.points, result.missed, result.missed_by) == (0, 1, {"b": 1})
    assert world.check() == 0


@pytest.mark.parametrize(
    ("mutant", "check"), [(before_a_commit, check_order), (silent_partial, check_failure)]
)
def test_a_point_that_is_not_whole_is_noticed(mutant, check, monkeypatch: pytest.MonkeyPatch) -> None:
    check(World("abc"))
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        check(World("abc"))


def test_a_point_without_a_member_is_refused_where_it_is_made() -> None:
    world = World("abc")
    world.leg()
    log = GroupLog.open(world.store, GROUP, "me")
    (point,) = log.points()
    results = {}
    for member in point.members:
        manifest = world.store.manifest(member.machine, member.point)
        results[member.machine] = type("Result", (), {"manifest": manifest, "point": None})
    cut = type("Cut", (), {"barrier": point.barrier, "cuts": dict.fromkeys("abc")})
    for wrong in ({k: results[k] for k in "ab"}, {}, {**results, "d": results["a"]}):
        with pytest.raises(FarshoreError, match="without") as refused:
            log.commit(cut, wrong, world.wall)  # type: ignore[arg-type]
        assert refused.value.code is Code.INTERNAL
    cut.barrier = "another"
    with pytest.raises(FarshoreError, match="without a, b, c"):
        log.commit(cut, results, world.wall)  # type: ignore[arg-type]


def fail_copy(world: World, machine: str) -> None:
    def before(operation: str, name: str) -> None:
        if operation == "create" and name.startswith(f"{machine}/s/"):
            raise FarshoreError(Code.TARGET_UNREACHABLE, f"no room for {machine}")

    world.before = before


def fail_commit(world: World, machine: str) -> None:
    def before(operation: str, name: str) -> None:
        if operation == "create" and name.startswith(f"{machine}/m/") and at(world.events, "take"):
            raise FarshoreError(Code.TARGET_UNREACHABLE, f"no answer for {machine}")

    world.before = before


def fail_keep(world: World, machine: str) -> None:
    def before(operation: str, name: str) -> None:
        if operation == "put" and name.startswith(f"{machine}/h/"):
            raise FarshoreError(Code.TARGET_UNREACHABLE, f"no hold for {machine}")

    world.before = before


@pytest.mark.parametrize("fail", [fail_copy, fail_commit, fail_keep])
def test_a_member_that_fails_after_the_barrier_leaves_points_of_machines_only(fail) -> None:
    world = World("abc")
    world.leg()
    world.events.clear()
    fail(world, "b")
    world.time += 10.0
    result = world.leg()
    assert (result.points, result.missed, set(result.last_missed)) == (0, 1, {"b"})
    assert any("no point of the group: b: " in stage for stage in world.said)
    assert world.check() == 1 and world.kept() == world.keepers()  # nobody holds what is no part
    assert len(world.store.points("a")) == len(world.store.points("c")) == 2
    world.restart()
    assert world.leg().points == 1
    assert world.check() == 2 and world.kept() == world.keepers()


class Deaths:
    """A second round whose process dies, and its successor."""

    def __init__(self) -> None:
        self.died = self.parts_only = self.with_strays = 0

    def die(self, arm: Callable[[World], None]) -> bool:
        """Whether it did."""
        world = World()
        world.leg()
        world.time += 10.0
        world.advance(7)
        world.store = world.process()
        arm(world)
        made = 0
        with contextlib.suppress(Crash):
            made = world.leg().points
        dead = world.fuse.dead
        world.restart()
        before = world.check()
        assert before >= 1 + made
        self.died += dead
        self.parts_only += dead and before == 1 and len(world.store.points("a")) > 1
        self.with_strays += world.kept() != world.keepers()
        # The next owner: nothing is lost, and nothing is held for the dead one.
        assert world.leg().points == 1
        assert world.check() == before + 1 and world.kept() == world.keepers()
        return dead


MOMENTS = ["create a/m/", "create b/m/", "put a/h/", "put b/h/", "create group%3Acrm/m/"]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_death_around_the_commit_leaves_a_whole_group_point_or_none(moment: str, after: bool) -> None:
    def arm(world: World) -> None:
        world.events.clear()

        def before(operation: str, name: str) -> None:
            if f"{operation} {name}".startswith(moment) and at(world.events, "take"):
                world.before = lambda *_: None
                world.fuse.arm(1, after=after)

        world.before = before

    deaths = Deaths()
    assert deaths.die(arm)
    if moment.startswith("create group"):  # both members are committed and held
        assert deaths.parts_only == deaths.with_strays == (not after)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("stride", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_a_death_at_any_step_leaves_whole_group_points_or_none(stride: int, after: bool) -> None:
    """Every operation of the store and of the sources is the last one, before or after its effect."""
    deaths, fuse = Deaths(), 1
    while deaths.die(lambda world, fuse=fuse: world.fuse.arm(fuse, after=after)):
        fuse += stride
    assert deaths.died * stride > 60
    assert stride > 1 or (deaths.parts_only > 2 and deaths.with_strays > 1), vars(deaths)


def test_an_answer_that_was_lost_makes_no_second_point() -> None:
    world = World()

    def before(operation: str, name: str) -> None:
        if operation == "create" and name.startswith("group%3Acrm/m/") and at(world.events, "take"):
            world.before = lambda *_: None
            data = waiting.pop()
            world.backend.create(name, data)
            raise FarshoreError(Code.TARGET_UNREACHABLE, "the answer was lost")

    waiting: list[bytes] = []
    real = groups.GroupLog.commit

    def commit(self, cut, results, clock):
        append = self._writer.log.create

        def create(entry) -> bool:
            waiting.append(writers.entries.encode(entry))
            return append(entry)

        self._writer.log.create = create
        return real(self, cut, results, clock)

    world.before = before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups.GroupLog, "commit", commit)
        result = world.leg()
    assert result.points == 1 and world.check() == 1


def test_a_group_point_whose_making_failed_is_missed_and_its_parts_are_let_go_by_the_next_owner() -> None:
    world = World()

    def before(operation: str, name: str) -> None:
        if operation == "create" and name.startswith("group%3Acrm/m/") and at(world.events, "take"):
            raise FarshoreError(Code.TARGET_UNREACHABLE, "no answer")

    world.before = before
    result = world.leg()
    assert (result.points, result.missed, result.missed_by) == (0, 1, {"group:crm": 1})
    assert world.check() == 0 and all(world.keepers().values())  # whether it exists is not known yet
    world.restart()
    assert world.leg().points == 1
    assert world.check() == 1 and world.kept() == world.keepers()


def test_a_former_owner_cannot_make_a_point_any_more() -> None:
    world = World()

    def successor(operation: str, name: str) -> None:
        if operation == "put" and name.startswith("b/h/"):
            world.before = lambda *_: None
            GroupLog.open(world.process(), GROUP, "a successor").close()

    world.before = successor
    with pytest.raises(FarshoreError) as fenced:
        world.leg()
    assert fenced.value.code is Code.REPLICA_FENCED
    assert world.check() == 0 and len(world.store.points("a")) == len(world.store.points("b")) == 1


# kept and given up as a whole -----------------------------------------------------------------------------------------


def only_b(world: World, **options) -> None:
    """A leg of one machine, as before a planned failover."""
    plan = LegPlan("b", "another run", 1.0, stop_after_first=True, pace=PACE, **options)
    run_leg(world.sources["b"], world.store, plan, clock=world.wall, sleep=world.sleep)


def test_no_retention_of_one_machine_takes_a_part_of_a_kept_group_point() -> None:
    world = World()
    world.leg(until_s=25.0)
    kept = world.kept()
    assert world.check() == 3
    for _ in range(4):
        world.time += 60.0
        only_b(world, retention=keep_all(1.0))
    assert world.check() == 3
    listed = {point.id for point in world.store.points("b")}
    assert kept["b"] < listed and len(listed) == 4  # the parts, and the newest of its own
    # Nor does the commit of a failover of that machine.
    world.store.keep_only("b", world.store.points("b")[-1].id)
    assert world.check() == 3 and kept["b"] <= {point.id for point in world.store.points("b")}


def not_kept(patch: pytest.MonkeyPatch) -> None:
    """A mutant."""
    patch.setattr(groups.GroupLog, "keep", lambda *_: None)


def let_go_first(patch: pytest.MonkeyPatch) -> None:
    """A mutant: holds are given back whether the group point is removed or not."""
    real = groups.GroupLog.remove

    def remove(self, points, **options):
        for point in self.points():
            self.give_back(point.barrier, "ab")
        return real(self, points, **options)

    patch.setattr(groups.GroupLog, "remove", remove)


@pytest.mark.parametrize(
    ("mutant", "check"),
    [
        (not_kept, test_no_retention_of_one_machine_takes_a_part_of_a_kept_group_point),
        (let_go_first, lambda: check_whole()),  # noqa: PLW0108  defined below
    ],
)
def test_a_part_that_is_taken_is_noticed(
    mutant, check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        check()


def test_a_group_point_is_given_up_as_a_whole() -> None:
    check_whole()


def check_whole() -> None:
    world = World()
    world.leg(until_s=45.0)
    assert world.check() == 5
    first, second = world.groups.points(GROUP)[:2]
    world.groups.hold(GROUP, second.id, "run")
    pruned = 0
    for _ in range(5):
        world.time += 60.0
        pruned += world.leg(retention=keep_all(1.0)).pruned
        assert world.kept() == world.keepers()
        world.check()
    ids = [point.id for point in world.groups.points(GROUP)]
    assert second.id in ids and first.id not in ids and len(ids) == 2 and pruned == 8
    # What was let go goes with its machine's own retention, at that one's next point; what is held stays.
    for machine in world.sources:
        listed = {point.id for point in world.store.points(machine)}
        parts = {p.member(machine).point for p in world.groups.points(GROUP)}
        assert parts < listed and len(listed) == len(parts) + 1
    world.groups.release(GROUP, "run")
    world.time += 60.0
    world.leg(retention=keep_all(1.0))
    assert second.id not in {point.id for point in world.groups.points(GROUP)}


def test_a_hold_of_a_group_point_holds_every_member() -> None:
    world = World("abc")
    world.leg(until_s=15.0)
    first, second = world.groups.points(GROUP)
    assert world.groups.hold(GROUP, first.id, "run") == first
    assert world.groups.point(GROUP, first.id).pinned and not world.groups.point(GROUP, second.id).pinned
    log = GroupLog.open(world.store, GROUP, "me")
    assert log.remove([first], any_of_them=True) == []
    log.give_back(first.barrier, "abc")  # even then
    for member in first.members:
        writer = world.store.acquire(member.machine, "me")
        assert writer.remove_any([world.store.manifest(member.machine, member.point).cycle]) == []
    world.groups.release(GROUP, "run")
    assert [point.id for point in log.remove([first], any_of_them=True)] == [first.id]
    with pytest.raises(FarshoreError) as gone:
        world.groups.hold(GROUP, first.id, "run")
    assert gone.value.code is Code.POINT_NOT_FOUND


def test_a_lease_runs_out() -> None:
    world = World()
    world.leg(until_s=15.0)
    first = world.groups.points(GROUP)[0]
    world.groups.hold(GROUP, first.id, "run", 30.0)
    assert world.groups.point(GROUP, first.id).pinned
    world.time += 60.0
    assert not world.groups.point(GROUP, first.id).pinned


def test_what_is_kept_for_a_group_keeps_no_more_of_the_journal() -> None:
    """A hold of a reader keeps older bases for it; this one is no reader's."""
    world = World()
    world.leg(until_s=60.0, base_every_s=20.0, redo_every_s=0.0)
    view = world.store.log("a").read(world.wall().timestamp())
    last = max(view.manifests)
    gone = {"x": Doom(tuple(cycle for cycle in view.manifests if cycle != last), True, 0.0)}
    assert view.held[last] and len(view.bases) > 1

    def needed(*holds: Hold) -> prune.Needs:
        held = {last: holds} if holds else {}
        return prune.needs(replace(view, held=held, dooms=gone), {}, world.wall().timestamp() + 100.0, 5.0)

    assert needed(*view.held[last]) == needed() != needed(Hold("a reader", 0.0, None))
