"""Steps at the target: points, disks, network interfaces, machines, clean-up. Run by the worker of the target's site."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import TypeVar

from temporalio import activity

from farshore.activities import messages as m
from farshore.activities import signatures as s
from farshore.activities.sites import Sites
from farshore.activities.support import beating, in_thread
from farshore.activities.views import owner, point_view, purpose, resource, resource_view, target_spec
from farshore.contract.runs import ResourceView
from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import PointChoice, choose
from farshore.providers.ports import DiskRequest, Severity, TargetSite
from farshore.replication.ports import ReplicaStore

T = TypeVar("T")
_LOOK_AGAIN = 2.0  # seconds between looks at a machine that is starting


class TargetActivities:
    """Bound to the sites of one worker."""

    def __init__(self, sites: Sites) -> None:
        self._sites = sites

    # -- before a run ---------------------------------------------------------------------------------------------

    @activity.defn(name=s.CHECK_TARGET.name)
    async def check_target(self, call: m.CheckTargetCall) -> list[m.FindingView]:
        """Everything at the target that would make the run fail, read-only."""
        plan = call.plan
        isolated = call.test and plan.network.test == "isolated"
        network = plan.network.test if call.test and not isolated else plan.network.failover
        specs = [target_spec(name, plan.machines[name], network, test=call.test) for name in call.machines]
        if isolated:  # the test's own network is like production's, and its addresses are all free
            specs = [replace(sp, nics=tuple(replace(nic, address=None) for nic in sp.nics)) for sp in specs]
        async with beating():
            findings = await self._sites.target(call.site).check(specs, purpose=purpose(call.test))
        return [
            m.FindingView(
                severity=f.severity.value, code=f.code, subject=f.subject, message=f.message, action=f.action
            )
            for f in findings
            if f.severity is not Severity.INFO
        ]

    @activity.defn(name=s.ENSURE_TEST_NETWORK.name)
    async def ensure_test_network(self, call: m.TestNetworkCall) -> str:
        """The isolated network of a test, like production's but without a way out."""
        async with beating():
            return await self._sites.target(call.site).ensure_test_network(owner(call), like=call.like)

    @activity.defn(name=s.CHECK_ISOLATED.name)
    async def check_isolated(self, call: m.IsolationCall) -> str:
        """Refuse a test network that leads into production."""
        async with beating():
            await self._sites.target(call.site).check_isolated(call.network)
        return call.network

    # -- points ---------------------------------------------------------------------------------------------------

    @activity.defn(name=s.CHOOSE_POINT.name)
    async def choose_point(self, call: m.ChoosePointCall) -> m.ChosenPoint:
        """The point that the choice means, held so that retention leaves it alone while the run uses it."""

        def work(store: ReplicaStore) -> m.ChosenPoint:
            choice = PointChoice(call.choice) if call.choice in set(PointChoice) else call.choice
            damaged = store.known_damage(call.machine)
            point = choose(store.points(call.machine), choice, machine=call.machine, damaged=damaged)
            if call.hold:
                holder = purpose(call.test).value  # one test and one failover of a machine at a time
                store.hold(call.machine, point.id, f"{holder} (choosing)")  # never a moment without a hold
                store.release(call.machine, holder)
                store.hold(call.machine, point.id, holder)
                store.release(call.machine, f"{holder} (choosing)")
            manifest = store.manifest(call.machine, point.id)
            ordered = sorted(manifest.disks, key=lambda d: (not d.state.boot, _natural(d.state.key)))
            disks = tuple(
                m.PointDisk(key=d.state.key, label=d.state.label, size=d.state.size, index=i)
                for i, d in enumerate(ordered)
            )
            return m.ChosenPoint(point=point_view(point), disks=disks)

        return await self._with_store(call.site, work)

    @activity.defn(name=s.FENCE_REPLICA.name)
    async def fence_replica(self, call: m.StoreCall) -> m.Removed:
        """Raise the replica's epoch, so that a replication loop that is still alive somewhere can't commit any more."""

        def work(store: ReplicaStore) -> m.Removed:
            writer = store.acquire(call.machine, call.holder)
            try:
                return m.Removed(ids=(f"epoch {writer.epoch}",))
            finally:
                writer.close()

        return await self._with_store(call.site, work)

    @activity.defn(name=s.LIST_POINTS.name)
    async def list_points(self, call: m.StoreCall) -> m.PointList:
        """All points of a machine, oldest first."""
        points = await self._with_store(call.site, lambda store: store.points(call.machine))
        return m.PointList(machine=call.machine, points=tuple(point_view(p) for p in points))

    @activity.defn(name=s.KEEP_ONLY_POINT.name)
    async def keep_only_point(self, call: m.StoreCall) -> m.Removed:
        """Commit: the chosen point is final, the others go."""
        ids = await self._with_store(call.site, lambda store: store.keep_only(call.machine, call.point))
        return m.Removed(ids=tuple(ids))

    @activity.defn(name=s.RELEASE_HOLDS.name)
    async def release_holds(self, call: m.StoreCall) -> m.Removed:
        """Let retention have the points of a run that no longer needs them."""
        await self._with_store(call.site, lambda store: store.release(call.machine, call.holder))
        return m.Removed(ids=())

    @activity.defn(name=s.REMOVE_REPLICA.name)
    async def remove_replica(self, call: m.StoreCall) -> m.Removed:
        """Disable: the replica and every point go."""
        await self._with_store(call.site, lambda store: store.remove_machine(call.machine))
        return m.Removed(ids=(call.machine,))

    # -- machines -------------------------------------------------------------------------------------------------

    @activity.defn(name=s.CREATE_DISK.name)
    async def create_disk(self, call: m.DiskCall) -> ResourceView:
        """One managed disk out of the frozen replica of one disk."""
        site = self._sites.target(call.site)
        spec = target_spec(call.machine, call.settings, call.network, test=call.test)
        async with beating() as beat:
            store = await _aside(site.open_store)
            try:
                made = await site.create_disk(
                    owner(call),
                    spec,
                    await _aside(lambda: _disk_request(store, call)),
                    resume=beat.resume,
                    checkpoint=beat.checkpoint,
                )
            finally:
                await _aside(store.close)
        return resource_view(made)

    @activity.defn(name=s.CREATE_NIC.name)
    async def create_nic(self, call: m.NicCall) -> list[ResourceView]:
        """The network interfaces of a machine."""
        site = self._sites.target(call.site)
        spec = target_spec(call.machine, call.settings, call.network, test=call.test)
        async with beating():
            made = [await site.create_nic(owner(call), spec, i, nic) for i, nic in enumerate(spec.nics)]
        return [resource_view(r) for r in made]

    @activity.defn(name=s.CREATE_MACHINE.name)
    async def create_machine(self, call: m.MachineCall) -> ResourceView:
        """Create and start the machine on its disks."""
        spec = target_spec(call.machine, call.settings, call.network, test=call.test)
        async with beating() as beat:
            made = await self._sites.target(call.site).create_machine(
                owner(call),
                spec,
                [resource(r) for r in call.disks],
                [resource(r) for r in call.nics],
                resume=beat.resume,
                checkpoint=beat.checkpoint,
            )
        return resource_view(made)

    @activity.defn(name=s.WAIT_UNTIL_RUNNING.name)
    async def wait_until_running(self, call: m.WaitRunningCall) -> m.RunningReport:
        """Wait until the target says that the machine runs and, as far as it can tell, has booted."""
        site = self._sites.target(call.site)
        async with beating() as beat:
            try:
                async with asyncio.timeout(call.timeout):
                    while True:
                        view = await site.view_machine(resource(call.resource))
                        beat.note({"stage": f"waiting for {call.resource.name}", "now": view.detail})
                        if view.ready:
                            return m.RunningReport(
                                addresses=view.addresses, detail=view.detail, at=datetime.now(UTC)
                            )
                        await asyncio.sleep(_LOOK_AGAIN)
            except TimeoutError:
                raise FarshoreError(
                    Code.MACHINE_NOT_RUNNING,
                    f"{call.resource.name} did not come up within {call.timeout:.0f} s.",
                    subject=call.machine,
                    retryable=False,
                ) from None

    @activity.defn(name=s.FIND_MACHINE.name)
    async def find_machine(self, call: m.OwnedCall) -> ResourceView:
        """The recovered machine, by its tags."""
        site = self._sites.target(call.site)
        async with beating():
            found = await site.list_resources(
                plan=call.plan, machine=call.machine, purpose=purpose(call.test)
            )
        for one in found:
            if one.kind == "machine":
                return resource_view(one)
        raise FarshoreError(
            Code.MACHINE_NOT_RUNNING,
            f"{call.machine} has no recovered machine.",
            subject=call.machine,
            retryable=False,
        )

    @activity.defn(name=s.REMOVE_RESOURCES.name)
    async def remove_resources(self, call: m.RemoveCall) -> m.RemoveReport:
        """Delete what Farshore made, by its tags."""
        async with beating() as beat:
            done = await self._sites.target(call.site).remove(
                purpose=purpose(call.test),
                checkpoint=beat.checkpoint,
                plan=call.plan,
                run=call.run,
                machine=call.machine,
                except_run=call.except_run,
                run_level=call.run_level,
            )
        return m.RemoveReport(
            deleted=tuple(resource_view(r) for r in done.deleted),
            leftovers=tuple(f"{r.kind} {r.name}: {why}" for r, why in done.leftovers),
        )

    @activity.defn(name=s.RUN_GUEST_SCRIPT.name)
    async def run_guest_script(self, call: m.GuestScriptCall) -> m.ScriptOutput:
        """Run a script inside a recovered machine."""
        text = call.script
        if call.args:
            text = f"set -- {shlex.join(call.args)}\n{text}"
        async with beating() as beat:
            done = await self._sites.target(call.site).run_script(
                resource(call.resource), text, timeout=call.timeout, checkpoint=beat.checkpoint
            )
        return m.ScriptOutput(
            exit_code=done.exit_code, stdout=done.stdout[-4000:], stderr=done.stderr[-4000:]
        )

    # -- stores ---------------------------------------------------------------------------------------------------

    async def _with_store(self, site: str, work: Callable[[ReplicaStore], T]) -> T:
        async with beating():
            return await self._store_call(self._sites.target(site), work)

    async def _store_call(self, site: TargetSite, work: Callable[[ReplicaStore], T]) -> T:
        def opened(_should_stop: Callable[[], bool]) -> T:
            store = site.open_store()
            try:
                return work(store)
            finally:
                store.close()

        return await in_thread(opened)


async def _aside(work: Callable[[], T]) -> T:
    """Blocking work in a thread."""
    return await in_thread(lambda _should_stop: work())


def _disk_request(store: ReplicaStore, call: m.DiskCall) -> DiskRequest:
    """What the disk is made of: a frozen replica, and the journal since."""
    manifest = store.manifest(call.machine, call.point)
    entry = next((disk for disk in manifest.disks if disk.state.key == call.disk.key), None)
    if entry is None:
        raise FarshoreError(
            Code.REPLICA_DAMAGED,
            f"Point {call.point} of {call.machine} has no disk {call.disk.key}.",
            subject=call.machine,
        )
    reader = store.read_point(call.machine, call.point, call.disk.key)
    return DiskRequest(
        state=entry.state,
        index=call.disk.index,
        snapshot=reader.frozen,
        digest=entry.root,
        point=call.point,
        journal=None if reader.is_frozen else reader,
    )


def _natural(key: str) -> tuple[int, str]:
    """Device keys are numbers as text: 2000 before 16000."""
    return (int(key), "") if key.isdigit() else (2**31, key)
