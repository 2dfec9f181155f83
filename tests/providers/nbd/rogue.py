"""An NBD server in a thread that can misbehave in one chosen way. Written from the protocol, not from the client."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

OPTION_REPLY = 0x0003E889045565A9
ACK, INFO, META = 1, 3, 4
NONE, DATA, HOLE, STATUS, ERROR = 0, 1, 2, 5, 32769


@dataclass(frozen=True)
class Asked:
    command: int
    cookie: int
    offset: int
    length: int


class Hang(Exception):
    """The server stops answering and keeps the connection."""


class HangUp(Exception):
    """The server closes the connection."""


def chunk(
    kind: int, cookie: int, body: bytes = b"", *, done: bool = False, length: int | None = None
) -> bytes:
    size = len(body) if length is None else length
    return struct.pack(">IHHQI", 0x668E33EF, int(done), kind, cookie, size) + body


def data(cookie: int, offset: int, body: bytes, *, done: bool = False) -> bytes:
    return chunk(DATA, cookie, struct.pack(">Q", offset) + body, done=done)


def hole(cookie: int, offset: int, length: int, *, done: bool = False) -> bytes:
    return chunk(HOLE, cookie, struct.pack(">QI", offset, length), done=done)


def simple(cookie: int, body: bytes = b"", error: int = 0) -> bytes:
    return struct.pack(">IIQ", 0x67446698, error, cookie) + body


def error(cookie: int, number: int, text: str = "", *, done: bool = True) -> bytes:
    said = text.encode()
    return chunk(ERROR, cookie, struct.pack(">IH", number, len(said)) + said, done=done)


def option_reply(option: int, kind: int, body: bytes = b"", *, magic: int = OPTION_REPLY) -> bytes:
    return struct.pack(">QIII", magic, option, kind, len(body)) + body


Answers = Callable[["RogueServer", list[Asked]], Iterable[bytes]]


def honest(server: RogueServer, batch: list[Asked]) -> Iterable[bytes]:
    for asked in batch:
        if asked.command == 7:
            runs = struct.pack(">III", 1, asked.length, 0)
            yield chunk(STATUS, asked.cookie, runs, done=True)
        else:
            body = server.body[asked.offset : asked.offset + asked.length]
            if server.structured:
                yield data(asked.cookie, asked.offset, body, done=True)
            else:
                yield simple(asked.cookie, body)


class RogueServer:
    """Serves `body`. `answers` turns a batch of requests into bytes; `option` may replace the reply to an option."""

    def __init__(
        self,
        path: str,
        body: bytes,
        *,
        answers: Answers = honest,
        batch: int = 1,
        structured: bool = True,
        greeting: bytes = b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3),
        option: Callable[[int, bytes], bytes | None] = lambda number, payload: None,
        flags: int = 3,
    ) -> None:
        self.path, self.body, self.answers, self.batch = path, body, answers, batch
        self.structured, self.greeting, self.option, self.flags = structured, greeting, option, flags
        self.accepted = 0
        self._clients: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(8)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            self._clients.append(client)
            threading.Thread(target=self._talk, args=(client,), daemon=True).start()

    def _talk(self, client: socket.socket) -> None:
        hang = False
        with contextlib.suppress(OSError, HangUp, EOFError):
            try:
                client.sendall(self.greeting)
                self._haggle(client)
                self._transmit(client)
            except Hang:
                hang = True
        if not hang:
            client.close()

    def _haggle(self, client: socket.socket) -> None:
        _exactly(client, 4)
        while True:
            _, option, length = struct.unpack(">QII", _exactly(client, 16))
            payload = _exactly(client, length)
            instead = self.option(option, payload)
            if instead is not None:
                client.sendall(instead)
                continue
            if option == 8:
                client.sendall(option_reply(option, ACK if self.structured else 0x80000001))
            elif option == 10:
                reply = option_reply(option, META, struct.pack(">I", 1) + b"base:allocation")
                client.sendall(reply + option_reply(option, ACK))
            elif option == 7:
                info = struct.pack(">HQH", 0, len(self.body), self.flags)
                client.sendall(option_reply(option, INFO, info) + option_reply(option, ACK))
                return
            else:
                client.sendall(option_reply(option, 0x80000001))

    def _transmit(self, client: socket.socket) -> None:
        waiting: list[Asked] = []
        while True:
            _, _, command, cookie, offset, length = struct.unpack(">IHHQQI", _exactly(client, 28))
            if command == 2:
                return
            waiting.append(Asked(command, cookie, offset, length))
            if len(waiting) >= self.batch or command == 7:
                for piece in self.answers(self, waiting):
                    client.sendall(piece)
                waiting = []

    def close(self) -> None:
        self._listener.close()
        for client in self._clients:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
            client.close()


def _exactly(client: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        more = client.recv(count - len(found))
        if not more:
            raise EOFError
        found += more
    return found
