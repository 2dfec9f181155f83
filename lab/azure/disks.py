"""Microsoft.Compute/disks and snapshots: Empty, Import, Upload, Copy; growth; access by SAS. Real bytes in sparse files."""

from __future__ import annotations

import re
import secrets
import time
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from farshore.lab.azure import diskfiles
from farshore.lab.azure.groups import check_tags, drop_file
from farshore.lab.azure.model import (
    DISK,
    SNAPSHOT,
    STORAGE,
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
from farshore.lab.azure.ports import BlobRefused
from farshore.lab.azure.world import World, zones

GIB = 1 << 30
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
_MAX_INCREMENTAL = 500


def _type(call: Call) -> str:
    return DISK if "diskName" in call.params else SNAPSHOT


def _name(call: Call) -> str:
    return call.params.get("diskName") or call.params["snapshotName"]


def _id(world: World, call: Call) -> str:
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
    type_, name, id_ = _type(call), _name(call), _id(world, call)
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
    plan = _plan(world, call, type_, creation, location)
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
    _set_size(resource, int(plan["size"]))
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


def _set_size(resource: Resource, size: int) -> None:
    resource.properties["diskSizeBytes"] = size
    resource.properties["diskSizeGB"] = max(1, -(-size // GIB))


def _plan(world: World, call: Call, type_: str, creation: Json, location: str) -> Json:
    """What the creation will do, references checked. Raises: ArmError."""
    option = str(creation["createOption"])
    asked = sub(call.body, "properties").get("diskSizeGB")
    if asked is not None and (not isinstance(asked, int) or not 1 <= asked <= 65_536):
        raise ArmError(400, "InvalidParameter", "The value of parameter 'diskSizeGB' is out of range.")
    if option == "Empty" and type_ == DISK:
        if asked is None:
            raise ArmError(400, "InvalidParameter", "Required parameter 'disk.diskSizeGB' is missing (null).")
        return {"option": option, "size": asked * GIB}
    if option == "Upload" and type_ == DISK:
        return {"option": option, "size": _upload_size(creation)}
    if option == "Import":
        return {
            "option": option,
            "size": (asked or 1) * GIB,
            "asked": asked,
            **_import_source(world, creation),
        }
    if option == "Copy":
        return {
            "option": option,
            **_copy_source(world, type_, call, creation=creation, location=location, asked=asked),
        }
    raise ArmError(
        400, "InvalidParameter", f"The value '{option}' of 'creationData.createOption' is not allowed here."
    )


def _upload_size(creation: Json) -> int:
    size = creation.get("uploadSizeBytes")
    if not isinstance(size, int) or size % diskfiles.MIB != diskfiles.FOOTER or size < 20 * diskfiles.MIB:
        raise ArmError(
            400,
            "InvalidParameter",
            "'creationData.uploadSizeBytes' must be a whole number of MiB plus 512 bytes of footer, at least 20 MiB + 512.",
        )
    return size - diskfiles.FOOTER


def _import_source(world: World, creation: Json) -> Json:
    uri = str(creation.get("sourceUri") or "")
    parts = urlsplit(uri)
    if parts.scheme not in {"http", "https"} or not parts.path:
        raise ArmError(400, "InvalidParameter", f"The source URI '{uri}' is not a blob's URI.")
    query = parse_qs(parts.query)
    if "snapshot" in query and not world.knobs.import_from_snapshot:
        raise ArmError(400, "InvalidParameter", "The source URI of an Import can't be a blob snapshot.")
    account = creation.get("storageAccountId")
    if not account and "sig" not in query:
        raise ArmError(
            400, "InvalidParameter", "Required parameter 'creationData.storageAccountId' is missing (null)."
        )
    if account:
        found = world.store.get(str(account))
        if found is None or found.type != STORAGE:
            raise ArmError(404, "ResourceNotFound", f"The storage account '{account}' was not found.")
        endpoint = str(sub(found.properties, "primaryEndpoints").get("blob") or "")
        if not uri.lower().startswith(endpoint.lower()):
            raise ArmError(
                400,
                "InvalidParameter",
                f"The source blob '{uri}' does not belong to storage account '{account}'.",
            )
    base = f"{parts.scheme}://{parts.netloc}{parts.path}"
    if world.knobs.import_per_minute:
        last, wait = world.imports.get(base, 0.0), 60 * world.knobs.time_scale
        if time.time() < last + wait:
            raise ArmError(
                429,
                "TooManyRequests",
                f"The source blob '{base}' was imported less than a minute ago.",
                headers={"Retry-After": str(max(1, round(last + wait - time.time())))},
            )
        world.imports[base] = time.time()
    return {"uri": uri, "trusted": bool(account)}


def _copy_source(
    world: World, type_: str, call: Call, *, creation: Json, location: str, asked: int | None
) -> Json:
    id_ = str(creation.get("sourceResourceId") or "")
    source = world.store.get(id_)
    if source is None or source.type not in {DISK, SNAPSHOT}:
        raise ArmError(404, "ResourceNotFound", f"The source resource '{id_}' was not found.")
    if source.location != location:
        raise ArmError(
            400, "InvalidParameter", f"The source '{id_}' is in '{source.location}', not in '{location}'."
        )
    if source.state != "Succeeded" or source.hidden.get("upload"):
        raise ArmError(
            409,
            "OperationNotAllowed",
            f"The source '{source.name}' is not ready ({source.state}); it can't be copied.",
        )
    size = int(source.properties["diskSizeBytes"])
    if asked is not None and asked < -(-size // GIB):
        raise ArmError(400, "InvalidParameter", f"The disk size {asked} GB is smaller than the source's.")
    if asked is not None and type_ == DISK and asked > -(-size // GIB):
        size = asked * GIB
    plan: Json = {"from": source.hidden["file"], "size": size}
    if type_ == SNAPSHOT and sub(call.body, "properties").get("incremental"):
        family = [
            s
            for s in world.store.of_type(SNAPSHOT)
            if sub(s.properties, "creationData").get("sourceResourceId", "").lower() == source.key
            and s.properties.get("incremental")
        ]
        if len(family) >= _MAX_INCREMENTAL:
            raise ArmError(
                409,
                "OperationNotAllowed",
                f"The disk '{source.name}' has {len(family)} incremental snapshots already.",
            )
        if family:
            plan["family"] = family[0].properties["incrementalSnapshotFamilyId"]
    for name in ("osType", "hyperVGeneration"):
        if name in source.properties:
            plan[name] = source.properties[name]
    return plan


def _create_work(world: World, operation: Operation) -> int:
    """Put the bytes in place; returns the size. Repeatable: the file appears by renaming."""
    plan, target = operation.args["plan"], world.files / operation.args["file"]
    size = int(plan["size"])
    if plan["option"] == "Import":
        return _import(world, plan, target)
    if plan["option"] == "Copy":
        diskfiles.copy_file(world.files / plan["from"], target)
    else:
        diskfiles.create_empty(target, size + (diskfiles.FOOTER if plan["option"] == "Upload" else 0))
        return size
    with target.open("r+b") as file:
        file.truncate(size)
    return size


def _import(world: World, plan: Json, target: Path) -> int:
    if world.blobs is None:
        raise ArmError(400, "InvalidParameter", "This laboratory has no storage service to import from.")
    try:
        view = world.blobs.open_url(plan["uri"], trusted=plan["trusted"])
        size = diskfiles.check_vhd(view, plan["uri"].split("?", 1)[0])
        asked = plan.get("asked")
        if asked is not None and asked < -(-size // GIB):
            raise ArmError(
                400, "InvalidParameter", f"The disk size {asked} GB is smaller than the VHD's {size} bytes."
            )
        diskfiles.copy_view(view, size, target)
    except BlobRefused as refusal:
        raise ArmError(
            400,
            "InvalidParameter",
            f"The source blob can't be read: {refusal.code}: {refusal.message}",
            details=[{"code": refusal.code, "message": refusal.message}],
        ) from refusal
    if asked is not None and asked > -(-size // GIB):
        size = asked * GIB
        with target.open("r+b") as file:
            file.truncate(size)
    return size


def _create_complete(world: World, operation: Operation, size: int) -> Json:
    disk = _still_there(world, operation)
    plan = operation.args["plan"]
    for name in ("osType", "hyperVGeneration"):
        if name in plan:
            disk.properties.setdefault(name, plan[name])
    _set_size(disk, size)
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


def _still_there(world: World, operation: Operation) -> Resource:
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
    disk = world.require(_id(world, call))
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
    disk, changes = _still_there(world, operation), operation.args["changes"]
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
        _set_size(disk, size)
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
    return Answer(200, wire(world, world.require(_id(world, call))))


def list_disks(world: World, call: Call) -> Answer:
    type_ = DISK if ".Disks." in call.route.operation else SNAPSHOT
    group = call.params.get("resourceGroupName")
    if group is not None:
        world.group(group)
    found = [r for r in world.store.of_type(type_, group) if world.find(r.id) is not None]
    return page(world, call, [wire(world, r) for r in found])


def delete(world: World, call: Call) -> Answer:
    world.group(call.get("resourceGroupName"))
    disk = world.store.get(_id(world, call))
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


# access


def grant(world: World, call: Call) -> Answer:
    disk = world.require(_id(world, call))
    world.compute_busy(disk)
    access, seconds = str(call.body.get("access") or ""), call.body.get("durationInSeconds")
    if access not in {"Read", "Write"}:
        raise ArmError(400, "InvalidParameter", f"The access '{access}' is invalid; Read or Write.")
    if not isinstance(seconds, int) or not 60 <= seconds <= 60 * 86_400:
        raise ArmError(400, "InvalidParameter", "durationInSeconds must be between 60 and 5184000.")
    if access == "Write" and not disk.hidden.get("upload"):
        raise ArmError(
            409,
            "OperationNotAllowed",
            f"Write access is granted to disks created with Upload only; '{disk.name}' isn't one.",
        )
    if access == "Read" and disk.hidden.get("upload"):
        raise ArmError(
            409, "OperationNotAllowed", f"Disk '{disk.name}' waits for its upload; it can't be read."
        )
    if disk.state == "Failed":
        raise ArmError(409, "OperationNotAllowed", f"Disk '{disk.name}' is in state Failed.")
    if disk.type == DISK and disk_state(world, disk) == "Attached":
        raise ArmError(
            409,
            "OperationNotAllowed",
            f"Cannot grant access to disk '{disk.name}': it is attached to a running VM.",
        )
    return world.accepted(
        call, world.start(call, "disk.grant", disk, access=access, seconds=seconds, base=call.base), 202, None
    )


def _grant_complete(world: World, operation: Operation, _: Any) -> Json:
    disk, args = _still_there(world, operation), operation.args
    held: Json | None = active_access(disk)
    if held is None or held["access"] != args["access"]:
        held = {
            "access": args["access"],
            "sig": secrets.token_urlsafe(24),
            "until": time.time() + args["seconds"],
        }
        disk.hidden["access"] = held
        world.store.put(disk)
    until = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(held["until"]))
    rights = "r" if held["access"] == "Read" else "rw"
    url = (
        f"{args['base']}/md-lab/{disk.properties['uniqueId']}/abcd"
        f"?sv=2018-03-28&sr=b&si={disk.properties['uniqueId']}&sp={rights}&se={until}&sig={held['sig']}"
    )
    operation.output = {"accessSAS": url}
    return {"accessSAS": url}


def revoke(world: World, call: Call) -> Answer:
    disk = world.require(_id(world, call))
    world.compute_busy(disk)
    return world.accepted(call, world.start(call, "disk.revoke", disk), 202, None)


def _revoke_work(world: World, operation: Operation) -> int | None:
    """For an uploaded disk: check the footer. Returns the size of its disk."""
    disk = world.store.resources.get(operation.resource.lower())
    if disk is None or not disk.hidden.get("upload") or not disk.hidden.get("access"):
        return None
    path = file_of(world, disk)
    return diskfiles.check_vhd(diskfiles.FileView(path), disk.name)


def _revoke_complete(world: World, operation: Operation, size: int | None) -> None:
    disk = _still_there(world, operation)
    disk.hidden.pop("access", None)
    if size is not None:
        disk.hidden.pop("upload", None)
        with file_of(world, disk).open("r+b") as file:
            file.truncate(size)
        _set_size(disk, size)
    world.store.put(disk)


KINDS["disk.grant"] = Kind(3, _grant_complete, lambda w, o, e: None)
KINDS["disk.revoke"] = Kind(3, _revoke_complete, lambda w, o, e: None, _revoke_work)


def attached_disks(world: World, vm: Resource) -> list[Resource]:
    """OS disk first, then data disks by LUN."""
    profile = sub(vm.properties, "storageProfile")
    refs = [sub(profile, "osDisk"), *sorted(profile.get("dataDisks") or [], key=lambda d: int(d["lun"]))]
    found = [world.store.get(sub(ref, "managedDisk").get("id")) for ref in refs]
    return [disk for disk in found if disk is not None and vm.type == VM]
