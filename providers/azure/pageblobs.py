"""Replicas in Azure: the backend on which `replication.journal` keeps journal, disks and points.

A disk is a page blob that is a fixed VHD (`vhd`), ready to be imported: byte n of the disk is byte n of the blob. Its
leaf table is a page blob as well. A frozen state is a blob snapshot; small objects are block blobs, created with
`If-None-Match: *` where only one may win. The fence of an image is the blob's sequence number: every Put Page carries
`x-ms-if-sequence-number-le`, so the service compares and writes in one step. No leases: a sequence number does not
expire, needs no renewal, and a dead owner leaves nothing that a successor would have to break or wait for.

Blob metadata holds what a listing has to tell: size and kind of an image, epoch and cycle of a snapshot.

Requests that may be repeated are repeated here a few times, because one 503 among the thousands of writes of a first
copy must not cost the cycle; a refused fence never is, nor a creation, whose outcome the caller looks up. A change of
pages is repeated only when the service answered that it did not do it (ServerBusy): a request without an answer may
still arrive, and its sequence number would be as good as that of the repetition and of all later writes of the epoch.
After it only a higher number helps: the error ends the cycle, and the leg takes a new epoch.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import quote

from azure.core import MatchConditions
from azure.core.credentials import AzureNamedKeyCredential
from azure.core.exceptions import AzureError, HttpResponseError
from azure.storage.blob import (
    BlobClient,
    BlobSasPermissions,
    BlobServiceClient,
    SequenceNumberAction,
    generate_blob_sas,
)

from farshore.domain.errors import Code, FarshoreError
from farshore.providers.azure import vhd
from farshore.providers.azure.errors import classify, said
from farshore.providers.azure.settings import AzureSettings
from farshore.replication.backend import Image, Kind, Snapshot, Stored, fenced, parse_handle
from farshore.replication.engine import JournalStore, Kek, LocalKek, Options
from farshore.replication.ports import Extent

_PAGE = 512
_CLIENTS = 128  # of single blobs, kept
_REQUESTS = 8  # at a time, of redo and restores
_MOST = 4 << 20  # the most bytes of one Put Page
_TRIES = 5
_FIRST_PAUSE = 0.1  # seconds; doubled from try to try
_LONGEST_PAUSE = 2.0  # also of what the service asks for: a leg that is asked to stop must not sleep longer
_TIMEOUT = 30.0  # seconds without a byte until a request counts as lost
_PASSING = frozenset({Code.TARGET_UNREACHABLE, Code.TARGET_THROTTLED, Code.TARGET_BUSY})
_REFUSED = frozenset({429, 503})  # together with ServerBusy and the like: nothing was done
_BEYOND = 416  # the answer to a range behind the end of a blob
_GONE = frozenset({"blobnotfound", "containernotfound", "resourcenotfound"})
_TAKEN = frozenset({"blobalreadyexists", "unauthorizedbloboverwrite", "conditionnotmet"})

T = TypeVar("T")


class PageBlobBackend:
    """See `replication.backend.Backend`."""

    def __init__(self, service: BlobServiceClient, container: str) -> None:
        self._service = service
        self._container = service.get_container_client(container)
        # Making a client takes the SDK a tenth of a small request.
        self._client_of = lru_cache(_CLIENTS)(
            lambda name, snapshot: self._container.get_blob_client(name, snapshot=snapshot or None)
        )

    # small objects ------------------------------------------------------------------------------------------------

    def create(self, name: str, data: bytes) -> bool:
        for _ in range(2):
            try:
                self._blob(name).upload_blob(data, overwrite=False)
                return True
            except AzureError as error:
                code = said(error).key
                if code in _TAKEN:
                    return False
                if code == "containernotfound":
                    self._create_container()
                    continue
                raise classify(error, doing=f"creating {name}", subject=name) from error
        raise FarshoreError(Code.TARGET_BUSY, f"The container of {name} cannot be created now.", subject=name)

    def _create_container(self) -> None:
        try:
            self._container.create_container()
        except AzureError as error:
            if said(error).key != "containeralreadyexists":
                raise classify(error, doing="creating the container of the replicas") from error

    def put(self, name: str, data: bytes) -> None:
        self._again(lambda: self._blob(name).upload_blob(data, overwrite=True), f"writing {name}", name)

    def get(self, name: str) -> bytes | None:
        return self._again(lambda: _unless_gone(self._blob(name)), f"reading {name}", name)

    def part(self, name: str, offset: int, length: int) -> bytes | None:
        def call() -> bytes | None:
            try:
                return self._blob(name).download_blob(offset, length).readall()
            except HttpResponseError as error:
                if said(error).key in _GONE:
                    return None
                if said(error).status == _BEYOND:
                    return b""
                raise

        return self._again(call, f"reading {length} bytes at {offset} of {name}", name)

    def list(self, prefix: str) -> list[Stored]:
        def call() -> list[Stored]:
            found: list[Stored] = []
            for blob in _listing(self._container.list_blobs(name_starts_with=prefix)):
                if _kind_of(blob) == "BlockBlob":
                    found.append(Stored(str(blob.name), str(blob.etag)))
            return sorted(found, key=lambda stored: stored.name)

        return self._again(call, f"listing {prefix}", prefix)

    def delete(self, name: str) -> None:
        self._again(lambda: _quiet_delete(self._blob(name)), f"deleting {name}", name)

    # images -------------------------------------------------------------------------------------------------------

    def images(self, prefix: str) -> list[Image]:
        def call() -> list[Image]:
            fences: dict[str, int] = {}
            frozen: dict[str, list[Snapshot]] = {}
            blobs = self._container.list_blobs(
                name_starts_with=f"{prefix}d/", include=["snapshots", "metadata"]
            )
            for blob in _listing(blobs):
                if _kind_of(blob) != "PageBlob":
                    continue
                name, meta = str(blob.name), _metadata(blob)
                frozen.setdefault(name, [])
                if blob.snapshot:
                    snapshot = Snapshot(
                        str(blob.snapshot), epoch=_number(meta.get("epoch")), cycle=_number(meta.get("cycle"))
                    )
                    frozen[name].append(snapshot)
                else:
                    fences[name] = _number(blob.page_blob_sequence_number)
            return [Image(name, fences.get(name, 0), tuple(frozen[name])) for name in sorted(frozen)]

        return self._again(call, f"listing the disks of {prefix}", prefix)

    def ensure_image(self, name: str, kind: Kind, size: int, fence: int) -> int:
        def call() -> int:
            blob = self._blob(name)
            properties = self._properties(blob)
            if properties is None:
                # If somebody else wins the creation, or our answer was lost, the next look finds the blob.
                with contextlib.suppress(_Taken):
                    _if_absent(
                        lambda: blob.create_page_blob(
                            _physical(kind, size),
                            metadata={
                                "size": str(size),
                                "kind": kind.value,
                                "epoch": str(fence),
                                "cycle": "0",
                            },
                            sequence_number=fence,
                            match_condition=MatchConditions.IfMissing,
                        )
                    )
                properties = self._properties(blob)
                if properties is None:
                    raise FarshoreError(
                        Code.TARGET_NOT_VISIBLE_YET, f"{name} is not visible yet.", subject=name
                    )
            self._raise(blob, name, fence)
            present = _number(_metadata(properties).get("size"))
            if kind is Kind.DISK and int(properties.size) == vhd.blob_size(present):
                self._ensure_footer(blob, name, present, fence)
            return present

        return self._again(call, f"opening {name}", name, pages=True)

    def _ensure_footer(self, blob: BlobClient, name: str, size: int, fence: int) -> None:
        wanted = vhd.footer(size, name)
        at = vhd.virtual_size(size)
        if _range(blob, at, vhd.FOOTER) != wanted:
            blob.upload_page(wanted, at, vhd.FOOTER, if_sequence_number_lte=fence)

    def resize_image(self, name: str, kind: Kind, size: int, fence: int) -> None:
        def call() -> None:
            blob = self._blob(name)
            properties = self._properties(blob)
            if properties is None:
                raise _missing(name)
            self._raise(blob, name, fence)
            old, physical = _number(_metadata(properties).get("size")), int(properties.size)
            if kind is Kind.DISK:
                # Nothing of a larger disk, and no old footer, may stay behind the end of a smaller one.
                edge = -(-min(old, size) // _PAGE) * _PAGE
                if physical > edge:
                    blob.clear_page(edge, physical - edge, if_sequence_number_lte=fence)
            if physical != _physical(kind, size):
                # Resizing knows no sequence numbers; the ETag stands for the fence that was seen just now.
                seen = self._properties(blob)
                if seen is None or _number(seen.page_blob_sequence_number) > fence:
                    raise fenced(name, "its fence was raised")
                blob.resize_blob(
                    _physical(kind, size), etag=str(seen.etag), match_condition=MatchConditions.IfNotModified
                )
            if kind is Kind.DISK:
                self._ensure_footer(blob, name, size, fence)
            # Last: until the size is told, a successor does all of this again.
            blob.set_blob_metadata({**_metadata(properties), "size": str(size)})

        self._again(call, f"resizing {name}", name, pages=True)

    def raise_fence(self, name: str, fence: int) -> None:
        def call() -> None:
            try:
                self._raise(self._blob(name), name, fence)
            except HttpResponseError as error:
                if said(error).key not in _GONE:
                    raise

        self._again(call, f"fencing {name}", name)

    def _raise(self, blob: BlobClient, name: str, fence: int) -> None:
        answer: Mapping[str, Any] = blob.set_sequence_number(SequenceNumberAction.MAX, str(fence))
        number = answer.get("blob_sequence_number")
        if number is not None and _number(number) > fence:
            raise fenced(name, f"its sequence number is {number}, ours {fence}")

    def write(self, name: str, offset: int, data: bytes | memoryview, fence: int) -> None:
        body = bytes(data)
        if len(body) % _PAGE:
            body += bytes(_PAGE - len(body) % _PAGE)  # the end of an odd disk; what follows is padding
        for at in range(0, len(body), _MOST):
            part = body[at : at + _MOST]
            self._again(
                lambda part=part, at=at: self._blob(name).upload_page(
                    part, offset + at, len(part), if_sequence_number_lte=fence
                ),
                f"writing {len(part)} bytes at {offset + at} of {name}",
                name,
                pages=True,
            )

    def clear(self, name: str, offset: int, length: int, fence: int) -> None:
        whole = -(-length // _PAGE) * _PAGE
        self._again(
            lambda: self._blob(name).clear_page(offset, whole, if_sequence_number_lte=fence),
            f"clearing {whole} bytes at {offset} of {name}",
            name,
            pages=True,
        )

    def read(self, name: str, offset: int, length: int, snapshot: str = "") -> bytes:
        if length == 0:
            return b""

        def call() -> bytes:
            try:
                return _range(self._blob(name, snapshot), offset, length)
            except HttpResponseError as error:
                if said(error).key in _GONE:
                    raise _missing(name, snapshot) from error
                raise

        data = self._again(call, f"reading {length} bytes at {offset} of {name}", name)
        if len(data) != length:
            raise FarshoreError(
                Code.REPLICA_DAMAGED, f"{name} has {len(data)} of {length} bytes at {offset}.", subject=name
            )
        return data

    def data(self, name: str, snapshot: str = "") -> Sequence[Extent]:
        def call() -> Sequence[Extent]:
            try:
                ranges: Any = self._blob(name, snapshot).list_page_ranges()
                return [
                    Extent(r.start, r.end - r.start + 1) for r in ranges if not r.cleared
                ]  # `end` is inclusive
            except HttpResponseError as error:
                if said(error).key in _GONE:
                    raise _missing(name, snapshot) from error
                raise

        return self._again(call, f"listing the pages of {name}", name)

    def flush(self, name: str, fence: int) -> None:
        """Nothing to do: what the service acknowledged is durable."""

    def freeze(self, name: str, cycle: int, epoch: int, fence: int) -> str:
        def call() -> str:
            answer: Mapping[str, Any] = self._blob(name).create_snapshot(
                metadata={"epoch": str(epoch), "cycle": str(cycle)}
            )
            return str(answer["snapshot"])

        # A repetition after a lost answer leaves one snapshot that nothing names: it is reaped by the next owner.
        return self._again(call, f"freezing {name}", name)

    def drop(self, name: str, snapshot: str) -> None:
        self._again(lambda: _quiet_delete(self._blob(name, snapshot)), f"deleting a snapshot of {name}", name)

    def delete_image(self, name: str, fence: int) -> None:
        def call() -> None:
            blob = self._blob(name)
            properties = self._properties(blob)
            if properties is None or _number(properties.page_blob_sequence_number) > fence:
                return
            with contextlib.suppress(_Taken):
                _if_absent(
                    lambda: _quiet_delete(
                        blob,
                        delete_snapshots="include",
                        etag=str(properties.etag),
                        match_condition=MatchConditions.IfNotModified,
                    )
                )

        self._again(call, f"deleting {name}", name)

    def close(self) -> None:
        self._service.close()

    # ours ---------------------------------------------------------------------------------------------------------

    def _blob(self, name: str, snapshot: str = "") -> BlobClient:
        """A client. One with a snapshot is only for reading and deleting: the SDK would write to the base blob."""
        return self._client_of(name, snapshot)

    def _properties(self, blob: BlobClient) -> Any | None:
        try:
            return blob.get_blob_properties()
        except HttpResponseError as error:
            # A HEAD has no body: the code may be missing.
            if error.status_code == 404:
                return None
            raise

    def _again(self, call: Callable[[], T], doing: str, subject: str, *, pages: bool = False) -> T:
        """Call, and repeat what may pass; with `pages` only what was refused for certain, see the module."""
        pause = _FIRST_PAUSE
        for left in reversed(range(_TRIES)):
            try:
                return call()
            except (AzureError, OSError) as error:
                answer = said(error)
                if answer.key == "sequencenumberconditionnotmet":
                    raise fenced(subject, "its fence was raised") from error
                problem = classify(error, doing=doing, subject=subject)
                if not left or problem.code not in _PASSING:
                    raise problem from error
                if pages and not (answer.status in _REFUSED and problem.code is Code.TARGET_THROTTLED):
                    raise problem from error
                wait = max(pause, problem.retry_after or 0.0)
                if wait > _LONGEST_PAUSE:
                    raise problem from error
            time.sleep(wait)
            pause *= 2
        raise AssertionError("the last try returns or raises")


class AzureReplicaStore(JournalStore):
    """All points of all machines in one container. See `ReplicaStore`."""

    def __init__(
        self,
        settings: AzureSettings,
        *,
        kek: Kek | None = None,
        clock: Callable[[], float] = time.time,
        how: Options | None = None,
    ) -> None:
        options: dict[str, Any] = {"connection_verify": settings.ca_file} if settings.ca_file else {}
        self._settings = settings
        self._blobs = BlobServiceClient(
            settings.blob_endpoint,
            credential=AzureNamedKeyCredential(settings.storage_account, settings.storage_key),
            retry_total=0,
            connection_timeout=10,
            read_timeout=_TIMEOUT,
            max_single_put_size=64 << 20,
            max_single_get_size=_MOST,
            max_chunk_get_size=_MOST,
            **options,
        )
        backend = PageBlobBackend(self._blobs, settings.container)
        if kek is None and settings.encryption_key is not None:
            kek = LocalKek(settings.encryption_key)
        # Requests, not processors, are what redo and restores wait for.
        super().__init__(
            backend, kek=kek, clock=clock, options=how or Options(workers=_REQUESTS, cache=settings.cache)
        )

    def blob_url(self, handle: str, *, sas_seconds: float | None = None) -> str:
        """The address of a frozen disk (`PointReader.frozen`), ending in `?snapshot=…`.

        With `sas_seconds` a signature for reading this snapshot is appended, valid that long. Such an address is a
        secret: it belongs into no history and no log. Makes no request.
        """
        return snapshot_url(self._settings, handle, sas_seconds=sas_seconds)


def snapshot_url(settings: AzureSettings, handle: str, *, sas_seconds: float | None = None) -> str:
    """See `AzureReplicaStore.blob_url`; needs no store."""
    name, snapshot = parse_handle(handle)
    path = f"{quote(settings.container)}/{quote(name, safe='~/')}"
    url = f"{settings.blob_endpoint.rstrip('/')}/{path}?snapshot={snapshot}"
    if sas_seconds is None:
        return url
    now = datetime.now(UTC)
    signature = generate_blob_sas(
        settings.storage_account,
        settings.container,
        name,
        snapshot=snapshot,
        account_key=settings.storage_key,
        permission=BlobSasPermissions(read=True),
        start=now - timedelta(minutes=15),  # clocks differ
        expiry=now + timedelta(seconds=sas_seconds),
    )
    return f"{url}&{signature}"


class _Taken(Exception):
    """A condition on absence or sameness was not met."""


def _if_absent(call: Callable[[], object]) -> None:
    try:
        call()
    except HttpResponseError as error:
        if said(error).key in _TAKEN:
            raise _Taken from error
        raise


def _range(blob: BlobClient, offset: int, length: int) -> bytes:
    """A range of a page blob, in one request.

    Not `download_blob`: with every call, however small, it lists all pages of a page blob as well, which takes minutes
    where a large disk was written in many places.
    """
    client: Any = blob._client  # pyright: ignore[reportPrivateUsage]  # what download_blob calls
    return b"".join(
        client.blob.download(range=f"bytes={offset}-{offset + length - 1}", snapshot=blob.snapshot)
    )


def _unless_gone(blob: BlobClient) -> bytes | None:
    try:
        return blob.download_blob().readall()
    except HttpResponseError as error:
        if said(error).key in _GONE:
            return None
        raise


def _quiet_delete(blob: BlobClient, **conditions: Any) -> None:
    try:
        blob.delete_blob(**conditions)
    except HttpResponseError as error:
        if said(error).key not in _GONE:
            raise


def _listing(pages: Any) -> list[Any]:
    try:
        return list(pages)
    except HttpResponseError as error:
        if said(error).key == "containernotfound":
            return []
        raise


def _missing(name: str, snapshot: str = "") -> FarshoreError:
    what = f"The snapshot {snapshot} of {name}" if snapshot else name
    return FarshoreError(Code.REPLICA_DAMAGED, f"{what} is missing in the storage account.", subject=name)


def _physical(kind: Kind, size: int) -> int:
    return vhd.blob_size(size) if kind is Kind.DISK else -(-size // _PAGE) * _PAGE


def _kind_of(blob: Any) -> str:
    kind = blob.blob_type
    return str(getattr(kind, "value", kind))


def _metadata(blob: Any) -> dict[str, str]:
    return dict(blob.metadata or {})


def _number(text: Any) -> int:
    try:
        return int(text)
    except (TypeError, ValueError):
        return 0
