"""Microsoft.Storage/storageAccounts, as far as Import and key lookup need it. Declared by hand: its wheel isn't installed."""

from __future__ import annotations

from farshore.lab.azure.model import STORAGE, Answer, ArmError, Call, Resource
from farshore.lab.azure.operations import iso
from farshore.lab.azure.paging import page
from farshore.lab.azure.world import World


def _id(world: World, call: Call) -> str:
    return world.id_of(STORAGE, call.get("resourceGroupName"), call.get("accountName"))


def get(world: World, call: Call) -> Answer:
    return Answer(200, world.require(_id(world, call)).wire())


def list_accounts(world: World, call: Call) -> Answer:
    return page(
        world, call, [r.wire() for r in world.store.of_type(STORAGE, call.params.get("resourceGroupName"))]
    )


def keys(world: World, call: Call) -> Answer:
    """POST …/listKeys."""
    resource = world.require(_id(world, call))
    if world.account is None or world.account.name != resource.name:
        raise ArmError(
            404, "ResourceNotFound", f"The storage account '{resource.name}' has no data plane here."
        )
    key = {
        "keyName": "key1",
        "value": world.account.key,
        "permissions": "FULL",
        "creationTime": iso(resource.created),
    }
    return Answer(200, {"keys": [key]})


def declare(world: World, group: Resource) -> Resource | None:
    """Show the page-blob server's account as a resource; its endpoint may have moved since the last start."""
    if world.account is None:
        return None
    id_ = world.id_of(STORAGE, group.name, world.account.name)
    account = world.store.get(id_)
    made = account is None
    account = account or Resource(id_, STORAGE, group.name, world.account.name, {})
    account.body = {
        "location": group.location,
        "kind": "StorageV2",
        "sku": {"name": "Standard_LRS", "tier": "Standard"},
        "tags": {"purpose": "replica"},
        "properties": {
            "provisioningState": "Succeeded",
            "primaryEndpoints": {"blob": world.account.blob_endpoint + "/"},
            "primaryLocation": group.location,
            "statusOfPrimary": "available",
            "supportsHttpsTrafficOnly": True,
            "accessTier": "Hot",
        },
    }
    if made:
        world.store.create(account)
    else:
        world.store.put(account)
    return account
