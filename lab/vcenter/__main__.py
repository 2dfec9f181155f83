"""`python -m farshore.lab.vcenter --root DIR`: the laboratory vCenter as a process of its own.

Prints one line of JSON when it is ready: {"sdk", "control", "ca", "thumbprint", "pid"}. SIGTERM and SIGINT end it in
order. After SIGKILL, the next start on the same root comes back with the same state, ports and certificate.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import threading
from pathlib import Path

from farshore.lab.vcenter.service import LabVCenter, RootInUseError


def main() -> int:
    parser = argparse.ArgumentParser(prog="farshore.lab.vcenter", description="Laboratory vCenter.")
    parser.add_argument("--root", type=Path, required=True, help="directory of state, disks and certificates")
    parser.add_argument(
        "--port", type=int, default=0, help="of /sdk and /folder; 0: the last one, or any free one"
    )
    parser.add_argument("--control-port", type=int, default=0)
    parser.add_argument("--config", type=Path, help="inventory (JSON or YAML), read at the first start only")
    parser.add_argument("--user", help="login name, set at the first start")
    parser.add_argument("--password", help="its password, set at the first start")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    done = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: done.set())
    try:
        lab = LabVCenter(
            options.root,
            options.config,
            port=options.port,
            control_port=options.control_port,
            user=options.user,
            password=options.password,
        )
        lab.start()
    except (RootInUseError, ValueError, OSError) as error:
        parser.exit(2, f"the laboratory cannot start: {error}\n")
    print(json.dumps(lab.describe()), flush=True)
    done.wait()
    lab.stop()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
