"""Changed block tracking of one disk: maps of an epoch, one per interval between stuns.

Map `k` collects the writes between change id `k - 1` and change id `k`. A stun seals the current map, whose number then
is the disk's change id at that instant, and opens the next one. What changed from id `m` to a snapshot with id `n` is the
union of maps `m + 1`…`n`. Bits are set before the bytes are written, so a killed process can over-report, never
under-report. (Behaviour: reference/vsphere.md A.3, A.4, B.4.)
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from farshore.lab.vcenter.bitmap import Bitmap, read_int

FIRST = 1
_CACHED = 64


class StaleChangeIdError(Exception):
    """The change id is of another epoch, malformed, or newer than the point asked for."""


def format_change_id(epoch: str, number: int) -> str:
    """`52 f3 b6 37 30 8d ea 3e-58 70 c0 fd 61 44 26 62/2`: the form ESXi gives."""
    pairs = [epoch[i : i + 2] for i in range(0, 32, 2)]
    return f"{' '.join(pairs[:8])}-{' '.join(pairs[8:])}/{number}"


class ChangeTracking:
    """The running epoch of one disk. Callers hold the machine's I/O lock for everything but `changed`."""

    def __init__(self, directory: Path, bits: int, epoch: str | None = None, number: int = FIRST) -> None:
        self._directory = directory
        self._bits = bits
        self.epoch = epoch or secrets.token_hex(16)
        self.number = number
        self.blind = False
        """Defect mode: writes are not recorded while this is set."""
        self._current: Bitmap | None = None
        self._sealed: dict[int, int] = {}
        if epoch is None:
            self._current = Bitmap(self._path(number), bits, fresh=True)

    def to_json(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "number": self.number}

    @property
    def change_id(self) -> str:
        """The id of the interval that is being collected."""
        return format_change_id(self.epoch, self.number)

    def record(self, first: int, last: int) -> None:
        """Note a write to blocks `first`…`last` before it is made."""
        if not self.blind:
            self._map().set_range(first, last)

    def merge(self, value: int) -> None:
        """Note many blocks at once (revert, back-fill)."""
        self._map().merge(value)

    def seal(self) -> str:
        """End the interval (a stun); return its id. The caller persists `number` afterwards."""
        sealed = self.change_id
        current = self._map()
        self._remember(self.number, current.to_int())
        following = Bitmap(self._path(self.number + 1), self._bits, fresh=True)
        current.close()
        self.number += 1
        self._current = following
        return sealed

    def resize(self, bits: int) -> None:
        """The disk grew."""
        current = self._map()
        current.close()
        self._bits = bits
        self._current = Bitmap(self._path(self.number), bits)

    def changed(self, since: str, until: int) -> int:
        """Blocks written after id `since` up to id number `until`, as bits. Raises `StaleChangeIdError`."""
        start = self.parse(since)
        if start > until:
            raise StaleChangeIdError(since)
        value = 0
        for number in range(start + 1, until + 1):
            if number == self.number:
                value |= self._map().to_int()
            else:
                value |= self._load(number)
        return value

    def parse(self, change_id: str) -> int:
        """The number of an id of this epoch. Raises `StaleChangeIdError`."""
        prefix, _, digits = change_id.rpartition("/")
        if (
            not digits.isdecimal()
            or format_change_id(self.epoch, 0) != f"{prefix}/0"
            or int(digits) > self.number
        ):
            raise StaleChangeIdError(change_id)
        return int(digits)

    def close(self) -> None:
        if self._current is not None:
            self._current.close()
            self._current = None

    def remove(self) -> None:
        """Forget the epoch and delete its maps."""
        self.close()
        for path in self._directory.glob(f"{self.epoch[:12]}-*.cbt"):
            path.unlink(missing_ok=True)

    def _map(self) -> Bitmap:
        if self._current is None:
            self._current = Bitmap(self._path(self.number), self._bits)
        return self._current

    def _load(self, number: int) -> int:
        value = self._sealed.get(number)
        if value is None:
            path = self._path(number)
            if not path.exists():  # a lost map must not read as "nothing changed"
                raise StaleChangeIdError(f"map {number} is gone")
            value = read_int(path)
            self._remember(number, value)
        return value

    def _remember(self, number: int, value: int) -> None:
        while len(self._sealed) >= _CACHED:
            self._sealed.pop(next(iter(self._sealed)), None)
        self._sealed[number] = value

    def _path(self, number: int) -> Path:
        return self._directory / f"{self.epoch[:12]}-{number:08d}.cbt"
