"""The source audit: whether a source that reports areas as unchanged tells the truth.

Every cycle looks at a few more leaves of the cut that the source did not report and compares them with the leaf table of the
newest point. The cursor of each disk goes round and is kept as `<machine>/u/<disk>.json`, with what is known about coverage
and age; a crash costs at most that a part is looked at twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

from farshore.domain.errors import FarshoreError
from farshore.replication.backend import Backend
from farshore.replication.extents import total
from farshore.replication.journal.entries import safe_name
from farshore.replication.ports import LEAF, DiskState, Extent


@dataclass(frozen=True, slots=True)
class Audited:
    """How far the audit of a disk is. Bytes; unix seconds."""

    disk: str
    life: str
    size: int
    cursor: int  # the next byte to look at
    covered: int  # looked at, or reported as changed and so read anyway, in this round
    round_began: float
    last_round_ended: float = 0.0  # 0: none was finished yet
    rounds: int = 0
    lies: int = 0  # times that change tracking was found to be wrong


class Audit:
    """The cursors of a machine."""

    def __init__(self, backend: Backend, prefix: str, clock: Callable[[], float]) -> None:
        self._backend = backend
        self._prefix = prefix
        self._clock = clock

    def read(self, disk: str) -> Audited | None:
        """None: there was no audit yet, or its note is unreadable."""
        data = self._backend.get(self._name(disk))
        try:
            return Audited(**json.loads(data)) if data is not None else None
        except (ValueError, TypeError):
            return None

    def next(
        self, state: DiskState, life: str, changed: Sequence[Extent], budget: int
    ) -> tuple[Audited, list[Extent]]:
        """What to look at now, at most `budget` bytes beside what changed, and the state after it."""
        now = self._clock()
        known = self.read(state.key)
        if known is None or known.life != life or known.size != state.size:
            known = Audited(state.key, life, state.size, 0, 0, now)
        budget = max(LEAF, budget // LEAF * LEAF)
        window, stop = _unchanged(changed, known.cursor, state.size, budget)
        covered = known.covered + stop - known.cursor
        if stop < state.size:
            return replace(known, cursor=stop, covered=covered), window
        ended = Audited(
            state.key,
            life,
            state.size,
            0,
            0,
            now,
            last_round_ended=now,
            rounds=known.rounds + 1,
            lies=known.lies,
        )
        return ended, window

    def keep(self, audited: Iterable[Audited]) -> None:
        """Note how far it got. A failure costs only that it is done again."""
        try:
            for one in audited:
                self._backend.put(self._name(one.disk), json.dumps(asdict(one)).encode())
        except FarshoreError:
            return

    def _name(self, disk: str) -> str:
        return f"{self._prefix}u/{safe_name(disk)}.json"


def _unchanged(changed: Sequence[Extent], cursor: int, size: int, budget: int) -> tuple[list[Extent], int]:
    """Extents from `cursor` on that are not in `changed` (ordered, disjoint), `budget` bytes of them, and where that ends."""
    found: list[Extent] = []
    at = cursor
    for extent in [*changed, Extent(size, 0)]:
        end = extent.start + extent.length
        if end <= at and extent.start < size:
            continue
        room = budget - total(found)
        gap = min(extent.start - at, room)
        if gap > 0:
            found.append(Extent(at, gap))
            at += gap
        if gap == room:
            return found, at
        at = max(at, end)
    return found, size
