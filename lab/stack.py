"""A whole laboratory on one machine: Temporal with its web UI, a data centre, an Azure and Farshore's workers, each as
a process of its own, on loopback. The demo and the end-to-end tests use it; Farshore is used as its users use it, by
its command line and its settings file, never imported.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from farshore.lab.azure.control import AzureControl
from farshore.lab.vcenter.config import DEFAULT_PASSWORD, DEFAULT_USER
from farshore.lab.vcenter.control import VCenterControl

SEARCH_ATTRIBUTES = ("FarshorePlan", "FarshoreKind", "FarshoreMachine", "FarshoreState", "FarshoreSite")
_POLLS = ("transfer", "timer", "visibility")
_DEADLINE = 60.0


class StackError(RuntimeError):
    """A process did not start or did not answer; the text ends with what it wrote last."""


def free_port(preferred: int = 0) -> int:
    """A loopback port that is free now: the preferred one if possible."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise StackError("no free port on 127.0.0.1")


def wait_until(what: str, ready: Callable[[], bool], seconds: float = _DEADLINE) -> None:
    """Poll until `ready`; StackError names what was awaited."""
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise StackError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.1)


@dataclass
class Process:
    """A process of the stack, its log and its end."""

    name: str
    popen: subprocess.Popen[str]
    log: Path

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def kill(self) -> None:
        """SIGKILL, as a power cut would."""
        if self.alive:
            self.popen.kill()
        self.popen.wait()

    def terminate(self, seconds: float = 15.0) -> None:
        """SIGTERM, then SIGKILL."""
        if self.alive:
            self.popen.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(seconds)
        self.kill()

    def tail(self, lines: int = 25) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


@dataclass
class Stack:
    """Start with `start()`, end with `stop()`; everything lives under `root`."""

    root: Path
    machines: Sequence[Mapping[str, Any]] = ()
    plans: Path | None = None
    ui_port: int = 0
    temporal_port: int = 0
    leg: float = 3600.0
    more_settings: str = ""  # TOML, e.g. further sites
    processes: dict[str, Process] = field(default_factory=dict[str, Process])
    azure_info: dict[str, Any] = field(default_factory=dict[str, Any])
    vcenter_info: dict[str, Any] = field(default_factory=dict[str, Any])
    http_port: int = 0

    # -- life -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Everything, in order; on failure what was started is ended."""
        try:
            (self.root / "logs").mkdir(parents=True, exist_ok=True)
            self.start_temporal()
            self.start_vcenter()
            self.start_azure()
            self.write_settings()
            self.start_worker("control")
            self.start_worker("east")
            self.start_worker("westeurope")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End what was started, workers first and all at once."""
        for name, process in self.processes.items():
            if name.startswith("worker-") and process.alive:
                process.popen.send_signal(signal.SIGTERM)
        for name in reversed(list(self.processes)):
            self.processes.pop(name).terminate()

    def __enter__(self) -> Stack:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- parts ----------------------------------------------------------------------------------------------------

    @property
    def temporal(self) -> str:
        return f"127.0.0.1:{self.temporal_port}"

    @property
    def ui(self) -> str:
        return f"http://127.0.0.1:{self.ui_port}"

    @property
    def settings(self) -> Path:
        return self.root / "farshore.toml"

    @property
    def vcenter(self) -> VCenterControl:
        return VCenterControl(self.vcenter_info["control"])

    @property
    def azure(self) -> AzureControl:
        return AzureControl(self.azure_info["control"])

    def start_temporal(self) -> None:
        """The real server, with the settings that were measured to matter."""
        self.temporal_port = self.temporal_port or free_port(7233)
        self.ui_port = self.ui_port or free_port(8233)
        self.http_port = self.http_port or free_port(7243)
        command = [
            str(Path(sys.executable).parent / "temporal"), "server", "start-dev",
            "--ip", "127.0.0.1", "--port", str(self.temporal_port),
            "--ui-port", str(self.ui_port), "--http-port", str(self.http_port),
            "--metrics-port", str(free_port()),
            "--db-filename", str(self.root / "temporal.db"),
            "--sqlite-pragma", "journal_mode=WAL", "--sqlite-pragma", "synchronous=NORMAL",
            "--ui-disable-news-fetch", "--log-level", "warn",
        ]  # fmt: skip
        for processor in _POLLS:
            command += ["--dynamic-config-value", f"history.{processor}ProcessorMaxPollRPS=1000"]
        for name in SEARCH_ATTRIBUTES:
            command += ["--search-attribute", f"{name}=Keyword"]
        process = self.spawn("temporal", command)

        def answers() -> bool:
            self._must_live(process)
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"{self.ui}/api/v1/namespaces", timeout=2),
            ):
                return True
            return False

        wait_until("Temporal", answers)

    def start_vcenter(self) -> None:
        """The source site."""
        root = self.root / "vcenter"
        root.mkdir(parents=True, exist_ok=True)
        config = root / "inventory.json"
        if not config.exists():
            content = {"vms": list(self.machines), "settings": {"digest_log": True}}
            config.write_text(json.dumps(content), encoding="utf-8")
        command = [sys.executable, "-m", "farshore.lab.vcenter", "--root", str(root), "--config", str(config)]
        self.vcenter_info = self._ready_line(self.spawn("vcenter", command, piped=True))

    def start_azure(self) -> None:
        """The target site."""
        command = [sys.executable, "-m", "farshore.lab.azure", "--root", str(self.root / "azure")]
        self.azure_info = self._ready_line(self.spawn("azure", command, piped=True))

    def start_worker(self, role: str) -> None:
        """`control`, or the name of a site."""
        ready = self.root / f"{role}.ready"
        ready.unlink(missing_ok=True)
        command = self.farshore("worker", "--ready-file", str(ready), "--role")
        command += ["control"] if role == "control" else ["site", "--site", role]
        process = self.spawn(f"worker-{role}", command)

        def polls() -> bool:
            self._must_live(process)
            return ready.exists()

        wait_until(f"worker {role}", polls)

    def write_settings(self) -> None:
        """Farshore's settings file, with secrets as files."""
        secrets = self.root / "secrets"
        secrets.mkdir(mode=0o700, exist_ok=True)
        azure, sdk = self.azure_info, self.vcenter_info["sdk"]
        values = {
            "vcenter": DEFAULT_PASSWORD,
            "azure": azure["client_secret"],
            "storage": azure["account_key"],
            "encryption": os.urandom(32).hex(),
        }
        for name, value in values.items():
            path = secrets / name
            if name == "encryption" and path.exists():
                continue  # what was written with it must stay readable
            path.write_text(value, encoding="utf-8")
            path.chmod(0o600)
        host, port = sdk.split("/")[2].split(":")
        folder = self.plans or Path(__file__).parent / "demo" / "plans"
        text = f"""
[temporal]
address = "{self.temporal}"
ui = "{self.ui}"

[plans]
folder = "{folder}"

[worker]
leg = {self.leg}
cache = "{self.root / "cache"}"

[sites.east]
provider = "vsphere"
host = "{host}"
port = {port}
user = "{DEFAULT_USER}"
password = "file:{secrets / "vcenter"}"
ca_file = "{self.vcenter_info["ca"]}"

[sites.westeurope]
provider = "azure"
tenant = "{azure["tenant"]}"
client_id = "{azure["client_id"]}"
client_secret = "file:{secrets / "azure"}"
subscription = "{azure["subscription"]}"
resource_group = "{azure["resource_group"]}"
location = "{azure["location"]}"
base_url = "{azure["arm"]}"
authority = "{azure["arm"]}"
ca_file = "{azure["ca"]}"
storage_account = "{azure["account"]}"
storage_account_id = "{azure["storage_account_id"]}"
storage_key = "file:{secrets / "storage"}"
encryption_key = "file:{secrets / "encryption"}"
blob_endpoint = "{azure["blob"]}"
polling_interval = 1.0
"""
        self.settings.write_text(text.lstrip() + self.more_settings, encoding="utf-8")

    # -- use ------------------------------------------------------------------------------------------------------

    def farshore(self, *arguments: str) -> list[str]:
        """The command line of Farshore with this stack's settings."""
        return [str(Path(sys.executable).parent / "farshore"), *arguments]

    def environment(self) -> dict[str, str]:
        """Environment of every process: nothing of the caller's that could lead off this machine."""
        keep = {
            k: v
            for k, v in os.environ.items()
            if k in ("PATH", "HOME", "LANG", "TMPDIR", "OPENBLAS_CORETYPE")
        }
        return keep | {"FARSHORE_SETTINGS": str(self.settings), "PYTHONUNBUFFERED": "1", "COLUMNS": "160"}

    def run(self, *arguments: str, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
        """Run `farshore …` to its end."""
        return subprocess.run(
            self.farshore(*arguments),
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def spawn(self, name: str, command: Sequence[str], *, piped: bool = False) -> Process:
        """Start a process of the stack; its output goes to logs/<name>.log."""
        log = self.root / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as sink:
            popen = subprocess.Popen(
                list(command),
                stdout=subprocess.PIPE if piped else sink,
                stderr=sink,
                stdin=subprocess.DEVNULL,
                text=True,
                env=self.environment(),
                cwd=self.root,
                start_new_session=True,
            )
        process = Process(name, popen, log)
        self.processes[name] = process
        return process

    def _ready_line(self, process: Process) -> dict[str, Any]:
        assert process.popen.stdout is not None
        line = process.popen.stdout.readline()
        if not line.startswith("{"):
            process.popen.wait(10)
            raise StackError(f"{process.name} did not start:\n{process.tail()}")
        return json.loads(line)

    def _must_live(self, process: Process) -> None:
        if not process.alive:
            raise StackError(f"{process.name} ended with {process.popen.returncode}:\n{process.tail()}")

    def remove(self) -> None:
        """Delete all state."""
        shutil.rmtree(self.root, ignore_errors=True)
