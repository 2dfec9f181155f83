"""Guests: the workload runs while the power is on, stops in order or at once, and never forgets what it promised."""

from __future__ import annotations

import time
from typing import Any

import pytest
from pyVmomi import vim

from .conftest import MIB, Client, eventually

SIZE = 16 * MIB
FAST = {"records_per_second": 300, "area_size": MIB}


@pytest.fixture
def vm(client: Client, control: Any) -> Any:
    control.create_vm("db", [SIZE, SIZE], workload=FAST, shutdown={"seconds": 1.0})
    eventually(lambda: control.vm("db")["last_record"] > 5, "records")
    return client.vm("db")


def test_a_guest_shutdown_takes_its_time_and_ends_with_a_shutdown_record(
    client: Client, control: Any, vm: Any
) -> None:
    before = control.vm("db")["last_record"]
    begin = time.monotonic()
    vm.ShutdownGuest()
    assert vm.runtime.powerState == "poweredOn"
    eventually(lambda: vm.runtime.powerState == "poweredOff", "power off")
    assert time.monotonic() - begin >= 1.0
    report = control.verify_ledger("db")
    assert report["intact"]
    assert report["last_kind"] == 2
    assert report["last_number"] > before
    last = control.acks("db", 1)[0]
    assert (last["number"], last["kind"]) == (report["last_number"], "shutdown")
    assert vm.guest.toolsRunningStatus == "guestToolsNotRunning"


def test_a_power_off_leaves_no_shutdown_record_and_the_chain_goes_on(
    client: Client, control: Any, vm: Any
) -> None:
    client.wait(vm.PowerOffVM_Task())
    first = control.verify_ledger("db")
    assert first["intact"]
    assert first["last_kind"] != 2
    assert first["last_number"] == control.acks("db", 1)[0]["number"]
    client.wait(vm.PowerOnVM_Task())
    eventually(lambda: control.vm("db")["last_record"] > first["last_number"] + 5, "more records")
    kinds = {a["number"]: a["kind"] for a in control.acks("db")}
    assert kinds[first["last_number"] + 1] == "boot"
    client.wait(vm.PowerOffVM_Task())
    assert control.verify_ledger("db")["intact"]


def test_a_shutdown_needs_tools_and_power(client: Client, control: Any, vm: Any) -> None:
    control.set_vm("db", tools="notInstalled")
    with pytest.raises(vim.fault.ToolsUnavailable):
        vm.ShutdownGuest()
    assert vm.guest.toolsStatus == "toolsNotInstalled"
    client.wait(vm.PowerOffVM_Task())
    with pytest.raises(vim.fault.InvalidPowerState):
        vm.ShutdownGuest()
    with pytest.raises(vim.fault.InvalidPowerState):
        client.wait(vm.PowerOffVM_Task())


def test_a_guest_that_hangs_never_goes_down(client: Client, control: Any, vm: Any) -> None:
    control.set_vm("db", shutdown={"hangs": True})
    vm.ShutdownGuest()
    number = control.vm("db")["last_record"]
    eventually(lambda: control.vm("db")["last_record"] > number + 100, "the guest to go on")
    assert vm.runtime.powerState == "poweredOn"


def test_booting_takes_its_time(client: Client, control: Any) -> None:
    control.settings(boot_seconds=1.5)
    control.create_vm("slow", [SIZE], workload=FAST)
    vm = client.vm("slow")
    assert vm.runtime.powerState == "poweredOn"
    assert vm.guest.ipAddress is None
    assert control.vm("slow")["last_record"] is None
    eventually(lambda: vm.guest.ipAddress, "the tools")
    eventually(lambda: control.vm("slow")["last_record"], "the workload")


def test_pausing_stops_the_world_at_once(control: Any, vm: Any) -> None:
    control.pause_guests()
    digest = [control.sha256("db", 0), control.sha256("db", 1)]
    time.sleep(0.1)
    assert [control.sha256("db", 0), control.sha256("db", 1)] == digest
    control.resume_guests()
    number = control.vm("db")["last_record"]
    eventually(lambda: control.vm("db")["last_record"] > number, "records again")


def test_rates_change_live_and_churn_writes_behind_the_ledger(control: Any, vm: Any) -> None:
    control.set_workload("db", records_per_second=0, churn_bytes_per_second=0)
    control.pause_guests()
    control.resume_guests()
    number = control.vm("db")["last_record"]
    before = [control.sha256("db", disk) for disk in (0, 1)]
    control.set_workload("db", churn_bytes_per_second=4 * MIB)
    for disk in (0, 1):
        eventually(lambda disk=disk: control.sha256("db", disk) != before[disk], "churn on both disks")
    assert control.vm("db")["last_record"] == number
    assert control.verify_ledger("db")["intact"]


def test_most_churn_stays_in_the_hot_part(control: Any) -> None:
    control.create_vm(
        "hot", [64 * MIB], workload={"records_per_second": 0, "area_size": MIB, "hot_size": 2 * MIB}
    )

    def parts() -> list[bytes]:
        return [control.guest_read("hot", 0, at, 4 * MIB) for at in range(0, 64 * MIB, 4 * MIB)]

    control.pause_guests()
    before = parts()
    control.set_workload("hot", churn_bytes_per_second=MIB)
    control.resume_guests()
    eventually(lambda: parts()[0] != before[0], "churn in the hot part")
    time.sleep(0.5)  # some 128 more pieces, of which a 64th goes elsewhere
    control.pause_guests()
    after = parts()
    pieces = [
        [at for at in range(0, len(new), 4096) if new[at : at + 4096] != old[at : at + 4096]]
        for old, new in zip(before, after, strict=True)
    ]
    assert len(pieces[0]) > 4 * sum(len(one) for one in pieces[1:])
    control.resume_guests()


def test_a_workload_that_does_not_fit_its_disks_is_refused(control: Any) -> None:
    control.create_vm("tiny", [MIB])
    with pytest.raises(RuntimeError, match="the ledger needs"):
        control.set_workload("tiny", records_per_second=1)


def test_a_power_loss_is_seen_and_may_end_the_epoch(client: Client, control: Any, vm: Any) -> None:
    client.track(vm)
    client.remove(client.snapshot(vm))
    before = control.vm("db")["disks"][0]["change_id"]
    assert control.power_loss() == ["db"]
    assert vm.runtime.powerState == "poweredOff"
    control.power_on("db")
    assert control.vm("db")["disks"][0]["change_id"].rpartition("/")[0] == before.rpartition("/")[0]
    control.settings(crash_changes_epoch=True)
    control.power_loss("db")
    assert control.vm("db")["disks"][0]["change_id"].rpartition("/")[0] != before.rpartition("/")[0]
    assert control.verify_ledger("db")["intact"]


def test_under_reporting_misses_what_is_written_while_consolidating(client: Client, control: Any) -> None:
    control.create_vm("web", [SIZE])
    vm = client.vm("web")
    client.track(vm)
    snapshot = client.snapshot(vm)
    since = control.vm("web")["disks"][0]["change_id"].rpartition("/")[0] + "/1"
    control.guest_fill("web", 0, 0, MIB)
    control.settings(defect_under_report=True, consolidate_mib_per_s=0.5)
    task = snapshot.RemoveSnapshot_Task(removeChildren=False)
    eventually(lambda: (task.info.progress or 0) > 2, "consolidation")
    control.guest_write("web", 0, 10 * MIB, b"missed")
    client.wait(task)
    after = client.snapshot(vm)
    assert client.changed(vm, after, 2000, since, SIZE) == [(0, MIB)]
    assert control.guest_read("web", 0, 10 * MIB, 6) == b"missed"
