"""The agent's command line.

python -m farshore.providers.physical.agent --config FILE            serve
python -m farshore.providers.physical.agent --config FILE check      what would be protected, and how
python -m farshore.providers.physical.agent --config FILE thaw       thaw what a dead agent left
python -m farshore.providers.physical.agent ca DIR
python -m farshore.providers.physical.agent certificate DIR NAME [--client] [--address HOST …]
python -m farshore.providers.physical.agent files DIR                unit file and example configuration
python -m farshore.providers.physical.agent pack FILE                one file that runs on any Python 3.11
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import signal
import sys
import tempfile
import threading
import zipapp
from importlib import resources
from pathlib import Path
from types import FrameType

from farshore.providers.physical.agent import certificates, config, freeze
from farshore.providers.physical.agent.core import Agent, Refused
from farshore.providers.physical.agent.lvm import LvmFailed
from farshore.providers.physical.agent.service import Server
from farshore.providers.physical.agent.tracing import TraceUnavailable

PACKAGE = "farshore.providers.physical.agent"
FILES = ("farshore-agent.service", "agent.example.toml")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="farshore-agent", description="Farshore's agent on a protected server."
    )
    parser.add_argument("--config", type=Path, default=Path("/etc/farshore/agent.toml"))
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("serve", help="the default")
    commands.add_parser("check", help="show disks and how they would be tracked")
    commands.add_parser("thaw", help="thaw what a dead agent left frozen")
    ca = commands.add_parser("ca", help="make a certificate authority")
    ca.add_argument("folder", type=Path)
    certificate = commands.add_parser("certificate", help="make a certificate for an agent or a worker")
    certificate.add_argument("folder", type=Path)
    certificate.add_argument("name")
    certificate.add_argument("--client", action="store_true", help="for a worker")
    certificate.add_argument("--address", action="append", default=[], help="host name or IP of an agent")
    files = commands.add_parser("files", help="write the systemd unit and an example configuration")
    files.add_argument("folder", type=Path)
    pack = commands.add_parser("pack", help="write the agent as one file")
    pack.add_argument("file", type=Path)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    try:
        return _run(options)
    except (
        config.BadConfig,
        certificates.CertificateFailed,
        Refused,
        TraceUnavailable,
        LvmFailed,
        freeze.FreezeFailed,
        OSError,
    ) as error:
        print(f"farshore-agent: {error}", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    match options.command:
        case "ca":
            certificates.make_ca(options.folder)
        case "certificate":
            certificates.make_certificate(
                options.folder, options.name, client=options.client, addresses=options.address
            )
        case "files":
            options.folder.mkdir(parents=True, exist_ok=True)
            for name in FILES:
                (options.folder / name).write_text(resources.files(PACKAGE).joinpath(name).read_text())
        case "pack":
            pack_agent(options.file)
        case "thaw":
            thawed = freeze.thaw_noted(config.load(options.config).run / "frozen")
            print(f"thawed: {', '.join(thawed) or 'nothing was noted as frozen'}")
        case "check":
            agent = Agent(config.load(options.config))
            try:
                print(json.dumps(agent.inventory(), indent=2))
            finally:
                agent.close()
        case _:
            _serve(config.load(options.config))
    return 0


def _serve(settings: config.Config) -> None:
    agent = Agent(settings)
    clean = False
    try:
        server = Server(settings, agent)

        def stop(number: int, frame: FrameType | None) -> None:
            del number, frame
            # shutdown() waits for the loop that this handler interrupts: another thread has to call it.
            threading.Thread(target=server.shutdown, daemon=True).start()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        print(f"listening on {server.server_address[0]}:{server.server_address[1]}", flush=True)
        try:
            server.serve_forever(poll_interval=0.2)
            clean = True
        finally:
            server.server_close()
    finally:
        agent.close(clean=clean)


def pack_agent(target: Path) -> None:
    """A zipped application of this package alone."""
    with tempfile.TemporaryDirectory() as work:
        inside = Path(work, *PACKAGE.split("."))
        with resources.as_file(resources.files(PACKAGE)) as folder:
            shutil.copytree(folder, inside, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        zipapp.create_archive(
            work, target, interpreter="/usr/bin/env python3", main=f"{PACKAGE}.__main__:main"
        )


if __name__ == "__main__":
    sys.exit(main())
