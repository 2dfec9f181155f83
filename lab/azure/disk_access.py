"""beginGetAccess and endGetAccess: the SAS that lets a disk's bytes out, or an upload's bytes in."""

from __future__ import annotations

import secrets
import time
from typing import Any

from farshore.lab.azure import diskfiles, disks
from farshore.lab.azure.model import DISK, Answer, ArmError, Call, Json
from farshore.lab.azure.operations import KINDS, Kind, Operation
from farshore.lab.azure.world import World


def grant(world: World, call: Call) -> Answer:
    disk = world.require(disks.disk_id(world, call))
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
    if disk.type == DISK and disks.disk_state(world, disk) == "Attached":
        raise ArmError(
            409,
            "OperationNotAllowed",
            f"Cannot grant access to disk '{disk.name}': it is attached to a running VM.",
        )
    return world.accepted(
        call, world.start(call, "disk.grant", disk, access=access, seconds=seconds, base=call.base), 202, None
    )


def _grant_complete(world: World, operation: Operation, _: Any) -> Json:
    disk, args = disks.still_there(world, operation), operation.args
    held: Json | None = disks.active_access(disk)
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
    disk = world.require(disks.disk_id(world, call))
    world.compute_busy(disk)
    return world.accepted(call, world.start(call, "disk.revoke", disk), 202, None)


def _revoke_work(world: World, operation: Operation) -> int | None:
    """For an uploaded disk: check the footer. Returns the size of its disk."""
    disk = world.store.resources.get(operation.resource.lower())
    if disk is None or not disk.hidden.get("upload") or not disk.hidden.get("access"):
        return None
    path = disks.file_of(world, disk)
    return diskfiles.check_vhd(diskfiles.FileView(path), disk.name)


def _revoke_complete(world: World, operation: Operation, size: int | None) -> None:
    disk = disks.still_there(world, operation)
    disk.hidden.pop("access", None)
    if size is not None:
        disk.hidden.pop("upload", None)
        with disks.file_of(world, disk).open("r+b") as file:
            file.truncate(size)
        disks.set_size(disk, size)
    world.store.put(disk)


KINDS["disk.grant"] = Kind(3, _grant_complete, lambda w, o, e: None)
KINDS["disk.revoke"] = Kind(3, _revoke_complete, lambda w, o, e: None, _revoke_work)
