"""Finding and deleting what Farshore made, by tags, in the order in which Azure lets go of things.

    machines → network interfaces → public addresses → disks → staging blobs → networks

Nothing without Farshore's tags and the purpose asked for is ever touched. What can't be deleted is told, not raised.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from azure.core.exceptions import AzureError
from azure.core.polling import AsyncLROPoller

from farshore.domain.errors import Code, FarshoreError
from farshore.providers.azure import names
from farshore.providers.azure.client import AzureClients
from farshore.providers.azure.ensure import tags_of
from farshore.providers.azure.errors import classify, is_in_use, is_missing
from farshore.providers.azure.lro import drive
from farshore.providers.azure.networks import Locks, vnet_of_subnet
from farshore.providers.azure.staging import Staging
from farshore.providers.ports import Checkpoint, Purpose, Removal, Resource

ORDER = ("machine", "network-interface", "public-address", "disk", "blob", "network")
_TRIES_IN_USE = 4  # dependants let go with a delay; what a foreign resource holds is not worth a long wait
_LONGEST_WAIT = 30.0


@dataclass(frozen=True, slots=True)
class Found:
    """A resource of ours; `vnets` are the virtual networks whose lock a deletion needs."""

    resource: Resource
    group: str = ""
    vnets: tuple[str, ...] = ()


class _InUse(FarshoreError):
    """Something still refers to the resource."""


@dataclass
class _Tally:
    deleted: list[Resource] = field(default_factory=list[Resource])
    left: list[tuple[Resource, str]] = field(default_factory=list[tuple[Resource, str]])


class Cleanup:
    """Lists and removes by tags. Listings go to the resource providers: Azure's overall index lags behind."""

    def __init__(self, clients: AzureClients, staging: Staging, locks: Locks) -> None:
        self._clients = clients
        self._settings = clients.settings
        self._staging = staging
        self._locks = locks

    async def find(
        self,
        *,
        purpose: Purpose,
        plan: str = "",
        run: str = "",
        machine: str = "",
        except_run: str = "",
        run_level: bool = False,
    ) -> list[Found]:
        """What carries our tags and matches, in the order of deletion."""

        def ours(tags: Mapping[str, str]) -> bool:
            return names.matches(
                tags,
                purpose=purpose,
                plan=plan,
                run=run,
                machine=machine,
                except_run=except_run,
                run_level=run_level,
            )

        rg, compute, network = self._settings.resource_group, self._clients.compute, self._clients.network
        out = [
            Found(_resource(r, "machine"), rg)
            for r in await _all(compute.virtual_machines.list(rg), "machines")
            if ours(tags_of(r))
        ]
        for nic in await _all(network.network_interfaces.list(rg), "network interfaces"):
            if ours(tags_of(nic)):
                configs = (nic.properties.ip_configurations if nic.properties is not None else None) or []
                subnets = [c.properties.subnet for c in configs if c.properties is not None]
                vnets = {vnet_of_subnet(s.id) for s in subnets if s is not None and s.id}
                out.append(Found(_resource(nic, "network-interface"), rg, tuple(sorted(vnets))))
        out += [
            Found(_resource(r, "public-address"), rg)
            for r in await _all(network.public_ip_addresses.list(rg), "public addresses")
            if ours(tags_of(r))
        ]
        out += [
            Found(_resource(r, "disk"), rg)
            for r in await _all(compute.disks.list_by_resource_group(rg), "disks")
            if ours(tags_of(r))
        ]
        async for blob in self._staging.list():
            if ours(blob.tags):
                out.append(Found(blob.resource))
        for vnet in await _all(network.virtual_networks.list(rg), "networks"):
            if ours(tags_of(vnet)):
                resource = _resource(vnet, "network")
                out.append(Found(resource, rg, (resource.id,)))
        return out

    async def remove(
        self,
        *,
        purpose: Purpose,
        checkpoint: Checkpoint,
        plan: str = "",
        run: str = "",
        machine: str = "",
        except_run: str = "",
        run_level: bool = False,
    ) -> Removal:
        """Delete all of it. Raises only where nothing can be listed, or when asked for too much."""
        if purpose is Purpose.FAILOVER and not (plan or run or machine):
            raise FarshoreError(
                Code.INVALID_INPUT,
                "Removing what failovers made needs a plan, a run or a machine: all of a site at once is never meant.",
            )
        checkpoint({"step": "find"})
        found = await self.find(
            purpose=purpose, plan=plan, run=run, machine=machine, except_run=except_run, run_level=run_level
        )
        tally = _Tally()
        gate = asyncio.Semaphore(self._settings.removal_parallel)
        until = time.monotonic() + self._settings.removal_patience
        for kind in ORDER:
            batch = [f for f in found if f.resource.kind == kind]
            if not batch:
                continue
            checkpoint({"step": f"remove {kind}", "deleted": len(tally.deleted), "of": len(found)})
            await self._batch(batch, gate, tally, until)
        return Removal(deleted=tuple(tally.deleted), leftovers=tuple(tally.left))

    async def _batch(
        self, batch: Sequence[Found], gate: asyncio.Semaphore, tally: _Tally, until: float
    ) -> None:
        async def one(found: Found) -> None:
            async with gate:
                try:
                    await self._delete(found, until)
                except FarshoreError as error:
                    tally.left.append((found.resource, error.info.message))
                else:
                    tally.deleted.append(found.resource)

        async with asyncio.TaskGroup() as group:
            for found in batch:
                group.create_task(one(found))

    async def _delete(self, found: Found, until: float) -> None:
        """Delete, waiting for what is busy until `until`, and a few times for what is in use."""
        attempt = 0
        while True:
            attempt += 1
            try:
                await self._delete_once(found)
                return
            except FarshoreError as error:
                wait = error.retry_after
                if wait is None:
                    wait = self._settings.polling_interval * min(attempt, 4)
                wait = min(wait, _LONGEST_WAIT)
                held = isinstance(error, _InUse) and attempt >= _TRIES_IN_USE
                if held or not error.retryable or time.monotonic() + wait > until:
                    raise
                await asyncio.sleep(wait)

    async def _delete_once(self, found: Found) -> None:
        name, kind = found.resource.name, found.resource.kind
        if kind == "blob":
            await self._staging.remove(name)
            return
        doing = f"deleting {kind} {name}"
        delete = self._deleter(kind)

        async def begin(_token: str | None) -> AsyncLROPoller[None]:
            return await delete(found.group, name)

        async def go() -> None:
            await drive(begin, doing=doing, subject=name)

        try:
            await self._locked(found, go)
        except AzureError as error:
            if is_missing(error):
                return
            shown = classify(error, doing=doing, subject=name)
            if is_in_use(error):
                raise _InUse(
                    Code.TARGET_BUSY, shown.info.message, subject=name, details=shown.info.details
                ) from error
            raise shown from error

    async def _locked(self, found: Found, go: Callable[[], Awaitable[None]]) -> None:
        async with AsyncExitStack() as held:
            # Sorted, so that two interfaces of two networks can't wait for each other.
            for vnet in sorted(found.vnets):
                lock = self._locks.of(vnet)
                await held.enter_async_context(
                    lock.whole() if found.resource.kind == "network" else lock.shared()
                )
            await go()

    def _deleter(self, kind: str) -> Callable[[str, str], Awaitable[AsyncLROPoller[None]]]:
        compute, network = self._clients.compute, self._clients.network
        table: dict[str, Callable[[str, str], Awaitable[AsyncLROPoller[None]]]] = {
            "machine": compute.virtual_machines.begin_delete,
            "network-interface": network.network_interfaces.begin_delete,
            "public-address": network.public_ip_addresses.begin_delete,
            "disk": compute.disks.begin_delete,
            "network": network.virtual_networks.begin_delete,
        }
        return table[kind]


async def _all(pages: AsyncIterable[Any], what: str) -> list[Any]:
    try:
        return [item async for item in pages]
    except AzureError as error:
        raise classify(error, doing=f"listing {what}") from error


def _resource(found: Any, kind: str) -> Resource:
    return Resource(id=str(found.id), kind=kind, name=str(found.name))
