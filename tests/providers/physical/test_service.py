"""Who may speak to an agent, what it answers to nonsense, and how it is installed."""

from __future__ import annotations

import ast
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from farshore.domain.errors import Code, FarshoreError
from farshore.providers.physical.agent import certificates, config
from farshore.providers.physical.agent.__main__ import FILES, main
from farshore.providers.physical.client import AgentClient
from farshore.providers.physical.errors import AgentRefused

from .conftest import settings_of


@pytest.fixture
def agent(machine, start):
    machine.add("d", 8)
    return start(machine.loops)


def ask(settings, **more):
    client = AgentClient(settings)
    try:
        return client.call("GET", "machine", doing="asking", **more)
    finally:
        client.close()


def test_a_worker_of_the_authority_is_answered(agent):
    answer = ask(agent.settings)
    assert answer["platform"] == "linux"
    assert answer["protocol"] == 1
    (disk,) = answer["disks"]
    assert (disk["key"], disk["size"], disk["tracking"], disk["boot"]) == ("d", 8 << 20, "trace", True)


def test_a_client_without_a_certificate_gets_nothing(agent, authority):
    context = ssl.create_default_context(cafile=str(authority / "ca.crt"))
    answer = b""
    with contextlib.suppress(ssl.SSLError, ConnectionError):
        raw = socket.create_connection(("127.0.0.1", agent.settings.port), timeout=10)
        with raw, context.wrap_socket(raw, server_hostname="127.0.0.1") as tls:
            # With TLS 1.3 the client learns only afterwards that it was refused.
            tls.sendall(b"GET /v1/machine HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = tls.recv(100)
    assert answer == b""
    assert ask(agent.settings)["platform"] == "linux"


def test_plain_text_gets_nothing(agent):
    with socket.create_connection(("127.0.0.1", agent.settings.port), timeout=10) as raw:
        raw.sendall(b"GET /v1/machine HTTP/1.1\r\nHost: x\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert not raw.recv(4096).startswith(b"HTTP")
    assert ask(agent.settings)["platform"] == "linux"


def test_a_name_that_is_not_allowed_is_refused(agent, authority):
    with pytest.raises(AgentRefused) as caught:
        ask(
            settings_of(
                authority,
                agent.settings.port,
                certificate_file=str(authority / "stranger.crt"),
                key_file=str(authority / "stranger.key"),
            )
        )
    assert caught.value.code == "forbidden"


def test_the_certificate_of_another_agent_cannot_ask(agent, authority):
    with pytest.raises(FarshoreError) as caught:
        ask(
            settings_of(
                authority,
                agent.settings.port,
                certificate_file=str(authority / "agent.crt"),
                key_file=str(authority / "agent.key"),
            )
        )
    assert caught.value.code in (Code.ACCESS_DENIED, Code.SOURCE_UNREACHABLE)


def test_a_worker_of_another_authority_is_denied(agent, authority, tmp_path):
    certificates.make_ca(tmp_path / "other")
    certificates.make_certificate(tmp_path / "other", "worker", client=True)
    pair = {
        "certificate_file": str(tmp_path / "other/worker.crt"),
        "key_file": str(tmp_path / "other/worker.key"),
    }
    with pytest.raises(FarshoreError) as caught:
        ask(settings_of(authority, agent.settings.port, **pair))
    assert caught.value.code in (Code.ACCESS_DENIED, Code.SOURCE_UNREACHABLE)
    with pytest.raises(FarshoreError) as caught:
        ask(settings_of(authority, agent.settings.port, ca_file=str(tmp_path / "other/ca.crt")))
    assert caught.value.code is Code.CONFIGURATION_INVALID


def test_an_agent_under_another_name_is_not_trusted(agent, authority, tmp_path):
    for name in ("ca.crt", "ca.key"):
        shutil.copy(authority / name, tmp_path / name)
    certificates.make_certificate(tmp_path, "elsewhere", client=False, addresses=["elsewhere.example"])
    agent.server._tls.load_cert_chain(tmp_path / "elsewhere.crt", tmp_path / "elsewhere.key")
    with pytest.raises(FarshoreError) as caught:
        ask(agent.settings)
    assert caught.value.code is Code.CONFIGURATION_INVALID


def test_nobody_there_is_unreachable(authority):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(FarshoreError) as caught:
        ask(settings_of(authority, port))
    assert caught.value.code is Code.SOURCE_UNREACHABLE


@pytest.mark.parametrize(
    ("method", "path", "body", "code"),
    [
        ("GET", "nothing", None, "not-found"),
        ("GET", "cuts/none/bytes?disk=d&offset=0&length=512", None, "gone"),
        ("POST", "cuts", {"want": "crash-consistent"}, "bad-request"),
        ("POST", "cuts", {"name": "../x", "want": "crash-consistent"}, "bad-request"),
        ("POST", "cuts", {"name": "x", "want": "w", "bases": 3}, "bad-request"),
        ("GET", "live?disk=d&offset=x&length=512", None, "bad-request"),
        ("GET", "live?disk=d&offset=0&length=99999999", None, "bad-request"),
        ("GET", "live?disk=d&offset=1&length=512", None, "bad-request"),
        ("GET", "live?disk=e&offset=0&length=512", None, "bad-request"),
        ("GET", "seeds/changed?disk=d&since=x&until=", None, "not-known"),
    ],
)
def test_nonsense_is_refused_in_words(agent, method, path, body, code):
    client = AgentClient(agent.settings)
    try:
        with pytest.raises(AgentRefused) as caught:
            client.call(method, path, body=body, doing="asking")
        assert caught.value.code == code
        assert caught.value.message
        assert client.call("GET", "status", doing="asking")["cuts"] == []
    finally:
        client.close()


def test_a_body_that_is_no_json_is_refused(agent):
    client = AgentClient(agent.settings)
    connection = http.client.HTTPSConnection(
        "127.0.0.1", agent.settings.port, context=client._tls(), timeout=10
    )
    connection.request("POST", "/v1/reap", body=b"{{{")
    answer = connection.getresponse()
    assert answer.status == 400
    assert json.loads(answer.read())["code"] == "bad-request"
    connection.close()


def test_a_spool_on_a_protected_disk_is_refused(machine, start):
    machine.add("d", 16)
    machine.mkfs("d")
    folder = machine.mount("d")
    with pytest.raises(Exception, match="lies on a protected disk"):
        start(machine.loops, spool=folder)


# -- installation -------------------------------------------------------------------------------------------------


def test_files_and_one_file_agent_are_made_and_the_example_is_valid(tmp_path):
    assert main(["files", str(tmp_path / "files")]) == 0
    assert {path.name for path in (tmp_path / "files").iterdir()} == set(FILES)
    assert config.load(tmp_path / "files/agent.example.toml").name == "db1"
    assert main(["pack", str(tmp_path / "agent.pyz")]) == 0
    # On a machine that has nothing of Farshore, and no site packages.
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(tmp_path / "agent.pyz"), "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "certificate" in done.stdout


def test_the_agent_imports_the_standard_library_and_itself_only():
    folder = Path(__file__).resolve().parents[3] / "providers/physical/agent"
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0
                names = [node.module or ""]
            for name in names:
                ours = name.startswith("farshore.providers.physical.agent")
                assert ours or name.split(".")[0] in sys.stdlib_module_names, f"{path.name} imports {name}"


def test_certificates_are_made_once_with_private_keys(tmp_path):
    assert main(["ca", str(tmp_path)]) == 0
    assert (
        main(["certificate", str(tmp_path), "db1", "--address", "10.0.0.1", "--address", "db1.example"]) == 0
    )
    assert main(["certificate", str(tmp_path), "db1", "--address", "10.0.0.1"]) == 1, "a key was overwritten"
    assert main(["ca", str(tmp_path)]) == 1
    assert main(["certificate", str(tmp_path), "x", "--address", "a b,DNS:*"]) == 1
    assert main(["certificate", str(tmp_path), "y"]) == 1
    for key in tmp_path.glob("*.key"):
        assert key.stat().st_mode & 0o077 == 0


def test_the_service_as_it_is_installed_serves_and_ends_cleanly(machine, tmp_path, authority, tracefs):
    machine.add("d", 8)
    text = f"""
[agent]
name = "svc{os.getpid()}"
state = "{tmp_path}/state"
run = "{tmp_path}/run"
[tls]
ca = "{authority}/ca.crt"
certificate = "{authority}/agent.crt"
key = "{authority}/agent.key"
clients = ["worker"]
[trace]
tracefs = "{tracefs}"
[[disk]]
key = "d"
path = "{machine.loops["d"]}"
"""
    (tmp_path / "agent.toml").write_text(text)
    main(["pack", str(tmp_path / "agent.pyz")])
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(tmp_path / "agent.pyz"), "--config", str(tmp_path / "agent.toml")],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline().rsplit(":", 1)[1])
        assert ask(settings_of(authority, port))["agent"] == f"svc{os.getpid()}"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        state = json.loads((tmp_path / "state/trace.json").read_text())
        assert "d" in state["books"], "the stop was not clean"
    finally:
        process.kill()
        process.wait()
        instance: Path = tracefs / f"instances/farshore-svc{os.getpid()}"
        if instance.exists():
            instance.rmdir()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("[agent]\nname = 1\n[[disk]]\nkey = 'x'\npath = '/p'", "agent.name is a int"),
        ("[agent]\nname = 'a'\nnmae = 'b'\n[[disk]]\nkey = 'x'\npath = '/p'", "unknown: agent.nmae"),
        ("[agent]\nname = 'a'\n[[disk]]\nkey = 'x'", "disk.path is missing"),
        ("[agent]\nname = 'a'\n[[disk]]\nkey = 'x'\npath = '/p'\ntracking = 'magic'", "tracking is one of"),
        ("[agent]\nname = 'a'\n[[disk]]\nkey = 'a/b'\npath = '/p'", "letters, digits"),
        (
            "[agent]\nname = 'a'\n[[disk]]\nkey = 'a'\npath = '/p'\n[[disk]]\nkey = 'a'\npath = '/q'",
            "same key or path",
        ),
        ("[agent]\nname = 'a'", "no .*disk"),
        (
            "[agent]\nname = 'a'\n[freeze]\nlimit = 0.1\n[[disk]]\nkey = 'a'\npath = '/p'",
            "longer than copy_seconds",
        ),
    ],
)
def test_mistakes_in_the_configuration_are_told_with_their_place(tmp_path, change, text):
    (tmp_path / "c.toml").write_text(
        change + "\n[tls]\nca = 'a'\ncertificate = 'b'\nkey = 'c'\nclients = ['w']\n"
    )
    with pytest.raises(config.BadConfig, match=text):
        config.load(tmp_path / "c.toml")
