"""Byte ranges out of the datastore browser: `GET /folder/<path>?dcPath=…&dsName=…` with `Range`.

Exactly the bytes that were asked for, or an error: an answer is used only if it is 206, its Content-Range names the
asked range, and its body has the asked length. Anything else is tried again a few times and then fails the read.
Sources: "vSphere Web Services SDK Programming Guide", datastore access by HTTP; the behaviour of locked files (500) as
other products saw it on ESXi 7.0.3 and 8.0.1.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Generator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from urllib.parse import quote

from farshore.domain.errors import Code, FarshoreError
from farshore.providers.vsphere.client import Client
from farshore.providers.vsphere.errors import classify
from farshore.providers.vsphere.transport import PinnedConnection

_RANGE = re.compile(r"^bytes (\d+)-(\d+)/(\d+|\*)$")
_DRAIN = 64 * 1024  # bytes of an unwanted body that are read to keep a connection
IDLE = 20.0  # seconds after which a kept connection is not trusted any more

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a file is."""

    datacenter: str  # inventory path with folders
    datastore: str
    path: str  # "dir/file", without the datastore

    def __str__(self) -> str:
        return f"[{self.datastore}] {self.path}"

    def sibling(self, name: str) -> Place:
        """A file named relative to this one's folder."""
        folder = self.path.rpartition("/")[0]
        return Place(self.datacenter, self.datastore, f"{folder}/{name}" if folder else name)

    @staticmethod
    def parse(datacenter: str, file_name: str) -> Place:
        """From a backing's `[datastore] dir/file`."""
        match = re.fullmatch(r"\[([^\]]+)\] ?(.+)", file_name)
        if match is None:
            raise ValueError(f"{file_name!r} is not a datastore path")
        return Place(datacenter, match[1], match[2])


class _Refused(Exception):
    """One try of a range failed; `final` when another try cannot help."""

    def __init__(self, text: str, *, final: bool = False) -> None:
        super().__init__(text)
        self.final = final


class _Unauthenticated(Exception):
    """401: the session ended."""


class Folder:
    """The datastore browser of one vCenter: few connections, kept alive, shared by all machines of the site."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._settings = client.settings
        self._slots = threading.BoundedSemaphore(self._settings.max_connections)
        self._lock = threading.Lock()
        self._idle: list[tuple[PinnedConnection, float]] = []
        self._pool = ThreadPoolExecutor(self._settings.max_connections, thread_name_prefix="vsphere-read")
        self._closed = False

    def text(self, place: Place, *, subject: str, limit: int = 64 * 1024) -> str:
        """A small text file (a disk descriptor). SourceReadFailed when it is larger than `limit` bytes."""
        return self._tried(place, None, limit, subject).decode("utf-8", errors="replace")

    def read(self, place: Place, offset: int, length: int, *, subject: str) -> bytes:
        """Exactly `length` bytes of a file; long ranges are split and read on several connections."""
        step = self._settings.read_chunk
        if length <= step:
            return self._tried(place, offset, length, subject) if length else b""
        parts = [
            (start, min(step, offset + length - start)) for start in range(offset, offset + length, step)
        ]
        jobs: list[Future[bytes]] = []
        try:
            for start, size in parts:
                jobs.append(self._pool.submit(self._tried, place, start, size, subject))
            return b"".join(job.result() for job in jobs)
        except (RuntimeError, CancelledError) as exc:  # the site was closed meanwhile
            raise FarshoreError(
                Code.SOURCE_READ_FAILED,
                f"The connection to vCenter was closed while reading {place}.",
                subject=subject,
            ) from exc
        finally:
            for job in jobs:
                job.cancel()

    def close(self) -> None:
        """Close idle connections; reads that still run end by themselves. Idempotent."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection, _ in idle:
            connection.close()

    # -- one range, several tries --------------------------------------------------------------------------------

    def _tried(self, place: Place, offset: int | None, length: int, subject: str) -> bytes:
        settings = self._settings
        what = f"reading {place}" if offset is None else f"reading {place} at {offset}+{length}"
        delay, renewals, last = settings.read_retry_delay, 0, ""
        tries = 0
        while tries < settings.read_tries:
            tries += 1
            seen = self._client.ensure_login()
            try:
                return self._once(place, offset, length)
            except _Unauthenticated:
                renewals += 1
                if renewals > 2:
                    raise FarshoreError(
                        Code.SOURCE_READ_FAILED,
                        f"vCenter refuses the session while {what}, although login works.",
                        subject=subject,
                    ) from None
                self._client.renew(seen)
                tries -= 1  # a session that ended says nothing about the file
                continue
            except _Refused as exc:
                last = str(exc)
                if exc.final:
                    break
            except (OSError, HTTPException) as exc:
                reported = classify(exc, doing=what, subject=subject)
                unanswered = isinstance(
                    exc, (ConnectionRefusedError, TimeoutError)
                )  # dead, not ill: give up sooner
                if not reported.retryable or (unanswered and tries >= 2) or tries >= settings.read_tries:
                    raise reported from exc
                last = reported.info.message
            if tries < settings.read_tries:
                log.info("%s: try %d of %d failed: %s", what, tries, settings.read_tries, last)
                time.sleep(delay)
                delay *= 2
        raise FarshoreError(
            Code.SOURCE_READ_FAILED,
            f"Giving up {what} after {tries} tries: {last}.",
            subject=subject,
            details={"file": str(place)},
        )

    def _once(self, place: Place, offset: int | None, length: int) -> bytes:
        headers = {"Cookie": self._client.cookie(), "Accept-Encoding": "identity"}
        if offset is not None:
            headers["Range"] = f"bytes={offset}-{offset + length - 1}"
        with self._connection() as connection:
            connection.request("GET", self._url(place), headers=headers)
            with connection.getresponse() as answer:
                if offset is None:
                    return self._whole(answer, length)
                return self._range(answer, offset, length)

    def _range(self, answer: HTTPResponse, offset: int, length: int) -> bytes:
        if answer.status != 206:
            self._fail(answer)
        named = _RANGE.match(answer.headers.get("Content-Range", ""))
        if named is None or (int(named[1]), int(named[2])) != (offset, offset + length - 1):
            raise _Refused(f"the answer is for another range ({answer.headers.get('Content-Range')})")
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise _Refused("the answer is encoded, which was not asked for")
        if answer.length is not None and answer.length != length:
            raise _Refused(f"the answer announces {answer.length} bytes instead of {length}")
        body = bytearray(length)
        view = memoryview(body)
        have = 0
        while have < length:
            count = answer.readinto(view[have:])
            if not count:
                raise _Refused(f"the answer ended after {have} of {length} bytes")
            have += count
        if answer.read(1):
            raise _Refused(f"the answer is longer than {length} bytes")
        return bytes(body)

    def _whole(self, answer: HTTPResponse, limit: int) -> bytes:
        if answer.status != 200:
            self._fail(answer)
        body = answer.read(limit + 1)
        if len(body) > limit:
            raise _Refused(f"the file is larger than {limit} bytes", final=True)
        if answer.length:
            raise _Refused(f"the answer ended {answer.length} bytes early")
        return body

    def _fail(self, answer: HTTPResponse) -> None:
        status = answer.status
        if answer.length is not None and answer.length <= _DRAIN:
            answer.read()  # the connection can be kept
        match status:
            case 401:
                raise _Unauthenticated
            case 403:
                raise FarshoreError(
                    Code.ACCESS_DENIED,
                    f"{self._settings.user} may not read files of the datastore (403).",
                    causes=("The role lacks Datastore.Browse or Datastore.FileManagement.",),
                )
            case 404:
                raise _Refused("there is no such file (404)", final=True)
            case 416:
                raise _Refused("the file is shorter than the disk (416)", final=True)
            case 500:
                raise _Refused("the file is locked (500): the machine itself or another program has it open")
            case 503:
                raise _Refused("the server has no session or connection left (503)")
            case 200:
                raise _Refused("the server ignored the range (200)")
            case _:
                raise _Refused(f"HTTP {status} {answer.reason}")

    def _url(self, place: Place) -> str:
        def enc(text: str) -> str:
            once = quote(text, safe="")
            return quote(once, safe="") if self._settings.encode_twice else once

        return f"/folder/{quote(place.path, safe='/')}?dcPath={enc(place.datacenter)}&dsName={enc(place.datastore)}"

    @contextmanager
    def _connection(self) -> Generator[PinnedConnection]:
        """A connection that goes back to the others only when its answer was read to the end."""
        settings = self._settings
        with self._slots:
            connection = self._take() or PinnedConnection(
                settings.host, settings.port, settings=settings, context=self._client.tls
            )
            keep = False
            try:
                yield connection
                keep = True
            except _Unauthenticated:
                keep = True
                raise
            finally:
                with self._lock:
                    keep = keep and not self._closed and connection.sock is not None
                    if keep:
                        self._idle.append((connection, time.monotonic()))
                if not keep:
                    connection.close()

    def _take(self) -> PinnedConnection | None:
        while True:
            with self._lock:
                if not self._idle:
                    return None
                connection, since = self._idle.pop()
            if time.monotonic() - since < IDLE:
                return connection
            connection.close()
