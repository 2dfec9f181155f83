"""Range reads hand out exactly the right bytes or fail, whatever the server does in the middle of an answer."""

from __future__ import annotations

import itertools
import socket
import ssl
import threading
import time
from contextlib import closing, suppress

import pytest

from farshore.domain.errors import Code, FarshoreError
from farshore.lab import tls
from farshore.providers.vsphere.folder import Folder, Place
from farshore.providers.vsphere.settings import VSphereSettings
from farshore.providers.vsphere.transport import tls_context

DATA = bytes(itertools.islice(itertools.cycle(range(251)), 300_000))
PLACE = Place("Europe/DC 0", "ds+1", "web 1/web-flat.vmdk")
GOOD = "good"


class Server:
    """An HTTPS server that follows a script: one entry an answer, then good answers for ever."""

    def __init__(self, root, *script):
        self.script = list(script)
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.connections = 0
        self.busy = self.most_busy = 0
        self.pause = 0.0
        self._lock = threading.Lock()
        self._context = tls.server_context(root)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        with suppress(OSError):  # wakes the thread in accept, which would take one more connection otherwise
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def _accept(self):
        while True:
            try:
                raw, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(raw,), daemon=True).start()

    def _serve(self, raw):
        try:
            with self._context.wrap_socket(raw, server_side=True) as sock:
                with self._lock:
                    self.connections += 1
                file = sock.makefile("rb")
                while line := file.readline():
                    path = line.decode().split(" ")[1]
                    headers = {}
                    while (header := file.readline().decode().strip()) != "":
                        name, _, value = header.partition(": ")
                        headers[name.lower()] = value
                    with self._lock:
                        self.requests.append((path, headers))
                        action = self.script.pop(0) if self.script else GOOD
                        self.busy += 1
                        self.most_busy = max(self.busy, self.most_busy)
                    time.sleep(self.pause)
                    try:
                        if not self._answer(sock, headers, action):
                            return
                    finally:
                        with self._lock:
                            self.busy -= 1
        except (OSError, ssl.SSLError):
            return  # the client hung up

    def _answer(self, sock, headers, action) -> bool:
        """False: close the connection."""
        if "range" not in headers:
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
            return True
        first, last = (int(x) for x in headers["range"].removeprefix("bytes=").split("-"))
        body = DATA[first : last + 1]
        named = f"bytes {first}-{last}/{len(DATA)}"

        def send(status, content, content_range=named, length=None):
            head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(content) if length is None else length}\r\n"
            head += f"Content-Range: {content_range}\r\n" if content_range else ""
            sock.sendall(head.encode() + b"\r\n" + content)

        if isinstance(action, int):
            send(action, b"", None)
            return True
        match action:
            case "good":
                send(206, body)
            case "short, announced":
                send(206, body[:-10])
            case "short, cut":
                send(206, body[: len(body) // 2], length=len(body))
                return False
            case "reset":
                send(206, body[: len(body) // 2], length=len(body))
                sock.unwrap()
                return False
            case "long":
                send(206, body + b"!")
            case "other range":
                send(206, body, f"bytes {first + 512}-{last + 512}/{len(DATA)}")
            case "no range":
                send(206, body, None)
            case "whole file":
                send(200, DATA, None)
            case "hang up":
                return False
            case "garbage":
                sock.sendall(b"\x00\x01not http\r\n\r\n")
                return False
        return True


class FakeClient:
    """The part of the session that reads need; logging in has its own tests."""

    def __init__(self, settings):
        self.settings = settings
        self.tls = tls_context(settings)
        self.generation = 1
        self.renewals = 0

    def ensure_login(self):
        return self.generation

    def renew(self, seen):
        if seen == self.generation:
            self.renewals += 1
            self.generation += 1
        return self.generation

    def cookie(self):
        return f'vmware_soap_session="s{self.generation}"'


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("tls")
    tls.ensure_ca(path)
    return path


@pytest.fixture
def serve(root):
    made = []

    def start(*script, **settings):
        server = Server(root, *script)
        defaults = {"ca_file": str(root / "ca.pem"), "read_retry_delay": 0.001, "call_timeout": 2.0}
        client = FakeClient(
            VSphereSettings(
                host="127.0.0.1", port=server.port, user="u", password="p", **{**defaults, **settings}
            )
        )
        folder = Folder(client)
        made.extend([server, folder])
        return server, client, folder

    yield start
    for thing in made:
        thing.close()


SPOILT = [
    "short, announced",
    "short, cut",
    "reset",
    "long",
    "other range",
    "no range",
    "whole file",
    "hang up",
    "garbage",
    500,
    503,
    429,
]


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_spoilt_answer_is_thrown_away_and_asked_again(serve, spoilt):
    server, _, folder = serve(spoilt)
    assert folder.read(PLACE, 1000, 5000, subject="web") == DATA[1000:6000]
    assert len(server.requests) == 2


@pytest.mark.parametrize("spoilt", SPOILT)
def test_spoilt_answers_for_ever_fail_the_read_after_five_tries(serve, spoilt):
    server, _, folder = serve(*[spoilt] * 50)
    with pytest.raises(FarshoreError) as caught:
        folder.read(PLACE, 0, 4096, subject="web")
    assert caught.value.code in (Code.SOURCE_READ_FAILED, Code.SOURCE_UNREACHABLE)
    assert caught.value.retryable
    assert len(server.requests) == 5


@pytest.mark.parametrize(("status", "says"), [(404, "no such file"), (416, "shorter")])
def test_a_missing_file_is_not_asked_for_again(serve, status, says):
    server, _, folder = serve(*[status] * 50)
    with pytest.raises(FarshoreError, match=says):
        folder.read(PLACE, 0, 4096, subject="web")
    assert len(server.requests) == 1


def test_a_locked_file_is_called_locked(serve):
    _, _, folder = serve(*[500] * 50)
    with pytest.raises(FarshoreError, match="locked"):
        folder.read(PLACE, 0, 4096, subject="web")


def test_an_ended_session_is_renewed_and_the_same_range_goes_on(serve):
    server, client, folder = serve(401, read_tries=1)
    assert folder.read(PLACE, 70_000, 512, subject="web") == DATA[70_000:70_512]
    assert client.renewals == 1
    assert [h["range"] for _, h in server.requests] == ["bytes=70000-70511"] * 2
    assert server.requests[1][1]["cookie"] == 'vmware_soap_session="s2"'


def test_a_session_that_is_refused_again_and_again_is_an_error(serve):
    _, client, folder = serve(*[401] * 50)
    with pytest.raises(FarshoreError, match="refuses the session"):
        folder.read(PLACE, 0, 10, subject="web")
    assert client.renewals == 2


def test_a_long_range_is_split_read_side_by_side_and_put_together_in_order(serve):
    server, _, folder = serve(read_chunk=10_000, max_connections=3)
    server.pause = 0.02
    assert folder.read(PLACE, 123, 200_001, subject="web") == DATA[123:200_124]
    assert server.most_busy == 3
    assert server.connections <= 3


def test_connections_are_kept_and_bounded_for_all_readers_together(serve):
    server, _, folder = serve(max_connections=2)
    results = []

    def reader(n):
        for k in range(5):
            offset = n * 1000 + k
            results.append(folder.read(PLACE, offset, 64, subject="web") == DATA[offset : offset + 64])

    threads = [threading.Thread(target=reader, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 30
    assert server.connections <= 2


@pytest.mark.parametrize(
    ("twice", "query"),
    [(False, "dcPath=Europe%2FDC%200&dsName=ds%2B1"), (True, "dcPath=Europe%252FDC%25200&dsName=ds%252B1")],
)
def test_names_are_encoded_once_or_twice(serve, twice, query):
    server, _, folder = serve(encode_twice=twice)
    folder.read(PLACE, 0, 1, subject="web")
    assert server.requests[0][0] == f"/folder/web%201/web-flat.vmdk?{query}"


def test_a_descriptor_is_read_whole(serve):
    _, _, folder = serve()
    assert folder.text(PLACE, subject="web") == "hello"
    with pytest.raises(FarshoreError, match="larger"):
        folder.text(PLACE, subject="web", limit=3)


def test_a_dead_server_is_unreachable_at_once(serve):
    server, _, folder = serve()
    server.close()
    begun = time.monotonic()
    with pytest.raises(FarshoreError) as caught:
        folder.read(PLACE, 0, 10, subject="web")
    assert caught.value.code is Code.SOURCE_UNREACHABLE
    assert time.monotonic() - begun < 5


def test_a_server_that_says_nothing_is_given_up(serve):
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        _, client, _ = serve()
        settings = VSphereSettings(
            host="127.0.0.1",
            port=silent.getsockname()[1],
            user="u",
            password="p",
            ca_file=client.settings.ca_file,
            connect_timeout=0.2,
            read_retry_delay=0.001,
        )
        folder = Folder(FakeClient(settings))
        begun = time.monotonic()
        with pytest.raises(FarshoreError) as caught:
            folder.read(PLACE, 0, 10, subject="web")
        folder.close()
    assert caught.value.code is Code.SOURCE_UNREACHABLE
    assert time.monotonic() - begun < 5


def test_a_certificate_of_a_stranger_is_refused(serve, tmp_path):
    tls.ensure_ca(tmp_path)
    _, _, folder = serve(ca_file=str(tmp_path / "ca.pem"))
    with pytest.raises(FarshoreError) as caught:
        folder.read(PLACE, 0, 10, subject="web")
    assert caught.value.code is Code.CONFIGURATION_INVALID


def test_a_pinned_certificate_is_accepted_and_any_other_refused_on_every_connection(serve, root):
    pin = tls.thumbprint(tls.ensure_server_cert(root)[0])
    _, _, folder = serve(ca_file=None, thumbprint=pin)
    assert folder.read(PLACE, 0, 10, subject="web") == DATA[:10]
    server, _, folder = serve(ca_file=None, thumbprint="00" * 32)
    for _ in range(2):
        with pytest.raises(FarshoreError, match="thumbprint differs"):
            folder.read(PLACE, 0, 10, subject="web")
    assert server.requests == []


def test_a_place_is_parsed_from_a_backing():
    place = Place.parse("DC0", "[ds 1] web/web.vmdk")
    assert place == Place("DC0", "ds 1", "web/web.vmdk")
    assert place.sibling("web-flat.vmdk").path == "web/web-flat.vmdk"
    assert Place.parse("DC0", "[ds] x.vmdk").sibling("y").path == "y"
    with pytest.raises(ValueError):
        Place.parse("DC0", "ds/x.vmdk")
