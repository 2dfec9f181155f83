#!/usr/bin/env python3
"""Is the process in this container well? Exit code 0: yes.

    healthcheck http://127.0.0.1:9445/      an answer below 400
    healthcheck tcp://127.0.0.1:8443        something accepts connections
    healthcheck file:///tmp/ready           the file is there
    healthcheck ADDRESS ADDRESS …           all of it

Standard library only, so that it works before anything else does.
"""

from __future__ import annotations

import os
import socket
import sys
import urllib.request
from urllib.parse import urlsplit

TIMEOUT = 1.5  # seconds an address; all of them stay below the `timeout` of the compose health checks


def well(address: str) -> str | None:
    """What is wrong, or None."""
    parts = urlsplit(address)
    try:
        if parts.scheme == "file":
            return None if os.path.exists(parts.path) else f"{parts.path} is not there"
        if parts.scheme == "tcp" and parts.hostname and parts.port:
            socket.create_connection((parts.hostname, parts.port), TIMEOUT).close()
        elif parts.scheme == "http":
            # urlopen raises for 400 and above.
            with urllib.request.urlopen(address, timeout=TIMEOUT):  # noqa: S310 - the scheme is checked above
                pass
        else:
            return f"expected http://host:port/path, tcp://host:port or file:///path, got {address!r}"
    except (OSError, ValueError) as error:
        return f"{address}: {error}"
    return None


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"usage: {sys.argv[0]} ADDRESS…")
    problems = [problem for address in sys.argv[1:] if (problem := well(address)) is not None]
    sys.exit("; ".join(problems) or None)
