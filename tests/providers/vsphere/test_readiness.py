"""Which disks and machines qualify: one line of the table in the vSphere reference (A.2), one test."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from pyVmomi import vim

from farshore.providers.ports import Severity
from farshore.providers.vsphere.inventory import Entry
from farshore.providers.vsphere.machine import Machine
from farshore.providers.vsphere.readiness import assess, judge, machine_reason

DISK = vim.vm.device.VirtualDisk
MIB = 1 << 20


def flat(**fields):
    return DISK.FlatVer2BackingInfo(
        fileName="[ds1] web/web.vmdk", diskMode="persistent", uuid="u-1", **fields
    )


def disk(backing=None, key=2000, **fields):
    label = vim.Description(label=f"Hard disk {key - 1999}", summary="")
    return DISK(
        key=key,
        controllerKey=1000,
        unitNumber=key - 2000,
        capacityInKB=1024,
        capacityInBytes=MIB,
        deviceInfo=label,
        backing=backing or flat(changeId="aa/1"),
        **fields,
    )


def snapshot_tree(*names, description="Farshore replicates web; removed by itself."):
    nodes = [
        vim.vm.SnapshotTree(
            snapshot=vim.vm.Snapshot(f"snapshot-{i}"),
            vm=vim.VirtualMachine("vm-1"),
            name=name,
            description=description,
            id=i,
            createTime=datetime(2026, 1, 1, tzinfo=UTC),
            state="poweredOff",
            quiesced=False,
            replaySupported=False,
        )
        for i, name in enumerate(names)
    ]
    return vim.vm.SnapshotInfo(rootSnapshotList=nodes)


def machine(*devices, **values):
    entry = Entry(vim.VirtualMachine("vm-1"), "web", "DC0/vm/web", "DC0", "u", "i")
    hardware = vim.vm.VirtualHardware(numCPU=1, memoryMB=512, device=list(devices or [disk()]))
    defaults = {
        "config.hardware": hardware,
        "config.changeTrackingEnabled": True,
        "capability.changeTrackingSupported": True,
        "runtime.powerState": "poweredOn",
        "runtime.connectionState": "connected",
        "guest.toolsRunningStatus": "guestToolsRunning",
    }
    return Machine(entry, {**defaults, **{k.replace("__", "."): v for k, v in values.items()}})


REFUSED = [
    (DISK.RawDiskMappingVer1BackingInfo(fileName="[ds1] a.vmdk", diskMode="persistent"), {}, "raw device"),
    (DISK.FlatVer1BackingInfo(fileName="[ds1] a.vmdk", diskMode="persistent"), {}, "version 1"),
    (DISK.SparseVer1BackingInfo(fileName="[ds1] a.vmdk", diskMode="persistent"), {}, "version 1"),
    (DISK.SeSparseBackingInfo(fileName="[ds1] a.vmdk", diskMode="persistent"), {}, "sparse"),
    (flat(), {"ds1": "vsan"}, "vsan"),
    (flat(), {"ds1": "VVOL"}, "VVOL"),
    (flat(sharing="sharingMultiWriter"), {}, "multi-writer"),
]


@pytest.mark.parametrize(("backing", "types", "says"), REFUSED)
def test_a_disk_that_cannot_be_read_is_refused_and_named(backing, types, says):
    assert says in judge(disk(backing), types).reason
    disks, findings = assess(machine(disk(backing)), types, {})
    assert not disks[0].eligible
    assert says in disks[0].reason
    first = findings[0]
    assert first.severity is Severity.ERROR
    assert "Hard disk 1" in first.message and says in first.message


def test_a_flat_disk_on_vmfs_qualifies_without_a_word():
    disks, findings = assess(machine(), {"ds1": "VMFS"}, {})
    assert disks[0].eligible and disks[0].reason == "" and findings == ()


def test_another_datastore_is_accepted_with_a_warning():
    disks, findings = assess(machine(), {"ds1": "NFS"}, {})
    assert disks[0].eligible
    assert findings[0].severity is Severity.WARNING and "NFS" in findings[0].message


def test_an_independent_disk_is_skipped_and_reported_as_unprotected():
    backing = DISK.FlatVer2BackingInfo(fileName="[ds1] b.vmdk", diskMode="independent_persistent")
    disks, findings = assess(machine(disk(), disk(backing, key=2001)), {}, {})
    assert [d.eligible for d in disks] == [True, False]
    assert [(f.severity, "not protected" in f.message) for f in findings] == [(Severity.WARNING, True)]


def test_a_link_above_the_base_is_judged_by_its_base():
    live = DISK.SeSparseBackingInfo(fileName="[ds1] web-000001.vmdk", diskMode="persistent", parent=None)
    live.parent = DISK.SeSparseBackingInfo(fileName="[ds1] web.vmdk", diskMode="persistent")
    assert "sparse" in judge(disk(live), {}).reason
    chained = flat(parent=flat())
    assert judge(disk(chained), {}).reason == ""


def test_a_descriptor_that_cannot_be_read_refuses_the_disk():
    disks, findings = assess(machine(), {}, {2000: "its bytes are in an object store"})
    assert not disks[0].eligible
    assert "object store" in findings[0].message


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"config__template": True}, "template"),
        ({"capability__changeTrackingSupported": False}, "does not support"),
        ({"snapshot": snapshot_tree("before patch")}, "'before patch'"),
        ({"snapshot": snapshot_tree("farshore-web-1-2", "nightly")}, "'nightly'"),
        ({"snapshot": snapshot_tree("farshore-before-patch")}, "'farshore-before-patch'"),
        ({"snapshot": snapshot_tree("farshore-web-1-2", description="")}, "'farshore-web-1-2'"),
        (
            {"snapshot": snapshot_tree("farshore-web-1-2", description="My Farshore copy")},
            "'farshore-web-1-2'",
        ),
    ],
)
def test_a_machine_that_cannot_be_replicated_says_why(values, says):
    assert says in machine_reason(machine(**values))


@pytest.mark.parametrize("name", ["farshore-web-1-2", "farshore-web-12-0-7", "farshore-enable-tracking"])
def test_our_own_snapshot_is_no_obstacle(name):
    assert machine_reason(machine(snapshot=snapshot_tree(name))) == ""


def test_tracking_that_is_not_ready_is_a_warning_not_an_error():
    _, findings = assess(machine(disk(flat())), {"ds1": "VMFS"}, {})
    assert [(f.severity, f.code) for f in findings] == [(Severity.WARNING, "ChangeTrackingNotReady")]


def test_missing_tools_are_a_warning_while_the_machine_runs():
    _, findings = assess(machine(guest__toolsRunningStatus="guestToolsNotRunning"), {}, {})
    assert [f.code for f in findings] == ["GuestToolsNotRunning"]


def test_a_lost_host_is_an_error():
    _, findings = assess(machine(runtime__connectionState="disconnected"), {}, {})
    assert [(f.severity, f.code) for f in findings] == [(Severity.ERROR, "SourceUnreachable")]
