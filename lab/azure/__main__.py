"""`python -m farshore.lab.azure --root DIR`: the whole laboratory Azure as one process, one JSON line when it is ready."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
from pathlib import Path

from farshore.lab.azure.landing import LandingZone
from farshore.lab.azure.whole import LabAzureWhole


async def _run(arguments: argparse.Namespace) -> None:
    zone = LandingZone(**json.loads(arguments.config.read_text())) if arguments.config else None
    lab = LabAzureWhole(
        arguments.root,
        zone=zone,
        port=arguments.port,
        blob_port=arguments.blob_port,
        control_port=arguments.control_port,
    )
    done = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, done.set)
    async with lab:
        if arguments.time_scale is not None:
            lab.world.turn({"time_scale": arguments.time_scale})
        print(json.dumps(lab.describe()), flush=True)
        await done.wait()


def main() -> None:
    """Serve until SIGINT or SIGTERM. A second start on the same root has the same ports, secrets and state."""
    parser = argparse.ArgumentParser(prog="python -m farshore.lab.azure", description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="folder of all state; made if absent")
    parser.add_argument(
        "--port", type=int, default=0, help="ARM and Entra; 0: the last one, else the system's choice"
    )
    parser.add_argument("--blob-port", type=int, default=0)
    parser.add_argument("--control-port", type=int, default=0)
    parser.add_argument("--config", type=Path, help="JSON file with the landing zone's fields")
    parser.add_argument("--time-scale", type=float, help="1 is Azure's pace; kept for later starts")
    asyncio.run(_run(parser.parse_args()))


if __name__ == "__main__":
    main()
