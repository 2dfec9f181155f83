r"""The agent on Windows: shadow copies (VSS) by diskshadow, hashes for changes. NEVER EXECUTED ON WINDOWS.

Windows has no change tracking without a filter driver of one's own, so a cut is: one shadow copy of all volumes of the
machine at one instant (writers take part for an application-consistent point), hashes of every block read from the
shadow devices, differences between two tables of hashes. Same core as on Linux: `HashTracker` finds the changes,
`Snapshots` is the port that shadow copies fill; freezing is the provider's own business, so there is no watchdog here.

A disk's bytes are put together: ranges that a volume covers come from its shadow, the rest (partition table, gaps, boot
partitions without a volume) from the disk itself, which must not change meanwhile: partition tables do not.

Not there yet: the entry point (core and freeze use Linux calls), the raw device reader and the map of volumes on disks,
each a port here (`open_device`, `places`).

Sources: Microsoft's pages on diskshadow and vssadmin; what they do not document is marked. Tested on Linux are the
scripts, the parsing of documented outputs, the layout, and the states; the label says so wherever it is shown.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


class ShadowFailed(Exception):
    """No shadow copy. `reason` of `Reason`; the text is for a person."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class Reason:
    """What went wrong, as far as the machine's answer tells."""

    WRITER = "writer-failed"  # a VSS writer vetoed or is in a failed state: without writers it may work
    STORAGE = "storage-full"
    LIMIT = "too-many-shadows"
    BUSY = "in-progress"  # another shadow copy is being made: later it may work
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class VolumePlace:
    """Where a volume's bytes lie on a disk. Bytes."""

    volume: str  # \\?\Volume{…}\ or a drive, as diskshadow takes it
    disk: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Shadow:
    """A shadow copy of one volume."""

    id: str  # {guid}
    set_id: str
    volume: str
    device: str  # \\?\GLOBALROOT\Device\HarddiskVolumeShadowCopyN


_VOLUME = re.compile(r"^(?:[A-Za-z]:|\\\\\?\\Volume\{[0-9A-Fa-f-]{36}\}\\)$")
_GUID = re.compile(r"^\{[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}\}$")


def create_script(volumes: Sequence[str], *, writers: bool, metadata: str) -> str:
    """A diskshadow script: one persistent shadow copy of all volumes. ValueError for what is no volume.

    Persistent, since the shadow has to outlive diskshadow. Without writers the context forbids BEGIN BACKUP (documented
    for NOWRITERS: the writers' part is skipped).
    """
    if not volumes:
        raise ValueError("no volume")
    for volume in volumes:
        if not _VOLUME.match(volume):
            raise ValueError(f"{volume!r} is no volume")
    lines = [
        f"SET CONTEXT PERSISTENT{'' if writers else ' NOWRITERS'}",
        f'SET METADATA "{metadata}"',
        "SET VERBOSE ON",
    ]
    if writers:
        lines.append("BEGIN BACKUP")
    lines += [f"ADD VOLUME {volume} ALIAS farshore{index}" for index, volume in enumerate(volumes)]
    lines.append("CREATE")
    if writers:
        lines.append("END BACKUP")
    lines.append("EXIT")
    return "\r\n".join(lines) + "\r\n"


def delete_script(ids: Sequence[str]) -> str:
    """A diskshadow script that deletes shadow copies by id. ValueError for what is no id."""
    for one in ids:
        if not _GUID.match(one):
            raise ValueError(f"{one!r} is no id of a shadow copy")
    return "\r\n".join([*(f"DELETE SHADOWS ID {one}" for one in ids), "EXIT"]) + "\r\n"


_SET = re.compile(r"Contents of shadow copy set ID: (\{[0-9a-fA-F-]{36}\})")
_SHADOW = re.compile(r"Shadow Copy ID: (\{[0-9a-fA-F-]{36}\})")
_ORIGINAL = re.compile(r"Original Volume: \((?P<drive>[^)]*)\)(?P<guid>\\\\\?\\Volume\{[0-9a-fA-F-]{36}\}\\)")
_DEVICE = re.compile(r"Shadow Copy Volume: (\\\\\?\\GLOBALROOT\\Device\\HarddiskVolumeShadowCopy\d+)")


def parse_list(text: str) -> list[Shadow]:
    """Shadow copies out of `vssadmin list shadows` (English, the documented layout).

    ShadowFailed when lines of a shadow are missing: half an answer is worse than none.
    """
    found: list[Shadow] = []
    current_set = current_id = volume = ""
    for line in text.splitlines():
        if match := _SET.search(line):
            current_set = match[1]
        elif match := _SHADOW.search(line):
            if current_id:
                raise ShadowFailed(Reason.OTHER, f"the answer of vssadmin lacks the device of {current_id}")
            current_id, volume = match[1], ""
        elif match := _ORIGINAL.search(line):
            volume = match["guid"]
        elif match := _DEVICE.search(line):
            if not (current_id and volume):
                raise ShadowFailed(
                    Reason.OTHER, f"the answer of vssadmin names {match[1]} without id or volume"
                )
            found.append(Shadow(current_id, current_set, volume, match[1]))
            current_id = volume = ""
    if current_id:
        raise ShadowFailed(Reason.OTHER, f"the answer of vssadmin lacks the device of {current_id}")
    return found


_ALIAS = re.compile(r"Alias (\S+) for shadow ID (\{[0-9a-fA-F-]{36}\}) set as environment variable")


def parse_created(text: str) -> dict[str, str]:
    """Shadow ids by alias out of diskshadow's answer to CREATE."""
    return dict(_ALIAS.findall(text))


@dataclass(frozen=True, slots=True)
class Writer:
    """A VSS writer. `state` 1 is stable."""

    name: str
    state: int
    error: str


_WRITER = re.compile(r"Writer name: '([^']*)'")
_STATE = re.compile(r"State: \[(\d+)\]")
_ERROR = re.compile(r"Last error: (.+)")


def parse_writers(text: str) -> list[Writer]:
    """Writers out of `vssadmin list writers`."""
    found: list[Writer] = []
    name, state = "", -1
    for line in text.splitlines():
        if match := _WRITER.search(line):
            name, state = match[1], -1
        elif match := _STATE.search(line):
            state = int(match[1])
        elif (match := _ERROR.search(line)) and name:
            found.append(Writer(name, state, "" if match[1].strip() == "No error" else match[1].strip()))
            name = ""
    return found


def reason_of(output: str) -> str:
    """A reason out of the text of a failed command. Texts are those that the documentation and support pages show."""
    upper = output.upper()
    for reason, signs in (
        (Reason.WRITER, ("VSS_E_WRITER", "WRITERERROR", "WRITER")),
        (Reason.STORAGE, ("VSS_E_INSUFFICIENT_STORAGE", "INSUFFICIENT STORAGE", "0X8004231F")),
        (Reason.LIMIT, ("VSS_E_MAXIMUM_NUMBER_OF_SNAPSHOTS", "0X80042317", "MAXIMUM NUMBER OF")),
        (Reason.BUSY, ("VSS_E_SNAPSHOT_SET_IN_PROGRESS", "0X80042316", "ALREADY IN PROGRESS")),
    ):
        if any(sign in upper for sign in signs):
            return reason
    return Reason.OTHER


class Shell(Protocol):
    """Runs commands on the machine; gives exit code and output."""

    def __call__(self, command: Sequence[str]) -> tuple[int, str]: ...


def local_shell(command: Sequence[str]) -> tuple[int, str]:
    """On this machine. Output in the console's code page is not decoded strictly: only ASCII parts are looked at."""
    done = subprocess.run(command, capture_output=True, check=False, timeout=600)
    return done.returncode, (done.stdout + done.stderr).decode("ascii", errors="replace")


@dataclass(slots=True)
class ShadowSet:
    """One instant of all volumes. `with_writers`: applications took part, all of them."""

    shadows: dict[str, Shadow]  # by volume
    with_writers: bool
    less_because: list[str] = field(default_factory=list[str])


class ShadowCopies:
    """Makes and removes shadow copies. Every step is read back: what diskshadow said is not believed alone."""

    def __init__(self, work: Path, shell: Shell = local_shell) -> None:
        self._work, self._shell = work, shell

    def create(self, volumes: Sequence[str], *, application: bool) -> ShadowSet:
        """One shadow copy set. A writer that fails costs the writers, once tried again, not the point. ShadowFailed."""
        less: list[str] = []
        if application:
            for _ in range(2):
                try:
                    made = self._create(volumes, writers=True)
                except ShadowFailed as error:
                    if error.reason != Reason.WRITER:
                        raise
                    less = [str(error)]
                    continue
                failed = self._failed_writers()
                if not failed:
                    return ShadowSet(made, with_writers=True)
                less = [
                    f"writer {writer.name}: {writer.error or f'state {writer.state}'}" for writer in failed
                ]
                self.delete([shadow.id for shadow in made.values()])
        return ShadowSet(self._create(volumes, writers=False), with_writers=False, less_because=less)

    def _create(self, volumes: Sequence[str], *, writers: bool) -> dict[str, Shadow]:
        before = {shadow.id for shadow in self.list()}
        metadata = self._work / f"{uuid.uuid4().hex}.cab"
        try:
            output = self._script(create_script(volumes, writers=writers, metadata=str(metadata)))
        except ShadowFailed:
            # A failed CREATE may leave a part of the set behind.
            self.delete([shadow.id for shadow in self.list() if shadow.id not in before])
            raise
        finally:
            metadata.unlink(missing_ok=True)
        ids = parse_created(output)
        here = {shadow.id.lower(): shadow for shadow in self.list()}
        made: dict[str, Shadow] = {}
        for index, volume in enumerate(volumes):
            one = here.get(ids.get(f"farshore{index}", "").lower())
            if one is not None:
                made[volume] = one
        if len(made) != len(volumes) or len({shadow.set_id for shadow in made.values()}) != 1:
            self.delete(
                [
                    one.id
                    for key, one in here.items()
                    if one.id not in before and key in map(str.lower, ids.values())
                ]
            )
            raise ShadowFailed(Reason.OTHER, "the shadow copies are not one set of all volumes")
        return made

    def list(self) -> list[Shadow]:
        """All shadow copies of the machine. ShadowFailed."""
        code, output = self._shell(["vssadmin", "list", "shadows"])
        # An empty list ends with an error code and this sentence.
        if code and "No items found" not in output:
            raise ShadowFailed(reason_of(output), f"vssadmin list shadows: {output.strip()[-300:]}")
        return parse_list(output)

    def still_there(self, made: ShadowSet) -> bool:
        """Whether what is read is still the instant: shadows are deleted when their storage runs full, or by people.

        To be asked *after* a read, before its bytes are used.
        """
        here = {(shadow.id.lower(), shadow.device) for shadow in self.list()}
        return all((shadow.id.lower(), shadow.device) in here for shadow in made.shadows.values())

    def delete(self, ids: Sequence[str]) -> None:
        """Idempotent: what is gone is not asked for. ShadowFailed when one stays."""
        here = {shadow.id.lower() for shadow in self.list()}
        mine = [one for one in ids if one.lower() in here]
        if not mine:
            return
        self._script(delete_script(mine))
        left = {shadow.id.lower() for shadow in self.list()} & {one.lower() for one in mine}
        if left:
            raise ShadowFailed(Reason.OTHER, f"{len(left)} shadow copies could not be deleted")

    def _failed_writers(self) -> list[Writer]:
        code, output = self._shell(["vssadmin", "list", "writers"])
        if code:
            raise ShadowFailed(reason_of(output), f"vssadmin list writers: {output.strip()[-300:]}")
        return [writer for writer in parse_writers(output) if writer.error or writer.state != 1]

    def _script(self, text: str) -> str:
        with tempfile.NamedTemporaryFile("wb", dir=self._work, suffix=".dsh", delete=False) as file:
            file.write(text.encode("ascii"))
        path = Path(file.name)
        try:
            code, output = self._shell(["diskshadow", "/s", str(path)])
        finally:
            path.unlink(missing_ok=True)
        if code:
            raise ShadowFailed(reason_of(output), f"diskshadow ended with {code}: {output.strip()[-300:]}")
        return output
