"""How to reach one vCenter."""

from __future__ import annotations

from dataclasses import dataclass, field

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class VSphereSettings:
    """One vCenter (6.5 or newer) and how it is used. Secrets arrive resolved. Durations in seconds, sizes in bytes.

    Trust: with `ca_file` only that authority is trusted and the host name must match; `thumbprint` (SHA-256 of the
    certificate, hex, colons allowed) pins the certificate, in addition or instead. With neither, the machine's own
    authorities decide. There is no way to switch verification off.
    """

    host: str
    user: str
    password: str = field(repr=False)
    port: int = 443
    ca_file: str | None = None
    thumbprint: str | None = None
    datacenter: str | None = None  # inventory path; None: machines of all datacenters
    encode_twice: bool = (
        False  # percent-encode dcPath and dsName twice in /folder requests, as some servers want
    )
    max_connections: int = 4  # to /folder, over all machines of the site
    threads: int = 64  # steps that may wait at the same time (a plan shuts many machines down at once)
    read_chunk: int = 4 * MIB  # longest single range request
    connect_timeout: float = 5.0
    call_timeout: float = 20.0  # silence on a connection before the call fails
    keep_alive: float = 240.0  # sessions end after 30 minutes without SOAP calls
    poll: float = 2.0  # longest wait inside one WaitForUpdatesEx, so that steps can heartbeat
    snapshot_timeout: float = 900.0  # creation of one snapshot, with quiescing
    removal_timeout: float = 3600.0  # removal of one snapshot, with consolidation
    settle_timeout: float = 60.0  # for a task that somebody else started; then the machine counts as busy
    task_timeout: float = 600.0  # any other task
    read_tries: int = 5
    read_retry_delay: float = 0.5  # doubles with each try of a range
