"""dm-era below a file system: the kernel numbers eras and remembers in which one a block was last written.

It survives reboots (its metadata is on disk) and is no snapshot: cuts keep bytes as they do with the trace. The operator
stacks it: the protected disk is `/dev/mapper/<name>` with an `era` target.

As for LVM: written after the reference, not executed by us, since our test machines' kernels have no device mapper.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from farshore.providers.physical.agent.blocks import Blocks
from farshore.providers.physical.agent.disks import Device
from farshore.providers.physical.agent.lvm import LvmFailed, Run, run
from farshore.providers.physical.agent.tracking import NotKnown, parse

KIND = "era"
_STATUS = re.compile(
    r"^\d+ \d+ era (?P<meta>\d+) (?P<used>\d+)/(?P<total>\d+) (?P<era>\d+) (?P<snap>-|\d+)", re.MULTILINE
)
_TABLE = re.compile(r"^\d+ \d+ era (?P<meta>\S+) (?P<origin>\S+) (?P<sectors>\d+)", re.MULTILINE)
_ENTRY = re.compile(r'<block\s+block="(\d+)"\s*/>|<range\s+begin="(\d+)"\s+end\s*=\s*"(\d+)"\s*/>')


def available() -> str:
    """ "" when dm-era can be used, else what is missing."""
    missing = [tool for tool in ("dmsetup", "era_invalidate") if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    return "" if Path("/dev/mapper/control").exists() else "the kernel has no device mapper"


def parse_status(text: str) -> int:
    """The current era. LvmFailed for a failed or another target."""
    match = _STATUS.search(text)
    if match is None:
        raise LvmFailed(f"the status of dm-era is not understood: {text.strip()[:100]}")
    return int(match["era"])


def parse_invalidate(text: str, block: int, size: int) -> Blocks:
    """Blocks out of `era_invalidate`'s XML; `block` is the target's block in bytes; ends of ranges are exclusive."""
    if "<blocks>" not in text and "<blocks/>" not in text:
        raise NotKnown("the answer of era_invalidate is not understood")
    found = Blocks(size)
    for single, begin, end in _ENTRY.findall(text):
        first, last = (int(single), int(single) + 1) if single else (int(begin), int(end))
        found.add(first * block, (last - first) * block)
    return found


class EraTracker:
    """Fills `ChangeSource`. A mark is the era that began with a checkpoint."""

    kind = KIND

    def __init__(self, command: Run = run) -> None:
        self._run = command
        self._devices: dict[str, Device] = {}

    def watch(self, devices: Mapping[str, Device]) -> None:
        self._devices = dict(devices)
        for key, one in devices.items():
            parse_status(self._run(["dmsetup", "status", _target(one)]))
            del key

    def mark(self) -> dict[str, str]:
        """`checkpoint` ends the current era; what is written from now on has the number that the status shows then."""
        ids: dict[str, str] = {}
        for key, one in self._devices.items():
            self._run(["dmsetup", "message", _target(one), "0", "checkpoint"])
            era = parse_status(self._run(["dmsetup", "status", _target(one)]))
            ids[key] = f"{KIND}:{_target(one)}:{era}"
        return ids

    def changed(self, key: str, since: str, until: str = "", *, carry: float = 0.0) -> Blocks:
        """Always until now: a superset of any earlier end. `carry`: one era more. NotKnown."""
        del until
        one = self._devices[key]
        kind, life, era = parse(since)
        if kind != KIND or life != _target(one):
            raise NotKnown("the last point was made of another device or in another way")
        status = parse_status(self._run(["dmsetup", "status", _target(one)]))
        if era > status:
            raise NotKnown("the eras went backwards: the metadata of dm-era was made anew")
        table = _TABLE.search(self._run(["dmsetup", "table", _target(one)]))
        if table is None:
            raise NotKnown("the table of dm-era is not understood")
        meta = table["meta"]
        meta = f"/dev/block/{meta}" if ":" in meta else meta
        written = max(0, era - 1) if carry else era
        self._run(["dmsetup", "message", _target(one), "0", "checkpoint"])
        self._run(["dmsetup", "message", _target(one), "0", "take_metadata_snap"])
        try:
            text = self._run(["era_invalidate", "--metadata-snapshot", "--written-since", str(written), meta])
        finally:
            with contextlib.suppress(LvmFailed):  # an error of the question itself is more worth telling
                self._run(["dmsetup", "message", _target(one), "0", "drop_metadata_snap"])
        return parse_invalidate(text, int(table["sectors"]) * 512, one.size)

    def tidy(self) -> None:
        return None

    def stop(self, *, clean: bool) -> None:
        del clean  # the kernel remembers


def _target(one: Device) -> str:
    return Path(one.path).name
