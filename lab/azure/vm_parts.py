"""What a machine is made of: its body, its disks and interfaces, checked, and marked as its own."""

from __future__ import annotations

from farshore.lab.azure import catalog, disks, network
from farshore.lab.azure.model import DISK, NIC, VM, ArmError, Call, Json, Resource, items, reference, sub
from farshore.lab.azure.operations import Operation
from farshore.lab.azure.world import World, zones

_KEPT = (
    "hardwareProfile", "additionalCapabilities", "securityProfile", "diagnosticsProfile", "availabilitySet",
    "proximityPlacementGroup", "priority", "evictionPolicy", "billingProfile", "licenseType", "userData",
    "capacityReservation", "extensionsTimeBudget",
)  # fmt: skip


def body_of(world: World, call: Call, vm: Resource, location: str) -> Json:
    given = sub(call.body, "properties")
    if not sub(given, "hardwareProfile").get("vmSize"):
        raise ArmError(
            400, "InvalidParameter", "Required parameter 'hardwareProfile.vmSize' is missing (null)."
        )
    if given.get("osProfile"):
        raise ArmError(
            400,
            "InvalidParameter",
            "Parameter 'osProfile' is not allowed: the machine is made from a specialized disk.",
        )
    body: Json = {"location": location}
    if call.body.get("tags"):
        body["tags"] = dict(call.body["tags"])
    if zones(call.body):
        body["zones"] = zones(call.body)
    if call.body.get("identity"):
        body["identity"] = call.body["identity"]
    properties: Json = {name: given[name] for name in _KEPT if given.get(name) is not None}
    properties["storageProfile"] = storage_of(world, vm, sub(given, "storageProfile"))
    nics = items(sub(given, "networkProfile"), "networkInterfaces")
    if not nics:
        raise ArmError(
            400,
            "InvalidParameter",
            "Required parameter 'networkProfile.networkInterfaces' is missing (null).",
        )
    properties["networkProfile"] = {"networkInterfaces": [_nic_reference(nic, len(nics)) for nic in nics]}
    body["properties"] = properties
    return body


def _nic_reference(nic: Json, count: int) -> Json:
    given = {k: v for k, v in sub(nic, "properties").items() if v is not None}
    given.setdefault("primary", count == 1)
    return {"id": str(nic.get("id") or ""), "properties": given}


def storage_of(world: World, vm: Resource, given: Json) -> Json:
    os_disk = {k: v for k, v in sub(given, "osDisk").items() if v is not None}
    if os_disk.get("createOption") != "Attach":
        raise ArmError(
            400, "InvalidParameter", "The laboratory makes machines from specialized disks only: osDisk.createOption must "
            f"be Attach, not '{os_disk.get('createOption')}'.",
        )  # fmt: skip
    if os_disk.get("osType") not in {"Linux", "Windows"}:
        raise ArmError(400, "InvalidParameter", "Required parameter 'osDisk.osType' is missing (null).")
    out: Json = {"osDisk": _disk_entry(world, vm, os_disk), "dataDisks": []}
    luns: set[int] = set()
    for entry in items(given, "dataDisks"):
        data = {k: v for k, v in entry.items() if v is not None}
        lun = data.get("lun")
        if not isinstance(lun, int) or not 0 <= lun <= 63:
            raise ArmError(
                400, "InvalidParameter", f"The value '{lun}' of parameter 'dataDisk.lun' is invalid."
            )
        if lun in luns:
            raise ArmError(409, "ConflictingUserInput", f"More than one data disk uses LUN {lun}.")
        luns.add(lun)
        if data.get("createOption") != "Attach":
            raise ArmError(
                400,
                "InvalidParameter",
                f"dataDisk.createOption '{data.get('createOption')}' is not served here.",
            )
        out["dataDisks"].append(_disk_entry(world, vm, data))
    return out


def _disk_entry(world: World, vm: Resource, entry: Json) -> Json:
    id_ = reference(entry.get("managedDisk"))
    disk = world.store.get(id_)
    if disk is None or disk.type != DISK:
        raise ArmError(404, "NotFound", f"Disk {id_} is not found.")
    out: Json = {**entry, "name": disk.name, "diskSizeGB": disk.properties["diskSizeGB"]}
    out["managedDisk"] = {"id": disk.id, "storageAccountType": sub(disk.body, "sku")["name"]}
    out.setdefault("caching", "None")
    out.setdefault("deleteOption", "Detach")
    return out


def check_disks(world: World, vm: Resource, zone: str | None, size: catalog.Size) -> list[Resource]:
    """Disks the machine names, each fit to be attached. Raises: ArmError."""
    attached = disks.attached_disks(world, vm)
    if len({disk.key for disk in attached}) != len(attached):
        raise ArmError(409, "ConflictingUserInput", "A disk is attached twice.")
    if len(attached) - 1 > size.data_disks:
        raise ArmError(
            409, "OperationNotAllowed", f"The maximum number of data disks allowed to be attached to a VM of size "
            f"{size.name} is {size.data_disks}.",
        )  # fmt: skip
    for disk in attached:
        owner = world.store.get(disk.body.get("managedBy"))
        if owner is not None and owner.key != vm.key:
            raise ArmError(
                409, "ConflictingUserInput", f"Disk '{disk.name}' cannot be attached as the disk is already owned by VM "
                f"'{owner.id}'.",
            )  # fmt: skip
        if disk.location != vm.location:
            raise ArmError(400, "InvalidParameter", f"Disk '{disk.id}' is not in location '{vm.location}'.")
        if zones(disk.body) and zones(disk.body) != ([zone] if zone else []):
            raise ArmError(
                400, "BadRequest", f"Disk '{disk.id}' is in zone {zones(disk.body)}, the machine in {zone}."
            )
        if disk.state != "Succeeded":
            raise ArmError(
                409,
                "OperationNotAllowed",
                f"Disk '{disk.name}' is in state '{disk.state}'; it can't be attached.",
            )
        if disk.hidden.get("upload") or disks.active_access(disk):
            raise ArmError(
                409,
                "OperationNotAllowed",
                f"Disk '{disk.name}' has outstanding access or upload; it can't be attached.",
            )
    return attached


def check_nics(world: World, vm: Resource, location: str) -> list[Resource]:
    out: list[Resource] = []
    references = items(sub(vm.properties, "networkProfile"), "networkInterfaces")
    if sum(bool(nic["properties"].get("primary")) for nic in references) != 1:
        raise ArmError(
            400, "VirtualMachineMustHaveOneNetworkInterfaceAsPrimary", f"{vm.id} needs one primary interface."
        )
    for nic_ref in references:
        nic = world.store.get(nic_ref["id"])
        if nic is None or nic.type != NIC:
            raise ArmError(
                404, "NotFound", f"Network Interface {nic_ref['id']} was not found; {vm.id} references it."
            )
        user = reference(nic.properties.get("virtualMachine"))
        if user and user.lower() != vm.key:
            raise ArmError(
                400, "NicInUse", f"Network Interface {nic.id} is used by existing resource {user}."
            )
        if nic.location != location:
            raise ArmError(
                400, "InvalidParameter", f"Network Interface {nic.id} is not in location '{location}'."
            )
        network.check_settled(world, nic, vm.id)
        nic_ref["id"] = nic.id
        out.append(nic)
    return out


def hold(world: World, vm: Resource, attached: list[Resource], nics: list[Resource]) -> None:
    """Mark disks and interfaces as the machine's."""
    for disk in attached:
        disk.body["managedBy"] = vm.id
        disk.hidden.pop("access", None)
        world.store.put(disk)
    for nic in nics:
        nic.properties["virtualMachine"] = {"id": vm.id}
        nic.properties["primary"] = any(
            r["id"].lower() == nic.key and r["properties"].get("primary")
            for r in items(sub(vm.properties, "networkProfile"), "networkInterfaces")
        )
        world.store.put(nic)


def let_go(world: World, vm: Resource) -> None:
    for disk in world.store.of_type(DISK):
        if str(disk.body.get("managedBy") or "").lower() == vm.key:
            del disk.body["managedBy"]
            world.store.put(disk)
    for nic in world.store.of_type(NIC):
        if (reference(nic.properties.get("virtualMachine")) or "").lower() == vm.key:
            del nic.properties["virtualMachine"]
            world.store.put(nic)


def vm_id(world: World, call: Call) -> str:
    return world.id_of(VM, call.get("resourceGroupName"), call.get("vmName"))


def still_there(world: World, operation: Operation) -> Resource:
    found = world.store.get(operation.resource)
    if found is None:
        raise ArmError(404, "ResourceNotFound", f"The machine '{operation.resource}' went away meanwhile.")
    return found
