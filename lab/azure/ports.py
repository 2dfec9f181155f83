"""What the management plane needs from a page-blob server living in the same process."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


class BlobView(Protocol):
    """An immutable look at one page blob, or at one snapshot of it."""

    @property
    def size(self) -> int:
        """Length in bytes, footer included."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`; holes read as zeros."""
        ...

    def extents(self) -> Iterable[tuple[int, int]]:
        """(offset, length) of the parts that hold data, ascending; what lies between reads as zeros."""
        ...


class BlobReader(Protocol):
    """Opens a blob by its URL. Methods are called from worker threads."""

    def open_url(self, url: str, *, trusted: bool) -> BlobView:
        """The blob `url` names, its `snapshot` and SAS query honoured.

        `trusted`: the caller proved its right to the account by other means (Import with `storageAccountId`), so that a
        URL without SAS is accepted; a SAS that is there is checked all the same.
        Raises: BlobRefused.
        """
        ...


class BlobRefused(Exception):
    """The blob can't be read; `code` is the storage service's error code, such as BlobNotFound."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


@dataclass(frozen=True)
class StorageAccount:
    """The account that the landing zone shows as an ARM resource."""

    name: str
    key: str
    blob_endpoint: str
    """URL up to and including the account, without trailing slash."""
