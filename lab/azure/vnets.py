"""Virtual networks and subnets, network security groups and their rules. A PUT replaces the whole."""

from __future__ import annotations

import ipaddress
from typing import Any

from farshore.lab.azure import network
from farshore.lab.azure.model import (
    NIC,
    NSG,
    RULE,
    SUBNET,
    VNET,
    Answer,
    ArmError,
    Call,
    Json,
    Resource,
    items,
    reference,
    sub,
)
from farshore.lab.azure.paging import page
from farshore.lab.azure.world import World

Net = ipaddress.IPv4Network | ipaddress.IPv6Network


def vnet_id(world: World, call: Call) -> str:
    return world.id_of(VNET, call.get("resourceGroupName"), call.get("virtualNetworkName"))


def subnet_id(world: World, call: Call) -> str:
    return world.id_of(
        SUBNET, call.get("resourceGroupName"), call.get("virtualNetworkName"), call.get("subnetName")
    )


def nsg_id(world: World, call: Call) -> str:
    return world.id_of(NSG, call.get("resourceGroupName"), call.get("networkSecurityGroupName"))


def rule_id(world: World, call: Call) -> str:
    return world.id_of(
        RULE,
        call.get("resourceGroupName"),
        call.get("networkSecurityGroupName"),
        call.get("securityRuleName"),
    )


def network_of(text: Any, code: str) -> Net:
    try:
        return ipaddress.ip_network(str(text))
    except ValueError as bad:
        raise ArmError(400, code, f"The address prefix '{text}' is not a valid CIDR: {bad}.") from bad


def overlap(one: Net, other: Net) -> bool:
    return one.version == other.version and one.overlaps(other)  # pyright: ignore[reportArgumentType]


def inside(inner: Net, outer: Net) -> bool:
    return inner.version == outer.version and inner.subnet_of(outer)  # pyright: ignore[reportArgumentType]


# virtual networks


def vnet_put(world: World, call: Call) -> Answer:
    id_ = vnet_id(world, call)
    existing = world.store.get(id_)
    if (again := network.repeated(world, call, existing)) is not None:
        return again
    group, location = network.location_of(world, call, existing)
    network.check_trunk(world, id_)
    given = sub(call.body, "properties")
    prefixes = sub(given, "addressSpace").get("addressPrefixes") or []
    if not prefixes:
        raise ArmError(400, "InvalidRequestFormat", "The virtual network has no address space.")
    space = [network_of(prefix, "InvalidAddressPrefixFormat") for prefix in prefixes]
    wanted: dict[str, Json] = {}
    for subnet in items(given, "subnets"):
        if not subnet.get("name"):
            raise ArmError(400, "InvalidRequestFormat", "A subnet has no name.")
        wanted[str(subnet["name"]).lower()] = subnet
    held = {r.name.lower(): r for r in world.store.children(existing, SUBNET)} if existing else {}
    _check_layout(space, [_prefix_of(subnet) for subnet in wanted.values()])
    for name, subnet in held.items():
        if name not in wanted or _prefix_of(wanted[name]) != _prefix_of(subnet.body):
            _subnet_in_use(world, subnet)
    vnet = existing or Resource(id_, VNET, group.name, call.get("virtualNetworkName"), {})
    guid = vnet.properties.get("resourceGuid")
    vnet.body = network.base_body(call, location)
    vnet.body["properties"] = {
        "addressSpace": {"addressPrefixes": list(prefixes)},
        "enableDdosProtection": False,
    }
    if guid:
        vnet.body["properties"]["resourceGuid"] = guid
    for name in ("dhcpOptions", "flowTimeoutInMinutes", "encryption", "virtualNetworkPeerings"):
        if given.get(name) is not None:
            vnet.body["properties"][name] = given[name]
    bodies = {name: _subnet_body(world, vnet, subnet) for name, subnet in wanted.items()}
    for name, subnet in held.items():
        if name not in bodies:
            world.store.remove(subnet)
    for name, body in bodies.items():
        _write_subnet(world, vnet, str(wanted[name]["name"]), body)
    return network.settle(world, call, vnet, existing is None, "net.vnet")


def _prefix_of(subnet: Json) -> Net:
    properties = sub(subnet, "properties")
    prefixes = properties.get("addressPrefixes") or []
    text = properties.get("addressPrefix") or (prefixes[0] if prefixes else None)
    if text is None:
        raise ArmError(400, "InvalidRequestFormat", "A subnet has no address prefix.")
    return network_of(text, "InvalidAddressPrefixFormat")


def _check_layout(space: list[Net], subnets: list[Net]) -> None:
    for index, subnet in enumerate(subnets):
        if not any(inside(subnet, whole) for whole in space):
            raise ArmError(
                400,
                "NetcfgInvalidSubnet",
                f"Subnet '{subnet}' is not within the address space of the virtual network.",
            )
        if subnet.version == 4 and subnet.prefixlen > 29:
            raise ArmError(
                400, "NetcfgInvalidSubnet", f"Subnet '{subnet}' is too small; the smallest is /29."
            )
        for other in subnets[:index]:
            if overlap(subnet, other):
                raise ArmError(400, "NetcfgSubnetRangesOverlap", f"Subnets '{subnet}' and '{other}' overlap.")


def _subnet_body(world: World, vnet: Resource, given: Json) -> Json:
    properties = sub(given, "properties")
    body: Json = {"addressPrefix": str(_prefix_of(given)), "provisioningState": "Updating", "delegations": []}
    body["privateEndpointNetworkPolicies"] = str(
        properties.get("privateEndpointNetworkPolicies") or "Disabled"
    )
    body["privateLinkServiceNetworkPolicies"] = str(
        properties.get("privateLinkServiceNetworkPolicies") or "Enabled"
    )
    nsg = reference(properties.get("networkSecurityGroup"))
    if nsg:
        body["networkSecurityGroup"] = {"id": world.referenced(nsg, NSG, vnet.id).id}
    for name in ("serviceEndpoints", "defaultOutboundAccess"):
        if properties.get(name) is not None:
            body[name] = properties[name]
    return {"properties": body}


def _write_subnet(world: World, vnet: Resource, name: str, body: Json) -> Resource:
    id_ = f"{vnet.id}/subnets/{name}"
    held = world.store.get(id_)
    if held is None:
        made = Resource(id_, SUBNET, vnet.group, name, body)
        world.store.create(made)
        return made
    held.body = body
    world.store.put(held)
    return held


def nics_in(world: World, subnet: Resource) -> list[Json]:
    """IP configurations that live in a subnet."""
    return [
        config
        for nic in world.store.of_type(NIC)
        for config in items(nic.properties, "ipConfigurations")
        if (reference(sub(config, "properties", "subnet")) or "").lower() == subnet.key
    ]


def _subnet_in_use(world: World, subnet: Resource) -> None:
    users = nics_in(world, subnet)
    if users:
        raise ArmError(
            400,
            "InUseSubnetCannotBeDeleted",
            f"Subnet {subnet.name} is in use by {users[0]['id']} and cannot be deleted. In order to delete the subnet, "
            "delete all the resources within the subnet.",
        )


def _vnet_in_use(world: World, vnet: Resource) -> None:
    for subnet in world.store.children(vnet, SUBNET):
        _subnet_in_use(world, subnet)


def vnet_delete(world: World, call: Call) -> Answer:
    return network.remove(world, call, vnet_id(world, call), _vnet_in_use)


def vnet_wire(world: World, vnet: Resource) -> Json:
    out = network.plain(vnet)
    out["properties"]["subnets"] = [network.render(world, s) for s in world.store.children(vnet, SUBNET)]
    out["properties"].setdefault("virtualNetworkPeerings", [])
    return out


def check_address(world: World, call: Call) -> Answer:
    """GET …/checkIPAddressAvailability."""
    vnet = world.require(vnet_id(world, call))
    text = call.query.get("ipAddress") or ""
    try:
        address = ipaddress.ip_address(text)
    except ValueError as bad:
        raise ArmError(400, "InvalidIPAddressInQueryString", f"'{text}' is not an IP address.") from bad
    for subnet in world.store.children(vnet, SUBNET):
        net = _prefix_of(subnet.body)
        if address in net:
            taken = taken_in(world, subnet)
            free = [str(a) for a in usable(net) if str(a) not in taken][:5]
            return Answer(
                200,
                {"available": text not in taken, "availableIPAddresses": free, "isPlatformReserved": False},
            )
    raise ArmError(400, "IPAddressNotInVirtualNetwork", f"{text} lies in no subnet of '{vnet.name}'.")


# subnets


def subnet_put(world: World, call: Call) -> Answer:
    world.open_group(call.get("resourceGroupName"))
    id_, vnet = subnet_id(world, call), world.require(vnet_id(world, call))
    held = world.store.get(id_)
    if (again := network.repeated(world, call, held)) is not None:
        return again
    network.check_trunk(world, id_)
    space = [
        network_of(p, "InvalidAddressPrefixFormat")
        for p in vnet.properties["addressSpace"]["addressPrefixes"]
    ]
    others = [s for s in world.store.children(vnet, SUBNET) if s.key != id_.lower()]
    _check_layout(space, [*(_prefix_of(s.body) for s in others), _prefix_of(call.body)])
    if held is not None and _prefix_of(held.body) != _prefix_of(call.body):
        _subnet_in_use(world, held)
    subnet = _write_subnet(world, vnet, call.get("subnetName"), _subnet_body(world, vnet, call.body))
    operation = world.engine.begin(call, "net.subnet", subnet.id, vnet.location, request=call.body)
    status = 201 if held is None else 200
    return world.accepted(call, operation, status, network.render(world, subnet), "async")


def subnet_delete(world: World, call: Call) -> Answer:
    return network.remove(world, call, subnet_id(world, call), _subnet_in_use)


def subnet_list(world: World, call: Call) -> Answer:
    vnet = world.require(vnet_id(world, call))
    return page(world, call, [network.render(world, s) for s in world.store.children(vnet, SUBNET)])


def subnet_wire(world: World, subnet: Resource) -> Json:
    out = network.plain(subnet)
    users = nics_in(world, subnet)
    if users:
        out["properties"]["ipConfigurations"] = [{"id": config["id"]} for config in users]
    return out


def usable(net: Net) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """Addresses for machines: Azure keeps the first four and the last of a subnet."""
    return [net[index] for index in range(4, min(net.num_addresses - 1, 4096))]


def taken_in(world: World, subnet: Resource) -> dict[str, str]:
    """Private address → id of the configuration that holds it."""
    return {
        str(address): str(config["id"])
        for config in nics_in(world, subnet)
        if (address := sub(config, "properties").get("privateIPAddress"))
    }


# security groups

_RULE_REQUIRED = ("protocol", "access", "priority", "direction")
_DEFAULTS = (
    ("AllowVnetInBound", 65000, "Inbound", "Allow", "VirtualNetwork", "VirtualNetwork"),
    ("AllowAzureLoadBalancerInBound", 65001, "Inbound", "Allow", "AzureLoadBalancer", "*"),
    ("DenyAllInBound", 65500, "Inbound", "Deny", "*", "*"),
    ("AllowVnetOutBound", 65000, "Outbound", "Allow", "VirtualNetwork", "VirtualNetwork"),
    ("AllowInternetOutBound", 65001, "Outbound", "Allow", "*", "Internet"),
    ("DenyAllOutBound", 65500, "Outbound", "Deny", "*", "*"),
)


def nsg_put(world: World, call: Call) -> Answer:
    id_ = nsg_id(world, call)
    existing = world.store.get(id_)
    if (again := network.repeated(world, call, existing)) is not None:
        return again
    group, location = network.location_of(world, call, existing)
    network.check_trunk(world, id_)
    rules = items(sub(call.body, "properties"), "securityRules")
    _check_rules([(str(rule.get("name") or ""), sub(rule, "properties")) for rule in rules])
    nsg = existing or Resource(id_, NSG, group.name, call.get("networkSecurityGroupName"), {})
    guid = nsg.properties.get("resourceGuid")
    nsg.body = network.base_body(call, location)
    nsg.body["properties"] = {"resourceGuid": guid} if guid else {}
    wanted = {str(rule["name"]).lower() for rule in rules}
    for held in world.store.children(nsg, RULE):
        if held.name.lower() not in wanted:
            world.store.remove(held)
    for rule in rules:
        _write_rule(world, nsg, str(rule["name"]), sub(rule, "properties"))
    return network.settle(world, call, nsg, existing is None, "net.nsg")


def _check_rules(rules: list[tuple[str, Json]]) -> None:
    seen: dict[tuple[str, int], str] = {}
    for name, rule in rules:
        missing = [field for field in _RULE_REQUIRED if rule.get(field) in {None, ""}]
        if not name or missing:
            raise ArmError(
                400, "InvalidRequestFormat", f"Security rule '{name}' lacks {', '.join(missing) or 'a name'}."
            )
        priority = rule["priority"]
        if not isinstance(priority, int) or not 100 <= priority <= 4096:
            raise ArmError(
                400,
                "SecurityRuleInvalidPriority",
                f"Security rule '{name}' has an invalid priority: 100 to 4096.",
            )
        slot = (str(rule["direction"]).lower(), priority)
        if slot in seen:
            raise ArmError(
                400,
                "SecurityRuleConflict",
                f"Security rules '{seen[slot]}' and '{name}' share priority and direction.",
            )
        seen[slot] = name


def _write_rule(world: World, nsg: Resource, name: str, properties: Json) -> tuple[Resource, bool]:
    id_ = f"{nsg.id}/securityRules/{name}"
    held = world.store.get(id_)
    body: Json = {"properties": {**properties, "provisioningState": "Updating"}}
    if held is None:
        made = Resource(id_, RULE, nsg.group, name, body)
        world.store.create(made)
        return made, True
    held.body = body
    world.store.put(held)
    return held, False


def rule_put(world: World, call: Call) -> Answer:
    world.open_group(call.get("resourceGroupName"))
    nsg = world.require(nsg_id(world, call))
    if (again := network.repeated(world, call, world.store.get(rule_id(world, call)))) is not None:
        return again
    network.check_trunk(world, nsg.id)
    name, key = call.get("securityRuleName"), rule_id(world, call).lower()
    others = [(r.name, r.properties) for r in world.store.children(nsg, RULE) if r.key != key]
    _check_rules([*others, (name, sub(call.body, "properties"))])
    rule, created = _write_rule(world, nsg, name, sub(call.body, "properties"))
    operation = world.engine.begin(call, "net.rule", rule.id, nsg.location, request=call.body)
    return world.accepted(call, operation, 201 if created else 200, network.render(world, rule), "async")


def rule_delete(world: World, call: Call) -> Answer:
    return network.remove(world, call, rule_id(world, call), lambda w, r: None)


def rule_list(world: World, call: Call) -> Answer:
    nsg = world.require(nsg_id(world, call))
    return page(world, call, [network.render(world, r) for r in world.store.children(nsg, RULE)])


def _nsg_users(world: World, nsg: Resource, type_: str) -> list[str]:
    return [
        r.id
        for r in world.store.of_type(type_)
        if (reference(r.properties.get("networkSecurityGroup")) or "").lower() == nsg.key
    ]


def _nsg_in_use(world: World, nsg: Resource) -> None:
    users = [*_nsg_users(world, nsg, NIC), *_nsg_users(world, nsg, SUBNET)]
    if users:
        raise ArmError(
            400,
            "InUseNetworkSecurityGroupCannotBeDeleted",
            f"Network security group {nsg.id} cannot be deleted because it is in use by: {', '.join(users)}.",
        )


def nsg_delete(world: World, call: Call) -> Answer:
    return network.remove(world, call, nsg_id(world, call), _nsg_in_use)


def nsg_wire(world: World, nsg: Resource) -> Json:
    out = network.plain(nsg)
    properties = out["properties"]
    properties["securityRules"] = [network.render(world, r) for r in world.store.children(nsg, RULE)]
    properties["defaultSecurityRules"] = [
        {
            "id": f"{nsg.id}/defaultSecurityRules/{name}",
            "name": name,
            "type": f"{NSG}/defaultSecurityRules",
            "properties": {
                "protocol": "*", "sourcePortRange": "*", "destinationPortRange": "*", "sourceAddressPrefix": source,
                "destinationAddressPrefix": target, "access": access, "priority": priority, "direction": direction,
                "provisioningState": "Succeeded",
            },
        }
        for name, priority, direction, access, source, target in _DEFAULTS
    ]  # fmt: skip
    for name, type_ in (("networkInterfaces", NIC), ("subnets", SUBNET)):
        users = _nsg_users(world, nsg, type_)
        if users:
            properties[name] = [{"id": user} for user in users]
    return out


network.RENDER[VNET] = vnet_wire
network.RENDER[SUBNET] = subnet_wire
network.RENDER[NSG] = nsg_wire
network.RENDER[RULE] = lambda world, rule: network.plain(rule)
