"""One agent over mutual TLS. Blocking, for many threads: each call borrows a connection.

A call that is safe to repeat (all are) is repeated on a fresh connection when an idle one proves dead. Reads go on where
they were cut, also across connections: a cut does not change.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import ssl
import threading
import time
from collections.abc import Generator, Mapping
from typing import Any
from urllib.parse import quote, urlencode

from farshore.domain.errors import Code, FarshoreError
from farshore.providers.physical.agent import wire
from farshore.providers.physical.errors import NETWORK_ERRORS, AgentRefused, classify
from farshore.providers.physical.settings import PhysicalSettings


class AgentClient:
    """See the module. Raises AgentRefused for the agent's own answers, FarshoreError for everything else."""

    def __init__(self, settings: PhysicalSettings) -> None:
        self._settings = settings
        self._idle: queue.SimpleQueue[http.client.HTTPSConnection] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._context: ssl.SSLContext | None = None
        self._lock = threading.Lock()

    @property
    def subject(self) -> str:
        return self._settings.host

    # -- calls ---------------------------------------------------------------------------------------------------

    def call(
        self,
        method: str,
        path: str,
        *,
        doing: str,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> Any:
        """A JSON answer. SourceUnreachable, AccessDenied, ConfigurationInvalid; AgentRefused."""
        for attempt in (1, 2):
            try:
                with self._connection(timeout) as connection:
                    self._ask(connection, method, path, query, body)
                    response = connection.getresponse()
                    data = response.read()
                    return _answer(response, data)
            except NETWORK_ERRORS as error:
                # A connection that the agent closed while it was idle fails at once; a second one is fresh.
                if attempt == 2 or isinstance(error, ssl.SSLCertVerificationError):
                    raise classify(error, doing=doing, subject=self.subject) from error
        raise AssertionError

    def read(self, path: str, query: Mapping[str, str], offset: int, length: int, *, doing: str) -> bytes:
        """Exactly `length` octets, resumed where a connection broke. FarshoreError; AgentRefused."""
        data = bytearray(length)
        done, tries = 0, 0
        while done < length:
            part = min(length - done, self._settings.read_chunk)
            before = done
            try:
                with self._connection(None) as connection:
                    wanted = {**query, "offset": str(offset + done), "length": str(part)}
                    self._ask(connection, "GET", path, wanted, None)
                    response = connection.getresponse()
                    if response.status != 200:
                        _answer(response, response.read())
                    for got in _octets(response, memoryview(data)[done : done + part]):
                        done += got
                tries = 0
            except NETWORK_ERRORS as error:
                tries = 1 if done > before else tries + 1
                # Whole sectors only: what came of a broken answer is kept as far as the agent can go on from.
                done -= (done - before) % 65536 if done > before else 0
                if tries >= self._settings.read_tries or self._closed.is_set():
                    raise classify(error, doing=doing, subject=self.subject) from error
                # A network that is away: doubled from try to try.
                time.sleep(min(self._settings.read_retry_delay * 2 ** (tries - 1), 15.0))
        return bytes(data)

    # -- connections ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _connection(self, timeout: float | None) -> Generator[http.client.HTTPSConnection]:
        if self._closed.is_set():
            raise FarshoreError(Code.SOURCE_UNREACHABLE, "The connection to the agent was closed.")
        try:
            connection = self._idle.get_nowait()
        except queue.Empty:
            connection = http.client.HTTPSConnection(
                self._settings.host,
                self._settings.port,
                timeout=self._settings.connect_timeout,
                context=self._tls(),
            )
        try:
            if connection.sock is None:
                connection.connect()
            if connection.sock is not None:
                connection.sock.settimeout(timeout or self._settings.call_timeout)
            yield connection
        except AgentRefused:
            self._idle.put(connection)  # an answer was read in full
            raise
        except BaseException:
            connection.close()
            raise
        if self._closed.is_set():
            connection.close()
        else:
            self._idle.put(connection)

    def _ask(
        self,
        connection: http.client.HTTPSConnection,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: Mapping[str, Any] | None,
    ) -> None:
        target = f"/v{wire.PROTOCOL}/{path}" + (f"?{urlencode(query)}" if query else "")
        data = json.dumps(body or {}).encode() if method == "POST" else None
        connection.request(method, target, body=data)

    def _tls(self) -> ssl.SSLContext:
        with self._lock:
            if self._context is None:
                try:
                    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                    context.minimum_version = ssl.TLSVersion.TLSv1_2
                    context.load_verify_locations(self._settings.ca_file)
                    context.load_cert_chain(self._settings.certificate_file, self._settings.key_file)
                except (OSError, ssl.SSLError) as error:
                    raise FarshoreError(
                        Code.CONFIGURATION_INVALID, f"The certificates for the agent cannot be used: {error}."
                    ) from error
                self._context = context
            return self._context

    def close(self) -> None:
        self._closed.set()
        while True:
            try:
                self._idle.get_nowait().close()
            except queue.Empty:
                return


def escaped(name: str) -> str:
    """A name as one piece of a path."""
    return quote(name, safe="")


def _octets(response: http.client.HTTPResponse, into: memoryview) -> Generator[int]:
    """Fill `into` and tell the progress; a short answer is a broken one."""
    zeros = response.getheader(wire.ZEROS)
    if zeros is not None:
        response.read()
        if int(zeros) != len(into):
            raise http.client.HTTPException("the answer has another length than was asked for")
        into[:] = bytes(len(into))
        yield len(into)
        return
    if response.length != len(into):
        raise http.client.HTTPException("the answer has another length than was asked for")
    done = 0
    while done < len(into):
        got = response.readinto(into[done : done + (1 << 20)])
        if got == 0:
            raise http.client.IncompleteRead(b"", len(into) - done)
        done += got
        yield got
    response.read()  # the connection is free again only now


def _answer(response: http.client.HTTPResponse, data: bytes) -> Any:
    try:
        answer = json.loads(data)
    except ValueError as error:
        raise http.client.HTTPException(f"status {response.status} without JSON") from error
    if response.status == 200:
        return answer
    if not isinstance(answer, dict) or "code" not in answer:
        raise http.client.HTTPException(f"status {response.status} without a code")
    raise AgentRefused(str(answer["code"]), str(answer.get("message", "")), answer.get("details") or {})
