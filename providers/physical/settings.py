"""How to reach one agent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class PhysicalSettings:
    """One agent. Durations in seconds, sizes in bytes. Keys are files: their paths are no secrets.

    Trust: only the agents' own authority (`ca_file`) is trusted and the host name must match the agent's certificate; the
    worker shows a certificate of the same authority. There is no way to switch verification off.
    """

    host: str
    ca_file: str
    certificate_file: str
    key_file: str
    port: int = 7443
    seed_folder: Path | None = None  # room for first copies of disks without a snapshot device; None: none
    connect_timeout: float = 5.0
    call_timeout: float = 30.0  # silence on a connection before the call fails
    cut_timeout: float = 900.0  # hooks, barriers and what is kept after them
    read_chunk: int = 4 * MIB
    read_tries: int = 5
    read_retry_delay: float = 0.5  # doubles with each try of a range
    seed_rounds: int = 8  # copies in advance before a first copy gives up
