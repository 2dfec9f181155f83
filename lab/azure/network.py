"""Microsoft.Network: what all its resources share — busy rules, create-or-update, deletion, lists — and public IPs."""

from __future__ import annotations

import ipaddress
import uuid
from collections.abc import Callable
from typing import Any

from farshore.lab.azure.groups import check_tags
from farshore.lab.azure.model import (
    NIC,
    PUBLIC_IP,
    RULE,
    SUBNET,
    Answer,
    ArmError,
    Call,
    Json,
    Resource,
    items,
    parent_key,
    reference,
    sub,
)
from farshore.lab.azure.operations import KINDS, Kind, Operation
from farshore.lab.azure.paging import page
from farshore.lab.azure.world import World, zones

_PUBLIC = ipaddress.ip_network("203.0.113.0/24")

Render = Callable[[World, Resource], Json]
RENDER: dict[str, Render] = {}
"""Type → how its document looks on the wire; each provider module fills in its own."""


def render(world: World, resource: Resource) -> Json:
    return RENDER[resource.type](world, resource)


def plain(resource: Resource) -> Json:
    """id, name, type, etag and body; properties are a copy that may be changed."""
    out = {**resource.wire(), "etag": f"W/{resource.etag}"}
    out["properties"] = dict(resource.properties)
    return out


# busy rules


def trunk(id_: str) -> str:
    """Lower-case id of the virtual network (or security group) that writes on a child lock together."""
    key = id_.lower()
    for inner in ("/subnets/", "/securityrules/"):
        if inner in key:
            return key.split(inner, 1)[0]
    return key


def check_trunk(world: World, id_: str) -> None:
    """Raises: ArmError 409 AnotherOperationInProgress while a write on the same network runs (B.2)."""
    if not world.knobs.busy_rules:
        return
    running = [o for o in world.engine.running_on(trunk(id_), below=True) if o.kind.startswith("net.")]
    if running:
        raise ArmError(
            409,
            "AnotherOperationInProgress",
            f"Another operation on this or dependent resource is in progress. Operation id '{running[0].id}', "
            f"resource '{running[0].resource}'.",
            headers={"Retry-After": world.engine.retry_after(running[0])},
        )


def check_settled(world: World, target: Resource, referrer: str) -> None:
    """Raises: ArmError 429 while a referenced resource is being changed (B.2)."""
    if not world.knobs.busy_rules or target.state not in {"Updating", "Deleting"}:
        return
    raise ArmError(
        429,
        "RetryableError",
        "A retryable error occurred.",
        details=[
            {
                "code": "ReferencedResourceNotProvisioned",
                "message": f"Cannot proceed with operation because resource {target.id} used by resource {referrer} is "
                f"not in Succeeded state. Resource is in {target.state} state.",
            }
        ],
        headers={"Retry-After": "1"},
    )


# create-or-update


def settle(world: World, call: Call, resource: Resource, created: bool, seconds: str) -> Answer:
    """Write the resource down as Updating, start its operation, and answer 201 or 200."""
    resource.state = "Updating"
    if created:
        resource.properties["resourceGuid"] = str(uuid.uuid4())
        world.store.create(resource)
    else:
        world.store.put(resource)
    operation = world.start(call, seconds, resource, request=call.body)
    return world.accepted(call, operation, 201 if created else 200, render(world, resource), "async")


def repeated(world: World, call: Call, existing: Resource | None) -> Answer | None:
    """The answer to a PUT that repeats one still running."""
    same = world.same_request(existing, call.body) if existing is not None else None
    if existing is None or same is None:
        return None
    return world.accepted(call, same, 200, render(world, existing), "async")


def location_of(world: World, call: Call, existing: Resource | None) -> tuple[Resource, str]:
    group = world.open_group(call.get("resourceGroupName"))
    check_tags(call.body.get("tags"))
    return group, world.place(group, call.body, existing)


def base_body(call: Call, location: str) -> Json:
    body: Json = {"location": location}
    if call.body.get("tags"):
        body["tags"] = dict(call.body["tags"])
    return body


def _put_complete(world: World, operation: Operation, _: Any) -> None:
    _settle_as(world, operation, "Succeeded")


def _put_fail(world: World, operation: Operation, _: ArmError) -> None:
    _settle_as(world, operation, "Failed")


def _settle_as(world: World, operation: Operation, state: str) -> None:
    """The resource and what was written with it: a network's subnets, a group's rules."""
    resource = world.store.get(operation.resource)
    if resource is None:
        return
    written = [*world.store.children(resource, SUBNET), *world.store.children(resource, RULE)]
    for each in [resource, *(child for child in written if child.state == "Updating")]:
        each.state = state
        world.store.put(each)


for _name, _seconds in (("vnet", 8), ("subnet", 8), ("nsg", 6), ("rule", 6), ("nic", 5), ("ip", 5)):
    KINDS[f"net.{_name}"] = Kind(_seconds, _put_complete, _put_fail)


# deletion


def remove(world: World, call: Call, id_: str, in_use: Callable[[World, Resource], None]) -> Answer:
    """DELETE: 204 when absent, refused while in use, else accepted."""
    world.group(call.get("resourceGroupName"))
    resource = world.store.get(id_)
    if resource is None:
        return Answer(204)
    deleting = [o for o in world.engine.running_on(resource.key) if o.kind == "net.delete"]
    if deleting:
        return world.accepted(call, deleting[0], 202, None)
    check_trunk(world, id_)
    in_use(world, resource)
    before = resource.state
    resource.state = "Deleting"
    world.store.put(resource)
    return world.accepted(call, _start_delete(world, call, resource, before), 202, None)


def _start_delete(world: World, call: Call, resource: Resource, before: str) -> Operation:
    parent = world.store.get(parent_key(resource.id))
    place = resource.location or (parent.location if parent else "")
    return world.engine.begin(call, "net.delete", resource.id, place, before=before)


def _delete_complete(world: World, operation: Operation, _: Any) -> None:
    resource = world.store.get(operation.resource)
    if resource is None:
        return
    for child_type in (SUBNET, RULE):
        for child in world.store.children(resource, child_type):
            world.store.remove(child)
    world.store.remove(resource)


def _delete_fail(world: World, operation: Operation, _: ArmError) -> None:
    resource = world.store.get(operation.resource)
    if resource is not None:
        resource.state = operation.args["before"]
        world.store.put(resource)


KINDS["net.delete"] = Kind(10, _delete_complete, _delete_fail)


# reading, the same for every type


def read(world: World, id_: str) -> Answer:
    return Answer(200, render(world, world.require(id_)))


def list_all(world: World, call: Call, type_: str) -> Answer:
    group = call.params.get("resourceGroupName")
    if group is not None:
        world.group(group)
    found = [r for r in world.store.of_type(type_, group) if world.find(r.id) is not None]
    return page(world, call, [render(world, r) for r in found])


def update_tags(world: World, call: Call, id_: str) -> Answer:
    resource = world.require(id_)
    check_tags(call.body.get("tags"))
    resource.body["tags"] = dict(call.body.get("tags") or {})
    world.store.put(resource)
    return Answer(200, render(world, resource))


# public IP addresses


def ip_id(world: World, call: Call) -> str:
    return world.id_of(PUBLIC_IP, call.get("resourceGroupName"), call.get("publicIpAddressName"))


def ip_put(world: World, call: Call) -> Answer:
    existing = world.store.get(ip_id(world, call))
    if (again := repeated(world, call, existing)) is not None:
        return again
    group, location = location_of(world, call, existing)
    check_trunk(world, ip_id(world, call))
    given, sku = sub(call.body, "properties"), str(sub(call.body, "sku").get("name") or "Standard")
    method = str(given.get("publicIPAllocationMethod") or "Static")
    if sku == "Standard" and method != "Static":
        raise ArmError(
            400,
            "InvalidRequestFormat",
            "Standard sku public IP addresses must have the allocation method Static.",
        )
    if existing is not None and zones(call.body) != zones(existing.body):
        raise ArmError(
            400, "ResourceAvailabilityZonesCannotBeModified", "Zones of a public IP address can't be changed."
        )
    resource = existing or Resource(
        ip_id(world, call), PUBLIC_IP, group.name, call.get("publicIpAddressName"), {}
    )
    old = resource.properties
    resource.body = base_body(call, location)
    resource.body["sku"] = {"name": sku, "tier": str(sub(call.body, "sku").get("tier") or "Regional")}
    if zones(call.body):
        resource.body["zones"] = zones(call.body)
    kept = {
        k: given[k]
        for k in ("dnsSettings", "ddosSettings", "ipTags", "deleteOption")
        if given.get(k) is not None
    }
    resource.body["properties"] = {
        **({"resourceGuid": old["resourceGuid"]} if "resourceGuid" in old else {}),
        "publicIPAllocationMethod": method,
        "publicIPAddressVersion": str(given.get("publicIPAddressVersion") or "IPv4"),
        "idleTimeoutInMinutes": int(given.get("idleTimeoutInMinutes") or 4),
        "ipAddress": old.get("ipAddress") or _free_public(world),
        **kept,
    }
    return settle(world, call, resource, existing is None, "net.ip")


def _free_public(world: World) -> str:
    taken = {r.properties.get("ipAddress") for r in world.store.of_type(PUBLIC_IP)}
    for address in _PUBLIC.hosts():
        if str(address) not in taken:
            return str(address)
    raise ArmError(409, "PublicIPCountLimitReached", "The subscription's public IP addresses are used up.")


def ip_user(world: World, ip: Resource) -> str | None:
    """Id of the IP configuration that uses a public address."""
    for nic in world.store.of_type(NIC):
        for config in items(nic.properties, "ipConfigurations"):
            if (reference(sub(config, "properties", "publicIPAddress")) or "").lower() == ip.key:
                return str(config["id"])
    return None


def _ip_in_use(world: World, ip: Resource) -> None:
    user = ip_user(world, ip)
    if user:
        raise ArmError(
            400,
            "PublicIPAddressCannotBeDeleted",
            f"Public IP address {ip.id} can not be deleted since it is still allocated to resource {user}.",
        )


def ip_delete(world: World, call: Call) -> Answer:
    return remove(world, call, ip_id(world, call), _ip_in_use)


def _ip_wire(world: World, ip: Resource) -> Json:
    out = plain(ip)
    user = ip_user(world, ip)
    if user:
        out["properties"]["ipConfiguration"] = {"id": user}
    return out


RENDER[PUBLIC_IP] = _ip_wire
