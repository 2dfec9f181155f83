"""Disks and changes out of shadow copies: the Windows half of the agent's ports. NEVER EXECUTED ON WINDOWS (see `windows`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from farshore.providers.physical.agent.blocks import Blocks
from farshore.providers.physical.agent.disks import Device
from farshore.providers.physical.agent.hashing import HashTracker
from farshore.providers.physical.agent.tracking import NotKnown
from farshore.providers.physical.agent.windows import (
    Reason,
    ShadowCopies,
    ShadowFailed,
    ShadowSet,
    VolumePlace,
)


class RawReader(Protocol):
    """Bytes of a device (a disk or a shadow copy)."""

    def read(self, offset: int, length: int) -> bytes | memoryview: ...
    def close(self) -> None: ...


class ShadowedDisk:
    """A disk at the instant of a shadow copy set. Fills `cuts.FrozenReader`."""

    def __init__(
        self, disk: RawReader, places: Sequence[VolumePlace], shadows: Mapping[str, RawReader]
    ) -> None:
        """ValueError when places overlap or a volume has no shadow."""
        self._disk, self._shadows = disk, dict(shadows)
        self._places = sorted(places, key=lambda place: place.offset)
        end = 0
        for place in self._places:
            if place.offset < end:
                raise ValueError(f"{place.volume} overlaps another volume")
            if place.volume not in self._shadows:
                raise ValueError(f"{place.volume} has no shadow copy")
            end = place.offset + place.length

    def read(self, offset: int, length: int) -> memoryview:
        data = bytearray()
        at, end = offset, offset + length
        for place in self._places:
            stop = place.offset + place.length
            if stop <= at or place.offset >= end:
                continue
            if at < place.offset:
                data += self._disk.read(at, place.offset - at)
                at = place.offset
            size = min(end, stop) - at
            data += self._shadows[place.volume].read(at - place.offset, size)
            at += size
        if at < end:
            data += self._disk.read(at, end - at)
        if len(data) != length:
            raise ShadowFailed(Reason.OTHER, f"{len(data)} bytes came where {length} were asked for")
        return memoryview(data)

    def close(self) -> None:
        self._disk.close()
        for shadow in self._shadows.values():
            shadow.close()


class VssTracker:
    """Fills `tracking.ChangeSource` and `cuts.Snapshots` with shadow copies and hashes.

    A mark is a shadow copy set; the hashes of its blocks are computed from the shadow, after the instant, when changes are
    first asked for. What is read counts only if the shadows are still there afterwards.
    """

    kind = "vss"

    def __init__(
        self,
        copies: ShadowCopies,
        hashes: HashTracker,
        places: Callable[[str], Sequence[VolumePlace]],
        open_device: Callable[[str], RawReader],
        *,
        application: bool,
    ) -> None:
        """`places`: where volumes lie on the disk of a key. `open_device`: a disk's path or a shadow's device."""
        self._copies, self._hashes, self._places, self._open = copies, hashes, places, open_device
        self._application = application
        self._devices: dict[str, Device] = {}
        self._ids: dict[str, str] = {}
        self._learned: set[str] = set()
        self._images: dict[str, ShadowedDisk] = {}
        self._set: ShadowSet | None = None

    @property
    def made(self) -> ShadowSet | None:
        """The current set: whether writers took part, and why not."""
        return self._set

    def watch(self, devices: Mapping[str, Device]) -> None:
        self._devices = dict(devices)
        self._hashes.watch(devices)

    def mark(self) -> dict[str, str]:
        """Names the instant that `take` makes."""
        self._ids = self._hashes.mark()
        return dict(self._ids)

    def take(self, name: str) -> Mapping[str, CheckedDisk]:
        """One shadow copy set over all volumes of all disks. ShadowFailed."""
        self.release(name)
        places = {key: list(self._places(key)) for key in self._devices}
        volumes = sorted({place.volume for found in places.values() for place in found})
        self._set = self._copies.create(volumes, application=self._application)
        self._images = {
            key: ShadowedDisk(
                self._open(one.path),
                places[key],
                {place.volume: self._open(self._set.shadows[place.volume].device) for place in places[key]},
            )
            for key, one in self._devices.items()
        }
        return {key: CheckedDisk(image, self) for key, image in self._images.items()}

    def check(self) -> None:
        """ShadowFailed when the instant is gone."""
        if self._set is None or not self._copies.still_there(self._set):
            raise ShadowFailed(
                Reason.OTHER, "a shadow copy was deleted while it was read; nothing read is used"
            )

    def changed(self, key: str, since: str, until: str = "", *, carry: float = 0.0) -> Blocks:
        """Between two instants by their hashes. NotKnown."""
        del carry
        if not until:
            raise NotKnown("shadow copies tell changes between two of them only")
        if until == self._ids.get(key) and until not in self._learned:
            self._hashes.learn(key, until, self._images[key].read)
            self.check()
            self._learned.add(until)
        return self._hashes.changed(key, since, until)

    def release(self, name: str) -> None:
        """Delete the current set: the hashes are the memory. Idempotent."""
        del name
        for image in self._images.values():
            image.close()
        self._images = {}
        if self._set is not None:
            self._copies.delete([shadow.id for shadow in self._set.shadows.values()])
            self._set = None

    def tidy(self) -> None:
        return None

    def stop(self, *, clean: bool) -> None:
        self._hashes.stop(clean=clean)


class CheckedDisk:
    """A disk's image whose every read is followed by a look whether the shadows still exist."""

    def __init__(self, image: ShadowedDisk, owner: VssTracker) -> None:
        self._image, self._owner = image, owner

    def read(self, offset: int, length: int) -> memoryview:
        data = self._image.read(offset, length)
        self._owner.check()
        return data

    def close(self) -> None:
        self._image.close()
