"""Networks: full replacement, references, addresses, the order of deletion, one write at a time."""

from __future__ import annotations

import asyncio

import pytest

RG, LOCATION = "farshore-dr", "westeurope"


def vnet(*subnets: tuple[str, str], space: str = "10.9.0.0/16", **more) -> dict:
    return {
        "location": LOCATION,
        "properties": {
            "addressSpace": {"addressPrefixes": [space]},
            "subnets": [
                {"name": name, "properties": {"addressPrefix": prefix, **more}} for name, prefix in subnets
            ],
        },
    }


async def test_the_landing_zone_is_there(azure) -> None:
    found = await azure.network.virtual_networks.get(RG, "dr-vnet")
    assert {s.name: s.properties.address_prefix for s in found.properties.subnets} == {
        "web": "10.20.1.0/24",
        "app": "10.20.2.0/24",
        "db": "10.20.3.0/24",
    }


async def test_a_put_replaces_the_network_with_its_subnets(azure, finish) -> None:
    put = azure.network.virtual_networks.begin_create_or_update
    await finish(put(RG, "n", vnet(("a", "10.9.1.0/24"), ("b", "10.9.2.0/24"))))
    changed = await finish(put(RG, "n", vnet(("b", "10.9.2.0/24"), ("c", "10.9.3.0/24"))))
    assert [s.name for s in changed.properties.subnets] == ["b", "c"]
    with azure.refused("NotFound", 404):
        await azure.network.subnets.get(RG, "n", "a")


async def test_a_put_that_would_drop_a_used_subnet_is_refused(azure) -> None:
    await azure.nic("n1")
    with azure.refused("InUseSubnetCannotBeDeleted", 400):
        await azure.network.virtual_networks.begin_create_or_update(RG, "dr-vnet", vnet(space="10.20.0.0/16"))


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (vnet(("a", "10.8.0.0/24")), "NetcfgInvalidSubnet"),
        (vnet(("a", "10.9.1.0/24"), ("b", "10.9.1.128/25")), "NetcfgSubnetRangesOverlap"),
        (vnet(("a", "10.9.1.0/30")), "NetcfgInvalidSubnet"),
        (vnet(("a", "10.9.1.7/24")), "InvalidAddressPrefixFormat"),
        (vnet(("a", "10.9.1.0/24"), networkSecurityGroup={"id": "/nowhere"}), "InvalidResourceReference"),
    ],
)
async def test_impossible_networks_are_refused(azure, body, code) -> None:
    with azure.refused(code, 400):
        await azure.network.virtual_networks.begin_create_or_update(RG, "n", body)


async def test_a_dynamic_address_is_the_lowest_free_one_and_stays(azure) -> None:
    first, second = await azure.nic("n1"), await azure.nic("n2")
    addresses = [n.properties.ip_configurations[0].properties.private_ip_address for n in (first, second)]
    assert addresses == ["10.20.1.4", "10.20.1.5"]
    again = await azure.nic("n1")
    assert again.properties.ip_configurations[0].properties.private_ip_address == "10.20.1.4"
    assert (await azure.ctl(azure.control.creations))[first.id.lower()] == 1


def static(address: str, subnet: str) -> dict:
    return {
        "location": LOCATION,
        "properties": {
            "ipConfigurations": [
                {
                    "name": "ip",
                    "properties": {
                        "subnet": {"id": subnet},
                        "privateIPAllocationMethod": "Static",
                        "privateIPAddress": address,
                    },
                }
            ]
        },
    }


@pytest.mark.parametrize(
    ("address", "code"),
    [
        ("10.20.1.9", "PrivateIPAddressIsAllocated"),
        ("10.20.2.9", "PrivateIPAddressNotInSubnet"),
        ("10.20.1.3", "PrivateIPAddressInReservedRange"),
        ("10.20.1.255", "PrivateIPAddressInReservedRange"),
        ("ten", "InvalidRequestFormat"),
    ],
)
async def test_a_static_address_must_be_free_and_usable(azure, finish, address, code) -> None:
    put = azure.network.network_interfaces.begin_create_or_update
    await finish(put(RG, "n1", static("10.20.1.9", azure.subnet())))
    with azure.refused(code, 400):
        await put(RG, "n2", static(address, azure.subnet()))
    availability = azure.network.virtual_networks.check_ip_address_availability
    assert (await availability(RG, "dr-vnet", ip_address="10.20.1.9")).available is False
    assert (await availability(RG, "dr-vnet", ip_address="10.20.1.10")).available is True


async def test_things_are_deleted_in_the_order_machine_interface_address_subnet(azure, finish) -> None:
    n = azure.network
    ip = await finish(
        n.public_ip_addresses.begin_create_or_update(
            RG,
            "p1",
            {
                "location": LOCATION,
                "sku": {"name": "Standard"},
                "properties": {"publicIPAllocationMethod": "Static"},
            },
        )
    )
    assert ip.properties.ip_address.startswith("203.0.113.")
    body = static("10.20.3.7", azure.subnet("db"))
    body["properties"]["ipConfigurations"][0]["properties"]["publicIPAddress"] = {"id": ip.id}
    nic = await finish(n.network_interfaces.begin_create_or_update(RG, "n1", body))
    disk = await azure.disk("d1")
    await azure.create("vm1", azure.machine(disk.id, nic.id))
    with azure.refused("NicInUse", 400):
        await n.network_interfaces.begin_delete(RG, "n1")
    with azure.refused("PublicIPAddressCannotBeDeleted", 400):
        await n.public_ip_addresses.begin_delete(RG, "p1")
    with azure.refused("InUseSubnetCannotBeDeleted", 400):
        await n.subnets.begin_delete(RG, "dr-vnet", "db")
    with azure.refused("InUseSubnetCannotBeDeleted", 400):
        await n.virtual_networks.begin_delete(RG, "dr-vnet")
    with azure.refused("OperationNotAllowed", 409):
        await azure.compute.disks.begin_delete(RG, "d1")
    await finish(azure.compute.virtual_machines.begin_delete(RG, "vm1"))
    await finish(n.network_interfaces.begin_delete(RG, "n1"))
    await finish(n.public_ip_addresses.begin_delete(RG, "p1"))
    await finish(n.subnets.begin_delete(RG, "dr-vnet", "db"))
    await finish(n.virtual_networks.begin_delete(RG, "dr-vnet"))
    await finish(n.virtual_networks.begin_delete(RG, "dr-vnet"))  # gone already: 204
    await finish(azure.compute.disks.begin_delete(RG, "d1"))
    assert [r.type for r in await azure.ctl(azure.control.resources)] == [
        "Microsoft.Resources/resourceGroups",
        "Microsoft.Storage/storageAccounts",
    ]


async def test_an_interface_names_only_what_is_there(azure) -> None:
    with azure.refused("InvalidResourceReference", 400):
        await azure.nic("n1", subnet="nowhere")
    body = static("10.20.1.9", azure.subnet())
    body["properties"]["networkSecurityGroup"] = {
        "id": azure.id("Microsoft.Network/networkSecurityGroups", "no")
    }
    with azure.refused("InvalidResourceReference", 400):
        await azure.network.network_interfaces.begin_create_or_update(RG, "n1", body)


async def test_a_second_write_on_a_network_must_wait(azure, finish) -> None:
    await azure.ctl(azure.control.fault, "lro_stuck", operation="network.Subnets.create_or_update")
    put = azure.network.subnets.begin_create_or_update
    first = await put(RG, "dr-vnet", "x", {"properties": {"addressPrefix": "10.20.9.0/24"}})
    with azure.refused("AnotherOperationInProgress", 409):
        await put(RG, "dr-vnet", "y", {"properties": {"addressPrefix": "10.20.10.0/24"}})
    with azure.refused("RetryableError", 429) as refusal:
        await azure.nic("n1", subnet="x")
    assert "ReferencedResourceNotProvisioned" in refusal.message
    await azure.nic("n2", subnet="web")  # its own subnet is settled
    await azure.ctl(azure.control.release)
    await first.result()
    await azure.nic("n1", subnet="x")


async def test_security_groups_replace_their_rules_and_guard_priorities(azure, finish) -> None:
    def rule(name: str, priority: int) -> dict:
        properties = {
            "protocol": "Tcp", "access": "Allow", "direction": "Inbound", "priority": priority, "sourcePortRange": "*",
            "destinationPortRange": "443", "sourceAddressPrefix": "*", "destinationAddressPrefix": "*",
        }  # fmt: skip
        return {"name": name, "properties": properties}

    n = azure.network
    put = n.network_security_groups.begin_create_or_update
    await finish(put(RG, "g", {"location": LOCATION, "properties": {"securityRules": [rule("a", 100)]}}))
    group = await finish(
        put(RG, "g", {"location": LOCATION, "properties": {"securityRules": [rule("b", 110)]}})
    )
    assert [r.name for r in group.properties.security_rules] == ["b"]
    assert len(group.properties.default_security_rules) == 6
    await finish(n.security_rules.begin_create_or_update(RG, "g", "c", rule("c", 120)))
    with azure.refused("SecurityRuleConflict", 400):
        await n.security_rules.begin_create_or_update(RG, "g", "d", rule("d", 120))
    with azure.refused("SecurityRuleInvalidPriority", 400):
        await n.security_rules.begin_create_or_update(RG, "g", "e", rule("e", 99))
    await finish(n.subnets.begin_create_or_update(
        RG, "dr-vnet", "web", {"properties": {"addressPrefix": "10.20.1.0/24", "networkSecurityGroup": {"id": group.id}}}
    ))  # fmt: skip
    with azure.refused("InUseNetworkSecurityGroupCannotBeDeleted", 400):
        await n.network_security_groups.begin_delete(RG, "g")
    assert [r.name async for r in n.security_rules.list(RG, "g")] == ["b", "c"]
    await finish(n.security_rules.begin_delete(RG, "g", "c"))


async def test_two_interfaces_cannot_share_a_public_address(azure, finish) -> None:
    ip = await finish(
        azure.network.public_ip_addresses.begin_create_or_update(
            RG, "p1", {"location": LOCATION, "zones": ["1", "2", "3"]}
        )
    )
    bodies = [static(f"10.20.1.{i}", azure.subnet()) for i in (10, 11)]
    for body in bodies:
        body["properties"]["ipConfigurations"][0]["properties"]["publicIPAddress"] = {"id": ip.id}
    put = azure.network.network_interfaces.begin_create_or_update
    nic = await finish(put(RG, "n1", bodies[0]))
    with azure.refused("PublicIPAddressInUse", 400):
        await put(RG, "n2", bodies[1])
    used = await azure.network.public_ip_addresses.get(RG, "p1")
    assert used.properties.ip_configuration.id.startswith(nic.id)


async def test_tags_change_without_an_operation_and_lists_hold_everything(azure, finish) -> None:
    await asyncio.gather(azure.nic("n1"), azure.nic("n2", subnet="app"))
    await azure.network.network_interfaces.update_tags(RG, "n1", {"tags": {"a": "b"}})
    assert {n.name: n.tags async for n in azure.network.network_interfaces.list_all()} == {
        "n1": {"a": "b"},
        "n2": None,
    }
    used = {u.name.value: u.current_value async for u in azure.network.usages.list(LOCATION)}
    assert used["NetworkInterfaces"] == 2


async def test_a_failed_network_write_does_not_leave_its_subnets_updating(azure) -> None:
    await azure.ctl(azure.control.fault, "lro_fail", operation="network.VirtualNetworks.*")
    with azure.refused("InternalServerError"):
        await (
            await azure.network.virtual_networks.begin_create_or_update(RG, "n", vnet(("a", "10.9.1.0/24")))
        ).result()
    failed = await azure.network.virtual_networks.get(RG, "n")
    assert [s.properties.provisioning_state for s in failed.properties.subnets] == ["Failed"]
