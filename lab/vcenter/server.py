"""HTTPS: `/sdk` and `/folder`. One thread a connection, one write an answer, no Nagle."""

from __future__ import annotations

import contextlib
import logging
import socket
import socketserver
import ssl
import struct
import threading
import time
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from farshore.lab.vcenter import soap
from farshore.lab.vcenter.faults import DropConnectionError, HttpStatusError
from farshore.lab.vcenter.folder import FolderError
from farshore.lab.vcenter.sessions import COOKIE, Session
from farshore.lab.vcenter.vim import MethodFault

if TYPE_CHECKING:
    from farshore.lab.vcenter.service import LabVCenter

log = logging.getLogger(__name__)
HANDSHAKE_TIMEOUT = 60.0
MAX_SOAP = 64 << 20


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """A threading TLS server on loopback; handshakes happen in the connection's thread."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 256

    def __init__(self, port: int, context: ssl.SSLContext, lab: LabVCenter) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.context = context
        self.lab = lab
        self._open: set[socket.socket] = set()
        self._open_lock = threading.Lock()

    def finish_request(self, request: Any, client_address: Any) -> None:
        request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        request.settimeout(HANDSHAKE_TIMEOUT)
        try:
            secured = self.context.wrap_socket(request, server_side=True)
        except (OSError, ssl.SSLError):
            return  # a client that does not speak TLS, or does not trust us
        secured.settimeout(None)
        with self._open_lock:
            self._open.add(secured)
        try:
            Handler(secured, client_address, self)
        finally:
            with self._open_lock:
                self._open.discard(secured)
            with contextlib.suppress(OSError):
                secured.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("connection of %s ended", client_address, exc_info=True)

    def cut_connections(self) -> None:
        """Close every open connection."""
        with self._open_lock:
            victims = list(self._open)
        for victim in victims:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(victim, socket.SHUT_RDWR)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "Farshore-lab"
    sys_version = ""
    wbufsize = -1
    rbufsize = 1 << 16

    def log_message(self, format: str, *args: Any) -> None:
        """The laboratory keeps its own log."""

    @property
    def lab(self) -> LabVCenter:
        return cast(Server, self.server).lab

    def handle_expect_100(self) -> bool:
        self.send_response_only(100)
        self.end_headers()
        self.wfile.flush()  # buffered: without this, client and server wait for each other
        return True

    # ------------------------------------------------------------------ entry points

    def do_POST(self) -> None:
        if urlsplit(self.path).path.rstrip("/") not in ("/sdk", "/sdk/vimService"):
            self._body()
            self._answer(404, b"")
            return
        body = self._body()
        if body is not None:
            self._soap(body)

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        if parts.path == "/sdk/vimServiceVersions.xml":
            self._answer(200, soap.versions_document(), {"Content-Type": "text/xml; charset=utf-8"})
        elif parts.path.startswith("/folder/"):
            self._folder(parts.path, parts.query)
        else:
            self._answer(404, b"")

    do_HEAD = do_GET
    do_PUT = do_GET
    do_DELETE = do_GET

    # ------------------------------------------------------------------ SOAP

    def _soap(self, body: bytes) -> None:
        version = soap.client_version(self.headers.get("SOAPAction", ""))
        headers = {"Content-Type": "text/xml; charset=utf-8", "Cache-Control": "no-cache"}
        status = 200
        calls = self.lab.calls
        calls.begin(self._cookie(), self.headers.get("User-Agent", ""))
        try:
            call, kind, value = self.lab.dispatch(body)
            data = soap.encode(call.name, kind, value, version)
        except DropConnectionError:
            self._drop()
            return
        except HttpStatusError as error:
            self._answer(error.status, b"")
            return
        except MethodFault as fault:
            status, data = 500, self._fault(fault, version)
        except (
            Exception
        ) as error:  # a defect of ours must reach the client as a fault, never as a dropped connection
            log.exception("SOAP call failed")
            status, data = 500, self._fault(soap.system_error(f"{type(error).__name__}: {error}"), version)
        finally:
            calls.end()
        if calls.set_cookie:
            headers["Set-Cookie"] = f'{COOKIE}="{calls.set_cookie}"; Path=/; HttpOnly; Secure; '
        self._answer(status, data, headers)

    def _fault(self, fault: Any, version: Any) -> bytes:
        try:
            return soap.encode_fault(fault, version)
        except Exception as error:  # a fault that does not fit the schema still has to become one
            log.exception("fault %r cannot be serialised", fault)
            return soap.encode_fault(soap.system_error(f"{type(fault).__name__}: {error}"), version)

    # ------------------------------------------------------------------ /folder

    def _folder(self, path: str, query: str) -> None:
        lab = self.lab
        begin = time.monotonic()
        machine = lab.folder.machine_of(path, query)
        target = machine.name if machine else None
        status = 0
        session = lab.sessions.find(self._cookie(), use=lab.settings.http_counts_as_use)
        try:
            if session is None:
                self.close_connection = self.command in ("PUT", "POST")
                status = 401
                self._answer(401, b"", {"WWW-Authenticate": 'Basic realm="VMware HTTP server"'})
                return
            denied = lab.denied("Datastore.FileManagement", machine, self.command) if machine else None
            if denied is not None:
                raise FolderError(403, "Forbidden")
            status = self._folder_transfer(path, query, target, machine.moid if machine else None, session)
        except FolderError as error:
            status = error.status
            self.close_connection = self.close_connection or self.command == "PUT"
            self._answer(status, error.text.encode(), {"Content-Type": "text/plain", **error.headers})
        finally:
            lab.record(self.command, path, target=target, session=session, outcome=str(status), begin=begin)

    def _folder_transfer(
        self, path: str, query: str, target: str | None, moid: str | None, session: Session
    ) -> int:
        lab = self.lab
        rule = lab.faults.match("folder", self.command, target, moid)
        if rule is not None:
            if rule.delay:
                time.sleep(rule.delay)
            if rule.action == "drop":
                self._drop()
                return 0
            if rule.action == "status":
                raise FolderError(rule.status, "Fault rule")
        if self.command == "PUT":
            status = lab.folder.put(path, query, int(self.headers.get("Content-Length", 0)), self.rfile.read)
            self._answer(status, b"")
            return status
        if self.command == "DELETE":
            status = lab.folder.delete(path, query)
            self._answer(status, b"")
            return status
        reply = lab.folder.open(path, query, self.headers.get("Range"))
        self._head(reply.status, {**reply.headers, "Content-Length": str(reply.length)})
        if self.command == "HEAD":
            self.wfile.flush()
            return reply.status
        self.wfile.flush()
        session.waiting += 1
        try:
            complete = lab.folder.send(reply, self.connection.sendall, rule)
        finally:
            session.waiting -= 1
        if not complete:
            if rule is not None and rule.action == "short":
                self.close_connection = True
            else:
                self._drop()
        return reply.status

    # ------------------------------------------------------------------ details

    def _cookie(self) -> str | None:
        try:
            morsel = SimpleCookie(self.headers.get("Cookie", "")).get(COOKIE)
        except CookieError:
            return None
        return morsel.value.strip('"') if morsel else None

    def _body(self) -> bytes | None:
        """The request's body, chunked or not; None after an answer that refuses it."""
        try:
            if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
                parts: list[bytes] = []
                total = 0
                while size := int(self.rfile.readline(1024).split(b";")[0], 16):
                    total += size
                    if total > MAX_SOAP:
                        raise ValueError("too long")
                    parts.append(self.rfile.read(size))
                    self.rfile.readline(1024)
                while self.rfile.readline(65536).strip():
                    pass  # trailers
                return b"".join(parts)
            length = int(self.headers.get("Content-Length", 0))
            if length > MAX_SOAP:
                raise ValueError("too long")
            return self.rfile.read(length)
        except ValueError:
            self.close_connection = True
            self._answer(400, b"")
            return None

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        closing = {"Connection": "close"} if self.close_connection else {}
        self._head(status, {**(headers or {}), **closing, "Content-Length": str(len(data))})
        if self.command != "HEAD":
            self.wfile.write(data)
        self.wfile.flush()

    def _drop(self) -> None:
        """Cut the connection as a broken network would: a reset, no answer."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            socket.socket.shutdown(self.connection, socket.SHUT_RDWR)
