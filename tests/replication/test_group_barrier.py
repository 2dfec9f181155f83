"""The barrier of a group: all members are held before the first is cut, and nobody stays held."""

from __future__ import annotations

import threading
from itertools import pairwise

import pytest

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency
from farshore.providers.physical.source import PhysicalSource
from farshore.providers.vsphere.source import VSphereSource
from farshore.replication import barrier
from farshore.replication.barrier import BarrierMissed, CommonCut, Member, cut_together
from farshore.replication.ports import NoCommonInstant

from .group_world import DISK, Crash, World, at, one_instant

CRASH = Consistency.CRASH
STEPS = ["prepare", "quiesce", "hold", "take", "resume", "finish"]


def members(world: World) -> list[Member]:
    return [Member(source, f"farshore-{name}-1-1", name) for name, source in world.sources.items()]


def cut(world: World, **options) -> CommonCut:
    return cut_together(members(world), **{"want": CRASH, "deadline": 20.0, "wall": world.wall, **options})


def check_instant(world: World) -> None:
    """The story of one barrier."""
    for _ in range(3):
        world.events.clear()
        common = cut(world)
        for before, after in pairwise(STEPS):
            assert len(at(world.events, before)) == len(world.sources)
            assert max(at(world.events, before)) < min(at(world.events, after)), (before, after)
        counters = [int.from_bytes(one.read(DISK, 0, 8), "big") for one in common.cuts.values()]
        assert one_instant(counters), counters
        common.release()
        world.advance(4)


def test_all_are_held_before_the_first_is_cut_and_all_cut_before_the_first_resumes() -> None:
    check_instant(World("abc"))


def one_by_one(first: str, second: str):
    """A mutant: each member does both steps, one member after the other."""

    def mutant(patch: pytest.MonkeyPatch) -> None:
        def both(self: barrier.Barrier) -> None:
            for ready in self._ready.values():
                getattr(ready, first)()
                getattr(ready, second)()

        patch.setattr(barrier.Barrier, first, both)
        patch.setattr(barrier.Barrier, second, lambda self: None)

    return mutant


def resumed_early(patch: pytest.MonkeyPatch) -> None:
    """A mutant: who is cut resumes at once."""

    def take(self: barrier.Barrier) -> None:
        for ready in self._ready.values():
            ready.take()
            ready.resume()

    patch.setattr(barrier.Barrier, "take", take)


def alone(patch: pytest.MonkeyPatch) -> None:
    """A mutant: each member is held for its own cut only."""

    def take(self: barrier.Barrier) -> None:
        for ready in self._ready.values():
            ready.hold()
            ready.take()
            ready.resume()
            ready.source.world.advance(7)

    patch.setattr(barrier.Barrier, "hold", lambda self: None)
    patch.setattr(barrier.Barrier, "take", take)


@pytest.mark.parametrize("mutant", [one_by_one("hold", "take"), resumed_early, alone])
def test_the_order_is_noticed(mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        check_instant(World("abc"))


def test_cuts_that_are_of_no_instant_contradict_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counters alone tell it as well: the checker of bytes can fail."""
    alone(monkeypatch)
    common = cut(World("abc"))
    assert not one_instant([int.from_bytes(one.read(DISK, 0, 8), "big") for one in common.cuts.values()])


def test_the_cuts_share_an_instant_and_the_weakest_label_is_the_groups() -> None:
    world = World("abc")
    world.sources["b"].label = Consistency.FILE_SYSTEM

    def later() -> None:
        world.time += 1.0

    world.sources["b"].during["take"] = later
    common = cut(world, want=Consistency.APPLICATION, barrier="7-3-x")
    assert common.consistency is Consistency.FILE_SYSTEM and common.barrier == "7-3-x"
    assert [one.consistency for one in common.cuts.values()] == [
        Consistency.APPLICATION,
        Consistency.FILE_SYSTEM,
        Consistency.APPLICATION,
    ]
    assert {one.taken_at for one in common.cuts.values()} == {common.held_from}
    assert common.held_from <= common.held_until
    assert list(common.cuts) == ["a", "b", "c"]
    assert cut(World()).barrier != cut(World()).barrier


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("who", "abc")
def test_a_member_that_fails_costs_all_cuts_and_holds_nobody_up(step: str, who: str) -> None:
    world = World("abc")
    world.sources[who].fail[step] = [FarshoreError(Code.SNAPSHOT_FAILED, f"{who} cannot {step}")]
    with pytest.raises(BarrierMissed, match=f"{who} cannot {step}") as missed:
        cut(world)
    assert list(missed.value.errors) == [who] and missed.value.retryable
    assert missed.value.code is Code.SNAPSHOT_FAILED
    assert not any(source.held or source.cuts for source in world.sources.values())
    # Also who was finished already is released, everybody else is told to forget it.
    done = {event.split()[1] for event in world.events if event.startswith(("abandon", "release"))}
    assert done | ({who} if step == "prepare" else set()) == set("abc")
    assert not at(world.events, "take") or step in STEPS[3:]


def test_all_who_failed_are_named_and_one_for_good_makes_it_for_good() -> None:
    world = World("abc")
    world.sources["a"].fail["prepare"] = [FarshoreError(Code.SOURCE_NOT_ELIGIBLE, "a shared disk")]
    world.sources["c"].fail["prepare"] = [FarshoreError(Code.SOURCE_UNREACHABLE, "no route")]
    with pytest.raises(
        BarrierMissed, match=r"2 of 3 members failed to prepare\. a shared disk no route"
    ) as missed:
        cut(world)
    assert not missed.value.retryable
    assert missed.value.info.details["codes"] == {"a": "SourceNotEligible", "c": "SourceUnreachable"}


@pytest.mark.parametrize("step", ["hold", "take"])
def test_nobody_waits_for_a_late_member(step: str) -> None:
    """The others write again while it still hangs; and it is let go as soon as it answers."""
    world = World("abc")
    others = {"a", "c"}
    seen: list[bool] = []
    resumed = threading.Event()

    def note(event: str, tell=world.tell) -> None:
        tell(event)
        if event.startswith("resume"):
            others.discard(event.split()[1])
            if not others:
                resumed.set()

    world.tell = note  # type: ignore[method-assign]
    world.sources["b"].during[step] = lambda: seen.append(resumed.wait(30))
    with pytest.raises(BarrierMissed, match=r"b was too slow.*are allowed") as missed:
        cut(world, deadline=0.3)
    assert seen == [True] and list(missed.value.errors) == ["b"]
    assert not any(source.held or source.cuts for source in world.sources.values())


def test_late_is_late_also_when_all_answered_at_last() -> None:
    world = World()
    clock = [0.0]

    def slow() -> None:
        clock[0] += 3.0

    world.sources["a"].during["take"] = slow
    with pytest.raises(BarrierMissed, match=r"after 3\.00 s"):
        cut(world, deadline=2.0, clock=lambda: clock[0])
    assert not any(source.held or source.cuts for source in world.sources.values())


def test_a_member_that_resumed_by_itself_voids_the_cut_of_all() -> None:
    world = World()

    def watchdog() -> None:
        world.sources["a"].held = False

    world.sources["b"].during["hold"] = watchdog
    world.sources["b"].during["take"] = watchdog
    world.sources["a"].during["take"] = watchdog
    with pytest.raises(BarrierMissed, match="a did not stay stopped"):
        cut(world)


def test_the_end_of_the_process_is_no_miss() -> None:
    world = World()
    world.fuse.arm(7)
    with pytest.raises(Crash):
        cut(world)


def test_a_source_that_cannot_be_held_is_refused_before_anything_is_done() -> None:
    world = World("abc")
    world.sources["b"].cannot_hold = "it is cut by itself"
    with pytest.raises(NoCommonInstant, match="b: it is cut by itself") as refused:
        cut(world)
    assert refused.value.code is Code.SOURCE_NOT_ELIGIBLE and not refused.value.retryable
    assert refused.value.reasons == {"b": "it is cut by itself"} and not world.events


def test_vsphere_and_the_agent_say_that_they_cut_by_themselves() -> None:
    """Neither touches its system for it."""
    vsphere = VSphereSource(None, None, None, machine="vm1", source="x", datastore_types=None)  # type: ignore[arg-type]
    physical = PhysicalSource(None, machine="srv1", client=object())  # type: ignore[arg-type]
    for source, name in ((vsphere, "vm1"), (physical, "srv1")):
        with pytest.raises(NoCommonInstant, match=name):
            source.prepare("farshore-x-1-1", want=CRASH)
        with pytest.raises(NoCommonInstant, match=name):
            cut_together([Member(source, "farshore-x-1-1", name)], want=CRASH)


def test_members_have_names_of_their_own() -> None:
    world = World()
    twice = [Member(source, "n", "same") for source in world.sources.values()]
    with pytest.raises(ValueError, match="names of their own"):
        cut_together(twice, want=CRASH)
    with pytest.raises(ValueError, match="names of their own"):
        cut_together([], want=CRASH)
