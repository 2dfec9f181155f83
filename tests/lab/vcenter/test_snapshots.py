"""Snapshots and change tracking as a pyVmomi client sees them."""

from __future__ import annotations

import hashlib
import random
import time
from typing import Any

import pytest
from pyVim.task import WaitForTask
from pyVmomi import vim, vmodl

from farshore.lab.guest import ledger
from farshore.lab.vcenter.bitmap import BLOCK
from farshore.lab.vcenter.disks import Disk

from .conftest import MIB, Client, disks, eventually, extent

SIZE = 16 * MIB


@pytest.fixture
def vm(client: Client, control: Any) -> Any:
    control.create_vm("db", [SIZE, {"size": 8 * MIB, "label": "log"}])
    return client.vm("db")


def ids(holder: Any) -> list[str | None]:
    return [d.backing.changeId for d in disks(holder)]


def test_three_cycles_of_change_queries_make_a_replica_bit_by_bit(
    client: Client, control: Any, vm: Any
) -> None:
    control.digest_log()
    control.settings(cbt_window=3 * MIB)
    client.track(vm)
    chance = random.Random(11)
    replica = {d.key: bytearray(d.capacityInBytes) for d in disks(vm)}
    known: dict[int, str] = {}
    for cycle in range(3):
        for _ in range(10):
            disk = chance.choice(["log", 0])
            room = 8 * MIB - 200_000
            control.guest_fill(
                "db", disk, chance.randrange(room), chance.randrange(1, 200_000), chance.random()
            )
        snapshot = client.snapshot(vm, f"cycle-{cycle}")
        control.guest_write("db", 0, 0, b"after the cut")
        for disk in disks(snapshot):
            since = known.get(disk.key, "*")
            for start, length in client.changed(vm, snapshot, disk.key, since, disk.capacityInBytes):
                assert start % BLOCK == 0
                data = client.read(extent(disk.backing.fileName), start, length)
                replica[disk.key][start : start + length] = data
            known[disk.key] = disk.backing.changeId
            digest = next(d for d in control.digests("db", f"cycle-{cycle}") if d["disk"] == disk.key)
            assert hashlib.sha256(replica[disk.key]).hexdigest() == digest["sha256"]
        client.remove(snapshot)
    assert len(control.digests("db")) == 6


def test_tracking_waits_for_the_next_stun(client: Client, vm: Any) -> None:
    client.track(vm)
    assert vm.config.changeTrackingEnabled
    assert ids(vm) == [None, None]
    client.remove(client.snapshot(vm))
    assert all(ids(vm))


def test_tracking_may_wait_for_a_power_cycle(client: Client, control: Any, vm: Any) -> None:
    control.settings(cbt_activation="power_cycle")
    client.track(vm)
    client.remove(client.snapshot(vm))
    assert ids(vm) == [None, None]
    client.wait(vm.PowerOffVM_Task())
    client.wait(vm.PowerOnVM_Task())
    assert all(ids(vm))


def test_tracking_of_a_powered_off_machine_starts_at_once_and_needs_no_snapshot(
    client: Client, control: Any
) -> None:
    control.create_vm("off", [SIZE], power="poweredOff")
    vm = client.vm("off")
    client.track(vm)
    assert all(ids(vm))
    control.guest_write("off", 0, 5 * BLOCK, b"x")
    head = ids(vm)[0].rpartition("/")[0]
    assert client.changed(vm, None, 2000, f"{head}/0", SIZE) == [(5 * BLOCK, BLOCK)]


def test_a_running_machine_needs_a_snapshot_for_a_query(client: Client, vm: Any) -> None:
    client.track(vm)
    client.remove(client.snapshot(vm))
    with pytest.raises(vim.fault.FileFault):
        vm.QueryChangedDiskAreas(None, 2000, 0, "*")


def test_a_snapshot_without_tracking_has_no_id_and_no_answer(client: Client, vm: Any) -> None:
    snapshot = client.snapshot(vm)
    assert ids(snapshot) == [None, None]
    with pytest.raises(vim.fault.FileFault):
        vm.QueryChangedDiskAreas(snapshot, 2000, 0, "*")


@pytest.mark.parametrize(("key", "offset"), [(2000, SIZE), (2000, -1), (77, 0)])
def test_bad_arguments_of_a_query(client: Client, vm: Any, key: int, offset: int) -> None:
    client.track(vm)
    snapshot = client.snapshot(vm)
    with pytest.raises(vmodl.fault.InvalidArgument):
        vm.QueryChangedDiskAreas(snapshot, key, offset, "*")


def test_an_id_of_another_epoch_is_refused_with_the_chosen_fault(
    client: Client, control: Any, vm: Any
) -> None:
    client.track(vm)
    first = client.snapshot(vm)
    old = ids(first)[0]
    client.remove(first)
    control.reset_cbt("db")
    snapshot = client.snapshot(vm)
    assert ids(snapshot)[0].rpartition("/")[0] != old.rpartition("/")[0]
    with pytest.raises(vmodl.fault.InvalidArgument):
        vm.QueryChangedDiskAreas(snapshot, 2000, 0, old)
    control.settings(stale_id_fault="vim.fault.FileFault")
    with pytest.raises(vim.fault.FileFault):
        vm.QueryChangedDiskAreas(snapshot, 2000, 0, old)


def test_switching_tracking_off_and_on_makes_a_new_epoch(client: Client, vm: Any) -> None:
    client.track(vm)
    client.remove(client.snapshot(vm))
    old = ids(vm)[0]
    client.track(vm, False)
    client.remove(client.snapshot(vm))
    assert ids(vm) == [None, None]
    client.track(vm)
    client.remove(client.snapshot(vm))
    assert ids(vm)[0].rpartition("/")[0] != old.rpartition("/")[0]


def test_a_datastore_may_answer_with_one_extent_that_covers_all(
    client: Client, control: Any, vm: Any
) -> None:
    control.set_datastore("ds1", "nfs_whole")
    client.track(vm)
    snapshot = client.snapshot(vm)
    assert client.changed(vm, snapshot, 2000, "*", SIZE) == [(0, SIZE)]


def test_over_reporting_names_neighbours(client: Client, control: Any, vm: Any) -> None:
    client.track(vm)
    first = client.snapshot(vm)
    since = ids(first)[0]
    client.remove(first)
    control.guest_write("db", 0, 10 * BLOCK, b"x")
    control.settings(defect_over_report=True)
    snapshot = client.snapshot(vm)
    assert client.changed(vm, snapshot, 2000, since, SIZE) == [(9 * BLOCK, 3 * BLOCK)]


def test_the_live_link_is_renamed_and_points_to_its_parent(client: Client, vm: Any) -> None:
    snapshot = client.snapshot(vm, "one")
    live = disks(vm)[0].backing
    assert live.fileName == "[ds1] db/db-000001.vmdk"
    assert live.parent.fileName == "[ds1] db/db.vmdk" == disks(snapshot)[0].backing.fileName
    client.remove(snapshot)
    assert disks(vm)[0].backing.fileName == "[ds1] db/db.vmdk"
    assert vm.snapshot is None
    assert not vm.runtime.consolidationNeeded


def test_removing_without_consolidation_leaves_work_that_consolidation_does(
    client: Client, control: Any, vm: Any
) -> None:
    snapshot = client.snapshot(vm)
    control.guest_write("db", 0, 0, b"kept")
    client.remove(snapshot, consolidate=False)
    assert vm.runtime.consolidationNeeded
    assert disks(vm)[0].backing.parent is not None
    client.wait(vm.ConsolidateVMDisks_Task())
    assert not vm.runtime.consolidationNeeded
    assert control.guest_read("db", 0, 0, 4) == b"kept"


def test_a_tree_of_snapshots_reverts_and_branches(client: Client, control: Any, vm: Any) -> None:
    control.guest_write("db", 0, 0, b"one")
    client.snapshot(vm, "one")
    control.guest_write("db", 0, 0, b"two")
    client.snapshot(vm, "two")
    control.guest_write("db", 0, 0, b"six")
    client.wait(vm.snapshot.rootSnapshotList[0].snapshot.RevertToSnapshot_Task())
    assert vm.runtime.powerState == "poweredOff"
    assert control.guest_read("db", 0, 0, 3) == b"one"
    assert vm.snapshot.currentSnapshot == vm.snapshot.rootSnapshotList[0].snapshot
    client.snapshot(vm, "branch")
    tree = vm.snapshot.rootSnapshotList[0]
    assert sorted(s.name for s in tree.childSnapshotList) == ["branch", "two"]
    client.wait(vm.RemoveAllSnapshots_Task())
    assert vm.snapshot is None
    assert control.guest_read("db", 0, 0, 3) == b"one"
    assert control.leaks()["consolidation_needed"] == []


def test_reverting_keeps_the_epoch_only_if_told_and_then_reports_what_came_back(
    client: Client, control: Any, vm: Any
) -> None:
    control.settings(revert_changes_epoch=False)
    client.track(vm)
    base = client.snapshot(vm, "base")
    known = ids(base)[0]
    control.guest_write("db", 0, 7 * BLOCK, b"lost")
    client.wait(base.RevertToSnapshot_Task())
    after = client.snapshot(vm, "after")
    assert (7 * BLOCK, BLOCK) in client.changed(vm, after, 2000, known, SIZE)
    control.settings(revert_changes_epoch=True)
    client.wait(base.RevertToSnapshot_Task())
    assert ids(vm)[0].rpartition("/")[0] != known.rpartition("/")[0]


def test_extending_is_refused_with_snapshots_and_seen_afterwards(
    client: Client, control: Any, vm: Any
) -> None:
    snapshot = client.snapshot(vm)
    disk = disks(vm)[0]
    disk.capacityInBytes, disk.capacityInKB = 2 * SIZE, 2 * SIZE // 1024
    spec = vim.vm.ConfigSpec(deviceChange=[vim.vm.device.VirtualDeviceSpec(operation="edit", device=disk)])
    with pytest.raises(vim.fault.InvalidDeviceOperation):
        client.wait(vm.ReconfigVM_Task(spec))
    client.remove(snapshot)
    client.wait(vm.ReconfigVM_Task(spec))
    assert disks(vm)[0].capacityInBytes == 2 * SIZE
    control.guest_write("db", 0, 2 * SIZE - 3, b"end")
    manager = client.content.virtualDiskManager
    with pytest.raises(vim.fault.FileLocked):
        client.wait(manager.ExtendVirtualDisk_Task("[ds1] db/db.vmdk", None, 3 * SIZE // 1024, False))
    client.wait(vm.PowerOffVM_Task())
    client.wait(manager.ExtendVirtualDisk_Task("[ds1] db/db.vmdk", None, 3 * SIZE // 1024, False))
    assert control.guest_read("db", 0, 2 * SIZE - 3, 3) == b"end"
    assert disks(vm)[0].capacityInBytes == 3 * SIZE


def test_growth_may_lose_tracking_or_end_the_epoch(client: Client, control: Any, vm: Any) -> None:
    client.track(vm)
    client.remove(client.snapshot(vm))
    old = ids(vm)[0]
    control.settings(defect_growth=True)
    control.extend("db", 0, 2 * SIZE)
    since = ids(vm)[0]
    assert since.rpartition("/")[0] == old.rpartition("/")[0]
    control.guest_write("db", 0, SIZE, b"not tracked")
    snapshot = client.snapshot(vm)
    before = f"{since.rpartition('/')[0]}/{int(since.rpartition('/')[2]) - 1}"
    assert client.changed(vm, snapshot, 2000, before, 2 * SIZE) == []
    client.remove(snapshot)
    control.settings(defect_growth=False, extend_changes_epoch=True)
    control.extend("db", 0, 3 * SIZE)
    assert ids(vm)[0].rpartition("/")[0] != old.rpartition("/")[0]


def test_pyvmomis_own_task_waiter_works(vm: Any) -> None:
    assert WaitForTask(vm.CreateSnapshot_Task("s", "", False, False)) == "success"
    with pytest.raises(vim.fault.InvalidPowerState):
        WaitForTask(vm.PowerOnVM_Task())


def test_two_snapshots_at_once_are_refused(client: Client, control: Any, vm: Any) -> None:
    control.add_fault("CreateSnapshot_Task", stage="task", action="stuck", percent=20)
    first = vm.CreateSnapshot_Task("one", "", False, False)
    eventually(lambda: first.info.progress == 20, "the first task")
    with pytest.raises(vim.fault.TaskInProgress):
        client.wait(vm.CreateSnapshot_Task("two", "", False, False))
    first.CancelTask()
    eventually(lambda: first.info.state == "error", "the first task's end")
    client.snapshot(vm, "two")
    assert [s.name for s in vm.snapshot.rootSnapshotList] == ["two"]


def test_the_depth_of_snapshots_is_limited(client: Client, control: Any, vm: Any) -> None:
    control.settings(snapshot_depth=2)
    client.snapshot(vm)
    client.snapshot(vm)
    with pytest.raises(vim.fault.TooManySnapshotLevels):
        client.snapshot(vm)


def test_quiescing_needs_the_tools(client: Client, control: Any, vm: Any) -> None:
    client.remove(client.snapshot(vm, quiesce=True))
    control.set_vm("db", tools="notInstalled")
    with pytest.raises(vim.fault.FilesystemQuiesceFault):
        client.snapshot(vm, quiesce=True)


def test_independent_and_raw_disks_behave_as_they_do(client: Client, control: Any, vm: Any) -> None:
    control.set_disk("db", "log", mode="independent_persistent")
    client.track(vm)
    snapshot = client.snapshot(vm)
    modes = {d.deviceInfo.label: (d.backing.diskMode, d.backing.changeId is None) for d in disks(snapshot)}
    assert modes == {"Hard disk 1": ("persistent", False), "log": ("independent_persistent", True)}
    client.remove(snapshot)
    control.set_disk("db", "log", mode="persistent", backing="rdm_physical")
    with pytest.raises(vim.fault.SnapshotIncompatibleDeviceInVm):
        client.snapshot(vm)


def test_disks_of_one_snapshot_are_cut_at_one_instant_while_the_guest_writes(
    client: Client, control: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    freeze = Disk.freeze

    def slow_freeze(disk: Disk) -> int:
        """Open the window between the first disk's cut and the second's as wide as it gets."""
        frozen = freeze(disk)
        time.sleep(0.15)
        return frozen

    monkeypatch.setattr(Disk, "freeze", slow_freeze)
    control.create_vm("app", [SIZE, 8 * MIB], workload={"records_per_second": 400, "area_size": MIB})
    vm = client.vm("app")
    eventually(lambda: control.vm("app")["last_record"] > 20, "records")
    snapshot = client.snapshot(vm)

    class Frozen:
        def __init__(self, disk: Any) -> None:
            self.path = extent(disk.backing.fileName)

        def read(self, offset: int, length: int, /) -> bytes:
            return client.read(self.path, offset, length)

    report = ledger.verify([Frozen(d) for d in disks(snapshot)])
    assert report.intact, report.problems
    assert report.last_number > 20
    assert control.verify_ledger("app")["last_number"] >= report.last_number
