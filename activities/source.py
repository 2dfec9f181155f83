"""Steps on source machines and their replication. Run by the worker of the source's site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from temporalio import activity

from farshore.activities import messages as m
from farshore.activities import signatures as s
from farshore.activities.metrics import LegMetrics
from farshore.activities.sites import Sites
from farshore.activities.support import beating, in_thread
from farshore.activities.views import point_view
from farshore.contract.machine import MachineSpec
from farshore.contract.runs import PointView
from farshore.domain.errors import Code, FarshoreError
from farshore.domain.retention import RetentionPolicy
from farshore.providers.ports import Severity, SourceMachine
from farshore.replication.engine import Bandwidth, Stopped
from farshore.replication.loop import LegPlan, LegResult, run_leg
from farshore.replication.ports import Progress


@dataclass(frozen=True, slots=True)
class Upkeep:
    """How often a leg does what no single point needs. Seconds; see `LegPlan`."""

    base_every_s: float = 900.0
    scrub_every_s: float | None = 7 * 86400.0
    audit_every_s: float | None = 30 * 86400.0


class SourceActivities:
    """Bound to the sites of one worker."""

    def __init__(self, sites: Sites, *, limit: Bandwidth | None = None, upkeep: Upkeep | None = None) -> None:
        """`limit` is shared by all legs of this worker: bytes that leave for the target."""
        self._sites = sites
        self._limit = limit
        self._upkeep = upkeep or Upkeep()

    @activity.defn(name=s.INSPECT_SOURCE.name)
    async def inspect_source(self, call: m.SourceCall) -> m.InspectReport:
        """Read the machine as its site shows it, with findings."""
        async with beating():
            return _report(call.machine, await self._sites.source(call.site).inspect(call.source))

    @activity.defn(name=s.ENABLE_TRACKING.name)
    async def enable_tracking(self, call: m.SourceCall) -> m.InspectReport:
        """Switch change tracking on where it is off."""
        async with beating():
            site = self._sites.source(call.site)
            await site.enable_tracking(call.source)
            return _report(call.machine, await site.inspect(call.source))

    @activity.defn(name=s.SHUT_DOWN_SOURCE.name)
    async def shut_down_source(self, call: m.ShutDownCall) -> m.ShutDownReport:
        """Guest shutdown; power off only where the plan says force."""
        async with beating() as beat:
            down = await self._sites.source(call.site).shut_down(
                call.source, guest_timeout=call.guest_timeout, force=call.force, checkpoint=beat.checkpoint
            )
        return m.ShutDownReport(already_off=down.already_off, graceful=down.graceful, at=down.at)

    @activity.defn(name=s.PROVE_SOURCE_OFF.name)
    async def prove_source_off(self, call: m.SourceCall) -> m.FenceReport:
        """Evidence that the source can't write, read from the site now."""
        async with beating():
            proof = await self._sites.source(call.site).prove_off(call.source)
        return m.FenceReport(kind=proof.kind, evidence=proof.evidence, at=proof.at)

    @activity.defn(name=s.POWER_ON_SOURCE.name)
    async def power_on_source(self, call: m.SourceCall) -> m.InspectReport:
        """Start the source machine again (cancel of a failover)."""
        async with beating():
            site = self._sites.source(call.site)
            await site.power_on(call.source)
            return _report(call.machine, await site.inspect(call.source))

    @activity.defn(name=s.REAP_SOURCE.name)
    async def reap_source(self, call: m.SourceCall) -> m.Removed:
        """Remove what replication left at the source, when no leg will come any more."""
        async with beating():
            return m.Removed(ids=tuple(await self._sites.source(call.site).reap(call.source)))

    @activity.defn(name=s.REPLICATE_LEG.name)
    async def replicate_leg(self, call: m.LegCall) -> m.LegReport:
        """Many cycles of replication. What it has done is in the store, not in Temporal."""
        spec, policy = call.spec, call.spec.policy
        done = await self._leg(
            spec,
            LegPlan(
                machine=spec.machine,
                owner=call.owner,
                interval_s=policy.interval,
                app_consistent_every_s=policy.app_consistent_every,
                retention=RetentionPolicy(policy.retention),
                until_s=call.until_seconds,
                stop_after_first=call.stop_after_first,
                resync=call.force_full,
                asked_at=activity.info().current_attempt_scheduled_time,
            ),
        )
        return m.LegReport(
            cycles=done.cycles,
            points=done.points,
            last_error=done.last_error,
            newest=point_view(done.newest) if done.newest else None,
            full_copies=done.full_copies,
            bytes_shipped=done.bytes_shipped,
            stopped_because=done.stopped_because,
        )

    @activity.defn(name=s.FINAL_CYCLE.name)
    async def final_cycle(self, call: m.FinalCycleCall) -> PointView:
        """One more point under a new epoch, after the source was shut down: whatever it wrote is in it."""
        spec = call.spec
        done = await self._leg(
            spec,
            LegPlan(
                machine=spec.machine,
                owner=call.owner,
                interval_s=1.0,
                retention=RetentionPolicy(spec.policy.retention),
                until_s=call.patience,
                stop_after_first=True,
                final=True,
                asked_at=activity.info().current_attempt_scheduled_time,
            ),
        )
        if done.points == 0 or done.newest is None:
            raise FarshoreError(
                Code.SOURCE_READ_FAILED,
                f"The last changes of {spec.machine} could not be copied: {done.last_error or 'no time was left'}.",
                subject=spec.machine,
            )
        return point_view(done.newest)

    async def _leg(self, spec: MachineSpec, plan: LegPlan) -> LegResult:
        metrics = LegMetrics(spec.machine, spec.plan)
        plan = replace(plan, pace=replace(plan.pace, limit=self._limit), **asdict(self._upkeep))
        async with beating() as beat:

            def tell(progress: Progress) -> None:
                beat.note(_progress(progress))
                metrics.note(progress)

            def work(should_stop: Callable[[], bool]) -> LegResult:
                source = self._sites.source(spec.source_site).open_source(spec.machine, spec.source)
                try:
                    store = self._sites.open_store(spec.target_site)
                    try:
                        return run_leg(
                            source,
                            store,
                            plan,
                            progress=tell,
                            should_stop=should_stop,
                        )
                    finally:
                        store.close()
                finally:
                    source.close()

            try:
                done = await in_thread(work)
                metrics.done(done)
                return done
            except Stopped:
                raise FarshoreError(
                    Code.RUN_ABORTED, f"Replication of {spec.machine} was stopped.", subject=spec.machine
                ) from None


def _progress(p: Progress) -> dict[str, Any]:
    """What the Temporal UI shows of a running copy."""
    shown: dict[str, Any] = {"stage": p.stage, "cycle": p.cycle, "points": p.points}
    if p.disk:
        shown["disk"] = p.disk
    if p.total:
        shown |= {"done_mib": round(p.done / 2**20, 1), "total_mib": round(p.total / 2**20, 1)}
        shown["percent"] = round(100 * p.done / p.total, 1)
    if p.newest_taken_at is not None:
        shown["newest_point"] = p.newest_point
        shown["newest_taken_at"] = p.newest_taken_at.isoformat()
        shown["rpo_seconds"] = round((datetime.now(UTC) - p.newest_taken_at).total_seconds(), 1)
    if p.newest_applied_at is not None:
        shown["rpo_processed_seconds"] = round((datetime.now(UTC) - p.newest_applied_at).total_seconds(), 1)
    return shown


def _report(machine: str, seen: SourceMachine) -> m.InspectReport:
    refused = [f"{d.label}: {d.reason}" for d in seen.disks if not d.eligible]
    errors = [f"{f.message} {f.action}" for f in seen.findings if f.severity is Severity.ERROR]
    return m.InspectReport(
        machine=machine,
        id=seen.id,
        power=seen.power.value,
        tools_running=seen.tools_running,
        disks=len(seen.disks),
        bytes=sum(d.size for d in seen.disks),
        errors=tuple(dict.fromkeys([*errors, *refused])),
        warnings=tuple(f.message for f in seen.findings if f.severity is Severity.WARNING),
    )
