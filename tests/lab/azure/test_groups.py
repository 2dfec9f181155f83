"""Resource groups, the generic list, tags, provider registrations."""

from __future__ import annotations

import asyncio

import pytest
from azure.core.exceptions import HttpResponseError


async def _list(pages) -> list:
    return [row async for row in pages]


async def test_a_group_is_created_found_listed_and_deleted_with_all_in_it(azure, finish) -> None:
    groups = azure.resources.resource_groups
    made = await groups.create_or_update("t-1", {"location": "West Europe", "tags": {"plan": "crm"}})
    assert (made.location, made.tags, made.properties.provisioning_state) == (
        "westeurope",
        {"plan": "crm"},
        "Succeeded",
    )
    assert await groups.check_existence("T-1")
    assert not await groups.check_existence("t-2")
    assert {g.name for g in await _list(groups.list())} == {"farshore-dr", "t-1"}
    await azure.vm("vm1", "t-1")
    await finish(groups.begin_delete("t-1"))
    assert not await groups.check_existence("t-1")
    assert [r for r in await azure.ctl(azure.control.resources) if "/t-1" in r.id.lower()] == []
    assert list(azure.lab.world.files.iterdir()) == []


async def test_a_group_being_deleted_takes_nothing_new(azure, finish) -> None:
    groups = azure.resources.resource_groups
    await groups.create_or_update("t-1", {"location": "westeurope"})
    await azure.ctl(azure.control.fault, "lro_stuck", operation="*.ResourceGroups.delete")
    poller = await groups.begin_delete("t-1")
    with azure.refused("ResourceGroupBeingDeleted", 409):
        await azure.disk("d", "t-1")
    assert await azure.ctl(azure.control.release) == 1
    await poller.result()


async def test_a_group_whose_parts_others_use_is_not_deleted(azure, finish) -> None:
    await azure.resources.resource_groups.create_or_update("t-1", {"location": "westeurope"})
    await azure.vm("vm1", "t-1")  # its interface lies in a subnet of farshore-dr
    with pytest.raises(HttpResponseError) as caught:
        await finish(azure.resources.resource_groups.begin_delete("farshore-dr"))
    assert caught.value.error.code == "ResourceGroupDeletionBlocked"
    assert (
        await azure.resources.resource_groups.get("farshore-dr")
    ).properties.provisioning_state == "Succeeded"
    await finish(azure.resources.resource_groups.begin_delete("t-1"))


async def test_repeating_the_creation_of_a_group_creates_nothing(azure) -> None:
    for _ in range(3):
        await azure.resources.resource_groups.create_or_update("t-1", {"location": "westeurope"})
    creations = await azure.ctl(azure.control.creations)
    assert creations[f"/subscriptions/{azure.lab.subscription}/resourcegroups/t-1"] == 1
    with azure.refused("InvalidResourceGroupLocation", 409):
        await azure.resources.resource_groups.create_or_update("t-1", {"location": "northeurope"})


async def test_resources_are_listed_by_tag_and_then_come_without_tags(azure) -> None:
    tags = {"farshore-run": "r1", "plan": "it's"}
    for name, given in (("d1", tags), ("d2", {"farshore-run": "r2"})):
        await (
            await azure.compute.disks.begin_create_or_update(
                "farshore-dr", name,
                {"location": "westeurope", "tags": given,
                 "properties": {"creationData": {"createOption": "Empty"}, "diskSizeGB": 1}},
            )
        ).result()  # fmt: skip
    resources = azure.resources.resources
    found = await _list(resources.list(filter="tagName eq 'FARSHORE-RUN' and tagValue eq 'r1'"))
    assert [(r.name, r.tags) for r in found] == [("d1", None)]
    found = await _list(
        resources.list_by_resource_group("farshore-dr", filter="tagName eq 'plan' and tagValue eq 'it''s'")
    )
    assert [r.name for r in found] == ["d1"]
    everything = await _list(
        resources.list_by_resource_group("farshore-dr", expand="createdTime,provisioningState")
    )
    assert {r.name for r in everything} == {"d1", "d2", "dr-vnet", "farshorelab"}
    assert all(r.created_time and r.provisioning_state == "Succeeded" for r in everything)
    assert {r.name: r.tags for r in everything}["d1"] == tags
    disks = await _list(resources.list(filter="resourceType eq 'microsoft.compute/DISKS'"))
    assert [r.name for r in disks] == ["d1", "d2"]
    for text in ("tagName eq 'a' and resourceType eq 'b'", "colour eq 'red'", "tagValue eq 'x'"):
        with azure.refused("InvalidFilterInQueryString", 400):
            await _list(resources.list(filter=text))


async def test_lists_come_in_pages(azure) -> None:
    await azure.ctl(azure.control.turn, page_size=2)
    await asyncio.gather(*(azure.disk(f"d{i}") for i in range(5)))
    assert [d.name for d in await _list(azure.compute.disks.list())] == [f"d{i}" for i in range(5)]
    requests = await azure.ctl(azure.control.requests)
    assert sum(r.operation == "compute.Disks.list" for r in requests) == 3


async def test_tags_merge_replace_and_vanish_at_a_scope(azure) -> None:
    disk = await azure.disk("d1")
    tags = azure.resources.tags
    await (
        await tags.begin_create_or_update_at_scope(disk.id, {"properties": {"tags": {"a": "1", "b": "2"}}})
    ).result()
    await (
        await tags.begin_update_at_scope(
            disk.id, {"operation": "Merge", "properties": {"tags": {"b": "3", "c": "4"}}}
        )
    ).result()
    assert (await azure.compute.disks.get("farshore-dr", "d1")).tags == {"a": "1", "b": "3", "c": "4"}
    await (
        await tags.begin_update_at_scope(disk.id, {"operation": "Delete", "properties": {"tags": {"a": "1"}}})
    ).result()
    assert (await tags.get_at_scope(disk.id)).properties.tags == {"b": "3", "c": "4"}
    await (await tags.begin_delete_at_scope(disk.id)).result()
    assert not (await tags.get_at_scope(disk.id)).properties.tags
    with azure.refused("TooManyTags", 400):
        many = {str(i): "x" for i in range(51)}
        await tags.begin_create_or_update_at_scope(disk.id, {"properties": {"tags": many}})


async def test_an_unregistered_provider_refuses_until_it_is_registered(azure) -> None:
    await azure.ctl(azure.control.unregister, "Microsoft.Compute")
    assert (await azure.resources.providers.get("Microsoft.Compute")).registration_state == "NotRegistered"
    with azure.refused("MissingSubscriptionRegistration", 409):
        await azure.disk("d1")
    await azure.resources.providers.register("Microsoft.Compute")
    await azure.disk("d1")


async def test_existence_by_id_is_a_head(azure) -> None:
    disk = await azure.disk("d1")
    check = azure.resources.resources.check_existence_by_id
    assert await check(disk.id.upper(), api_version="2026-03-02")
    assert not await check(disk.id + "x", api_version="2026-03-02")


@pytest.mark.parametrize(
    ("path", "version", "code", "status"),
    [
        ("/resourcegroups/farshore-dr", "2020-01-01", "InvalidApiVersionParameter", 400),
        ("/resourcegroups/farshore-dr", None, "MissingApiVersionParameter", 400),
        (
            "/resourceGroups/farshore-dr/providers/Microsoft.Compute/disks/d",
            "2019-01-01",
            "NoRegisteredProviderFound",
            400,
        ),
        (
            "/resourceGroups/farshore-dr/providers/Microsoft.Compute/disks/d",
            "2026-03-02",
            "ResourceNotFound",
            404,
        ),
        (
            "/resourceGroups/nowhere/providers/Microsoft.Compute/disks/d",
            "2026-03-02",
            "ResourceGroupNotFound",
            404,
        ),
        (
            "/resourceGroups/farshore-dr/providers/Microsoft.Compute/teapots/d",
            "2026-03-02",
            "InvalidResourceType",
            404,
        ),
    ],
)
async def test_wrong_versions_and_paths_have_arms_errors(azure, path, version, code, status) -> None:
    from azure.core.rest import HttpRequest

    url = f"/subscriptions/{azure.lab.subscription}{path}"
    request = HttpRequest("GET", url, params={"api-version": version} if version else {})
    answer = await azure.compute.send_request(request)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
