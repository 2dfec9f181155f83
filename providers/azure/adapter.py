"""`AzureSite`: an Azure subscription as a place where machines are brought up. Fills `providers.ports.TargetSite`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from farshore.domain.errors import Code, FarshoreError
from farshore.providers.azure.cleanup import Cleanup
from farshore.providers.azure.client import AzureClients
from farshore.providers.azure.disks import Disks, SnapshotUrl
from farshore.providers.azure.ensure import Births, Ensurer
from farshore.providers.azure.errors import EXPIRED
from farshore.providers.azure.lro import attended
from farshore.providers.azure.machines import Machines
from farshore.providers.azure.networks import Locks, Networks
from farshore.providers.azure.readiness import Readiness
from farshore.providers.azure.settings import AzureSettings
from farshore.providers.azure.staging import Staging
from farshore.providers.azure.throttle import Pause
from farshore.providers.ports import (
    Checkpoint,
    DiskRequest,
    Finding,
    MachineView,
    Owner,
    Purpose,
    Removal,
    Resource,
    ScriptResult,
    TargetNic,
    TargetSpec,
)
from farshore.replication.ports import ReplicaStore

if TYPE_CHECKING:
    from farshore.providers.azure.pageblobs import AzureReplicaStore
    from farshore.providers.ports import TargetSite

T = TypeVar("T")


class AzureSite:
    """One resource group of one subscription. Belongs to the event loop that first uses it; `close` when done.

    Every call is safe to repeat and raises `FarshoreError` at once: waiting and trying again are the caller's.
    """

    def __init__(self, settings: AzureSettings, *, snapshot_url: SnapshotUrl | None = None) -> None:
        self.settings = settings
        self._clients = AzureClients(settings)
        self._pause = Pause()
        self._store: AzureReplicaStore | None = None
        locks = Locks(settings.network_parallel)
        staging = Staging(self._clients)
        ensure = Ensurer(settings, Births(settings.visibility_grace))
        self._networks = Networks(self._clients, ensure, locks)
        self._disks = Disks(self._clients, ensure, staging, snapshot_url or self._snapshot_url)
        self._machines = Machines(self._clients, ensure, self._networks)
        self._cleanup = Cleanup(self._clients, staging, locks)
        self._readiness = Readiness(self._clients, self._networks)

    async def check(self, specs: Sequence[TargetSpec], *, purpose: Purpose) -> list[Finding]:
        """Networks, addresses, sizes, quota and names for all machines together; changes nothing."""
        return await self._call(self._readiness.check(specs, purpose=purpose))

    async def ensure_test_network(self, owner: Owner, *, like: Sequence[str]) -> str:
        return await self._call(self._networks.ensure_test_network(owner, like=like))

    async def check_isolated(self, network: str) -> None:
        await self._call(self._networks.check_isolated(network))

    async def create_disk(
        self,
        owner: Owner,
        spec: TargetSpec,
        request: DiskRequest,
        *,
        resume: Mapping[str, Any],
        checkpoint: Checkpoint,
    ) -> Resource:
        return await self._attended(
            lambda note: self._disks.create(owner, spec, request, resume=resume, checkpoint=note),
            checkpoint,
            resume,
        )

    async def create_nic(self, owner: Owner, spec: TargetSpec, index: int, nic: TargetNic) -> Resource:
        return await self._call(self._networks.create_nic(owner, spec, index, nic))

    async def create_machine(
        self,
        owner: Owner,
        spec: TargetSpec,
        disks: Sequence[Resource],
        nics: Sequence[Resource],
        *,
        resume: Mapping[str, Any],
        checkpoint: Checkpoint,
    ) -> Resource:
        return await self._attended(
            lambda note: self._machines.create(owner, spec, disks, nics, resume=resume, checkpoint=note),
            checkpoint,
            resume,
        )

    async def view_machine(self, machine: Resource) -> MachineView:
        return await self._call(self._machines.view(machine))

    async def stop_machine(self, machine: Resource, *, checkpoint: Checkpoint) -> None:
        await self._attended(lambda note: self._machines.stop(machine, checkpoint=note), checkpoint)

    async def run_script(
        self, machine: Resource, script: str, *, timeout: float, checkpoint: Checkpoint
    ) -> ScriptResult:
        return await self._attended(
            lambda note: self._machines.run_script(machine, script, timeout=timeout, checkpoint=note),
            checkpoint,
        )

    async def list_resources(
        self, *, plan: str = "", run: str = "", machine: str = "", purpose: Purpose
    ) -> list[Resource]:
        found = await self._call(self._cleanup.find(purpose=purpose, plan=plan, run=run, machine=machine))
        return [f.resource for f in found]

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
        """As the port says; with purpose `failover` at least one of plan, run and machine has to be given."""
        return await self._call(
            self._cleanup.remove(
                purpose=purpose,
                checkpoint=checkpoint,
                plan=plan,
                run=run,
                machine=machine,
                except_run=except_run,
                run_level=run_level,
            )
        )

    def open_store(self) -> ReplicaStore:
        from farshore.providers.azure.pageblobs import AzureReplicaStore

        return AzureReplicaStore(self.settings)

    async def close(self) -> None:
        await self._clients.close()
        store, self._store = self._store, None
        if store is not None:
            await asyncio.to_thread(store.close)

    def _snapshot_url(self, handle: str) -> str:
        if self._store is None:
            from farshore.providers.azure.pageblobs import AzureReplicaStore

            self._store = AzureReplicaStore(self.settings)
        return self._store.blob_url(handle)

    async def _attended(
        self,
        work: Callable[[Checkpoint], Awaitable[T]],
        checkpoint: Checkpoint,
        begin: Mapping[str, Any] | None = None,
    ) -> T:
        return await self._call(
            attended(work, checkpoint=checkpoint, begin=begin, interval=self.settings.checkpoint_interval)
        )

    async def _call(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            self._pause.check()
        except FarshoreError:
            work.close()
            raise
        try:
            return await work
        except FarshoreError as error:
            self._pause.heed(error)
            if (
                error.code is Code.ACCESS_DENIED
                and str(error.info.details.get("azure_code", "")).lower() in EXPIRED
            ):
                # Azure refused a token that looked valid here: the next attempt signs in anew.
                self._clients.renew()
            raise


if TYPE_CHECKING:

    def _fills_the_port(site: AzureSite) -> TargetSite:  # pyright: ignore[reportUnusedFunction]  # checked, never called
        return site
