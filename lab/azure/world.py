"""What every resource provider of the laboratory shares: state, knobs, references, the rules of create-or-update."""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path
from typing import Any

from farshore.lab.azure.faults import Faults
from farshore.lab.azure.knobs import Knobs
from farshore.lab.azure.model import (
    DISK,
    GROUP,
    SNAPSHOT,
    TERMINAL,
    VM,
    Answer,
    ArmError,
    Call,
    Json,
    Resource,
    ResourceId,
    resource_id,
)
from farshore.lab.azure.operations import Engine, Operation
from farshore.lab.azure.ports import BlobReader, StorageAccount
from farshore.lab.azure.store import Store
from farshore.lab.azure.throttle import Throttle

TENANT = "7f6e1c52-3c5d-4b1e-9a50-6d6c5a1f0e11"
SUBSCRIPTION = "5b0c9e0e-52c4-4a35-8f3b-0f4a7b6f2c77"
CLIENT = "c0ffee00-1f2e-4d3c-8b4a-5a6978880011"
LOCATIONS = ("westeurope", "northeurope")


class World:
    """State of one laboratory Azure. Everything here belongs to the event loop's thread, but for `files`."""

    def __init__(self, root: Path, blobs: BlobReader | None, account: StorageAccount | None) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.root = root
        self.files = root / "disks"
        self.files.mkdir(exist_ok=True)
        self.tenant, self.subscription, self.client_id = TENANT, SUBSCRIPTION, CLIENT
        self.store = Store(root / "azure.sqlite")
        self.knobs = Knobs.from_json(self.store.setting("knobs", {}))
        self.faults = Faults(self.knobs.seed)
        self.faults.load(self.store.setting("faults", []))
        self.throttle = Throttle()
        self.blobs = blobs
        self.account = account
        self.knobs_changed = asyncio.Event()
        self.base_url = ""
        self.imports: dict[str, float] = {}
        """Source VHD → when it was last imported."""
        self.engine = Engine(self)
        self._sweep()

    def _sweep(self) -> None:
        """Remove what a killed laboratory left half done: files that no resource names."""
        named = {r.hidden.get("file") for r in self.store.resources.values()}
        for file in self.files.iterdir():
            if file.name not in named:
                file.unlink()
        for folder in self.root.glob("run-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def turn(self, changes: Json) -> None:
        """Change knobs. Raises: ValueError for unknown names."""
        self.knobs = Knobs.from_json({**self.knobs.to_json(), **changes})
        self.store.set_setting("knobs", self.knobs.to_json())
        if "seed" in changes:
            self.faults.reseed(self.knobs.seed)
        if "throttle" in changes or "buckets" in changes:
            self.throttle.reset()
        self.knobs_changed.set()
        self.knobs_changed = asyncio.Event()

    def save_faults(self) -> None:
        self.store.set_setting("faults", [rule.to_json() for rule in self.faults.rules])

    # ids and references

    def id_of(self, type_: str, group: str, *names: str) -> str:
        found = self.store.get(resource_id(self.subscription, group, GROUP))
        return resource_id(self.subscription, found.name if found else group, type_, *names)

    def group(self, name: str) -> Resource:
        """The resource group. Raises: ArmError 404 while it is unknown, also for being new."""
        found = self.store.get(resource_id(self.subscription, name, GROUP))
        if found is None or time.time() < found.created + self.knobs.consistency_groups:
            raise ArmError(404, "ResourceGroupNotFound", f"Resource group '{name}' could not be found.")
        return found

    def find(self, id_: str) -> Resource | None:
        """A resource as a GET sees it: not yet there during the consistency window."""
        found = self.store.get(id_)
        if found is not None and time.time() < found.created + self.knobs.consistency_resources:
            return None
        return found

    def require(self, id_: str) -> Resource:
        """The resource a request names. Raises: ArmError 404, of the group or of the resource."""
        found = self.find(id_)
        if found is not None:
            return found
        parsed = ResourceId.parse(id_)
        if parsed is None:
            raise ArmError(400, "InvalidResourceId", f"'{id_}' is not a resource id.")
        self.group(parsed.group)
        if len(parsed.names) != 1:
            raise ArmError(404, "NotFound", f"Resource {id_} not found.")
        raise ArmError(
            404,
            "ResourceNotFound",
            f"The Resource '{parsed.type}/{parsed.names[0]}' under resource group '{parsed.group}' was not found.",
        )

    def referenced(self, id_: str | None, type_: str, referrer: str) -> Resource:
        """A resource that another one's body names. Raises: ArmError 400 InvalidResourceReference."""
        found = self.store.get(id_)
        if found is None or found.type.lower() != type_.lower():
            raise ArmError(
                400,
                "InvalidResourceReference",
                f"Resource {id_} referenced by resource {referrer} was not found. "
                "Please make sure that the referenced resource exists, and that both are in the same region.",
            )
        return found

    # create-or-update

    def place(self, group: Resource, body: Json, existing: Resource | None) -> str:
        """The location a PUT asks for, checked. Raises: ArmError."""
        location = str(body.get("location") or "").replace(" ", "").lower()
        if not location:
            raise ArmError(400, "LocationRequired", "The location property is required for this definition.")
        if location not in LOCATIONS:
            raise ArmError(
                400,
                "LocationNotAvailableForResourceType",
                f"The provided location '{location}' is not available. Available: {', '.join(LOCATIONS)}.",
            )
        if existing is not None and existing.location != location:
            raise ArmError(
                409,
                "InvalidResourceLocation",
                f"The resource '{existing.name}' already exists in location '{existing.location}' in resource group "
                f"'{group.name}'. A resource with the same name cannot be created in location '{location}'.",
            )
        return location

    def open_group(self, name: str) -> Resource:
        """A group that takes new resources. Raises: ArmError 404, 409 while it is being deleted."""
        group = self.group(name)
        if group.state == "Deleting":
            raise ArmError(
                409,
                "ResourceGroupBeingDeleted",
                f"The resource group '{name}' is in deprovisioning state and cannot perform this operation.",
            )
        return group

    def start(self, call: Call, kind: str, resource: Resource, **args: Any) -> Operation:
        """Begin an operation on `resource` where it lives."""
        return self.engine.begin(call, kind, resource.id, resource.location, **args)

    def accepted(
        self, call: Call, operation: Operation, status: int, body: Any, style: str = "both"
    ) -> Answer:
        return Answer(status, body, self.engine.headers(call, operation, style))

    def compute_busy(self, resource: Resource) -> None:
        """Raises: ArmError 429 while another operation runs on a compute resource (B.2)."""
        running = self.engine.running_on(resource.key)
        if running:
            raise ArmError(
                429,
                "RetryableErrorDueToAnotherOperation",
                f"The operation on '{resource.name}' can't proceed: operation '{running[0].id}' ({running[0].kind}) "
                "is still running. Retry when it has ended.",
                headers={"Retry-After": self.engine.retry_after(running[0])},
            )

    def same_request(self, resource: Resource, body: Json) -> Operation | None:
        """The running operation that already does what this PUT asks for."""
        for operation in self.engine.running_on(resource.key):
            if operation.args.get("request") == body:
                return operation
        return None


def zones(body: Json) -> list[str]:
    value = body.get("zones")
    return [str(zone) for zone in value] if isinstance(value, list) else []


def settled(resource: Resource) -> bool:
    return resource.state in TERMINAL


def is_compute(resource: Resource) -> bool:
    return resource.type in {DISK, SNAPSHOT, VM}
