"""The landing zone: what an operator would have prepared before any failover. Made once, at a root's first start."""

from __future__ import annotations

from dataclasses import dataclass, field

from farshore.lab.azure import storage
from farshore.lab.azure.model import GROUP, SUBNET, VNET, Resource, resource_id
from farshore.lab.azure.world import World


@dataclass(frozen=True)
class LandingZone:
    """Names and addresses of the recovery site."""

    resource_group: str = "farshore-dr"
    location: str = "westeurope"
    network: str = "dr-vnet"
    space: str = "10.20.0.0/16"
    subnets: dict[str, str] = field(
        default_factory=lambda: {"web": "10.20.1.0/24", "app": "10.20.2.0/24", "db": "10.20.3.0/24"}
    )
    account: str = "farshorelab"


def prepare(world: World, zone: LandingZone) -> str | None:
    """Make what is missing; returns the storage account's resource id, if there is an account."""
    store = world.store
    store.begin()
    try:
        id_ = resource_id(world.subscription, zone.resource_group, GROUP)
        group = store.get(id_)
        if group is None and not store.setting("landed", False):
            group = Resource(
                id_, GROUP, zone.resource_group, zone.resource_group, {"location": zone.location}
            )
            group.state = "Succeeded"
            store.create(group)
            _network(world, zone)
            store.set_setting("landed", True)
        account = storage.declare(world, group) if group is not None else None
    finally:
        store.commit()
    return account.id if account is not None else None


def _network(world: World, zone: LandingZone) -> None:
    vnet_id = resource_id(world.subscription, zone.resource_group, VNET, zone.network)
    vnet = Resource(vnet_id, VNET, zone.resource_group, zone.network, {"location": zone.location})
    vnet.body["properties"] = {
        "addressSpace": {"addressPrefixes": [zone.space]},
        "enableDdosProtection": False,
        "provisioningState": "Succeeded",
    }
    world.store.create(vnet)
    for name, prefix in zone.subnets.items():
        properties = {
            "addressPrefix": prefix,
            "provisioningState": "Succeeded",
            "delegations": [],
            "privateEndpointNetworkPolicies": "Disabled",
            "privateLinkServiceNetworkPolicies": "Enabled",
        }
        subnet = Resource(
            f"{vnet_id}/subnets/{name}", SUBNET, zone.resource_group, name, {"properties": properties}
        )
        world.store.create(subnet)
