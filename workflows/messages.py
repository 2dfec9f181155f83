"""What the workflows of one run tell each other."""

from __future__ import annotations

from enum import StrEnum

from farshore.contract.machine import FenceToken, MachineSpec
from farshore.contract.runs import ErrorView, Message, RunKind
from farshore.plans.model import MachinePlan


class MachineRun(Message):
    """Everything a MachineFailover needs."""

    run: str
    kind: RunKind
    plan: str
    machine: str
    group: str
    settings: MachinePlan
    spec: MachineSpec
    network: str
    choice: str
    guest_timeout: float
    force_off: bool
    try_shutdown: bool
    accept_data_loss: bool
    named: bool  # the caller named this machine: a wrong state is an error, not a reason to leave it out


class GroupRun(Message):
    """A slice of a boot group: at most 50 machines."""

    run: str
    kind: RunKind
    plan: str
    group: str
    part: str  # id of this slice, unique in the run
    machines: tuple[MachineRun, ...]


class Proceed(Message):
    """Parent to child: enter a stage."""

    stage: str
    network: str = ""
    fences: tuple[FenceToken, ...] = ()


class StageOutcome(StrEnum):
    DONE = "done"
    FAILED = "failed"
    SKIPPED = "skipped"
    STOPPED = "stopped"


class MachineReport(Message):
    """Child to parent: a machine has ended a stage, or ended altogether."""

    machine: str
    stage: str
    outcome: StageOutcome
    note: str = ""
    needs_fence: bool = False
    error: ErrorView | None = None


class GroupReport(Message):
    part: str
    stage: str
    machines: tuple[MachineReport, ...]
