"""Microsoft.Compute/virtualMachines on specialised disks: creation, change, deletion, reading."""

from __future__ import annotations

import re
import time
import uuid
from typing import Any

from farshore.lab.azure import catalog, vm_power, vm_view
from farshore.lab.azure import vm_parts as parts
from farshore.lab.azure.groups import check_tags, drop_file
from farshore.lab.azure.model import (
    VM,
    Answer,
    ArmError,
    Call,
    Json,
    Resource,
    items,
    reference,
    sub,
)
from farshore.lab.azure.operations import KINDS, Kind, Operation, iso
from farshore.lab.azure.paging import page
from farshore.lab.azure.world import World, zones

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")


# PUT


def put(world: World, call: Call) -> Answer:
    group = world.open_group(call.get("resourceGroupName"))
    id_ = parts.vm_id(world, call)
    existing = world.store.get(id_)
    check_preconditions(call, existing)
    if not _NAME.match(call.get("vmName")):
        raise ArmError(
            400, "InvalidParameter", f"The name '{call.get('vmName')}' is invalid for a virtual machine."
        )
    location = world.place(group, call.body, existing)
    check_tags(call.body.get("tags"))
    if existing is not None:
        same = world.same_request(existing, call.body)
        if same is not None:
            return world.accepted(call, same, 200, wire(world, existing), "async")
        world.compute_busy(existing)
    vm = Resource(id_, VM, group.name, call.get("vmName"), {})
    vm.body = parts.body_of(world, call, vm, location)
    size = catalog.size_of(str(vm.properties["hardwareProfile"]["vmSize"]), location)
    zone = (zones(call.body) or [None])[0]
    attached = parts.check_disks(world, vm, zone, size)
    nics = parts.check_nics(world, vm, location)
    catalog.check_quota(world, location, size, without=vm.key)
    if existing is not None and existing.state != "Failed":
        return _replace(world, call, existing, vm, attached=attached, nics=nics)
    refusal = catalog.shortage(world, location, size, zone, "first")
    if refusal is not None:
        raise refusal
    vm.hidden = {"power": "creating"}
    vm.properties["vmId"] = str(uuid.uuid4())
    vm.properties["timeCreated"] = iso(time.time())
    vm.state = "Creating"
    if existing is None:
        world.store.create(vm)
    else:
        parts.let_go(world, existing)
        vm.created = existing.created
        world.store.put(vm)
    parts.hold(world, vm, attached, nics)
    operation = world.start(call, "vm.create", vm, request=call.body)
    return world.accepted(call, operation, 201 if existing is None else 200, wire(world, vm), "async")


def check_preconditions(call: Call, existing: Resource | None) -> None:
    """If-None-Match: * and If-Match. Raises: ArmError 412."""
    if call.headers.get("if-none-match") == "*" and existing is not None:
        raise ArmError(
            412,
            "PreconditionFailed",
            f"The condition 'If-None-Match: *' failed: '{existing.id}' exists already.",
        )
    wanted = call.headers.get("if-match")
    if wanted is not None and (existing is None or wanted not in {"*", _etag(existing)}):
        raise ArmError(412, "PreconditionFailed", f"The condition 'If-Match: {wanted}' failed.")


def _etag(vm: Resource) -> str:
    return vm.etag


def _create_complete(world: World, operation: Operation, problem: str | None) -> Json:
    vm = parts.still_there(world, operation)
    size = catalog.size_of(str(vm.properties["hardwareProfile"]["vmSize"]), vm.location)
    refusal = catalog.shortage(world, vm.location, size, (zones(vm.body) or [None])[0], "lro")
    if refusal is not None:
        raise refusal
    vm.state = "Succeeded"
    vm_power.mark_running(world, vm, problem)
    return wire(world, vm)


def _failed(world: World, operation: Operation, error: ArmError) -> None:
    vm = world.store.get(operation.resource)
    if vm is not None:
        vm.state = "Failed"
        vm.hidden["error"] = error.inner()
        if vm.hidden.get("power") == "creating":
            vm.hidden["power"] = "deallocated"
        world.store.put(vm)


KINDS["vm.create"] = Kind(50, _create_complete, _failed, vm_power.boot_work)


# change


def _replace(
    world: World,
    call: Call,
    held: Resource,
    wanted: Resource,
    *,
    attached: list[Resource],
    nics: list[Resource],
) -> Answer:
    """PUT on a machine that is there: everything is replaced, what can't change is checked."""
    old_os = reference(sub(held.properties, "storageProfile", "osDisk", "managedDisk")) or ""
    new_os = reference(sub(wanted.properties, "storageProfile", "osDisk", "managedDisk")) or ""
    stopped = held.hidden.get("power") == "deallocated"
    if old_os.lower() != new_os.lower() and not stopped:
        raise ArmError(
            409, "PropertyChangeNotAllowed", "Changing property 'osDisk.managedDisk.id' is not allowed."
        )
    if zones(held.body) != zones(wanted.body):
        raise ArmError(409, "PropertyChangeNotAllowed", "Changing property 'zones' is not allowed.")
    old_nics = {
        nic["id"].lower() for nic in items(sub(held.properties, "networkProfile"), "networkInterfaces")
    }
    if old_nics != {nic.key for nic in nics} and not stopped:
        raise ArmError(
            409,
            "OperationNotAllowed",
            "Network interfaces can be added or removed on a deallocated machine only.",
        )
    for name in ("vmId", "timeCreated"):
        wanted.properties[name] = held.properties[name]
    parts.let_go(world, held)
    held.body = wanted.body
    parts.hold(world, held, attached, nics)
    held.state = "Updating"
    world.store.put(held)
    operation = world.start(call, "vm.update", held, request=call.body)
    return world.accepted(call, operation, 200, wire(world, held), "async")


def patch(world: World, call: Call) -> Answer:
    """Merge: tags, size, and the list of data disks."""
    vm = world.require(parts.vm_id(world, call))
    check_preconditions(call, vm)
    world.compute_busy(vm)
    check_tags(call.body.get("tags"))
    given = sub(call.body, "properties")
    unserved = sorted({n for n, v in given.items() if v is not None} - {"hardwareProfile", "storageProfile"})
    if unserved:
        raise ArmError(
            400, "InvalidParameter", f"The laboratory can't change {', '.join(unserved)} by PATCH."
        )
    changed = Resource(vm.id, VM, vm.group, vm.name, {**vm.body, "properties": dict(vm.properties)})
    if "tags" in call.body:
        changed.body["tags"] = dict(call.body["tags"] or {})
    if sub(given, "hardwareProfile").get("vmSize"):
        changed.properties["hardwareProfile"] = dict(given["hardwareProfile"])
    if isinstance(sub(given, "storageProfile").get("dataDisks"), list):
        storage = {
            "osDisk": vm.properties["storageProfile"]["osDisk"],
            "dataDisks": given["storageProfile"]["dataDisks"],
        }
        changed.properties["storageProfile"] = parts.storage_of(world, vm, storage)
    size = catalog.size_of(str(changed.properties["hardwareProfile"]["vmSize"]), vm.location)
    attached = parts.check_disks(world, changed, (zones(vm.body) or [None])[0], size)
    catalog.check_quota(world, vm.location, size, without=vm.key)
    nics = parts.check_nics(world, changed, vm.location)
    parts.let_go(world, vm)
    vm.body = changed.body
    parts.hold(world, vm, attached, nics)
    vm.state = "Updating"
    world.store.put(vm)
    operation = world.start(call, "vm.update", vm, request=call.body)
    return world.accepted(call, operation, 200, wire(world, vm), "async")


def _update_complete(world: World, operation: Operation, _: Any) -> Json:
    vm = parts.still_there(world, operation)
    vm.state = "Succeeded"
    world.store.put(vm)
    return wire(world, vm)


KINDS["vm.update"] = Kind(15, _update_complete, _failed)


# delete


def delete(world: World, call: Call) -> Answer:
    world.group(call.get("resourceGroupName"))
    vm = world.store.get(parts.vm_id(world, call))
    if vm is None:
        return Answer(204)
    for running in world.engine.running_on(vm.key):
        if running.kind == "vm.delete":
            return world.accepted(call, running, 202, None)
        world.engine.preempt(
            running, "OperationPreempted", "The operation has been preempted by a more recent operation."
        )
    vm.state = "Deleting"
    world.store.put(vm)
    return world.accepted(call, world.start(call, "vm.delete", vm), 202, None)


def _delete_complete(world: World, operation: Operation, _: Any) -> None:
    vm = world.store.get(operation.resource)
    if vm is None:
        return
    doomed = _delete_with(world, vm)
    parts.let_go(world, vm)
    world.store.remove(vm)
    for resource in doomed:
        drop_file(world, resource)
        world.store.remove(resource)


def _delete_with(world: World, vm: Resource) -> list[Resource]:
    """Disks and interfaces whose deleteOption is Delete."""
    profile = sub(vm.properties, "storageProfile")
    ids = [
        reference(entry.get("managedDisk"))
        for entry in [sub(profile, "osDisk"), *items(profile, "dataDisks")]
        if entry.get("deleteOption") == "Delete"
    ]
    ids += [
        nic["id"]
        for nic in items(sub(vm.properties, "networkProfile"), "networkInterfaces")
        if nic["properties"].get("deleteOption") == "Delete"
    ]
    found = [world.store.get(id_) for id_ in ids]
    return [resource for resource in found if resource is not None]


KINDS["vm.delete"] = Kind(40, _delete_complete, _failed)


# reading


def wire(world: World, vm: Resource, *, instance: bool = False) -> Json:
    out = vm.wire()
    out["etag"] = _etag(vm)
    out["properties"] = dict(vm.properties)
    if instance:
        out["properties"]["instanceView"] = vm_view.instance_view(world, vm)
    return out


def get(world: World, call: Call) -> Answer:
    vm = world.require(parts.vm_id(world, call))
    wanted = (call.query.get("$expand") or "").lower()
    return Answer(200, wire(world, vm, instance=wanted == "instanceview"), {"ETag": _etag(vm)})


def list_vms(world: World, call: Call) -> Answer:
    group, place = call.params.get("resourceGroupName"), call.params.get("location")
    if group is not None:
        world.group(group)
    found = [
        vm
        for vm in world.store.of_type(VM, group)
        if world.find(vm.id) is not None and (place is None or vm.location == place.lower())
    ]
    return page(world, call, [wire(world, vm) for vm in found])


def get_instance_view(world: World, call: Call) -> Answer:
    return Answer(200, vm_view.instance_view(world, world.require(parts.vm_id(world, call))))
