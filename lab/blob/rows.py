"""What the catalogue knows about a container or a blob, as plain rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PAGE_BLOB = "PageBlob"
BLOCK_BLOB = "BlockBlob"


@dataclass(slots=True)
class Lease:
    """A lease as stored; `state_at` of `leases` tells what it is worth now. Times are Unix seconds."""

    id: str = ""
    duration: int = 0  # seconds, -1 = infinite
    expires: float | None = None
    breaks: float | None = None  # set once a break was asked for


@dataclass(slots=True)
class CopyState:
    """The last Copy Blob onto this blob."""

    id: str
    source: str
    status: str  # pending, success, failed, aborted
    done: int = 0
    total: int = 0
    finished: float | None = None
    description: str = ""
    # Where the bytes come from; kept so that a copy goes on after a restart.
    account: str = ""
    container: str = ""
    blob: str = ""
    snapshot: str = ""
    etag: str = ""


@dataclass(slots=True)
class BlobRow:
    """A base blob (`snapshot == ""`) or one of its snapshots."""

    container: str
    name: str
    kind: str
    store: int
    size: int
    etag: str
    modified: float
    created: float
    snapshot: str = ""
    id: int = 0
    gen: int = 0
    seq: int = 0
    props: dict[str, str] = field(default_factory=dict[str, str])
    metadata: dict[str, str] = field(default_factory=dict[str, str])
    lease: Lease = field(default_factory=Lease)
    copy: CopyState | None = None
    blocks: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])

    @property
    def path(self) -> str:
        return f"{self.container}/{self.name}"

    def doc(self) -> dict[str, Any]:
        """The part kept as one JSON document."""
        return {
            "props": self.props,
            "metadata": self.metadata,
            "lease": None if not self.lease.id else _fields(self.lease),
            "copy": None if self.copy is None else _fields(self.copy),
            "blocks": self.blocks,
        }

    def load_doc(self, doc: dict[str, Any]) -> None:
        self.props = doc["props"]
        self.metadata = doc["metadata"]
        self.lease = Lease(**doc["lease"]) if doc["lease"] else Lease()
        self.copy = CopyState(**doc["copy"]) if doc["copy"] else None
        self.blocks = [(b[0], b[1]) for b in doc["blocks"]]


@dataclass(slots=True)
class ContainerRow:
    name: str
    etag: str
    modified: float
    metadata: dict[str, str] = field(default_factory=dict[str, str])
    lease: Lease = field(default_factory=Lease)

    def doc(self) -> dict[str, Any]:
        return {"metadata": self.metadata, "lease": _fields(self.lease)}

    def load_doc(self, doc: dict[str, Any]) -> None:
        self.metadata = doc["metadata"]
        self.lease = Lease(**doc["lease"])


def _fields(item: Lease | CopyState) -> dict[str, Any]:
    return {name: getattr(item, name) for name in item.__slots__}
