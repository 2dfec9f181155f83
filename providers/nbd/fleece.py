"""What a cut makes inside QEMU, and how it goes away again.

For each disk: a file without a name (QEMU gets its descriptor), a qcow2 image in it whose backing is the live disk, and
a job that copies there what the guest is about to overwrite. The image then shows the disk as it was at the cut. None of it
outlives QEMU, and everything can be found and removed by its name.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from farshore.domain.errors import Code, FarshoreError
from farshore.providers.nbd.disks import CutName, QemuDisk, owner_of
from farshore.providers.nbd.guardian import HELD
from farshore.providers.nbd.qmp import Monitor, Refused

FILE, TRACK = "f", "b"  # suffixes: the file below a fleece; the export that shows a tracker
ALIVE = ("created", "running", "paused", "ready", "standby")


def build(monitor: Monitor, folder: Path, name: str, disk: QemuDisk, settle: float) -> None:
    """Make the fleece of one disk. SnapshotFailed; SourceBusy when QEMU does not get it done."""
    lower, job = f"{name}{FILE}", f"{name}c"
    descriptor = _nameless(folder)
    try:
        held = int(monitor("add-fd", descriptor=descriptor, opaque=name)["fdset-id"])
    finally:
        os.close(descriptor)
    try:
        monitor("blockdev-add", driver="file", node_name=lower, filename=f"/dev/fdset/{held}")
    finally:
        with contextlib.suppress(Refused):
            # The open node keeps it. A machine that does not run keeps this descriptor as well, until it runs: QEMU
            # closes it when a monitor's client leaves then. The guest of such a machine writes nothing into it.
            monitor("remove-fd", fdset_id=held)
    monitor("blockdev-create", job_id=job, options={"driver": "qcow2", "file": lower, "size": disk.size})
    ended: dict[str, str] = {}

    def over() -> bool:
        for entry in monitor("query-jobs"):
            if entry["id"] == job and entry["status"] == "concluded":
                ended["error"] = str(entry.get("error", ""))
        return bool(ended)

    monitor.wait_until(over, settle, f"Making the fleece image of {disk.key}")
    monitor("job-dismiss", id=job)
    if ended["error"]:
        raise FarshoreError(
            Code.SNAPSHOT_FAILED, f"QEMU could not make the fleece image of {disk.key}: {ended['error']}."
        )
    monitor("blockdev-add", driver="qcow2", node_name=name, file=lower, backing=disk.node)


def _nameless(folder: Path) -> int:
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise FarshoreError(
            Code.CONFIGURATION_INVALID,
            f"No file without a name can be made in {folder}: {exc}.",
            causes=(
                "The folder does not exist.",
                "Its file system has no such files (ext4, XFS, Btrfs and tmpfs have).",
            ),
            action="Correct the fleece folder in the settings.",
        ) from exc


def room(folder: Path) -> int:
    """Bytes free in the fleece folder. ConfigurationInvalid when it is not there."""
    try:
        about = os.statvfs(folder)
    except OSError as exc:
        raise FarshoreError(
            Code.CONFIGURATION_INVALID, f"The fleece folder {folder} cannot be used: {exc}."
        ) from exc
    return about.f_bavail * about.f_frsize


def alive(monitor: Monitor, jobs: Iterable[str]) -> bool:
    """Whether all these jobs still protect the cut from the guest's writes."""
    running = {str(job["device"]) for job in monitor("query-block-jobs") if job.get("status") in ALIVE}
    return set(jobs) <= running


def remove(monitor: Monitor, stem: str, settle: float) -> None:
    """Remove everything whose name begins with `stem`. Idempotent. SourceBusy when it does not go away in time."""
    mine = f"{stem}."

    def left(command: str, key: str) -> list[str]:
        return [str(entry[key]) for entry in monitor(command) if str(entry.get(key, "")).startswith(mine)]

    def gone(command: str, key: str) -> Callable[[], bool]:
        return lambda: not left(command, key)

    # The readers first: nobody may see a fleece that is no longer kept up.
    for export in left("query-block-exports", "id"):
        with contextlib.suppress(Refused):
            monitor("block-export-del", id=export, mode="hard")
    monitor.wait_until(gone("query-block-exports", "id"), settle, f"The end of the exports of {stem}")
    for job in left("query-block-jobs", "device"):
        with contextlib.suppress(Refused):
            monitor("block-job-cancel", device=job, force=True)
    monitor.wait_until(gone("query-block-jobs", "device"), settle, f"The end of the jobs of {stem}")

    def cleared() -> bool:
        for job in monitor("query-jobs"):
            if str(job["id"]).startswith(mine):
                with contextlib.suppress(Refused):
                    monitor("job-dismiss" if job["status"] == "concluded" else "job-cancel", id=job["id"])
        nodes = [
            name
            for node in monitor("query-named-block-nodes", flat=True)
            if (name := str(node.get("node-name", ""))).startswith(mine)
        ]
        # Upper nodes first; one that is still in use is tried again.
        for name in sorted(nodes, key=lambda name: name.endswith(FILE)):
            with contextlib.suppress(Refused):
                monitor("blockdev-del", node_name=name)
        return not nodes

    monitor.wait_until(cleared, settle, f"The end of the images of {stem}")


def cuts(monitor: Monitor, machine: str) -> dict[str, CutName]:
    """The cuts of ours that have left anything in this QEMU, by stem."""
    names = [str(node.get("node-name", "")) for node in monitor("query-named-block-nodes", flat=True)]
    names += [str(job["device"]) for job in monitor("query-block-jobs")]
    names += [str(job["id"]) for job in monitor("query-jobs")]
    names += [str(export["id"]) for export in monitor("query-block-exports")]
    return dict(found for name in names if (found := owner_of(name, machine)) is not None)


def resume_held(monitor: Monitor) -> bool:
    """Let a machine run that a dead worker of ours stopped for a group's cut."""
    if not held(monitor):
        return False
    stopped = monitor("query-status").get("status") == "paused"
    if stopped:
        monitor("cont")
    with contextlib.suppress(Refused):
        monitor("object-del", id=HELD)
    return stopped


def held(monitor: Monitor) -> bool:
    return any(entry.get("name") == HELD for entry in monitor("qom-list", path="/objects"))
