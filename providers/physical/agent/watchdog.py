"""The process that thaws when nobody else does. Run by `freeze.Watchdog`; standard library only, alone in its file.

It gets descriptors of the frozen file systems over a socket *before* anything is frozen, and thaws all of them when its
owner dies (the socket ends), when the time is over, or when it is told so. It runs nothing, opens nothing and logs
nothing while it is armed: each of that can block on a frozen root. Every thaw has a thread of its own, because a thaw
waits while a freeze of the same file system is under way. A thaw of what is not frozen answers EINVAL: no harm.

Words on the socket, one JSON object a message: {"arm": seconds} with descriptors → {"armed": n}; {"disarm": true} →
{"fired": bool}, where fired says that the watchdog thawed by itself since it was armed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import sys
import threading
import time

FITHAW = 0xC0045878
MOST = 250  # descriptors of one message (the kernel takes 253)


def thaw(descriptors: list[int]) -> None:
    """Thaw all, each in its own thread; returns when all are done."""

    def one(descriptor: int) -> None:
        with contextlib.suppress(OSError):
            fcntl.ioctl(descriptor, FITHAW, 0)

    threads = [threading.Thread(target=one, args=(d,), daemon=True) for d in descriptors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def serve(channel: socket.socket) -> None:
    """Until the owner closes the channel."""
    held: list[int] = []
    deadline: float | None = None
    fired = False
    waiter = select.poll()  # select() takes no descriptor above 1023
    waiter.register(channel, select.POLLIN)
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000  # ms
        if not waiter.poll(left):
            thaw(held)
            deadline, fired = None, True
            continue
        try:
            message, descriptors, _, _ = socket.recv_fds(channel, 4096, MOST)
        except OSError:
            message, descriptors = b"", []
        if not message:
            thaw(held)  # also when nothing is armed: it costs nothing
            return
        order = json.loads(message)
        for descriptor in held:
            os.close(descriptor)
        if "arm" in order:
            held, fired = descriptors, False
            deadline = time.monotonic() + float(order["arm"])
            channel.send(json.dumps({"armed": len(held)}).encode())
        else:
            held, deadline = [], None
            channel.send(json.dumps({"fired": fired}).encode())


def main() -> None:
    # A Ctrl-C or a stop of the service reaches the whole group: the owner ends us by closing the channel.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
