"""What all operations on an account share: files, locks, clock, validators, lookup."""

from __future__ import annotations

import datetime as dt
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import conditions
from .catalog import Catalog
from .conditions import Conditions
from .errors import BlobNotFound, StorageError
from .pages import PageStore
from .rows import PAGE_BLOB, BlobRow, ContainerRow

MAX_PAGE_BLOB = 8 * 1024**4
MAX_PUT_PAGE = 4 * 1024**2


@dataclass(slots=True)
class CopyPolicy:
    """How Copy Blob behaves. Copies are always asynchronous: the first answer says `pending`."""

    bytes_per_s: float | None = None
    delay: float = 0.0  # seconds before the first byte
    hold: bool = False  # stays pending until this is taken back
    fail: str = ""  # description with which the next copies fail


@dataclass(slots=True)
class Premium:
    """Limits of a premium account (snapshots of page blobs); None = not enforced."""

    max_snapshots: int | None = None
    min_interval: float | None = None  # seconds between two snapshots of a blob

    def enable(self, on: bool = True) -> None:
        self.max_snapshots = 100 if on else None
        self.min_interval = 600.0 if on else None


class StoreCore:
    """One storage account under `root`: `catalog.db` and `data/<store>.slots` or `.block`.

    `durable=True` waits for the disk on every write (power loss); without it an acknowledged write survives the
    death of the process. `clock` gives Unix seconds; a laboratory with its own time passes its own.
    """

    def __init__(
        self,
        root: Path,
        account: str,
        key: str,
        *,
        durable: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.root = root
        self.account = account
        self.keys: list[str] = [key]
        self.durable = durable
        self.clock = clock
        self.copy_policy = CopyPolicy()
        self.premium = Premium()
        self._data = root / "data"
        self._data.mkdir(parents=True, exist_ok=True)
        self.catalog = Catalog(root / "catalog.db", durable=durable)
        self._stores: dict[int, PageStore] = {}
        self._stores_lock = threading.Lock()
        self._paths: dict[str, threading.RLock] = {}
        self._paths_lock = threading.Lock()
        self._tick = self._newest_tick()
        self._tick_lock = threading.Lock()
        self.closed = threading.Event()
        self._sweep()

    def close(self) -> None:
        self.closed.set()
        with self._stores_lock:
            for store in self._stores.values():
                store.close()
            self._stores.clear()
        self.catalog.close()

    # --- time and validators --------------------------------------------------------------------------------

    def tick(self) -> int:
        """A count of 100 ns since 1970 that never repeats, not even over a restart with a clock set back."""
        with self._tick_lock:
            self._tick = max(self._tick + 1, int(self.clock() * 10_000_000))
            return self._tick

    def _newest_tick(self) -> int:
        newest = 0
        for etag, snapshot in self.catalog.query(
            "SELECT etag, snapshot FROM blobs UNION ALL SELECT etag, '' FROM containers"
        ):
            newest = max(newest, int(str(etag).strip('"'), 16), _snapshot_tick(str(snapshot)))
        return newest

    def snapshot_id(self) -> str:
        seconds, rest = divmod(self.tick(), 10_000_000)
        return dt.datetime.fromtimestamp(seconds, dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{rest:07d}Z"

    def stamp(self, row: BlobRow | ContainerRow) -> None:
        """New ETag and Last-Modified."""
        row.etag = f'"0x{self.tick():X}"'
        row.modified = self.clock()

    # --- lookup ---------------------------------------------------------------------------------------------

    def path_lock(self, container: str, name: str) -> threading.RLock:
        """Serialises everything that happens to one blob name, snapshots included."""
        key = f"{container}/{name}"
        with self._paths_lock:
            return self._paths.setdefault(key, threading.RLock())

    def need_container(self, name: str) -> ContainerRow:
        row = self.catalog.container(name)
        if row is None:
            raise BlobNotFound("ContainerNotFound", "The specified container does not exist.")
        return row

    def need_blob(self, container: str, name: str, snapshot: str = "") -> BlobRow:
        row = self.catalog.blob(container, name, snapshot)
        if row is None:
            self.need_container(container)
            raise BlobNotFound("BlobNotFound", "The specified blob does not exist.")
        return row

    def need_pages(self, container: str, name: str, snapshot: str = "") -> BlobRow:
        row = self.need_blob(container, name, snapshot)
        if row.kind != PAGE_BLOB:
            raise StorageError("InvalidBlobType", "The blob type is invalid for this operation.")
        return row

    def check_writable(self, row: BlobRow, cond: Conditions) -> None:
        """Conditions of a write, and no copy on its way into the blob."""
        conditions.check_write(row, cond, self.clock())
        if row.copy is not None and row.copy.status == "pending":
            raise StorageError("PendingCopyOperation", "There is currently a pending copy operation.")

    def pages(self, store: int) -> PageStore:
        """The open page store with this number."""
        with self._stores_lock:
            found = self._stores.get(store)
            if found is None:
                rows = self.catalog.query(
                    "SELECT chunk, gen, slot, valid, written FROM chunks WHERE store=? ORDER BY chunk, gen",
                    (store,),
                )
                found = PageStore(self.slot_file(store), store, rows, durable=self.durable)
                self._stores[store] = found
                # A crash may have come between a snapshot's row and its bytes: finish that deletion.
                for gen in sorted(found.gens() - set(self.catalog.live_gens(store))):
                    self.drop_gen(found, gen)
            return found

    def drop_gen(self, pages: PageStore, gen: int) -> None:
        """The row of a generation is gone: pass on or free what it wrote."""
        with pages.lock:
            live = [g for g in self.catalog.live_gens(pages.store) if g > gen]
            change = pages.plan_drop(gen, live[0] if live else None)
            with self.catalog.transaction() as db:
                change.persist(db, pages.store)
            pages.apply(change)

    def slot_file(self, store: int) -> Path:
        return self._data / f"{store}.slots"

    def block_file(self, store: int) -> Path:
        return self._data / f"{store}.block"

    def drop_if_unreferenced(self, store: int) -> None:
        """Forget a store that no blob, snapshot or uncommitted block needs any more."""
        with self.catalog.transaction():
            used = self.catalog.query(
                "SELECT 1 FROM blobs WHERE store=? UNION ALL SELECT 1 FROM blocks WHERE store=? LIMIT 1",
                (store, store),
            )
            if used:
                return
            self.catalog.drop_store(store)
        with self._stores_lock:
            found = self._stores.pop(store, None)
        if found is not None:
            found.close()
        self.slot_file(store).unlink(missing_ok=True)
        self.block_file(store).unlink(missing_ok=True)

    def _sweep(self) -> None:
        """After a crash: bytes that were written but never committed, and files of dropped stores."""
        for store in self.catalog.unreferenced_stores():
            self.catalog.drop_store(store)
        known = {str(r[0]) for r in self.catalog.query("SELECT id FROM stores")}
        for path in self._data.iterdir():
            if path.stem not in known:
                path.unlink(missing_ok=True)


def _snapshot_tick(snapshot: str) -> int:
    if not snapshot:
        return 0
    whole, rest = snapshot.rstrip("Z").split(".")
    moment = dt.datetime.strptime(whole, "%Y-%m-%dT%H:%M:%S").replace(tzinfo=dt.UTC)
    return int(moment.timestamp()) * 10_000_000 + int(rest)
