"""Group points for whoever recovers: list, choose, hold, commit to one. Needs no source and no leg."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import PointChoice, choose
from farshore.replication.journal import groups
from farshore.replication.journal.groups import GroupLog, GroupPoint
from farshore.replication.journal.log import View
from farshore.replication.journal.store import JournalStore


class Groups:
    """The groups of a store."""

    def __init__(self, store: JournalStore, *, clock: Callable[[], float] = time.time) -> None:
        """`clock` gives unix seconds."""
        self._store = store
        self._clock = clock

    def points(self, group: str) -> list[GroupPoint]:
        """Those that exist, oldest first. Works when the source site is gone."""
        return groups.points_of(group, self._view(group))

    def newest(self, group: str) -> GroupPoint | None:
        """Whatever its state."""
        points = self.points(group)
        return points[-1] if points else None

    def point(self, group: str, point: str) -> GroupPoint:
        """PointNotFound."""
        for one in self.points(group):
            if one.id == point:
                return one
        raise FarshoreError(
            Code.POINT_NOT_FOUND, f"Group {group} has no recovery point {point!r}.", subject=group
        )

    def unusable(self, group: str) -> dict[str, str]:
        """Points that cannot be restored as a whole, by id, and why. Reads no data."""
        return groups.unusable(self._store, self.points(group))

    def choose(self, group: str, choice: PointChoice | str) -> GroupPoint:
        """The point that `choice` means, as `domain.points.choose` has it: a choice passes over unusable ones, an id of
        one is refused with the reason."""
        points = {point.id: point for point in self.points(group)}
        chosen = choose(
            [point.as_point() for point in points.values()],
            choice,
            machine=group,
            damaged=groups.unusable(self._store, points.values()),
        )
        return points[chosen.id]

    def hold(self, group: str, point: str, holder: str, seconds: float | None = None) -> GroupPoint:
        """Protect a group point and every member's point from retention, as `ReplicaStore.hold`. After an error the holder
        has to `release`, and may choose again."""
        wanted = self.point(group, point)
        self._store.hold(groups.log_name(group), groups.log_id(point), holder, seconds)
        for member in wanted.members:
            self._store.hold(member.machine, member.point, holder, seconds)
        return wanted

    def release(self, group: str, holder: str) -> None:
        """Give back every hold of `holder` on the group and its machines. Idempotent."""
        self._store.release(groups.log_name(group), holder)
        for machine in self._machines(group):
            self._store.release(machine, holder)

    def keep_only(self, group: str, point: str, owner: str) -> list[str]:
        """Commit of a failover of the whole group: fence its legs and give up all other group points that nobody holds.
        Their members' points are for `ReplicaStore.keep_only` of each machine, afterwards. Returns the ids given up."""
        self.point(group, point)
        log = GroupLog.open(self._store, group, owner)
        try:
            others = [one for one in log.points() if one.id != point]
            gone = [one.id for one in log.remove(others, any_of_them=True)]
            left = {one.barrier for one in log.points()}
            for barrier, machines in self._barriers(group).items():
                if barrier not in left:  # also where an earlier call died in between
                    log.give_back(barrier, machines)
            return gone
        finally:
            log.close()

    def disband(self, group: str, owner: str) -> None:
        """There is no such group any more: its points are given up, those of its machines stay with them. Idempotent."""
        name = groups.log_name(group)
        if self._view(group).top == 0:
            return
        log = GroupLog.open(self._store, group, owner)
        try:
            for barrier, machines in self._barriers(group).items():
                log.give_back(barrier, machines)
        finally:
            log.close()
        self._store.remove_machine(name)

    # -- inside --------------------------------------------------------------------------------------------------

    def _view(self, group: str) -> View:
        return self._store.log(groups.log_name(group)).read(self._clock())

    def _machines(self, group: str) -> list[str]:
        """Of all points, also of those that are being removed."""
        return sorted({machine for machines in self._barriers(group).values() for machine in machines})

    def _barriers(self, group: str) -> Mapping[str, list[str]]:
        points = groups.points_of(group, self._view(group), removed=True)
        return {point.barrier: [member.machine for member in point.members] for point in points}
