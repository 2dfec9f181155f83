"""The model of a recovery plan. Format version 1.

Field names are the keys of the file. Every duration is a float in seconds once parsed (`30s` in the file is `30.0`
here). Objects are frozen and travel as JSON payloads unchanged. The model checks each field by itself; what needs a
look at the whole plan (a machine in two groups, an address given twice) is in `checks.py`, and the loader runs both.
"""

from __future__ import annotations

import ipaddress
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    model_validator,
)

from farshore.domain.errors import Code, FarshoreError
from farshore.plans.durations import parse_duration

Kind = Literal["planned", "unplanned", "test"]
KINDS: tuple[Kind, ...] = get_args(Kind)

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$"
NAME_HINT = "letters, digits, dots, dashes and underscores, at most 80, beginning with a letter or digit"

Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
NameOrEmpty = Annotated[str, StringConstraints(pattern=rf"^$|{NAME_PATTERN}")]
Text = Annotated[str, StringConstraints(strip_whitespace=True, max_length=8000)]
Title = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]


def _positive(seconds: float) -> float:
    if seconds <= 0:
        raise ValueError("must be longer than zero")
    return seconds


def _ipv4(text: str) -> str:
    try:
        return str(ipaddress.IPv4Address(text))
    except ipaddress.AddressValueError:
        raise ValueError(f"{text!r} is not an IPv4 address such as 10.20.3.10") from None


def _keep(value: Any) -> Any:
    if value == "all":
        return value
    try:
        return _positive(parse_duration(value))
    except ValueError as error:
        raise ValueError(f"{error}; or write all") from None


Duration = Annotated[float, BeforeValidator(parse_duration), AfterValidator(_positive)]
"""Seconds, more than zero."""
Address = Annotated[str, AfterValidator(_ipv4)]
Keep = Annotated[float | Literal["all"], BeforeValidator(_keep)]


class Part(BaseModel):
    """Base of every part of a plan. Numbers are taken as text where text is wanted (`zone: 1`)."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)


class Sites(Part):
    """Where the machines are and where they shall be recovered. Names of sites that the workers know."""

    source: Name = Field(description="the site that is protected", examples=["east"])
    target: Name = Field(description="the site that takes over", examples=["westeurope"])


class RetentionRule(Part):
    """Points no older than `within` are thinned to one per `keep`."""

    within: Duration = Field(description="age at which the rule ends", examples=["24h"])
    keep: Keep = Field(description="all, or one point per this time", examples=["1h"])

    @property
    def every(self) -> float:
        """Seconds between two kept points; 0 keeps all (the form of `domain.retention`)."""
        return 0.0 if self.keep == "all" else self.keep


_RETENTION = (
    RetentionRule(within=7200.0, keep="all"),
    RetentionRule(within=86400.0, keep=3600.0),
    RetentionRule(within=604800.0, keep=7200.0),
)


class Replication(Part):
    """How the machines are replicated."""

    interval: Duration = Field(default=30.0, description="time between two recovery points", examples=["30s"])
    app_consistent_every: Duration | None = Field(
        default=None,
        description="time between two app-consistent points; leave out for none",
        examples=["1h"],
    )
    rpo_threshold: Duration = Field(
        default=900.0, description="alert when the newest point is older", examples=["15m"]
    )
    retention: tuple[RetentionRule, ...] = Field(
        default=_RETENTION,
        min_length=1,
        description="which points are kept",
        examples=["[{within: 2h, keep: all}]"],
    )

    @property
    def buckets(self) -> tuple[tuple[float, float], ...]:
        """The retention as (age, one point per) in seconds, as `domain.retention` takes it."""
        return tuple((rule.within, rule.every) for rule in self.retention)


class Network(Part):
    """Networks at the target."""

    failover: Title = Field(description="the network of a real failover", examples=["dr-vnet"])
    test: Title = Field(
        default="isolated",
        description="the network of a test: isolated (made and removed by the test) or an existing one",
        examples=["isolated"],
    )


class Target(Part):
    """What a machine shall be at the target."""

    size: Title = Field(description="the machine size at the target", examples=["Standard_D4s_v5"])
    os: Literal["linux", "windows"] = Field(default="linux", description="the guest's operating system")
    firmware: Literal["efi", "bios"] = Field(
        default="efi", description="how the guest boots; as at the source"
    )
    zone: Title | None = Field(default=None, description="availability zone", examples=['"1"'])
    subnet: Title = Field(default="default", description="subnet of the network", examples=["db"])
    address: Address | None = Field(
        default=None,
        description="fixed private address; leave out for the next free one",
        examples=["10.20.3.10"],
    )
    public: bool = Field(default=False, description="give it a public address in a real failover")
    security_group: Title | None = Field(
        default=None, description="network security group", examples=["web-nsg"]
    )
    name: NameOrEmpty = Field(default="", description="name at the target; default: the machine's")
    tags: dict[str, str] = Field(
        default_factory=dict, description="tags at the target", examples=["{cost: crm}"]
    )


class MachinePlan(Part):
    """A machine of the plan.

    `source` and `target.name` are empty when left out, and become the machine's key as soon as it is part of a `Plan`.
    """

    source: str = Field(
        default="", max_length=500, description="name, inventory path or uuid at the source; default: the key"
    )
    target: Target = Field(description="what it shall be at the target", examples=["{size: Standard_D2s_v5}"])
    description: Text = Field(default="", description="what the machine is for")


class Action(Part):
    """What manual and script actions share."""

    on: tuple[Kind, ...] = Field(default=KINDS, description="kinds of run in which it happens; default: all")

    def runs_in(self, kind: str) -> bool:
        """Whether the action belongs to runs of this kind."""
        return kind in self.on


class ManualAction(Action):
    """A person does something, or looks at something, and says so. The run waits."""

    manual: Title = Field(description="what to do, in a few words", examples=["Check the database"])
    instructions: Text = Field(default="", description="how, and what a good outcome looks like")
    timeout: Duration = Field(default=8 * 3600.0, description="how long the run waits", examples=["8h"])

    @property
    def title(self) -> str:
        """What people read."""
        return self.manual


class ScriptAction(Action):
    """A script of the plans folder's `scripts/` runs on a worker, or in a recovered machine."""

    script: str = Field(
        min_length=1, max_length=500, description="file in the plans folder's scripts/", examples=["smoke.sh"]
    )
    args: tuple[str, ...] = Field(default=(), description="arguments", examples=['["crm"]'])
    timeout: Duration = Field(default=300.0, description="after which it is stopped", examples=["5m"])
    where: Literal["worker", "guest"] = Field(default="worker", description="on a worker or in a machine")
    machine: str | None = Field(
        default=None, description="the machine, with where: guest", examples=["crm-db01"]
    )
    on_failure: Literal["stop", "continue"] | None = Field(
        default=None, description="stop or go on; default: a planned failover stops, others go on"
    )

    @property
    def title(self) -> str:
        """What people read."""
        return f"{self.script} in {self.machine}" if self.where == "guest" and self.machine else self.script

    def stops(self, kind: str) -> bool:
        """Whether a failure stops a run of this kind. Without a word in the plan only a planned one stops."""
        return kind == "planned" if self.on_failure is None else self.on_failure == "stop"


ACTION_TAGS = {"manual": ManualAction, "script": ScriptAction}


def _action_tag(value: Any) -> str | None:
    if isinstance(value, dict):
        found = [tag for tag in ACTION_TAGS if tag in value]
        return found[0] if len(found) == 1 else None
    return next((tag for tag, model in ACTION_TAGS.items() if isinstance(value, model)), None)


AnyAction = Annotated[
    Annotated[ManualAction, Tag("manual")] | Annotated[ScriptAction, Tag("script")],
    Discriminator(
        _action_tag,
        custom_error_type="action_kind",
        custom_error_message="an action is either `manual: what to do` or `script: file`, and not both",
    ),
]


class Shutdown(Part):
    """How the source machines go down in a real failover."""

    order: Literal["reverse", "parallel"] = Field(
        default="reverse", description="reverse: boot groups backwards; parallel: all at once"
    )
    guest_timeout: Duration = Field(
        default=300.0, description="time for a guest to shut itself down", examples=["5m"]
    )
    force: bool = Field(default=False, description="power a guest off that does not go down by itself")
    before: tuple[AnyAction, ...] = Field(
        default=(), description="actions before the first machine goes down"
    )
    after: tuple[AnyAction, ...] = Field(default=(), description="actions after the last one is down")


class BootGroup(Part):
    """Machines that start together. A group begins when all of the one before have started."""

    group: Title = Field(description="name of the group", examples=["data"])
    machines: tuple[str, ...] = Field(default=(), description="keys of machines", examples=["[crm-db01]"])
    before: tuple[AnyAction, ...] = Field(default=(), description="actions before its machines start")
    after: tuple[AnyAction, ...] = Field(default=(), description="actions after its machines have started")


class Plan(Part):
    """A recovery plan."""

    farshore: Literal[1] = Field(description="version of the format", examples=["1"])
    plan: Name = Field(description="name of the plan", examples=["crm"])
    description: Text = Field(default="", description="what the plan recovers")
    sites: Sites = Field(
        description="where from and where to", examples=["{source: east, target: westeurope}"]
    )
    replication: Replication = Field(default_factory=Replication, description="how machines are replicated")
    network: Network = Field(description="networks at the target", examples=["{failover: dr-vnet}"])
    machines: dict[Name, MachinePlan] = Field(
        min_length=1,
        description="the machines by name",
        examples=["{crm-db01: {target: {size: Standard_D4s_v5}}}"],
    )
    shutdown: Shutdown = Field(default_factory=Shutdown, description="how the source goes down")
    boot: tuple[BootGroup, ...] = Field(
        min_length=1,
        description="groups in the order of their start",
        examples=["[{group: data, machines: [crm-db01]}]"],
    )

    @model_validator(mode="after")
    def _name_machines(self) -> Plan:
        for key, machine in self.machines.items():
            source, name = machine.source or key, machine.target.name or key
            if (source, name) != (machine.source, machine.target.name):
                target = machine.target.model_copy(update={"name": name})
                self.machines[key] = machine.model_copy(update={"source": source, "target": target})
        return self

    def group_of(self, machine: str) -> BootGroup:
        """The boot group of a machine. Raises MachineUnknown."""
        for group in self.boot:
            if machine in group.machines:
                return group
        raise FarshoreError(
            Code.MACHINE_UNKNOWN,
            f"Plan {self.plan} has no machine {machine}; it has {', '.join(self.machines)}.",
            subject=machine,
        )
