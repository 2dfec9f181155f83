"""What the tests of the Azure provider share: the laboratory as they see it, names and bytes of one test."""

from __future__ import annotations

import asyncio
import hashlib
import struct
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from azure.storage.blob import ContainerClient

from farshore.domain.errors import FarshoreError
from farshore.lab.azure.control import AzureControl
from farshore.lab.azure.knobs import Knobs
from farshore.lab.azure.whole import LabAzureWhole
from farshore.providers.azure.adapter import AzureSite
from farshore.providers.azure.settings import AzureSettings
from farshore.providers.ports import DiskRequest, Owner, Purpose, Resource, TargetNic, TargetSpec
from farshore.replication.ports import DiskState

MIB = 1 << 20


class Killed(BaseException):
    """Stands for kill -9 in the middle of a call: no handler of the product may see it as an error."""


@dataclass
class Notes:
    """A checkpoint that remembers, and that can end the caller's life at the n-th note of a kind."""

    seen: list[Mapping[str, Any]] = field(default_factory=list)
    kill_when: Callable[[Mapping[str, Any]], bool] | None = None

    def __call__(self, note: Mapping[str, Any]) -> None:
        self.seen.append(dict(note))
        if self.kill_when is not None and self.kill_when(note):
            raise Killed

    @property
    def last(self) -> Mapping[str, Any]:
        return self.seen[-1] if self.seen else {}

    def with_token(self) -> list[Mapping[str, Any]]:
        return [note for note in self.seen if note.get("token")]


@dataclass
class Azure:
    """The laboratory as tests see it."""

    lab: LabAzureWhole
    control: AzureControl
    settings: AzureSettings
    container: ContainerClient

    def blob_rule(self, action: str, **rule: Any) -> None:
        self.lab.blob_server.faults.add(action, **rule)

    def copies(self, **policy: Any) -> None:
        self.lab.blob_server.faults.handle_control(
            "copy", {"account": self.settings.storage_account, **policy}
        )

    def reset(self) -> None:
        self.control.clear_faults()
        self.control.clear_requests()
        self.control.turn(**Knobs(time_scale=0.002).to_json())
        self.lab.blob_server.faults.clear()
        self.copies(bytes_per_s=0, delay=0, hold=False, fail="")

    def created(self, text: str) -> dict[str, int]:
        """How often each resource whose id has `text` in it really came into being."""
        return {id_: n for id_, n in self.control.creations().items() if text.lower() in id_}

    def states(self, text: str) -> set[str]:
        """Provisioning states of what exists now."""
        return {r.state for r in self.control.resources() if text.lower() in r.id.lower()}

    def there(self, text: str) -> list[str]:
        """Ids of what exists now."""
        return sorted(r.id for r in self.control.resources() if text.lower() in r.id.lower())

    def last_request(self) -> int:
        """Where the request log stands."""
        rows = self.control.requests()
        return rows[-1].seq if rows else 0

    def asked(self, operation: str, *, after: int = 0, text: str = "") -> int:
        """How many requests of an operation came since `after`."""
        return sum(r.operation == operation and text in r.path for r in self.control.requests(after))

    def copy_starts(self) -> int:
        return self.lab.blob_server.faults.counts["CopyBlob"]

    def copies_of(self, text: str) -> list[Any]:
        """Copy Blob requests whose destination has `text` in its name; status 0: done, answer lost."""
        return [s for s in list(self.lab.blob_server.faults.log) if s.op == "CopyBlob" and text in s.path]

    def staged(self, text: str = "") -> list[str]:
        return [
            str(b.name) for b in self.container.list_blobs(name_starts_with="staging/") if text in str(b.name)
        ]


def footer(size: int) -> bytes:
    """A fixed VHD's footer (Microsoft's Virtual Hard Disk format, 2006)."""
    out = bytearray(
        struct.pack(
            ">8sIIQI4sI4sQQHBBII16s428x", b"conectix", 2, 0x10000, 2**64 - 1, 0, b"fars", 0x10000, b"Wi2k", size, size,
            65535, 16, 255, 2, 0, uuid.UUID(int=7).bytes,
        )
    )  # fmt: skip
    out[64:68] = struct.pack(">I", ~sum(out) & 0xFFFFFFFF)
    return bytes(out)


@dataclass
class World:
    """Names and bytes of one test."""

    cloud: Azure
    tag: str

    def owner(self, machine: str = "web", *, purpose: Purpose = Purpose.FAILOVER, run: str = "run") -> Owner:
        return Owner(f"plan-{self.tag}", f"{run}-{self.tag}", f"{machine}-{self.tag}", purpose)

    def spec(self, machine: str = "web", **changes: Any) -> TargetSpec:
        base = TargetSpec(
            machine=f"{machine}-{self.tag}",
            name=f"{machine}-{self.tag}",
            size="Standard_B1s",
            os="linux",
            firmware="efi",
            zone=None,
            nics=(TargetNic("dr-vnet", "web"),),
            tags={"team": "crm"},
        )
        return replace(base, **changes)

    def replica(self, content: bytes = b"boot" * 1024, size: int = 2 * MIB) -> str:
        """A page blob as the replica store keeps it, frozen; the handle is its URL."""
        blob = self.cloud.container.get_blob_client(f"replica-{uuid.uuid4().hex[:8]}")
        blob.create_page_blob(size + 512)
        blob.upload_page(footer(size), size, 512)
        padded = content + bytes(-len(content) % 512)
        blob.upload_page(padded, 0, len(padded))
        stamp = blob.create_snapshot()["snapshot"]
        blob.upload_page(b"later" + bytes(507), 0, 512)  # replication goes on
        url = f"{blob.url}?snapshot={stamp}"
        blob.close()
        return url

    def request(
        self, handle: str, index: int = 0, point: str = "p-0000000001-aabbccdd", size: int = 2 * MIB
    ) -> DiskRequest:
        state = DiskState(
            key=str(2000 + index),
            label=f"disk {index}",
            size=size,
            identity="i",
            tracker=None,
            boot=index == 0,
        )
        return DiskRequest(state=state, index=index, snapshot=handle, digest="b3:00", point=point)

    async def disk(self, site: AzureSite, owner: Owner | None = None, index: int = 0) -> Resource:
        who = owner or self.owner()
        return await site.create_disk(
            who, self.spec(), self.request(self.replica(), index), resume={}, checkpoint=Notes()
        )

    async def machine(
        self, site: AzureSite, owner: Owner | None = None, spec: TargetSpec | None = None
    ) -> tuple[Resource, Resource, Resource]:
        """(machine, disk, nic), all made."""
        who, what = owner or self.owner(), spec or self.spec()
        disk = await self.disk(site, who)
        nic = await site.create_nic(who, what, 0, what.nics[0])
        made = await site.create_machine(who, what, [disk], [nic], resume={}, checkpoint=Notes())
        return made, disk, nic


def sha256_of(content: bytes, size: int) -> str:
    return hashlib.sha256(content + bytes(size - len(content))).hexdigest()


async def settled(call: Callable[[], Any], *, tries: int = 60) -> Any:
    """Call until it doesn't raise a retryable error: what an activity's retry policy does, without waiting long."""
    for _ in range(tries - 1):
        try:
            return await call()
        except FarshoreError as error:
            if not error.retryable:
                raise
            await asyncio.sleep(min(error.retry_after or 0.05, 2))
    return await call()


def lab_file(cloud: Azure, disk: Resource) -> Path:
    return cloud.control.disk_path(disk.id)


async def until(holds: Callable[[], bool], *, seconds: float = 10.0) -> None:
    """Wait for a condition of the laboratory."""
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110  there is no event to wait for: the laboratory is another process to us
            await asyncio.sleep(0.01)
