"""The engine of long-running operations: durable, scaled in time, resumed after a restart.

An operation is a row. Its kind says what to do with the bytes (`work`, in a thread, repeatable from the start), and how the
resource changes when it ends (`complete`, `fail`, in the loop's thread, one transaction).
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from farshore.lab.azure.model import TERMINAL, Answer, ArmError, Call, Json

if TYPE_CHECKING:
    from farshore.lab.azure.world import World


@dataclass
class Operation:
    """A long-running operation; times are Unix seconds."""

    id: str
    kind: str
    resource: str
    namespace: str
    location: str
    api_version: str
    request: str
    """The SDK's name of the operation that started it."""
    args: Json
    started: float
    due: float | None
    """When it may end at the earliest; None: stuck until released."""
    status: str = "InProgress"
    ended: float | None = None
    result: Any = None
    """What the Location URL answers at the end."""
    output: Any = None
    """`properties.output` of the operation's own body."""
    error: Json | None = None
    error_status: int = 409
    planned: Json = field(default_factory=dict[str, Any])
    """A fault rule's verdict: {"status": "Failed" | "Canceled", "code", "message"}."""
    visible: float = 0.0

    @property
    def running(self) -> bool:
        return self.status not in TERMINAL


@dataclass(frozen=True)
class Kind:
    """How operations of one sort behave. `seconds`: what Azure would take."""

    seconds: float
    complete: Callable[[World, Operation, Any], Any]
    """Change the resources; what it returns becomes the operation's result."""
    fail: Callable[[World, Operation, ArmError], None]
    work: Callable[[World, Operation], Any] | None = None


_LOG = logging.getLogger("farshore.lab.azure")
KINDS: dict[str, Kind] = {}


class Engine:
    """Runs operations; `begin`, `end` and `release` belong to the loop's thread."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._random = random.Random(world.knobs.seed)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._wake: dict[str, asyncio.Event] = {}
        self.operations: dict[str, Operation] = {}
        self._running: dict[str, Operation] = {}
        for doc in world.store.operations():
            operation = Operation(**doc)
            self.operations[operation.id] = operation
            if operation.running:
                self._running[operation.id] = operation

    def resume(self) -> None:
        """Go on with what ran when the laboratory ended."""
        for operation in self._running.values():
            self._spawn(operation)

    async def stop(self) -> None:
        """Leave operations as they are; the next start goes on with them."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def begin(self, call: Call, kind: str, resource: str, location: str, **args: Any) -> Operation:
        """Start an operation on `resource` and write it down."""
        knobs = self._world.knobs
        spread = 1 + knobs.jitter * (2 * self._random.random() - 1)
        now = time.time()
        operation = Operation(
            id=str(uuid.uuid4()),
            kind=kind,
            resource=resource,
            namespace=_namespace(resource),
            location=location,
            api_version=call.route.api_version,
            request=call.route.operation,
            args=args,
            started=now,
            due=None if call.lro.get("stuck") else now + KINDS[kind].seconds * knobs.time_scale * spread,
            planned=dict(call.lro.get("planned") or {}),
            visible=now + knobs.consistency_operations,
        )
        self.operations[operation.id] = self._running[operation.id] = operation
        self._save(operation)
        self._spawn(operation)
        return operation

    def running_on(self, key: str, *, below: bool = False) -> list[Operation]:
        """Running operations on a resource (lower-case id), and on its children where `below`."""
        return [
            o
            for o in self._running.values()
            if o.resource.lower() == key or (below and o.resource.lower().startswith(key + "/"))
        ]

    def preempt(self, operation: Operation, code: str, message: str) -> None:
        """End a running operation because a later one takes its place; the resource is the later one's."""
        operation.status, operation.ended = "Canceled", time.time()
        operation.error = {"code": code, "message": message}
        self._save(operation)
        task = self._tasks.pop(operation.id, None)
        if task is not None:
            task.cancel()

    def release(self, id_: str | None = None) -> int:
        """Let stuck operations (all, or one) end now; returns how many."""
        stuck = [o for o in self._running.values() if o.due is None and (id_ is None or o.id == id_)]
        for operation in stuck:
            operation.due = time.time()
            self._save(operation)
            self._wake[operation.id].set()
        return len(stuck)

    # running

    def _spawn(self, operation: Operation) -> None:
        self._wake[operation.id] = asyncio.Event()
        task = asyncio.get_running_loop().create_task(self._run(operation), name=f"lro-{operation.kind}")
        self._tasks[operation.id] = task
        task.add_done_callback(lambda _: self._forget(operation.id))

    def _forget(self, id_: str) -> None:
        self._tasks.pop(id_, None)
        self._wake.pop(id_, None)

    async def _run(self, operation: Operation) -> None:
        kind = KINDS[operation.kind]
        outcome: Any = None
        error: ArmError | None = None
        if operation.planned:
            error = ArmError(409, operation.planned["code"], operation.planned["message"])
        elif kind.work is not None:
            try:
                outcome = await asyncio.to_thread(kind.work, self._world, operation)
            except ArmError as refusal:
                error = refusal
            except (
                Exception
            ) as crash:  # whatever breaks in the laboratory must end the operation, not hang its client
                error = ArmError(500, "InternalExecutionError", f"{type(crash).__name__}: {crash}")
        await self._until_due(operation)
        self._end(operation, kind, outcome, error)

    async def _until_due(self, operation: Operation) -> None:
        wake = self._wake[operation.id]
        while operation.due is None:
            await wake.wait()
        await asyncio.sleep(max(0.0, operation.due - time.time()))
        while operation.location.lower() in {place.lower() for place in self._world.knobs.outage}:
            await self._world.knobs_changed.wait()

    def _end(self, operation: Operation, kind: Kind, outcome: Any, error: ArmError | None) -> None:
        store = self._world.store
        store.begin()
        try:
            if error is None:
                try:
                    operation.result = kind.complete(self._world, operation, outcome)
                    operation.status = "Succeeded"
                except ArmError as refusal:
                    error = refusal
                except Exception as crash:  # a defect here must end the operation loudly, not hang its client
                    _LOG.exception("completing %s of %s", operation.kind, operation.resource)
                    error = ArmError(500, "InternalExecutionError", f"{type(crash).__name__}: {crash}")
            if error is not None:
                operation.status = operation.planned.get("status", "Failed")
                operation.error, operation.error_status = error.inner(), max(error.status, 400)
                kind.fail(self._world, operation, error)
            operation.ended = time.time()
            self._save(operation)
        finally:
            store.commit()

    def _save(self, operation: Operation) -> None:
        if not operation.running:
            self._running.pop(operation.id, None)
        self._world.store.save_operation(operation.id, operation.status, asdict(operation))

    # what the wire shows

    def headers(self, call: Call, operation: Operation, style: str) -> dict[str, str]:
        """LRO headers. `style`: `both` URLs, `async` (Azure-AsyncOperation only) or `location`."""
        place = operation.location or "global"
        root = f"{call.base}/subscriptions/{self._world.subscription}/providers/{operation.namespace}/locations/{place}"
        query = f"?api-version={operation.api_version}"
        status_url, result_url = (
            f"{root}/operations/{operation.id}{query}",
            f"{root}/operationResults/{operation.id}{query}",
        )
        out = {"Retry-After": self.retry_after(operation)}
        if style in {"both", "async"}:
            out["Azure-AsyncOperation"] = status_url
        if style in {"both", "location"}:
            out["Location"] = result_url
        return out

    def retry_after(self, operation: Operation) -> str:
        """Whole seconds: a tenth of the scaled duration, as Azure's 5 to 10 s are to a minute's work."""
        knobs = self._world.knobs
        if knobs.retry_after is not None:
            return str(math.floor(knobs.retry_after))
        return str(min(60, round(KINDS[operation.kind].seconds * knobs.time_scale / 6)))

    def find(self, call: Call) -> Operation:
        operation = self.operations.get(call.get("operationId"))
        if operation is None or operation.visible > time.time():
            raise ArmError(404, "NotFound", f"The entity '{call.get('operationId')}' was not found.")
        return operation

    def status(self, call: Call) -> Answer:
        """GET of the Azure-AsyncOperation URL."""
        operation = self.find(call)
        body: Json = {
            "name": operation.id,
            "startTime": iso(operation.started),
            "status": operation.status,
        }
        if operation.ended is not None:
            body["endTime"] = iso(operation.ended)
        if operation.error is not None:
            body["error"] = operation.error
        if operation.output is not None:
            body["properties"] = {"output": operation.output}
        headers = {"Retry-After": self.retry_after(operation)} if operation.running else {}
        return Answer(200, body, headers)

    def outcome(self, call: Call) -> Answer:
        """GET of the Location URL: 202 while running, then the result or the error."""
        operation = self.find(call)
        if operation.running:
            return Answer(202, None, self.headers(call, operation, "location"))
        if operation.error is not None:
            return Answer(operation.error_status, {"error": operation.error})
        return Answer(200 if operation.result is not None else 204, operation.result)


def iso(at: float) -> str:
    """Unix seconds as the wire's UTC time."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) + f".{int(at % 1 * 1e6):06d}Z"


def _namespace(resource: str) -> str:
    parts = resource.split("/providers/", 1)
    return parts[1].split("/", 1)[0] if len(parts) == 2 else "Microsoft.Resources"
