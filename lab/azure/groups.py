"""Microsoft.Resources: resource groups, the generic resource list, tags, provider registrations."""

from __future__ import annotations

import re
import time
from typing import Any, cast

from farshore.lab.azure.model import (
    DISK,
    GROUP,
    NIC,
    NSG,
    PUBLIC_IP,
    SNAPSHOT,
    STORAGE,
    VM,
    VNET,
    Answer,
    ArmError,
    Call,
    Json,
    Resource,
    sub,
)
from farshore.lab.azure.operations import KINDS, Kind, Operation, iso
from farshore.lab.azure.paging import page
from farshore.lab.azure.world import LOCATIONS, World

_DELETION_ORDER = (VM, DISK, SNAPSHOT, NIC, PUBLIC_IP, VNET, NSG, STORAGE)
_TRACKED = frozenset(_DELETION_ORDER)
_NAME = re.compile(r"^[-\w._()]{1,90}$")
NAMESPACES: dict[str, tuple[str, ...]] = {
    "Microsoft.Compute": ("disks", "snapshots", "virtualMachines"),
    "Microsoft.Network": ("networkInterfaces", "networkSecurityGroups", "publicIPAddresses", "virtualNetworks"),
    "Microsoft.Resources": ("resourceGroups", "tags"),
    "Microsoft.Storage": ("storageAccounts",),
}  # fmt: skip


def put(world: World, call: Call) -> Answer:
    name = call.get("resourceGroupName")
    if not _NAME.match(name) or name.endswith("."):
        raise ArmError(400, "InvalidResourceGroup", f"The resource group name '{name}' is invalid.")
    existing = world.store.get(world.id_of(GROUP, name))
    location = str(call.body.get("location") or "").replace(" ", "").lower()
    if not location:
        raise ArmError(400, "LocationRequired", "The location property is required for this definition.")
    if location not in LOCATIONS:
        raise ArmError(
            400,
            "LocationNotAvailableForResourceGroup",
            f"The provided location '{location}' is not available for resource group.",
        )
    if existing is None:
        group = Resource(world.id_of(GROUP, name), GROUP, name, name, {"location": location})
        _apply_group(group, call.body)
        world.store.create(group)
        return Answer(201, group.wire())
    if existing.location != location:
        raise ArmError(
            409,
            "InvalidResourceGroupLocation",
            f"Invalid resource group location '{location}'. The resource group already exists in location "
            f"'{existing.location}'.",
        )
    world.open_group(name)
    existing.body.pop("tags", None)
    _apply_group(existing, call.body)
    world.store.put(existing)
    return Answer(200, existing.wire())


def _apply_group(group: Resource, body: Json) -> None:
    if body.get("tags"):
        group.body["tags"] = dict(body["tags"])
    group.body["properties"] = {"provisioningState": "Succeeded"}


def patch(world: World, call: Call) -> Answer:
    group = world.group(call.get("resourceGroupName"))
    if "tags" in call.body:
        group.body["tags"] = dict(call.body["tags"] or {})
    world.store.put(group)
    return Answer(200, group.wire())


def get(world: World, call: Call) -> Answer:
    return Answer(200, world.group(call.get("resourceGroupName")).wire())


def head(world: World, call: Call) -> Answer:
    try:
        world.group(call.get("resourceGroupName"))
    except ArmError:
        return Answer(404)
    return Answer(204)


def list_groups(world: World, call: Call) -> Answer:
    now = time.time()
    groups = [g for g in world.store.of_type(GROUP) if now >= g.created + world.knobs.consistency_groups]
    text = call.query.get("$filter")
    if text:
        wanted = _parse_filter(text)
        groups = [g for g in groups if _matches(g, wanted)]
    return page(world, call, [g.wire() for g in groups])


def delete(world: World, call: Call) -> Answer:
    group = world.group(call.get("resourceGroupName"))
    running = world.engine.running_on(group.key)
    if running:
        return world.accepted(call, running[0], 202, None, "location")
    group.state = "Deleting"
    world.store.put(group)
    operation = world.start(call, "group.delete", group)
    return world.accepted(call, operation, 202, None, "location")


def _delete_complete(world: World, operation: Operation, _: Any) -> Json:
    group = world.store.get(operation.resource)
    if group is not None:
        _check_foreign_users(world, group)
        inside = [r for r in world.store.resources.values() if r.group.lower() == group.name.lower()]
        order = {kind: index for index, kind in enumerate(_DELETION_ORDER)}
        for resource in sorted(inside, key=lambda r: order.get(r.type, -1)):
            if resource.type != GROUP:
                for running in world.engine.running_on(resource.key):
                    world.engine.preempt(
                        running, "OperationPreempted", "The resource group is being deleted."
                    )
                drop_file(world, resource)
                world.store.remove(resource)
        world.store.remove(group)
    return {}


def _check_foreign_users(world: World, group: Resource) -> None:
    """Raises: ArmError 409 while a machine or interface of another group uses something of this one."""
    prefix = group.key + "/"
    for user in [*world.store.of_type(VM), *world.store.of_type(NIC)]:
        if user.group.lower() == group.name.lower():
            continue
        for used in _mentioned(user.properties):
            if used.lower().startswith(prefix):
                raise ArmError(
                    409,
                    "ResourceGroupDeletionBlocked",
                    f"Deletion of resource group '{group.name}' failed: {user.id} uses {used}.",
                    details=[{"code": "InUse", "target": used, "message": f"In use by {user.id}."}],
                )


def _mentioned(value: Any) -> list[str]:
    """Every `id` inside a document."""
    if isinstance(value, list):
        return [id_ for item in cast(list[Any], value) for id_ in _mentioned(item)]
    if not isinstance(value, dict):
        return []
    document = cast(Json, value)
    own = [document["id"]] if isinstance(document.get("id"), str) else []
    return own + [
        id_ for name, item in document.items() if name != "virtualMachine" for id_ in _mentioned(item)
    ]


def _delete_fail(world: World, operation: Operation, _: ArmError) -> None:
    group = world.store.get(operation.resource)
    if group is not None:
        group.state = "Succeeded"
        world.store.put(group)


KINDS["group.delete"] = Kind(30, _delete_complete, _delete_fail)


def drop_file(world: World, resource: Resource) -> None:
    """Remove a disk's or snapshot's bytes with it."""
    name = resource.hidden.get("file")
    if name:
        (world.files / name).unlink(missing_ok=True)


# the generic list


def list_resources(world: World, call: Call) -> Answer:
    """Resources of the subscription or of a group, filtered. With a tag filter the tags are left out, as documented."""
    group = call.params.get("resourceGroupName")
    if group is not None:
        group = world.group(group).name.lower()
    wanted = _parse_filter(call.query.get("$filter") or "")
    expand = {word.strip().lower() for word in (call.query.get("$expand") or "").split(",")}
    now = time.time()
    found: list[Json] = []
    for resource in sorted(world.store.resources.values(), key=lambda r: r.key):
        if resource.type not in _TRACKED or (group is not None and resource.group.lower() != group):
            continue
        if now < resource.created + world.knobs.consistency_resources or not _matches(resource, wanted):
            continue
        wire: Json = {
            "id": resource.id,
            "name": resource.name,
            "type": resource.type,
            "location": resource.location,
        }
        for part in ("sku", "managedBy", "kind"):
            if part in resource.body:
                wire[part] = resource.body[part]
        if resource.tags and "tagname" not in wanted:
            wire["tags"] = resource.tags
        if "createdtime" in expand:
            wire["createdTime"] = iso(resource.created)
        if "changedtime" in expand:
            wire["changedTime"] = iso(resource.changed)
        if "provisioningstate" in expand:
            wire["provisioningState"] = resource.state
        found.append(wire)
    return page(world, call, found, top=call.query.get("$top"))


_CLAUSE = re.compile(r"^\s*(\w+)\s+(eq|ne)\s+'((?:[^']|'')*)'\s*$", re.IGNORECASE)
_PROPERTIES = frozenset({"tagname", "tagvalue", "resourcetype", "name", "location", "resourcegroup"})
_Filter = dict[str, tuple[str, str]]


def _parse_filter(text: str) -> _Filter:
    """`a eq 'x' and b eq 'y'`. Raises: ArmError 400 for what is not served, or not allowed together."""
    out: _Filter = {}
    if not text.strip():
        return out
    for clause in re.split(r"\s+and\s+", text, flags=re.IGNORECASE):
        found = _CLAUSE.match(clause)
        if found is None or found[1].lower() not in _PROPERTIES:
            raise ArmError(
                400, "InvalidFilterInQueryString", f"Invalid $filter '{text}' specified in the query string."
            )
        out[found[1].lower()] = (found[2].lower(), found[3].replace("''", "'"))
    if "tagvalue" in out and "tagname" not in out:
        raise ArmError(400, "InvalidFilterInQueryString", "A filter with tagValue needs tagName.")
    if "tagname" in out and set(out) - {"tagname", "tagvalue"}:
        raise ArmError(
            400, "InvalidFilterInQueryString", "A filter by tag can't be combined with other properties."
        )
    return out


def _matches(resource: Resource, wanted: _Filter) -> bool:
    tags = {name.lower(): value for name, value in resource.tags.items()}
    values = {"resourcetype": resource.type, "name": resource.name, "location": resource.location,
              "resourcegroup": resource.group}  # fmt: skip
    for name, (operator, text) in wanted.items():
        if name == "tagname":
            hit = text.lower() in tags
        elif name == "tagvalue":
            hit = tags.get(wanted["tagname"][1].lower()) == text
        else:
            hit = values[name].lower() == text.lower()
        if hit != (operator == "eq"):
            return False
    return True


# tags at a scope


def _tag_scope(world: World, call: Call) -> Resource:
    found = world.store.get("/" + call.get("scope").strip("/"))
    if found is None:
        raise ArmError(404, "ResourceNotFound", f"The scope '{call.get('scope')}' was not found.")
    return found


def _tags_wire(resource: Resource) -> Json:
    return {
        "id": f"{resource.id}/providers/Microsoft.Resources/tags/default",
        "name": "default",
        "type": "Microsoft.Resources/tags",
        "properties": {"tags": resource.tags},
    }


def tags_get(world: World, call: Call) -> Answer:
    return Answer(200, _tags_wire(_tag_scope(world, call)))


def tags_put(world: World, call: Call) -> Answer:
    return _retag(world, call, "replace")


def tags_patch(world: World, call: Call) -> Answer:
    return _retag(world, call, str(call.body.get("operation") or "Merge").lower())


def tags_delete(world: World, call: Call) -> Answer:
    resource = _tag_scope(world, call)
    resource.body.pop("tags", None)
    world.store.put(resource)
    return Answer(200)


def _retag(world: World, call: Call, operation: str) -> Answer:
    resource = _tag_scope(world, call)
    given: dict[str, str] = dict(sub(call.body, "properties", "tags"))
    check_tags(given)
    if operation == "replace":
        tags = given
    elif operation == "merge":
        tags = {**resource.tags, **given}
    elif operation == "delete":
        tags = {name: value for name, value in resource.tags.items() if name not in given}
    else:
        raise ArmError(400, "InvalidTagOperation", f"The tag operation '{operation}' is unknown.")
    check_tags(tags)
    resource.body["tags"] = tags
    world.store.put(resource)
    return Answer(200, _tags_wire(resource))


def check_tags(tags: Any) -> None:
    """Raises: ArmError 400 for more than 50 tags, long names or values, or values that aren't text."""
    if tags is None:
        return
    if not isinstance(tags, dict):
        raise ArmError(400, "InvalidRequestContent", "Tags must be an object of strings.")
    if len(tags) > 50:
        raise ArmError(400, "TooManyTags", f"A resource can have at most 50 tags; {len(tags)} were given.")
    for name, value in tags.items():
        if not isinstance(name, str) or not isinstance(value, str) or len(name) > 512 or len(value) > 256:
            raise ArmError(400, "InvalidTag", f"The tag '{name}' is invalid.")
        if set(name) & set("<>%&\\?/"):
            raise ArmError(400, "InvalidTagNameCharacters", f"The tag name '{name}' has reserved characters.")


# providers


def _provider(world: World, namespace: str) -> Json:
    known = {name.lower(): name for name in NAMESPACES}.get(namespace.lower())
    if known is None:
        raise ArmError(404, "InvalidResourceNamespace", f"The resource namespace '{namespace}' is invalid.")
    missing = known.lower() in {name.lower() for name in world.knobs.unregistered}
    return {
        "id": f"/subscriptions/{world.subscription}/providers/{known}",
        "namespace": known,
        "registrationState": "NotRegistered" if missing else "Registered",
        "registrationPolicy": "RegistrationRequired",
        "resourceTypes": [
            {"resourceType": kind, "locations": ["West Europe", "North Europe"], "apiVersions": []}
            for kind in NAMESPACES[known]
        ],
    }


def provider_get(world: World, call: Call) -> Answer:
    return Answer(200, _provider(world, call.get("resourceProviderNamespace")))


def provider_list(world: World, call: Call) -> Answer:
    return page(world, call, [_provider(world, name) for name in NAMESPACES])


def provider_register(world: World, call: Call) -> Answer:
    namespace = call.get("resourceProviderNamespace")
    _provider(world, namespace)
    left = [name for name in world.knobs.unregistered if name.lower() != namespace.lower()]
    world.turn({"unregistered": left})
    return Answer(200, _provider(world, namespace))
