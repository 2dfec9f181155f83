"""Interfaces, public addresses and networks of tests, against the laboratory Azure."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from azure.mgmt.network import models as nm

from farshore.domain.errors import Code, FarshoreError
from farshore.providers.azure.adapter import AzureSite
from farshore.providers.azure.networks import VnetLock
from farshore.providers.ports import Purpose, TargetNic

from .bench import Azure, World, settled, until


async def free_address(site: AzureSite, subnet: str = "10.20.3.", start: int = 50) -> str:
    for last in range(start, 250):
        seen = await site._clients.network.virtual_networks.check_ip_address_availability(
            site.settings.resource_group, "dr-vnet", ip_address=f"{subnet}{last}"
        )
        if seen.available:
            return f"{subnet}{last}"
    raise AssertionError("the subnet is full")


async def test_an_interface_gets_the_address_of_the_plan(site: AzureSite, world: World) -> None:
    address = await free_address(site)
    made = await site.create_nic(world.owner(), world.spec(), 0, TargetNic("dr-vnet", "db", address))
    seen = await site._clients.network.network_interfaces.get(site.settings.resource_group, made.name)
    config = seen.properties.ip_configurations[0].properties
    assert (config.private_ip_address, config.private_ip_allocation_method) == (address, "Static")
    assert seen.tags["farshore-machine"] == f"web-{world.tag}"
    assert seen.tags["team"] == "crm"


async def test_an_interface_may_have_a_public_address_and_a_security_group(
    site: AzureSite, cloud: Azure, world: World
) -> None:
    rg = site.settings.resource_group
    poller = await site._clients.network.network_security_groups.begin_create_or_update(
        rg, f"nsg-{world.tag}", nm.NetworkSecurityGroup(location=site.settings.location)
    )
    group = await poller.result()
    nic = TargetNic("dr-vnet", "web", public=True, security_group=f"nsg-{world.tag}")
    made = await site.create_nic(world.owner(), world.spec(zone="1"), 1, nic)
    seen = await site._clients.network.network_interfaces.get(rg, made.name)
    assert seen.properties.network_security_group.id == group.id
    public = await site._clients.network.public_ip_addresses.get(
        rg, seen.properties.ip_configurations[0].properties.public_ip_address.id.rsplit("/", 1)[1]
    )
    assert (public.tags["farshore-run"], public.zones) == (f"run-{world.tag}", ["1"])


async def test_asking_again_makes_no_second_interface(site: AzureSite, cloud: Azure, world: World) -> None:
    nic = TargetNic("dr-vnet", "web", public=True)
    one, two = [await site.create_nic(world.owner(), world.spec(), 0, nic) for _ in range(2)]
    assert one == two
    assert sorted(cloud.created(world.tag).values()) == [1, 1]


async def test_a_lost_answer_makes_no_second_interface(site: AzureSite, cloud: Azure, world: World) -> None:
    cloud.control.fault(
        "drop_after", operation="network.NetworkInterfaces.create_or_update", path=f"*{world.tag}*", count=2
    )
    nic = TargetNic("dr-vnet", "web")
    with pytest.raises(FarshoreError) as caught:
        await site.create_nic(world.owner(), world.spec(), 0, nic)
    assert caught.value.code is Code.TARGET_UNREACHABLE
    await settled(lambda: site.create_nic(world.owner(), world.spec(), 0, nic))
    assert list(cloud.created(world.tag).values()) == [1]


async def test_a_killed_call_leaves_an_interface_that_the_successor_takes(cloud: Azure, world: World) -> None:
    cloud.control.time_scale(0.05)
    first = AzureSite(cloud.settings, snapshot_url=str)
    task = asyncio.create_task(first.create_nic(world.owner(), world.spec(), 0, TargetNic("dr-vnet", "web")))
    await until(lambda: bool(cloud.created(world.tag)))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await first.close()
    second = AzureSite(cloud.settings, snapshot_url=str)
    await second.create_nic(world.owner(), world.spec(), 0, TargetNic("dr-vnet", "web"))
    await second.close()
    assert list(cloud.created(world.tag).values()) == [1]


async def test_a_failed_interface_is_made_again(site: AzureSite, cloud: Azure, world: World) -> None:
    cloud.control.fault(
        "lro_fail", operation="network.NetworkInterfaces.create_or_update", path=f"*{world.tag}*"
    )
    with pytest.raises(FarshoreError) as caught:
        await site.create_nic(world.owner(), world.spec(), 0, TargetNic("dr-vnet", "web"))
    assert caught.value.code is Code.TARGET_OPERATION_FAILED
    await site.create_nic(world.owner(), world.spec(), 0, TargetNic("dr-vnet", "web"))
    assert list(cloud.created(world.tag).values()) == [2]
    assert len(cloud.there(world.tag)) == 1


async def test_a_taken_address_is_named_with_machine_and_place(site: AzureSite, world: World) -> None:
    address = await free_address(site, start=120)
    nic = TargetNic("dr-vnet", "db", address)
    await site.create_nic(world.owner("one"), world.spec("one"), 0, nic)
    with pytest.raises(FarshoreError, match=f"Address {address} of two-{world.tag} is in use") as caught:
        await site.create_nic(world.owner("two"), world.spec("two"), 0, nic)
    assert caught.value.code is Code.ADDRESS_IN_USE
    assert not caught.value.retryable


@pytest.mark.parametrize(
    "nic",
    [
        TargetNic("nowhere", "web"),
        TargetNic("dr-vnet", "nowhere"),
        TargetNic("dr-vnet", "web", security_group="none"),
    ],
)
async def test_what_the_plan_names_has_to_exist(site: AzureSite, world: World, nic: TargetNic) -> None:
    with pytest.raises(FarshoreError) as caught:
        await site.create_nic(world.owner(), world.spec(), 0, nic)
    assert caught.value.code is Code.NETWORK_NOT_FOUND


@pytest.mark.parametrize(("parallel", "most"), [(1, 1), (3, 3)])
async def test_interfaces_of_one_network_go_as_many_at_a_time_as_the_settings_say(
    cloud: Azure, world: World, parallel: int, most: int
) -> None:
    cloud.control.time_scale(0.02)
    site = AzureSite(replace(cloud.settings, network_parallel=parallel), snapshot_url=str)
    mark = cloud.last_request()
    await asyncio.gather(
        *(
            site.create_nic(world.owner(f"m{n}"), world.spec(f"m{n}"), 0, TargetNic("dr-vnet", "app"))
            for n in range(6)
        )
    )
    await site.close()
    assert [r for r in cloud.control.requests(mark) if r.status in (409, 429)] == []
    assert list(cloud.created(world.tag).values()) == [1] * 6
    runs = [o for o in cloud.control.operations() if world.tag in o["resource"]]
    at_once = [sum(o["started"] <= p["started"] < o["ended"] for o in runs) for p in runs]
    assert max(at_once) <= most


async def test_a_change_of_the_network_waits_for_interfaces_and_they_for_it() -> None:
    lock, inside, seen = VnetLock(3), set[str](), list[frozenset[str]]()

    async def interface(name: str) -> None:
        async with lock.shared():
            inside.add(name)
            seen.append(frozenset(inside))
            await asyncio.sleep(0.005)
            inside.discard(name)

    async def network(name: str) -> None:
        async with lock.whole():
            inside.add(name)
            seen.append(frozenset(inside))
            await asyncio.sleep(0.005)
            seen.append(frozenset(inside))
            inside.discard(name)

    await asyncio.gather(*(interface(f"i{n}") if n % 4 else network(f"N{n}") for n in range(24)))
    for now in seen:
        assert len(now) <= 3
        assert len(now) == 1 or not any(name.startswith("N") for name in now)
    assert max(len(now) for now in seen) == 3


async def test_a_busy_network_is_retryable_with_the_time_to_wait(
    site: AzureSite, cloud: Azure, world: World
) -> None:
    cloud.control.fault(
        "status", operation="network.NetworkInterfaces.create_or_update", path=f"*{world.tag}*", status=409,
        code="AnotherOperationInProgress", retry_after=4,
    )  # fmt: skip
    with pytest.raises(FarshoreError) as caught:
        await site.create_nic(world.owner(), world.spec(), 0, TargetNic("dr-vnet", "web"))
    assert (caught.value.code, caught.value.retryable, caught.value.retry_after) == (
        Code.TARGET_BUSY,
        True,
        4,
    )


async def test_a_test_network_has_the_shape_of_the_real_one_and_no_way_out(
    site: AzureSite, cloud: Azure, world: World
) -> None:
    owner = world.owner("", purpose=Purpose.TEST)
    name = await site.ensure_test_network(owner, like=["dr-vnet"])
    assert name == await site.ensure_test_network(owner, like=["dr-vnet"])
    made = await site._clients.network.virtual_networks.get(site.settings.resource_group, name)
    assert made.properties.address_space.address_prefixes == ["10.20.0.0/16"]
    assert {s.name: s.properties.address_prefix for s in made.properties.subnets} == {
        "web": "10.20.1.0/24", "app": "10.20.2.0/24", "db": "10.20.3.0/24",
    }  # fmt: skip
    assert all(s.properties.default_outbound_access is False for s in made.properties.subnets)
    assert made.tags["farshore-purpose"] == "test"
    assert not made.properties.virtual_network_peerings
    await site.check_isolated(name)
    assert [n for id_, n in cloud.created(name).items() if id_.endswith(name)] == [1]
    # The same address as in the real network is free here.
    nic = await site.create_nic(owner, world.spec(), 0, TargetNic(name, "db", "10.20.3.9"))
    assert nic.name


async def test_a_peered_network_is_not_isolated(site: AzureSite, cloud: Azure, world: World) -> None:
    name = await site.ensure_test_network(world.owner("", purpose=Purpose.TEST), like=["dr-vnet"])
    made = next(id_ for id_ in cloud.there(name) if id_.endswith(name))
    far = made.replace(name, "dr-vnet")
    cloud.control.change_behind(
        made,
        {"properties": {"virtualNetworkPeerings": [
            {"id": f"{made}/virtualNetworkPeerings/home", "name": "home", "properties": {"remoteVirtualNetwork": {"id": far}}}
        ]}},
    )  # fmt: skip
    with pytest.raises(FarshoreError, match=r"peering home to .*dr-vnet") as caught:
        await site.check_isolated(name)
    assert caught.value.code is Code.NETWORK_NOT_ISOLATED


async def test_a_network_with_a_gateway_subnet_is_not_isolated(site: AzureSite, world: World) -> None:
    rg, name = site.settings.resource_group, f"gw-{world.tag}"
    poller = await site._clients.network.virtual_networks.begin_create_or_update(
        rg,
        name,
        nm.VirtualNetwork(
            location=site.settings.location,
            properties=nm.VirtualNetworkPropertiesFormat(
                address_space=nm.AddressSpace(address_prefixes=["10.9.0.0/16"]),
                subnets=[
                    nm.Subnet(
                        name="GatewaySubnet",
                        properties=nm.SubnetPropertiesFormat(address_prefix="10.9.0.0/24"),
                    ),
                    nm.Subnet(
                        name="batch", properties=nm.SubnetPropertiesFormat(address_prefix="10.9.1.0/24")
                    ),
                ],
            ),
        ),
    )
    await poller.result()
    with pytest.raises(FarshoreError, match="gateway subnet") as caught:
        await site.check_isolated(name)
    assert caught.value.code is Code.NETWORK_NOT_ISOLATED
    # A test network shaped like it leaves the gateway's subnet out, and takes several networks together.
    made = await site.ensure_test_network(world.owner("", purpose=Purpose.TEST), like=["dr-vnet", name])
    seen = await site._clients.network.virtual_networks.get(rg, made)
    assert seen.properties.address_space.address_prefixes == ["10.20.0.0/16", "10.9.0.0/16"]


async def test_two_networks_that_overlap_have_no_common_shape(site: AzureSite, world: World) -> None:
    rg, name = site.settings.resource_group, f"over-{world.tag}"
    poller = await site._clients.network.virtual_networks.begin_create_or_update(
        rg,
        name,
        nm.VirtualNetwork(
            location=site.settings.location,
            properties=nm.VirtualNetworkPropertiesFormat(
                address_space=nm.AddressSpace(address_prefixes=["10.20.128.0/17"])
            ),
        ),
    )
    await poller.result()
    with pytest.raises(FarshoreError, match="overlaps") as caught:
        await site.ensure_test_network(world.owner("", purpose=Purpose.TEST), like=["dr-vnet", name])
    assert caught.value.code is Code.INVALID_INPUT


async def test_an_unknown_network_is_not_isolated_but_missing(site: AzureSite) -> None:
    with pytest.raises(FarshoreError) as caught:
        await site.check_isolated("nowhere")
    assert caught.value.code is Code.NETWORK_NOT_FOUND
