"""A machine's properties as pyVmomi types, hardware apart (`devices`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from farshore.lab.vcenter.vim import long, vim

if TYPE_CHECKING:
    from farshore.lab.vcenter.machine import Machine

_CAPABLE = {
    "snapshotOperationsSupported",
    "multipleSnapshotsSupported",
    "snapshotConfigSupported",
    "poweredOffSnapshotsSupported",
    "memorySnapshotsSupported",
    "revertToSnapshotSupported",
    "quiescedSnapshotsSupported",
    "consolePreferencesSupported",
    "toolsSyncTimeSupported",
    "changeTrackingSupported",
    "bootOptionsSupported",
    "npivWwnOnNonRdmVmSupported",
    "settingVideoRamSizeSupported",
}


def capability(machine: Machine) -> Any:
    """What the machine can do."""
    unset = {"changeTrackingSupported": True}
    names = [p.name for p in vim.vm.Capability._GetPropertyList() if p.type is bool]
    return vim.vm.Capability(**{n: unset.get(n, n in _CAPABLE) for n in names})


def runtime(machine: Machine) -> Any:
    """Power, host, connection, consolidation."""
    with machine.lab.lock:
        return vim.vm.RuntimeInfo(
            host=machine.host.ref,
            connectionState="connected",
            powerState=machine.power,
            faultToleranceState="notConfigured",
            toolsInstallerMounted=False,
            suspendInterval=long(0),
            numMksConnections=0,
            recordReplayState="inactive",
            onlineStandby=False,
            maxCpuUsage=4000 if machine.powered_on else None,
            maxMemoryUsage=machine.memory_mb if machine.powered_on else None,
            consolidationNeeded=machine.tree.consolidation_needed,
        )


def guest(machine: Machine) -> Any:
    """What the tools report, while they run."""
    up = machine.tools_running
    installed = machine.tools != "notInstalled"
    nics: list[Any] = []
    if up:
        nics = [
            vim.vm.GuestInfo.NicInfo(
                network=network_name(machine, nic),
                macAddress=nic["mac"],
                ipAddress=[nic["ip"]] if nic.get("ip") else [],
                connected=True,
                deviceConfigId=nic["key"],
            )
            for nic in machine.nics
        ]
    return vim.vm.GuestInfo(
        toolsStatus="toolsOk" if up else "toolsNotRunning" if installed else "toolsNotInstalled",
        toolsVersionStatus="guestToolsCurrent" if installed else "guestToolsNotInstalled",
        toolsVersionStatus2="guestToolsCurrent" if installed else "guestToolsNotInstalled",
        toolsRunningStatus="guestToolsRunning" if up else "guestToolsNotRunning",
        toolsVersion="12352" if installed else "0",
        guestId=machine.guest_id if up else None,
        guestFamily="windowsGuest" if machine.guest_id.startswith("win") else "linuxGuest",
        guestFullName=machine.guest_full_name if up else None,
        hostName=machine.hostname if up else None,
        ipAddress=next(iter(machine.addresses()), None) if up else None,
        net=nics,
        guestState="running" if up else "notRunning",
        guestOperationsReady=up,
        interactiveGuestOperationsReady=False,
    )


def summary(machine: Machine) -> Any:
    """The short form that lists show."""
    disks = len(machine.disks)
    return vim.vm.Summary(
        vm=machine.ref,
        runtime=runtime(machine),
        guest=vim.vm.Summary.GuestSummary(
            guestId=machine.guest_id if machine.tools_running else None,
            toolsRunningStatus="guestToolsRunning" if machine.tools_running else "guestToolsNotRunning",
            hostName=machine.hostname if machine.tools_running else None,
            ipAddress=next(iter(machine.addresses()), None) if machine.tools_running else None,
        ),
        config=vim.vm.Summary.ConfigSummary(
            name=machine.name,
            template=machine.template,
            vmPathName=machine.vmx,
            memorySizeMB=machine.memory_mb,
            numCpu=machine.num_cpu,
            numEthernetCards=len(machine.nics),
            numVirtualDisks=disks,
            uuid=machine.uuid,
            instanceUuid=machine.instance_uuid,
            guestId=machine.guest_id,
            guestFullName=machine.guest_full_name,
            annotation=machine.annotation,
        ),
        quickStats=vim.vm.Summary.QuickStats(guestHeartbeatStatus=machine.p_guestHeartbeatStatus()),
        overallStatus="green",
    )


def layout(machine: Machine) -> Any:
    """All files of the machine, chains included."""
    files: list[Any] = []
    layouts: list[Any] = []

    def add(name: str, kind: str, size: int) -> int:
        key = len(files)
        files.append(
            vim.vm.FileLayoutEx.FileInfo(key=key, name=name, type=kind, size=long(size), accessible=True)
        )
        return key

    with machine.lab.lock:
        add(machine.vmx, "config", 2048)
        for disk in machine.disks.values():
            chain: list[Any] = []
            for number in reversed(disk.chain(disk.live)):
                keys = [add(machine.file_name(disk, number), "diskDescriptor", 500)]
                if machine.datastore_of(disk).has_extents:
                    extent = f"[{disk.datastore}] {machine.directory}/{disk.extent_name(number)}"
                    keys.append(add(extent, "diskExtent", disk.capacity))
                chain.append(vim.vm.FileLayoutEx.DiskUnit(fileKey=keys))
            layouts.append(vim.vm.FileLayoutEx.DiskLayout(key=disk.key, chain=chain))
        snapshots = [
            vim.vm.FileLayoutEx.SnapshotLayout(key=s.ref, dataKey=-1, memoryKey=-1)
            for s in machine.tree.all()
        ]
    return vim.vm.FileLayoutEx(file=files, disk=layouts, snapshot=snapshots, timestamp=machine.lab.started)


def network_name(machine: Machine, nic: dict[str, Any]) -> str:
    network = machine.lab.find_moid(nic["network"])
    return network.label if network else ""
