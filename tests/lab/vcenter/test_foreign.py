"""Clients that are not ours agree with the laboratory: govmomi (Go) and nbdkit's curl plug-in with nbdcopy."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from farshore.lab.vcenter import DEFAULT_PASSWORD, DEFAULT_USER

from .conftest import MIB, Client

SIZE = 16 * MIB
SOURCE = Path(__file__).parent / "govmomi" / "main.go"
GOPATH = Path("/usr/share/gocode")
CACHE = Path(__file__).parents[3] / "build" / "foreign"

pytestmark = [pytest.mark.foreign, pytest.mark.timeout(600)]


@cache
def install(packages: tuple[str, ...]) -> str | None:
    """Try once to install Debian packages; None, or why it did not work."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return "it is not installed, and this user cannot install it"
    command = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"apt-get did not work: {error}"
    return None if done.returncode == 0 else f"apt-get failed: {done.stderr.strip()[-200:]}"


def need(present: bool, what: str, *packages: str) -> None:
    if not present and (reason := install(packages)) is not None:
        pytest.skip(f"{what} is missing: {reason}")


@pytest.fixture(scope="module")
def govmomi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Go client, built without network; kept in `build/` by the hash of its source."""
    library = GOPATH / "src" / "github.com" / "vmware" / "govmomi"
    need(
        shutil.which("go") is not None and library.is_dir(),
        "Go with govmomi",
        "golang-go",
        "golang-github-vmware-govmomi-dev",
        "golang-github-google-uuid-dev",
    )
    binary = CACHE / f"gcheck-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}"
    if not binary.exists():
        work = tmp_path_factory.mktemp("gopath")
        (work / "src" / "gcheck").mkdir(parents=True)
        shutil.copy(SOURCE, work / "src" / "gcheck" / "main.go")
        CACHE.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "GO111MODULE": "off",
            "GOFLAGS": "",
            "GOPATH": f"{work}:{GOPATH}",
            "GOCACHE": str(CACHE / "go-cache"),
        }
        partial = work / "gcheck"
        built = subprocess.run(
            ["go", "build", "-o", str(partial), "gcheck"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert built.returncode == 0, built.stderr
        shutil.move(partial, binary)
    return binary


def test_govmomi_sees_what_pyvmomi_sees(lab: Any, control: Any, govmomi: Path) -> None:
    vm = control.create_vm("web", [SIZE])
    control.create_vm("app", [SIZE])
    control.guest_fill("web", 0, 3 * 65536, 100_000, seed=1)
    done = subprocess.run(
        [str(govmomi), "-url", lab.url, "-user", DEFAULT_USER, "-password", DEFAULT_PASSWORD,
         "-ca", str(lab.ca_file), "-vm", "web"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert "incorrect user name or password" in facts["refused"]
    assert facts["about"] == "VirtualCenter"
    assert facts["machines"] == "2"
    assert facts["power"] == "poweredOn"
    assert facts["tools"] == "guestToolsRunning"
    assert facts["address"] == vm["addresses"][0]
    assert facts["mac"] == vm["nics"][0]["mac"]
    assert facts["tracking.supported"] == facts["host.set"] == facts["layout.files"] == "true"
    assert facts["snapshot.set"] == "false"
    assert facts["summary.name"] == "web"
    assert facts["path"] == "/DC0/vm/web"
    assert facts["hosts"] == "2"
    assert facts["datastore.type"] == "VMFS"
    assert facts["snapshot.type"] == "VirtualMachineSnapshot"
    assert facts["frozen.file"] == facts["live.parent"] == "[ds1] web/web.vmdk"
    assert facts["live.file"] == "[ds1] web/web-000001.vmdk"
    assert facts["frozen.changeId"].endswith("/1")
    assert facts["area"] == f"{3 * 65536}+{2 * 65536}"
    assert facts["query.length"] == str(SIZE)
    assert "A specified parameter was not correct: startOffset" in facts["query.beyond"]
    assert facts["tree"] == "from-go"
    assert "Powered on" in facts["power.on.twice"]
    assert facts["power.on.fault"] == "*types.InvalidPowerState"
    assert facts["after.logout"] == "types.NotAuthenticated"
    leaks = control.leaks()
    assert leaks["snapshots"] == {}
    assert leaks["open_sessions"] == 0


def test_nbdkit_copies_a_frozen_disk_bit_by_bit(
    client: Client, lab: Any, control: Any, tmp_path: Path
) -> None:
    need(
        shutil.which("nbdkit") is not None and shutil.which("nbdcopy") is not None,
        "nbdkit with nbdcopy",
        "nbdkit",
        "libnbd-bin",
    )
    control.digest_log()
    control.create_vm("db", [64 * MIB], workload={"records_per_second": 200, "churn_bytes_per_second": MIB})
    chance = random.Random(2)
    for seed in range(8):
        control.guest_fill("db", 0, chance.randrange(8, 56) * MIB, chance.randrange(1, MIB), seed=seed)
    client.snapshot(client.vm("db"), "frozen")
    out = tmp_path / "out.raw"
    done = subprocess.run(
        ["nbdkit", "-r", "curl", f"url=https://127.0.0.1:{lab.port}/folder/db/db-flat.vmdk?dcPath=DC0&dsName=ds1",
         f"cookie={client.cookie}", f"cainfo={lab.ca_file}", "--run", f'nbdcopy "$uri" {out}'],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    if done.returncode != 0 and "cainfo" in done.stderr and "nrecognized" in done.stderr:
        pytest.skip("this nbdkit-curl cannot be given a CA")
    assert done.returncode == 0, done.stderr
    with out.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    assert digest == control.digests("db", "frozen")[0]["sha256"]
    assert control.requests("HEAD")
    assert len(control.requests("GET")) > 1
