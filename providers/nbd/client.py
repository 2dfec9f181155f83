"""A read-only NBD client for threads: several requests in flight on one connection, replies in any order.

There is no thread of its own. Of the threads that wait for a reply one reads the socket for all (the leader), puts
bytes straight into the buffers they are for, and hands over when its own reply is complete. Every reply is checked in
full before a request counts as answered: a buffer is only good when `read_into` returned. After anything that the
protocol does not allow, and after a time-out, the connection is of no use: replies could no longer be told apart.
"""

from __future__ import annotations

import contextlib
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Self

from farshore.domain.errors import FarshoreError
from farshore.providers.nbd import protocol as nbd
from farshore.providers.nbd.errors import Malformed, error_name, read_failed
from farshore.providers.nbd.handshake import Address, ClientTls, Terms, open_export, told

PIECE = 1 << 20  # bytes of one request: measured best between 256 KiB and 1 MiB
WINDOW = 8  # requests in flight for each thread
_NOTHING = memoryview(b"")
_KEPT = 4 << 20  # bytes of the buffer that each reading thread keeps
_kept = threading.local()


@dataclass(slots=True, eq=False)
class _Request:
    cookie: int
    command: int
    offset: int
    length: int
    view: memoryview  # empty for other commands than read
    until: float  # monotonic
    got: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    runs: dict[int, list[tuple[int, int]]] = field(default_factory=dict[int, list[tuple[int, int]]])
    error: str = ""  # what the server says about this request; the connection stays good
    done: bool = False


class NbdClient:
    """One connection to one export. Thread-safe. Sizes and offsets in bytes, times in seconds.

    All failures are `FarshoreError`: see `open_export` for those of the constructor, SourceReadFailed afterwards.
    """

    def __init__(
        self,
        address: Address,
        export: str,
        *,
        contexts: tuple[str, ...] = (),
        tls: ClientTls | None = None,
        timeout: float = 10.0,
        silence: float = 30.0,
        answer: float = 60.0,
    ) -> None:
        """`timeout` is for connecting, `silence` for a gap between bytes, `answer` for one whole reply."""
        self._where = f"export {export!r} of {told(address)}"
        self._answer = answer
        self._wire, self._terms = open_export(
            address, export, contexts=contexts, tls=tls, timeout=timeout, silence=silence
        )
        self._state = threading.Condition()
        self._pending: dict[int, _Request] = {}
        self._cookie = 0
        self._led = False
        self._broken: BaseException | None = None
        self._head = memoryview(bytearray(20))

    @property
    def size(self) -> int:
        return self._terms.size

    @property
    def terms(self) -> Terms:
        return self._terms

    @property
    def broken(self) -> bool:
        """The connection is of no use any more."""
        return self._broken is not None

    def has(self, context: str) -> bool:
        """Whether the server has this metadata context."""
        return context in self._terms.contexts.values()

    # -- reading -------------------------------------------------------------------------------------------------

    def read(self, offset: int, length: int) -> bytes:
        """Exactly these bytes."""
        if length > _KEPT:
            data = bytearray(length)
            self.read_into(offset, memoryview(data))
            return bytes(data)
        # A fresh buffer of this size costs more in page faults than the copy out of a kept one.
        view = getattr(_kept, "view", None)
        if view is None:
            view = _kept.view = memoryview(bytearray(_KEPT))
        self.read_into(offset, view[:length])
        return bytes(view[:length])

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the bytes at `offset`. After an error its content means nothing."""
        grain = self._terms.min_block
        lead, tail = offset % grain, -(offset + view.nbytes) % grain
        if lead or tail:
            wide = memoryview(bytearray(lead + view.nbytes + tail))
            self.read_into(offset - lead, wide)
            view[:] = wide[lead : lead + view.nbytes]
            return
        for _ in self.read_many([(offset, view)]):
            pass

    def read_many(
        self, requests: Iterable[tuple[int, memoryview]], window: int = WINDOW
    ) -> Iterator[tuple[int, memoryview]]:
        """Read all of `requests`, several at once; each is handed back, in order, when its buffer is full.

        A buffer must stay untouched until then. Offsets and lengths are multiples of the server's smallest block.
        """
        step = min(PIECE, self._terms.max_block)
        flying: deque[tuple[_Request, tuple[int, memoryview] | None]] = deque()
        try:
            for offset, view in requests:
                self._inside(offset, view.nbytes)
                flat = view.cast("B") if view.format != "B" or view.ndim != 1 else view
                if not flat.nbytes:
                    continue
                for at in range(0, flat.nbytes, step):
                    piece = flat[at : at + step]
                    if len(flying) >= window:
                        yield from self._landed(flying)
                    last = at + step >= flat.nbytes
                    sent = self._submit(nbd.CMD_READ, offset + at, piece.nbytes, piece)
                    flying.append((sent, (offset, view) if last else None))
            while flying:
                yield from self._landed(flying)
        finally:
            # Nobody writes into the caller's buffers after this: wait for what is still on its way.
            for request, _ in flying:
                with contextlib.suppress(FarshoreError):
                    self._wait(request)

    def _landed(
        self, flying: deque[tuple[_Request, tuple[int, memoryview] | None]]
    ) -> Iterator[tuple[int, memoryview]]:
        request, complete = flying[0]
        self._wait(request)
        flying.popleft()
        if complete is not None:
            yield complete

    # -- what is where -------------------------------------------------------------------------------------------

    def status(
        self, context: str, offset: int = 0, length: int | None = None, step: int = nbd.STATUS_STEP
    ) -> Iterator[tuple[int, int, int]]:
        """Runs (offset, length, flags) of a metadata context, ordered and without gaps, clamped to the range asked for."""
        end = self.size if length is None else offset + length
        self._inside(offset, end - offset)
        number = next((key for key, name in self._terms.contexts.items() if name == context), None)
        if number is None:
            raise read_failed(self._where, f"the server has no context {context!r}", reason="no-context")
        while offset < end:
            asked = min(step, end - offset)
            request = self._submit(nbd.CMD_BLOCK_STATUS, offset, asked, _NOTHING)
            self._wait(request)
            for run, flags in request.runs[number]:
                part = min(run, asked)  # the last run may go on behind the range
                yield offset, part, flags
                offset += part
                asked -= part

    # -- ending --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Say good-bye and close. Idempotent; threads that still wait get an error."""
        with self._state:
            quiet = self._broken is None
        if quiet:
            with contextlib.suppress(OSError):
                self._wire.send(nbd.request(nbd.CMD_DISC, 0, 0, 0))
        self._break(ConnectionError("the connection was closed here"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- inside --------------------------------------------------------------------------------------------------

    def _inside(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"{offset}+{length} is outside {self._where} ({self.size} bytes)")

    def _submit(self, command: int, offset: int, length: int, view: memoryview) -> _Request:
        with self._state:
            if self._broken is not None:
                raise self._failure(self._broken)
            self._cookie += 1
            request = _Request(self._cookie, command, offset, length, view, time.monotonic() + self._answer)
            self._pending[request.cookie] = request
        try:
            self._wire.send(nbd.request(command, request.cookie, offset, length))
        except (OSError, ssl.SSLError) as exc:
            with self._state:
                self._pending.pop(request.cookie, None)
            self._break(exc)
            raise self._failure(exc) from exc
        return request

    def _wait(self, request: _Request) -> None:
        """Until `request` is answered, or the connection is broken and nobody touches its buffer any more."""
        while True:
            with self._state:
                late = time.monotonic() >= request.until
                if request.done or self._broken is not None:
                    break
                if not late:
                    if self._led:
                        self._state.wait(request.until - time.monotonic())
                        continue
                    self._led = True
            if late:
                self._break(TimeoutError(f"no complete answer within {self._answer:g} s"))
            else:
                self._lead(request)
        with self._state:
            self._pending.pop(request.cookie, None)
            while not request.done and self._led:
                self._state.wait()  # the leader may be in the middle of our buffer; the closed socket frees it
        if not request.done:
            raise self._failure(self._broken or ConnectionError("the connection is gone"))
        if request.error:
            where = f"{self._where} at {request.offset}+{request.length}"
            raise read_failed(where, request.error, reason="refused")

    def _lead(self, request: _Request) -> None:
        """Read replies for everybody until `request` is answered or the connection breaks."""
        try:
            while not request.done and self._broken is None:
                if time.monotonic() > request.until:
                    raise TimeoutError(f"no complete answer within {self._answer:g} s")
                self._receive()
        except (OSError, Malformed) as exc:
            self._break(exc)
        except BaseException as exc:
            self._break(exc)  # interrupted in the middle of a reply: nobody could go on reading
            raise
        finally:
            with self._state:
                self._led = False
                self._state.notify_all()

    def _failure(self, cause: BaseException) -> FarshoreError:
        reason = "closed"
        if isinstance(cause, Malformed):
            reason = "malformed"
        elif isinstance(cause, TimeoutError):
            reason = "timeout"
        what = f"the server broke the protocol: {cause}" if reason == "malformed" else cause
        failure = read_failed(self._where, what, reason=reason)
        failure.__cause__ = cause
        return failure

    def _break(self, cause: BaseException) -> None:
        with self._state:
            if self._broken is None:
                self._broken = cause
            self._state.notify_all()
        self._wire.close()

    # -- replies -------------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        head = self._head
        self._wire.read_into(head[:4])
        magic = int.from_bytes(head[:4], "big")
        if magic == nbd.STRUCTURED_MAGIC:
            if not self._terms.structured:
                raise Malformed("a structured reply, which was not agreed on")
            self._wire.read_into(head[:16])
            self._chunk(nbd.Chunk(*nbd.STRUCTURED.unpack(head[:16])))
        elif magic == nbd.SIMPLE_MAGIC:
            self._wire.read_into(head[:12])
            error, cookie = nbd.SIMPLE.unpack(head[:12])
            self._simple(self._asked(cookie), error)
        else:
            raise Malformed(f"a reply begins with {magic:#x}")

    def _asked(self, cookie: int) -> _Request:
        with self._state:
            request = self._pending.get(cookie)
        if request is None or request.done:
            raise Malformed(f"a reply to request {cookie}, which nobody waits for")
        return request

    def _finish(self, request: _Request) -> None:
        with self._state:
            request.done = True
            self._state.notify_all()

    def _simple(self, request: _Request, error: int) -> None:
        if self._terms.structured and request.command == nbd.CMD_READ:
            raise Malformed("a simple reply to a read although structured ones were agreed on")
        if error:
            request.error = f"the server says {error_name(error)}"
        elif request.command != nbd.CMD_READ:
            raise Malformed("a simple reply to a question for block status")
        else:
            self._wire.read_into(request.view)
        self._finish(request)

    def _chunk(self, chunk: nbd.Chunk) -> None:
        request = self._asked(chunk.cookie)
        reading = request.command == nbd.CMD_READ
        if chunk.error:
            if chunk.length > nbd.MAX_ERROR_CHUNK:
                raise Malformed(f"an error chunk of {chunk.length} bytes")
            request.error = request.error or nbd.parse_error(self._payload(chunk.length))
        elif chunk.kind == nbd.CHUNK_NONE:
            if chunk.length or not chunk.done:
                raise Malformed("an empty chunk that is not the last one")
        elif chunk.kind == nbd.CHUNK_DATA and reading:
            if chunk.length <= 8:
                raise Malformed("a data chunk without data")
            (offset,) = struct.unpack(">Q", self._payload(8))
            self._wire.read_into(self._place(request, offset, chunk.length - 8))
        elif chunk.kind == nbd.CHUNK_HOLE and reading:
            if chunk.length != 12:
                raise Malformed(f"a hole chunk of {chunk.length} bytes")
            offset, length = struct.unpack(">QI", self._payload(12))
            self._place(request, offset, length)[:] = bytes(length)
        elif chunk.kind == nbd.CHUNK_STATUS and not reading:
            if chunk.length > nbd.MAX_STATUS_CHUNK:
                raise Malformed(f"a block status chunk of {chunk.length} bytes")
            number, runs = nbd.parse_status(self._payload(chunk.length))
            if number not in self._terms.contexts or number in request.runs:
                raise Malformed(f"block status of context {number}, which was not agreed on or came twice")
            request.runs[number] = runs
        else:
            raise Malformed(f"a chunk of kind {chunk.kind}, which is no answer to this request")
        if chunk.done:
            if not request.error:
                self._complete(request)
            self._finish(request)

    def _place(self, request: _Request, offset: int, length: int) -> memoryview:
        """The part of the caller's buffer that these bytes are for."""
        at = offset - request.offset
        if length == 0 or at < 0 or at + length > request.length:
            raise Malformed(f"bytes {offset}+{length} in the answer to {request.offset}+{request.length}")
        request.got += length
        if request.got > request.length:
            raise Malformed("bytes that came twice")
        request.spans.append((at, length))
        return request.view[at : at + length]

    def _complete(self, request: _Request) -> None:
        if request.command == nbd.CMD_BLOCK_STATUS:
            if set(request.runs) != set(self._terms.contexts):
                raise Malformed("block status of a context is missing")
            for runs in request.runs.values():
                # Fewer bytes than asked for are allowed; more only in the last run.
                if sum(length for length, _ in runs[:-1]) >= request.length:
                    raise Malformed("block status of more than was asked for")
            return
        at = 0
        for start, length in sorted(request.spans):
            if start != at:
                raise Malformed("bytes that came twice" if start < at else "bytes that are missing")
            at += length
        if at != request.length:
            raise Malformed(f"{at} bytes instead of {request.length}")

    def _payload(self, length: int) -> bytes:
        data = bytearray(length)
        self._wire.read_into(memoryview(data))
        return bytes(data)
