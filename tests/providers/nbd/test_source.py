"""A QEMU machine as a source: the cut is one instant, changes are never missed, and whatever breaks tracking is noticed.

QEMU is real, its guest is not there: what it would write is written through its devices.
"""

from __future__ import annotations

import random
import secrets
import threading

import pytest

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency
from farshore.providers.nbd import QemuSource, bitmaps, fleece
from farshore.providers.nbd import source as source_module
from farshore.providers.nbd.qmp import Monitor, Refused
from farshore.replication.ports import LEAF, Extent, FullCopyNeeded

from .quiet import MIB, Replica, changed, digests, missed, name, state, take, whole

pytestmark = pytest.mark.foreign


def test_a_cut_is_what_the_disks_held_whatever_is_written_afterwards(quiet):
    machine = quiet(4 * MIB, 3 * MIB + 512)
    machine.write("disk0", 0, 70_000 // 512 * 512, 1)
    machine.write("disk1", 3 * MIB, 512, 2)
    held = machine.frozen()
    cut = take(machine, 1)
    for key in machine.model:
        machine.write(key, 0, 2 * MIB, 9)
    assert digests({key: whole(cut, key) for key in machine.model}) == digests(held)
    assert [disk.key for disk in cut.disks] == ["disk0", "disk1"]
    assert [disk.size for disk in cut.disks] == [4 * MIB, 3 * MIB + 512]
    assert [disk.boot for disk in cut.disks] == [True, False]
    assert cut.consistency is Consistency.CRASH and not cut.powered_off
    cut.release()
    cut.release()
    assert machine.leftovers() == []
    with pytest.raises(FarshoreError, match="was released"):
        cut.read("disk0", 0, 512)


def test_a_first_copy_visits_what_is_allocated_only(quiet):
    machine = quiet(16 * MIB)
    machine.write("disk0", 5 * MIB, 512, 7)
    cut = take(machine, 1)
    extents = changed(cut, "disk0", None)
    assert missed(bytes(16 * MIB), bytes(machine.model["disk0"]), extents) == []
    assert sum(extent.length for extent in extents) <= 2 * LEAF
    cut.release()


def test_deltas_over_many_cycles_some_of_them_lost_miss_nothing(quiet):
    machine = quiet(6 * MIB, 2 * MIB + 512)
    choose = random.Random(3)
    replica = Replica()
    for cycle in range(1, 25):
        machine.scribble(choose)
        held = machine.frozen()
        cut = take(machine, cycle)
        machine.scribble(choose, 2)  # behind the cut: of the next one
        assert digests(replica.apply(cut, commit=choose.random() < 0.6)) == digests(held), cycle
        assert replica.reasons == {}
        if choose.random() < 0.8:  # else the worker died, and the next cut finds its remains
            cut.release()
    assert all(len(machine.bitmaps(key)) < 12 for key in machine.model)
    machine.source.reap()
    assert machine.leftovers() == []


def test_changes_are_told_leaf_by_leaf(quiet):
    machine = quiet(8 * MIB)
    first = take(machine, 1)
    first.release()
    machine.write("disk0", 3 * LEAF + 512, 512, 5)
    machine.write("disk0", 8 * MIB - 512, 512, 5)
    second = take(machine, 2)
    assert changed(second, "disk0", state(first, "disk0")) == [
        Extent(3 * LEAF, LEAF),
        Extent(8 * MIB - LEAF, LEAF),
    ]
    assert changed(second, "disk0", state(first, "disk0")) != []  # asked again: the same
    second.release()


def test_trackers_stay_few_while_no_cycle_succeeds(quiet):
    machine = quiet(2 * MIB)
    source = QemuSource(machine.settings(bitmaps=4), machine="vm")
    replica = Replica()
    first = take(machine, 1, source=source)
    replica.apply(first)
    first.release()
    for cycle in range(2, 14):
        machine.write("disk0", cycle * LEAF, 512, cycle)
        cut = take(machine, cycle, source=source)
        replica.apply(cut, commit=False)
        cut.release()
        assert len(machine.bitmaps("disk0")) <= 5
    cut = take(machine, 14, source=source)
    assert digests(replica.apply(cut)) == digests(machine.frozen())
    assert replica.reasons == {}
    cut.release()
    cut = take(machine, 15, source=source)
    replica.apply(cut)
    cut.release()
    assert len(machine.bitmaps("disk0")) <= 2


# -- when tracking cannot be believed --------------------------------------------------------------------------------


def cycle_of(machine, replica, number, **options):
    held = machine.frozen()
    cut = take(machine, number, **options)
    assert digests(replica.apply(cut)) == digests(held)
    cut.release()
    assert machine.leftovers() == []
    return replica.reasons


@pytest.fixture
def synced(quiet):
    """A machine with two committed cycles, and its replica."""
    return synced_machine(quiet)


def synced_machine(quiet):
    machine = quiet(2 * MIB, 2 * MIB)
    replica = Replica()
    machine.write("disk0", 0, 512, 1)
    assert cycle_of(machine, replica, 1) == {}
    machine.write("disk1", MIB, 512, 1)
    assert cycle_of(machine, replica, 2) == {}
    return machine, replica


def remove_newest(machine):
    machine.run("block-dirty-bitmap-remove", node="n-disk0", name=machine.bitmaps("disk0")[-1])


def switch_off(machine):
    machine.run("block-dirty-bitmap-disable", node="n-disk0", name=machine.bitmaps("disk0")[-1])


def switch_on(machine):
    for each in machine.bitmaps("disk0"):
        machine.run("block-dirty-bitmap-enable", node="n-disk0", name=each)


@pytest.mark.parametrize(
    ("happens", "reason"),
    [
        (remove_newest, "switched off"),
        (switch_off, "switched off"),
        (switch_on, "switched on again"),
        (lambda m: [remove_newest(m), remove_newest(m)], "no change tracking of ours"),
    ],
)
def test_a_foreign_hand_on_a_tracker_costs_a_comparison_of_that_disk_only(synced, happens, reason):
    machine, replica = synced
    happens(machine)
    machine.write("disk0", MIB, 512, 3)
    machine.write("disk1", 0, 512, 3)
    reasons = cycle_of(machine, replica, 3)
    assert list(reasons) == ["disk0"] and reason in reasons["disk0"]
    machine.write("disk0", LEAF, 512, 4)
    assert cycle_of(machine, replica, 4) == {}
    assert len(machine.bitmaps("disk0")) <= 2


def test_a_tracker_in_foreign_use_is_not_believed(synced):
    machine, replica = synced
    machine.write("disk0", MIB, 512, 3)
    oldest = machine.bitmaps("disk0")[0]
    machine.run("block-export-add", type="nbd", id="theirs", node_name="n-disk0", bitmaps=[oldest])
    reasons = cycle_of(machine, replica, 3)
    assert list(reasons) == ["disk0"] and "in use" in reasons["disk0"]
    machine.write("disk0", LEAF, 512, 4)
    assert (
        cycle_of(machine, replica, 4) == {}
    )  # the new line does not suffer from what remains of the old one
    machine.run("block-export-del", id="theirs", mode="hard")
    assert cycle_of(machine, replica, 5) == {}


def test_a_restart_without_persistent_trackers_is_noticed(synced):
    machine, replica = synced
    machine.quit()
    machine.start()
    machine.write("disk0", MIB, 512, 3)
    assert set(cycle_of(machine, replica, 3)) == {"disk0", "disk1"}
    assert cycle_of(machine, replica, 4) == {}


def test_persistent_trackers_survive_a_clean_stop_and_not_a_crash(quiet):
    machine = quiet(2 * MIB, persistent=True)
    replica = Replica()
    machine.write("disk0", 0, 512, 1)
    cycle_of(machine, replica, 1)
    machine.write("disk0", MIB, 512, 2)
    machine.quit()
    machine.start()
    machine.write("disk0", 3 * LEAF, 512, 3)
    assert cycle_of(machine, replica, 2) == {}
    machine.write("disk0", 5 * LEAF, 512, 4)
    machine.kill()
    machine.start()
    machine.model["disk0"] = bytearray(whole_image(machine, "disk0"))  # what was not flushed may be gone
    machine.write("disk0", 6 * LEAF, 512, 5)
    reasons = cycle_of(machine, replica, 3)
    assert "disk0" in reasons  # "in use" in the image, or an older file without the tracker
    assert cycle_of(machine, replica, 4) == {}


def test_an_image_that_is_brought_back_from_a_copy_is_noticed(quiet):
    """It brings its old trackers with it, whole and sound, and counts on from there."""
    machine = quiet(2 * MIB, persistent=True)
    replica = Replica()
    cycle_of(machine, replica, 1)
    machine.quit()
    saved = machine.images["disk0"].read_bytes()
    before = bytes(machine.model["disk0"])
    machine.start()
    machine.write("disk0", LEAF, 512, 2)
    assert cycle_of(machine, replica, 2) == {}  # committed: number 2 of the line
    machine.quit()
    machine.images["disk0"].write_bytes(saved)
    machine.model["disk0"] = bytearray(before)
    machine.start()
    lost = take(machine, 3)  # number 2 once more, and its worker dies
    replica.apply(lost, commit=False)
    assert "disk0" in replica.reasons
    lost.release()
    machine.write("disk0", 3 * LEAF, 512, 3)
    assert "disk0" in cycle_of(machine, replica, 4)
    assert cycle_of(machine, replica, 5) == {}


def test_a_revert_to_an_internal_snapshot_is_refused_by_qemu_or_noticed(synced):
    machine, replica = synced
    machine.run("human-monitor-command", command_line="savevm before")
    machine.write("disk0", LEAF, 512, 5)
    assert cycle_of(machine, replica, 3) == {}
    machine.run("human-monitor-command", command_line="loadvm before")
    machine.write("disk0", 5 * LEAF, 512, 6)
    cut = take(machine, 4)
    held = {key: whole(cut, key) for key in machine.model}
    assert digests(replica.apply(cut)) == digests(held)
    cut.release()


def whole_image(machine, key):
    """What the image holds, read through the running QEMU."""
    cut = QemuSource(machine.settings(), machine="other").cut("farshore-other-1-1", want=Consistency.CRASH)
    body = whole(cut, key)
    cut.release()
    for each in machine.bitmaps(key):
        if each.startswith("farshore-other."):
            machine.run("block-dirty-bitmap-remove", node=f"n-{key}", name=each)
    return body


def test_growth_a_new_disk_and_another_disk_in_its_place_are_noticed(synced):
    machine, replica = synced
    machine.grow("disk0", 3 * MIB)
    machine.write("disk0", 3 * MIB - 512, 512, 9)
    machine.add_disk("disk2", MIB)
    machine.write("disk2", 512, 512, 9)
    reasons = cycle_of(machine, replica, 3)
    assert list(reasons) == ["disk0"] and "size" in reasons["disk0"]
    assert cycle_of(machine, replica, 4) == {}
    assert set(replica.disks) == {"disk0", "disk1", "disk2"}
    machine.quit()
    machine.images["disk1"].rename(machine.folder / "moved.qcow2")
    machine.images["disk1"] = machine.folder / "moved.qcow2"
    machine.start()
    assert "another disk" in cycle_of(machine, replica, 5)["disk1"]


def two_workers(synced):
    machine, replica = synced
    clear = QemuSource._clear
    try:
        QemuSource._clear = lambda self, monitor, upto: []  # both looked before either had made anything
        slow = machine.source.prepare(name(3), want=Consistency.CRASH)
        other = QemuSource(machine.settings(), machine="vm").prepare(name(3), want=Consistency.CRASH)
    finally:
        QemuSource._clear = clear
    other.take()
    machine.write("disk0", MIB, 512, 3)
    with pytest.raises(FarshoreError) as failed:
        slow.take()
    assert failed.value.code is Code.SOURCE_BUSY
    slow.abandon()
    other.abandon()
    assert cycle_of(machine, replica, 4) == {}


def test_two_workers_that_cut_from_the_same_line_cannot_both_have_it(synced):
    """Without this the slower one would miss what was written between the two instants."""
    two_workers(synced)


# -- when a cut is lost ----------------------------------------------------------------------------------------------


def test_a_cut_whose_job_somebody_cancels_gives_no_more_bytes(quiet):
    machine = quiet(2 * MIB)
    cut = take(machine, 1)
    assert cut.read("disk0", 0, 512) == bytes(512)
    job = machine.run("query-block-jobs")[0]["device"]
    machine.run("block-job-cancel", device=job)
    machine.write("disk0", 0, 512, 1)  # the fleece shows this now
    with pytest.raises(FarshoreError) as failed:
        cut.read("disk0", 0, 512)
    assert failed.value.code is Code.SOURCE_READ_FAILED
    cut.release()
    assert machine.leftovers() == []


def test_a_cut_is_given_up_before_its_fleeces_fill_the_folder(quiet, monkeypatch):
    machine = quiet(2 * MIB)
    cut = take(machine, 1)
    monkeypatch.setattr(fleece, "room", lambda folder: 0)
    cut._watcher.join(60)
    assert machine.leftovers() == []  # the guest's writes go nowhere but to its own disk
    machine.write("disk0", 0, 512, 1)
    with pytest.raises(FarshoreError) as failed:
        cut.read("disk0", 0, 512)
    assert failed.value.code is Code.SOURCE_READ_FAILED
    cut.release()
    with pytest.raises(FarshoreError, match="MiB free") as failed:
        take(machine, 2)
    assert failed.value.code is Code.SNAPSHOT_FAILED


def test_nothing_of_a_newer_epoch_is_touched(quiet):
    machine = quiet(MIB)
    cut = take(machine, 7, epoch=3)
    stale = QemuSource(machine.settings(), machine="vm")
    for attempt in (lambda: stale.reap(name(9, 2)), lambda: take(machine, 9, epoch=2, source=stale)):
        with pytest.raises(FarshoreError) as failed:
            attempt()
        assert failed.value.code is Code.SOURCE_BUSY
    assert cut.read("disk0", 0, 512) == bytes(512)
    assert stale.reap(name(8, 3)) == [name(7, 3)]
    assert machine.leftovers() == []


def test_another_machine_of_the_same_qemu_is_left_alone(quiet):
    machine = quiet(MIB)
    cut = take(machine, 1)
    assert QemuSource(machine.settings(), machine="other").reap() == []
    assert cut.read("disk0", 0, 512) == bytes(512)
    cut.release()


def test_a_refused_transaction_leaves_nothing_and_costs_no_tracker(synced, monkeypatch):
    machine, replica = synced
    machine.write("disk0", MIB, 512, 8)

    def refuse(self, actions):
        broken = [*actions, {"type": "abort", "data": {}}]  # QEMU's own way to fail one at its end
        self("transaction", actions=broken)

    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "transaction", refuse)
        with pytest.raises(Refused):
            take(machine, 3)
    assert machine.leftovers() == []
    assert cycle_of(machine, replica, 3) == {}


def test_a_monitor_that_another_client_holds_is_a_plain_error(quiet):
    machine = quiet(MIB)
    source = QemuSource(machine.settings(connect_timeout=0.3), machine="vm")
    with machine.monitor():
        with pytest.raises(FarshoreError) as failed:
            source.cut(name(1), want=Consistency.CRASH)
        assert failed.value.code is Code.SOURCE_UNREACHABLE
        assert any("one client" in cause for cause in failed.value.info.possible_causes)
    take(machine, 1, source=source).release()


def test_disks_are_chosen_and_missing_ones_named(quiet):
    machine = quiet(MIB, MIB)
    chosen = QemuSource(machine.settings(disks=("disk1",)), machine="vm")
    cut = take(machine, 1, source=chosen)
    assert [disk.key for disk in cut.disks] == ["disk1"]
    cut.release()
    absent = QemuSource(machine.settings(disks=("disk1", "disk9")), machine="vm")
    with pytest.raises(FarshoreError, match="disk9") as failed:
        take(machine, 2, source=absent)
    assert failed.value.code is Code.SOURCE_NOT_ELIGIBLE


def test_several_threads_read_one_cut(quiet):
    machine = quiet(8 * MIB)
    machine.scribble(random.Random(1), 40)
    held = bytes(machine.model["disk0"])
    cut = take(machine, 1)
    wrong: list[int] = []

    def reader(seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(40):
            at = choose.randrange(0, 8 * MIB // 512) * 512
            length = min(choose.randint(1, 4096) * 512, 8 * MIB - at)
            if cut.read("disk0", at, length) != held[at : at + length]:
                wrong.append(at)

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    machine.scribble(random.Random(2), 20)
    for thread in threads:
        thread.join()
    assert wrong == []
    cut.release()


# -- tests of the tests ----------------------------------------------------------------------------------------------


def without_the_middle(self, cut, mark):
    return tuple(bitmap for bitmap in self.bitmaps if bitmap.first == cut)  # only the first interval


MUTANTS = {
    "intervals of lost cycles are forgotten": (bitmaps.Line, "since", without_the_middle),
    "a broken line is believed": (bitmaps, "_broken", lambda members: ""),
    "the newest tracker is dropped too early": (
        bitmaps.Line,
        "since",
        lambda self, cut, mark: tuple(b for b in self.bitmaps if b.last > cut),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_stories_above_catch_a_source_that(mutant, quiet, monkeypatch):
    where, what, instead = MUTANTS[mutant]
    monkeypatch.setattr(where, what, instead)
    machine = quiet(2 * MIB)
    replica = Replica()
    machine.write("disk0", 0, 512, 1)
    seen = []
    for cycle, commit, harm in (
        (1, True, None),
        (2, False, None),
        (3, True, None),
        (4, True, switch_off),
        (5, True, None),
    ):
        machine.write("disk0", cycle * 2 * LEAF, 512, cycle)
        if harm:
            harm(machine)
            machine.write("disk0", LEAF, 512, 77)
        held = machine.frozen()
        try:
            cut = take(machine, cycle)
            seen.append(digests(replica.apply(cut, commit=commit)) == digests(held))
            cut.release()
        except (FarshoreError, FullCopyNeeded):
            seen.append(True)
    assert not all(seen), mutant


def test_the_transaction_holds_all_disks_together(quiet, monkeypatch):
    """The negative control without a guest: disks that are cut apart do not show one instant."""
    machine = quiet(MIB, MIB)

    def apart(self, actions):
        for key in ("disk0", "disk1"):
            mine = [a for a in actions if (a["data"].get("node") or a["data"].get("device")) == f"n-{key}"]
            self("transaction", actions=mine)
            self.close()
            for number in range(2):  # the guest writes first here, then there
                machine.write(f"disk{number}", 0, 512, 50 + number)
            self.__init__(machine.qmp, subject="vm", timeout=30)

    assert source_module.Monitor is Monitor
    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "transaction", apart)
        cut = take(machine, 1)
    first, second = cut.read("disk0", 0, 512), cut.read("disk1", 0, 512)
    assert first == bytes(512) and second != bytes(512)
    cut.release()


CARELESS = {
    "counts on after an image was brought back": (
        (bitmaps, "marked", lambda line, cut, run: "00000000"),
        test_an_image_that_is_brought_back_from_a_copy_is_noticed,
    ),
    "lets two workers have the same line": (
        (bitmaps, "marked", lambda line, cut, run: secrets.token_hex(4)),
        lambda quiet: two_workers(synced_machine(quiet)),
    ),
    "does not look whether its jobs live": (
        (fleece, "alive", lambda monitor, jobs: True),
        test_a_cut_whose_job_somebody_cancels_gives_no_more_bytes,
    ),
    "takes what a newer epoch made": (
        (fleece, "cuts", lambda monitor, machine: {}),
        test_nothing_of_a_newer_epoch_is_touched,
    ),
}


@pytest.mark.parametrize("mutant", CARELESS)
def test_a_test_above_catches_a_source_that(mutant, quiet, monkeypatch):
    (where, what, instead), proof = CARELESS[mutant]
    monkeypatch.setattr(where, what, instead)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        proof(quiet)
