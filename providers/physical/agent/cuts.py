"""One instant over all disks of this machine.

How a disk without a snapshot device gets one, never trusting a byte that may have changed:

1. A *barrier*: file systems are frozen, all trackers are marked, everything is thawed. Milliseconds, and nothing is
   copied. The freeze waits for every write under way, so from the mark on the tracker knows all that comes.
2. After the thaw the blocks that changed since the consumer's last state are read and kept.
3. The tracker is asked what was written since the mark. Nothing of what was just read: the kept bytes are exactly those
   of the instant, done. Else the next barrier; what was not written in between stays valid, so the rest shrinks quickly.
4. On a disk that is written without a pause the rest never becomes empty (and ext4 writes its super block with every
   thaw). Therefore what was written between two barriers, and blocks that former cuts found hot, may be read *before* the
   thaw, within a bound of bytes and time that the configuration names (zero forbids it); what does not fit is read after
   it. A cut that does not settle within its rounds fails; it never yields doubtful bytes.

Disks with a snapshot device (LVM thin) need one barrier only. What a reader asks beyond the kept blocks is read live and
checked in the same way: bytes that were written since the mark are refused, not returned.

Labels: application: hooks went well, and everything below. File system: every mounted file system of the disks was
frozen, and the thaw was in time. Crash: the rest; writes that were under way at the mark may or may not be in it, and the
next delta visits them again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from farshore.providers.physical.agent import disks, hooks
from farshore.providers.physical.agent.blocks import BLOCK, Blocks
from farshore.providers.physical.agent.config import MIB, Config
from farshore.providers.physical.agent.disks import Device, Mount
from farshore.providers.physical.agent.freeze import FreezeFailed, Freezer, Frozen
from farshore.providers.physical.agent.hashing import HashTracker
from farshore.providers.physical.agent.holding import PIECE, DirectReader, Spool, SpoolFull
from farshore.providers.physical.agent.tracking import ChangeSource, NotKnown

CRASH, FILE_SYSTEM, APPLICATION = "crash-consistent", "file-system-consistent", "app-consistent"
CHECKED = 8 * MIB  # bytes read between two questions to the tracker
CARRY = 60.0  # seconds a write may be under way across a mark without a freeze


class CutFailed(Exception):
    """No instant could be caught. `code`: snapshot-failed, overwritten, not-eligible. The text is for a person."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class SeedNeeded(Exception):
    """More has to be kept than the spool may hold: the consumer has to copy in advance. Bytes by disk key."""

    def __init__(self, needed: Mapping[str, int], bases: Mapping[str, str], room: int) -> None:
        """`bases`: the states that are good enough to copy changes only, "" where all has to be copied."""
        super().__init__(f"{sum(needed.values())} bytes have to be kept, the spool holds {room}")
        self.needed, self.bases, self.room = dict(needed), dict(bases), room


class FrozenReader(Protocol):
    """The bytes of a disk at the instant, from a snapshot device."""

    def read(self, offset: int, length: int) -> memoryview: ...
    def close(self) -> None: ...


class Snapshots(Protocol):
    """Makes snapshot devices of disks; called inside the freeze, for all disks of its kind."""

    def take(self, name: str) -> Mapping[str, FrozenReader]: ...
    def release(self, name: str) -> None: ...


@dataclass(slots=True)
class CutDisk:
    """A disk of a cut."""

    key: str
    device: Device
    tracker: ChangeSource
    reader: DirectReader
    base: str = ""  # the consumer's last state; "": none
    full: str = ""  # why the base is of no use
    mark: str = ""
    before: str = ""  # the mark of the round before
    wanted: Blocks | None = None  # blocks whose bytes have to be kept; None: not known yet
    caught: Blocks | None = None  # read inside the freeze, and checked there
    base_carry: float = CARRY  # seconds of writes before the base that may have been under way at it
    loose: bool = True  # writes may have been under way at the mark
    loose_before: bool = True  # the same of the mark before
    image: FrozenReader | None = None


@dataclass(slots=True)
class Cut:
    """One instant, readable until it is closed."""

    name: str
    want: str
    disks: dict[str, CutDisk]
    spool: Spool
    taken_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    label: str = CRASH
    evidence: dict[str, Any] = field(default_factory=dict[str, Any])
    release: Callable[[], None] = lambda: None
    lock: threading.Condition = field(default_factory=threading.Condition)
    closed: bool = False
    reading: int = 0  # threads inside `read`

    def read(self, key: str, offset: int, length: int) -> bytes:
        """Exactly the bytes of the instant. CutFailed("overwritten") when they are gone; ReadFailed."""
        with self.lock:
            if self.closed:
                raise CutFailed("gone", f"Cut {self.name} was released.")
            self.reading += 1
        try:
            return self._read(self.disks[key], offset, length)
        finally:
            with self.lock:
                self.reading -= 1
                self.lock.notify_all()

    def _read(self, disk: CutDisk, offset: int, length: int) -> bytes:
        first = offset // BLOCK * BLOCK
        stop = min(-(-(offset + length) // BLOCK) * BLOCK, disk.device.size)
        if disk.image is not None:
            return bytes(disk.image.read(first, stop - first)[offset - first : offset - first + length])
        living: list[tuple[int, int]] = []

        def live(at: int, size: int) -> bytes:
            living.append((at, size))
            return bytes(disk.reader.read(at, size))

        data = b"".join(self.spool.pieces(disk.key, first, stop - first, live))
        if living:
            try:
                written = disk.tracker.changed(disk.key, disk.mark)
            except NotKnown as error:
                raise CutFailed("overwritten", f"Change tracking was lost while reading: {error}") from error
            for at, size in living:
                if written.any(at, size):
                    raise CutFailed(
                        "overwritten", f"{size} bytes at {at} of {disk.key} were written since the cut."
                    )
        return data[offset - first : offset - first + length]

    def close(self) -> None:
        with self.lock:
            if self.closed:
                return
            self.closed = True
            # A descriptor that is closed under a reader may be another file's in the next moment.
            self.lock.wait_for(lambda: self.reading == 0)
        try:
            self.release()
        finally:
            for disk in self.disks.values():
                disk.reader.close()
                if disk.image is not None:
                    disk.image.close()
            self.spool.close()


class Cutter:
    """Makes cuts. One at a time; its owner locks."""

    def __init__(self, config: Config, freezer: Freezer, mounts: Callable[[], list[Mount]]) -> None:
        self._config, self._freezer, self._mounts = config, freezer, mounts
        self._hot: dict[str, Blocks] = {}  # by disk: what was overwritten while former cuts read it

    def take(
        self, name: str, want: str, parts: Mapping[str, CutDisk], snapshots: Mapping[str, Snapshots]
    ) -> Cut:
        """CutFailed, SeedNeeded, FreezeFailed; whatever was made is removed then. `snapshots` by tracker kind."""
        cut = Cut(name, want, dict(parts), Spool(self._config.spool, self._config.spool_mib * MIB))
        try:
            begun = time.monotonic()
            for number in range(self._config.rounds):
                if self._round(cut, number, snapshots):
                    cut.evidence["rounds"] = number + 1
                    cut.evidence["seconds"] = round(time.monotonic() - begun, 3)
                    return cut
            raise CutFailed(
                "snapshot-failed",
                f"The disks were written faster than {self._config.rounds} rounds could keep up with"
                f" ({cut.evidence.get('left', '')}).",
            )
        except BaseException:  # also a stop of the service: nothing of a cut may stay
            cut.close()
            raise

    # -- one round -----------------------------------------------------------------------------------------------

    def _round(self, cut: Cut, number: int, snapshots: Mapping[str, Snapshots]) -> bool:
        """A barrier and what follows it; True when everything kept is of this barrier's instant."""
        copying = [disk for disk in cut.disks.values() if disk.tracker.kind not in snapshots]
        # Applications are held up for the barrier that counts, not while the bulk is copied.
        needed = cut.want == APPLICATION and bool(self._config.hooks)
        quiesce = needed and (number > 0 or not copying)
        begun, told = hooks.before(self._config.hooks if quiesce else (), cut.name)
        mounts = self._mounts()
        marked = 0.0
        try:
            start = time.monotonic()
            with self._freezer.frozen(mounts, self._config.freeze_limit) as frozen:
                self._mark(cut, snapshots)
                marked = time.monotonic() - start
                copied = self._copy_frozen(cut, copying)
                bypassed = [disk.key for disk in copying if self._bypassed(cut, disk)]
        except FreezeFailed as error:
            raise CutFailed("snapshot-failed", f"No barrier: {error}.") from error
        finally:
            told += hooks.after(begun, cut.name)
        # Thawed before the marks were set, maybe: what is kept is carried to the next barrier as after any round.
        void = frozen.late and marked >= self._config.freeze_limit * 0.9
        for disk in cut.disks.values():
            covered = any(
                mount.path in frozen.frozen for mount in mounts if disk.device.number in mount.disks
            )
            spared = any(
                mount.path in frozen.unfreezable for mount in mounts if disk.device.number in mount.disks
            )
            disk.loose = frozen.late or spared or not covered or disk.key in bypassed
        left = sum(self._fill(cut, disk) for disk in copying)
        cut.evidence.update({"copied_in_freeze": copied, "wrote_despite_freeze": bypassed})
        self._label(cut, mounts, frozen, told)
        cut.evidence["left"] = (
            "the freeze did not last until the mark" if void else f"{left} bytes in the last round"
        )
        for disk in cut.disks.values():
            disk.tracker.tidy()
        return left == 0 and quiesce == needed and not void

    def _mark(self, cut: Cut, snapshots: Mapping[str, Snapshots]) -> None:
        """Inside the freeze: the instant."""
        marks: dict[str, str] = {}
        for tracker in {id(disk.tracker): disk.tracker for disk in cut.disks.values()}.values():
            marks.update(tracker.mark())
        cut.taken_at = datetime.now(UTC)
        for disk in cut.disks.values():
            disk.before, disk.mark = disk.mark, marks[disk.key]
            disk.loose_before = disk.loose
        for kind, maker in snapshots.items():
            mine = [disk for disk in cut.disks.values() if disk.tracker.kind == kind]
            if mine:
                cut.release = lambda maker=maker: maker.release(cut.name)
                for key, image in maker.take(cut.name).items():
                    cut.disks[key].image = image

    def _copy_frozen(self, cut: Cut, copying: list[CutDisk]) -> int:
        """Inside the freeze: the rest, in the first round what is known to be hot; within the bound. Returns bytes."""
        bytes_left = int(self._config.freeze_copy_mib * MIB)
        deadline = time.monotonic() + self._config.freeze_copy_seconds
        copied = 0
        for disk in copying:
            if bytes_left <= 0 or isinstance(disk.tracker, HashTracker):
                continue
            try:
                if disk.before:
                    rest = self._since_before(disk)
                else:
                    rest = self._hot.get(disk.key) or Blocks(disk.device.size)
            except NotKnown:
                continue  # a new life: `_fill` begins from nothing
            if rest.size != disk.device.size:
                continue
            disk.caught = Blocks(disk.device.size)
            cut.spool.drop(disk.key, rest)
            for offset, length in rest.runs(PIECE):
                if length > min(bytes_left, cut.spool.room()) or time.monotonic() >= deadline:
                    break
                cut.spool.put(disk.key, offset, disk.reader.read(offset, length))
                disk.caught.add(offset, length)
                bytes_left -= length
                copied += length
        return copied

    def _since_before(self, disk: CutDisk) -> Blocks:
        """Blocks whose kept bytes are not of the newest instant: written since the mark before, or under way at it."""
        carry = CARRY if disk.loose_before else 0.0
        return disk.tracker.changed(disk.key, disk.before, disk.mark, carry=carry)

    def _bypassed(self, cut: Cut, disk: CutDisk) -> bool:
        """Inside the freeze, last: whether something wrote although all was frozen (raw writers, late discards)."""
        try:
            written = disk.tracker.changed(disk.key, disk.mark)
        except NotKnown:
            written = Blocks.all(disk.device.size)
        if disk.caught is not None:
            cut.spool.drop(disk.key, written)
            disk.caught = disk.caught.minus(written)
        return bool(written) or disks.writes(disk.device)[-1] != 0

    # -- after the thaw ------------------------------------------------------------------------------------------

    def _fill(self, cut: Cut, disk: CutDisk) -> int:
        """Keep what is missing and look whether it was written meanwhile; returns the bytes that were."""
        tracker = disk.tracker
        if isinstance(tracker, HashTracker):
            tracker.learn(disk.key, disk.mark, disk.reader.read)
            return tracker.changed(disk.key, disk.mark).bytes()
        try:
            if disk.wanted is None or not disk.before:
                disk.wanted = self._wanted(disk)
            else:
                stale = self._since_before(disk)
                disk.wanted.update(stale)
                cut.spool.drop(disk.key, stale.minus(disk.caught) if disk.caught else stale)
        except NotKnown as error:
            disk.full = error.reason
            disk.wanted = Blocks.all(disk.device.size)
            cut.spool.drop(disk.key, disk.wanted)
        disk.caught = None
        missing = disk.wanted.minus(cut.spool.held(disk.key, disk.device.size))
        try:
            if missing.bytes() > cut.spool.room():
                raise SpoolFull
            return self._keep(cut, disk, missing)
        except SpoolFull:
            alone = [d for d in cut.disks.values() if d.image is None]
            needed = {d.key: self._need(d) for d in alone}
            bases = {d.key: "" if d.full else d.base for d in alone}
            raise SeedNeeded(needed, bases, self._config.spool_mib * MIB) from None

    def _keep(self, cut: Cut, disk: CutDisk, missing: Blocks) -> int:
        """Read and keep; checked every few MiB, so that a write that comes later finds its block safe already."""
        over, pending, size = 0, Blocks(disk.device.size), 0
        for offset, length in missing.runs(PIECE):
            cut.spool.put(disk.key, offset, disk.reader.read(offset, length))
            pending.add(offset, length)
            size += length
            if size >= CHECKED:
                over += self._overwritten(cut, disk, pending)
                pending, size = Blocks(disk.device.size), 0
        return over + (self._overwritten(cut, disk, pending) if size else 0)

    def _overwritten(self, cut: Cut, disk: CutDisk, read: Blocks) -> int:
        """Bytes of `read` that were written since the mark, maybe before they were read: they are forgotten."""
        try:
            gone = disk.tracker.changed(disk.key, disk.mark).both(read)
        except NotKnown:
            gone = read
        cut.spool.drop(disk.key, gone)
        if gone:
            former = self._hot.get(disk.key)
            self._hot[disk.key] = hot = gone.copy()
            if former is not None and former.size == hot.size:
                hot.update(former)
                if hot.bytes() > self._config.freeze_copy_mib * MIB:
                    self._hot[disk.key] = gone
        return gone.bytes()

    def _need(self, disk: CutDisk) -> int:
        if disk.wanted is None:
            disk.wanted = self._wanted(disk)
        return disk.wanted.bytes()

    def _wanted(self, disk: CutDisk) -> Blocks:
        if disk.full:
            return Blocks.all(disk.device.size)
        if not disk.base:
            disk.full = "there is no earlier state"
            return Blocks.all(disk.device.size)
        try:
            return disk.tracker.changed(disk.key, disk.base, disk.mark, carry=disk.base_carry)
        except NotKnown as error:
            disk.full = error.reason
            return Blocks.all(disk.device.size)

    # -- what was achieved ---------------------------------------------------------------------------------------

    def _label(self, cut: Cut, mounts: list[Mount], frozen: Frozen, told: list[hooks.HookResult]) -> None:
        """Only what was achieved, and never more than was asked for. The evidence says why it is not more."""
        why = ["the thaw was late: the watchdog thawed"] if frozen.late else []
        why += [f"{path} cannot be frozen" for path in frozen.unfreezable]
        for disk in cut.disks.values():
            mounted = any(disk.device.number in mount.disks for mount in mounts)
            if not mounted and (disk.wanted is None or disk.wanted):
                why.append(f"{disk.key} is not mounted, and what writes to it is not known")
        failed = [f"{one.name} {one.phase}: {one.error}" for one in told if one.error]
        if cut.want == APPLICATION and not told:
            failed = ["no hook was run"]
        cut.label = CRASH
        if not why and cut.want != CRASH:
            cut.label = APPLICATION if cut.want == APPLICATION and not failed else FILE_SYSTEM
        reasons = why + (failed if cut.want == APPLICATION else [])
        cut.evidence.update(
            {
                "frozen": frozen.frozen,
                "freeze_seconds": round(frozen.seconds, 4),
                "hooks": [[one.name, one.phase, one.error or "done"] for one in told],
                "less_because": reasons,
            }
        )
