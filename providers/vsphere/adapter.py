"""`VSphereSite`: one vCenter as a source site. Fills `providers.ports.SourceSite`.

The port is asynchronous, pyVmomi blocks: every method runs in a thread of the site (not of the loop's default pool,
which has a handful that a few waiting shutdowns would use up). Checkpoints are called in the event loop of the caller,
so that they may heartbeat; one that raises ends the step.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar
from urllib.parse import unquote

from farshore.domain.errors import Code, FarshoreError
from farshore.providers.ports import Checkpoint, FenceProof, Power, Shutdown, SourceMachine
from farshore.providers.vsphere import descriptor, readiness
from farshore.providers.vsphere import machine as machines
from farshore.providers.vsphere.client import Client, Tick, no_tick
from farshore.providers.vsphere.errors import NETWORK_ERRORS, classify, vim, vmodl
from farshore.providers.vsphere.folder import Folder
from farshore.providers.vsphere.inventory import Inventory
from farshore.providers.vsphere.machine import ENABLING, Machine
from farshore.providers.vsphere.settings import VSphereSettings
from farshore.providers.vsphere.snapshots import Snapshots
from farshore.providers.vsphere.source import VSphereSource, read_descriptor

T = TypeVar("T")
DATASTORES_FRESH = 600.0  # seconds for which the type of a datastore is believed


class _Stopped(Exception):
    """The caller was cancelled; the thread ends at its next checkpoint."""


class VSphereSite:
    """One vCenter. One session for all its machines; thread-safe; connects when first used.

    Every `source` may carry the machine's instance UUID, `name#uuid`: see `SourceSite`.
    """

    def __init__(self, settings: VSphereSettings) -> None:
        self._settings = settings
        self._client = Client(settings)
        self._inventory = Inventory(self._client, settings.datacenter)
        self._folder = Folder(self._client)
        self._types: dict[str, tuple[str, str, float]] = {}  # moid: name, type, read at
        self._types_lock = threading.Lock()
        self._threads = ThreadPoolExecutor(settings.threads, thread_name_prefix="vsphere")

    # -- the port ------------------------------------------------------------------------------------------------

    async def inspect(self, source: str) -> SourceMachine:
        """See `SourceSite.inspect`. Findings of disks come from their descriptors as well."""
        return await self._threaded(self._inspect, source)

    async def enable_tracking(self, source: str) -> None:
        """Switch change tracking on, and take and remove one snapshot so that it takes effect.

        On some hosts it takes effect at the next power cycle only: that is not an error here, `inspect` reports it and
        each cycle compares in full until then.
        """
        await self._threaded(self._enable_tracking, source)

    async def shut_down(
        self, source: str, *, guest_timeout: float, force: bool, checkpoint: Checkpoint
    ) -> Shutdown:
        """See `SourceSite.shut_down`. ShutdownFailed says whether guest tools run."""
        return await self._stepped(
            lambda tick: self._shut_down(source, guest_timeout=guest_timeout, force=force, tick=tick),
            checkpoint,
        )

    async def prove_off(self, source: str) -> FenceProof:
        """See `SourceSite.prove_off`. A host that vCenter has lost proves nothing: what is shown may be old."""
        return await self._threaded(self._prove_off, source)

    async def power_on(self, source: str) -> None:
        """Power the machine on; nothing to do when it runs."""
        await self._threaded(self._power_on, source)

    def open_source(self, machine: str, source: str) -> VSphereSource:
        """See `SourceSite.open_source`. Connects at the first cut.

        A cut and a release wait for vSphere's tasks and cannot be called off: at most `snapshot_timeout`,
        `removal_timeout` and `settle_timeout` of the settings. A task that was begun is better waited for than left to
        the next cycle.
        """
        return VSphereSource(
            self._client,
            self._inventory,
            self._folder,
            machine=machine,
            source=source,
            datastore_types=self._datastore_types,
        )

    async def reap(self, source: str) -> list[str]:
        """See `SourceSite.reap`. Snapshots that people took stay."""
        return await self._threaded(self._reap, source)

    async def close(self) -> None:
        """Log out and close all connections. Idempotent."""
        await asyncio.to_thread(self._close)

    # -- in threads ----------------------------------------------------------------------------------------------

    def _close(self) -> None:
        self._folder.close()
        self._client.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _read(self, source: str, doing: str) -> Machine:
        return machines.read(self._client, self._inventory.find(source), doing=doing)

    def _inspect(self, source: str) -> SourceMachine:
        machine = self._read(source, "reading the machine")
        types = self._datastore_types(machine)
        disks, findings = readiness.assess(machine, types, self._unreadable(machine, types))
        hardware = machine.values.get("config.hardware")
        return SourceMachine(
            name=machine.name,
            id=machine.entry.instance_uuid,
            power=machine.power,
            tools_running=machine.tools_running,
            tracking=machine.tracking,
            firmware=str(machine.values.get("config.firmware") or "bios"),
            cpus=int(hardware.numCPU) if hardware is not None else 0,
            memory_mib=int(hardware.memoryMB) if hardware is not None else 0,
            disks=disks,
            nics=machine.nics(self._network_names(machine)),
            findings=findings,
        )

    def _enable_tracking(self, source: str) -> None:
        machine = self._read(source, "switching change tracking on")
        if machine.tracking and self._tracked(machine):
            return  # also while a cycle runs: its snapshot is not touched
        snapshots = Snapshots(self._client, machine.entry)
        if any(s.ours for s in machine.snapshots):
            snapshots.clear()
            machine = machines.read(self._client, machine.entry, doing="switching change tracking on")
        self._refuse_ineligible(machine)
        if not machine.tracking:
            spec = vim.vm.ConfigSpec(changeTrackingEnabled=True)
            self._task(
                machine,
                "switching change tracking on",
                partial(machine.entry.reference.ReconfigVM_Task, spec),
            )
            machine = machines.read(self._client, machine.entry, doing="switching change tracking on")
        if machine.power is not Power.OFF and not self._tracked(machine):
            node = snapshots.create(
                ENABLING, "Farshore switches change tracking on; removed at once.", quiesce=False
            )
            snapshots.remove(node.reference, ENABLING)

    def _shut_down(self, source: str, *, guest_timeout: float, force: bool, tick: Tick) -> Shutdown:
        machine = self._read(source, "shutting the machine down")
        if machine.power is Power.OFF:
            return Shutdown(already_off=True, graceful=False, at=datetime.now(UTC))
        graceful, why = self._shut_guest_down(machine, guest_timeout, tick)
        if graceful:
            return Shutdown(already_off=False, graceful=True, at=datetime.now(UTC))
        if not force:
            raise FarshoreError(
                Code.SHUTDOWN_FAILED,
                f"{machine.name} did not shut down: {why}.",
                subject=machine.name,
                details={"tools_running": machine.tools_running},
            )
        self._task(
            machine, "powering off", machine.entry.reference.PowerOffVM_Task, done=Power.OFF, tick=tick
        )
        return Shutdown(already_off=False, graceful=False, at=datetime.now(UTC))

    def _shut_guest_down(self, machine: Machine, timeout: float, tick: Tick) -> tuple[bool, str]:
        """Ask the guest and wait for power-off. False with the reason when it did not come."""
        if machine.power is Power.SUSPENDED:
            return False, "it is suspended, so its guest cannot act"
        doing = "shutting the guest down"
        tools = "VMware Tools are running" if machine.tools_running else "VMware Tools are not running"
        try:
            self._client.call(
                doing, machine.entry.reference.ShutdownGuest, subject=machine.name, reading=False
            )
        except vim.fault.ToolsUnavailable:
            return False, "VMware Tools are not running, so the guest cannot be asked"
        except vim.fault.InvalidState:
            pass  # it goes down already, or just did: the watch tells
        except NETWORK_ERRORS:
            # The answer was lost. Whether the guest was asked shows in its power state; asking twice would be harmless,
            # but a dead server must be told apart from a lost answer: the watch raises SourceUnreachable for it.
            pass
        except vmodl.MethodFault as exc:
            raise classify(exc, doing=doing, subject=machine.name) from exc
        begun = time.monotonic()
        with self._client.watch(
            machine.entry.reference, ("runtime.powerState",), doing=doing, subject=machine.name
        ) as watch:
            while True:
                left = timeout - (time.monotonic() - begun)
                seen = watch.changes(max(0.0, min(self._settings.poll, left)))
                if seen.get("runtime.powerState") == "poweredOff":
                    return True, ""
                tick(
                    {"step": "waiting for the guest to shut down", "seconds": round(time.monotonic() - begun)}
                )
                if time.monotonic() - begun >= timeout:
                    return False, f"its guest was still up after {timeout:.0f} s ({tools})"

    def _prove_off(self, source: str) -> FenceProof:
        entry = self._inventory.find(source)
        paths = ("runtime.powerState", "runtime.connectionState", "runtime.host", "config.instanceUuid")
        machine = Machine(
            entry,
            self._client.read(entry.reference, paths, doing="proving that it is off", subject=entry.name),
        )
        now = datetime.now(UTC)
        host = f"vCenter {self._settings.host}"
        if machine.power is not Power.OFF:
            raise FarshoreError(
                Code.FENCE_NOT_PROVEN,
                f"{host} shows {entry.name} as {machine.power.value}, not off.",
                subject=entry.name,
            )
        if not machine.connected:
            raise FarshoreError(
                Code.FENCE_NOT_PROVEN,
                f"{host} has lost the host of {entry.name}: that it is shown as off may be old.",
                subject=entry.name,
            )
        evidence = f"{host}: {entry.name} ({entry.moid}, instance UUID {entry.instance_uuid}) is powered off, read at {now:%Y-%m-%dT%H:%M:%SZ}"
        return FenceProof(kind="powered-off", evidence=evidence, at=now)

    def _power_on(self, source: str) -> None:
        machine = self._read(source, "powering on")
        if machine.power is not Power.ON:
            self._task(machine, "powering on", machine.entry.reference.PowerOnVM_Task, done=Power.ON)

    def _reap(self, source: str) -> list[str]:
        return Snapshots(self._client, self._inventory.find(source)).clear()

    # -- pieces --------------------------------------------------------------------------------------------------

    def _task(
        self,
        machine: Machine,
        doing: str,
        start: Callable[[], Any],
        *,
        done: Power | None = None,
        tick: Tick = no_tick,
    ) -> None:
        """Run a task whose repetition is harmless. `done`: the power state that makes a failure or lost answer good."""
        client, name = self._client, machine.name
        for attempt in (1, 2):
            try:
                task = client.call(doing, start, subject=name, reading=False)
                client.wait_task(
                    task, doing=doing, subject=name, timeout=self._settings.task_timeout, tick=tick
                )
                return
            except (vmodl.MethodFault, *NETWORK_ERRORS) as exc:
                if done is not None and machines.read(client, machine.entry, doing=doing).power is done:
                    return
                if attempt == 2 or not isinstance(exc, NETWORK_ERRORS):
                    raise classify(exc, doing=doing, subject=name) from exc

    def _refuse_ineligible(self, machine: Machine) -> None:
        types = self._datastore_types(machine)
        disks, _ = readiness.assess(machine, types, self._unreadable(machine, types))
        skipped = {
            str(v.device.key)
            for v in (readiness.judge(d, types) for d in machines.disks_of(machine.devices))
            if v.skipped
        }
        reasons = [readiness.machine_reason(machine)] if readiness.machine_reason(machine) else []
        reasons += [
            f"{disk.label}: {disk.reason}" for disk in disks if not disk.eligible and disk.key not in skipped
        ]
        if not reasons and not any(disk.eligible for disk in disks):
            reasons.append("it has no disk that snapshots include")
        if reasons:
            raise FarshoreError(
                Code.SOURCE_NOT_ELIGIBLE,
                f"{machine.name} cannot be replicated: {'; '.join(reasons)}.",
                subject=machine.name,
            )

    def _tracked(self, machine: Machine) -> bool:
        types = self._datastore_types(machine)
        verdicts = [readiness.judge(device, types) for device in machines.disks_of(machine.devices)]
        return all(getattr(v.device.backing, "changeId", None) for v in verdicts if v.eligible)

    def _unreadable(self, machine: Machine, types: Mapping[str, str]) -> dict[int, str]:
        """Why descriptors of disks cannot be used, by device key. Only base links are asked: others are refused."""
        found: dict[int, str] = {}
        if (
            machine.snapshots
        ):  # the live links lie on top of the base now; the snapshot itself is judged elsewhere
            return found
        for device in machines.disks_of(machine.devices):
            if not readiness.judge(device, types).eligible:
                continue
            try:
                read_descriptor(self._folder, machine.entry, device)
            except descriptor.UnreadableDisk as exc:
                found[int(device.key)] = str(exc)
            except FarshoreError as exc:
                if exc.code is not Code.SOURCE_READ_FAILED:
                    raise
                found[int(device.key)] = f"its descriptor cannot be read ({exc.info.message})"
        return found

    def _network_names(self, machine: Machine) -> dict[str, str]:
        networks = list(machine.values.get("network") or ())
        rows = self._client.read_many(
            networks, ("name",), kind=vim.Network, doing="reading networks", subject=machine.name
        )
        return {moid: unquote(str(row.get("name", ""))) for moid, row in rows.items()}

    def _datastore_types(self, machine: Machine) -> dict[str, str]:
        """Type by name of the machine's datastores."""
        now = time.monotonic()
        wanted = list(machine.values.get("datastore") or ())
        with self._types_lock:
            known = dict(self._types)
        missing = [
            ref
            for ref in wanted
            if ref._GetMoId() not in known or now - known[ref._GetMoId()][2] > DATASTORES_FRESH
        ]
        rows = self._client.read_many(
            missing, ("name", "summary.type"), doing="reading datastores", subject=machine.name
        )
        fresh = {
            moid: (str(row.get("name", "")), str(row.get("summary.type", "")), now)
            for moid, row in rows.items()
        }
        with self._types_lock:
            self._types.update(fresh)
        known.update(fresh)
        return {
            known[ref._GetMoId()][0]: known[ref._GetMoId()][1] for ref in wanted if ref._GetMoId() in known
        }

    async def _threaded(self, work: Callable[..., T], *args: Any) -> T:
        context = contextvars.copy_context()  # the activity's, so that logging and heartbeats know it
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._threads, partial(context.run, work, *args)
            )
        except RuntimeError as exc:
            if "shutdown" not in str(exc):
                raise
            host = self._settings.host
            raise FarshoreError(Code.SOURCE_UNREACHABLE, f"The session with {host} was closed.") from exc

    async def _stepped(self, work: Callable[[Tick], T], checkpoint: Checkpoint) -> T:
        """Run `work` in a thread; its ticks call `checkpoint` in this event loop. Cancelling ends the thread soon."""
        loop = asyncio.get_running_loop()
        stopped = threading.Event()

        async def report(details: Mapping[str, Any]) -> None:
            checkpoint(details)

        def tick(details: Mapping[str, Any]) -> None:
            if stopped.is_set():
                raise _Stopped
            asyncio.run_coroutine_threadsafe(report(details), loop).result()

        thread = asyncio.create_task(self._threaded(work, tick))
        try:
            return await asyncio.shield(thread)
        except asyncio.CancelledError:
            stopped.set()
            thread.add_done_callback(_forget)
            raise


def _forget(task: asyncio.Task[Any]) -> None:
    """What a cancelled step's thread ended with has nobody to hear it."""
    if not task.cancelled():
        task.exception()


__all__ = ["VSphereSite"]
