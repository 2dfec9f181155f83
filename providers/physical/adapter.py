"""`PhysicalSite`: servers with agents as a source site. Fills `providers.ports.SourceSite`.

What software on a server cannot do is not pretended: an agent cannot prove that its own machine is off, nor start it. A
planned failover therefore shuts the server down by its owner's hand (or its management controller's) and is fenced by
two people's word; see `prove_off`.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping
from typing import Any

from farshore.domain.errors import Code, FarshoreError
from farshore.providers.physical import readiness
from farshore.providers.physical.client import AgentClient
from farshore.providers.physical.errors import AgentRefused, classify
from farshore.providers.physical.settings import PhysicalSettings
from farshore.providers.physical.source import PhysicalSource
from farshore.providers.ports import Checkpoint, FenceProof, Power, Severity, Shutdown, SourceMachine


class PhysicalSite:
    """Servers by name. Thread-safe; connects when used."""

    def __init__(self, agents: Mapping[str, PhysicalSettings]) -> None:
        self._agents = dict(agents)

    async def inspect(self, source: str) -> SourceMachine:
        """See `SourceSite.inspect`."""
        return await asyncio.to_thread(self._inspect, source)

    def _inspect(self, source: str) -> SourceMachine:
        settings, machine = self._find(source)
        disks, findings = readiness.assess(machine, seed_folder=settings.seed_folder is not None)
        return SourceMachine(
            name=str(machine["name"]),
            id=_id(machine),
            power=Power.ON,
            tools_running=True,
            tracking=all(disk["tracking"] != "hash" for disk in machine["disks"]),
            firmware=str(machine["firmware"]),
            cpus=int(machine["cpus"]),
            memory_mib=int(machine["memory_kib"]) // 1024,
            disks=disks,
            nics=(),
            findings=findings,
        )

    def _find(self, source: str) -> tuple[PhysicalSettings, Mapping[str, Any]]:
        """Settings and inventory. A name with an id means the machine of this id, also if another answers there now."""
        name, _, wanted = source.partition("#")
        settings = self._agents.get(name)
        if settings is None:
            raise FarshoreError(
                Code.SOURCE_MACHINE_NOT_FOUND, f"No agent is configured for {name}.", subject=name
            )
        client = AgentClient(settings)
        try:
            machine = client.call("GET", "machine", doing="asking the agent what it protects")
        except AgentRefused as refused:
            raise classify(refused, doing="asking the agent what it protects", subject=name) from refused
        finally:
            client.close()
        if wanted and _id(machine) != wanted:
            raise FarshoreError(
                Code.SOURCE_MACHINE_NOT_FOUND,
                f"At {settings.host} another machine answers now ({machine['name']}).",
                subject=name,
            )
        return settings, machine

    async def enable_tracking(self, source: str) -> None:
        """The agent tracks as long as it runs. SourceNotEligible names what prevents it."""
        machine = await self.inspect(source)
        errors = [finding.message for finding in machine.findings if finding.severity is Severity.ERROR]
        if errors:
            raise FarshoreError(Code.SOURCE_NOT_ELIGIBLE, " ".join(errors), subject=machine.name)

    async def shut_down(
        self, source: str, *, guest_timeout: float, force: bool, checkpoint: Checkpoint
    ) -> Shutdown:
        """ShutdownFailed, always: see the module."""
        del guest_timeout, force, checkpoint
        name = source.partition("#")[0]
        raise FarshoreError(
            Code.SHUTDOWN_FAILED,
            f"{name} is a physical server: Farshore does not switch it off.",
            subject=name,
            causes=("An agent cannot see its own machine go down, nor prove it.",),
            action="Shut the server down by hand or by its management controller, then confirm that it is off.",
        )

    async def prove_off(self, source: str) -> FenceProof:
        """FenceNotProven, always. That an agent is silent proves nothing: its server may run and write."""
        name = source.partition("#")[0]
        raise FarshoreError(
            Code.FENCE_NOT_PROVEN,
            f"{name} is a physical server: no software on it can prove that it is off.",
            subject=name,
        )

    async def power_on(self, source: str) -> None:
        """OperationNotAllowed, always."""
        name = source.partition("#")[0]
        raise FarshoreError(
            Code.OPERATION_NOT_ALLOWED,
            f"{name} is a physical server: it is started by hand.",
            subject=name,
            action="Start the server by hand or by its management controller.",
        )

    def open_source(self, machine: str, source: str) -> PhysicalSource:
        """For the replication engine. Blocking."""
        settings, _ = self._find(source)
        return PhysicalSource(settings, machine=machine)

    async def reap(self, source: str) -> list[str]:
        """See `SourceSite.reap`."""

        def work() -> list[str]:
            opened = self.open_source(source.partition("#")[0], source)
            try:
                return opened.reap()
            finally:
                opened.close()

        return await asyncio.to_thread(work)

    async def close(self) -> None:
        """Nothing is held."""


def _id(machine: Mapping[str, Any]) -> str:
    """The machine's id as a UUID; "" when the machine has none."""
    try:
        return str(uuid.UUID(str(machine["machine_id"])))
    except ValueError:
        return ""
