"""The border to the sister page-blob server: its store seen through this room's port."""

from __future__ import annotations

from farshore.lab.azure.ports import BlobRefused, BlobView
from farshore.lab.blob.errors import StorageError
from farshore.lab.blob.store import BlobStore


class StoreReader:
    """`BlobReader` on a `BlobStore`."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store

    def open_url(self, url: str, *, trusted: bool) -> BlobView:
        if not trusted and "sig=" not in url:
            raise BlobRefused("PublicAccessNotPermitted", "The blob needs a signature or its account's id.")
        try:
            return self._store.open_url(url)
        except StorageError as refusal:
            raise BlobRefused(refusal.code, str(refusal)) from refusal
