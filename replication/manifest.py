"""The entries of a machine's log: recovery points and openings of epochs, as JSON with the digest first.

    {"digest":"b3:<64 hex>","body":{…}}\\n

The digest is BLAKE3 over exactly the bytes of the body as stored, and precedes it: a torn or altered entry shows
without being parsed. `parent` is the digest of the entry before: the log is a hash chain. Unknown fields of a body are
ignored, so that a newer writer's entries stay readable; `format` is raised when they would not be.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

from blake3 import blake3

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency, RecoveryPoint
from farshore.replication.ports import DiskPoint, DiskState, Manifest

FORMAT = 1
_PREFIX = b'{"digest":"'
_MIDDLE = b'","body":'
_SUFFIX = b"}\n"
_DIGEST = len("b3:") + 64


@dataclass(frozen=True, slots=True)
class Opening:
    """A new owner's first entry: it takes a number of the log, so that the former owner, whose next number that is, can
    never commit again."""

    machine: str
    number: int
    epoch: int  # rises from opening to opening; at least the unix time, so that it rises over a machine's lives too
    parent: str  # digest of the previous entry, "" at the beginning
    owner: str
    opened_at: datetime


Entry = Manifest | Opening


def digest(data: bytes) -> str:
    """`b3:<hex>` of bytes."""
    return "b3:" + blake3(data).hexdigest()


def number(entry: Entry) -> int:
    """The entry's place in the log."""
    return entry.cycle if isinstance(entry, Manifest) else entry.number


def encode(entry: Entry) -> bytes:
    """The stored form. The same entry always gives the same bytes."""
    body = json.dumps(_body(entry), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    return _PREFIX + digest(body).encode() + _MIDDLE + body + _SUFFIX


def decode(data: bytes, *, name: str) -> tuple[Entry, str]:
    """The entry and its digest. ReplicaDamaged, naming `name`, when a byte is wrong or missing."""
    start = len(_PREFIX) + _DIGEST + len(_MIDDLE)
    body = data[start : -len(_SUFFIX)]
    stated = data[len(_PREFIX) : len(_PREFIX) + _DIGEST]
    framed = data[:start] == _PREFIX + stated + _MIDDLE and data.endswith(_SUFFIX)
    if not framed or digest(body).encode() != stated:
        raise FarshoreError(
            Code.REPLICA_DAMAGED, f"The manifest {name} does not match its digest.", subject=name
        )
    try:
        return _parse(json.loads(body)), stated.decode()
    except (KeyError, ValueError, TypeError) as error:
        raise FarshoreError(
            Code.REPLICA_DAMAGED,
            f"The manifest {name} was written in a form that this version cannot read: {error}.",
            subject=name,
        ) from error


def point_id(cycle: int, entry_digest: str) -> str:
    """`p-<cycle>-<first 8 hex of the manifest's digest>`."""
    return f"p-{cycle:010d}-{entry_digest.removeprefix('b3:')[:8]}"


def cycle_of(id_of_point: str) -> int | None:
    """The cycle inside a point id; None when it is not one."""
    parts = id_of_point.split("-")
    if len(parts) != 3 or parts[0] != "p" or not parts[1].isdecimal():
        return None
    return int(parts[1])


def to_point(manifest: Manifest, entry_digest: str, *, pinned: bool = False) -> RecoveryPoint:
    """What lists show of a manifest."""
    return RecoveryPoint(
        id=point_id(manifest.cycle, entry_digest),
        machine=manifest.machine,
        cycle=manifest.cycle,
        taken_at=manifest.taken_at,
        consistency=manifest.consistency,
        digest=entry_digest,
        size_bytes=sum(disk.state.size for disk in manifest.disks),
        pinned=pinned,
        final=manifest.final,
    )


def _time(moment: datetime) -> str:
    if moment.tzinfo is None:
        raise ValueError("times are aware")
    return moment.astimezone(UTC).isoformat(timespec="microseconds")


def _body(entry: Entry) -> dict[str, Any]:
    if isinstance(entry, Opening):
        return {
            "format": FORMAT,
            "kind": "epoch",
            "machine": entry.machine,
            "number": entry.number,
            "epoch": entry.epoch,
            "parent": entry.parent,
            "owner": entry.owner,
            "opened_at": _time(entry.opened_at),
        }
    return {
        "format": FORMAT,
        "kind": "point",
        "machine": entry.machine,
        "cycle": entry.cycle,
        "epoch": entry.epoch,
        "parent": entry.parent,
        "taken_at": _time(entry.taken_at),
        "committed_at": _time(entry.committed_at),
        "consistency": entry.consistency.value,
        "final": entry.final,
        "full": entry.full,
        "reason": entry.reason,
        "cut": entry.cut,
        "bytes_changed": entry.bytes_changed,
        "bytes_shipped": entry.bytes_shipped,
        "disks": [
            {
                "key": disk.state.key,
                "label": disk.state.label,
                "size": disk.state.size,
                "identity": disk.state.identity,
                "tracker": disk.state.tracker,
                "boot": disk.state.boot,
                "digest": disk.digest,
                "snapshot": disk.snapshot,
                "leaves": disk.leaves,
            }
            for disk in entry.disks
        ],
        "tags": dict(entry.tags),
    }


def _parse(raw: object) -> Entry:
    if not isinstance(raw, Mapping):
        raise TypeError("the body is not an object")
    body = cast("Mapping[str, Any]", raw)
    if body["format"] != FORMAT:
        raise ValueError(f"format {body['format']}")
    if body["kind"] == "epoch":
        return Opening(
            machine=body["machine"],
            number=int(body["number"]),
            epoch=int(body["epoch"]),
            parent=body["parent"],
            owner=body["owner"],
            opened_at=datetime.fromisoformat(body["opened_at"]),
        )
    if body["kind"] != "point":
        raise ValueError(f"kind {body['kind']!r}")
    return Manifest(
        machine=body["machine"],
        cycle=int(body["cycle"]),
        epoch=int(body["epoch"]),
        parent=body["parent"],
        taken_at=datetime.fromisoformat(body["taken_at"]),
        committed_at=datetime.fromisoformat(body["committed_at"]),
        consistency=Consistency(body["consistency"]),
        final=bool(body["final"]),
        full=bool(body["full"]),
        reason=body["reason"],
        cut=body["cut"],
        bytes_changed=int(body["bytes_changed"]),
        bytes_shipped=int(body["bytes_shipped"]),
        disks=tuple(
            DiskPoint(
                state=DiskState(
                    key=disk["key"],
                    label=disk["label"],
                    size=int(disk["size"]),
                    identity=disk["identity"],
                    tracker=disk["tracker"],
                    boot=bool(disk["boot"]),
                ),
                digest=disk["digest"],
                snapshot=disk["snapshot"],
                leaves=disk["leaves"],
            )
            for disk in body["disks"]
        ),
        tags=dict(body["tags"]),
    )
