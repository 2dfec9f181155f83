"""One laboratory Azure: in an event loop (`LabAzure`), or in a thread for synchronous tests (`LabAzureThread`)."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from aiohttp import web

from farshore.lab import tls
from farshore.lab.azure import landing, strict
from farshore.lab.azure.control_server import BlobControl, ControlServer
from farshore.lab.azure.entra import Entra
from farshore.lab.azure.landing import LandingZone
from farshore.lab.azure.model import Json
from farshore.lab.azure.ports import BlobReader, StorageAccount
from farshore.lab.azure.server import ArmServer, Recorded
from farshore.lab.azure.world import World


class LabAzure:
    """ARM and Entra on one TLS port, the control API on another; both on loopback, found again at the next start.

    `root` holds everything: state, disks, certificates, ports. Two at once on one root is an error of the caller.
    """

    def __init__(
        self,
        root: Path,
        *,
        blobs: BlobReader | None = None,
        account: StorageAccount | None = None,
        zone: LandingZone | None = None,
        port: int = 0,
        control_port: int = 0,
        recorder: Callable[[Recorded], None] | None = None,
    ) -> None:
        self.root = root
        self.zone = zone or LandingZone()
        self._blobs, self._account = blobs, account
        self._ports = {"arm": port, "control": control_port}
        self._recorder = recorder
        self._runners: list[web.AppRunner] = []
        self._server: ArmServer | None = None
        self._world: World | None = None
        self.entra: Entra | None = None
        self._blob_control: BlobControl | None = None
        self.base_url = ""
        self.control_url = ""
        self.client_secret = ""
        self.storage_account_id: str | None = None

    @property
    def world(self) -> World:
        if self._world is None:
            raise RuntimeError("the laboratory is not running")
        return self._world

    @property
    def ca_file(self) -> str:
        return str(tls.ensure_ca(self.root / "tls").ca_file)

    @property
    def tenant(self) -> str:
        return self.world.tenant

    @property
    def subscription(self) -> str:
        return self.world.subscription

    @property
    def client_id(self) -> str:
        return self.world.client_id

    async def start(self) -> None:
        """Bind, resume what was running, be ready. Raises: OSError when a port is taken."""
        world = World(self.root, self._blobs, self._account)
        self._world = world
        entra = self.entra = Entra(world)
        self.client_secret = entra.client_secret
        server = self._server = ArmServer(world, entra)
        server.recorder = self._recorder
        server.warm = asyncio.get_running_loop().run_in_executor(None, strict.warm)
        self.storage_account_id = landing.prepare(world, self.zone)
        held: dict[str, int] = world.store.setting("ports", {})
        context = tls.server_context(self.root / "tls")
        arm = await self._serve(server.app, self._ports["arm"] or held.get("arm", 0), context)
        control = await self._serve(
            ControlServer(world, entra, self.describe, self._blob_control).app,
            self._ports["control"] or held.get("control", 0),
        )
        world.store.set_setting("ports", {"arm": arm, "control": control})
        self.base_url, self.control_url = f"https://127.0.0.1:{arm}", f"http://127.0.0.1:{control}"
        world.base_url = self.base_url
        world.engine.resume()

    async def _serve(self, app: web.Application, port: int, context: object = None) -> int:
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
        await runner.setup()
        self._runners.append(runner)
        site = web.TCPSite(runner, "127.0.0.1", port, ssl_context=context)  # pyright: ignore[reportArgumentType]
        await site.start()
        return int(runner.addresses[0][1])

    async def stop(self) -> None:
        """Close the ports; running operations go on at the next start."""
        for runner in self._runners:
            await runner.cleanup()
        self._runners.clear()
        if self._server is not None:
            await self._server.warm
        if self._world is not None:
            await self._world.engine.stop()
            self._world.store.close()
            self._world = None

    def describe(self) -> Json:
        """What a client needs to know; the ready line of `python -m farshore.lab.azure`."""
        account = self._account
        return {
            "arm": self.base_url,
            "blob": account.blob_endpoint if account else None,
            "control": self.control_url,
            "ca": self.ca_file,
            "tenant": self.tenant,
            "subscription": self.subscription,
            "client_id": self.client_id,
            "client_secret": self.client_secret,
            "account": account.name if account else None,
            "account_key": account.key if account else None,
            "storage_account_id": self.storage_account_id,
            "resource_group": self.zone.resource_group,
            "location": self.zone.location,
        }

    async def __aenter__(self) -> LabAzure:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()


class LabAzureThread:
    """A `LabAzure` on an event loop of its own thread, for tests that are not asynchronous."""

    def __init__(self, lab: LabAzure) -> None:
        self.lab = lab
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lab-azure", daemon=True)

    def __enter__(self) -> LabAzure:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self.lab.start(), self._loop).result(30)
        return self.lab

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self.lab.stop(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


def ready_line(lab: LabAzure) -> str:
    return json.dumps(lab.describe())
