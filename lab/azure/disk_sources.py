"""Where a disk's bytes come from: nothing, an upload, a VHD blob, another disk or snapshot."""

from __future__ import annotations

import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from farshore.lab.azure import diskfiles
from farshore.lab.azure.model import DISK, SNAPSHOT, STORAGE, ArmError, Call, Json, sub
from farshore.lab.azure.operations import Operation
from farshore.lab.azure.ports import BlobRefused
from farshore.lab.azure.world import World

GIB = 1 << 30

_MAX_INCREMENTAL = 500


def plan_of(world: World, call: Call, type_: str, creation: Json, location: str) -> Json:
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


def write_bytes(world: World, operation: Operation) -> int:
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
