"""Which servers and disks qualify, and why not, as findings. Pure: judges what the agent told of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from farshore.domain.errors import Code
from farshore.providers.physical.agent.wire import PROTOCOL
from farshore.providers.ports import Finding, Severity, SourceDisk

_ELIGIBLE = Code.SOURCE_NOT_ELIGIBLE.value
_TRACKING = Code.CHANGE_TRACKING_NOT_READY.value
_UNFREEZABLE = {"vfat", "msdos", "exfat", "fuseblk"}  # kinds that the kernel cannot freeze


def assess(
    machine: Mapping[str, Any], *, seed_folder: bool
) -> tuple[tuple[SourceDisk, ...], tuple[Finding, ...]]:
    """Disks and findings of an agent's inventory. `seed_folder`: whether the worker has room for first copies."""
    found: list[Finding] = []
    disks: list[SourceDisk] = []
    name = str(machine["name"])

    def say(severity: Severity, code: str, message: str, action: str) -> None:
        found.append(Finding(severity, code, name, message, action))

    if int(machine.get("protocol", 0)) != PROTOCOL:
        say(
            Severity.ERROR,
            _ELIGIBLE,
            f"The agent on {name} speaks protocol {machine.get('protocol')}, this worker {PROTOCOL}.",
            "Update the agent or the worker.",
        )
    for disk in machine["disks"]:
        where = f"{disk['key']} ({disk['path']}) of {name}"
        reason = str(disk["error"])
        warning = ""
        if reason:
            say(Severity.ERROR, _ELIGIBLE, f"{where} cannot be replicated: {reason}.", "Correct its path.")
        elif disk["tracking"] == "hash" and any(mode == "rw" for _, _, mode in disk["mounts"]):
            warning = f"it is mounted, and there is no change tracking: {disk['tracking_reason']}"
            say(
                Severity.ERROR,
                _ELIGIBLE,
                f"{where} cannot be replicated while it is written: {warning}.",
                "Use a kernel with block trace events, or put the disk on LVM thin.",
            )
            reason = warning
        elif disk["tracking"] == "hash":
            warning = "each cycle reads the whole disk"
            say(Severity.WARNING, _TRACKING, f"{where}: {warning}.", "None needed; cycles cost more.")
        if not reason and disk["tracking"] in ("trace", "era") and not seed_folder:
            say(
                Severity.WARNING,
                _ELIGIBLE,
                f"{where} has no snapshot device and the worker no seed folder: a first copy has to fit the agent's spool.",
                "Give the worker a seed folder with room for what the disk holds.",
            )
        for path, kind, mode in disk["mounts"]:
            if mode == "rw" and kind in _UNFREEZABLE:
                say(
                    Severity.WARNING,
                    _TRACKING,
                    f"{path} ({kind}) on {where} cannot be frozen: points are crash-consistent while it is mounted.",
                    "Mount it read-only or on demand, as is usual for an EFI partition.",
                )
        disks.append(
            SourceDisk(
                key=str(disk["key"]),
                label=str(disk["path"]),
                size=int(disk["size"]),
                eligible=not reason,
                reason=reason or warning,
            )
        )
    if sum(1 for disk in machine["disks"] if disk["boot"]) != 1:
        say(
            Severity.ERROR,
            _ELIGIBLE,
            f"The agent on {name} must name exactly one disk as the boot disk.",
            "Set boot = true at one [[disk]].",
        )
    if not machine["abilities"].get("hooks"):
        say(
            Severity.INFO,
            "NoHooks",
            f"{name} has no hooks: points are file-system-consistent at most.",
            "Configure [[hook]] if an application needs more than its own recovery.",
        )
    return tuple(disks), tuple(found)
