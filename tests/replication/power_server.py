"""A disk over NBD with a volatile cache: what was not flushed is gone when this process is killed. See power_rig.

Arguments: socket, image, cache. The image is what lies on the platters. A write goes into the cache only; a flush carries
the cache to the image and empties it. The cache is a file for the sake of the test alone, which may let a part of it
reach the image after the kill: a disk writes back when it likes to, and in any order. One connection, no FUA: the block
layer sends flushes instead.

SIGUSR1 asks it to go dark after as many requests as the file `<cache>.dark` says: it answers no more, says "dark", and
waits to be killed. So a cut meets any request, and whoever waits for that request's answer never gets it.
"""

from __future__ import annotations

import mmap
import os
import signal
import socket
import struct
import sys

RECORD = struct.Struct(">QI")  # offset, length; then the bytes

_OPTION_MAGIC = 0x49484156454F5054  # IHAVEOPT
_REPLY_MAGIC = 0x3E889045565A9
_EXPORT_NAME, _ABORT, _INFO, _GO = 1, 2, 6, 7
_ACK, _IS_INFO, _UNSUPPORTED = 1, 3, 0x80000001
_HAS_FLAGS, _SEND_FLUSH = 1, 4
_REQUEST = struct.Struct(">IHHQQI")
_ANSWER = struct.Struct(">IIQ")
_READ, _WRITE, _DISCONNECT, _FLUSH = range(4)
_EINVAL = 22


class Cached:
    """The platters and the cache before them."""

    def __init__(self, image: str, cache: str) -> None:
        self._image = os.open(image, os.O_RDWR)
        self._cache = os.open(cache, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        self.size = os.fstat(self._image).st_size
        # A private mapping: its own pages where something was written, the image's everywhere else.
        self._seen = mmap.mmap(self._image, self.size, access=mmap.ACCESS_COPY)
        self._waiting: list[tuple[int, bytes]] = []
        self._left: int | None = None  # requests until it goes dark
        signal.signal(signal.SIGUSR1, lambda _, __: self._darken(f"{cache}.dark"))

    def _darken(self, path: str) -> None:
        with open(path) as file:
            self._left = int(file.read())

    def count(self) -> None:
        """A request has come."""
        if self._left is None:
            return
        if self._left > 0:
            self._left -= 1
            return
        print("dark", flush=True)
        while True:
            signal.pause()

    def read(self, offset: int, length: int) -> bytes:
        return self._seen[offset : offset + length]

    def write(self, offset: int, data: bytes) -> None:
        self._seen[offset : offset + len(data)] = data
        self._waiting.append((offset, data))
        os.write(self._cache, RECORD.pack(offset, len(data)) + data)

    def flush(self) -> None:
        for offset, data in self._waiting:
            os.pwrite(self._image, data, offset)
        self._waiting.clear()
        os.ftruncate(self._cache, 0)
        os.lseek(self._cache, 0, os.SEEK_SET)


def negotiate(client: socket.socket, size: int) -> bool:
    """Fixed newstyle. False: the client only asked."""
    client.sendall(b"NBDMAGIC" + struct.pack(">QH", _OPTION_MAGIC, 3))
    (wishes,) = struct.unpack(">I", receive(client, 4))
    export = struct.pack(">QH", size, _HAS_FLAGS | _SEND_FLUSH)
    while True:
        _, option, length = struct.unpack(">QII", receive(client, 16))
        receive(client, length)

        def answer(kind: int, body: bytes = b"", option: int = option) -> None:
            client.sendall(struct.pack(">QIII", _REPLY_MAGIC, option, kind, len(body)) + body)

        if option == _EXPORT_NAME:
            client.sendall(export + bytes(0 if wishes & 2 else 124))
            return True
        if option in (_INFO, _GO):
            answer(_IS_INFO, struct.pack(">H", 0) + export)
            answer(_ACK)
            if option == _GO:
                return True
        elif option == _ABORT:
            answer(_ACK)
            return False
        else:
            answer(_UNSUPPORTED)


def receive(client: socket.socket, length: int) -> bytes:
    data = bytearray(length)
    view = memoryview(data)
    while view:
        done = client.recv_into(view)
        if done == 0:
            raise EOFError
        view = view[done:]
    return bytes(data)


def serve(client: socket.socket, disk: Cached) -> None:
    while True:
        _, _, command, cookie, offset, length = _REQUEST.unpack(receive(client, _REQUEST.size))
        error, body = 0, b""
        disk.count()
        if command == _DISCONNECT:
            return
        if command == _READ:
            body = disk.read(offset, length)
        elif command == _WRITE:
            disk.write(offset, receive(client, length))
        elif command == _FLUSH:
            disk.flush()
        else:
            error = _EINVAL
        client.sendall(_ANSWER.pack(0x67446698, error, cookie) + body)


def main(path: str, image: str, cache: str) -> None:
    disk = Cached(image, cache)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        print("ready", flush=True)
        while True:
            client, _ = listener.accept()
            with client:
                try:
                    if negotiate(client, disk.size):
                        serve(client, disk)
                except (EOFError, ConnectionError):
                    continue


if __name__ == "__main__":
    main(*sys.argv[1:])
