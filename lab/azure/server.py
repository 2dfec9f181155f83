"""The HTTPS face: authentication, routing, api-version, throttling, outage, faults, request log, ARM's answers."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from farshore.lab.azure import routes, sas, strict
from farshore.lab.azure.entra import Entra, TokenRefused
from farshore.lab.azure.faults import Fault
from farshore.lab.azure.model import VM, Answer, ArmError, Call, Json, ResourceId, Route
from farshore.lab.azure.world import World


@dataclass(frozen=True)
class Recorded:
    """One answer as it left the server, for the schema tests."""

    operation: str
    origin: str
    """For a poll: the operation that began what is polled; else the same as `operation`."""
    method: str
    path: str
    status: int
    headers: dict[str, str]
    body: Any


_LOG = logging.getLogger("farshore.lab.azure")


class ConnectionDropped(Exception):
    """A fault rule closed the connection."""


class ArmServer:
    """aiohttp application of the management plane and the token endpoint."""

    def __init__(self, world: World, entra: Entra) -> None:
        self.world = world
        self.entra = entra
        self.recorder: Callable[[Recorded], None] | None = None
        self.warm: asyncio.Future[None]
        """Done when the models are loaded; importing them takes a second or two."""
        self._dropped: set[str] = set()
        self.app = web.Application(client_max_size=8 << 20)
        self.app.router.add_route("*", "/{path:.*}", self._handle)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        started = time.time()
        entry: Json = {
            "at": started,
            "method": request.method,
            "path": request.path,
            "query": dict(request.query),
            "operation": "unknown",
            "client_request_id": request.headers.get("x-ms-client-request-id"),
            "fault": None,
        }
        try:
            response = await self._answer(request, entry)
            entry["status"] = response.status
        except ConnectionDropped:
            self._remember_drop(entry)
            entry["status"] = 0
            self._log(entry, started)
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=500)
        self._log(entry, started)
        return response

    def _log(self, entry: Json, started: float) -> None:
        entry["seconds"] = round(time.time() - started, 4)
        self.world.store.log(entry)

    async def _answer(self, request: web.Request, entry: Json) -> web.StreamResponse:
        parts = request.path.strip("/").split("/")
        if request.path.lower().endswith("/oauth2/v2.0/token") and request.method == "POST":
            return await self._token(request, entry)
        if request.path.lower().endswith("/v2.0/.well-known/openid-configuration"):
            entry["operation"] = "entra.openid"
            try:
                return web.json_response(self.entra.openid(f"https://{request.host}", parts[0]))
            except TokenRefused as refusal:
                return web.json_response(refusal.body, status=refusal.status)
        if parts[0] == sas.ACCOUNT:
            entry["operation"] = "sas." + request.method.lower()
            await self._fault_before(self._strike(request, entry))
            return await sas.handle(self.world, request)
        return await self._arm(request, entry)

    async def _token(self, request: web.Request, entry: Json) -> web.Response:
        entry["operation"] = "entra.token"
        fault = self._strike(request, entry)
        try:
            await self._fault_before(fault)
        except ArmError as refusal:
            return web.json_response(
                {
                    "error": "temporarily_unavailable",
                    "error_description": refusal.message,
                    "error_codes": [90033],
                },
                status=refusal.status,
                headers=refusal.headers,
            )
        form = {name: str(value) for name, value in (await request.post()).items()}
        try:
            return web.json_response(self.entra.token(request.path.strip("/").split("/")[0], form))
        except TokenRefused as refusal:
            return web.json_response(refusal.body, status=refusal.status)

    # Resource Manager

    async def _arm(self, request: web.Request, entry: Json) -> web.Response:
        route: Route | None = None
        fault: Fault | None = None
        try:
            found, params, head = self._route(request)
            route = found.route
            entry["operation"] = route.operation
            fault = self._strike(request, entry)
            await self._fault_before(fault)
            call = await self._call(request, route, params)
            if fault is not None:
                call.lro = _planned(fault)
            answer = self._serve(found, call)
            if head:
                answer = Answer(204)
        except ArmError as refusal:
            answer = _refused(request, refusal)
        except ConnectionDropped:
            raise
        except Exception as defect:  # a defect of the laboratory is answered the way Azure answers its own
            _LOG.exception("%s %s", request.method, request.path)
            answer = _refused(
                request, ArmError(500, "InternalServerError", f"{type(defect).__name__}: {defect}")
            )
        if fault is not None and fault.action == "drop_after":
            raise ConnectionDropped
        return self._respond(request, route, answer)

    def _route(self, request: web.Request) -> tuple[routes.Entry, dict[str, str], bool]:
        """The route, its parameters, and whether HEAD stands for a resource's GET (check_existence_by_id)."""
        found = routes.find(request.method, request.path)
        if found is not None:
            return *found, False
        if request.method == "HEAD" and (found := routes.find("GET", request.path)) is not None:
            return *found, True
        if routes.known_path(request.path):
            raise ArmError(
                405, "MethodNotAllowed", f"The method {request.method} is not allowed on {request.path}."
            )
        raise ArmError(
            404, "InvalidResourceType", f"The laboratory has no resource type behind {request.path}."
        )

    async def _call(self, request: web.Request, route: Route, params: dict[str, str]) -> Call:
        principal = self.entra.check(request.headers.get("Authorization"))
        self._check_subscription(params)
        _check_version(route, request.query.get("api-version"))
        raw = await request.read()
        body: Any = {}
        if raw:
            try:
                body = json.loads(raw)
            except ValueError as bad:
                raise ArmError(
                    400, "InvalidRequestContent", f"The request content was invalid: {bad}."
                ) from bad
        if not isinstance(body, dict):
            raise ArmError(400, "InvalidRequestContent", "The request content must be a JSON object.")
        await asyncio.shield(self.warm)
        strict.check(route, body)
        return Call(
            route=route,
            method=request.method,
            path=request.path,
            host=request.host,
            params=params,
            query=dict(request.query),
            headers={name.lower(): value for name, value in request.headers.items()},
            body=body,
            principal=principal,
        )

    def _check_subscription(self, params: dict[str, str]) -> None:
        given = params.get("subscriptionId")
        if given is not None and given.lower() != self.world.subscription:
            raise ArmError(404, "SubscriptionNotFound", f"The subscription '{given}' could not be found.")

    def _serve(self, found: routes.Entry, call: Call) -> Answer:
        """Everything between the request and its committed answer, in one transaction and without a pause."""
        world = self.world
        world.store.begin()
        try:
            left = self._throttle(call)
            self._check_registration(call)
            self._check_outage(call)
            answer = found.handler(world, call)
            if left is not None:
                answer.headers[f"x-ms-ratelimit-remaining-subscription-{call.route.bucket}"] = str(left)
            return answer
        finally:
            world.store.commit()

    def _throttle(self, call: Call) -> int | None:
        knobs = self.world.knobs
        if not knobs.throttle:
            return None
        bucket = call.route.bucket
        left: int | None = None
        if bucket in knobs.buckets:
            left = self.world.throttle.take(bucket, *knobs.buckets[bucket])
        special = self._machine_bucket(call)
        if special is not None and special[0] in knobs.buckets:
            self.world.throttle.take(special[0] + special[1], *knobs.buckets[special[0]])
        return left

    def _machine_bucket(self, call: Call) -> tuple[str, str] | None:
        """The compute provider's own buckets, per machine."""
        if call.route.operation in {routes.LRO_STATUS, routes.LRO_RESULT}:
            operation = self.world.engine.operations.get(call.get("operationId"))
            if operation is not None and operation.kind.startswith("vm."):
                return "vm-operation-read:", operation.resource.lower()
            return None
        if "vmName" not in call.params:
            return None
        key = self.world.id_of(VM, call.get("resourceGroupName"), call.get("vmName")).lower()
        return ("vm-read:" if call.method == "GET" else "vm-write:"), key

    def _check_registration(self, call: Call) -> None:
        parsed = ResourceId.parse(call.path)
        if parsed is None or call.method not in {"PUT", "PATCH", "POST"}:
            return
        namespace = parsed.type.split("/")[0]
        if namespace.lower() in {name.lower() for name in self.world.knobs.unregistered}:
            raise ArmError(
                409,
                "MissingSubscriptionRegistration",
                f"The subscription is not registered to use namespace '{namespace}'. See https://aka.ms/rps-not-found for "
                "how to register subscriptions.",
                details=[{"code": "MissingSubscriptionRegistration", "target": namespace}],
            )

    def _check_outage(self, call: Call) -> None:
        """Raises: ArmError 503 for what lives in a region that is down."""
        if not self.world.knobs.outage:
            return
        down = {place.lower() for place in self.world.knobs.outage}
        resource = self.world.store.get(call.path.rstrip("/")) or self.world.store.get(
            call.path.rsplit("/", 1)[0]
        )
        places = {str(call.body.get("location") or "").lower(), call.params.get("location", "").lower()}
        if resource is not None:
            places.add(resource.location.lower())
        if places & down and ".ResourceGroups." not in call.route.operation:
            raise ArmError(
                503, "ServiceUnavailable", f"The resource provider is unavailable in {', '.join(sorted(places & down))}.",
                headers={"Retry-After": "5"},
            )  # fmt: skip

    def _respond(self, request: web.Request, route: Route | None, answer: Answer) -> web.Response:
        headers = {
            "x-ms-request-id": str(uuid.uuid4()),
            "x-ms-correlation-request-id": str(uuid.uuid4()),
            "Cache-Control": "no-cache",
            **answer.headers,
        }
        if self.recorder is not None:
            operation = origin = route.operation if route is not None else "unknown"
            if operation in {routes.LRO_STATUS, routes.LRO_RESULT}:
                polled = self.world.engine.operations.get(request.path.rstrip("/").rsplit("/", 1)[-1])
                origin = polled.request if polled is not None else operation
            body = json.loads(json.dumps(answer.body))
            self.recorder(
                Recorded(operation, origin, request.method, request.path, answer.status, headers, body)
            )
        if answer.body is None:
            return web.Response(status=answer.status, headers=headers)
        return web.json_response(answer.body, status=answer.status, headers=headers)

    # faults

    def _remember_drop(self, entry: Json) -> None:
        """aiohttp silently sends an idempotent request again when a kept-alive connection breaks: drop that, too."""
        if entry["client_request_id"] and not entry.get("resent"):
            self._dropped.add(entry["client_request_id"])

    def _strike(self, request: web.Request, entry: Json) -> Fault | None:
        if entry["client_request_id"] in self._dropped:
            self._dropped.discard(entry["client_request_id"])
            entry["resent"] = True
            raise ConnectionDropped
        fault = self.world.faults.strike(entry["operation"], request.method, request.path)
        if fault is not None:
            entry["fault"] = {"id": fault.id, "action": fault.action}
            self.world.save_faults()
        return fault

    async def _fault_before(self, fault: Fault | None) -> None:
        if fault is None:
            return
        if fault.action == "slow":
            await asyncio.sleep(fault.seconds)
        elif fault.action == "drop_before":
            raise ConnectionDropped
        elif fault.action == "status":
            headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
            raise ArmError(fault.status, fault.code, fault.message, headers=headers)


def _refused(request: web.Request, refusal: ArmError) -> Answer:
    body = None if request.method == "HEAD" else refusal.body()
    return Answer(refusal.status, body, dict(refusal.headers))


def _planned(fault: Fault) -> Json:
    if fault.action == "lro_stuck":
        return {"stuck": True}
    if fault.action == "lro_fail":
        return {"planned": {"status": "Failed", "code": fault.code, "message": fault.message}}
    if fault.action == "lro_cancel":
        return {"planned": {"status": "Canceled", "code": "OperationCanceled", "message": fault.message}}
    return {}


def _check_version(route: Route, given: str | None) -> None:
    if not given:
        raise ArmError(
            400,
            "MissingApiVersionParameter",
            "The api-version query parameter (?api-version=) is required for all requests.",
        )
    if route.api_version and given != route.api_version:
        raise ArmError(
            400,
            "InvalidApiVersionParameter"
            if route.operation.startswith("resource.")
            else "NoRegisteredProviderFound",
            f"The api-version '{given}' is invalid. The supported versions are '{route.api_version}'.",
        )
