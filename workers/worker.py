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

from temporalio.api.workflowservice.v1 import SetWorkerDeploymentCurrentVersionRequest
from temporalio.client import Client
from temporalio.common import VersioningBehavior, WorkerDeploymentVersion
from temporalio.service import RPCError
from temporalio.worker import Worker, WorkerDeploymentConfig
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner, SandboxRestrictions

from farshore.activities.control import ControlActivities
from farshore.activities.source import SourceActivities, Upkeep
from farshore.activities.support import ErrorInterceptor
from farshore.activities.target import TargetActivities
from farshore.contract import names
from farshore.replication.engine import Bandwidth, Schedule, Window
from farshore.workers.settings import AzureSite, PhysicalSite, Settings, VSphereSite, WorkerTuning
from farshore.workers.sites import ConfiguredSites
from farshore.workflows.failover import Failover
from farshore.workflows.failover_group import FailoverGroup
from farshore.workflows.machine_failover import MachineFailover
from farshore.workflows.machine_protection import MachineProtection
from farshore.workflows.points import RecoveryPoints
from farshore.workflows.protection import Protection

RUNS: Sequence[type] = (Failover, FailoverGroup, MachineFailover, Protection, RecoveryPoints)
_ACTIVATION_TRIES = 60

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


def control_workers(client: Client, settings: Settings) -> list[Worker]:
    """Two workers: runs with the control activities, and the machines' protection workflows."""
    tuning = settings.worker
    control = ControlActivities(client, settings.plans.folder, settings, leg_seconds=tuning.leg)
    shared: dict[str, Any] = {
        "interceptors": [ErrorInterceptor()],
        "workflow_runner": workflow_runner(),
        "max_concurrent_activities": tuning.activities,
        "graceful_shutdown_timeout": timedelta(seconds=tuning.graceful_shutdown),
        "disable_eager_activity_execution": True,
    }
    runs = Worker(
        client,
        task_queue=names.CONTROL_QUEUE,
        workflows=list(RUNS),
        activities=_activities(control),
        deployment_config=_versioned(settings, names.CONTROL_QUEUE, VersioningBehavior.PINNED),
        **shared,
    )
    protection = Worker(
        client,
        task_queue=names.PROTECTION_QUEUE,
        workflows=[MachineProtection],
        deployment_config=_versioned(settings, names.PROTECTION_QUEUE, VersioningBehavior.AUTO_UPGRADE),
        **shared,
    )
    return [runs, protection]


def _versioned(settings: Settings, queue: str, behavior: VersioningBehavior) -> WorkerDeploymentConfig | None:
    deployment = settings.worker.deployment
    if deployment is None:
        return None
    return WorkerDeploymentConfig(
        version=WorkerDeploymentVersion(deployment_name=queue, build_id=deployment.build),
        use_worker_versioning=True,
        default_versioning_behavior=behavior,
    )


async def activate(client: Client, build: str) -> None:
    """Make `build` the current version of both deployments; waits until its workers have polled."""
    for queue in (names.CONTROL_QUEUE, names.PROTECTION_QUEUE):
        request = SetWorkerDeploymentCurrentVersionRequest(
            namespace=client.namespace, deployment_name=queue, build_id=build, identity=client.identity
        )
        for attempt in range(_ACTIVATION_TRIES):
            try:
                await client.workflow_service.set_worker_deployment_current_version(request)
                break
            except RPCError:
                if attempt + 1 == _ACTIVATION_TRIES:
                    raise
                await asyncio.sleep(1)  # the server learns of a version when its first poller arrives


def site_workers(client: Client, settings: Settings, site: str, sites: ConfiguredSites) -> list[Worker]:
    """The activities of one site; of a source also its replication, on a queue and with slots of its own."""
    tuning = settings.worker
    queue = settings.queue(site, wanted="worker")
    match settings.sites[site]:
        case VSphereSite() | PhysicalSite():
            source = SourceActivities(sites, limit=_bandwidth(tuning), upkeep=_upkeep(tuning))
            steps = [a for a in _activities(source) if a != source.replicate_leg]
            work = [
                (queue, steps, tuning.activities),
                (names.legs_queue(queue), [source.replicate_leg], tuning.legs),
            ]
        case AzureSite():
            work = [(queue, _activities(TargetActivities(sites)), tuning.activities)]
    return [
        Worker(
            client,
            task_queue=name,
            activities=activities,
            interceptors=[ErrorInterceptor()],
            max_concurrent_activities=slots,
            max_heartbeat_throttle_interval=timedelta(seconds=tuning.heartbeat_throttle),
            default_heartbeat_throttle_interval=timedelta(seconds=tuning.heartbeat_throttle),
            graceful_shutdown_timeout=timedelta(seconds=tuning.graceful_shutdown),
        )
        for name, activities, slots in work
    ]


def _upkeep(tuning: WorkerTuning) -> Upkeep:
    return Upkeep(
        base_every_s=tuning.base_every,
        scrub_every_s=tuning.scrub_days * 86400.0 or None,
        audit_every_s=tuning.audit_days * 86400.0 or None,
    )


def _bandwidth(tuning: WorkerTuning) -> Bandwidth | None:
    if not tuning.bandwidth:
        return None
    return Bandwidth(Schedule([Window(rate.minute, rate.mbytes * 1e6) for rate in tuning.bandwidth]))


async def run_workers(
    client: Client,
    settings: Settings,
    *,
    control: bool,
    sites: Sequence[str],
    stop: asyncio.Event,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Run the wanted workers until `stop` is set; then let steps that are under way finish or hand over.

    `on_ready` is called once, when all of them run.
    """
    configured = ConfiguredSites(settings)
    workers = control_workers(client, settings) if control else []
    workers += [worker for site in sites for worker in site_workers(client, settings, site, configured)]
    running = [asyncio.create_task(worker.run()) for worker in workers]
    deployment = settings.worker.deployment
    if control and deployment is not None and deployment.activate:
        await activate(client, deployment.build)
    waiting = asyncio.create_task(stop.wait())
    try:
        # The SDK offers a flag and no event.
        while not (all(w.is_running for w in workers) or any(t.done() for t in running)):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        log.info("workers run: %s", ", ".join(worker.task_queue for worker in workers))
        on_ready()
        await asyncio.wait([waiting, *running], return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
        await asyncio.gather(*(worker.shutdown() for worker in workers))
        await asyncio.gather(*running)
        await configured.close()
