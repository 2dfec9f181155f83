"""Thin logical volumes: snapshots at the instant, exact differences, both valid over reboots.

A protected disk that is a thin volume is cut by `lvcreate --snapshot`, which suspends the volume and with it the file
system for that moment; the barrier around it makes it one instant for several volumes. Snapshots are named
`<volume>-farshore-<mark>`, so they are their own memory: the newest ones are kept as the bases of differences, and
`thin_delta` compares two of them on a metadata snapshot of the pool. Differences are exact to the pool's chunk.

Commands and formats are those of lvm2 and thin-provisioning-tools as the reference recorded them in a guest kernel. This
module itself was not executed against a real pool: the kernels of our test machines have no device mapper.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from farshore.providers.physical.agent.blocks import Blocks
from farshore.providers.physical.agent.disks import Device
from farshore.providers.physical.agent.holding import DirectReader
from farshore.providers.physical.agent.tracking import NotKnown, parse

KIND = "thin"
KEPT = 2  # older snapshots a volume: the committed point's and one to spare

Run = Callable[[Sequence[str]], str]


class LvmFailed(Exception):
    """A command failed: its text."""


def run(command: Sequence[str]) -> str:
    """Standard output. LvmFailed."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LvmFailed(f"{command[0]}: {error}") from error
    if done.returncode:
        raise LvmFailed(f"{' '.join(command[:3])}: {done.stderr.strip()[-300:]}")
    return done.stdout


def available() -> str:
    """ "" when thin volumes can be used, else what is missing."""
    missing = [tool for tool in ("lvcreate", "dmsetup", "thin_delta") if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    return "" if Path("/dev/mapper/control").exists() else "the kernel has no device mapper"


@dataclass(frozen=True, slots=True)
class Volume:
    """A thin volume as `lvs` shows it."""

    group: str
    name: str
    pool: str
    thin_id: int
    data_percent: float  # of the pool

    @property
    def path(self) -> str:
        return f"/dev/{self.group}/{self.name}"


FIELDS = "vg_name,lv_name,pool_lv,thin_id,lv_path,data_percent,lv_attr"


def parse_lvs(text: str) -> list[Volume]:
    """Thin volumes out of `lvs --reportformat json -o FIELDS`. LvmFailed when it is something else."""
    try:
        rows = json.loads(text)["report"][0]["lv"]
        return [
            Volume(
                row["vg_name"],
                row["lv_name"],
                row["pool_lv"],
                int(row["thin_id"]),
                float(row["data_percent"] or 0),
            )
            for row in rows
            if row["thin_id"] and row["pool_lv"]
        ]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise LvmFailed(f"the answer of lvs is not understood: {error}") from error


def is_thin(path: str) -> bool:
    """Whether a device is a thin volume that can be snapshotted here."""
    if available():
        return False
    with contextlib.suppress(LvmFailed):
        return bool(parse_lvs(run(["lvs", "--reportformat", "json", "-o", FIELDS, path])))
    return False


def parse_delta(text: str, size: int) -> Blocks:
    """Blocks out of `thin_delta`'s XML: everything that is not `same`. NotKnown when it is something else."""
    try:
        root = ElementTree.fromstring(text)  # noqa: S314  made by a local tool of ours, as root
    except ElementTree.ParseError as error:
        raise NotKnown(f"the answer of thin_delta is not understood: {error}") from error
    if root.tag != "superblock":
        raise NotKnown("the answer of thin_delta is not understood")
    chunk = int(root.attrib["data_block_size"]) * 512
    found = Blocks(size)
    for diff in root.iter("diff"):
        for entry in diff:
            if entry.tag == "same":
                continue
            if entry.tag not in ("different", "left_only", "right_only"):
                raise NotKnown(f"thin_delta told of {entry.tag!r}, which is not known here")
            found.add(int(entry.attrib["begin"]) * chunk, int(entry.attrib["length"]) * chunk)
    return found


class ThinTracker:
    """Fills `ChangeSource` and `Snapshots`: a mark is a snapshot."""

    kind = KIND

    def __init__(
        self, command: Run = run, open_reader: Callable[[Device], DirectReader] = DirectReader
    ) -> None:
        self._run, self._open = command, open_reader
        self._devices: dict[str, Device] = {}
        self._volumes: dict[str, Volume] = {}
        self._marks: dict[str, str] = {}

    def watch(self, devices: Mapping[str, Device]) -> None:
        self._devices = dict(devices)
        self._volumes = {}
        for key, one in devices.items():
            found = parse_lvs(self._run(["lvs", "--reportformat", "json", "-o", FIELDS, one.path]))
            if not found:
                raise LvmFailed(f"{one.path} is no thin volume")
            self._volumes[key] = found[0]

    def mark(self) -> dict[str, str]:
        """Names the next snapshots; `take` makes them, in the same barrier."""
        self._marks = {}
        for key, volume in self._volumes.items():
            newest = max((number for _, number in self._snapshots_of(volume)), default=0)
            self._marks[key] = f"{KIND}:{volume.group}.{volume.name}:{newest + 1}"
        return dict(self._marks)

    def take(self, name: str) -> dict[str, DirectReader]:
        """Inside the freeze. Snapshots come up inactive and flagged to be skipped: activation says otherwise."""
        del name
        images: dict[str, DirectReader] = {}
        for key, volume in self._volumes.items():
            snapshot = _name(volume, parse(self._marks[key])[2])
            self._run(["lvcreate", "--snapshot", "--name", snapshot, f"{volume.group}/{volume.name}"])
            self._run(["lvchange", "--activate", "y", "--ignoreactivationskip", f"{volume.group}/{snapshot}"])
            one = self._devices[key]
            images[key] = self._open(
                Device(f"/dev/{volume.group}/{snapshot}", 0, 0, one.size, one.identity, "", read_only=True)
            )
        return images

    def changed(self, key: str, since: str, until: str = "", *, carry: float = 0.0) -> Blocks:
        """NotKnown when the base snapshot is gone. Only between two snapshots."""
        del carry  # the volume is suspended for its snapshot: nothing is under way in it
        volume, size = self._volumes[key], self._devices[key].size
        kind, life, number = parse(since)
        if kind != KIND or life != f"{volume.group}.{volume.name}":
            raise NotKnown("the last point was made of another volume or in another way")
        if not until:
            raise NotKnown("a thin volume tells changes between snapshots only")
        ids = {n: s.thin_id for s, n in self._snapshots_of(volume)}
        last = parse(until)[2]
        if number not in ids or last not in ids:
            raise NotKnown("the snapshot of the last point is gone")
        pool = f"/dev/mapper/{_escape(volume.group)}-{_escape(volume.pool)}"
        self._run(["dmsetup", "message", f"{pool}-tpool", "0", "reserve_metadata_snap"])
        try:
            text = self._run(
                ["thin_delta", "-m", "--snap1", str(ids[number]), "--snap2", str(ids[last]), f"{pool}_tmeta"]
            )
        finally:
            self._run(["dmsetup", "message", f"{pool}-tpool", "0", "release_metadata_snap"])
        return parse_delta(text, size)

    def release(self, name: str) -> None:
        """Keep the newest snapshots as bases, remove older ones. A snapshot that stays costs the pool's space."""
        del name
        for volume in self._volumes.values():
            numbers = sorted(number for _, number in self._snapshots_of(volume))
            for number in numbers[: -1 - KEPT]:
                self._run(["lvremove", "--yes", f"{volume.group}/{_name(volume, number)}"])

    def tidy(self) -> None:
        return None

    def stop(self, *, clean: bool) -> None:
        del clean  # the snapshots are the memory

    def _snapshots_of(self, volume: Volume) -> list[tuple[Volume, int]]:
        rows = parse_lvs(self._run(["lvs", "--reportformat", "json", "-o", FIELDS, volume.group]))
        pattern = re.compile(rf"^{re.escape(volume.name)}-farshore-(\d+)$")
        return [(row, int(match[1])) for row in rows if (match := pattern.match(row.name))]


def _name(volume: Volume, number: int) -> str:
    return f"{volume.name}-farshore-{number}"


def _escape(name: str) -> str:
    """As device mapper writes the names of groups and volumes."""
    return name.replace("-", "--")
