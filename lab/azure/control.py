"""Typed client of the laboratory's control API, for tests and the demo. Synchronous, standard library only."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

Json = dict[str, Any]


@dataclass(frozen=True)
class ResourceRow:
    """A resource as the laboratory holds it."""

    id: str
    type: str
    tags: dict[str, str]
    state: str
    location: str
    power: str | None
    """creating, starting, running, stopping, stopped, deallocating, deallocated; machines only."""


@dataclass(frozen=True)
class Event:
    """A real creation or deletion; an idempotent repeat of a PUT leaves none."""

    seq: int
    at: float
    event: str
    """`created` or `deleted`."""
    id: str
    type: str
    tags: dict[str, str]


@dataclass(frozen=True)
class Request:
    """A line of the server's request log. `status` 0: the connection was dropped."""

    seq: int
    at: float
    method: str
    path: str
    query: dict[str, str]
    operation: str
    status: int
    seconds: float
    client_request_id: str | None
    fault: Json | None
    resent: bool = False
    """The HTTP client's own second attempt at a dropped request; not applied."""


class AzureControl:
    """Raises: ControlError for what the laboratory refuses, OSError when it can't be reached."""

    def __init__(self, url: str, *, timeout: float = 60.0) -> None:
        self._url, self._timeout = url.rstrip("/"), timeout

    def describe(self) -> Json:
        """What the ready line said."""
        return cast(Json, self._ask("GET", "/"))

    # knobs

    def knobs(self) -> Json:
        return cast(Json, self._ask("GET", "/knobs"))

    def turn(self, **changes: Any) -> Json:
        """Change knobs by name; see `farshore.lab.azure.knobs.Knobs`."""
        return cast(Json, self._ask("PATCH", "/knobs", changes))

    def time_scale(self, scale: float) -> None:
        self.turn(time_scale=scale)

    def throttle(self, on: bool = True, **buckets: tuple[float, float]) -> None:
        """Switch throttling; `buckets` (refill per second, burst) replace the published ones, `vm_read` meaning `vm-read:`."""
        changes: Json = {"throttle": on}
        if buckets:
            changes["buckets"] = {
                (name.replace("_", "-") + ":" if name.startswith("vm") else name): pair
                for name, pair in buckets.items()
            }
        self.turn(**changes)

    def quota(self, location: str, **limits: int) -> None:
        """Limits of a location: `cores`, `virtualMachines` or a family such as `standardDSv5Family`."""
        table = self.knobs()["quota"]
        table[location] = {**table.get(location, {}), **limits}
        self.turn(quota=table)

    def short_of(
        self,
        size: str,
        *,
        location: str = "westeurope",
        zone: str = "*",
        code: str = "AllocationFailed",
        when: str = "lro",
        remaining: int | None = None,
        listed: bool = False,
    ) -> None:
        """Add a line to the capacity table; see `farshore.lab.azure.knobs.Capacity`."""
        table = self.knobs()["capacity"]
        table.append({"location": location, "size": size, "zone": zone, "code": code, "when": when,
                      "remaining": remaining, "listed": listed})  # fmt: skip
        self.turn(capacity=table)

    def enough(self) -> None:
        """Clear the capacity table."""
        self.turn(capacity=[])

    def consistency(self, *, groups: float = 0.0, resources: float = 0.0, operations: float = 0.0) -> None:
        """Seconds for which new things answer 404."""
        self.turn(
            consistency_groups=groups, consistency_resources=resources, consistency_operations=operations
        )

    def outage(self, *locations: str) -> None:
        """These regions' providers are down; none: all are up."""
        self.turn(outage=list(locations))

    def unregister(self, *namespaces: str) -> None:
        self.turn(unregistered=list(namespaces))

    # faults

    def fault(self, action: str, **rule: Any) -> int:
        """Add a fault rule, return its id; see `farshore.lab.azure.faults.Fault` for the fields."""
        return int(self._ask("POST", "/faults", {"action": action, **rule})["id"])

    def faults(self) -> list[Json]:
        return cast(list[Json], self._ask("GET", "/faults"))

    def clear_faults(self, id_: int | None = None) -> None:
        self._ask("DELETE", "/faults" + ("" if id_ is None else f"?id={id_}"))

    def release(self, operation: str | None = None) -> int:
        """Let stuck operations end; returns how many."""
        return int(self._ask("POST", "/operations/release" + _query(id=operation))["released"])

    def expire_tokens(self) -> None:
        self._ask("POST", "/tokens/expire")

    # looking

    def requests(self, after: int = 0) -> list[Request]:
        return [Request(**row) for row in self._ask("GET", f"/requests?after={after}")]

    def clear_requests(self) -> None:
        self._ask("DELETE", "/requests")

    def resources(self) -> list[ResourceRow]:
        return [ResourceRow(**row) for row in self._ask("GET", "/resources")]

    def history(self) -> list[Event]:
        return [Event(**row) for row in self._ask("GET", "/history")]

    def creations(self) -> dict[str, int]:
        """Lower-case id → how often it really came into being."""
        return cast(dict[str, int], self._ask("GET", "/creations"))

    def operations(self) -> list[Json]:
        return cast(list[Json], self._ask("GET", "/operations"))

    def disk_sha256(self, disk_id: str) -> str:
        """Digest of a disk's or snapshot's whole content."""
        return str(self._ask("GET", "/disks/sha256" + _query(id=disk_id))["sha256"])

    def disk_path(self, disk_id: str) -> Path:
        return Path(self._ask("GET", "/disks/path" + _query(id=disk_id))["path"])

    # the page-blob server

    def blob(self, path: str, **body: Any) -> Json:
        """One call of the blob server's control API; see `farshore.lab.blob.faults.BlobFaults.handle_control`."""
        return cast(Json, self._ask("POST", f"/blob/{path}", body))

    # meddling

    def delete_behind(self, resource_id: str) -> None:
        """A resource vanishes without a request, as if somebody else had deleted it."""
        self._ask("DELETE", "/resources" + _query(id=resource_id))

    def change_behind(self, resource_id: str, changes: Json) -> None:
        self._ask("PATCH", "/resources" + _query(id=resource_id), changes)

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._url + path, data, {"Content-Type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as refusal:
            raise ControlError(refusal.code, refusal.read().decode(errors="replace")) from refusal


class ControlError(Exception):
    """The control API refused."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status}: {text}")
        self.status = status


def _query(**values: str | None) -> str:
    given = {name: value for name, value in values.items() if value is not None}
    return "?" + urllib.parse.urlencode(given) if given else ""
