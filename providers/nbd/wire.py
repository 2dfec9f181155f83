"""Bytes over a socket, exactly as many as asked for, plain or TLS, for one reading and several sending threads.

TLS runs over memory buffers: an OpenSSL connection is not for two threads at once, so it is entered under a lock and
never while waiting for the network. Waiting happens on the plain socket.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
import time
from typing import Any, Protocol

PIECE = 1 << 18


class Closed(ConnectionError):
    """The other side closed the connection."""


class Wire(Protocol):
    """A connected stream. TimeoutError after `silence` seconds without a byte; any OSError ends its use."""

    def read_into(self, view: memoryview) -> None: ...
    def send(self, data: bytes) -> None: ...
    def close(self) -> None: ...


def connect(address: str | tuple[str, int], timeout: float) -> socket.socket:
    """A connected socket: a path is a unix socket, a pair is TCP. `timeout` in seconds. OSError."""
    if isinstance(address, tuple):
        connected = socket.create_connection(address, timeout)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return connected
    connected = socket.socket(socket.AF_UNIX)
    try:
        connected.settimeout(timeout)
        connected.connect(address)
    except BaseException:
        connected.close()
        raise
    return connected


class PlainWire:
    """See `Wire`. The kernel does the timing, so that one call can wait for a whole buffer (MSG_WAITALL)."""

    def __init__(self, connected: socket.socket, silence: float) -> None:
        self._socket = connected
        self._silence = silence
        self._sending = threading.Lock()
        connected.settimeout(None)
        self.patience(silence)

    def patience(self, silence: float) -> None:
        """Change how many seconds without a byte are an error."""
        self._silence = silence
        micro = max(1, round(silence * 1e6))
        span = struct.pack("ll", micro // 1_000_000, micro % 1_000_000)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, span)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, span)

    @property
    def socket(self) -> socket.socket:
        return self._socket

    def read_into(self, view: memoryview) -> None:
        while view.nbytes:
            try:
                count = self._socket.recv_into(view, 0, socket.MSG_WAITALL)
            except BlockingIOError:
                raise TimeoutError(f"nothing came for {self._silence:g} s") from None
            if not count:
                raise Closed("the other side closed the connection")
            view = view[count:]

    def send(self, data: bytes) -> None:
        with self._sending:
            try:
                self._socket.sendall(data)
            except BlockingIOError:
                raise TimeoutError(f"nothing could be sent for {self._silence:g} s") from None

    def close(self) -> None:
        _close(self._socket)


class TlsWire:
    """See `Wire`."""

    def __init__(self, plain: PlainWire, context: ssl.SSLContext, name: str | None, timeout: float) -> None:
        self._socket = plain.socket
        self._received = memoryview(bytearray(PIECE))
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=name)
        self._lock = threading.Lock()  # around every use of `_tls` and its buffers; never held while waiting
        self._sending = threading.Lock()  # records must leave in the order in which they were made
        self._silence = timeout
        until = time.monotonic() + timeout
        while True:
            try:
                self._tls.do_handshake()
                self._flush()
                return
            except ssl.SSLWantReadError:
                self._flush()
                self._more()
            except BaseException:
                with contextlib.suppress(
                    OSError
                ):  # the alert tells the server why; the error is ours to raise
                    self._flush()
                raise
            if time.monotonic() > until:
                raise TimeoutError("the TLS handshake did not end in time")

    def read_into(self, view: memoryview) -> None:
        while view.nbytes:
            with self._lock:
                try:
                    count = _read(self._tls, view)
                except ssl.SSLWantReadError:
                    count = -1
                except ssl.SSLZeroReturnError:
                    count = 0
                answer = self._outgoing.pending
            if answer:
                self._flush()
            if count == 0:
                raise Closed("the other side closed the connection")
            if count < 0:
                self._more()
            else:
                view = view[count:]

    def send(self, data: bytes) -> None:
        with self._sending:
            with self._lock:
                self._tls.write(data)
                ready = self._outgoing.read()
            self._send(ready)

    def close(self) -> None:
        _close(self._socket)

    def _flush(self) -> None:
        with self._sending:
            with self._lock:
                ready = self._outgoing.read()
            if ready:
                self._send(ready)

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except BlockingIOError:
            raise TimeoutError(f"nothing could be sent for {self._silence:g} s") from None

    def _more(self) -> None:
        try:
            count = self._socket.recv_into(self._received)
        except BlockingIOError:
            raise TimeoutError(f"nothing came for {self._silence:g} s") from None
        if not count:
            # Not a close of TLS: somebody cut the line.
            raise Closed("the other side closed the connection")
        with self._lock:
            self._incoming.write(self._received[:count])


def _read(tls: ssl.SSLObject, view: memoryview) -> int:
    """`SSLObject.read` into a buffer: the stubs know only its other form."""
    count: Any = tls.read(view.nbytes, view)  # pyright: ignore[reportArgumentType]
    return int(count)


def _close(connected: socket.socket) -> None:
    # Shutdown wakes a thread that waits in recv; close alone does not.
    with contextlib.suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)
    connected.close()
