"""Microsoft.Compute/disks and snapshots: Empty, Import, Upload, Copy; growth; access by SAS. Real bytes in sparse files."""

from __future__ import annotations

import re
import time
import uuid
from pathlib import Path
from typing import Any

from farshore.lab.azure.disk_sources import GIB, plan_of, write_bytes
from farshore.lab.azure.groups import check_tags, drop_file
from farshore.lab.azure.model import (
    DISK,
    SNAPSHOT,
    VM,
    Answer,
    ArmError,
    Call,
    Json,
    Resource,
    sub,
)
from farshore.lab.azure.operations import KINDS, Kind, Operation, iso
from farshore.lab.azure.paging import page
from farshore.lab.azure.world import World, zones

_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}$")
_SKUS = {
    DISK: ("Standard_LRS", "Premium_LRS", "StandardSSD_LRS", "UltraSSD_LRS", "Premium_ZRS", "StandardSSD_ZRS", "PremiumV2_LRS"),
    SNAPSHOT: ("Standard_LRS", "Premium_LRS", "Standard_ZRS"),
}  # fmt: skip
_SETTABLE = (
    "osType", "hyperVGeneration", "purchasePlan", "supportedCapabilities", "encryptionSettingsCollection", "encryption",
    "diskIOPSReadWrite", "diskMBpsReadWrite", "maxShares", "networkAccessPolicy", "diskAccessId", "tier",
    "burstingEnabled", "supportsHibernation", "securityProfile", "publicNetworkAccess", "dataAccessAuthMode",
    "optimizedForFrequentAttach", "incremental", "availabilityPolicy",
)  # fmt: skip


def _type(call: Call) -> str:
    return DISK if "diskName" in call.params else SNAPSHOT


def _name(call: Call) -> str:
    return call.params.get("diskName") or call.params["snapshotName"]


def disk_id(world: World, call: Call) -> str:
    return world.id_of(_type(call), call.get("resourceGroupName"), _name(call))


def wire(world: World, disk: Resource) -> Json:
    """The document of a disk or snapshot; its diskState follows from attachment and access."""
    out = disk.wire()
    out["properties"] = dict(disk.properties)
    if disk.type == DISK or "diskState" not in out["properties"]:
        out["properties"]["diskState"] = disk_state(world, disk)
    return out


def disk_state(world: World, disk: Resource) -> str:
    """Unattached, Attached, Reserved, ActiveSAS, ReadyToUpload or ActiveUpload."""
    access = active_access(disk)
    if disk.hidden.get("upload"):
        return "ActiveUpload" if access else "ReadyToUpload"
    if access:
        return "ActiveSAS"
    owner = world.store.get(disk.body.get("managedBy"))
    if owner is None:
        return "Unattached"
    return "Reserved" if owner.hidden.get("power") == "deallocated" else "Attached"


def active_access(disk: Resource) -> Json | None:
    access = disk.hidden.get("access")
    return access if access and access["until"] > time.time() else None


def file_of(world: World, disk: Resource) -> Path:
    return world.files / str(disk.hidden["file"])


# PUT


def put(world: World, call: Call) -> Answer:
    group = world.open_group(call.get("resourceGroupName"))
    type_, name, id_ = _type(call), _name(call), disk_id(world, call)
    if not _NAME.match(name):
        raise ArmError(400, "InvalidParameter", f"The name '{name}' is invalid for {type_}.")
    existing = world.store.get(id_)
    location = world.place(group, call.body, existing)
    check_tags(call.body.get("tags"))
    sku = str(sub(call.body, "sku").get("name") or "Standard_LRS")
    if sku not in _SKUS[type_]:
        raise ArmError(400, "InvalidParameter", f"The value '{sku}' of parameter 'sku.name' is invalid.")
    creation = sub(call.body, "properties", "creationData")
    if not creation.get("createOption"):
        raise ArmError(
            400, "InvalidParameter", "Required parameter 'creationData.createOption' is missing (null)."
        )
    if existing is not None:
        same = world.same_request(existing, call.body)
        if same is not None:
            return world.accepted(call, same, 202, wire(world, existing))
        world.compute_busy(existing)
        if existing.state != "Failed":
            return _update(world, call, existing, creation, sku)
    plan = plan_of(world, call, type_, creation, location)
    resource = existing or Resource(id_, type_, group.name, name, {})
    unique = str(uuid.uuid4())
    drop_file(world, resource)
    resource.body = {
        "location": location,
        "sku": _sku(sku),
        "properties": {
            **_settable(call.body),
            "creationData": {k: v for k, v in creation.items() if v is not None},
            "timeCreated": iso(time.time()),
            "uniqueId": unique,
            "provisioningState": "Updating",
            "encryption": {"type": "EncryptionAtRestWithPlatformKey"},
            "networkAccessPolicy": "AllowAll",
            "publicNetworkAccess": "Enabled",
        },
    }  # fmt: skip
    set_size(resource, int(plan["size"]))
    if call.body.get("tags"):
        resource.body["tags"] = dict(call.body["tags"])
    if type_ == DISK and zones(call.body):
        resource.body["zones"] = zones(call.body)
    if type_ == SNAPSHOT and resource.properties.get("incremental"):
        resource.properties["incrementalSnapshotFamilyId"] = plan.get("family", str(uuid.uuid4()))
    resource.hidden = {"file": f"{unique}.raw"}
    if existing is None:
        world.store.create(resource)
    else:
        world.store.put(resource)
    operation = world.start(call, "disk.create", resource, request=call.body, file=f"{unique}.raw", plan=plan)
    return world.accepted(call, operation, 202, wire(world, resource))


def _settable(body: Json) -> Json:
    given = sub(body, "properties")
    return {name: given[name] for name in _SETTABLE if given.get(name) is not None}


def _sku(name: str) -> Json:
    return {"name": name, "tier": name.split("_", 1)[0].replace("StandardSSD", "Standard")}


def set_size(resource: Resource, size: int) -> None:
    resource.properties["diskSizeBytes"] = size
    resource.properties["diskSizeGB"] = max(1, -(-size // GIB))


def _create_work(world: World, operation: Operation) -> int:
    """Put the bytes in place; returns the size. Repeatable: the file appears by renaming."""
    size = write_bytes(world, operation)
    if not operation.running:  # overtaken by a deletion meanwhile
        (world.files / operation.args["file"]).unlink(missing_ok=True)
    return size


def _create_complete(world: World, operation: Operation, size: int) -> Json:
    disk = still_there(world, operation)
    plan = operation.args["plan"]
    for name in ("osType", "hyperVGeneration"):
        if name in plan:
            disk.properties.setdefault(name, plan[name])
    set_size(disk, size)
    disk.state = "Succeeded"
    if plan["option"] == "Upload":
        disk.hidden["upload"] = True
    if disk.type == SNAPSHOT:
        disk.properties["completionPercent"] = 100.0
    world.store.put(disk)
    return wire(world, disk)


def _create_fail(world: World, operation: Operation, _: ArmError) -> None:
    disk = world.store.get(operation.resource)
    if disk is not None:
        disk.state = "Failed"
        world.store.put(disk)


def still_there(world: World, operation: Operation) -> Resource:
    found = world.store.get(operation.resource)
    if found is None:
        raise ArmError(404, "ResourceNotFound", f"The resource '{operation.resource}' went away meanwhile.")
    return found


KINDS["disk.create"] = Kind(15, _create_complete, _create_fail, _create_work)


# update


def _update(world: World, call: Call, disk: Resource, creation: Json, sku: str) -> Answer:
    """PUT on a disk that is there: a full replacement of what may change."""
    held = sub(disk.properties, "creationData")
    for name in ("createOption", "sourceUri", "sourceResourceId", "storageAccountId", "uploadSizeBytes"):
        if str(creation.get(name) or "").lower() != str(held.get(name) or "").lower():
            raise ArmError(
                409, "PropertyChangeNotAllowed", f"Changing property 'creationData.{name}' is not allowed."
            )
    if zones(call.body) != zones(disk.body):
        raise ArmError(409, "PropertyChangeNotAllowed", "Changing property 'zones' is not allowed.")
    changes = {"tags": call.body.get("tags"), "sku": sku, "properties": _settable(call.body), "replace": True}
    return _change(world, call, disk, changes, sub(call.body, "properties").get("diskSizeGB"))


def patch(world: World, call: Call) -> Answer:
    disk = world.require(disk_id(world, call))
    world.compute_busy(disk)
    check_tags(call.body.get("tags"))
    sku = sub(call.body, "sku").get("name")
    if sku is not None and sku not in _SKUS[disk.type]:
        raise ArmError(400, "InvalidParameter", f"The value '{sku}' of parameter 'sku.name' is invalid.")
    changes: Json = {"properties": _settable(call.body), "replace": False}
    if "tags" in call.body:
        changes["tags"] = call.body["tags"]
    if sku is not None:
        changes["sku"] = sku
    return _change(world, call, disk, changes, sub(call.body, "properties").get("diskSizeGB"))


def _change(world: World, call: Call, disk: Resource, changes: Json, size_gb: int | None) -> Answer:
    now_gb = int(disk.properties["diskSizeGB"])
    if size_gb is not None and size_gb < now_gb:
        raise ArmError(
            409,
            "OperationNotAllowed",
            f"Changing disk size to {size_gb} GB is not allowed: disks can't shrink.",
        )
    owner = world.store.get(disk.body.get("managedBy"))
    if owner is not None and owner.hidden.get("power") != "deallocated":
        if size_gb is not None and size_gb > now_gb:
            raise ArmError(
                409,
                "OperationNotAllowed",
                f"Cannot resize disk '{disk.name}' while it is attached to running VM '{owner.id}'.",
            )
        if changes.get("sku", sub(disk.body, "sku").get("name")) != sub(disk.body, "sku").get("name"):
            raise ArmError(
                409,
                "OperationNotAllowed",
                f"Cannot change the SKU of disk '{disk.name}' while VM '{owner.id}' is allocated.",
            )
    operation = world.start(
        call,
        "disk.update",
        disk,
        request=call.body,
        changes=changes,
        grow=size_gb if (size_gb or 0) > now_gb else None,
    )
    disk.state = "Updating"
    world.store.put(disk)
    return world.accepted(call, operation, 202, wire(world, disk))


def _update_complete(world: World, operation: Operation, _: Any) -> Json:
    disk, changes = still_there(world, operation), operation.args["changes"]
    if changes["replace"] or "tags" in changes:
        disk.body.pop("tags", None)
        if changes.get("tags"):
            disk.body["tags"] = changes["tags"]
    if "sku" in changes:
        disk.body["sku"] = _sku(changes["sku"])
    disk.properties.update(changes["properties"])
    if operation.args["grow"]:
        size = operation.args["grow"] * GIB
        with file_of(world, disk).open("r+b") as file:
            file.truncate(size)
        set_size(disk, size)
    disk.state = "Succeeded"
    world.store.put(disk)
    return wire(world, disk)


def _unchanged(world: World, operation: Operation, _: ArmError) -> None:
    """A failed update or access leaves the disk as it was."""
    disk = world.store.get(operation.resource)
    if disk is not None:
        disk.state = "Succeeded"
        world.store.put(disk)


KINDS["disk.update"] = Kind(5, _update_complete, _unchanged)


# read and delete


def get(world: World, call: Call) -> Answer:
    return Answer(200, wire(world, world.require(disk_id(world, call))))


def list_disks(world: World, call: Call) -> Answer:
    type_ = DISK if ".Disks." in call.route.operation else SNAPSHOT
    group = call.params.get("resourceGroupName")
    if group is not None:
        world.group(group)
    found = [r for r in world.store.of_type(type_, group) if world.find(r.id) is not None]
    return page(world, call, [wire(world, r) for r in found])


def delete(world: World, call: Call) -> Answer:
    world.group(call.get("resourceGroupName"))
    disk = world.store.get(disk_id(world, call))
    if disk is None:
        return Answer(204)
    deleting = [o for o in world.engine.running_on(disk.key) if o.kind == "disk.delete"]
    if deleting:
        return world.accepted(call, deleting[0], 202, None)
    world.compute_busy(disk)
    owner = world.store.get(disk.body.get("managedBy"))
    if owner is not None:
        raise ArmError(409, "OperationNotAllowed", f"Disk {disk.name} is attached to VM {owner.id}.")
    if active_access(disk):
        raise ArmError(
            409, "OperationNotAllowed", f"There is an active shared access signature outstanding for disk {disk.name}. "
            "Call EndGetAccess before deleting it."
        )  # fmt: skip
    before = disk.state
    disk.state = "Deleting"
    world.store.put(disk)
    return world.accepted(call, world.start(call, "disk.delete", disk, before=before), 202, None)


def _delete_complete(world: World, operation: Operation, _: Any) -> None:
    disk = world.store.get(operation.resource)
    if disk is not None:
        drop_file(world, disk)
        world.store.remove(disk)


def _delete_fail(world: World, operation: Operation, _: ArmError) -> None:
    disk = world.store.get(operation.resource)
    if disk is not None:
        disk.state = operation.args["before"]
        world.store.put(disk)


KINDS["disk.delete"] = Kind(10, _delete_complete, _delete_fail)


def attached_disks(world: World, vm: Resource) -> list[Resource]:
    """OS disk first, then data disks by LUN."""
    profile = sub(vm.properties, "storageProfile")
    refs = [sub(profile, "osDisk"), *sorted(profile.get("dataDisks") or [], key=lambda d: int(d["lun"]))]
    found = [world.store.get(sub(ref, "managedDisk").get("id")) for ref in refs]
    return [disk for disk in found if disk is not None and vm.type == VM]
