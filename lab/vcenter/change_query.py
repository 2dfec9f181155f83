"""`QueryChangedDiskAreas`: what changed on a disk between a change id and a snapshot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from farshore.lab.vcenter.bitmap import BLOCK, blocks, runs
from farshore.lab.vcenter.cbt import StaleChangeIdError
from farshore.lab.vcenter.disks import Disk
from farshore.lab.vcenter.snapshots import Snapshot
from farshore.lab.vcenter.vim import invalid_argument, make_fault, vim

if TYPE_CHECKING:
    from farshore.lab.vcenter.machine import Machine


def answer(machine: Machine, device_key: int, start_offset: int, change_id: str, snapshot: Any) -> Any:
    """One window of changed areas, as a real answer covers it. Raises `InvalidArgument` and `FileFault`."""
    disk = machine.disks.get(device_key)
    if disk is None:
        raise invalid_argument("deviceKey")
    with machine.io:
        link, until, capacity = _point(machine, disk, snapshot)
        if not 0 <= start_offset < capacity:
            raise invalid_argument("startOffset")
        settings = machine.lab.settings
        if change_id == "*":
            changed = disk.allocated(link)
        else:
            assert disk.cbt is not None
            try:
                changed = disk.cbt.changed(change_id, until)
            except StaleChangeIdError as error:
                raise _stale(machine, disk, link) from error
    window = settings.cbt_window or capacity
    end = min(capacity, start_offset + window)
    if machine.datastore_of(disk).kind == "nfs_whole":
        areas = [(start_offset, end - start_offset)]
    else:
        if settings.defect_over_report:
            changed |= (changed << 1 | changed >> 1) & ((1 << blocks(capacity)) - 1)
        first = start_offset // BLOCK
        part = (changed >> first) & ((1 << (blocks(end) - first)) - 1)
        areas = []
        for bit, count in runs(part):
            start = max(start_offset, (first + bit) * BLOCK)
            areas.append((start, min(end, (first + bit + count) * BLOCK) - start))
    extent = vim.VirtualMachine.DiskChangeInfo.DiskChangeExtent
    return vim.VirtualMachine.DiskChangeInfo(
        startOffset=start_offset,
        length=end - start_offset,
        changedArea=[extent(start=start, length=length) for start, length in areas],
    )


def _point(machine: Machine, disk: Disk, snapshot: Any) -> tuple[int, int, int]:
    """(link, change number, capacity) that a query is about."""
    if snapshot is None:
        if machine.powered_on or disk.cbt is None:
            raise _file_fault(machine, disk, disk.live)
        return disk.live, disk.cbt.number, disk.capacity
    found = machine.lab.find(snapshot)
    if not isinstance(found, Snapshot) or found.machine is not machine:
        raise invalid_argument("snapshot")
    frozen = found.view.get(str(disk.key))
    if frozen is None:
        raise invalid_argument("deviceKey")
    change_id: str | None = frozen["change_id"]
    if change_id is None or disk.cbt is None:
        raise _file_fault(machine, disk, frozen["link"])
    try:
        until = disk.cbt.parse(change_id)
    except StaleChangeIdError as error:
        raise _file_fault(machine, disk, frozen["link"]) from error
    return frozen["link"], until, frozen["capacity"]


def _stale(machine: Machine, disk: Disk, link: int) -> Any:
    if machine.lab.settings.stale_id_fault == "vim.fault.FileFault":
        return _file_fault(machine, disk, link)
    return invalid_argument("changeId")


def _file_fault(machine: Machine, disk: Disk, link: int) -> Any:
    path = f"/vmfs/volumes/{machine.datastore_of(disk).uuid}/{machine.directory}/{disk.descriptor_name(link)}"
    return make_fault("vim.fault.FileFault", f"Error caused by file {path}", file=path)
