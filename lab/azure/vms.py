"""Microsoft.Compute/virtualMachines on specialised disks: creation, change, power, deletion, instance view."""

from __future__ import annotations

import re
import time
import uuid
from typing import Any

from farshore.lab.azure import catalog, disks, network
from farshore.lab.azure.groups import check_tags, drop_file
from farshore.lab.azure.model import (
    DISK,
    NIC,
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
_KEPT = (
    "hardwareProfile", "additionalCapabilities", "securityProfile", "diagnosticsProfile", "availabilitySet",
    "proximityPlacementGroup", "priority", "evictionPolicy", "billingProfile", "licenseType", "userData",
    "capacityReservation", "extensionsTimeBudget",
)  # fmt: skip
_AGENT_SECONDS = 20.0
"""What a guest takes from power-on until its agent reports; scaled like everything else."""


def vm_id(world: World, call: Call) -> str:
    return world.id_of(VM, call.get("resourceGroupName"), call.get("vmName"))


# PUT


def put(world: World, call: Call) -> Answer:
    group = world.open_group(call.get("resourceGroupName"))
    id_ = vm_id(world, call)
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
    vm.body = _body(world, call, vm, location)
    size = catalog.size_of(str(vm.properties["hardwareProfile"]["vmSize"]), location)
    zone = (zones(call.body) or [None])[0]
    attached = _check_disks(world, vm, zone, size)
    nics = _check_nics(world, vm, location)
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
        _let_go(world, existing)
        vm.created = existing.created
        world.store.put(vm)
    _hold(world, vm, attached, nics)
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


def _body(world: World, call: Call, vm: Resource, location: str) -> Json:
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
    properties["storageProfile"] = _storage(world, vm, sub(given, "storageProfile"))
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


def _storage(world: World, vm: Resource, given: Json) -> Json:
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


def _check_disks(world: World, vm: Resource, zone: str | None, size: catalog.Size) -> list[Resource]:
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


def _check_nics(world: World, vm: Resource, location: str) -> list[Resource]:
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


def _hold(world: World, vm: Resource, attached: list[Resource], nics: list[Resource]) -> None:
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


def _let_go(world: World, vm: Resource) -> None:
    for disk in world.store.of_type(DISK):
        if str(disk.body.get("managedBy") or "").lower() == vm.key:
            del disk.body["managedBy"]
            world.store.put(disk)
    for nic in world.store.of_type(NIC):
        if (reference(nic.properties.get("virtualMachine")) or "").lower() == vm.key:
            del nic.properties["virtualMachine"]
            world.store.put(nic)


def _create_work(world: World, operation: Operation) -> str | None:
    """Power-on reads the first sector of each disk; returns why the guest would not boot, if so."""
    vm = world.store.resources.get(operation.resource.lower())
    return boot_problem(world, vm) if vm is not None else None


def boot_problem(world: World, vm: Resource) -> str | None:
    """What the firmware would complain about, by the boot check in force. Raises: nothing."""
    for index, disk in enumerate(disks.attached_disks(world, vm)):
        try:
            with disks.file_of(world, disk).open("rb") as file:
                sector = file.read(512)
        except OSError as bad:
            return f"disk {disk.name} can't be read: {bad.strerror}"
        if index > 0 or world.knobs.boot_check == "read":
            continue
        if world.knobs.boot_check == "nonzero" and not sector.strip(b"\0"):
            return f"the first sector of {disk.name} is empty"
        if world.knobs.boot_check == "signature" and sector[510:512] != b"\x55\xaa":
            return f"{disk.name} has no boot signature"
    return None


def _create_complete(world: World, operation: Operation, problem: str | None) -> Json:
    vm = _still_there(world, operation)
    size = catalog.size_of(str(vm.properties["hardwareProfile"]["vmSize"]), vm.location)
    refusal = catalog.shortage(world, vm.location, size, (zones(vm.body) or [None])[0], "lro")
    if refusal is not None:
        raise refusal
    vm.state = "Succeeded"
    _running(world, vm, problem)
    return wire(world, vm)


def _running(world: World, vm: Resource, problem: str | None) -> None:
    vm.hidden["power"] = "running"
    vm.hidden["boot_problem"] = problem
    vm.hidden["agent_at"] = time.time() + _AGENT_SECONDS * world.knobs.time_scale
    world.store.put(vm)


def _failed(world: World, operation: Operation, error: ArmError) -> None:
    vm = world.store.get(operation.resource)
    if vm is not None:
        vm.state = "Failed"
        vm.hidden["error"] = error.inner()
        if vm.hidden.get("power") == "creating":
            vm.hidden["power"] = "deallocated"
        world.store.put(vm)


def _still_there(world: World, operation: Operation) -> Resource:
    found = world.store.get(operation.resource)
    if found is None:
        raise ArmError(404, "ResourceNotFound", f"The machine '{operation.resource}' went away meanwhile.")
    return found


KINDS["vm.create"] = Kind(50, _create_complete, _failed, _create_work)


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
    _let_go(world, held)
    held.body = wanted.body
    _hold(world, held, attached, nics)
    held.state = "Updating"
    world.store.put(held)
    operation = world.start(call, "vm.update", held, request=call.body)
    return world.accepted(call, operation, 200, wire(world, held), "async")


def patch(world: World, call: Call) -> Answer:
    """Merge: tags, size, and the list of data disks."""
    vm = world.require(vm_id(world, call))
    check_preconditions(call, vm)
    world.compute_busy(vm)
    check_tags(call.body.get("tags"))
    given = sub(call.body, "properties")
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
        changed.properties["storageProfile"] = _storage(world, vm, storage)
    size = catalog.size_of(str(changed.properties["hardwareProfile"]["vmSize"]), vm.location)
    attached = _check_disks(world, changed, (zones(vm.body) or [None])[0], size)
    catalog.check_quota(world, vm.location, size, without=vm.key)
    nics = _check_nics(world, changed, vm.location)
    _let_go(world, vm)
    vm.body = changed.body
    _hold(world, vm, attached, nics)
    vm.state = "Updating"
    world.store.put(vm)
    operation = world.start(call, "vm.update", vm, request=call.body)
    return world.accepted(call, operation, 200, wire(world, vm), "async")


def _update_complete(world: World, operation: Operation, _: Any) -> Json:
    vm = _still_there(world, operation)
    vm.state = "Succeeded"
    world.store.put(vm)
    return wire(world, vm)


KINDS["vm.update"] = Kind(15, _update_complete, _failed)


# power


_POWER = {"start": "starting", "powerOff": "stopping", "deallocate": "deallocating", "restart": "starting"}
_RESULT = {"start": "running", "powerOff": "stopped", "deallocate": "deallocated", "restart": "running"}


def power(world: World, call: Call) -> Answer:
    """POST start, powerOff, deallocate, restart."""
    vm = world.require(vm_id(world, call))
    action = call.path.rstrip("/").rsplit("/", 1)[-1].lower()
    action = next(name for name in _POWER if name.lower() == action)
    running = [o for o in world.engine.running_on(vm.key) if o.kind == f"vm.{action}"]
    if running:
        return world.accepted(call, running[0], 202, None)
    world.compute_busy(vm)
    before = str(vm.hidden.get("power"))
    if action == "restart" and before != "running":
        raise ArmError(409, "OperationNotAllowed", f"Cannot restart VM '{vm.name}': it is {before}.")
    if vm.state == "Failed" and not vm.hidden.get("booted_once") and action != "deallocate":
        raise ArmError(
            409,
            "OperationNotAllowed",
            f"VM '{vm.name}' failed to provision; delete it or repeat its creation.",
        )
    if action == "start" and before == "deallocated":
        size = catalog.size_of(str(vm.properties["hardwareProfile"]["vmSize"]), vm.location)
        refusal = catalog.shortage(world, vm.location, size, (zones(vm.body) or [None])[0], "first")
        if refusal is not None:
            raise refusal
    if before != _RESULT[action] or action == "restart":
        vm.hidden["power"] = _POWER[action]
    vm.state = "Updating"
    world.store.put(vm)
    return world.accepted(call, world.start(call, f"vm.{action}", vm, before=before), 202, None)


def _power_complete(world: World, operation: Operation, problem: str | None) -> None:
    vm, action = _still_there(world, operation), operation.kind.removeprefix("vm.")
    if action == "start" and operation.args["before"] == "deallocated":
        size = catalog.size_of(str(vm.properties["hardwareProfile"]["vmSize"]), vm.location)
        refusal = catalog.shortage(world, vm.location, size, (zones(vm.body) or [None])[0], "lro")
        if refusal is not None:
            raise refusal
    vm.state = "Succeeded"
    if _RESULT[action] == "running":
        if action == "restart" or operation.args["before"] != "running":
            _running(world, vm, problem)
        else:
            world.store.put(vm)
        return
    vm.hidden["power"] = _RESULT[action]
    vm.hidden.pop("agent_at", None)
    world.store.put(vm)


def _power_fail(world: World, operation: Operation, error: ArmError) -> None:
    vm = world.store.get(operation.resource)
    if vm is not None:
        vm.hidden["power"] = operation.args["before"]
        vm.hidden["error"] = error.inner()
        vm.state = "Failed"
        vm.hidden["booted_once"] = True
        world.store.put(vm)


for _action, _seconds in (("start", 30), ("powerOff", 20), ("deallocate", 40), ("restart", 30)):
    KINDS[f"vm.{_action}"] = Kind(
        _seconds, _power_complete, _power_fail, _create_work if _RESULT[_action] == "running" else None
    )


# delete


def delete(world: World, call: Call) -> Answer:
    world.group(call.get("resourceGroupName"))
    vm = world.store.get(vm_id(world, call))
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
    _let_go(world, vm)
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
        out["properties"]["instanceView"] = instance_view(world, vm)
    return out


def get(world: World, call: Call) -> Answer:
    vm = world.require(vm_id(world, call))
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
    return Answer(200, instance_view(world, world.require(vm_id(world, call))))


def agent_ready(vm: Resource) -> bool:
    """Whether the guest's agent reports: powered on, booted, and the scaled delay over."""
    return (
        vm.hidden.get("power") == "running"
        and not vm.hidden.get("boot_problem")
        and time.time() >= float(vm.hidden.get("agent_at", 0))
    )


_DISPLAY = {"creating": "VM creating", "starting": "VM starting", "running": "VM running", "stopping": "VM stopping",
            "stopped": "VM stopped", "deallocating": "VM deallocating", "deallocated": "VM deallocated"}  # fmt: skip


def instance_view(world: World, vm: Resource) -> Json:
    now, power_state, state = iso(time.time()), str(vm.hidden.get("power")), vm.state.lower()
    statuses: list[Json] = [
        {"code": f"ProvisioningState/{state}", "level": "Error" if state == "failed" else "Info",
         "displayStatus": f"Provisioning {state}", "time": iso(vm.changed)},
    ]  # fmt: skip
    if state == "failed" and vm.hidden.get("error"):
        error = vm.hidden["error"]
        statuses[0]["code"] = f"ProvisioningState/failed/{error['code']}"
        statuses[0]["message"] = error["message"]
    if power_state != "creating":
        statuses.append(
            {"code": f"PowerState/{power_state}", "level": "Info", "displayStatus": _DISPLAY[power_state]}
        )
    view: Json = {"hyperVGeneration": "V1", "statuses": statuses, "disks": []}
    for disk in disks.attached_disks(world, vm):
        view["hyperVGeneration"] = disk.properties.get("hyperVGeneration", view["hyperVGeneration"])
        view["disks"].append(
            {"name": disk.name, "statuses": [{"code": "ProvisioningState/succeeded", "level": "Info",
             "displayStatus": "Provisioning succeeded", "time": iso(disk.changed)}]}
        )  # fmt: skip
    if power_state == "running":
        ready = agent_ready(vm)
        problem = vm.hidden.get("boot_problem")
        view["vmAgent"] = {
            "vmAgentVersion": "2.9.1.1" if ready else "Unknown",
            "statuses": [
                {"code": "ProvisioningState/succeeded" if ready else "ProvisioningState/Unavailable",
                 "level": "Info" if ready else "Warning", "displayStatus": "Ready" if ready else "Not Ready",
                 "message": "Guest Agent is running" if ready else "VM status blob is found but not yet populated."
                 if not problem else f"The guest did not boot: {problem}.", "time": now},
            ],
        }  # fmt: skip
        if ready:
            view["computerName"] = vm.name
            os_type = sub(vm.properties, "storageProfile", "osDisk").get("osType")
            view["osName"] = "lab-linux" if os_type == "Linux" else "lab-windows"
            statuses.insert(1, {"code": "OSProvisioningComplete/succeeded", "level": "Info",
                                "displayStatus": "OS provisioning complete", "time": iso(vm.hidden["agent_at"])})  # fmt: skip
    return view
