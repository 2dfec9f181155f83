"""What a place that keeps replicas must be able to do: the few primitives on which all safety of `journal` rests.

Two kinds of things are stored under names: small objects (bytes, created or replaced in one piece) and images (large,
written at random, frozen as a whole). A page blob container and a folder of files both can. Promises:

* `create` has exactly one winner for a name, and what it answered True for is durable and complete;
* an image carries a fence, a number that only rises; a change that is requested with a smaller number than the fence is
  refused with ReplicaFenced, decided in one step with the change itself;
* an image's `flush` makes all earlier changes durable; `freeze` freezes what was flushed;
* whatever fails raises `FarshoreError`, retryable where trying again can help; a call whose outcome is unknown may be
  repeated, but `create`, after which the caller has to look, and changes of an image, which need a higher fence first
  where a request can arrive late.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from farshore.domain.errors import Code, FarshoreError
from farshore.replication.ports import Extent


def fenced(machine: str, what: str) -> FarshoreError:
    """The error of a writer that was overtaken."""
    return FarshoreError(
        Code.REPLICA_FENCED, f"Another writer took over the replica of {machine}: {what}.", subject=machine
    )


def handle(image: str, snapshot: str) -> str:
    """A frozen state in one text."""
    return f"{image}@{snapshot}"


def parse_handle(text: str) -> tuple[str, str]:
    """Image name and id of the frozen state."""
    image, _, snapshot = text.rpartition("@")
    if not image or not snapshot:
        raise FarshoreError(Code.REPLICA_DAMAGED, f"{text!r} is not the name of a frozen disk.")
    return image, snapshot


class Kind(StrEnum):
    """What an image is for. A store may dress a disk differently, e.g. with a VHD footer behind its last byte."""

    DISK = "disk"
    TABLE = "table"


@dataclass(frozen=True, slots=True)
class Stored:
    """A small object of a listing. `version` changes whenever the bytes do."""

    name: str
    version: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A frozen state of an image."""

    id: str
    epoch: int  # of the writer that made it
    cycle: int


@dataclass(frozen=True, slots=True)
class Image:
    """An image of a listing, with what is frozen of it."""

    name: str
    fence: int
    snapshots: tuple[Snapshot, ...]


class Backend(Protocol):
    """See the module."""

    def create(self, name: str, data: bytes) -> bool:
        """Create if absent; False if it exists."""
        ...

    def put(self, name: str, data: bytes) -> None:
        """Create or replace in one piece."""
        ...

    def get(self, name: str) -> bytes | None: ...

    def part(self, name: str, offset: int, length: int) -> bytes | None:
        """Bytes of an object; fewer where it ends earlier; None if it does not exist."""
        ...

    def list(self, prefix: str) -> list[Stored]:
        """Objects under a prefix, by name. Images are not among them."""
        ...

    def delete(self, name: str) -> None:
        """Idempotent."""
        ...

    def images(self, prefix: str) -> list[Image]: ...

    def ensure_image(self, name: str, kind: Kind, size: int, fence: int) -> int:
        """Create (all zeros) if absent, raise its fence to `fence` at least, return its present size."""
        ...

    def resize_image(self, name: str, kind: Kind, size: int, fence: int) -> None:
        """Grow with zeros or cut. Idempotent; frozen states keep their size."""
        ...

    def raise_fence(self, name: str, fence: int) -> None:
        """From now on changes under a smaller number fail. Never lowers it; an image that is gone is no error."""
        ...

    def write(self, name: str, offset: int, data: bytes | memoryview, fence: int) -> None: ...

    def clear(self, name: str, offset: int, length: int, fence: int) -> None: ...

    def read(self, name: str, offset: int, length: int, snapshot: str = "") -> bytes:
        """Exactly `length` bytes. ReplicaDamaged when the image, the frozen state or bytes of it are missing."""
        ...

    def data(self, name: str, snapshot: str = "") -> Sequence[Extent]:
        """Extents that may hold other bytes than zeros, ordered. May be the whole image."""
        ...

    def flush(self, name: str, fence: int) -> None: ...

    def freeze(self, name: str, cycle: int, epoch: int, fence: int) -> str:
        """Freeze the image as it is now; returns the id of the frozen state."""
        ...

    def drop(self, name: str, snapshot: str) -> None:
        """Delete a frozen state. Idempotent."""
        ...

    def delete_image(self, name: str, fence: int) -> None:
        """Delete an image with all its frozen states, unless its fence is above `fence`. Idempotent."""
        ...

    def close(self) -> None: ...
