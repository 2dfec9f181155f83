"""Points of a group: the same instant of several machines, all of them or none.

A group has a log of its own, as a machine has: `group%3A<name>/`, which no machine can be called. Its entries are
manifests without disks, numbered, hash-chained and created if absent by one owner under an epoch (`log`); the members are
in the tag `group`, as JSON:

    {"format":1,"barrier":…,"held_from":…,"held_until":…,
     "size_bytes":…,"members":[{"machine":…,"point":…,"digest":…,"consistency":…},…]}

**A group point exists if and only if** its entry exists in that log. It is created last: after the commit of every member,
so a death in between leaves points of the members (ordinary ones, tagged with the barrier's id), and no group point.

**Its members' points stay with it.** Right after its commit, before its own retention runs, every member's point is held
for the group (`<machine>/h/…`, as any hold): no retention, of whichever leg, and no commit of a failover of one machine
removes it. The order of removal is the reverse one: first the group point is gone, durably, as a whole; then the holds are
given back; then each machine's own retention decides about points that are nobody's part any more. Holds of a barrier that
never became a group point, because somebody died, are given back by the next owner. Such a hold is no reader's: its age is
that of nobody, so it keeps no more of the journal than an unheld point would.

**It is usable if all of its members are**: one that is known to be damaged, or that was removed by force (the replica of a
machine was deleted), makes the group point unusable, and it says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency, RecoveryPoint
from farshore.domain.retention import RetentionPolicy, gently, prune
from farshore.replication.barrier import CommonCut
from farshore.replication.journal.cycle import CycleResult
from farshore.replication.journal.entries import Manifest, point_id, safe_name
from farshore.replication.journal.log import View, holder_hash
from farshore.replication.journal.writer import Writer
from farshore.replication.ports import ReplicaStore

FORMAT = 1
TAG = "group"  # of a group's entries, and of its members' points: the group's name
BARRIER = "barrier"  # tag of members' points
_NOBODY = 1e12  # unix seconds: a hold of this age is no reader's


@dataclass(frozen=True, slots=True)
class MemberPoint:
    """A machine's part of a group point."""

    machine: str
    point: str  # id
    digest: str  # of its manifest
    consistency: Consistency  # that this machine achieved


@dataclass(frozen=True, slots=True)
class GroupPoint:
    """One instant of all members. Times are aware UTC."""

    id: str  # g-<number>-<first 8 hex of the digest>
    group: str
    number: int
    epoch: int  # of the group's owner
    barrier: str
    held_from: datetime  # from here on no member wrote: the instant that the members' points are dated to
    held_until: datetime  # until here at least
    committed_at: datetime
    consistency: Consistency  # the weakest of its members'
    members: tuple[MemberPoint, ...]
    digest: str
    size_bytes: int
    pinned: bool = False  # somebody holds it
    final: bool = False  # all members were off

    @property
    def taken_at(self) -> datetime:
        return self.held_from

    def member(self, machine: str) -> MemberPoint | None:
        return next((member for member in self.members if member.machine == machine), None)

    def as_point(self) -> RecoveryPoint:
        """For the rules that choose and prune."""
        return RecoveryPoint(
            self.id,
            self.group,
            self.number,
            self.taken_at,
            self.consistency,
            self.digest,
            self.size_bytes,
            self.pinned,
            self.final,
        )


def log_name(group: str) -> str:
    """The name under which the store keeps a group's log. Machines' names have no colon."""
    return f"group:{group}"


def keeper(group: str, barrier: str) -> str:
    """Who holds the members' points of a barrier."""
    return f"{safe_name(log_name(group))} {barrier}"


def group_id(number: int, digest: str) -> str:
    """`g-<number>-<first 8 hex of the digest>`."""
    return "g" + point_id(number, digest)[1:]


def log_id(point: str) -> str:
    """The id of a group point in its log. PointNotFound when it is none."""
    if not point.startswith("g-"):
        raise FarshoreError(Code.POINT_NOT_FOUND, f"{point!r} is not the id of a group point.")
    return "p" + point[1:]


def points_of(group: str, view: View, *, removed: bool = False) -> list[GroupPoint]:
    """Those that exist, oldest first; with `removed` also those of which the log still knows."""
    return [
        _parse(group, manifest, digest, pinned=bool(view.held.get(manifest.cycle)))
        for manifest, digest in (view.manifests.values() if removed else view.points)
    ]


def _parse(group: str, manifest: Manifest, digest: str, *, pinned: bool) -> GroupPoint:
    try:
        raw = cast("dict[str, Any]", json.loads(manifest.tags[TAG]))
        if raw["format"] != FORMAT:
            raise ValueError(f"format {raw['format']}")
        members = tuple(
            MemberPoint(
                str(m["machine"]), str(m["point"]), str(m["digest"]), Consistency(str(m["consistency"]))
            )
            for m in cast("Sequence[Mapping[str, Any]]", raw["members"])
        )
        return GroupPoint(
            id=group_id(manifest.cycle, digest),
            group=group,
            number=manifest.cycle,
            epoch=manifest.epoch,
            barrier=str(raw["barrier"]),
            held_from=datetime.fromisoformat(str(raw["held_from"])),
            held_until=datetime.fromisoformat(str(raw["held_until"])),
            committed_at=manifest.committed_at,
            consistency=manifest.consistency,
            members=members,
            digest=digest,
            size_bytes=int(raw["size_bytes"]),
            pinned=pinned,
            final=manifest.final,
        )
    except (KeyError, ValueError, TypeError) as error:
        raise FarshoreError(
            Code.REPLICA_DAMAGED,
            f"Point {manifest.cycle} of group {group} was written in a form that this version cannot read: {error}.",
            subject=group,
        ) from error


def unusable(store: ReplicaStore, points: Iterable[GroupPoint]) -> dict[str, str]:
    """Group points that cannot be restored as a whole, by id, and why."""
    known: dict[str, dict[str, RecoveryPoint]] = {}
    hurt: dict[str, dict[str, str]] = {}
    found: dict[str, str] = {}
    for point in points:
        reasons: list[str] = []
        for member in point.members:
            machine = member.machine
            if machine not in known:
                known[machine] = {one.id: one for one in store.points(machine)}
                hurt[machine] = store.known_damage(machine)
            mine = known[machine].get(member.point)
            if mine is None or mine.digest != member.digest:
                reasons.append(f"{machine}: its point {member.point} is not there any more.")
            elif member.point in hurt[machine]:
                reasons.append(f"{machine}: {hurt[machine][member.point]}")
        if reasons:
            found[point.id] = " ".join(reasons)
    return found


class GroupLog:
    """The one owner of a group's log, under an epoch. One thread, but for `keep`, which members' threads call."""

    def __init__(self, group: str, writer: Writer, store: ReplicaStore) -> None:
        self.group = group
        self._writer = writer
        self._store = store

    @staticmethod
    def open(
        store: ReplicaStore,
        group: str,
        owner: str,
        *,
        succeeding: int | None = None,
        asked_at: datetime | None = None,
    ) -> GroupLog:
        """See `ReplicaStore.acquire`."""
        writer = store.acquire(log_name(group), owner, succeeding=succeeding, asked_at=asked_at)
        return GroupLog(group, writer, store)

    @property
    def epoch(self) -> int:
        return self._writer.epoch

    @property
    def number(self) -> int:
        """Of the next group point."""
        return self._writer.cycle

    def close(self) -> None:
        """The epoch stays taken."""
        self._writer.close()

    def check(self) -> None:
        """ReplicaFenced when a newer owner exists."""
        self._writer.keep_alive()

    def points(self) -> list[GroupPoint]:
        """Oldest first."""
        return points_of(self.group, self._writer.view())

    # members ------------------------------------------------------------------------------------------------------

    def keep(self, barrier: str, writer: Writer, point: RecoveryPoint) -> None:
        """Hold a member's point for the group. `writer` is the member's. PointExpired when it was removed meanwhile."""
        holder = keeper(self.group, barrier)
        name = f"{writer.log.prefix}h/{holder_hash(holder)}-{point.cycle:010d}"
        body = {"holder": holder, "point": point.id, "at": _NOBODY, "until": None}
        writer.backend.put(name, json.dumps(body).encode())
        view = writer.view()
        if any(point.cycle in doom.cycles for doom in view.dooms.values()):
            writer.backend.delete(name)
            raise FarshoreError(
                Code.POINT_EXPIRED,
                f"Point {point.id} of {point.machine} was removed before its group could keep it.",
                subject=point.machine,
            )

    def tidy(self, writer: Writer) -> int:
        """Give back what dead owners of this group hold of a member for barriers that became no group point. For an owner
        that has not begun a barrier. Returns how many."""
        view = self._writer.view()
        if view.damaged:
            return 0  # a damaged entry may be the group point
        mine = safe_name(log_name(self.group)) + " "
        alive = {holder_hash(keeper(self.group, point.barrier)) for point in points_of(self.group, view)}
        prefix = f"{writer.log.prefix}h/"
        count = 0
        for stored in writer.backend.list(prefix):
            if stored.name[len(prefix) :].rpartition("-")[0] in alive:
                continue
            data = writer.backend.get(stored.name)
            if data is not None and _holder(data).startswith(mine):
                writer.backend.delete(stored.name)
                count += 1
        return count

    def give_back(self, barrier: str, machines: Iterable[str]) -> None:
        """Members' points of a barrier are nobody's part any more."""
        for machine in machines:
            self._store.release(machine, keeper(self.group, barrier))

    # points -------------------------------------------------------------------------------------------------------

    def commit(
        self, cut: CommonCut, results: Mapping[str, CycleResult], clock: Callable[[], datetime]
    ) -> GroupPoint:
        """Make the group point: all members are committed and kept. ReplicaFenced when another owner came."""
        self._check_whole(cut, results)
        head = self._writer.head()
        points = {machine: results[machine].point for machine in cut.cuts}
        tag = {
            "format": FORMAT,
            "barrier": cut.barrier,
            "held_from": _time(cut.held_from),
            "held_until": _time(cut.held_until),
            "size_bytes": sum(point.size_bytes for point in points.values()),
            "members": [
                {
                    "machine": machine,
                    "point": point.id,
                    "digest": point.digest,
                    "consistency": point.consistency.value,
                }
                for machine, point in points.items()
            ],
        }
        manifest = Manifest(
            machine=self._writer.machine,
            cycle=self._writer.cycle,
            epoch=self._writer.epoch,
            parent=self._writer.parent,
            previous=head.cycle if head is not None else 0,
            taken_at=cut.held_from,
            committed_at=clock(),
            consistency=cut.consistency,
            final=all(point.final for point in points.values()),
            full=any(result.full for result in results.values()),
            reason="",
            cut=cut.barrier,
            bytes_changed=sum(result.bytes_changed for result in results.values()),
            bytes_shipped=sum(result.bytes_shipped for result in results.values()),
            bytes_stored=sum(result.bytes_stored for result in results.values()),
            disks=(),
            tags={TAG: json.dumps(tag, sort_keys=True, separators=(",", ":"), ensure_ascii=False)},
        )
        made = self._writer.commit(manifest)
        return _parse(self.group, manifest, made.digest, pinned=False)

    def _check_whole(self, cut: CommonCut, results: Mapping[str, CycleResult]) -> None:
        """Nothing but all members of one barrier is a group point."""
        strangers = [
            machine
            for machine, result in results.items()
            if machine not in cut.cuts or result.manifest.tags.get(BARRIER) != cut.barrier
        ]
        missing = sorted(set(cut.cuts) - set(results)) + strangers
        if missing or not results:
            raise FarshoreError(
                Code.INTERNAL,
                f"A point of {self.group} was about to be made without {', '.join(missing) or 'any member'}.",
                subject=self.group,
                retryable=False,
            )

    def remove(self, points: Sequence[GroupPoint], *, any_of_them: bool = False) -> list[GroupPoint]:
        """Give up group points, each as a whole, but those in use, the newest and the newest app-consistent one
        (`any_of_them`: but those in use). Returns what was removed."""
        numbers = [point.number for point in points]
        if not numbers:
            return []
        removed = set(
            self._writer.remove_any(numbers) if any_of_them else self._writer.remove_points(numbers)
        )
        gone = [point for point in points if point.number in removed]
        for point in gone:
            self.give_back(point.barrier, [member.machine for member in point.members])
        return gone

    def retain(self, policy: RetentionPolicy, now: datetime) -> int:
        """Give up what the policy gives up. Returns how many."""
        points = {point.id: point for point in self.points()}
        listed = [point.as_point() for point in points.values()]
        victims = gently(listed, prune(listed, policy, now))
        return len(self.remove([points[victim.id] for victim in victims]))

    def sweep(self) -> None:
        """Delete entries that were removed a grace period ago."""
        self._writer.sweep()


def _holder(data: bytes) -> str:
    try:
        return str(cast("dict[str, Any]", json.loads(data))["holder"])
    except (ValueError, KeyError, TypeError):
        return ""


def _time(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="microseconds")
