"""A machine's virtual hardware as pyVmomi types, live or as a snapshot froze it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from farshore.lab.vcenter.vim import array, long, vim

if TYPE_CHECKING:
    from farshore.lab.vcenter.disks import Disk
    from farshore.lab.vcenter.machine import Machine

Disks = Any
_VD: Any = vim.vm.device.VirtualDisk


def backing(machine: Machine, disk: Disk, link: int, change_id: str | None) -> Any:
    """Backing of a disk at `link`, with its parents."""
    store = machine.datastore_of(disk)
    common: dict[str, Any] = {"datastore": store.ref, "diskMode": disk.mode}
    if disk.backing == "rdm_physical":
        return _VD.RawDiskMappingVer1BackingInfo(
            fileName=machine.file_name(disk, link),
            lunUuid="02000000006006016",
            deviceName="vml.02000000006006016",
            compatibilityMode="physicalMode",
            uuid=disk.uuid,
            **common,
        )
    if disk.backing == "flat_v1":
        return _VD.FlatVer1BackingInfo(fileName=machine.file_name(disk, link), **common)
    result: Any = None
    for number in reversed(disk.chain(link)):
        kind = _VD.FlatVer2BackingInfo
        fields: dict[str, Any] = {
            "fileName": machine.file_name(disk, number),
            "uuid": disk.uuid,
            "changeId": change_id if number == link else None,
            "parent": result,
            **common,
        }
        if number == 0:
            fields["thinProvisioned"] = disk.thin
            fields["writeThrough"] = False
            fields["split"] = False
        else:
            kind = _VD.SeSparseBackingInfo if disk.backing == "sesparse" else kind
        result = kind(**fields)
    return result


def disk_device(machine: Machine, disk: Disk, link: int, change_id: str | None, capacity: int) -> Any:
    return _VD(
        key=disk.key,
        deviceInfo=vim.Description(label=disk.label, summary=f"{capacity // 1024:,} KB"),
        backing=backing(machine, disk, link, change_id),
        controllerKey=disk.controller,
        unitNumber=disk.unit,
        capacityInKB=long(capacity // 1024),
        capacityInBytes=long(capacity),
        diskObjectId=f"{machine.number}-{disk.key}",
        shares=vim.SharesInfo(shares=1000, level="normal"),
    )


def devices(machine: Machine, view: dict[str, Any] | None = None) -> Any:
    """All devices; `view` is the frozen state of the disks in a snapshot."""
    result = array(vim.vm.device.VirtualDevice)
    disks: list[Any] = []
    for disk in machine.disks.values():
        if view is None:
            change_id = disk.cbt.change_id if disk.cbt else None
            disks.append(disk_device(machine, disk, disk.live, change_id, disk.capacity))
        elif (frozen := view.get(str(disk.key))) is not None:
            disks.append(disk_device(machine, disk, frozen["link"], frozen["change_id"], frozen["capacity"]))
        elif disk.mode.startswith("independent"):
            disks.append(disk_device(machine, disk, disk.live, None, disk.capacity))
    result.append(
        vim.vm.device.VirtualPCIController(
            key=100,
            busNumber=0,
            deviceInfo=vim.Description(label="PCI controller 0", summary="PCI controller 0"),
        )
    )
    result.append(
        vim.vm.device.ParaVirtualSCSIController(
            key=1000,
            busNumber=0,
            controllerKey=100,
            unitNumber=3,
            sharedBus="noSharing",
            hotAddRemove=True,
            scsiCtlrUnitNumber=7,
            device=[d.key for d in disks],
            deviceInfo=vim.Description(label="SCSI controller 0", summary="VMware paravirtual SCSI"),
        )
    )
    result.extend(disks)
    for nic in machine.nics:
        network = machine.lab.find_moid(nic["network"])
        name = network.label if network else ""
        result.append(
            vim.vm.device.VirtualVmxnet3(
                key=nic["key"],
                controllerKey=100,
                unitNumber=7 + nic["key"] - 4000,
                macAddress=nic["mac"],
                addressType="assigned",
                wakeOnLanEnabled=True,
                connectable=vim.vm.device.VirtualDevice.ConnectInfo(
                    startConnected=True, allowGuestControl=True, connected=machine.powered_on, status="ok"
                ),
                backing=vim.vm.device.VirtualEthernetCard.NetworkBackingInfo(
                    deviceName=name, network=vim.Network(nic["network"])
                ),
                deviceInfo=vim.Description(label=f"Network adapter {nic['key'] - 3999}", summary=name),
            )
        )
    return result


def config(machine: Machine, view: dict[str, Any] | None = None, when: Any = None) -> Any:
    """`vim.vm.ConfigInfo`, live or of a snapshot."""
    return vim.vm.ConfigInfo(
        changeVersion=str(machine.generation),
        modified=when or machine.lab.started,
        name=machine.name,
        guestFullName=machine.guest_full_name,
        version="vmx-19",
        uuid=machine.uuid,
        instanceUuid=machine.instance_uuid,
        npivTemporaryDisabled=True,
        template=machine.template,
        guestId=machine.guest_id,
        alternateGuestName="",
        annotation=machine.annotation,
        files=vim.vm.FileInfo(
            vmPathName=machine.vmx,
            snapshotDirectory=machine.vmx.rpartition("/")[0] + "/",
            suspendDirectory=machine.vmx.rpartition("/")[0] + "/",
            logDirectory=machine.vmx.rpartition("/")[0] + "/",
        ),
        tools=vim.vm.ToolsConfigInfo(toolsVersion=12352),
        flags=vim.vm.FlagInfo(),
        defaultPowerOps=vim.vm.DefaultPowerOpInfo(powerOffType="soft", defaultPowerOffType="soft"),
        hardware=vim.vm.VirtualHardware(
            numCPU=machine.num_cpu,
            numCoresPerSocket=1,
            memoryMB=machine.memory_mb,
            device=devices(machine, view),
        ),
        firmware=machine.firmware,
        changeTrackingEnabled=machine.cbt,
        extraConfig=[vim.option.OptionValue(key=k, value=v) for k, v in machine.extra.items()],
        datastoreUrl=[
            vim.vm.ConfigInfo.DatastoreUrlPair(name=d.name, url=f"/vmfs/volumes/{d.uuid}")
            for d in machine.datastores()
        ],
    )
