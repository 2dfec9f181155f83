"""ARM, Entra and the page-blob server in one process, sharing certificates and disk bytes."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from farshore.lab import tls
from farshore.lab.azure.blobs import StoreReader
from farshore.lab.azure.lab import LabAzure
from farshore.lab.azure.landing import LandingZone
from farshore.lab.azure.ports import StorageAccount
from farshore.lab.azure.server import Recorded
from farshore.lab.blob.server import BlobServer
from farshore.lab.blob.store import BlobStore


class LabAzureWhole(LabAzure):
    """A `LabAzure` with its own storage account, started and stopped together. `store` and `blob_server` are open to tests."""

    store: BlobStore
    blob_server: BlobServer

    def __init__(
        self,
        root: Path,
        *,
        zone: LandingZone | None = None,
        port: int = 0,
        blob_port: int = 0,
        control_port: int = 0,
        recorder: Callable[[Recorded], None] | None = None,
    ) -> None:
        super().__init__(root, zone=zone, port=port, control_port=control_port, recorder=recorder)
        self._blob_port = blob_port

    async def start(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        held_file = self.root / "account.json"
        held: dict[str, Any] = {"key": _new_key(), "port": 0}
        if held_file.exists():
            held = json.loads(held_file.read_text())
        name = self.zone.account
        self.store = BlobStore(self.root / "blobs", name, held["key"])
        self.blob_server = BlobServer(self.store, bearer=self._bearer)
        await self.blob_server.start(
            port=self._blob_port or held["port"], ssl_context=tls.server_context(self.root / "tls")
        )
        held["port"] = int(self.blob_server.url.rsplit(":", 1)[1])
        temporary = held_file.with_suffix(".part")
        temporary.write_text(json.dumps(held))
        temporary.replace(held_file)
        self._account = StorageAccount(name, held["key"], self.blob_server.account_url(name))
        self._blobs = StoreReader(self.store)
        self._blob_control = self.blob_server.faults.handle_control
        await super().start()

    def _bearer(self, token: str) -> bool:
        return self.entra is not None and self.entra.accepts_storage(token)

    async def stop(self) -> None:
        await super().stop()
        await self.blob_server.stop()
        self.store.close()


def _new_key() -> str:
    return base64.b64encode(os.urandom(64)).decode()
