"""Endpoints for the blob tests: our laboratory over TLS, and Azurite where Node and npm are there."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import fcntl
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from azure.core.exceptions import HttpResponseError
from azure.storage.blob import BlobServiceClient, ContainerClient

from farshore.lab import tls
from farshore.lab.blob.faults import BlobFaults
from farshore.lab.blob.server import BlobServer
from farshore.lab.blob.store import BlobStore

REPOSITORY = Path(__file__).resolve().parents[3]
AZURITE_VERSION = "3.37.0"
ACCOUNT = "farshorelab"
KEY = base64.b64encode(b"a laboratory key of no value at all").decode()

KNOWN_DIFFERENCES = {
    "diff-returns-all": "page-range difference: Azurite returns all ranges and no cleared ones",
    "put-page-too-large": "Put Page of 4 MiB + 512: Azurite accepts it, Azure refuses",
    "nine-tib": "9 TiB page blob: Azurite accepts it, Azure refuses",
    "put-page-from-url": "Put Page From URL: Azurite has not implemented it",
    "copy-at-once": "Copy Blob: finished in the first answer on Azurite, asynchronous on Azure",
    "page-range-paging": "marker and maxresults of page ranges: ignored by Azurite",
    "page-range-code": "unaligned page range or one past the end: 416 on both, but Azurite has no proper code",
}
"""Where Azurite is not Azure. A test expects the difference on Azurite, so that a change there is noticed."""


@dataclass
class Endpoint:
    """A blob service to test against."""

    name: str
    account_url: str
    ca_file: Path | None = None
    account: str = ACCOUNT
    key: str = KEY
    opened: list[BlobServiceClient] = field(default_factory=list)

    def differs(self, difference: str) -> bool:
        """True on Azurite: the test then expects what the table says."""
        assert difference in KNOWN_DIFFERENCES
        return self.name == "azurite"

    def options(self) -> dict[str, object]:
        out: dict[str, object] = {"retry_total": 0}
        if self.ca_file is not None:
            out["connection_verify"] = str(self.ca_file)
        return out

    def service(self, credential: object = KEY) -> BlobServiceClient:
        client = BlobServiceClient(self.account_url, credential=credential, **self.options())
        self.opened.append(client)
        return client

    def raw(
        self, method: str, url: str, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """A request no SDK would send; status, lower-case headers, body."""
        context = ssl.create_default_context(cafile=str(self.ca_file)) if self.ca_file else None
        request = urllib.request.Request(url, data=body, method=method, headers=dict(headers or {}))
        try:
            with urllib.request.urlopen(request, context=context, timeout=20) as answer:
                return answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read()
        except urllib.error.HTTPError as e:
            return e.code, {k.lower(): v for k, v in e.headers.items()}, e.read()


class LoopThread:
    """An event loop for servers, so that the synchronous SDK can talk to them from the test."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


@dataclass
class Lab(Endpoint):
    store: BlobStore = None  # type: ignore[assignment]
    faults: BlobFaults = None  # type: ignore[assignment]


@pytest.fixture(scope="session")
def loop_thread() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.close()


@pytest.fixture(scope="session")
def tls_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tls")
    tls.ensure_server_cert(root)
    return root


@pytest.fixture
def start_lab(loop_thread: LoopThread, tls_root: Path, tmp_path: Path) -> Iterator[Callable[..., Lab]]:
    """Starts laboratories; `start_lab(https=False)` for one without TLS."""
    running: list[tuple[BlobServer, Lab]] = []

    def start(*, https: bool = True, root: Path | None = None, **options) -> Lab:
        store = BlobStore(root or tmp_path / f"account{len(running)}", ACCOUNT, KEY)
        server = BlobServer(store, **options)
        loop_thread.run(server.start("127.0.0.1", 0, tls.server_context(tls_root) if https else None))
        lab = Lab(
            "lab",
            server.account_url(ACCOUNT),
            tls_root / "ca.pem" if https else None,
            store=store,
            faults=server.faults,
        )
        running.append((server, lab))
        return lab

    yield start
    for server, lab in running:
        for client in lab.opened:
            client.close()
        loop_thread.run(server.stop())
        lab.store.close()


@pytest.fixture
def lab(start_lab: Callable[..., Lab]) -> Lab:
    """A laboratory of its own over plain HTTP."""
    return start_lab(https=False)


# --- Azurite --------------------------------------------------------------------------------------------------


def _azurite_script() -> Path:
    """The installed Azurite, installing it once into build/azurite (outside git); skips with a reason if it can't."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("Azurite needs node and npm, which are not installed")
    folder = REPOSITORY / "build" / "azurite"
    package = folder / "node_modules" / "azurite"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        manifest = package / "package.json"
        if not manifest.exists() or json.loads(manifest.read_text())["version"] != AZURITE_VERSION:
            command = [
                "npm",
                "install",
                "--prefix",
                str(folder),
                "--no-audit",
                "--no-fund",
                f"azurite@{AZURITE_VERSION}",
            ]
            try:
                subprocess.run(command, check=True, capture_output=True, timeout=150)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as e:
                pytest.skip(f"npm could not install azurite {AZURITE_VERSION}: {e}")
    return package / "dist" / "src" / "blob" / "main.js"


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    script = _azurite_script()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    where = tmp_path_factory.mktemp("azurite")
    command = [
        "node",
        str(script),
        "--blobHost",
        "127.0.0.1",
        "--blobPort",
        str(port),
        "--location",
        str(where),
    ]
    command += ["--silent", "--disableTelemetry", "--skipApiVersionCheck"]
    log = (where / "log.txt").open("wb")
    process = subprocess.Popen(
        command, env={**os.environ, "AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"}, stdout=log, stderr=log, cwd=where
    )
    endpoint = Endpoint("azurite", f"http://127.0.0.1:{port}/{ACCOUNT}")
    try:
        wait_until(lambda: _listens(port) or process.poll() is not None, 60)
        assert process.poll() is None, (where / "log.txt").read_text()
        yield endpoint
    finally:
        for client in endpoint.opened:
            client.close()
        process.terminate()
        process.wait(20)
        log.close()


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@pytest.fixture(params=["lab", pytest.param("azurite", marks=pytest.mark.foreign)])
def endpoint(request: pytest.FixtureRequest) -> Endpoint:
    """Our laboratory over TLS, then Azurite."""
    if request.param == "lab":
        return request.getfixturevalue("start_lab")()
    return request.getfixturevalue("azurite")


@pytest.fixture
def container(endpoint: Endpoint) -> ContainerClient:
    """A container of the test's own."""
    return endpoint.service().create_container(f"t{uuid.uuid4().hex[:20]}")


@pytest.fixture
def lab_container(lab: Lab) -> ContainerClient:
    return lab.service().create_container("disks")


# --- words the tests use --------------------------------------------------------------------------------------


def wait_until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Poll a condition; AssertionError after the deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


@contextlib.contextmanager
def refused(status: int, *codes: str) -> Iterator[None]:
    """The call inside fails with this status and one of these codes."""
    with pytest.raises(HttpResponseError) as caught:
        yield
    code = getattr(caught.value, "error_code", None)
    text = getattr(code, "value", code)
    assert (caught.value.status_code, text in codes) == (status, True), f"{caught.value.status_code} {text}"


@dataclass
class Words:
    """Helpers as a fixture: test modules are imported without packages and cannot share a module."""

    wait_until: Callable[..., None]
    refused: Callable[..., contextlib.AbstractContextManager[None]]

    @staticmethod
    def noise(size: int, seed: int = 0) -> bytes:
        """Bytes that differ everywhere and are the same every time."""
        import random

        return random.Random(seed).randbytes(size)

    @staticmethod
    def ranges(found) -> list[tuple[int, int, bool]]:
        """SDK page ranges as half-open (start, end, cleared)."""
        return [(r.start, r.end + 1, bool(r.cleared)) for r in found]

    @staticmethod
    def start_process(
        root: Path, *options: str, code: str = ""
    ) -> tuple[subprocess.Popen[bytes], dict[str, str]]:
        """The stand-alone server, and what it said when it was ready."""
        how = ["-c", code] if code else ["-m", "farshore.lab.blob"]
        process = subprocess.Popen(
            [sys.executable, *how, "--root", str(root), *options], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        return process, json.loads(process.stdout.readline())


@pytest.fixture(scope="session")
def words() -> Words:
    return Words(wait_until, refused)


@pytest.fixture(scope="session")
def known_differences() -> dict[str, str]:
    return KNOWN_DIFFERENCES
