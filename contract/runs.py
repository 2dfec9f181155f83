"""Inputs and results of runs: one JSON object in, one out. Unknown fields are refused with a readable list."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from farshore.domain.errors import ErrorInfo
from farshore.domain.points import PointChoice

Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=100)]
Text = Annotated[str, StringConstraints(strip_whitespace=True, max_length=2000)]


class Message(BaseModel):
    """Base of everything on the wire: frozen, no unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RunKind(StrEnum):
    """What a Failover run does."""

    TEST = "test"
    CLEANUP = "cleanup"
    PLANNED = "planned"
    UNPLANNED = "unplanned"
    CHANGE_POINT = "change-point"
    COMMIT = "commit"
    CANCEL = "cancel"


class ProtectionKind(StrEnum):
    """What a Protection run does."""

    PROTECT = "protect"
    DISABLE = "disable"


class Confirmation(Message):
    """One person's word. Two different people are needed to replace a proof that the source is off."""

    by: Name
    statement: Text = ""


class FailoverInput(Message):
    """Start a run of a recovery plan. Only `plan` and `kind` are needed."""

    plan: Name
    kind: RunKind
    reason: Text = ""
    requested_by: Text = ""
    machines: tuple[Name, ...] = Field(default=(), description="only these machines of the plan; empty: all")
    point: Name = Field(
        default="latest",
        description="latest, latest-processed, latest-app-consistent, latest-crash-consistent; a point id if the run has one machine",
    )
    points: dict[str, str] = Field(
        default_factory=dict, description="a point for single machines: {machine: point id or choice}"
    )
    shutdown: bool = Field(default=True, description="unplanned: try to shut the source down first")
    break_glass: tuple[Confirmation, ...] = Field(
        default=(),
        description="unplanned, source not provably off: two different people confirm that it cannot come back",
    )
    accept_data_loss: bool = Field(
        default=False, description="change-point after a planned failover: give up its zero loss"
    )
    notes: Text = ""

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        strange = sorted(set(self.points) - set(self.machines)) if self.machines else []
        if strange:
            msg = f"points names {', '.join(strange)}, which machines does not"
            raise ValueError(msg)
        wanted = (self.point, *self.points.values())
        bad = [c for c in wanted if c not in set(PointChoice) and not c.startswith("p-")]
        if bad:
            msg = f"{bad[0]!r} is no recovery point; use {', '.join(PointChoice)}, or a point id (p-…)"
            raise ValueError(msg)
        if self.kind is RunKind.PLANNED and any(c != PointChoice.LATEST for c in wanted):
            msg = "a planned failover loses nothing, so its point is latest; an older one is for unplanned"
            raise ValueError(msg)
        if self.kind is not RunKind.UNPLANNED and (not self.shutdown or self.break_glass):
            msg = "shutdown and break_glass are for unplanned only"
            raise ValueError(msg)
        people = [c.by.casefold() for c in self.break_glass]
        if len(set(people)) != len(people):
            msg = "break_glass needs different people; the same name stands twice"
            raise ValueError(msg)
        return self


class ProtectionInput(Message):
    """Enable or disable the protection of a plan's machines."""

    plan: Name
    kind: ProtectionKind = ProtectionKind.PROTECT
    machines: tuple[Name, ...] = ()
    reason: Text = ""
    requested_by: Text = ""
    wait: bool = Field(default=True, description="protect: end only when every machine is Protected")


class PointsInput(Message):
    """Ask for the recovery points of a plan's machines."""

    plan: Name
    machines: tuple[Name, ...] = ()
    limit: int = Field(default=20, ge=1, le=1000, description="newest points per machine")


class ErrorView(Message):
    """An error as a person reads it."""

    code: str
    message: str
    possible_causes: tuple[str, ...] = ()
    recommended_action: str = ""
    resolvability: str = ""
    subject: str = ""
    details: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def of(cls, info: ErrorInfo) -> Self:
        """From the domain's form."""
        return cls(**info.to_dict())

    def text(self) -> str:
        """One line: what and what to do."""
        return f"{self.message} → {self.recommended_action}" if self.recommended_action else self.message


class PointView(Message):
    """A recovery point in results and details."""

    id: str
    machine: str
    cycle: int
    taken_at: datetime
    consistency: str
    final: bool = False
    size_bytes: int = 0


class ResourceView(Message):
    """Something that a run made or deleted at the target."""

    id: str
    kind: str
    name: str


class Outcome(StrEnum):
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    SKIPPED = "skipped"
    STOPPED = "stopped"  # the run stopped before this machine was done


class MachineResult(Message):
    """How one machine came out of a run."""

    machine: str
    outcome: Outcome
    state: str = ""
    note: str = ""
    point: PointView | None = None
    data_loss_seconds: float | None = Field(
        default=None, description="age of the point when the source was cut off; 0 when proven"
    )
    fence: str = ""
    made: tuple[ResourceView, ...] = ()
    deleted: tuple[ResourceView, ...] = ()
    leftovers: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    running_at: datetime | None = None
    error: ErrorView | None = None


class RunStatus(StrEnum):
    SUCCEEDED = "Succeeded"
    PARTIALLY_SUCCEEDED = "PartiallySucceeded"
    FAILED = "Failed"


class DecisionKind(StrEnum):
    APPROVE = "approve"
    REJECT = "reject"


class Decision(Message):
    """Answer to what a run waits for. `action` is the id that its current details show."""

    action: Name
    decision: DecisionKind = DecisionKind.APPROVE
    by: Name
    observation: Text = ""


class DecisionRecord(Message):
    action: str
    decision: DecisionKind
    by: str
    observation: str
    at: datetime


class RunResult(Message):
    """What a run leaves behind."""

    plan: str
    kind: str
    status: RunStatus
    plan_sha256: str = ""
    started_at: datetime
    finished_at: datetime
    rto_seconds: float | None = Field(default=None, description="run start until the last machine ran")
    rpo_seconds: float | None = Field(default=None, description="greatest data loss of a machine")
    machines: tuple[MachineResult, ...] = ()
    decisions: tuple[DecisionRecord, ...] = ()
    actions: tuple[str, ...] = ()
    network_deleted: tuple[ResourceView, ...] = ()
    errors: tuple[ErrorView, ...] = ()


class PendingAction(Message):
    """What a run waits for."""

    action: str
    title: str
    instructions: str
    since: datetime
    until: datetime | None
    needs: int = 1  # how many different people
    given: tuple[str, ...] = ()


class MachineProgress(Message):
    machine: str
    group: str
    stage: str
    outcome: str
    note: str = ""


class RunProgress(Message):
    """Answer of the `progress` query of a Failover run."""

    plan: str
    kind: str
    phase: str
    started_at: datetime
    pending: tuple[PendingAction, ...] = ()
    machines: tuple[MachineProgress, ...] = ()
    log: tuple[str, ...] = ()
