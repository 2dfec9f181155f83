"""Whatever makes change tracking doubtful asks for a full comparison, with a reason that a person understands."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency
from farshore.providers.vsphere import areas
from farshore.providers.vsphere import source as module
from farshore.providers.vsphere.machine import Machine
from farshore.providers.vsphere.source import parse_tracker, resync_reason
from farshore.replication.ports import DiskState, FullCopyNeeded

MIB = 1 << 20


async def reason_after(control, vm, replica, event, *, change_since=None):
    """One committed cycle, then `event`, then the reason why the next cycle is a full one; "" if it is not."""

    def run():
        replica.cycle_and_check(control, vm)
        event()
        if change_since is not None:
            replica.since = {key: change_since(state) for key, state in replica.since.items()}
        cut = replica.cut()
        try:
            cut.changed("2000", replica.since["2000"])
        except FullCopyNeeded as exc:
            return exc.reason
        finally:
            cut.release()
        return ""

    reason = await asyncio.to_thread(run)
    assert control.vm(vm)["snapshots"] == []
    return reason


async def test_nothing_happened(control, machine, replica_of):
    vm = machine()
    assert await reason_after(control, vm, await replica_of(vm), lambda: None) == ""


async def test_tracking_was_reset(control, machine, replica_of):
    vm = machine()
    reason = await reason_after(control, vm, await replica_of(vm), lambda: control.reset_cbt(vm))
    assert reason == "change tracking of Hard disk 1 was reset"


async def test_tracking_was_switched_off(control, machine, replica_of):
    vm = machine()
    reason = await reason_after(control, vm, await replica_of(vm), lambda: control.set_cbt(vm, False))
    assert reason == "change tracking of Hard disk 1 is off or not ready"


async def test_tracking_was_off_for_a_while(control, machine, replica_of):
    vm = machine()

    def off_and_on():
        control.set_cbt(vm, False)
        control.snapshot(vm, "stun")
        control.remove_snapshot(vm, "stun")
        control.set_cbt(vm, True)

    reason = await reason_after(control, vm, await replica_of(vm), off_and_on)
    assert reason == "change tracking of Hard disk 1 was reset"


async def test_the_disk_grew(control, machine, replica_of):
    vm = machine()
    reason = await reason_after(control, vm, await replica_of(vm), lambda: control.extend(vm, 0, 9 * MIB))
    assert reason == f"the size of Hard disk 1 changed from {8 * MIB} to {9 * MIB} bytes"


async def test_the_machine_was_reverted(control, machine, replica_of):
    vm = machine()
    control.settings(revert_changes_epoch=False)  # the ids look as if nothing had happened

    def revert():
        control.snapshot(vm, "before patch")
        control.guest_write(vm, 0, 0, b"patch")
        control.revert(vm, "before patch")
        control.remove_snapshot(vm, "before patch")

    reason = await reason_after(control, vm, await replica_of(vm), revert)
    assert reason.startswith("the machine was reverted to a snapshot at 20")


async def test_a_revert_is_found_although_the_hosts_clock_is_ahead_of_vcenters(control, machine, replica_of):
    """The tracker has the snapshot's time, by the host's clock; the history has vCenter's."""
    vm = machine()
    control.settings(revert_changes_epoch=False)

    def ahead(state):
        change_id, moment = parse_tracker(state.tracker)
        return replace(state, tracker=f"{change_id}@{(moment + timedelta(minutes=4)).isoformat()}")

    def revert():
        control.snapshot(vm, "s")
        control.revert(vm, "s")
        control.remove_snapshot(vm, "s")

    reason = await reason_after(control, vm, await replica_of(vm), revert, change_since=ahead)
    assert reason.startswith("the machine was reverted to a snapshot at 20")


async def test_a_revert_is_remembered_until_a_later_point_is_committed(
    control, machine, replica_of, monkeypatch
):
    vm = machine()
    monkeypatch.setattr(module, "CLOCKS_APART", timedelta(0))  # five minutes of doubt would have to pass
    control.settings(revert_changes_epoch=False)
    replica = await replica_of(vm)

    def run():
        replica.cycle_and_check(control, vm)
        control.snapshot(vm, "s")
        control.revert(vm, "s")
        control.remove_snapshot(vm, "s")
        reasons = []
        for _ in range(2):  # the first of them was not committed
            cut = replica.cut()
            with pytest.raises(FullCopyNeeded) as caught:
                cut.changed("2000", replica.since["2000"])
            reasons.append("reverted" in caught.value.reason)
            last = cut.disks[0]
            cut.release()
        replica.since = {"2000": last}  # a full comparison was committed
        cut = replica.cut()
        cut.changed("2000", last)
        cut.release()
        return reasons

    assert await asyncio.to_thread(run) == [True, True]


@pytest.mark.parametrize("fault", ["vmodl.fault.InvalidArgument", "vim.fault.FileFault"])
async def test_the_query_is_refused(control, machine, replica_of, fault):
    vm = machine()
    fields = {"file": "[ds1] x.vmdk"} if "FileFault" in fault else {"invalidProperty": "startOffset"}
    control.add_fault(
        "QueryChangedDiskAreas", vm=vm, fault=fault, fields=fields, message="A parameter was not correct."
    )
    reason = await reason_after(control, vm, await replica_of(vm), lambda: None)
    assert reason.startswith("change tracking cannot answer: A parameter was not correct.")


async def test_a_change_id_from_the_future_is_refused(control, machine, replica_of):
    vm = machine()

    def future(state):
        change_id, moment = parse_tracker(state.tracker)
        return replace(state, tracker=f"{change_id.rpartition('/')[0]}/999@{moment.isoformat()}")

    reason = await reason_after(control, vm, await replica_of(vm), lambda: None, change_since=future)
    assert reason.startswith("change tracking cannot answer")


async def test_the_answers_have_a_gap(control, machine, replica_of, monkeypatch):
    vm = machine()
    control.settings(cbt_window=MIB)
    replica = await replica_of(vm)
    honest = areas.Window

    def holed(start, length, found):
        return (
            honest(start, length, found) if start != 4 * MIB else honest(start + 65536, length - 65536, found)
        )

    def event():
        monkeypatch.setattr(areas, "Window", holed)

    reason = await reason_after(control, vm, replica, event)
    assert (
        reason
        == f"the answer of change tracking has a gap: asked from offset {4 * MIB}, the answer begins at {4 * MIB + 65536}"
    )


async def test_without_the_coverage_check_a_hole_would_be_committed(
    control, machine, replica_of, monkeypatch
):
    """A mutant: believe windows as they come. The bytes in the skipped window are lost."""
    vm = machine()
    control.settings(cbt_window=MIB)
    replica = await replica_of(vm)
    honest = areas.Window

    def holed(start, length, found):
        return honest(start, length, found) if start != 4 * MIB else honest(start + MIB, length, [])

    def careless(capacity, query):
        offset, found = 0, []
        while offset < capacity:
            window = query(offset)
            found += window.areas
            offset = window.start + window.length
        return areas.merge(found, capacity)

    def run():
        replica.cycle_and_check(control, vm)
        control.guest_write(vm, 0, 4 * MIB, b"lost")
        monkeypatch.setattr(areas, "Window", holed)
        cut = replica.cut()
        with pytest.raises(FullCopyNeeded):
            cut.changed("2000", replica.since["2000"])
        cut.release()
        monkeypatch.setattr(areas, "collect", careless)
        with pytest.raises(AssertionError):
            replica.cycle_and_check(control, vm)

    await asyncio.to_thread(run)


CHANGES = [
    ({"tracker": None}, "Hard disk 1 had no change id at the last point"),
    (
        {"identity": "other|[ds1] a/a.vmdk|2000"},
        "Hard disk 1 is another disk or was moved: other|[ds1] a/a.vmdk|2000 became",
    ),
    ({"size": 512}, "the size of Hard disk 1 changed from 512 to"),
    ({"tracker": "00 11/3@2026-01-01T00:00:00+00:00"}, "change tracking of Hard disk 1 was reset"),
]


@pytest.mark.parametrize(("change", "says"), CHANGES)
async def test_what_the_last_point_says_is_compared(control, machine, replica_of, change, says):
    vm = machine()
    reason = await reason_after(
        control, vm, await replica_of(vm), lambda: None, change_since=lambda state: replace(state, **change)
    )
    assert reason.startswith(says)


async def test_tracking_that_waits_for_a_power_cycle_means_full_cycles_not_errors(control, machine, site):
    control.settings(cbt_activation="power_cycle")
    vm = machine()
    await site.enable_tracking(vm)
    seen = await site.inspect(vm)
    assert seen.tracking
    assert [f.code for f in seen.findings] == ["ChangeTrackingNotReady"]

    def run():
        cut = site.open_source("m", vm).cut("farshore-m-1-1", want=Consistency.CRASH)
        try:
            assert cut.disks[0].tracker is None
            assert cut.read("2000", 0, 512) == bytes(512)
            with pytest.raises(FullCopyNeeded, match="off or not ready"):
                cut.changed("2000", replace(cut.disks[0], tracker="aa/1"))
        finally:
            cut.release()

    await asyncio.to_thread(run)
    control.power_off(vm)
    control.power_on(vm)
    assert (await site.inspect(vm)).findings == ()


async def test_a_foreign_snapshot_stops_the_cycle_and_is_named(control, machine, replica_of):
    vm = machine()
    replica = await replica_of(vm)

    def run():
        replica.cycle_and_check(control, vm)
        control.snapshot(vm, "before patch")
        with pytest.raises(FarshoreError, match="'before patch'") as caught:
            replica.cut()
        assert caught.value.code is Code.SOURCE_NOT_ELIGIBLE
        assert caught.value.retryable  # a nightly backup must not end the protection
        control.remove_snapshot(vm, "before patch")
        replica.cycle_and_check(control, vm)

    await asyncio.to_thread(run)


async def test_links_that_were_left_behind_are_consolidated_before_the_cut(control, machine, replica_of):
    vm = machine()
    replica = await replica_of(vm)

    def run():
        replica.cycle_and_check(control, vm)
        control.snapshot(vm, "s")
        control.guest_fill(vm, 0, 0, MIB, seed=5)
        control.remove_snapshot(vm, "s", consolidate=False)
        replica.cycle_and_check(control, vm)

    await asyncio.to_thread(run)


async def test_a_link_below_ours_passes_with_the_next_consolidation(
    control, machine, replica_of, monkeypatch
):
    """A consolidation that vCenter does not report yet must cost a cycle, not the protection."""
    vm = machine()
    replica = await replica_of(vm)

    def run():
        replica.cycle_and_check(control, vm)
        control.snapshot(vm, "s")
        control.guest_fill(vm, 0, 0, MIB, seed=5)
        control.remove_snapshot(vm, "s", consolidate=False)
        with monkeypatch.context() as patch:
            patch.setattr(Machine, "consolidation_needed", property(lambda self: False))
            with pytest.raises(FarshoreError, match=r"Hard disk 1 .* lies on top of another one") as caught:
                replica.cut()
        assert caught.value.code is Code.SOURCE_NOT_ELIGIBLE
        assert (caught.value.retryable, caught.value.retry_after) == (True, 30.0)
        assert "consolidation" in caught.value.info.possible_causes[0]
        replica.cycle_and_check(control, vm)

    await asyncio.to_thread(run)
    assert control.vm(vm)["snapshots"] == []


async def test_a_revert_is_found_by_a_worker_that_did_not_make_the_last_point(
    control, machine, replica_of, site_of
):
    vm = machine()
    control.settings(revert_changes_epoch=False)
    replica = await replica_of(vm)

    def run():
        replica.cycle_and_check(control, vm)
        control.snapshot(vm, "s")
        control.revert(vm, "s")
        control.remove_snapshot(vm, "s")
        replica.source = site_of().open_source("m", vm)
        cut = replica.cut()
        with pytest.raises(FullCopyNeeded, match="reverted"):
            cut.changed("2000", replica.since["2000"])
        cut.release()

    await asyncio.to_thread(run)


def test_a_tracker_is_the_change_id_with_the_time_of_the_cut():
    moment = datetime(2026, 11, 22, 19, 0, 1, 5, tzinfo=UTC)
    assert parse_tracker(f"52 f3-58/2@{moment.isoformat()}") == ("52 f3-58/2", moment)
    assert parse_tracker("52 f3-58/2") == ("52 f3-58/2", None)
    assert parse_tracker("") == ("", None)


def test_of_the_tracker_only_the_epoch_is_compared():
    one = DiskState("2000", "Hard disk 1", 10, "u|p|2000", "aa bb/1@2026-01-01T00:00:00+00:00")
    later = replace(one, tracker="aa bb/999@2026-01-02T00:00:00+00:00", boot=True, label="other")
    assert resync_reason(one, later) == ""
