"""How to reach one QEMU machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from farshore.providers.nbd.handshake import ClientTls

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class QemuSettings:
    """One QEMU process (5.2 or newer; run against 7.2), on the worker's own host. Durations in seconds, sizes in bytes.

    `qmp` is a unix socket of QEMU for this worker alone: a socket serves one client at a time, so beside libvirt a second
    monitor is needed (`-qmp unix:…` by libvirt's `qemu:commandline`). `fleece_folder` is where the old content of blocks
    goes that the guest overwrites while a cut is read: files without a name, which vanish with QEMU. If it fills up,
    QEMU would fail the *guest's* writes; so a cut needs `fleece_free` bytes there and is given up below them.
    """

    qmp: Path
    fleece_folder: Path
    nbd: (
        str | tuple[str, int]
    )  # where QEMU's NBD server listens: a path or (host, port); started when it is not
    disks: tuple[
        str, ...
    ] = ()  # the keys (qdev ids) that are replicated; none: every disk that is written to
    persistent: bool = False  # bitmaps survive a clean stop of QEMU (qcow2 only)
    guest_agent: Path | None = None  # unix socket of the virtio-serial port org.qemu.guest_agent.0
    hooks: bool = (
        False  # the agent in the guest runs hooks that make the applications consistent (qemu-ga -F)
    )
    nbd_tls: ClientTls | None = field(default=None, repr=False)
    nbd_tls_object: str = ""  # id of QEMU's own tls-creds object, needed with `nbd_tls`
    fleece_free: int = 512 * MIB
    freeze_limit: float = 8.0  # the guest is thawed after this whatever happens
    hold_limit: float = 5.0  # a member of a group is resumed after this whatever happens
    connect_timeout: float = 5.0  # a socket that another client holds does not greet
    call_timeout: float = 20.0
    settle_timeout: float = 30.0  # for a cancelled job to go away
    read_silence: float = 30.0
    bitmaps: int = 16  # trackers kept on a disk; older ones are joined, which loses nothing
