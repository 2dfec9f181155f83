"""Workers: which workflows and activities run on which queue.

Role `control` runs workflows and activities that touch no site; it lives outside the protected site, as Temporal does.
Role `site` runs the activities of one site, from where that site can be reached. Both may share a process.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from temporalio.client import Client
from temporalio.worker import Worker
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner, SandboxRestrictions

from farshore.activities.control import ControlActivities
from farshore.activities.source import SourceActivities
from farshore.activities.support import ErrorInterceptor
from farshore.activities.target import TargetActivities
from farshore.contract import names
from farshore.workers.settings import AzureSite, Settings, VSphereSite
from farshore.workers.sites import ConfiguredSites
from farshore.workflows.failover import Failover
from farshore.workflows.failover_group import FailoverGroup
from farshore.workflows.machine_failover import MachineFailover
from farshore.workflows.machine_protection import MachineProtection
from farshore.workflows.points import RecoveryPoints
from farshore.workflows.protection import Protection

WORKFLOWS: Sequence[type] = (
    Failover,
    FailoverGroup,
    MachineFailover,
    Protection,
    MachineProtection,
    RecoveryPoints,
)

_PASSED_THROUGH = (
    "farshore.activities",
    "farshore.contract",
    "farshore.domain",
    "farshore.plans",
    "pydantic_core",
    "annotated_types",
    "ruamel",
)

log = logging.getLogger("farshore.worker")


def workflow_runner() -> SandboxedWorkflowRunner:
    """The sandbox with our pure rooms passed through: no double classes, no import per workflow."""
    restrictions = SandboxRestrictions.default.with_passthrough_modules(*_PASSED_THROUGH)
    return SandboxedWorkflowRunner(restrictions=dataclasses.replace(restrictions))


def _activities(of: object) -> list[Callable[..., Any]]:
    return [
        method
        for name in dir(of)
        if callable(method := getattr(of, name)) and hasattr(method, "__temporal_activity_definition")
    ]


def control_worker(client: Client, settings: Settings) -> Worker:
    """Workflows and control activities."""
    tuning = settings.worker
    control = ControlActivities(client, settings.plans.folder, settings, leg_seconds=tuning.leg)
    return Worker(
        client,
        task_queue=names.CONTROL_QUEUE,
        workflows=list(WORKFLOWS),
        activities=_activities(control),
        interceptors=[ErrorInterceptor()],
        workflow_runner=workflow_runner(),
        max_concurrent_activities=tuning.activities,
        graceful_shutdown_timeout=timedelta(seconds=tuning.graceful_shutdown),
        disable_eager_activity_execution=True,
    )


def site_worker(client: Client, settings: Settings, site: str, sites: ConfiguredSites) -> Worker:
    """The activities of one site."""
    tuning = settings.worker
    queue = settings.queue(site, wanted="worker")
    match settings.sites[site]:
        case VSphereSite():
            activities = _activities(SourceActivities(sites))
        case AzureSite():
            activities = _activities(TargetActivities(sites))
    return Worker(
        client,
        task_queue=queue,
        activities=activities,
        interceptors=[ErrorInterceptor()],
        max_concurrent_activities=tuning.activities,
        max_heartbeat_throttle_interval=timedelta(seconds=tuning.heartbeat_throttle),
        default_heartbeat_throttle_interval=timedelta(seconds=tuning.heartbeat_throttle),
        graceful_shutdown_timeout=timedelta(seconds=tuning.graceful_shutdown),
    )


async def run_workers(
    client: Client, settings: Settings, *, control: bool, sites: Sequence[str], stop: asyncio.Event
) -> None:
    """Run the wanted workers until `stop` is set; then let steps that are under way finish or hand over."""
    configured = ConfiguredSites(settings)
    workers = [control_worker(client, settings)] if control else []
    workers += [site_worker(client, settings, site, configured) for site in sites]
    running = [asyncio.create_task(worker.run()) for worker in workers]
    log.info("workers run: %s", ", ".join(worker.task_queue for worker in workers))
    waiting = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([waiting, *running], return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
        await asyncio.gather(*(worker.shutdown() for worker in workers))
        await asyncio.gather(*running)
        await configured.close()
