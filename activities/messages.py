"""Inputs and results of activities. Small, JSON-ready, free of secrets; no block data, extents or manifests."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import Field

from farshore.contract.machine import MachineSpec
from farshore.contract.runs import ErrorView, Message, PointView, ResourceView
from farshore.plans.model import MachinePlan, Plan


class LoadPlan(Message):
    plan: str
    machines: tuple[str, ...] = ()


class PinnedPlan(Message):
    """A plan as it was when the run began. Content and hash go into history; edits don't touch a running run."""

    plan: Plan
    sha256: str
    source_queue: str
    target_queue: str
    leg_seconds: float = 3600.0


class UpdateCall(Message):
    """Send an Update to a machine's MachineProtection. `update_id` makes a repeat harmless."""

    machine: str
    update: str
    payload: dict[str, Any]
    update_id: str


class StartProtection(Message):
    spec: MachineSpec


class StatusCall(Message):
    machines: tuple[str, ...]


class WorkerScript(Message):
    """A script of the plan's folder, run on a control worker. `key` is its idempotency key."""

    plan: str
    run: str
    kind: str
    action: str
    script: str
    args: tuple[str, ...] = ()
    timeout: float = 300.0
    key: str = ""
    context: dict[str, Any] = Field(default_factory=dict)


class ScriptOutput(Message):
    exit_code: int
    stdout: str = ""
    stderr: str = ""


class SourceCall(Message):
    """A step on a source machine."""

    site: str
    machine: str
    source: str


class ShutDownCall(SourceCall):
    guest_timeout: float = 300.0
    force: bool = False


class ShutDownReport(Message):
    already_off: bool
    graceful: bool
    at: datetime


class FenceReport(Message):
    kind: str
    evidence: str
    at: datetime


class InspectReport(Message):
    machine: str
    id: str = ""  # the provider's stable id
    power: str
    tools_running: bool
    disks: int
    bytes: int
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class LegCall(Message):
    """Run many replication cycles in one activity."""

    spec: MachineSpec
    owner: str
    until_seconds: float
    stop_after_first: bool = False
    force_full: bool = False


class LegReport(Message):
    cycles: int
    points: int = 0  # committed by this leg
    last_error: str = ""  # in words, "" if the last cycle was good
    newest: PointView | None
    full_copies: int
    bytes_shipped: int
    stopped_because: str


class FinalCycleCall(Message):
    spec: MachineSpec
    owner: str
    patience: float = 3600.0  # seconds for which failing attempts are repeated


class CheckTargetCall(Message):
    site: str
    plan: Plan
    machines: tuple[str, ...]
    test: bool


class FindingView(Message):
    severity: str
    code: str
    subject: str
    message: str
    action: str


class OwnedCall(Message):
    """A step on what a run makes at the target."""

    site: str
    plan: str
    run: str
    machine: str
    test: bool


class TestNetworkCall(OwnedCall):
    __test__ = False  # not a test class
    like: tuple[str, ...]


class IsolationCall(Message):
    site: str
    network: str


class ChoosePointCall(OwnedCall):
    choice: str
    hold: bool = True


class PointDisk(Message):
    key: str
    label: str
    size: int
    index: int


class ChosenPoint(Message):
    point: PointView
    disks: tuple[PointDisk, ...]


class DiskCall(OwnedCall):
    settings: MachinePlan
    network: str
    point: str
    disk: PointDisk


class NicCall(OwnedCall):
    settings: MachinePlan
    network: str


class MachineCall(OwnedCall):
    settings: MachinePlan
    network: str
    disks: tuple[ResourceView, ...]
    nics: tuple[ResourceView, ...]


class WaitRunningCall(OwnedCall):
    resource: ResourceView
    timeout: float = 1800.0


class RunningReport(Message):
    addresses: tuple[str, ...]
    detail: str
    at: datetime


class RemoveCall(OwnedCall):
    """Delete by tags; `machine` "" means what belongs to the run as a whole too."""

    except_run: str = ""
    run_level: bool = False  # only what belongs to the run as a whole


class RemoveReport(Message):
    deleted: tuple[ResourceView, ...]
    leftovers: tuple[str, ...]


class GuestScriptCall(OwnedCall):
    script: str
    args: tuple[str, ...] = ()
    timeout: float = 300.0
    resource: ResourceView


class StoreCall(Message):
    """A step on a machine's replica."""

    site: str
    machine: str
    holder: str = ""
    point: str = ""


class PointList(Message):
    machine: str
    points: tuple[PointView, ...]


class Removed(Message):
    ids: tuple[str, ...]


class StatusList(Message):
    """Statuses in the order asked; a machine that is not protected has an error instead."""

    found: dict[str, dict[str, Any]]
    missing: dict[str, ErrorView]


class ReadScript(Message):
    plan: str
    script: str
