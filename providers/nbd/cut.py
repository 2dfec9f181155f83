"""One instant of a QEMU machine: what changed, and the bytes, until it is released."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency
from farshore.providers.nbd import bitmaps, fleece, protocol
from farshore.providers.nbd.bitmaps import Bitmap, Line
from farshore.providers.nbd.client import NbdClient
from farshore.providers.nbd.disks import CutName
from farshore.providers.nbd.errors import read_failed
from farshore.providers.nbd.qmp import Monitor, Refused, action
from farshore.providers.nbd.settings import QemuSettings
from farshore.replication.ports import LEAF, DiskState, Extent, FullCopyNeeded

_WATCH = 0.5  # seconds between two looks at the room for fleeces
_TRACK = "since"  # the bitmap that a fleece shows

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Piece:
    """A disk within a cut: its state, the live node, the fleece, and the trackers that were there before the cut."""

    state: DiskState
    node: str
    fleece: str
    line: Line | None
    why: str  # why there is no line


class QemuCut:
    """Fills `replication.ports.SourceCut`. Reads may come from several threads."""

    def __init__(
        self,
        settings: QemuSettings,
        cut: CutName,
        stem: str,
        pieces: Mapping[str, Piece],
        *,
        taken_at: datetime,
        consistency: Consistency,
        powered_off: bool,
    ) -> None:
        self._settings, self._cut, self._stem, self._pieces = settings, cut, stem, dict(pieces)
        self._taken_at, self._consistency, self._off = taken_at, consistency, powered_off
        self._where = f"{cut.machine} at {cut}"
        self._clients: dict[str, NbdClient] = {}
        self._clients_lock = threading.Lock()
        self._alive_lock = threading.Lock()
        self._alive_until = float(
            "-inf"
        )  # monotonic: the fleeces were seen to be whole at this moment or later
        self._broken = ""
        self._spent: dict[str, list[Bitmap]] = {}  # trackers that the newest committed point has overtaken
        self._over = threading.Event()
        self._release_lock = threading.Lock()
        self._released = False
        # The thread must not keep a cut alive that nobody released: its remains are reaped by the next one.
        self._watcher = threading.Thread(
            target=_watch, args=(weakref.ref(self), self._over), name=f"fleece-{cut.machine}", daemon=True
        )
        weakref.finalize(self, self._over.set)

    @property
    def name(self) -> str:
        return str(self._cut)

    @property
    def taken_at(self) -> datetime:
        return self._taken_at

    @property
    def consistency(self) -> Consistency:
        return self._consistency

    @property
    def powered_off(self) -> bool:
        """The guest had shut down and QEMU stayed (`-no-shutdown`). See `SourceCut.powered_off`."""
        return self._off

    @property
    def disks(self) -> Sequence[DiskState]:
        return [piece.state for piece in self._pieces.values()]

    @property
    def whole(self) -> bool:
        return True

    @property
    def left_out(self) -> Mapping[str, str]:
        return {}

    def export(self) -> None:
        """Make the fleeces readable, and watch the room they need."""
        with self._monitor() as monitor:
            self._serve(monitor)
            for piece in self._pieces.values():
                monitor(
                    "block-export-add",
                    type="nbd",
                    id=piece.fleece,
                    node_name=piece.fleece,
                    name=piece.fleece,
                    writable=False,
                )
        self._watcher.start()

    # -- what changed --------------------------------------------------------------------------------------------

    def changed(self, disk_key: str, since: DiskState | None) -> Iterator[Extent]:
        """All answers are read and checked before the first extent is handed out. See `SourceCut.changed`."""
        piece = self._pieces[disk_key]
        if since is None:
            return iter(self._allocated(piece))
        reason = resync_reason(piece, since)
        if reason:
            raise FullCopyNeeded(reason)
        parsed = bitmaps.parse_tracker(since.tracker)
        wanted = piece.line.since(parsed[1], parsed[2]) if piece.line and parsed else ()
        if not wanted or parsed is None or piece.line is None:
            raise FullCopyNeeded(f"change tracking of {disk_key} does not reach back to the last point")
        found = self._dirty(piece, wanted)
        self._spent[disk_key] = [bitmap for bitmap in piece.line.bitmaps if bitmap.last < parsed[1]]
        return iter(found)

    def _allocated(self, piece: Piece) -> list[Extent]:
        client = self._client(piece)
        if not client.has(protocol.ALLOCATION):
            return [Extent(0, piece.state.size)]
        found = [
            Extent(start, length)
            for start, length, flags in client.status(protocol.ALLOCATION)
            if not flags & protocol.STATE_ZERO
        ]
        self._still_whole(time.monotonic())
        return found

    def _dirty(self, piece: Piece, wanted: Sequence[Bitmap]) -> list[Extent]:
        """What these bitmaps say together: they are joined in a bitmap of the fleece, which NBD shows."""
        export = f"{piece.fleece}{fleece.TRACK}"
        context = f"qemu:dirty-bitmap:{_TRACK}"
        with self._monitor() as monitor:
            try:
                self._unshow(monitor, piece)  # a former call may have died half-way
                monitor(
                    "block-dirty-bitmap-add",
                    node=piece.fleece,
                    name=_TRACK,
                    granularity=LEAF,
                    disabled=True,
                )
                monitor(
                    "block-dirty-bitmap-merge",
                    node=piece.fleece,
                    target=_TRACK,
                    bitmaps=[{"node": piece.node, "name": bitmap.name} for bitmap in wanted],
                )
            except Refused as exc:
                raise FullCopyNeeded(f"QEMU cannot tell what changed: {exc.text}") from exc
            monitor(
                "block-export-add",
                type="nbd",
                id=export,
                node_name=piece.fleece,
                name=export,
                writable=False,
                bitmaps=[_TRACK],
            )
        with self._connect(export, (context,)) as client:
            self._same_size(client, piece)
            if not client.has(context):
                raise FullCopyNeeded("QEMU does not show the change tracking")
            found = [
                Extent(start, length)
                for start, length, flags in client.status(context)
                if flags & protocol.STATE_DIRTY
            ]
        with self._monitor() as monitor, contextlib.suppress(FarshoreError):
            self._unshow(monitor, piece)  # if this fails it goes with the fleece
        self._still_whole(time.monotonic())
        return found

    def _unshow(self, monitor: Monitor, piece: Piece) -> None:
        export = f"{piece.fleece}{fleece.TRACK}"
        if any(entry["id"] == export for entry in monitor("query-block-exports")):
            monitor("block-export-del", id=export, mode="hard")
            monitor.wait_until(
                lambda: all(entry["id"] != export for entry in monitor("query-block-exports")),
                self._settings.settle_timeout,
                f"The end of export {export}",
            )
        with contextlib.suppress(Refused):
            monitor("block-dirty-bitmap-remove", node=piece.fleece, name=_TRACK)

    # -- bytes ---------------------------------------------------------------------------------------------------

    def read(self, disk_key: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes of the frozen disk. SourceReadFailed, also when the fleece was lost meanwhile."""
        piece = self._pieces[disk_key]
        if offset < 0 or length < 0 or offset + length > piece.state.size:
            raise ValueError(f"range {offset}+{length} is outside {disk_key} ({piece.state.size} bytes)")
        client = self._client(piece)
        try:
            data = client.read(offset, length)
        except FarshoreError:
            if not client.broken:
                raise
            data = self._client(piece).read(offset, length)  # the same export: its name is used once only
        self._still_whole(time.monotonic())
        return data

    def _client(self, piece: Piece) -> NbdClient:
        """The connection to a disk, made anew when it broke."""
        with self._clients_lock:
            if self._released or self._broken:
                raise read_failed(self._where, self._broken or "the cut was released", reason="released")
            client = self._clients.get(piece.fleece)
            if client is None or client.broken:
                client = self._connect(piece.fleece, (protocol.ALLOCATION,))
                self._same_size(client, piece)
                self._clients[piece.fleece] = client
            return client

    def _connect(self, export: str, contexts: tuple[str, ...]) -> NbdClient:
        try:
            return NbdClient(
                self._settings.nbd,
                export,
                contexts=contexts,
                tls=self._settings.nbd_tls,
                timeout=self._settings.connect_timeout,
                silence=self._settings.read_silence,
            )
        except FarshoreError as exc:
            if exc.code is not Code.SOURCE_NOT_ELIGIBLE:
                raise
            # We made this export: either somebody removed it, or the settings name another NBD server than QEMU's.
            raise read_failed(self._where, exc, reason="no-export") from exc

    def _same_size(self, client: NbdClient, piece: Piece) -> None:
        if client.size != piece.state.size:
            client.close()
            raise read_failed(
                self._where,
                f"{piece.state.key} has {piece.state.size} bytes, its export {client.size}",
                reason="size",
            )

    def _still_whole(self, read_at: float) -> None:
        """What was read is of this cut only if the fleeces were still kept up *after* the read.

        Somebody may cancel the jobs at any time, and then a fleece shows newer bytes. Threads that wait here share one
        question, if it was asked after their read.
        """
        with self._alive_lock:
            if not self._broken and self._alive_until >= read_at:
                return
            asked = time.monotonic()
            if not self._broken:
                with self._monitor() as monitor:
                    if not fleece.alive(monitor, [piece.fleece for piece in self._pieces.values()]):
                        self._broken = "QEMU no longer keeps the old content of what the guest overwrites"
            if self._broken:
                raise read_failed(self._where, f"{self._broken}; nothing read is used", reason="broken")
            self._alive_until = asked

    def guard(self) -> None:
        """Give the cut up before its fleeces fill the folder: QEMU would fail the guest's writes. Called now and then."""
        try:
            free = fleece.room(self._settings.fleece_folder)
        except FarshoreError:
            return  # the folder's absence harms nobody now: the files have no names
        if free >= self._settings.fleece_free:
            return
        # Before the jobs go: no read that ends from now on may be believed.
        self._broken = f"only {free >> 20} MiB are left in {self._settings.fleece_folder}"
        log.error("the cut %s is given up: %s", self.name, self._broken)
        try:
            with self._monitor() as monitor:
                fleece.remove(monitor, self._stem, self._settings.settle_timeout)
            self._over.set()
        except FarshoreError as exc:
            log.error("giving up the cut %s failed, it is tried again: %s", self.name, exc)

    # -- ending --------------------------------------------------------------------------------------------------

    def confirm(self) -> None:
        """Nothing to ask: a fleece that is full or gone answers no read."""

    def release(self) -> None:
        """Remove the fleeces and the trackers that no point needs any more. Idempotent."""
        with self._release_lock:
            if self._released:
                return
            self._over.set()
            with self._clients_lock:
                for client in self._clients.values():
                    client.close()
                self._clients.clear()
            with self._monitor() as monitor:
                fleece.remove(monitor, self._stem, self._settings.settle_timeout)
                for piece in self._pieces.values():
                    self._tidy(monitor, piece)
            self._released = True

    def _tidy(self, monitor: Monitor, piece: Piece) -> None:
        """Trackers older than the newest committed point go; if many are left the oldest two become one.

        Only bitmaps that were there before this cut are touched. A failure costs memory in QEMU, never changes.
        """
        line = piece.line
        spent = list(self._spent.get(piece.state.key, ()))
        if line is None:
            parsed = bitmaps.parse_tracker(piece.state.tracker)
            described = next(
                (
                    node.get("dirty-bitmaps", ())
                    for node in monitor("query-named-block-nodes", flat=True)
                    if node.get("node-name") == piece.node
                ),
                (),
            )
            # Remains of lines that ended. The new line has one bitmap, if no other worker began one as well.
            spent = [b for b in bitmaps.read(described, self._cut.machine) if parsed and b.line != parsed[0]]
        for bitmap in spent:
            with contextlib.suppress(Refused):
                monitor("block-dirty-bitmap-remove", node=piece.node, name=bitmap.name)
        if line is None or spent:
            return
        pair = bitmaps.join_plan(line, self._settings.bitmaps)
        if pair is None:
            return
        name = bitmaps.name(self._cut.machine, line.word, pair[0].first, pair[1].last, pair[0].mark)
        with contextlib.suppress(Refused):
            monitor.transaction(
                [
                    action(
                        "block-dirty-bitmap-add",
                        node=piece.node,
                        name=name,
                        granularity=LEAF,
                        disabled=True,
                    ),
                    action(
                        "block-dirty-bitmap-merge",
                        node=piece.node,
                        target=name,
                        bitmaps=[bitmap.name for bitmap in pair],
                    ),
                    *(
                        action("block-dirty-bitmap-remove", node=piece.node, name=bitmap.name)
                        for bitmap in pair
                    ),
                ]
            )

    # -- inside --------------------------------------------------------------------------------------------------

    def _monitor(self) -> Monitor:
        return open_monitor(self._settings, self._cut.machine)

    def _serve(self, monitor: Monitor) -> None:
        """Have QEMU's NBD server listen. If it already does, it does so where the settings say or the reads will fail."""
        where = self._settings.nbd
        address = (
            {"type": "unix", "data": {"path": where}}
            if isinstance(where, str)
            else {"type": "inet", "data": {"host": where[0], "port": str(where[1])}}
        )
        arguments: dict[str, Any] = {"addr": address}
        if self._settings.nbd_tls_object:
            arguments["tls_creds"] = self._settings.nbd_tls_object
        try:
            monitor("nbd-server-start", **arguments)
        except Refused as exc:
            if "already running" not in exc.text:
                raise


def _watch(weak: weakref.ref[QemuCut], over: threading.Event) -> None:
    while not over.wait(_WATCH):
        cut = weak()
        if cut is None:
            return
        cut.guard()
        del cut


def open_monitor(settings: QemuSettings, machine: str) -> Monitor:
    """A connection for a few commands. SourceUnreachable."""
    return Monitor(
        settings.qmp, subject=machine, timeout=settings.connect_timeout, answer=settings.call_timeout
    )


def resync_reason(piece: Piece, since: DiskState) -> str:
    """Why deltas since `since` cannot be trusted; "" when they can."""
    key, state = piece.state.key, piece.state
    parsed = bitmaps.parse_tracker(since.tracker)
    if state.size != since.size:
        return f"the size of {key} changed from {since.size} to {state.size} bytes"
    if state.identity != since.identity:
        return f"{key} is another disk or was moved"
    if parsed is None:
        return f"{key} had no change tracking at the last point"
    if piece.line is None:
        return f"{key}: {piece.why}"
    if piece.line.word != parsed[0]:
        return f"change tracking of {key} was begun anew after the last point"
    return ""
