"""A private copy of a replica's snapshot, for one import: Copy Blob inside the storage account.

The copy gives every disk its own blob, so that Azure's limit of one import a minute and blob does not bind, and replication
goes on beside it. Copies are asynchronous at Azure's side; here they are begun once, watched, and replaced when
they broke.

A point between two frozen states is restored onto such a copy, or onto an empty blob, by writing the journal. What a leaf has
to hold is the same whoever writes it and however often, so attempts need no order: a restore that died is done again on the
same blob, and a mark in its metadata tells when it is whole.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from urllib.parse import quote

from azure.core import MatchConditions
from azure.core.exceptions import AzureError
from azure.storage.blob import BlobProperties
from azure.storage.blob.aio import BlobClient

from farshore.domain.errors import Code, FarshoreError
from farshore.providers.azure import names, vhd
from farshore.providers.azure.client import AzureClients
from farshore.providers.azure.errors import classify, is_missing, said
from farshore.providers.azure.pageblobs import AzureReplicaStore
from farshore.providers.ports import Checkpoint, Owner, Resource
from farshore.replication.engine import Gather
from farshore.replication.ports import PointBytes

_STEP = "copy"
_FROM = "restoredfrom"  # metadata: the snapshot under the journal
_RESTORED = "restored"  # metadata: the journal was written, all of it
_WRITERS = 8  # requests at a time
_NO_FENCE = 1 << 62  # a staging blob belongs to its run; its sequence number stays 0


def _same(found: BlobProperties, metadata: Mapping[str, str]) -> bool:
    return {key.lower(): value for key, value in (found.metadata or {}).items()} == dict(metadata)


@dataclass(frozen=True, slots=True)
class StagedBlob:
    """A staging blob as a listing shows it."""

    resource: Resource
    tags: dict[str, str]


class Staging:
    """The folder `staging/` of the container of replicas."""

    def __init__(self, clients: AzureClients) -> None:
        self._clients = clients
        self._settings = clients.settings

    async def copy(
        self, owner: Owner, index: int, *, point: str, source_url: str, checkpoint: Checkpoint
    ) -> str:
        """Have a whole copy of `source_url`; returns its URL.

        A copy of the same run and point is taken as it is or waited for; one that failed, was aborted, or holds another
        point is replaced. Raises: PointExpired when the snapshot is gone, TargetOperationFailed when the copy broke.
        """
        name = names.staging_blob(owner, index)
        blob = self._clients.container.get_blob_client(name)
        return await self._copied(
            blob, name, owner, index, names.metadata(owner, point), source_url, checkpoint
        )

    async def _copied(
        self,
        blob: BlobClient,
        name: str,
        owner: Owner,
        index: int,
        metadata: dict[str, str],
        source_url: str,
        checkpoint: Checkpoint,
    ) -> str:
        started = False
        while True:
            found = await self._properties(blob, name)
            if found is None:
                await self._start(blob, name, source_url, metadata, owner)
                started = True
                continue
            status = str(found.copy.status or "")
            same = _same(found, metadata)
            if same and status == "success":
                return blob.url
            if same and status == "pending":
                checkpoint({"step": _STEP, "disk": index, "progress": found.copy.progress or ""})
                await asyncio.sleep(min(self._settings.polling_interval, self._settings.checkpoint_interval))
                continue
            if same and started:
                raise FarshoreError(
                    Code.TARGET_OPERATION_FAILED,
                    f"Copying the recovery point for {name} ended as {status or 'unknown'}: "
                    f"{found.copy.status_description or 'Azure gives no reason'}.",
                    subject=owner.machine,
                    details={"copy_status": status, "copy_text": found.copy.status_description or ""},
                )
            if not names.is_of(owner, names.from_metadata(found.metadata)):
                raise FarshoreError(
                    Code.NAME_TAKEN,
                    f"There is a blob {name} already; {names.describe(names.from_metadata(found.metadata))}.",
                    subject=owner.machine,
                )
            await self._discard(blob, name, found)

    async def restore(
        self,
        owner: Owner,
        index: int,
        *,
        point: str,
        source_url: str,
        journal: PointBytes,
        checkpoint: Checkpoint,
    ) -> str:
        """Have the point's disk in a blob; returns its URL. `source_url` is the frozen state that the journal is written
        onto, "" for none. Raises what `copy` raises, and ReplicaDamaged."""
        name = names.staging_blob(owner, index)
        blob = self._clients.container.get_blob_client(name)
        metadata = {
            **names.metadata(owner, point),
            _FROM: quote(source_url.partition("?")[2], safe="") or "zeros",
        }
        whole = {**metadata, _RESTORED: "yes"}
        found = await self._properties(blob, name)
        if found is not None and _same(found, whole):
            return blob.url
        if source_url:
            await self._copied(blob, name, owner, index, metadata, source_url, checkpoint)
        else:
            await self._empty(blob, name, owner, metadata, journal.size)
        await self._write_out(name, journal, index, on_base=bool(source_url), checkpoint=checkpoint)
        try:
            await blob.set_blob_metadata(whole)
        except AzureError as error:
            raise classify(error, doing=f"marking blob {name}", subject=name) from error
        return blob.url

    async def _empty(
        self, blob: BlobClient, name: str, owner: Owner, metadata: dict[str, str], size: int
    ) -> None:
        """An empty disk, unless this very restore has made it already."""
        found = await self._properties(blob, name)
        if found is not None and (not _same(found, metadata) or found.size != vhd.blob_size(size)):
            if not names.is_of(owner, names.from_metadata(found.metadata)):
                raise FarshoreError(
                    Code.NAME_TAKEN,
                    f"There is a blob {name} already; {names.describe(names.from_metadata(found.metadata))}.",
                    subject=owner.machine,
                )
            await self._discard(blob, name, found)
            found = None
        try:
            if found is None:
                await blob.create_page_blob(vhd.blob_size(size), metadata=metadata)
            footer = vhd.footer(size, name)
            await blob.upload_page(footer, vhd.virtual_size(size), vhd.FOOTER)
        except AzureError as error:
            raise classify(error, doing=f"making blob {name}", subject=name) from error

    async def _write_out(
        self, name: str, journal: PointBytes, index: int, *, on_base: bool, checkpoint: Checkpoint
    ) -> None:
        """In threads, told about as it goes."""
        done = 0
        stop = threading.Event()
        lock = threading.Lock()

        def look() -> None:
            if stop.is_set():
                raise InterruptedError

        def work() -> None:
            target = AzureReplicaStore(self._settings)

            def sink(offset: int, data: bytes | memoryview) -> None:
                nonlocal done
                target.backend.write(name, offset, data, _NO_FENCE)
                with lock:
                    done += len(data)

            gather = Gather(sink)
            try:
                journal.write_out(
                    gather,
                    clear=lambda offset, length: target.backend.clear(name, offset, length, _NO_FENCE),
                    on_base=on_base,
                    look=look,
                )
                gather.finish(workers=_WRITERS, look=look)
            finally:
                target.close()

        task = asyncio.ensure_future(asyncio.to_thread(work))
        try:
            while not task.done():
                checkpoint({"step": "replay", "disk": index, "mib": done >> 20})
                await asyncio.wait([task], timeout=self._settings.checkpoint_interval)
            await task
        finally:
            stop.set()  # when we are cancelled; nobody waits for it for long
            if not task.done():
                await asyncio.wait([task])

    async def remove(self, name: str) -> None:
        """Delete a staging blob; gone already is fine. A copy under way is aborted first."""
        blob = self._clients.container.get_blob_client(name)
        found = await self._properties(blob, name)
        if found is not None:
            await self._discard(blob, name, found)

    async def list(self) -> AsyncIterator[StagedBlob]:
        """Every staging blob with the tags in its metadata."""
        try:
            async for blob in self._clients.container.list_blobs(
                name_starts_with=names.STAGING, include=["metadata"]
            ):
                name = str(blob.name)
                url = f"{self._clients.container.url}/{name}"
                yield StagedBlob(Resource(id=url, kind="blob", name=name), names.from_metadata(blob.metadata))
        except AzureError as error:
            if said(error).key == "containernotfound":
                return  # no replica was ever stored here
            raise classify(error, doing="listing staging blobs", subject=names.STAGING) from error

    async def _properties(self, blob: BlobClient, name: str) -> BlobProperties | None:
        try:
            return await blob.get_blob_properties()
        except AzureError as error:
            if is_missing(error):
                return None
            raise classify(error, doing=f"reading blob {name}", subject=name) from error

    async def _start(
        self, blob: BlobClient, name: str, source_url: str, metadata: dict[str, str], owner: Owner
    ) -> None:
        try:
            # Only if absent: of two attempts at the same time one begins the copy, the other finds it.
            await blob.start_copy_from_url(
                source_url, metadata=metadata, match_condition=MatchConditions.IfMissing
            )
        except AzureError as error:
            what = said(error)
            if (
                what.key in ("blobalreadyexists", "pendingcopyoperation", "conditionnotmet")
                or what.status == 412
            ):
                return
            if what.key == "cannotverifycopysource" or is_missing(error):
                raise FarshoreError(
                    Code.POINT_EXPIRED,
                    f"The replica of {owner.machine} has no such snapshot any more: {what.message}",
                    subject=owner.machine,
                    details={"azure_code": what.code, "azure_message": what.message},
                ) from error
            raise classify(error, doing=f"copying the recovery point to {name}", subject=name) from error

    async def _discard(self, blob: BlobClient, name: str, found: BlobProperties) -> None:
        try:
            if str(found.copy.status or "") == "pending" and found.copy.id:
                await blob.abort_copy(found.copy.id)
        except AzureError as error:
            if said(error).key != "nopendingcopyoperation" and not is_missing(error):
                raise classify(error, doing=f"stopping the copy to {name}", subject=name) from error
        try:
            await blob.delete_blob()
        except AzureError as error:
            if not is_missing(error):
                raise classify(error, doing=f"deleting blob {name}", subject=name) from error
