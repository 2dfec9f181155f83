"""Power: start, powerOff, deallocate, restart, and what happens when a guest boots."""

from __future__ import annotations

import time

from farshore.lab.azure import catalog, disks, vm_parts
from farshore.lab.azure.model import Answer, ArmError, Call, Resource
from farshore.lab.azure.operations import KINDS, Kind, Operation
from farshore.lab.azure.world import World, zones

_AGENT_SECONDS = 20.0
"""What a guest takes from power-on until its agent reports; scaled like everything else."""


_POWER = {"start": "starting", "powerOff": "stopping", "deallocate": "deallocating", "restart": "starting"}


_RESULT = {"start": "running", "powerOff": "stopped", "deallocate": "deallocated", "restart": "running"}


def boot_work(world: World, operation: Operation) -> str | None:
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


def mark_running(world: World, vm: Resource, problem: str | None) -> None:
    vm.hidden["power"] = "running"
    vm.hidden["boot_problem"] = problem
    vm.hidden["agent_at"] = time.time() + _AGENT_SECONDS * world.knobs.time_scale
    world.store.put(vm)


def power(world: World, call: Call) -> Answer:
    """POST start, powerOff, deallocate, restart."""
    vm = world.require(vm_parts.vm_id(world, call))
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
    vm, action = vm_parts.still_there(world, operation), operation.kind.removeprefix("vm.")
    if action == "start" and operation.args["before"] == "deallocated":
        size = catalog.size_of(str(vm.properties["hardwareProfile"]["vmSize"]), vm.location)
        refusal = catalog.shortage(world, vm.location, size, (zones(vm.body) or [None])[0], "lro")
        if refusal is not None:
            raise refusal
    vm.state = "Succeeded"
    if _RESULT[action] == "running":
        if action == "restart" or operation.args["before"] != "running":
            mark_running(world, vm, problem)
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
        _seconds, _power_complete, _power_fail, boot_work if _RESULT[_action] == "running" else None
    )
