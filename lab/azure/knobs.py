"""What a test may turn: time, throttling, quota, capacity, consistency, outages. Kept across restarts, seeded where random."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from farshore.lab.azure.model import Json

# Buckets of Resource Manager and of the compute provider: (refill per second, burst). Source: Azure's published throttling
# limits, see the azure reference, B.1. A name with a colon counts per resource.
PUBLISHED_BUCKETS: dict[str, tuple[float, float]] = {
    "reads": (25, 250),
    "writes": (10, 200),
    "deletes": (10, 200),
    "vm-write:": (4 / 60, 12),
    "vm-read:": (12 / 60, 36),
    "vm-operation-read:": (15 / 60, 45),
}


@dataclass
class Capacity:
    """Machines of `size` (a glob) can't be had at `location` (in `zone`, where given; `*` is every zone and none)."""

    location: str
    size: str
    zone: str = "*"
    code: str = "AllocationFailed"
    """SkuNotAvailable, AllocationFailed, ZonalAllocationFailed or OverconstrainedAllocationRequest."""
    when: str = "lro"
    """`first`: the request is refused; `lro`: the operation fails and leaves the machine in state Failed."""
    remaining: int | None = None
    """How many refusals are left; None: for ever."""
    listed: bool = False
    """Also shown as a restriction in the SKU list, as a subscription without permission sees it."""


@dataclass
class Knobs:
    """Every number in seconds is real time of the laboratory unless it says otherwise."""

    seed: int = 1
    time_scale: float = 0.005
    """Multiplies the durations that Azure would take: a VM's 50 s become 250 ms."""
    jitter: float = 0.2
    retry_after: float | None = None
    """Overrides the honest Retry-After of long-running operations."""
    page_size: int = 100
    consistency_groups: float = 0.0
    """For how long a new resource group is unknown to requests that need it."""
    consistency_resources: float = 0.0
    consistency_operations: float = 0.0
    throttle: bool = False
    buckets: dict[str, tuple[float, float]] = field(default_factory=lambda: dict(PUBLISHED_BUCKETS))
    quota: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])
    """location → {"cores" | "virtualMachines" | family → limit}; what is missing has the default of `catalog`."""
    capacity: list[Capacity] = field(default_factory=list[Capacity])
    outage: list[str] = field(default_factory=list[str])
    """Locations whose resource providers do not answer; running operations there stand still."""
    unregistered: list[str] = field(default_factory=list[str])
    """Provider namespaces that the subscription is not registered for."""
    token_seconds: int = 3600
    busy_rules: bool = True
    """Refuse a second write on a virtual network while the first is running (B.2)."""
    boot_check: str = "read"
    """`read`: disks must be readable; `nonzero`: the OS disk's first sector isn't all zero; `signature`: it ends in 55 AA."""
    import_per_minute: bool = False
    """Refuse a second Import from one VHD within a minute (scaled), as B.6 tells."""
    import_from_snapshot: bool = True
    """Whether Import takes a source URL with `snapshot=`; what Azure does is unconfirmed."""
    run_command_timeout: float = 60.0

    def to_json(self) -> Json:
        return asdict(self)

    @staticmethod
    def from_json(doc: Json) -> Knobs:
        """Raises ValueError for an unknown name."""
        known = {f.name for f in fields(Knobs)}
        unknown = sorted(set(doc) - known)
        if unknown:
            raise ValueError(f"unknown knob {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        values: dict[str, Any] = dict(doc)
        if "capacity" in values:
            values["capacity"] = [Capacity(**entry) for entry in values["capacity"]]
        if "buckets" in values:
            values["buckets"] = {
                name: (float(rate), float(burst)) for name, (rate, burst) in values["buckets"].items()
            }
        return Knobs(**values)
