"""Loop devices with real file systems, an agent on them, and a replica that its cuts are copied into."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from farshore.providers.physical.agent import certificates, disks, watchdog
from farshore.providers.physical.agent.config import Config, DiskConfig
from farshore.providers.physical.agent.core import Agent
from farshore.providers.physical.agent.service import Server
from farshore.providers.physical.agent.tracing import TraceUnavailable, find_tracefs
from farshore.providers.physical.settings import PhysicalSettings

MIB = 1 << 20
_numbers = itertools.count(1)


def run(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def missing() -> str:
    """Why tests with loop devices cannot run here; "" when they can."""
    if os.geteuid() != 0:
        return "needs root: loop devices, mounts, freezing"
    tools = [tool for tool in ("losetup", "mkfs.ext4", "mount", "e2fsck", "fstrim") if not shutil.which(tool)]
    if tools:
        return f"needs {', '.join(tools)}"
    done = subprocess.run(["losetup", "-f"], capture_output=True, check=False)
    return "" if done.returncode == 0 else "no loop device can be had"


def pytest_collection_modifyitems(items) -> None:
    here = str(Path(__file__).parent)
    reason = missing()
    for item in items:
        if reason and str(item.path).startswith(here) and {"machine", "tracefs"} & set(item.fixturenames):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def tracefs(tmp_path_factory) -> Generator[Path]:
    """Where tracefs is, mounted for this session when it is not."""
    with contextlib.suppress(TraceUnavailable):
        for place in (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing")):
            if (place / "instances").is_dir():
                yield place
                return
    folder = tmp_path_factory.mktemp("tracefs")
    try:
        place = find_tracefs(folder)
    except TraceUnavailable as error:
        pytest.skip(f"no tracefs: {error}")
    try:
        if not (place / "events/block/block_bio_queue").is_dir():
            pytest.skip("the kernel has no block trace events")
        yield place
    finally:
        run("umount", "-l", folder)


@pytest.fixture(scope="session")
def authority(tmp_path_factory) -> Path:
    """A CA, an agent's and a worker's certificate."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    folder = tmp_path_factory.mktemp("ca")
    certificates.make_ca(folder)
    certificates.make_certificate(folder, "agent", client=False, addresses=["127.0.0.1", "localhost"])
    certificates.make_certificate(folder, "worker", client=True)
    certificates.make_certificate(folder, "stranger", client=True)
    return folder


@dataclass
class LoopMachine:
    """A machine made of loop devices. What it leaves is thawed first, then unmounted, then detached."""

    root: Path
    loops: dict[str, str] = field(default_factory=dict)
    images: dict[str, Path] = field(default_factory=dict)
    mounted: list[Path] = field(default_factory=list)

    def add(self, key: str, mib: int) -> str:
        image = self.root / f"{key}.img"
        with image.open("wb") as file:
            file.truncate(mib * MIB)
        self.images[key] = image
        self.loops[key] = run("losetup", "-f", "--show", "--direct-io=on", "-P", image)
        return self.loops[key]

    def mkfs(self, key: str, *options: str) -> None:
        run("mkfs.ext4", "-q", "-F", *options, self.loops[key])

    def mount(self, key: str, *options: str, device: str = "") -> Path:
        folder = self.root / f"mnt-{key}"
        folder.mkdir(exist_ok=True)
        run("mount", *options, device or self.loops[key], folder)
        self.mounted.append(folder)
        return folder

    def mounts(self) -> list[disks.Mount]:
        """Ours only: an agent of a test never freezes what is not the test's."""
        ours = {str(folder) for folder in self.mounted}
        return [mount for mount in disks.mounts() if mount.path in ours]

    def thaw(self) -> None:
        for folder in self.mounted:
            with contextlib.suppress(OSError):
                descriptor = os.open(folder, os.O_RDONLY)
                watchdog.thaw([descriptor])
                os.close(descriptor)

    def unmount(self, folder: Path) -> None:
        self.mounted.remove(folder)
        run("umount", folder)

    def close(self) -> None:
        self.thaw()
        for folder in reversed(self.mounted):
            detach(folder)
        for loop in self.loops.values():
            subprocess.run(["losetup", "-d", loop], check=False, capture_output=True)


def detach(folder: Path) -> None:
    """Unmount; a watchdog that is just ending, or a probe, may hold the folder for a moment."""
    deadline = time.monotonic() + 15
    while subprocess.run(["umount", str(folder)], check=False, capture_output=True).returncode:
        if not os.path.ismount(folder):
            return
        if time.monotonic() > deadline:
            subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)
            return
        time.sleep(0.05)


@pytest.fixture
def machine(tmp_path) -> Generator[LoopMachine]:
    made = LoopMachine(tmp_path)
    try:
        yield made
    finally:
        made.close()


@dataclass
class Running:
    """An agent that serves in this process."""

    agent: Agent
    server: Server
    settings: PhysicalSettings
    thread: threading.Thread

    def stop(self, *, clean: bool = True) -> None:
        self.server.shutdown()
        self.server.drop_connections()
        self.server.server_close()
        self.thread.join()
        self.agent.close(clean=clean)


def config_of(folder: Path, authority: Path, paths: Mapping[str, str], **more) -> Config:
    kinds = more.pop("tracking", "trace")
    base = Config(
        name=f"t{os.getpid()}-{next(_numbers)}",
        state=folder / "state",
        run=folder / "run",
        ca=authority / "ca.crt",
        certificate=authority / "agent.crt",
        key=authority / "agent.key",
        clients=("worker",),
        disks=tuple(
            DiskConfig(key, path, boot=index == 0, tracking=kinds)
            for index, (key, path) in enumerate(paths.items())
        ),
        spool_mib=512,
        freeze_limit=20.0,
    )
    return replace(base, **more)


def settings_of(authority: Path, port: int, **more) -> PhysicalSettings:
    base = PhysicalSettings(
        host="127.0.0.1",
        port=port,
        ca_file=str(authority / "ca.crt"),
        certificate_file=str(authority / "worker.crt"),
        key_file=str(authority / "worker.key"),
        read_retry_delay=0.05,
    )
    return replace(base, **more)


@pytest.fixture
def start(tmp_path, authority, tracefs, machine):
    """`start(paths, **config)` runs an agent on these disks; it sees the test's mounts only."""
    running: list[Running] = []

    def begin(
        paths: Mapping[str, str], *, agent_class: type[Agent] = Agent, settings=None, **more
    ) -> Running:
        config = config_of(tmp_path, authority, paths, tracefs=tracefs, **more)
        agent = agent_class(config, mounts=machine.mounts)
        server = Server(config, agent)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        one = Running(
            agent, server, settings_of(authority, server.server_address[1], **(settings or {})), thread
        )
        running.append(one)
        return one

    yield begin
    machine.thaw()
    for one in running:
        if one.thread.is_alive():
            one.stop(clean=False)
