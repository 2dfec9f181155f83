"""Making, registering and reconfiguring machines, from API specifications and from the control API."""

from __future__ import annotations

import hashlib
import uuid
from typing import TYPE_CHECKING, Any

from farshore.lab.vcenter.disks import Disk
from farshore.lab.vcenter.machine import OFF, Machine
from farshore.lab.vcenter.vim import make_fault, vim

if TYPE_CHECKING:
    from farshore.lab.vcenter.inventory import Datacenter, Folder, Host
    from farshore.lab.vcenter.service import LabVCenter

MIN_DISK = 1 << 20


def create(lab: LabVCenter, spec: dict[str, Any], *, folder: Folder | None = None) -> Machine:
    """Create a machine, powered off.

    `spec`: name, disks ([{size, label?, datastore?, mode?, backing?}]), networks, and any field of the record such as
    guest_id, num_cpu, memory_mb, firmware, tools, hostname, annotation, extra, shutdown; datacenter, datastore, host.
    Raises `ValueError`, or a fault for a name that is taken.
    """
    name = str(spec["name"])
    datacenter = _datacenter(lab, spec.get("datacenter"))
    parent = folder or _folder(lab, datacenter, spec.get("folder"))
    if any(e.name == name for e in parent.children()):
        raise make_fault(
            "vim.fault.DuplicateName", f"The name '{name}' already exists.", name=name, object=parent.ref
        )
    store = spec.get("datastore") or next(iter(datacenter.datastores))
    if store not in datacenter.datastores:
        raise ValueError(f"no datastore {store!r} in {datacenter.name}")
    host = _host(datacenter, spec.get("host"), lab)
    number = lab.next_number()
    directory = _free_directory(lab, store, name)
    seed = f"{lab.instance_uuid}/{number}"
    record: dict[str, Any] = {
        key: spec[key]
        for key in (
            "guest_id", "guest_full_name", "num_cpu", "memory_mb", "firmware", "tools", "hostname", "annotation",
            "extra", "shutdown", "template",
        )
        if key in spec
    }  # fmt: skip
    record |= {
        "moid": f"vm-{number}",
        "name": name,
        "directory": directory,
        "datastore": store,
        "uuid": spec.get("uuid") or str(uuid.uuid5(uuid.NAMESPACE_OID, seed)),
        "instance_uuid": str(uuid.uuid5(uuid.NAMESPACE_URL, seed)),
        "power": OFF,
        "nics": [_nic(datacenter, n, i, number) for i, n in enumerate(spec.get("networks") or [])],
        "disks": [_disk(directory, d, i, store, datacenter) for i, d in enumerate(spec.get("disks") or [])],
    }
    machine = Machine(lab, record, parent, host)
    for disk in machine.disks.values():
        disk.create()
    lab.enlist(machine)
    machine.save()
    return machine


def create_from_spec(lab: LabVCenter, folder: Folder, spec: Any) -> Machine:
    """`CreateVM_Task`: disks and network cards of the specification are honoured."""
    datacenter = _datacenter_of(folder)
    disks: list[dict[str, Any]] = []
    networks: list[str] = []
    for change in spec.deviceChange or ():
        device = change.device
        if isinstance(device, vim.vm.device.VirtualDisk):
            size = device.capacityInBytes or (device.capacityInKB or 0) * 1024
            disks.append({"size": int(size), "thin": bool(getattr(device.backing, "thinProvisioned", True))})
        elif isinstance(device, vim.vm.device.VirtualEthernetCard):
            networks.append(device.backing.deviceName)
    store = None
    if spec.files is not None and spec.files.vmPathName:
        store = spec.files.vmPathName.partition("]")[0].lstrip("[")
    fields = {
        "guest_id": spec.guestId,
        "num_cpu": spec.numCPUs,
        "memory_mb": spec.memoryMB,
        "firmware": spec.firmware,
        "annotation": spec.annotation,
        "uuid": spec.uuid,
    }
    wanted: dict[str, Any] = {k: v for k, v in fields.items() if v is not None}
    wanted |= {"name": spec.name, "datacenter": datacenter.path(), "datastore": store, "disks": disks}
    wanted["networks"] = networks
    try:
        machine = create(lab, wanted, folder=folder)
    except (ValueError, KeyError) as error:
        raise make_fault("vmodl.fault.InvalidArgument", str(error), invalidProperty="config") from error
    if spec.changeTrackingEnabled:
        machine.set_change_tracking(True)
    return machine


def register(lab: LabVCenter, folder: Folder, path: str, name: str | None) -> Machine:
    """`RegisterVM_Task` of a machine that was unregistered."""
    machine = next((m for m in lab.withdrawn() if m.vmx == path), None)
    if machine is None:
        if any(m.vmx == path for m in lab.machines()):
            raise make_fault(
                "vim.fault.AlreadyExists", "The specified key, name, or identifier already exists.", name=path
            )
        raise make_fault("vim.fault.NotFound", f"Unable to find {path}.")
    wanted = name or machine.name
    if any(e.name == wanted for e in folder.children()):
        raise make_fault(
            "vim.fault.DuplicateName", f"The name '{wanted}' already exists.", name=wanted, object=folder.ref
        )
    machine.name, machine.parent, machine.registered = wanted, folder, True
    lab.enlist(machine)
    machine.save()
    return machine


def reconfigure(machine: Machine, spec: Any) -> None:
    """`ReconfigVM_Task`: change tracking, name, sizes, annotation, extra config, disks added, removed, grown."""
    if spec.changeTrackingEnabled is not None and spec.changeTrackingEnabled != machine.cbt:
        machine.set_change_tracking(bool(spec.changeTrackingEnabled))
    if (spec.numCPUs or spec.memoryMB) and machine.powered_on:
        raise make_fault("vim.fault.InvalidPowerState", "Processors and memory cannot be changed while powered on.",
                         requestedState="poweredOff", existingState="poweredOn")  # fmt: skip
    machine.name = spec.name or machine.name
    machine.num_cpu = spec.numCPUs or machine.num_cpu
    machine.memory_mb = int(spec.memoryMB or machine.memory_mb)
    machine.annotation = machine.annotation if spec.annotation is None else spec.annotation
    for option in spec.extraConfig or ():
        machine.extra[option.key] = str(option.value)
    for change in spec.deviceChange or ():
        if isinstance(change.device, vim.vm.device.VirtualDisk):
            _change_disk(machine, change)
    machine.save()


def _change_disk(machine: Machine, change: Any) -> None:
    device = change.device
    size = int(device.capacityInBytes or (device.capacityInKB or 0) * 1024)
    if change.operation == "add":
        add_disk(machine, {"size": size})
        return
    disk = machine.disks.get(device.key)
    if disk is None:
        raise make_fault(
            "vim.fault.InvalidDeviceSpec", "Invalid configuration for device '0'.", deviceIndex=0
        )
    if change.operation == "edit":
        if size != disk.capacity:
            machine.extend(disk, size)
        return
    remove_disk(machine, disk, destroy=change.fileOperation == "destroy")


def add_disk(machine: Machine, spec: dict[str, Any]) -> Disk:
    """Attach a new, empty disk. Change tracking of it starts with the next stun."""
    index = max((d.unit for d in machine.disks.values()), default=-1) + 1
    try:
        item = _disk(machine.directory, spec, index, machine.datastore, machine.datacenter)
    except ValueError as error:
        raise make_fault("vim.fault.InvalidDeviceSpec", str(error), deviceIndex=0) from error
    with machine.io, machine.lab.lock:
        disk = Disk(machine.store_path(item["datastore"]), machine.state_path, item)
        disk.create()
        machine.disks[disk.key] = disk
        if not machine.powered_on:
            machine.stun(seal=False)
        machine.save()
    return disk


def remove_disk(machine: Machine, disk: Disk, *, destroy: bool) -> None:
    """Detach a disk; refused while there are snapshots."""
    if machine.tree.all():
        raise make_fault("vim.fault.InvalidSnapshotState", "The machine has snapshots.")
    with machine.io, machine.lab.lock:
        del machine.disks[disk.key]
        machine.save()
        if destroy:
            disk.remove()
        else:
            disk.close()


def _disk(
    directory: str, spec: dict[str, Any] | int, index: int, store: str, datacenter: Datacenter
) -> dict[str, Any]:
    item: dict[str, Any] = {"size": spec} if isinstance(spec, int) else dict(spec)
    size = int(item["size"])
    if size < MIN_DISK or size % 512:
        raise ValueError(f"a disk of {size} bytes: at least 1 MiB and whole sectors are needed")
    place = item.get("datastore", store)
    if place not in datacenter.datastores:
        raise ValueError(f"no datastore {place!r} in {datacenter.name}")
    unit = index if index < 7 else index + 1  # unit 7 is the controller's own
    stem = f"{directory}_{index}" if index else directory
    return {
        "key": 2000 + unit,
        "unit": unit,
        "label": item.get("label") or f"Hard disk {index + 1}",
        "stem": stem,
        "datastore": place,
        "uuid": f"6000C29{hashlib.sha256(f'{directory}/{stem}/{uuid.uuid4()}'.encode()).hexdigest()[:25]}",
        "capacity": size,
        "mode": item.get("mode", "persistent"),
        "backing": item.get("backing", "flat"),
        "thin": item.get("thin", True),
    }


def _nic(datacenter: Datacenter, spec: str | dict[str, Any], index: int, number: int) -> dict[str, Any]:
    item: dict[str, Any] = {"network": spec} if isinstance(spec, str) else dict(spec)
    network = datacenter.networks.get(item["network"])
    if network is None:
        raise ValueError(f"no network {item['network']!r} in {datacenter.name}")
    digest = hashlib.sha256(f"{number}/{index}".encode()).digest()
    mac = item.get("mac") or "00:50:56:" + ":".join(
        f"{b:02x}" for b in (digest[0] & 0x3F, digest[1], digest[2])
    )
    ip = item.get("ip") or f"10.{index}.{number >> 8 & 255}.{number & 255}"
    return {"key": 4000 + index, "network": network.moid, "mac": mac, "ip": ip}


def _datacenter(lab: LabVCenter, path: str | None) -> Datacenter:
    if path is None:
        return next(iter(lab.tree.datacenters.values()))
    found = lab.tree.datacenter(path) or next(
        (d for d in lab.tree.datacenters.values() if d.name == path), None
    )
    if found is None:
        raise ValueError(f"no datacenter {path!r}")
    return found


def _datacenter_of(folder: Folder) -> Datacenter:
    from farshore.lab.vcenter.inventory import Datacenter

    node: Any = folder
    while node is not None and not isinstance(node, Datacenter):
        node = node.parent
    if node is None:
        raise make_fault(
            "vmodl.fault.InvalidArgument", "The folder is in no datacenter.", invalidProperty="folder"
        )
    return node


def _folder(lab: LabVCenter, datacenter: Datacenter, path: str | None) -> Folder:
    from farshore.lab.vcenter.inventory import Folder

    node = datacenter.vm_folder
    for part in [p for p in (path or "").split("/") if p]:
        found = next((c for c in node.children() if c.name == part and isinstance(c, Folder)), None)
        node = found or lab.tree.add_folder(node, part)
    return node


def _host(datacenter: Datacenter, name: str | None, lab: LabVCenter) -> Host:
    hosts = [h for c in datacenter.clusters.values() for h in c.hosts.values()]
    if name is None:
        return hosts[len(lab.machines()) % len(hosts)]
    found = next((h for h in hosts if name in (h.name, h.moid)), None)
    if found is None:
        raise ValueError(f"no host {name!r} in {datacenter.name}")
    return found


def _free_directory(lab: LabVCenter, store: str, name: str) -> str:
    """A directory of the machine's name, numbered when that is taken, as vCenter does it."""
    base = name.replace("/", "_")
    candidate, suffix = base, 0
    while lab.machine_in(store, candidate) is not None:
        suffix += 1
        candidate = f"{base}_{suffix}"
    return candidate
