"""Network interfaces: references, private addresses (static and dynamic), their virtual machine."""

from __future__ import annotations

import ipaddress
import secrets

from farshore.lab.azure import network, vnets
from farshore.lab.azure.model import (
    NIC,
    NSG,
    PUBLIC_IP,
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
from farshore.lab.azure.world import World


def nic_id(world: World, call: Call) -> str:
    return world.id_of(NIC, call.get("resourceGroupName"), call.get("networkInterfaceName"))


def put(world: World, call: Call) -> Answer:
    id_ = nic_id(world, call)
    existing = world.store.get(id_)
    if (again := network.repeated(world, call, existing)) is not None:
        return again
    group, location = network.location_of(world, call, existing)
    network.check_trunk(world, id_)
    given = sub(call.body, "properties")
    configs = items(given, "ipConfigurations")
    if not configs:
        raise ArmError(400, "InvalidRequestFormat", f"Network interface {id_} has no IP configuration.")
    nic = existing or Resource(id_, NIC, group.name, call.get("networkInterfaceName"), {})
    held = nic.properties
    made = _configurations(world, nic, location, configs, items(held, "ipConfigurations"))
    nsg = reference(given.get("networkSecurityGroup"))
    properties: Json = {
        "ipConfigurations": made,
        "dnsSettings": {
            "dnsServers": list(sub(given, "dnsSettings").get("dnsServers") or []),
            "appliedDnsServers": [],
        },
        "macAddress": held.get("macAddress") or _mac(),
        "enableAcceleratedNetworking": bool(given.get("enableAcceleratedNetworking")),
        "enableIPForwarding": bool(given.get("enableIPForwarding")),
        "nicType": "Standard",
    }
    if nsg:
        target = world.referenced(nsg, NSG, id_)
        network.check_settled(world, target, id_)
        properties["networkSecurityGroup"] = {"id": target.id}
    for name in ("resourceGuid", "virtualMachine", "primary"):
        if name in held:
            properties[name] = held[name]
    nic.body = {**network.base_body(call, location), "properties": properties}
    return network.settle(world, call, nic, existing is None, "net.nic")


def _configurations(
    world: World, nic: Resource, location: str, configs: list[Json], held: list[Json]
) -> list[Json]:
    addresses = {str(c["name"]).lower(): c["properties"].get("privateIPAddress") for c in held}
    out: list[Json] = []
    for index, config in enumerate(configs):
        name, given = str(config.get("name") or ""), sub(config, "properties")
        if not name:
            raise ArmError(400, "InvalidRequestFormat", f"An IP configuration of {nic.id} has no name.")
        subnet = world.referenced(reference(given.get("subnet")), SUBNET, nic.id)
        vnet = world.referenced(parent_key(subnet.id), "Microsoft.Network/virtualNetworks", nic.id)
        if vnet.location != location:
            raise ArmError(
                400,
                "InvalidResourceReference",
                f"{nic.id} is in '{location}', its network {vnet.id} in '{vnet.location}'.",
            )
        network.check_settled(world, subnet, nic.id)
        method = str(given.get("privateIPAllocationMethod") or "Dynamic")
        own = {str(c["properties"].get("privateIPAddress")) for c in out}
        if method == "Static":
            address = _static(world, nic, subnet, str(given.get("privateIPAddress") or ""), own)
        else:
            address = _dynamic(world, nic, subnet, addresses.get(name.lower()), own)
        properties: Json = {
            "privateIPAddress": address,
            "privateIPAllocationMethod": method,
            "privateIPAddressVersion": str(given.get("privateIPAddressVersion") or "IPv4"),
            "primary": bool(given.get("primary", index == 0)),
            "subnet": {"id": subnet.id},
            "provisioningState": "Succeeded",
        }
        public = reference(given.get("publicIPAddress"))
        if public:
            properties["publicIPAddress"] = {"id": _public(world, nic, public).id}
        out.append({"id": f"{nic.id}/ipConfigurations/{name}", "name": name, "type": f"{NIC}/ipConfigurations",
                    "properties": properties})  # fmt: skip
    if sum(bool(c["properties"]["primary"]) for c in out) != 1:
        raise ArmError(
            400,
            "NetworkInterfaceMustHaveOnePrimaryIpConfiguration",
            f"{nic.id} needs one primary configuration.",
        )
    return out


def _prefix(subnet: Resource) -> vnets.Net:
    return vnets.network_of(subnet.properties["addressPrefix"], "InvalidAddressPrefixFormat")


def _others(world: World, nic: Resource, subnet: Resource) -> dict[str, str]:
    mine = nic.key + "/"
    return {
        a: holder
        for a, holder in vnets.taken_in(world, subnet).items()
        if not holder.lower().startswith(mine)
    }


def _static(world: World, nic: Resource, subnet: Resource, text: str, own: set[str]) -> str:
    try:
        address = ipaddress.ip_address(text)
    except ValueError as bad:
        raise ArmError(400, "InvalidRequestFormat", f"'{text}' is not an IP address.") from bad
    net = _prefix(subnet)
    if address not in net:
        raise ArmError(
            400, "PrivateIPAddressNotInSubnet",
            f"Private static IP address {text} does not belong to the range of subnet prefix {net}.",
        )  # fmt: skip
    if int(address) - int(net.network_address) < 4 or address == net.broadcast_address:
        raise ArmError(
            400, "PrivateIPAddressInReservedRange", f"Private static IP address {text} is reserved by Azure."
        )
    holder = _others(world, nic, subnet).get(text)
    if holder or text in own:
        raise ArmError(
            400, "PrivateIPAddressIsAllocated", f"IP configuration {nic.id} cannot use {text}: it is already allocated "
            f"to resource {holder or nic.id}.",
        )  # fmt: skip
    return text


def _dynamic(world: World, nic: Resource, subnet: Resource, before: str | None, own: set[str]) -> str:
    taken, net = set(_others(world, nic, subnet)) | own, _prefix(subnet)
    if before and before not in taken and ipaddress.ip_address(before) in net:
        return before
    for address in vnets.usable(net):
        if str(address) not in taken:
            return str(address)
    raise ArmError(
        400, "SubnetIsFull", f"Subnet {subnet.name} with address prefix {net} does not have enough capacity."
    )


def _public(world: World, nic: Resource, id_: str) -> Resource:
    public = world.referenced(id_, PUBLIC_IP, nic.id)
    network.check_settled(world, public, nic.id)
    user = network.ip_user(world, public)
    if user and not user.lower().startswith(nic.key + "/"):
        raise ArmError(
            400, "PublicIPAddressInUse", f"Resource {nic.id} is referencing public IP address {public.id} that is already "
            f"allocated to resource {user}.",
        )  # fmt: skip
    return public


def _mac() -> str:
    return "-".join(["00", "0D", "3A", *(f"{byte:02X}" for byte in secrets.token_bytes(3))])


def _in_use(world: World, nic: Resource) -> None:
    machine = reference(nic.properties.get("virtualMachine"))
    if machine:
        raise ArmError(
            400, "NicInUse", f"Network Interface {nic.id} is used by existing resource {machine}. In order to delete the "
            "network interface, it must be dissociated from the resource.",
        )  # fmt: skip


def delete(world: World, call: Call) -> Answer:
    return network.remove(world, call, nic_id(world, call), _in_use)


network.RENDER[NIC] = lambda world, nic: network.plain(nic)
