"""What would make a recovery fail at Azure's side, found before it begins. Reads only."""

from __future__ import annotations

import asyncio
import ipaddress
from collections import Counter
from collections.abc import AsyncIterable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from azure.core.exceptions import AzureError
from azure.mgmt.compute import models as cm
from azure.mgmt.network import models as nm

from farshore.domain.errors import CATALOGUE, Code, FarshoreError
from farshore.providers.azure import names
from farshore.providers.azure.client import AzureClients
from farshore.providers.azure.ensure import tags_of
from farshore.providers.azure.errors import classify
from farshore.providers.azure.networks import Networks, locate, prefixes
from farshore.providers.ports import Finding, Purpose, Severity, TargetNic, TargetSpec

T = TypeVar("T")
_PARALLEL = 8  # reads at a time


@dataclass(frozen=True, slots=True)
class Size:
    """A machine size as the location offers it."""

    name: str
    family: str
    cores: int
    max_nics: int | None
    generations: frozenset[str]
    zones: frozenset[str]
    refused: str  # why this subscription can't have it at all, or ""
    refused_zones: frozenset[str]


def _finding(
    code: Code, subject: str, message: str, *, action: str = "", severity: Severity = Severity.ERROR
) -> Finding:
    return Finding(severity, code.value, subject, message, action or CATALOGUE[code].action)


class Readiness:
    """Checks of a set of machines that shall run together."""

    def __init__(self, clients: AzureClients, networks: Networks) -> None:
        self._clients = clients
        self._settings = clients.settings
        self._networks = networks

    async def check(self, specs: Sequence[TargetSpec], *, purpose: Purpose) -> list[Finding]:
        """Findings over all `specs` together. Raises where Azure can't be asked (TargetUnreachable, AccessDenied)."""
        findings = await self._check_networks(specs, purpose)
        sizes = await self._sizes()
        findings += check_sizes(specs, sizes, self._settings.location)
        findings += check_quota(specs, sizes, await self._usages(), self._settings.location)
        findings += await self._check_names(specs, purpose)
        return findings

    async def _check_networks(self, specs: Sequence[TargetSpec], purpose: Purpose) -> list[Finding]:
        nics = [(spec, nic) for spec in specs for nic in spec.nics]
        first = {(nic.network.lower(), nic.subnet.lower()): nic for _, nic in reversed(nics)}
        subnets = dict(
            zip(first, await self._together(self._subnet(nic) for nic in first.values()), strict=True)
        )
        named = sorted({nic.security_group for _, nic in nics if nic.security_group})
        groups = dict(zip(named, await self._together(self._group(name) for name in named), strict=True))
        out: list[Finding] = []
        asked: list[Coroutine[Any, Any, list[Finding]]] = []
        own = (
            await self._own_addresses(purpose)
            if any(nic.address for _, nic in nics)
            else set[tuple[str, str]]()
        )
        wanted: Counter[tuple[str, str]] = Counter()
        for spec, nic in nics:
            subnet = subnets[(nic.network.lower(), nic.subnet.lower())]
            if isinstance(subnet, Finding):
                out.append(replace(subnet, subject=spec.machine))
            elif nic.address:
                where = (nic.network.lower(), nic.address)
                wanted[where] += 1
                check = self._check_address(
                    spec,
                    nic,
                    subnet,
                    nic.address,
                    again=wanted[where] > 1,
                    own=(spec.machine, nic.address) in own,
                )
                asked.append(check)
            missing = groups.get(nic.security_group or "")
            if missing is not None:
                out.append(replace(missing, subject=spec.machine))
            if nic.public and purpose is Purpose.TEST:
                out.append(
                    _finding(
                        Code.NETWORK_NOT_ISOLATED,
                        spec.machine,
                        f"{spec.machine} would get a public address in a test.",
                        action="Leave the public address out of tests, or close its security group.",
                        severity=Severity.WARNING,
                    )
                )
        for found in await self._together(asked):
            out += found
        return out

    async def _together(self, reads: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
        """Several reads at a time, results in order; a thousand machines shall not take a thousand round trips."""
        gate = asyncio.Semaphore(_PARALLEL)

        async def one(read: Coroutine[Any, Any, T]) -> T:
            async with gate:
                return await read

        return list(await asyncio.gather(*(one(read) for read in reads)))

    async def _subnet(self, nic: TargetNic) -> nm.Subnet | Finding:
        try:
            return await self._networks.subnet(nic.network, nic.subnet)
        except FarshoreError as error:
            if error.code is not Code.NETWORK_NOT_FOUND:
                raise
            return _finding(Code.NETWORK_NOT_FOUND, nic.network, error.info.message)

    async def _group(self, name: str) -> Finding | None:
        try:
            await self._networks.security_group(name)
        except FarshoreError as error:
            if error.code is not Code.NETWORK_NOT_FOUND:
                raise
            return _finding(Code.NETWORK_NOT_FOUND, name, error.info.message)
        return None

    async def _own_addresses(self, purpose: Purpose) -> set[tuple[str, str]]:
        """(machine, address) of the interfaces that an earlier run of the same purpose made; a rerun replaces them."""
        rows = await _all(
            self._clients.network.network_interfaces.list(self._settings.resource_group), "network interfaces"
        )
        return {
            (
                names.read_tag(tags_of(row), names.MACHINE),
                str(config.properties.private_ip_address if config.properties else ""),
            )
            for row in rows
            if names.matches(tags_of(row), purpose=purpose)
            for config in ((row.properties.ip_configurations if row.properties is not None else None) or [])
        }

    async def _check_address(
        self, spec: TargetSpec, nic: TargetNic, subnet: nm.Subnet, address: str, *, again: bool, own: bool
    ) -> list[Finding]:
        where = f"subnet {nic.subnet} of network {nic.network}"
        problem = address_problem(address, subnet)
        if problem:
            return [
                _finding(
                    Code.INVALID_INPUT,
                    spec.machine,
                    f"Address {address} of {spec.machine} {problem} ({where}).",
                    action="Correct the address or the subnet in the plan.",
                )
            ]
        if again:
            return [
                _finding(
                    Code.ADDRESS_IN_USE,
                    spec.machine,
                    f"Address {address} of {spec.machine} is given to another machine of the plan too ({where}).",
                    action="Give each machine its own address in the plan.",
                )
            ]
        group, name = locate(nic.network, self._settings.resource_group)
        try:
            seen = await self._clients.network.virtual_networks.check_ip_address_availability(
                group, name, ip_address=address
            )
        except AzureError as error:
            raise classify(error, doing=f"checking address {address}", subject=spec.machine) from error
        if seen.available:
            return []
        if own:
            return [
                _finding(
                    Code.ADDRESS_IN_USE,
                    spec.machine,
                    f"Address {address} of {spec.machine} is held by what an earlier run of it made ({where}).",
                    action="None needed: this run replaces it.",
                    severity=Severity.WARNING,
                )
            ]
        free = ", ".join((seen.available_ip_addresses or [])[:3])
        return [
            _finding(
                Code.ADDRESS_IN_USE,
                spec.machine,
                f"Address {address} of {spec.machine} is in use in {where}."
                + (f" Free ones near it: {free}." if free else ""),
            )
        ]

    async def _check_names(self, specs: Sequence[TargetSpec], purpose: Purpose) -> list[Finding]:
        out: list[Finding] = []
        rg = self._settings.resource_group
        there = {
            str(vm.name).lower(): vm
            for vm in await _all(self._clients.compute.virtual_machines.list(rg), "machines")
        }
        planned: Counter[str] = Counter()
        for spec in specs:
            try:
                name = names.machine(spec, purpose)
            except FarshoreError as error:
                out.append(
                    _finding(
                        error.code, spec.machine, error.info.message, action="Correct the name in the plan."
                    )
                )
                continue
            planned[name.lower()] += 1
            if planned[name.lower()] > 1:
                out.append(
                    _finding(
                        Code.NAME_TAKEN, spec.machine, f"Two machines of the plan would be called {name}."
                    )
                )
            found = there.get(name.lower())
            if found is not None:
                left = names.matches(tags_of(found), purpose=purpose, machine=spec.machine)
                out.append(
                    _finding(
                        Code.NAME_TAKEN,
                        spec.machine,
                        f"There is a virtual machine {name} already; {names.describe(tags_of(found))}.",
                        action="None needed: this run replaces it." if left else "",
                        severity=Severity.WARNING if left else Severity.ERROR,
                    )
                )
        return out

    async def _sizes(self) -> dict[str, Size]:
        place = self._settings.location
        rows = await _all(
            self._clients.compute.resource_skus.list(filter=f"location eq '{place}'"),
            f"machine sizes of {place}",
        )
        return {
            str(row.name).lower(): _size(row, place)
            for row in rows
            if str(row.resource_type).lower() == "virtualmachines"
        }

    async def _usages(self) -> dict[str, tuple[int, int]]:
        place = self._settings.location
        rows = await _all(self._clients.compute.usage.list(place), f"usages of {place}")
        return {str(row.name.value).lower(): (int(row.current_value), int(row.limit)) for row in rows}


def address_problem(address: str, subnet: nm.Subnet) -> str:
    """Why an address can't be a machine's in this subnet, or "". Azure keeps the first four and the last one."""
    try:
        wanted = ipaddress.ip_address(address)
    except ValueError:
        return "is not an IP address"
    for net in prefixes(subnet):
        if wanted.version != net.version or wanted not in net:
            continue
        offset = int(wanted) - int(net.network_address)
        if offset < 4 or (net.version == 4 and wanted == net.broadcast_address):
            return f"is one that Azure keeps for itself in {net}"
        return ""
    return f"lies outside {', '.join(str(net) for net in prefixes(subnet)) or 'the subnet'}"


def check_sizes(specs: Sequence[TargetSpec], sizes: Mapping[str, Size], location: str) -> list[Finding]:
    """Sizes that the location lacks, refuses, or that don't suit the machine."""
    out: list[Finding] = []
    for spec in specs:
        size = sizes.get(spec.size.lower())
        if size is None:
            out.append(
                _finding(
                    Code.INVALID_INPUT,
                    spec.machine,
                    f"There is no machine size {spec.size!r} in {location}.",
                    action="Choose a size of this location in the plan.",
                )
            )
            continue
        if size.refused:
            out.append(
                _finding(
                    Code.CAPACITY_EXHAUSTED,
                    spec.machine,
                    f"{size.name} can't be had in {location} by this subscription ({size.refused}).",
                )
            )
        elif spec.zone and (spec.zone in size.refused_zones or spec.zone not in size.zones):
            out.append(
                _finding(
                    Code.CAPACITY_EXHAUSTED,
                    spec.machine,
                    f"{size.name} can't be had in zone {spec.zone} of {location}.",
                )
            )
        if size.max_nics is not None and len(spec.nics) > size.max_nics:
            out.append(
                _finding(
                    Code.INVALID_INPUT,
                    spec.machine,
                    f"{size.name} takes {size.max_nics} network interfaces, {spec.machine} has {len(spec.nics)}.",
                    action="Choose a larger size in the plan.",
                )
            )
        generation = "V2" if spec.firmware == "efi" else "V1"
        if size.generations and generation not in size.generations:
            out.append(
                _finding(
                    Code.INVALID_INPUT,
                    spec.machine,
                    f"{size.name} does not run machines with {spec.firmware.upper()} firmware (generation {generation}).",
                    action="Choose another size in the plan.",
                )
            )
    return out


def check_quota(
    specs: Sequence[TargetSpec],
    sizes: Mapping[str, Size],
    usages: Mapping[str, tuple[int, int]],
    location: str,
) -> list[Finding]:
    """Quota for all machines together: cores of the region, cores of each family, number of machines."""
    need: Counter[str] = Counter()
    for spec in specs:
        size = sizes.get(spec.size.lower())
        if size is not None:
            need["cores"] += size.cores
            need[size.family.lower()] += size.cores
            need["virtualmachines"] += 1
    out: list[Finding] = []
    for name, amount in need.items():
        if name not in usages:
            continue
        used, limit = usages[name]
        if used + amount > limit:
            title = {"cores": "regional cores", "virtualmachines": "machines"}.get(
                name, f"cores of family {name}"
            )
            out.append(
                _finding(
                    Code.QUOTA_EXCEEDED,
                    location,
                    f"Quota for {title} in {location}: {amount} needed, {max(limit - used, 0)} left ({used} of {limit} used).",
                )
            )
    return out


def _size(row: cm.ResourceSku, place: str) -> Size:
    capabilities = {str(c.name): str(c.value) for c in row.capabilities or []}
    zones: set[str] = set()
    for info in row.location_info or []:
        if str(info.location).lower() == place.lower():
            zones.update(info.zones or [])
    refused, refused_zones = "", set[str]()
    for limit in row.restrictions or []:
        kind = str(getattr(limit.type, "value", limit.type)).lower()
        if kind == "zone" and limit.restriction_info is not None:
            refused_zones.update(limit.restriction_info.zones or [])
        elif kind == "location":
            refused = str(getattr(limit.reason_code, "value", limit.reason_code) or "restricted")
    return Size(
        name=str(row.name),
        family=str(row.family or ""),
        cores=_whole(capabilities.get("vCPUs")) or 0,
        max_nics=_whole(capabilities.get("MaxNetworkInterfaces")),
        generations=frozenset(
            g.strip() for g in capabilities.get("HyperVGenerations", "").split(",") if g.strip()
        ),
        zones=frozenset(zones),
        refused=refused,
        refused_zones=frozenset(refused_zones),
    )


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None


async def _all(pages: AsyncIterable[T], what: str) -> list[T]:
    try:
        return [item async for item in pages]
    except AzureError as error:
        raise classify(error, doing=f"listing {what}") from error
