"""The control API: plain HTTP and JSON on a port of its own, never part of what Azure would answer."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

from aiohttp import web

from farshore.lab.azure import diskfiles, disks
from farshore.lab.azure.entra import Entra
from farshore.lab.azure.faults import Fault
from farshore.lab.azure.groups import drop_file
from farshore.lab.azure.model import Json, Resource
from farshore.lab.azure.world import World

BlobControl = Callable[[str, Json | None], Json]
"""The page-blob server's own control API: (path, body) → answer; ValueError for what it refuses."""
_Reply = Callable[[web.Request], Awaitable[Any]]


class ControlServer:
    """Routes of the control API; `describe` says what the ready line says."""

    def __init__(
        self, world: World, entra: Entra, describe: Callable[[], Json], blob: BlobControl | None
    ) -> None:
        self._world, self._entra, self._describe, self._blob = world, entra, describe, blob
        self.app = web.Application()
        table: list[tuple[str, str, _Reply]] = [
            ("GET", "/", self._root),
            ("GET", "/knobs", self._knobs),
            ("PATCH", "/knobs", self._turn),
            ("GET", "/faults", self._faults),
            ("POST", "/faults", self._add_fault),
            ("DELETE", "/faults", self._drop_faults),
            ("GET", "/requests", self._requests),
            ("DELETE", "/requests", self._clear_requests),
            ("GET", "/resources", self._resources),
            ("DELETE", "/resources", self._vanish),
            ("PATCH", "/resources", self._tamper),
            ("GET", "/history", self._history),
            ("GET", "/creations", self._creations),
            ("GET", "/operations", self._operations),
            ("POST", "/operations/release", self._release),
            ("GET", "/disks/sha256", self._sha256),
            ("GET", "/disks/path", self._path),
            ("POST", "/tokens/expire", self._expire),
            ("POST", "/blob/{path:.+}", self._blob_call),
        ]
        for method, path, reply in table:
            self.app.router.add_route(method, path, self._wrap(reply))

    def _wrap(self, reply: _Reply) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handler(request: web.Request) -> web.Response:
            try:
                return web.json_response(await reply(request))
            except (ValueError, TypeError) as bad:
                return web.json_response({"error": str(bad)}, status=400)
            except (LookupError, FileNotFoundError) as missing:
                return web.json_response({"error": str(missing)}, status=404)

        return handler

    async def _root(self, _: web.Request) -> Json:
        return self._describe()

    async def _knobs(self, _: web.Request) -> Json:
        return self._world.knobs.to_json()

    async def _turn(self, request: web.Request) -> Json:
        self._world.turn(await request.json())
        return self._world.knobs.to_json()

    async def _faults(self, _: web.Request) -> list[Json]:
        return [rule.to_json() for rule in self._world.faults.rules]

    async def _add_fault(self, request: web.Request) -> Json:
        rule = self._world.faults.add(Fault(**await request.json()))
        self._world.save_faults()
        return rule.to_json()

    async def _drop_faults(self, request: web.Request) -> Json:
        id_ = request.query.get("id")
        self._world.faults.remove(int(id_) if id_ else None)
        self._world.save_faults()
        return {}

    async def _requests(self, request: web.Request) -> list[Json]:
        return self._world.store.requests(int(request.query.get("after", "0")))

    async def _clear_requests(self, _: web.Request) -> Json:
        self._world.store.clear_requests()
        return {}

    async def _resources(self, _: web.Request) -> list[Json]:
        return [
            {
                "id": r.id,
                "type": r.type,
                "tags": r.tags,
                "state": r.state,
                "location": r.location,
                "power": r.hidden.get("power"),
            }
            for r in sorted(self._world.store.resources.values(), key=lambda r: r.key)
        ]

    def _resource(self, request: web.Request) -> Resource:
        id_ = request.query.get("id", "")
        found = self._world.store.get(id_)
        if found is None:
            raise LookupError(f"no resource '{id_}'")
        return found

    async def _vanish(self, request: web.Request) -> Json:
        """Delete behind everybody's back: no checks, no operation."""
        resource = self._resource(request)
        drop_file(self._world, resource)
        self._world.store.remove(resource)
        return {}

    async def _tamper(self, request: web.Request) -> Json:
        """Change behind everybody's back: the body is merged, one level into properties."""
        resource, changes = self._resource(request), await request.json()
        resource.properties.update(changes.pop("properties", {}))
        resource.body.update(changes)
        self._world.store.put(resource)
        return resource.wire()

    async def _history(self, _: web.Request) -> list[Json]:
        return self._world.store.history()

    async def _creations(self, _: web.Request) -> Json:
        return dict(
            Counter(row["id"].lower() for row in self._world.store.history() if row["event"] == "created")
        )

    async def _operations(self, _: web.Request) -> list[Json]:
        return [asdict(operation) for operation in self._world.engine.operations.values()]

    async def _release(self, request: web.Request) -> Json:
        return {"released": self._world.engine.release(request.query.get("id"))}

    def _disk(self, request: web.Request) -> Resource:
        disk = self._resource(request)
        if "file" not in disk.hidden:
            raise LookupError(f"'{disk.id}' has no bytes")
        return disk

    async def _sha256(self, request: web.Request) -> Json:
        disk = self._disk(request)
        path = disks.file_of(self._world, disk)
        return {"sha256": await asyncio.to_thread(diskfiles.sha256, path), "size": path.stat().st_size}

    async def _path(self, request: web.Request) -> Json:
        return {"path": str(disks.file_of(self._world, self._disk(request)))}

    async def _blob_call(self, request: web.Request) -> Json:
        if self._blob is None:
            raise LookupError("this laboratory has no storage account of its own")
        return await asyncio.to_thread(self._blob, request.match_info["path"], await request.json())

    async def _expire(self, _: web.Request) -> Json:
        self._entra.expire()
        return {}
