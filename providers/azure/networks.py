"""Network interfaces, public addresses and the isolated networks of tests.

A write on a virtual network or its subnets is alone on that network inside this process: Azure answers a second one, and
an interface made meanwhile, with "another operation in progress". Interfaces among themselves go several at a time, or a
thousand machines would wait for an hour. Other processes are met by Azure's own answer, which is retryable.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from azure.core.exceptions import AzureError
from azure.core.polling import AsyncLROPoller
from azure.mgmt.network import models as nm

from farshore.domain.errors import Code, FarshoreError
from farshore.providers.azure import names
from farshore.providers.azure.client import AzureClients
from farshore.providers.azure.ensure import Ensurer, Wanted, read_or_none
from farshore.providers.azure.errors import classify, is_missing
from farshore.providers.ports import Owner, Resource, TargetNic, TargetSpec

IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


class VnetLock:
    """Several interfaces at a time, or one change of the network itself. Waiters are served in order."""

    def __init__(self, parallel: int) -> None:
        self._places = parallel
        self._gate = asyncio.Semaphore(parallel)
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def shared(self) -> AsyncGenerator[None]:
        """For writes on interfaces inside the network."""
        async with self._gate:
            yield

    @asynccontextmanager
    async def whole(self) -> AsyncGenerator[None]:
        """For writes on the network and its subnets."""
        async with AsyncExitStack() as held:
            await held.enter_async_context(self._turn)
            for _ in range(self._places):
                await held.enter_async_context(self._gate)
            yield


class Locks:
    """One lock a virtual network; belongs to one event loop."""

    def __init__(self, parallel: int) -> None:
        self._parallel = max(1, parallel)
        self._locks: dict[str, VnetLock] = {}

    def of(self, vnet_id: str) -> VnetLock:
        return self._locks.setdefault(vnet_id.lower(), VnetLock(self._parallel))


def locate(text: str, default_group: str) -> tuple[str, str]:
    """(resource group, name) of a network or security group, given by name or by ARM id."""
    parts = text.strip("/").split("/")
    if len(parts) >= 8 and parts[0].lower() == "subscriptions" and parts[2].lower() == "resourcegroups":
        return parts[3], parts[7]
    return default_group, text


def prefixes(subnet: nm.Subnet) -> list[IpNetwork]:
    properties = subnet.properties
    if properties is None:
        return []
    texts = properties.address_prefixes or ([properties.address_prefix] if properties.address_prefix else [])
    return [ipaddress.ip_network(text) for text in texts]


def vnet_of_subnet(subnet_id: str) -> str:
    return subnet_id.rsplit("/subnets/", 1)[0]


class Networks:
    """Everything of Microsoft.Network that Farshore makes."""

    def __init__(self, clients: AzureClients, ensure: Ensurer, locks: Locks) -> None:
        self._clients = clients
        self._settings = clients.settings
        self._ensure = ensure
        self.locks = locks

    # reading

    async def network(self, text: str) -> nm.VirtualNetwork:
        """Raises NetworkNotFound."""
        group, name = locate(text, self._settings.resource_group)
        found = await read_or_none(
            lambda: self._clients.network.virtual_networks.get(group, name),
            doing=f"reading network {name}",
            subject=name,
        )
        if found is None:
            raise FarshoreError(
                Code.NETWORK_NOT_FOUND,
                f"There is no network {name!r} in resource group {group!r}.",
                subject=name,
            )
        return found

    async def subnet(self, network: str, subnet: str) -> nm.Subnet:
        """Raises NetworkNotFound."""
        group, name = locate(network, self._settings.resource_group)
        found = await read_or_none(
            lambda: self._clients.network.subnets.get(group, name, subnet),
            doing=f"reading subnet {name}/{subnet}",
            subject=f"{name}/{subnet}",
        )
        if found is None:
            raise FarshoreError(
                Code.NETWORK_NOT_FOUND,
                f"There is no subnet {subnet!r} in network {name!r} of resource group {group!r}.",
                subject=f"{name}/{subnet}",
            )
        return found

    async def security_group(self, text: str) -> nm.NetworkSecurityGroup:
        """Raises NetworkNotFound."""
        group, name = locate(text, self._settings.resource_group)
        found = await read_or_none(
            lambda: self._clients.network.network_security_groups.get(group, name),
            doing=f"reading security group {name}",
            subject=name,
        )
        if found is None:
            raise FarshoreError(
                Code.NETWORK_NOT_FOUND,
                f"There is no network security group {name!r} in resource group {group!r}.",
                subject=name,
            )
        return found

    # interfaces

    async def create_nic(self, owner: Owner, spec: TargetSpec, index: int, nic: TargetNic) -> Resource:
        """A network interface with a static or the next free private address. Raises NetworkNotFound, AddressInUse."""
        name = names.nic(owner, spec, index)
        subnet = await self.subnet(nic.network, nic.subnet)
        subnet_id = subnet.id or f"{self._id('virtualNetworks', nic.network)}/subnets/{nic.subnet}"
        group = await self.security_group(nic.security_group) if nic.security_group else None
        public = await self._public_address(owner, spec, index) if nic.public else None
        properties = nm.NetworkInterfaceIPConfigurationPropertiesFormat(
            primary=True,
            subnet=nm.Subnet(id=subnet_id),
            private_ip_allocation_method="Static" if nic.address else "Dynamic",
        )
        if nic.address:
            try:
                version = ipaddress.ip_address(nic.address).version
            except ValueError as error:
                raise FarshoreError(
                    Code.INVALID_INPUT, f"{nic.address!r} is not an IP address.", subject=spec.machine
                ) from error
            properties.private_ip_address = nic.address
            properties.private_ip_address_version = f"IPv{version}"
        if public is not None:
            properties.public_ip_address = nm.PublicIPAddress(id=public.id)
        body = nm.NetworkInterface(
            location=self._settings.location,
            tags=names.tags(owner, spec.tags),
            properties=nm.NetworkInterfacePropertiesFormat(
                ip_configurations=[nm.NetworkInterfaceIPConfiguration(name="primary", properties=properties)]
            ),
        )
        if group is not None and body.properties is not None:
            body.properties.network_security_group = nm.NetworkSecurityGroup(id=group.id)
        rg, client = self._settings.resource_group, self._clients

        async def make(token: str | None) -> AsyncLROPoller[nm.NetworkInterface]:
            more = {"continuation_token": token} if token else {}
            return await client.network.network_interfaces.begin_create_or_update(rg, name, body, **more)

        wanted = Wanted[nm.NetworkInterface](
            what=f"network interface {name}",
            id=self._id("networkInterfaces", name),
            read=lambda: client.network.network_interfaces.get(rg, name),
            make=make,
            delete=lambda: client.network.network_interfaces.begin_delete(rg, name),
            owner=owner,
            step=f"nic{index}",
        )
        async with self.locks.of(vnet_of_subnet(subnet_id)).shared():
            try:
                made = await self._ensure(wanted)
            except FarshoreError as error:
                raise _address_error(error, spec, nic) from error
        return Resource(id=made.id or wanted.id, kind="network-interface", name=name)

    async def _public_address(self, owner: Owner, spec: TargetSpec, index: int) -> nm.PublicIPAddress:
        name = names.public_address(owner, spec, index)
        rg, client = self._settings.resource_group, self._clients
        body = nm.PublicIPAddress(
            location=self._settings.location,
            tags=names.tags(owner, spec.tags),
            sku=nm.PublicIPAddressSku(name="Standard", tier="Regional"),
            properties=nm.PublicIPAddressPropertiesFormat(
                public_ip_allocation_method="Static", public_ip_address_version="IPv4"
            ),
        )
        if spec.zone:
            body.zones = [spec.zone]

        async def make(token: str | None) -> AsyncLROPoller[nm.PublicIPAddress]:
            more = {"continuation_token": token} if token else {}
            return await client.network.public_ip_addresses.begin_create_or_update(rg, name, body, **more)

        return await self._ensure(
            Wanted[nm.PublicIPAddress](
                what=f"public address {name}",
                id=self._id("publicIPAddresses", name),
                read=lambda: client.network.public_ip_addresses.get(rg, name),
                make=make,
                delete=lambda: client.network.public_ip_addresses.begin_delete(rg, name),
                owner=owner,
                step=f"ip{index}",
            )
        )

    # networks of tests

    async def ensure_test_network(self, owner: Owner, *, like: Sequence[str]) -> str:
        """An isolated network shaped like `like`: no peering, no gateway, no default way out. Returns its name."""
        name = names.test_network(owner)
        space: list[str] = []
        subnets: dict[str, nm.Subnet] = {}
        for text in like:
            network = await self.network(text)
            if network.properties is None or network.properties.address_space is None:
                continue
            for prefix in network.properties.address_space.address_prefixes or []:
                _add_prefix(space, prefix, name, text)
            for subnet in network.properties.subnets or []:
                _add_subnet(subnets, subnet, name, text)
        if not space:
            raise FarshoreError(
                Code.INVALID_INPUT, f"No network is given for {name} to be shaped like.", subject=name
            )
        body = nm.VirtualNetwork(
            location=self._settings.location,
            tags=names.tags(owner),
            properties=nm.VirtualNetworkPropertiesFormat(
                address_space=nm.AddressSpace(address_prefixes=space), subnets=list(subnets.values())
            ),
        )
        rg, client = self._settings.resource_group, self._clients

        async def make(token: str | None) -> AsyncLROPoller[nm.VirtualNetwork]:
            more = {"continuation_token": token} if token else {}
            return await client.network.virtual_networks.begin_create_or_update(rg, name, body, **more)

        wanted = Wanted[nm.VirtualNetwork](
            what=f"network {name}",
            id=self._id("virtualNetworks", name),
            read=lambda: client.network.virtual_networks.get(rg, name),
            make=make,
            delete=lambda: client.network.virtual_networks.begin_delete(rg, name),
            owner=owner,
            step="network",
        )
        async with self.locks.of(wanted.id).whole():
            await self._ensure(wanted)
        return name

    async def check_isolated(self, network: str) -> None:
        """NetworkNotIsolated when there is a peering, a gateway's subnet, or a route or NAT gateway that leads out."""
        found = await self.network(network)
        ways: list[str] = []
        if found.properties is not None:
            for peering in found.properties.virtual_network_peerings or []:
                far = peering.properties.remote_virtual_network if peering.properties is not None else None
                ways.append(f"peering {peering.name} to {far.id if far is not None else 'another network'}")
            for subnet in found.properties.subnets or []:
                if (subnet.name or "").lower() in (
                    "gatewaysubnet",
                    "routeserversubnet",
                    "azurefirewallsubnet",
                ):
                    ways.append(f"gateway subnet {subnet.name}")
                if subnet.properties is not None and subnet.properties.nat_gateway is not None:
                    ways.append(f"NAT gateway on subnet {subnet.name}")
        if ways:
            raise FarshoreError(
                Code.NETWORK_NOT_ISOLATED,
                f"Network {found.name} is not isolated: {', '.join(ways)}.",
                subject=found.name or network,
                details={"ways_out": ways},
            )

    async def addresses(self, nic_id: str) -> list[str]:
        """Private, then public addresses of an interface; none when it is gone."""
        out: list[str] = []
        group, name = locate(nic_id, self._settings.resource_group)
        try:
            nic = await self._clients.network.network_interfaces.get(group, name)
            configs = (nic.properties.ip_configurations if nic.properties is not None else None) or []
            for config in configs:
                if config.properties is None:
                    continue
                if config.properties.private_ip_address:
                    out.append(config.properties.private_ip_address)
            for config in configs:
                public = config.properties.public_ip_address if config.properties is not None else None
                if public is None or not public.id:
                    continue
                where = locate(public.id, self._settings.resource_group)
                seen = await self._clients.network.public_ip_addresses.get(*where)
                if seen.properties is not None and seen.properties.ip_address:
                    out.append(seen.properties.ip_address)
        except AzureError as error:
            if not is_missing(error):
                raise classify(error, doing=f"reading addresses of {name}", subject=name) from error
        return out

    def _id(self, kind: str, name: str) -> str:
        s = self._settings
        return (
            f"/subscriptions/{s.subscription}/resourceGroups/{s.resource_group}"
            f"/providers/Microsoft.Network/{kind}/{name}"
        )


def _address_error(error: FarshoreError, spec: TargetSpec, nic: TargetNic) -> FarshoreError:
    if error.code is not Code.ADDRESS_IN_USE or not nic.address:
        return error
    return FarshoreError(
        Code.ADDRESS_IN_USE,
        f"Address {nic.address} of {spec.machine} is in use in subnet {nic.subnet} of network {nic.network}. "
        f"{error.info.message}",
        subject=spec.machine,
        details=error.info.details,
    )


def _add_prefix(space: list[str], prefix: str, name: str, like: str) -> None:
    new = ipaddress.ip_network(prefix)
    for held in space:
        old = ipaddress.ip_network(held)
        if old == new:
            return
        if old.version == new.version and old.overlaps(new):
            raise FarshoreError(
                Code.INVALID_INPUT,
                f"{name} can't be shaped like {like}: its address space {prefix} overlaps {held} of another network of "
                "the plan.",
                subject=name,
                action="Test these networks in separate runs, or choose an own isolated network for tests in the plan.",
            )
    space.append(prefix)


def _add_subnet(subnets: dict[str, nm.Subnet], like: nm.Subnet, name: str, network: str) -> None:
    label = like.name or ""
    texts = [str(p) for p in prefixes(like)]
    if not texts or label.lower() in (
        "gatewaysubnet",
        "routeserversubnet",
        "azurefirewallsubnet",
        "azurebastionsubnet",
    ):
        return
    held = subnets.get(label.lower())
    if held is not None:
        if [str(p) for p in prefixes(held)] == texts:
            return
        raise FarshoreError(
            Code.INVALID_INPUT,
            f"{name} can't be shaped like {network}: its subnet {label} has the same name as one of another network of "
            "the plan, and another address range.",
            subject=name,
        )
    properties = nm.SubnetPropertiesFormat(default_outbound_access=False)
    if len(texts) == 1:
        properties.address_prefix = texts[0]
    else:
        properties.address_prefixes = texts
    subnets[label.lower()] = nm.Subnet(name=label, properties=properties)
