"""Plain data of the management plane: resource ids, resources, requests, answers, errors."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field
from typing import Any, cast

Json = dict[str, Any]

GROUP = "Microsoft.Resources/resourceGroups"
DISK = "Microsoft.Compute/disks"
SNAPSHOT = "Microsoft.Compute/snapshots"
VM = "Microsoft.Compute/virtualMachines"
NIC = "Microsoft.Network/networkInterfaces"
PUBLIC_IP = "Microsoft.Network/publicIPAddresses"
VNET = "Microsoft.Network/virtualNetworks"
SUBNET = "Microsoft.Network/virtualNetworks/subnets"
NSG = "Microsoft.Network/networkSecurityGroups"
RULE = "Microsoft.Network/networkSecurityGroups/securityRules"
STORAGE = "Microsoft.Storage/storageAccounts"

TERMINAL = frozenset({"Succeeded", "Failed", "Canceled"})


class ArmError(Exception):
    """An error the management plane answers, either at once or as the failure of a long-running operation."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        details: list[Json] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(f"{code}: {message}")
        self.status = status
        self.code = code
        self.message = message
        self.details = details or []
        self.headers = headers or {}

    def body(self) -> Json:
        return {"error": self.inner()}

    def inner(self) -> Json:
        out: Json = {"code": self.code, "message": self.message}
        if self.details:
            out["details"] = self.details
        return out


@dataclass
class Resource:
    """One resource. `body` is what the wire shows beside id, name, type and etag; `hidden` is the laboratory's own."""

    id: str
    type: str
    group: str
    name: str
    body: Json
    hidden: Json = field(default_factory=dict[str, Any])
    etag: str = ""
    created: float = 0.0
    changed: float = 0.0

    @property
    def key(self) -> str:
        return self.id.lower()

    @property
    def location(self) -> str:
        return str(self.body.get("location", ""))

    @property
    def properties(self) -> Json:
        return cast(Json, self.body.setdefault("properties", {}))

    @property
    def state(self) -> str:
        return str(self.properties.get("provisioningState", "Succeeded"))

    @state.setter
    def state(self, value: str) -> None:
        self.properties["provisioningState"] = value

    @property
    def tags(self) -> dict[str, str]:
        return self.body.get("tags") or {}

    def wire(self) -> Json:
        """The document as a GET shows it, before type-specific additions."""
        return {"id": self.id, "name": self.name, "type": self.type, **self.body}


@dataclass(frozen=True)
class Route:
    """One operation the laboratory serves.

    `operation` names it as the SDK does: package.Group.method. `codes` are the statuses a success may have here, which the
    contract test holds against those the SDK accepts.
    """

    operation: str
    method: str
    template: str
    api_version: str
    codes: tuple[int, ...]
    bucket: str
    """Throttling class: reads, writes or deletes."""
    body: str | None = None
    """Model of the request in the SDK's package."""

    @property
    def package(self) -> str:
        """What follows `azure.mgmt.`; empty for the polling URLs."""
        return ".".join(self.operation.split(".")[:-2])


@dataclass
class Call:
    """A request after routing and authentication."""

    route: Route
    method: str
    path: str
    host: str
    params: dict[str, str]
    query: dict[str, str]
    headers: dict[str, str]
    body: Json
    principal: str
    lro: Json = field(default_factory=dict[str, Any])
    """What a fault rule wants of the long-running operation that this request starts."""

    def get(self, name: str) -> str:
        return self.params[name]

    @property
    def base(self) -> str:
        return f"https://{self.host}"


@dataclass
class Answer:
    status: int
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict[str, str])


_ID = re.compile(
    r"^/subscriptions/(?P<sub>[^/]+)/resourcegroups/(?P<group>[^/]+)"
    r"(?:/providers/(?P<ns>[^/]+)/(?P<rest>.+))?$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class ResourceId:
    """A parsed resource id; comparison is by `key`, because ids are case-insensitive."""

    subscription: str
    group: str
    type: str
    names: tuple[str, ...]

    @staticmethod
    def parse(text: str) -> ResourceId | None:
        found = _ID.match(text)
        if found is None:
            return None
        if found["ns"] is None:
            return ResourceId(found["sub"], found["group"], GROUP, (found["group"],))
        parts = found["rest"].split("/")
        if len(parts) % 2:
            return None
        return ResourceId(
            found["sub"], found["group"], "/".join([found["ns"], *parts[0::2]]), tuple(parts[1::2])
        )


def resource_id(subscription: str, group: str, type_: str, *names: str) -> str:
    """The canonical id of a resource."""
    if type_ == GROUP:
        return f"/subscriptions/{subscription}/resourceGroups/{group}"
    namespace, *kinds = type_.split("/")
    tail = "/".join(f"{kind}/{name}" for kind, name in zip(kinds, names, strict=True))
    return f"/subscriptions/{subscription}/resourceGroups/{group}/providers/{namespace}/{tail}"


def parent_key(id_: str) -> str:
    """Lower-case id of the resource one level up."""
    return id_.lower().rsplit("/", 2)[0]


def new_etag() -> str:
    return f'"{secrets.token_hex(8)}"'


def reference(holder: Any, name: str = "id") -> str | None:
    """The id inside `{"id": …}`, or None."""
    if isinstance(holder, dict):
        value = cast(Json, holder).get(name)
        if isinstance(value, str) and value:
            return value
    return None


def sub(holder: Json, *path: str) -> Json:
    """The object at `path`, or an empty one that is not part of `holder`."""
    for name in path:
        value = holder.get(name)
        if not isinstance(value, dict):
            return {}
        holder = cast(Json, value)
    return holder


def items(holder: Json, name: str) -> list[Json]:
    value = holder.get(name)
    return cast(list[Json], value) if isinstance(value, list) else []
