"""A server with an agent as a source of the replication engine: cut, changed blocks, bytes.

What a cut keeps is decided when it is made, from the consumer's last state, which the port tells only afterwards. So the
source guesses it: the state that was named last, else the cut that was read in full last. A wrong guess costs a cycle: a
byte that is gone is refused (SourceReadFailed), and the next cut keeps everything. It never costs a wrong byte.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NoReturn

from farshore.domain.errors import FarshoreError
from farshore.domain.points import Consistency
from farshore.providers.physical.client import AgentClient, escaped
from farshore.providers.physical.errors import AgentRefused, classify
from farshore.providers.physical.seed import Seed, sow
from farshore.providers.physical.settings import PhysicalSettings
from farshore.replication.ports import DiskState, Extent, FullCopyNeeded, NoCommonInstant

SEEDINGS = 4  # times that a cut may find more written than its spool holds, after copies in advance

log = logging.getLogger(__name__)


def _no_tick(_disk: str, _done: int) -> None:
    return None


class PhysicalSource:
    """Fills `replication.ports.Source` for one server. Blocking; not for two threads at once (its cuts are)."""

    def __init__(
        self,
        settings: PhysicalSettings,
        *,
        machine: str = "",
        client: AgentClient | None = None,
        tick: Callable[[str, int], None] = _no_tick,
    ) -> None:
        """`tick(disk, bytes)` is called while a first copy is made in advance; may raise to cancel it."""
        self._settings = settings
        self._machine = machine or settings.host
        self._client = client or AgentClient(settings)
        self._tick = tick
        self._bases: dict[str, str] = {}  # by disk; "" where the next cut has to keep everything

    def cut(self, name: str, *, want: Consistency) -> PhysicalCut:
        """One instant of all disks. SourceUnreachable, SourceBusy, SnapshotFailed, SourceNotEligible, AccessDenied."""
        asked = datetime.now(UTC)
        seed: Seed | None = None
        marks: dict[str, str] = {}
        try:
            for attempt in range(SEEDINGS + 1):
                try:
                    answer = self._cut(name, want, marks or self._bases)
                    break
                except AgentRefused as refused:
                    if (
                        refused.code != "seed-needed"
                        or self._settings.seed_folder is None
                        or attempt == SEEDINGS
                    ):
                        raise
                    log.info("%s: %s; copying in advance", self._machine, refused.message)
                    seed = seed or Seed(self._settings.seed_folder, name)
                    marks = self._sow(seed, refused, marks)
            else:
                raise AssertionError
            return PhysicalCut(self._client, self._machine, answer, asked=asked, seed=seed, bases=self._bases)
        except BaseException as error:  # also a cancel: the copies must not stay
            if seed is not None:
                seed.close()
            if isinstance(error, AgentRefused):
                raise classify(error, doing="making a cut", subject=self._machine) from error
            raise

    def _cut(self, name: str, want: Consistency, bases: Mapping[str, str]) -> dict[str, Any]:
        body = {"name": name, "want": want.value, "bases": dict(bases)}
        timeout = self._settings.cut_timeout
        return self._client.call("POST", "cuts", body=body, timeout=timeout, doing="making a cut")

    def _sow(self, seed: Seed, refused: AgentRefused, before: Mapping[str, str]) -> dict[str, str]:
        inventory = self._client.call("GET", "machine", doing="looking at the disks")
        needed = refused.details["needed"]
        sizes = {disk["key"]: int(disk["size"]) for disk in inventory["disks"] if disk["key"] in needed}
        return sow(
            self._client,
            seed,
            sizes,
            {key: str(refused.details["bases"].get(key, "")) for key in sizes},
            before,
            room=int(refused.details["room"]),
            rounds=self._settings.seed_rounds,
            tick=self._tick,
        )

    @property
    def cannot_hold(self) -> str:
        """See `replication.barrier.BarrierSource`."""
        return (
            "its agent freezes, marks and thaws in one request and cannot be told to stay frozen until other machines are, "
            "and what stops its disks is a freeze of file systems, which raw writers do not feel"
        )

    def prepare(self, name: str, *, want: Consistency) -> NoReturn:
        """NoCommonInstant, always, see `cannot_hold`."""
        raise NoCommonInstant({self._machine: self.cannot_hold})

    def reap(self, upto: str = "") -> list[str]:
        """Release cuts that dead predecessors left; returns their names. SourceBusy: see `Source.reap`."""
        doing = "releasing former cuts"
        try:
            answer = self._client.call("POST", "reap", body={"upto": upto}, doing=doing)
        except AgentRefused as refused:
            raise classify(refused, doing=doing, subject=self._machine) from refused
        return [str(name) for name in answer["released"]]

    def close(self) -> None:
        self._client.close()


class PhysicalCut:
    """Fills `replication.ports.SourceCut`. Reads may come from several threads."""

    def __init__(
        self,
        client: AgentClient,
        machine: str,
        answer: Mapping[str, Any],
        *,
        asked: datetime,
        seed: Seed | None,
        bases: dict[str, str],
    ) -> None:
        self._client, self._machine, self._seed, self._bases = client, machine, seed, bases
        self._name = str(answer["name"])
        self._path = f"cuts/{escaped(self._name)}"
        taken = datetime.fromisoformat(str(answer["taken_at"]))
        # The agent's clock is used when it can be right; else the moment of the request: never later than the truth.
        self._taken_at = taken if asked <= taken <= datetime.now(UTC) else asked
        self._consistency = Consistency(str(answer["consistency"]))
        self._disks = {str(disk["key"]): _state(disk) for disk in answer["disks"]}
        self._kept: dict[str, _Kept] = {}
        self._lock = threading.Lock()
        self._released = False
        self._failed = False
        self.evidence: Mapping[str, Any] = answer["evidence"]
        """What was frozen, for how long, what hooks said, why the label is not more."""
        self.full: Mapping[str, str] = {d["key"]: d["full"] for d in answer["disks"] if d["full"]}
        """Why the cut keeps all of a disk, by disk."""

    @property
    def name(self) -> str:
        return self._name

    @property
    def taken_at(self) -> datetime:
        return self._taken_at

    @property
    def consistency(self) -> Consistency:
        return self._consistency

    @property
    def powered_off(self) -> bool:
        """Never known: an agent that answers runs on a machine that runs."""
        return False

    @property
    def disks(self) -> Sequence[DiskState]:
        return list(self._disks.values())

    @property
    def whole(self) -> bool:
        """The agent keeps what changed; other blocks are read from the running disk, as long as nobody has written them."""
        return False

    @property
    def left_out(self) -> Mapping[str, str]:
        return {}

    def changed(self, disk_key: str, since: DiskState | None) -> Iterator[Extent]:
        """See `SourceCut.changed`. None: the whole disk; zeros cost no bytes on the way."""
        now = self._disks[disk_key]
        if since is not None and (since.size != now.size or since.identity != now.identity):
            reason = f"{now.label} was resized or replaced"
            self._bases[disk_key] = ""
            raise FullCopyNeeded(reason)
        query = {"disk": disk_key, "since": (since.tracker or "") if since else ""}
        doing = f"asking what changed on {now.label}"
        try:
            runs = self._client.call("GET", f"{self._path}/changed", query=query, doing=doing)
        except AgentRefused as refused:
            if refused.code != "not-known":
                raise classify(refused, doing=doing, subject=self._machine) from refused
            self._bases[disk_key] = ""
            if since is None:
                return iter([Extent(0, now.size)] if now.size else [])
            raise FullCopyNeeded(refused.message) from refused
        self._bases[disk_key] = query["since"]
        return iter([Extent(offset, length) for offset, length in runs])

    def read(self, disk_key: str, offset: int, length: int) -> bytes:
        """Exactly the bytes of the instant, or SourceReadFailed, SourceUnreachable."""
        now = self._disks[disk_key]
        if offset < 0 or length < 0 or offset + length > now.size:
            raise ValueError(f"range {offset}+{length} is outside {now.label} ({now.size} bytes)")
        if length == 0:
            return b""
        doing = f"reading {now.label}"
        try:
            if self._seed is None:
                return self._remote(disk_key, offset, length, doing)
            kept = self._kept_of(disk_key)
            return b"".join(
                self._remote(disk_key, at, size, doing)
                if ours or not self._seed.has(disk_key, at, size)
                else self._seed.read(disk_key, at, size)
                for at, size, ours in kept.split(offset, length)
            )
        except AgentRefused as refused:
            self._failed = True
            self._bases[disk_key] = ""  # whatever was guessed: the next cut keeps everything
            raise classify(refused, doing=doing, subject=self._machine) from refused
        except FarshoreError:
            self._failed = True
            raise

    def _remote(self, key: str, offset: int, length: int, doing: str) -> bytes:
        return self._client.read(f"{self._path}/bytes", {"disk": key}, offset, length, doing=doing)

    def _kept_of(self, key: str) -> _Kept:
        """What the agent kept on top of the seed; asked once."""
        with self._lock:
            if key not in self._kept:
                runs = self._client.call(
                    "GET", f"{self._path}/held", query={"disk": key}, doing="asking what is kept"
                )
                self._kept[key] = _Kept([(int(offset), int(length)) for offset, length in runs])
            return self._kept[key]

    def confirm(self) -> None:
        """Nothing to ask: the agent answers reads of the held cut only."""

    def release(self) -> None:
        """Let the agent forget what it kept. Idempotent."""
        with self._lock:
            if self._released:
                return
            if self._seed is not None:
                self._seed.close()
            doing = f"releasing cut {self._name}"
            try:
                self._client.call("DELETE", self._path, doing=doing)
            except AgentRefused as refused:
                raise classify(refused, doing=doing, subject=self._machine) from refused
            self._released = True
            if not self._failed:
                self._guess()

    def _guess(self) -> None:
        """Nothing failed: this cut is likely to be the consumer's next state."""
        for key, state in self._disks.items():
            self._bases[key] = state.tracker or ""


class _Kept:
    """Ranges of a disk that are not to be taken from the seed."""

    def __init__(self, runs: list[tuple[int, int]]) -> None:
        self._runs = runs

    def split(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """(offset, length, kept by the agent), in order, covering the range."""
        at, end = offset, offset + length
        for start, size in self._runs:
            if start + size <= at:
                continue
            if start >= end:
                break
            if start > at:
                yield at, start - at, False
                at = start
            stop = min(end, start + size)
            yield at, stop - at, True
            at = stop
        if at < end:
            yield at, end - at, False


def _state(disk: Mapping[str, Any]) -> DiskState:
    return DiskState(
        key=str(disk["key"]),
        label=str(disk["path"]),
        size=int(disk["size"]),
        identity=f"{disk['identity']}|{disk['size']}",
        tracker=str(disk["tracker"]),
        boot=bool(disk["boot"]),
    )


__all__ = ["PhysicalCut", "PhysicalSource"]
