"""The control API's server: `POST /control/<operation>` with a JSON object, on a port of its own, loopback only."""

from __future__ import annotations

import json
import logging
import socketserver
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any, cast

from farshore.lab.vcenter.operations import Operations
from farshore.lab.vcenter.vim import MethodFault, support

if TYPE_CHECKING:
    from farshore.lab.vcenter.service import LabVCenter

log = logging.getLogger(__name__)


class ControlServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, port: int, lab: LabVCenter) -> None:
        super().__init__(("127.0.0.1", port), ControlHandler)
        self.operations = Operations(lab)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("control connection ended", exc_info=True)


class ControlHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """Not logged."""

    def do_GET(self) -> None:
        self._run({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            arguments = json.loads(body or b"{}")
        except json.JSONDecodeError as error:
            self._answer(400, {"error": f"not JSON: {error}"})
            return
        if not isinstance(arguments, dict):
            self._answer(400, {"error": "a JSON object is expected"})
            return
        self._run(cast(dict[str, Any], arguments))

    def _run(self, arguments: dict[str, Any]) -> None:
        operations = cast(ControlServer, self.server).operations
        name = self.path.removeprefix("/control/")
        function = None if name.startswith("_") else getattr(operations, name, None)
        if function is None or not self.path.startswith("/control/"):
            self._answer(404, {"error": f"no operation {name!r}"})
            return
        try:
            self._answer(200, {"result": function(**arguments)})
        except (ValueError, TypeError, KeyError) as error:
            self._answer(400, {"error": f"{error}"})
        except MethodFault as fault:
            self._answer(400, {"error": fault.msg, "fault": support.GetWsdlName(type(fault))})
        except Exception as error:  # the test has to see what broke, not a closed connection
            log.exception("control operation %s failed", name)
            self._answer(500, {"error": f"{type(error).__name__}: {error}"})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()
