"""Long-running operations: the headers each kind has, polling, failure, cancellation, resumption from a token."""

from __future__ import annotations

import asyncio

import pytest
from azure.core.exceptions import HttpResponseError
from azure.core.rest import HttpRequest
from azure.mgmt.compute.aio import ComputeManagementClient

RG = "farshore-dr"
EMPTY = {"location": "westeurope", "properties": {"creationData": {"createOption": "Empty"}, "diskSizeGB": 1}}


async def send(azure, method: str, path: str, version: str, body=None):
    request = HttpRequest(
        method, f"/subscriptions/{azure.lab.subscription}{path}", params={"api-version": version}, json=body
    )
    return await azure.compute.send_request(request)


async def follow(azure, url: str):
    return await azure.compute.send_request(HttpRequest("GET", url))


async def test_a_disk_answers_202_with_both_urls_and_ends_with_the_disk(azure, wait_until) -> None:
    path = f"/resourceGroups/{RG}/providers/Microsoft.Compute/disks/d1"
    await azure.ctl(azure.control.time_scale, 0.5)  # slow enough to be seen under way, also on a busy machine
    first = await send(azure, "PUT", path, "2026-03-02", EMPTY)
    assert first.status_code == 202
    assert first.json()["properties"]["provisioningState"] == "Updating"
    assert first.headers["Retry-After"].isdigit()
    status = (await follow(azure, first.headers["Azure-AsyncOperation"])).json()
    assert (status["status"], status["name"] in first.headers["Location"]) == ("InProgress", True)
    assert (await follow(azure, first.headers["Location"])).status_code == 202

    async def ended() -> bool:
        return (await follow(azure, first.headers["Azure-AsyncOperation"])).json()["status"] == "Succeeded"

    await wait_until(ended)
    final = await follow(azure, first.headers["Location"])
    assert (final.status_code, final.json()["name"]) == (200, "d1")


@pytest.mark.parametrize(
    ("method", "path", "version", "body", "status", "headers"),
    [
        (
            "PUT",
            "/providers/Microsoft.Network/publicIPAddresses/p",
            "2026-03-01",
            {"location": "westeurope"},
            201,
            "async",
        ),
        ("DELETE", "/providers/Microsoft.Network/virtualNetworks/dr-vnet", "2026-03-01", None, 202, "both"),
        ("DELETE", "", "2025-04-01", None, 202, "location"),
    ],
)
async def test_each_kind_announces_itself_its_own_way(
    azure, method, path, version, body, status, headers
) -> None:
    group = "resourcegroups" if not path else "resourceGroups"
    first = await send(azure, method, f"/{group}/{RG}{path}", version, body)
    assert first.status_code == status
    assert ("Azure-AsyncOperation" in first.headers) == (headers in {"async", "both"})
    assert ("Location" in first.headers) == (headers in {"location", "both"})


async def test_a_failed_operation_has_status_200_and_its_error_inside(azure) -> None:
    await azure.ctl(
        azure.control.fault,
        "lro_fail",
        operation="compute.Disks.*",
        code="InternalDiskError",
        message="Broken.",
    )
    with pytest.raises(HttpResponseError) as caught:
        await (await azure.compute.disks.begin_create_or_update(RG, "d1", EMPTY)).result()
    assert (caught.value.status_code, caught.value.error.code) == (200, "InternalDiskError")
    assert (await azure.compute.disks.get(RG, "d1")).properties.provisioning_state == "Failed"


async def test_an_operation_may_end_cancelled(azure) -> None:
    await azure.ctl(azure.control.fault, "lro_cancel", operation="network.NetworkInterfaces.*")
    with azure.refused("OperationCanceled"):
        await azure.nic("n1")


async def test_busy_may_also_come_as_the_operations_error(azure) -> None:
    await azure.ctl(
        azure.control.fault,
        "lro_fail",
        operation="network.*",
        code="AnotherOperationInProgress",
        message="Wait.",
    )
    with azure.refused("AnotherOperationInProgress", 200):
        await azure.nic("n1")
    await azure.nic("n1")


async def test_another_client_goes_on_from_a_continuation_token_without_a_second_put(azure) -> None:
    await azure.ctl(azure.control.fault, "lro_stuck", operation="compute.Disks.create_or_update")
    token = (await azure.compute.disks.begin_create_or_update(RG, "d1", EMPTY)).continuation_token()
    async with ComputeManagementClient(azure.credential, azure.lab.subscription, **azure.options) as other:
        poller = await other.disks.begin_create_or_update(RG, "d1", {}, continuation_token=token)
        await azure.ctl(azure.control.release)
        disk = await poller.result()
    assert disk.name == "d1"
    requests = await azure.ctl(azure.control.requests)
    assert sum(r.method == "PUT" for r in requests) == 1


async def test_retry_after_is_honest_to_the_time_scale(azure) -> None:
    path = f"/resourceGroups/{RG}/providers/Microsoft.Compute/disks/"
    assert (await send(azure, "PUT", path + "d1", "2026-03-02", EMPTY)).headers["Retry-After"] == "0"
    await azure.ctl(azure.control.turn, retry_after=7)
    assert (await send(azure, "PUT", path + "d2", "2026-03-02", EMPTY)).headers["Retry-After"] == "7"
    await azure.ctl(azure.control.turn, retry_after=None)
    await azure.ctl(azure.control.time_scale, 1.0)
    real = await send(azure, "PUT", path + "d3", "2026-03-02", EMPTY)
    assert 1 <= int(real.headers["Retry-After"]) <= 10


async def test_a_stuck_operation_stays_until_it_is_released(azure) -> None:
    await azure.ctl(azure.control.fault, "lro_stuck", operation="compute.Disks.create_or_update")
    poller = await azure.compute.disks.begin_create_or_update(RG, "d1", EMPTY)
    (operation,) = await azure.ctl(azure.control.operations)
    assert (operation["kind"], operation["due"]) == ("disk.create", None)
    waiting = asyncio.ensure_future(poller.result())
    done, _ = await asyncio.wait([waiting], timeout=0.3)
    assert not done
    assert await azure.ctl(azure.control.release, operation["id"]) == 1
    assert (await waiting).properties.provisioning_state == "Succeeded"


async def test_an_unknown_operation_is_404(azure) -> None:
    url = "/providers/Microsoft.Compute/locations/westeurope/operations/00000000-0000-0000-0000-000000000000"
    assert (await send(azure, "GET", url, "2026-03-02")).status_code == 404
