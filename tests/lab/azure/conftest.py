"""A laboratory Azure with the real SDK clients on it. Every answer it gives in these tests is held against the wheels."""

from __future__ import annotations

import asyncio
import os
import struct
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from azure.core import MatchConditions
from azure.core.exceptions import HttpResponseError
from azure.identity.aio import ClientSecretCredential
from azure.mgmt.compute.aio import ComputeManagementClient
from azure.mgmt.network.aio import NetworkManagementClient
from azure.mgmt.resource.resources.aio import ResourceManagementClient
from azure.storage.blob import BlobServiceClient

from farshore.lab.azure import AzureControl, LabAzureWhole, routes, wheel_contract, wheel_schema
from farshore.lab.azure.model import Json
from farshore.lab.azure.server import Recorded

MIB = 1 << 20
RG = "farshore-dr"
LOCATION = "westeurope"


def vhd_footer(size: int, **wrong: Any) -> bytes:
    """A fixed-VHD footer; `wrong` spoils one field: cookie, kind, said (size) or checksum."""
    footer = bytearray(
        struct.pack(
            ">8sIIQI4sI4sQQHBBII16s428x",
            wrong.get("cookie", b"conectix"), 2, 0x10000, 2**64 - 1, 1, b"test", 0x10000, b"Wi2k",
            size, wrong.get("said", size), 65535, 16, 255, wrong.get("kind", 2), 0, uuid.uuid4().bytes,
        )
    )  # fmt: skip
    footer[64:68] = struct.pack(">I", (~sum(footer) & 0xFFFFFFFF) ^ wrong.get("checksum", 0))
    return bytes(footer)


def recorded_problems(answer: Recorded) -> list[str]:
    """What is wrong with an answer, by the contract and models of the wheel it belongs to."""
    where = f"{answer.method} {answer.path} → {answer.status}"
    if answer.origin.startswith("storage.") or answer.operation == "unknown":
        return []  # hand-declared, or refused before a route was found
    package = ".".join(answer.origin.split(".")[:-2])
    if answer.origin.startswith("lro."):
        return []  # a poll of an operation that doesn't exist
    contract = wheel_contract.of(answer.origin)
    if contract is None:
        return [f"{where}: no contract for {answer.origin}"]
    if answer.operation == routes.LRO_STATUS and answer.status == 200:
        extra = set(answer.body) - {
            "name",
            "startTime",
            "endTime",
            "status",
            "error",
            "properties",
            "percentComplete",
        }
        return [f"{where}: {extra}"] if extra else []
    told = answer.status == 500 and "told to fail" in answer.body["error"]["message"]
    if answer.status == 500 and answer.body["error"]["code"] == "InternalServerError" and not told:
        return [f"{where}: a defect of the laboratory: {answer.body}"]
    if answer.status >= 400:
        if answer.method == "HEAD" or answer.body is None:
            return []
        return [f"{where}: {p}" for p in wheel_schema.problems(package, contract.error or "", answer.body)]
    polled = answer.operation in {routes.LRO_STATUS, routes.LRO_RESULT}
    existence = answer.method == "HEAD" and answer.status == 204
    if not polled and not existence and answer.status not in contract.codes:
        return [f"{where}: the SDK accepts {contract.codes}"]
    if answer.body is None or contract.response is None:
        return []
    if contract.paged:
        rows = answer.body["value"]
        return [
            f"{where}: {p}" for row in rows for p in wheel_schema.problems(package, contract.response, row)
        ] + [f"{where}: {name}" for name in set(answer.body) - {"value", "nextLink"}]
    return [f"{where}: {p}" for p in wheel_schema.problems(package, contract.response, answer.body)]


class Azure:
    """The laboratory, the SDK's clients on it, and short ways to what tests need again and again."""

    def __init__(self, lab: LabAzureWhole) -> None:
        self.lab = lab
        self.control = AzureControl(lab.control_url)
        self.credential = self.new_credential()
        self.compute = ComputeManagementClient(self.credential, lab.subscription, **self.options)
        self.network = NetworkManagementClient(self.credential, lab.subscription, **self.options)
        self.resources = ResourceManagementClient(self.credential, lab.subscription, **self.options)
        self.refused = Refused

    @property
    def options(self) -> dict[str, Any]:
        return {
            "base_url": self.lab.base_url,
            "credential_scopes": ["https://management.azure.com/.default"],
            "connection_verify": self.lab.ca_file,
            "polling_interval": 0.02,
            "retry_total": 0,
        }

    def new_credential(self, **changes: str) -> ClientSecretCredential:
        given = {
            "tenant_id": self.lab.tenant,
            "client_id": self.lab.client_id,
            "client_secret": self.lab.client_secret,
        }
        return ClientSecretCredential(
            **{**given, **changes},
            authority=self.lab.base_url,
            disable_instance_discovery=True,
            connection_verify=self.lab.ca_file,
            retry_total=0,
        )

    async def close(self) -> None:
        for client in (self.compute, self.network, self.resources, self.credential):
            await client.close()

    async def ctl(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call the synchronous control client without stopping the laboratory's own loop."""
        return await asyncio.to_thread(call, *args, **kwargs)

    def id(self, kind: str, name: str, group: str = RG) -> str:
        return f"/subscriptions/{self.lab.subscription}/resourceGroups/{group}/providers/{kind}/{name}"

    def subnet(self, name: str = "web") -> str:
        return self.id("Microsoft.Network/virtualNetworks", f"dr-vnet/subnets/{name}")

    # bytes

    def blob_service(self) -> BlobServiceClient:
        told = self.lab.describe()
        return BlobServiceClient(
            told["blob"],
            credential={"account_name": told["account"], "account_key": told["account_key"]},
            connection_verify=self.lab.ca_file,
            retry_total=0,
        )

    async def vhd(
        self,
        name: str,
        pieces: dict[int, bytes],
        size: int = 4 * MIB,
        footer: bytes | None = None,
        blob_size: int | None = None,
    ) -> str:
        """Upload a page blob holding `pieces` and a footer; returns its URL."""

        def upload() -> str:
            with self.blob_service() as service:
                container = service.get_container_client("vhds")
                if not container.exists():
                    container.create_container()
                blob = container.get_blob_client(name)
                total = blob_size or size + 512
                blob.create_page_blob(total)
                for offset, data in pieces.items():
                    blob.upload_page(data, offset, len(data))
                blob.upload_page(footer or vhd_footer(size), total - 512, 512)
                return blob.url

        return await asyncio.to_thread(upload)

    # resources

    async def disk(self, name: str, group: str = RG, **properties: Any) -> Any:
        """An empty disk of 1 GiB unless `properties` say otherwise."""
        body: Json = {"location": LOCATION, "properties": {"osType": "Linux", **properties}}
        if "creationData" not in properties:
            body["properties"] |= {"creationData": {"createOption": "Empty"}, "diskSizeGB": 1}
        return await done(self.compute.disks.begin_create_or_update(group, name, body))

    def imported(self, url: str, **more: Any) -> Json:
        return {
            "createOption": "Import",
            "sourceUri": url,
            "storageAccountId": self.lab.storage_account_id,
            **more,
        }

    async def nic(self, name: str, *, subnet: str = "web", group: str = RG, **config: Any) -> Any:
        body = {
            "location": LOCATION,
            "properties": {
                "ipConfigurations": [
                    {"name": "ip", "properties": {"subnet": {"id": self.subnet(subnet)}, **config}}
                ]
            },
        }
        return await done(self.network.network_interfaces.begin_create_or_update(group, name, body))

    def machine(self, disk_id: str, nic_id: str, size: str = "Standard_D2s_v5", **more: Any) -> Json:
        """Body of a machine on a specialised disk."""
        return {
            "location": LOCATION,
            "properties": {
                "hardwareProfile": {"vmSize": size},
                "storageProfile": {
                    "osDisk": {"createOption": "Attach", "osType": "Linux", "managedDisk": {"id": disk_id}},
                    "dataDisks": more.pop("data", []),
                },
                "networkProfile": {"networkInterfaces": [{"id": nic_id}]},
            },
            **more,
        }

    async def vm(self, name: str, group: str = RG, **more: Any) -> Any:
        """A running machine with its own disk and interface."""
        disk, nic = await asyncio.gather(self.disk(f"{name}-os", group), self.nic(f"{name}-nic", group=group))
        return await self.create(name, self.machine(disk.id, nic.id, **more), group)

    async def create(self, name: str, body: Json, group: str = RG) -> Any:
        return await done(
            self.compute.virtual_machines.begin_create_or_update(
                group, name, body, etag="*", match_condition=MatchConditions.IfMissing
            )
        )

    async def power(self, name: str) -> str:
        view = await self.compute.virtual_machines.instance_view(RG, name)
        return next((s.code.split("/")[1] for s in view.statuses if s.code.startswith("PowerState/")), "none")

    async def agent_ready(self, name: str) -> None:
        async def ready() -> bool:
            view = await self.compute.virtual_machines.instance_view(RG, name)
            return view.vm_agent is not None and view.vm_agent.statuses[0].display_status == "Ready"

        await until(ready)


class Refused:
    """Context: the block must be refused with `code` (and `status`)."""

    def __init__(self, code: str, status: int | None = None) -> None:
        self.code, self.status = code, status
        self.message = ""

    def __enter__(self) -> Refused:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        assert error is not None, f"nothing was refused; {self.code} was due"
        if not isinstance(error, HttpResponseError):
            return False
        assert error.error is not None, error
        assert error.error.code == self.code, error
        assert self.status in {None, error.status_code}, error
        self.message = error.message
        return True


async def done(begin: Awaitable[Any]) -> Any:
    """Start a long-running operation and wait for its result."""
    return await (await begin).result()


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.01)


@pytest.fixture
async def azure(tmp_path: Path) -> AsyncIterator[Azure]:
    answers: list[Recorded] = []
    async with LabAzureWhole(tmp_path / "azure", recorder=answers.append) as lab:
        harness = Azure(lab)
        try:
            yield harness
            for operation in lab.world.engine.operations.values():
                assert (operation.error or {}).get("code") != "InternalExecutionError", operation
        finally:
            await harness.close()
    wrong = sorted({line for answer in answers for line in recorded_problems(answer)})
    assert not wrong, "\n".join(wrong)


@pytest.fixture
def finish() -> Callable[[Awaitable[Any]], Awaitable[Any]]:
    return done


@pytest.fixture
def wait_until() -> Callable[..., Awaitable[None]]:
    return until


@pytest.fixture
def footer() -> Callable[..., bytes]:
    return vhd_footer


@pytest.fixture
def noise() -> Callable[[int], bytes]:
    return os.urandom
