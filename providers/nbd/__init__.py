"""QEMU and libvirt guests as protected machines: QMP, dirty bitmaps, and NBD by a client of our own.

protocol   NBD's numbers and messages (pure)
wire       exact bytes over a socket, plain or TLS
handshake  from a connection to an agreement about an export
client     the read-only NBD client: threads, several requests in flight
qmp        QEMU's monitor
disks      the disks of a machine; the names of what a cut makes
bitmaps    what trackers promise and when they are not believed (pure)
fleece     what a cut makes inside QEMU, and its removal
guardian   the process that thaws and resumes whatever happens to the worker
keeper     the worker's side of it
cut        one instant: changes and bytes; fills `replication.ports.SourceCut`
source     fills `replication.ports.Source`, and what a group's barrier asks of it
settings   how to reach one machine
errors     every failure becomes a FarshoreError of the catalogue

May import domain and replication.ports. Needs nothing but the standard library.
"""

from farshore.providers.nbd.client import NbdClient
from farshore.providers.nbd.handshake import ClientTls
from farshore.providers.nbd.settings import QemuSettings
from farshore.providers.nbd.source import QemuSource

__all__ = ["ClientTls", "NbdClient", "QemuSettings", "QemuSource"]
