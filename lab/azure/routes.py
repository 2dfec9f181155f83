"""Every operation the laboratory serves, and who handles it. The contract test holds this table against the SDK's wheels."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from farshore.lab.azure import (
    catalog,
    disk_access,
    disks,
    groups,
    network,
    nics,
    runcommand,
    storage,
    vm_power,
    vms,
    vnets,
)
from farshore.lab.azure.model import NIC, NSG, PUBLIC_IP, VNET, Answer, Call, Route
from farshore.lab.azure.world import World

COMPUTE, DISKS, SKUS, NETWORK, RESOURCES, STORAGE = (
    "2026-04-01", "2026-03-02", "2021-07-01", "2026-03-01", "2025-04-01", "2026-09-01",
)  # fmt: skip

Handler = Callable[[World, Call], Answer]

_SUB = "/subscriptions/{subscriptionId}"
_RG = _SUB + "/resourceGroups/{resourceGroupName}"
_GROUP = _SUB + "/resourcegroups/{resourceGroupName}"
_C = "/providers/Microsoft.Compute"
_N = "/providers/Microsoft.Network"
_VM = f"{_RG}{_C}/virtualMachines/{{vmName}}"
_VNET = f"{_RG}{_N}/virtualNetworks/{{virtualNetworkName}}"
_SUBNET = _VNET + "/subnets"
_NSG = f"{_RG}{_N}/networkSecurityGroups/{{networkSecurityGroupName}}"
_RULES = _NSG + "/securityRules"
_NIC = f"{_RG}{_N}/networkInterfaces/{{networkInterfaceName}}"
_IP = f"{_RG}{_N}/publicIPAddresses/{{publicIpAddressName}}"
_ACCOUNTS = "/providers/Microsoft.Storage/storageAccounts"
_TAGS = "/{scope}/providers/Microsoft.Resources/tags/default"
_PROVIDER = _SUB + "/providers/{resourceProviderNamespace}"

LRO_STATUS = "lro.status"
LRO_RESULT = "lro.result"
_LRO = _SUB + "/providers/{namespace}/locations/{location}"

_Row = tuple[str, str, str, str, tuple[int, ...], Handler]


def _disk_rows(group: str, kind: str, name: str) -> list[_Row]:
    one = f"{_RG}{_C}/{kind}/{{{name}}}"
    return [
        (f"compute.{group}.get", "GET", one, DISKS, (200,), disks.get),
        (f"compute.{group}.create_or_update", "PUT", one, DISKS, (202,), disks.put),
        (f"compute.{group}.update", "PATCH", one, DISKS, (202,), disks.patch),
        (f"compute.{group}.delete", "DELETE", one, DISKS, (202, 204), disks.delete),
        (
            f"compute.{group}.list_by_resource_group",
            "GET",
            f"{_RG}{_C}/{kind}",
            DISKS,
            (200,),
            disks.list_disks,
        ),
        (f"compute.{group}.list", "GET", f"{_SUB}{_C}/{kind}", DISKS, (200,), disks.list_disks),
        (f"compute.{group}.grant_access", "POST", one + "/beginGetAccess", DISKS, (202,), disk_access.grant),
        (f"compute.{group}.revoke_access", "POST", one + "/endGetAccess", DISKS, (202,), disk_access.revoke),
    ]


def _network_rows(
    group: str,
    kind: str,
    one: str,
    type_: str,
    *,
    put: Handler,
    delete: Handler,
    id_of: Callable[[World, Call], str],
) -> list[_Row]:
    def read(world: World, call: Call) -> Answer:
        return network.read(world, id_of(world, call))

    def tags(world: World, call: Call) -> Answer:
        return network.update_tags(world, call, id_of(world, call))

    def listed(world: World, call: Call) -> Answer:
        return network.list_all(world, call, type_)

    return [
        (f"network.{group}.get", "GET", one, NETWORK, (200,), read),
        (f"network.{group}.create_or_update", "PUT", one, NETWORK, (200, 201), put),
        (f"network.{group}.update_tags", "PATCH", one, NETWORK, (200,), tags),
        (f"network.{group}.delete", "DELETE", one, NETWORK, (202, 204), delete),
        (f"network.{group}.list", "GET", f"{_RG}{_N}/{kind}", NETWORK, (200,), listed),
        (f"network.{group}.list_all", "GET", f"{_SUB}{_N}/{kind}", NETWORK, (200,), listed),
    ]


_ROWS: list[_Row] = [
    ("resource.resources.ResourceGroups.create_or_update", "PUT", _GROUP, RESOURCES, (200, 201), groups.put),
    ("resource.resources.ResourceGroups.get", "GET", _GROUP, RESOURCES, (200,), groups.get),
    ("resource.resources.ResourceGroups.check_existence", "HEAD", _GROUP, RESOURCES, (204, 404), groups.head),
    ("resource.resources.ResourceGroups.update", "PATCH", _GROUP, RESOURCES, (200,), groups.patch),
    ("resource.resources.ResourceGroups.delete", "DELETE", _GROUP, RESOURCES, (202,), groups.delete),
    ("resource.resources.ResourceGroups.list", "GET", _SUB + "/resourcegroups", RESOURCES, (200,), groups.list_groups),
    ("resource.resources.Resources.list_by_resource_group", "GET", _GROUP + "/resources", RESOURCES, (200,), groups.list_resources),
    ("resource.resources.Resources.list", "GET", _SUB + "/resources", RESOURCES, (200,), groups.list_resources),
    ("resource.resources.Tags.get_at_scope", "GET", _TAGS, RESOURCES, (200,), groups.tags_get),
    ("resource.resources.Tags.create_or_update_at_scope", "PUT", _TAGS, RESOURCES, (200,), groups.tags_put),
    ("resource.resources.Tags.update_at_scope", "PATCH", _TAGS, RESOURCES, (200,), groups.tags_patch),
    ("resource.resources.Tags.delete_at_scope", "DELETE", _TAGS, RESOURCES, (200,), groups.tags_delete),
    ("resource.resources.Providers.get", "GET", _PROVIDER, RESOURCES, (200,), groups.provider_get),
    ("resource.resources.Providers.list", "GET", _SUB + "/providers", RESOURCES, (200,), groups.provider_list),
    ("resource.resources.Providers.register", "POST", _PROVIDER + "/register", RESOURCES, (200,), groups.provider_register),
    *_disk_rows("Disks", "disks", "diskName"),
    *_disk_rows("Snapshots", "snapshots", "snapshotName"),
    ("compute.VirtualMachines.get", "GET", _VM, COMPUTE, (200,), vms.get),
    ("compute.VirtualMachines.create_or_update", "PUT", _VM, COMPUTE, (200, 201), vms.put),
    ("compute.VirtualMachines.update", "PATCH", _VM, COMPUTE, (200,), vms.patch),
    ("compute.VirtualMachines.delete", "DELETE", _VM, COMPUTE, (202, 204), vms.delete),
    ("compute.VirtualMachines.list", "GET", f"{_RG}{_C}/virtualMachines", COMPUTE, (200,), vms.list_vms),
    ("compute.VirtualMachines.list_all", "GET", f"{_SUB}{_C}/virtualMachines", COMPUTE, (200,), vms.list_vms),
    ("compute.VirtualMachines.list_by_location", "GET", f"{_SUB}{_C}/locations/{{location}}/virtualMachines", COMPUTE, (200,), vms.list_vms),
    ("compute.VirtualMachines.instance_view", "GET", _VM + "/instanceView", COMPUTE, (200,), vms.get_instance_view),
    ("compute.VirtualMachines.start", "POST", _VM + "/start", COMPUTE, (202,), vm_power.power),
    ("compute.VirtualMachines.power_off", "POST", _VM + "/powerOff", COMPUTE, (202,), vm_power.power),
    ("compute.VirtualMachines.deallocate", "POST", _VM + "/deallocate", COMPUTE, (202,), vm_power.power),
    ("compute.VirtualMachines.restart", "POST", _VM + "/restart", COMPUTE, (202,), vm_power.power),
    ("compute.VirtualMachines.run_command", "POST", _VM + "/runCommand", COMPUTE, (202,), runcommand.start),
    ("compute.Usage.list", "GET", f"{_SUB}{_C}/locations/{{location}}/usages", COMPUTE, (200,), catalog.usages),
    ("compute.VirtualMachineSizes.list", "GET", f"{_SUB}{_C}/locations/{{location}}/vmSizes", COMPUTE, (200,), catalog.sizes),
    ("compute.ResourceSkus.list", "GET", f"{_SUB}{_C}/skus", SKUS, (200,), catalog.skus),
    *_network_rows("VirtualNetworks", "virtualNetworks", _VNET, VNET, put=vnets.vnet_put, delete=vnets.vnet_delete, id_of=vnets.vnet_id),
    ("network.VirtualNetworks.check_ip_address_availability", "GET", _VNET + "/checkIPAddressAvailability", NETWORK, (200,), vnets.check_address),
    ("network.Subnets.get", "GET", _SUBNET + "/{subnetName}", NETWORK, (200,), lambda w, c: network.read(w, vnets.subnet_id(w, c))),
    ("network.Subnets.create_or_update", "PUT", _SUBNET + "/{subnetName}", NETWORK, (200, 201), vnets.subnet_put),
    ("network.Subnets.delete", "DELETE", _SUBNET + "/{subnetName}", NETWORK, (202, 204), vnets.subnet_delete),
    ("network.Subnets.list", "GET", _SUBNET, NETWORK, (200,), vnets.subnet_list),
    *_network_rows("NetworkSecurityGroups", "networkSecurityGroups", _NSG, NSG, put=vnets.nsg_put, delete=vnets.nsg_delete, id_of=vnets.nsg_id),
    ("network.SecurityRules.get", "GET", _RULES + "/{securityRuleName}", NETWORK, (200,), lambda w, c: network.read(w, vnets.rule_id(w, c))),
    ("network.SecurityRules.create_or_update", "PUT", _RULES + "/{securityRuleName}", NETWORK, (200, 201), vnets.rule_put),
    ("network.SecurityRules.delete", "DELETE", _RULES + "/{securityRuleName}", NETWORK, (202, 204), vnets.rule_delete),
    ("network.SecurityRules.list", "GET", _RULES, NETWORK, (200,), vnets.rule_list),
    *_network_rows("NetworkInterfaces", "networkInterfaces", _NIC, NIC, put=nics.put, delete=nics.delete, id_of=nics.nic_id),
    *_network_rows("PublicIPAddresses", "publicIPAddresses", _IP, PUBLIC_IP, put=network.ip_put, delete=network.ip_delete, id_of=network.ip_id),
    ("network.Usages.list", "GET", f"{_SUB}{_N}/locations/{{location}}/usages", NETWORK, (200,), catalog.network_usages),
    ("storage.StorageAccounts.get_properties", "GET", f"{_RG}{_ACCOUNTS}/{{accountName}}", STORAGE, (200,), storage.get),
    ("storage.StorageAccounts.list_by_resource_group", "GET", f"{_RG}{_ACCOUNTS}", STORAGE, (200,), storage.list_accounts),
    ("storage.StorageAccounts.list", "GET", f"{_SUB}{_ACCOUNTS}", STORAGE, (200,), storage.list_accounts),
    ("storage.StorageAccounts.list_keys", "POST", f"{_RG}{_ACCOUNTS}/{{accountName}}/listKeys", STORAGE, (200,), storage.keys),
    (LRO_STATUS, "GET", _LRO + "/operations/{operationId}", "", (200,), lambda w, c: w.engine.status(c)),
    (LRO_RESULT, "GET", _LRO + "/operationResults/{operationId}", "", (200, 202, 204), lambda w, c: w.engine.outcome(c)),
]  # fmt: skip


@dataclass(frozen=True)
class Entry:
    route: Route
    pattern: re.Pattern[str]
    handler: Handler


def _pattern(template: str) -> re.Pattern[str]:
    """Static parts ignore case; `{scope}` may hold slashes, other parameters may not."""
    out = ""
    for part in re.split(r"(\{\w+\})", template):
        if part == "{scope}":
            out += "(?P<scope>.+?)"
        elif part.startswith("{"):
            out += f"(?P<{part[1:-1]}>[^/]+)"
        else:
            out += re.escape(part)
    return re.compile(f"^{out}/?$", re.IGNORECASE)


BODIES = {
    "resource.resources.ResourceGroups.create_or_update": "ResourceGroup",
    "resource.resources.ResourceGroups.update": "ResourceGroupPatchable",
    "resource.resources.Tags.create_or_update_at_scope": "TagsResource",
    "resource.resources.Tags.update_at_scope": "TagsPatchResource",
    "compute.Disks.create_or_update": "Disk",
    "compute.Disks.update": "DiskUpdate",
    "compute.Disks.grant_access": "GrantAccessData",
    "compute.Snapshots.create_or_update": "Snapshot",
    "compute.Snapshots.update": "SnapshotUpdate",
    "compute.Snapshots.grant_access": "GrantAccessData",
    "compute.VirtualMachines.create_or_update": "VirtualMachine",
    "compute.VirtualMachines.update": "VirtualMachineUpdate",
    "compute.VirtualMachines.run_command": "RunCommandInput",
    "network.VirtualNetworks.create_or_update": "VirtualNetwork",
    "network.VirtualNetworks.update_tags": "TagsObject",
    "network.Subnets.create_or_update": "Subnet",
    "network.NetworkSecurityGroups.create_or_update": "NetworkSecurityGroup",
    "network.NetworkSecurityGroups.update_tags": "TagsObject",
    "network.SecurityRules.create_or_update": "SecurityRule",
    "network.NetworkInterfaces.create_or_update": "NetworkInterface",
    "network.NetworkInterfaces.update_tags": "TagsObject",
    "network.PublicIPAddresses.create_or_update": "PublicIPAddress",
    "network.PublicIPAddresses.update_tags": "TagsObject",
}
"""Models of the requests, where there is one."""

_BUCKETS = {"GET": "reads", "HEAD": "reads", "DELETE": "deletes"}

TABLE: tuple[Entry, ...] = tuple(
    Entry(
        Route(
            operation, method, template, version, codes, _BUCKETS.get(method, "writes"), BODIES.get(operation)
        ),
        _pattern(template),
        handler,
    )
    for operation, method, template, version, codes, handler in _ROWS
)


def find(method: str, path: str) -> tuple[Entry, dict[str, str]] | None:
    """The route of a request and the values in its path."""
    for entry in TABLE:
        if entry.route.method == method and (found := entry.pattern.match(path)):
            return entry, found.groupdict()
    return None


def known_path(path: str) -> bool:
    return any(entry.pattern.match(path) for entry in TABLE)
