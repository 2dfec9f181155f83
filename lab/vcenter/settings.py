"""How the laboratory behaves; persisted, changeable at any time over the control API."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Settings:
    """Times in seconds, sizes in bytes unless the name says otherwise. Zero means "at once" or "no limit"."""

    time_scale: float = 1.0
    """Multiplies every task, boot and shutdown time below."""
    task_seconds: dict[str, float] = field(default_factory=dict[str, float])
    """Duration by method name; `*` for all others."""
    boot_seconds: float = 0.0
    """From power on until the tools run and the guest has addresses."""
    shutdown_seconds: float = 0.3
    """From ShutdownGuest until powered off, where the machine does not say otherwise."""
    idle_timeout: float = 1800.0
    http_counts_as_use: bool = False
    """Whether a read over /folder keeps the session alive; not known of the real one, so the harder case is default."""
    max_sessions: int = 0
    page_size: int = 1000
    """Objects a RetrievePropertiesEx answer holds at most."""
    snapshot_depth: int = 32
    cbt_window: int = 0
    """Bytes that one QueryChangedDiskAreas answer covers at most."""
    cbt_activation: str = "stun"
    """`stun`: pending change tracking starts at the next stun; `power_cycle`: only at a power on."""
    stale_id_fault: str = "vmodl.fault.InvalidArgument"
    """Or `vim.fault.FileFault`."""
    revert_changes_epoch: bool = True
    extend_changes_epoch: bool = False
    crash_changes_epoch: bool = False
    """Whether a power loss ends the epoch."""
    defect_under_report: bool = False
    """Writes during snapshot consolidation are not tracked (KB 317933)."""
    defect_over_report: bool = False
    """Answers name the neighbours of changed blocks, too."""
    defect_growth: bool = False
    """After an extension nothing is tracked until tracking is switched off and on (KB 310751)."""
    consolidate_mib_per_s: float = 0.0
    folder_mib_per_s: float = 0.0
    digest_log: bool = False
    """Record the SHA-256 of every disk with each snapshot."""
    after_crash: str = "running"
    """What machines that were on do when the laboratory comes back: `running` or `poweredOff`."""

    def duration(self, method: str) -> float:
        """Seconds that a task of `method` takes."""
        return self.task_seconds.get(method, self.task_seconds.get("*", 0.0)) * self.time_scale

    def update(self, **values: Any) -> None:
        """Change some settings. Raises `ValueError` for a name or a type that is wrong."""
        known = {f.name for f in dataclasses.fields(self)}
        for name, value in values.items():
            if name not in known:
                raise ValueError(f"no setting {name!r}; there are: {', '.join(sorted(known))}")
            present = getattr(self, name)
            if isinstance(present, bool) != isinstance(value, bool) or (
                not isinstance(value, type(present))
                and not (isinstance(present, (int, float)) and isinstance(value, (int, float)))
            ):
                raise ValueError(f"setting {name!r} takes {type(present).__name__}")
            setattr(self, name, value)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
