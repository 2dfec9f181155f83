"""Which operation a request asks for, and what it takes to be allowed it (REST reference; one table)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import handlers as h
from .auth import Target
from .call import Call, Reply
from .errors import StorageError


@dataclass(frozen=True, slots=True)
class Operation:
    """`permission`: any one of these SAS letters; `resource`: s(ervice), c(ontainer) or o(bject)."""

    name: str
    handler: Callable[[Call], Reply]
    permission: str
    resource: str


def _op(name: str, handler: Callable[[Call], Reply], permission: str, resource: str = "o") -> Operation:
    return Operation(name, handler, permission, resource)


_ACCOUNT = {
    ("GET", "list"): _op("ListContainers", h.list_containers, "l", "s"),
    ("GET", "properties"): _op("GetAccountInformation", h.account_information, "rl", "s"),
    ("HEAD", "properties"): _op("GetAccountInformation", h.account_information, "rl", "s"),
}
_CONTAINER = {
    ("PUT", ""): _op("CreateContainer", h.create_container, "cw", "c"),
    ("GET", ""): _op("GetContainerProperties", h.container_properties, "r", "c"),
    ("HEAD", ""): _op("GetContainerProperties", h.container_properties, "r", "c"),
    ("GET", "metadata"): _op("GetContainerProperties", h.container_properties, "r", "c"),
    ("HEAD", "metadata"): _op("GetContainerProperties", h.container_properties, "r", "c"),
    ("PUT", "metadata"): _op("SetContainerMetadata", h.set_container_metadata, "w", "c"),
    ("DELETE", ""): _op("DeleteContainer", h.delete_container, "d", "c"),
    ("PUT", "lease"): _op("LeaseContainer", h.lease_container, "wd", "c"),
    ("GET", "list"): _op("ListBlobs", h.list_blobs, "l", "c"),
    ("GET", "properties"): _op("GetAccountInformation", h.account_information, "rl", "c"),
}
_BLOB = {
    ("PUT", ""): _op("PutBlob", h.put_blob, "cw"),
    ("GET", ""): _op("GetBlob", h.get_blob, "r"),
    ("HEAD", ""): _op("GetBlobProperties", h.blob_properties, "r"),
    ("DELETE", ""): _op("DeleteBlob", h.delete_blob, "d"),
    ("GET", "metadata"): _op("GetBlobMetadata", h.blob_metadata, "r"),
    ("HEAD", "metadata"): _op("GetBlobMetadata", h.blob_metadata, "r"),
    ("PUT", "metadata"): _op("SetBlobMetadata", h.set_metadata, "w"),
    ("PUT", "properties"): _op("SetBlobProperties", h.set_properties, "w"),
    ("GET", "properties"): _op("GetAccountInformation", h.account_information, "r"),
    ("PUT", "snapshot"): _op("SnapshotBlob", h.snapshot_blob, "cw"),
    ("PUT", "lease"): _op("LeaseBlob", h.lease_blob, "wd"),
    ("PUT", "page"): _op("PutPage", h.put_page, "w"),
    ("GET", "pagelist"): _op("GetPageRanges", h.page_ranges, "r"),
    ("PUT", "copy"): _op("AbortCopyBlob", h.abort_copy, "w"),
    ("PUT", "block"): _op("PutBlock", h.put_block, "cw"),
    ("PUT", "blocklist"): _op("PutBlockList", h.put_block_list, "cw"),
    ("GET", "blocklist"): _op("GetBlockList", h.block_list, "r"),
}
COPY = _op("CopyBlob", h.copy_blob, "cw")
OPERATIONS = sorted({o.name for t in (_ACCOUNT, _CONTAINER, _BLOB) for o in t.values()} | {COPY.name})
"""All names a fault rule can match."""


def find(method: str, target: Target, headers: dict[str, str]) -> Operation:
    """The operation, or UnsupportedHttpVerb / InvalidQueryParameterValue / InvalidUri."""
    comp = target.query.get("comp", "").lower()
    if not target.container:
        table = _ACCOUNT
    elif not target.blob and target.query.get("restype", "").lower() in ("container", "account"):
        table = _CONTAINER
    elif target.blob:
        table = _BLOB
        if (
            (method, comp) == ("PUT", "")
            and "x-ms-copy-source" in headers
            and "x-ms-blob-type" not in headers
        ):
            return COPY
    else:
        raise StorageError("InvalidUri", "The requested URI does not represent any resource on the server.")
    found = table.get((method, comp))
    if found is None:
        if any(c == comp for _, c in table):
            raise StorageError("UnsupportedHttpVerb", "The resource doesn't support the specified HTTP verb.")
        raise StorageError("InvalidQueryParameterValue", f"comp={comp} is not served here.")
    return found
