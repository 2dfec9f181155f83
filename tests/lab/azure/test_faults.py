"""What goes wrong in reality goes wrong here, when told to, and the server's own log proves what was applied."""

from __future__ import annotations

import time

import pytest
from azure.core.exceptions import (
    HttpResponseError,
    ResourceNotFoundError,
    ServiceRequestError,
    ServiceResponseError,
)

from farshore.lab.azure.control import ControlError
from farshore.lab.azure.faults import Fault, Faults
from farshore.lab.azure.model import ArmError
from farshore.lab.azure.throttle import Throttle

RG, LOCATION = "farshore-dr", "westeurope"
EMPTY = {"location": LOCATION, "properties": {"creationData": {"createOption": "Empty"}, "diskSizeGB": 1}}
LOST = (ServiceRequestError, ServiceResponseError)


async def test_applied_and_then_the_connection_was_lost(azure) -> None:
    await azure.ctl(azure.control.fault, "drop_after", operation="compute.Disks.create_or_update")
    with pytest.raises(LOST):
        await azure.disk("d1")
    assert (await azure.compute.disks.get(RG, "d1")).name == "d1"  # it is there all the same
    disk = await azure.disk("d1")
    assert (await azure.ctl(azure.control.creations))[disk.id.lower()] == 1
    puts = [r for r in await azure.ctl(azure.control.requests) if r.method == "PUT"]
    assert [r.status for r in puts if not r.resent] == [0, 202]


async def test_lost_before_anything_was_applied(azure) -> None:
    await azure.ctl(azure.control.fault, "drop_before", operation="compute.Disks.create_or_update")
    with pytest.raises(LOST):
        await azure.disk("d1")
    with pytest.raises(ResourceNotFoundError):
        await azure.compute.disks.get(RG, "d1")


@pytest.mark.parametrize(("status", "retry_after"), [(500, None), (503, 3), (403, None), (429, 1)])
async def test_any_status_can_be_answered_without_applying(azure, status, retry_after) -> None:
    await azure.ctl(
        azure.control.fault,
        "status",
        operation="compute.Disks.*",
        status=status,
        code="Told",
        retry_after=retry_after,
    )
    with pytest.raises(HttpResponseError) as caught:
        await azure.disk("d1")
    assert (caught.value.status_code, caught.value.error.code) == (status, "Told")
    assert caught.value.response.headers.get("Retry-After") == (
        None if retry_after is None else str(retry_after)
    )
    await azure.disk("d1")
    requests = await azure.ctl(azure.control.requests)
    assert [r.fault for r in requests if r.fault] == [{"id": 1, "action": "status"}]


async def test_a_slow_answer_is_slow(azure) -> None:
    await azure.disk("d1")
    await azure.ctl(azure.control.fault, "slow", operation="compute.Disks.get", seconds=0.3)
    started = time.monotonic()
    await azure.compute.disks.get(RG, "d1")
    assert time.monotonic() - started >= 0.3


async def test_rules_skip_count_and_match_by_path(azure) -> None:
    await azure.disk("d1")
    await azure.ctl(
        azure.control.fault, "status", path="*/DISKS/d1", method="get", skip=1, count=2, code="Told"
    )
    outcomes = []
    for _ in range(4):
        try:
            await azure.compute.disks.get(RG, "d1")
            outcomes.append("ok")
        except HttpResponseError as told:
            outcomes.append(told.error.code)
    assert outcomes == ["ok", "Told", "Told", "ok"]
    (rule,) = await azure.ctl(azure.control.faults)
    assert rule["hits"] == 2
    with pytest.raises(ControlError, match="unknown action"):
        await azure.ctl(azure.control.fault, "explode")


def test_random_rules_repeat_with_their_seed() -> None:
    def strikes(seed: int) -> list[bool]:
        faults = Faults(seed)
        faults.add(Fault("status", probability=0.5, count=None))
        return [faults.strike("x", "GET", "/") is not None for _ in range(40)]

    assert strikes(1) == strikes(1)
    assert strikes(1) != strikes(2)
    assert 5 < sum(strikes(1)) < 35


async def test_throttling_is_off_until_it_is_switched_on_and_then_says_how_long(azure) -> None:
    for _ in range(30):
        await azure.resources.resource_groups.get(RG)
    await azure.ctl(azure.control.throttle, True, reads=(0.5, 3), writes=(10, 200))
    answers = []
    for _ in range(5):
        try:
            await azure.resources.resource_groups.get(RG)
            answers.append(200)
        except HttpResponseError as refusal:
            answers.append(int(refusal.response.headers["Retry-After"]))
    assert answers[:3] == [200, 200, 200]
    assert answers[3] >= 2
    assert answers[4] > answers[3]  # asking early costs more
    await azure.resources.resource_groups.create_or_update(
        RG, {"location": LOCATION}
    )  # writes have their own bucket


async def test_a_machines_own_buckets_are_its_own(azure) -> None:
    await azure.vm("vm1")
    await azure.vm("vm2")
    await azure.ctl(azure.control.throttle, True, vm_read=(0.01, 2))
    machines = azure.compute.virtual_machines
    await machines.get(RG, "vm1")
    await machines.get(RG, "vm1")
    with azure.refused("OperationNotAllowed", 429):
        await machines.get(RG, "vm1")
    await machines.get(RG, "vm2")


def test_a_bucket_refills_and_refuses_with_a_new_time_when_asked_early() -> None:
    throttle = Throttle()
    assert throttle.take("reads", 1000.0, 2) == 1
    assert throttle.take("reads", 0.001, 2) == 0
    waits = []
    for _ in range(2):
        with pytest.raises(ArmError) as caught:
            throttle.take("reads", 0.001, 2)
        waits.append(int(caught.value.headers["Retry-After"]))
    assert waits[1] > waits[0] > 900


async def test_new_things_are_unknown_for_a_while(azure, wait_until) -> None:
    await azure.ctl(azure.control.consistency, groups=0.4)
    await azure.resources.resource_groups.create_or_update("t-1", {"location": LOCATION})
    with azure.refused("ResourceGroupNotFound", 404):
        await azure.compute.disks.begin_create_or_update("t-1", "d1", EMPTY)

    async def known() -> bool:
        return await azure.resources.resource_groups.check_existence("t-1")

    await wait_until(known)
    await azure.ctl(azure.control.consistency, resources=0.4)
    await azure.compute.disks.begin_create_or_update("t-1", "d1", EMPTY)
    with azure.refused("ResourceNotFound", 404):
        await azure.compute.disks.get("t-1", "d1")
    await azure.ctl(azure.control.consistency, operations=5.0)
    poller = await azure.compute.disks.begin_create_or_update("t-1", "d2", EMPTY)
    with pytest.raises(HttpResponseError):  # 404 on the first poll
        await poller.result()


async def test_a_region_that_is_down_answers_503_and_its_operations_stand_still(azure) -> None:
    poller = await azure.compute.disks.begin_create_or_update(RG, "d1", EMPTY)
    await azure.ctl(azure.control.outage, LOCATION)
    with azure.refused("ServiceUnavailable", 503):
        await azure.disk("d2")
    await azure.resources.resource_groups.get(RG)  # the management layer itself lives elsewhere
    (operation,) = await azure.ctl(azure.control.operations)
    assert operation["status"] == "InProgress"
    await azure.ctl(azure.control.outage)
    assert (await poller.result()).properties.provisioning_state == "Succeeded"


async def test_the_log_tells_what_came_in(azure) -> None:
    await azure.disk("d1")
    rows = await azure.ctl(azure.control.requests)
    put = next(r for r in rows if r.operation == "compute.Disks.create_or_update")
    assert (put.method, put.status, put.query["api-version"]) == ("PUT", 202, "2026-03-02")
    assert put.client_request_id
    assert {"entra.token", "lro.status", "compute.Disks.get"} <= {r.operation for r in rows}
    await azure.ctl(azure.control.clear_requests)
    assert await azure.ctl(azure.control.requests, rows[-1].seq) == []


async def test_history_counts_real_creations_and_deletions(azure, finish) -> None:
    for _ in range(2):
        disk = await azure.disk("d1")
        await azure.disk("d1")
        await finish(azure.compute.disks.begin_delete(RG, "d1"))
    events = [e.event for e in await azure.ctl(azure.control.history) if e.id == disk.id]
    assert events == ["created", "deleted", "created", "deleted"]
    assert (await azure.ctl(azure.control.creations))[disk.id.lower()] == 2


async def test_somebody_else_deletes_and_changes_things(azure) -> None:
    disk = await azure.disk("d1")
    await azure.ctl(azure.control.change_behind, disk.id, {"tags": {"who": "knows"}})
    assert (await azure.compute.disks.get(RG, "d1")).tags == {"who": "knows"}
    await azure.ctl(azure.control.delete_behind, disk.id)
    with azure.refused("ResourceNotFound", 404):
        await azure.compute.disks.get(RG, "d1")
    with pytest.raises(ControlError, match="404"):
        await azure.ctl(azure.control.disk_sha256, disk.id)


async def test_the_storage_account_is_a_resource_with_keys(azure) -> None:
    from azure.core.rest import HttpRequest

    account = azure.lab.storage_account_id
    shown = await azure.compute.send_request(
        HttpRequest("GET", account, params={"api-version": "2026-09-01"})
    )
    told = azure.lab.describe()
    assert shown.json()["properties"]["primaryEndpoints"]["blob"] == told["blob"] + "/"
    keys = await azure.compute.send_request(
        HttpRequest("POST", f"{account}/listKeys", params={"api-version": "2026-09-01"})
    )
    assert keys.json()["keys"][0]["value"] == told["account_key"]


async def test_an_unknown_knob_is_refused(azure) -> None:
    with pytest.raises(ControlError, match="unknown knob colour"):
        await azure.ctl(azure.control.turn, colour="red")


async def test_the_blob_servers_faults_are_reached_through_the_same_control_port(azure) -> None:
    await azure.ctl(azure.control.blob, "outage", kind="503")
    with pytest.raises(HttpResponseError):
        await azure.vhd("d.vhd", {})
    await azure.ctl(azure.control.blob, "outage", kind="")
    assert await azure.vhd("d.vhd", {})
