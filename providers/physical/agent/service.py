"""The agent's door: HTTP over mutual TLS. A client needs a certificate of the CA *and* a name that is allowed.

One thread a connection; each call is short but a cut. While file systems are frozen nothing is logged from here.
"""

from __future__ import annotations

import json
import logging
import socket
import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from farshore.providers.physical.agent import wire
from farshore.providers.physical.agent.blocks import Blocks
from farshore.providers.physical.agent.config import Config
from farshore.providers.physical.agent.core import Agent, Refused
from farshore.providers.physical.agent.cuts import CutFailed, SeedNeeded
from farshore.providers.physical.agent.holding import ReadFailed
from farshore.providers.physical.agent.tracking import NotKnown

SILENCE = 120.0  # seconds without a word until a connection is closed
_BODY = 1 << 20

log = logging.getLogger(__name__)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = SILENCE
    disable_nagle_algorithm = True

    def setup(self) -> None:
        # The handshake belongs to this connection's thread: a silent client must not hold up the door.
        self.request.settimeout(10.0)
        self.request.do_handshake()
        self.request.settimeout(SILENCE)
        super().setup()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_DELETE(self) -> None:
        self._serve()

    def log_message(self, format: str, *args: Any) -> None:
        return None  # a line in the journal is a write: never while something may be frozen

    # -- one request ---------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            body = self._body()
            self._allowed()
            answer = self._route(body)
        except Refused as error:
            self._error(error.code, str(error), error.details)
        except NotKnown as error:
            self._error("not-known", error.reason, {})
        except CutFailed as error:
            self._error(error.code, str(error), {})
        except SeedNeeded as error:
            self._error(
                "seed-needed", str(error), {"needed": error.needed, "bases": error.bases, "room": error.room}
            )
        except ReadFailed as error:
            self._error("read-failed", str(error), {})
        except (BrokenPipeError, ConnectionError, TimeoutError):
            self.close_connection = True
        except Exception as error:  # the border: the client gets an answer whatever happens, and we live on
            log.exception("%s %s failed", self.command, self.path)
            self._error("internal", f"{type(error).__name__}: {error}", {})
        else:
            if isinstance(answer, bytes):
                self._octets(answer)
            else:
                self._send(200, json.dumps(answer).encode(), "application/json")

    def _allowed(self) -> None:
        certificate = self.request.getpeercert() or {}
        names = [
            value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"
        ]
        if not set(names) & set(self.server.config.clients):
            raise Refused(
                "forbidden", f"{', '.join(names) or 'A client without a name'} may not use this agent."
            )

    def _body(self) -> dict[str, Any]:
        length = int(self.headers.get("Content-Length") or 0)
        if length > _BODY:
            self.close_connection = True
            raise Refused("bad-request", "The request is too long.")
        raw = self.rfile.read(length) if length else b"{}"
        try:
            data = json.loads(raw)
        except ValueError as error:
            raise Refused("bad-request", f"The request is no JSON: {error}.") from error
        if not isinstance(data, dict):
            raise Refused("bad-request", "The request is no JSON object.")
        return {str(key): value for key, value in data.items()}

    def _route(self, body: dict[str, Any]) -> Any:
        agent = self.server.agent
        parts = urlsplit(self.path)
        path = tuple(unquote(piece) for piece in parts.path.strip("/").split("/"))
        query = {key: values[-1] for key, values in parse_qs(parts.query, keep_blank_values=True).items()}
        match (self.command, *path):
            case ("GET", "v1", "machine"):
                return {"protocol": wire.PROTOCOL, **agent.inventory()}
            case ("GET", "v1", "status"):
                return agent.status()
            case ("POST", "v1", "cuts"):
                return self._cut(body)
            case ("GET", "v1", "cuts", name, "changed"):
                return _runs(agent.changed(name, _text(query, "disk"), _text(query, "since")))
            case ("GET", "v1", "cuts", name, "held"):
                return _runs(agent.held(name, _text(query, "disk")))
            case ("GET", "v1", "cuts", name, "bytes"):
                return agent.read(name, _text(query, "disk"), *_range(query))
            case ("DELETE", "v1", "cuts", name):
                agent.release(name)
                return {}
            case ("POST", "v1", "reap"):
                return {"released": agent.reap(_text(body, "upto"))}
            case ("POST", "v1", "seeds"):
                return {"marks": agent.seed_mark()}
            case ("GET", "v1", "seeds", "changed"):
                return _runs(
                    agent.seed_changed(_text(query, "disk"), _text(query, "since"), _text(query, "until"))
                )
            case ("GET", "v1", "live"):
                return agent.read_live(_text(query, "disk"), *_range(query))
            case _:
                raise Refused("not-found", f"{self.command} {parts.path} is nothing this agent knows.")

    def _cut(self, body: dict[str, Any]) -> dict[str, Any]:
        agent = self.server.agent
        bases = body.get("bases", {})
        if not isinstance(bases, dict):
            raise Refused("bad-request", "bases is no JSON object.")
        cut = agent.cut(
            _text(body, "name"), _text(body, "want"), {str(key): str(value) for key, value in bases.items()}
        )
        boot = {disk.key for disk in agent.config.disks if disk.boot}
        return {
            "name": cut.name,
            "taken_at": cut.taken_at.isoformat(),
            "consistency": cut.label,
            "evidence": cut.evidence,
            "kept_bytes": cut.spool.bytes,
            "disks": [
                {
                    "key": disk.key,
                    "path": disk.device.path,
                    "size": disk.device.size,
                    "identity": disk.device.identity,
                    "tracker": disk.mark,
                    "boot": disk.key in boot,
                    "full": disk.full,
                }
                for disk in cut.disks.values()
            ],
        }

    # -- answers -------------------------------------------------------------------------------------------------

    def _octets(self, data: bytes) -> None:
        if data.count(0) == len(data):
            self.send_response(200)
            self.send_header(wire.ZEROS, str(len(data)))
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._send(200, data, "application/octet-stream")

    def _error(self, code: str, message: str, details: dict[str, Any]) -> None:
        answer = json.dumps({"code": code, "message": message, "details": details}).encode()
        try:
            self._send(wire.STATUS.get(code, 500), answer, "application/json")
        except OSError:
            self.close_connection = True

    def _send(self, status: int, data: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(ThreadingHTTPServer):
    """Listens at once; `serve_forever` serves."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, config: Config, agent: Agent) -> None:
        self.config, self.agent = config, agent
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._tls = tls(config)
        super().__init__((config.listen, config.port), _Handler)

    def get_request(self) -> tuple[Any, Any]:
        connection, address = super().get_request()
        wrapped = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        with self._lock:
            self._connections.add(wrapped)
        return wrapped, address

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        return None  # handshakes of strangers fail all day

    def drop_connections(self) -> None:
        """Cut all connections, as a stop of the agent does."""
        with self._lock:
            held = list(self._connections)
        for connection in held:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


def tls(config: Config) -> ssl.SSLContext:
    """TLS 1.2 or newer; a client certificate of our CA, made for clients, is required."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(config.certificate, config.key)
    context.load_verify_locations(config.ca)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def serve(config: Config, agent: Agent, ready: Callable[[str, int], None]) -> None:
    """Serve until `Server.shutdown` of the returned server is called from another thread; `ready` gets the address."""
    server = Server(config, agent)
    try:
        ready(*server.server_address[:2])  # pyright: ignore[reportArgumentType]
        server.serve_forever(poll_interval=0.2)
    finally:
        server.server_close()


def _runs(blocks: Blocks) -> list[list[int]]:
    return [[offset, length] for offset, length in blocks.runs()]


def _text(values: dict[str, Any], key: str) -> str:
    value = values.get(key)
    if not isinstance(value, str):
        raise Refused("bad-request", f"{key} is missing.")
    return value


def _range(query: dict[str, Any]) -> tuple[int, int]:
    try:
        offset, length = int(_text(query, "offset")), int(_text(query, "length"))
    except ValueError:
        raise Refused("bad-request", "offset and length are numbers.") from None
    if not 0 < length <= wire.LONGEST:
        raise Refused("bad-request", f"length is between 1 and {wire.LONGEST}.")
    return offset, length
