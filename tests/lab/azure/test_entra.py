"""The token endpoint, as the real azure-identity uses it."""

from __future__ import annotations

import asyncio

import pytest
from azure.core.exceptions import ClientAuthenticationError, HttpResponseError
from azure.mgmt.resource.resources.aio import ResourceManagementClient
from azure.storage.blob.aio import BlobServiceClient


async def test_azure_identity_gets_a_token_that_opens_the_management_plane(azure) -> None:
    assert (await azure.resources.resource_groups.get("farshore-dr")).location == "westeurope"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"client_secret": "wrong"}, "AADSTS7000215"),
        ({"client_id": "11111111-1111-1111-1111-111111111111"}, "AADSTS700016"),
        ({"tenant_id": "22222222-2222-2222-2222-222222222222"}, "AADSTS90002|tenant"),
    ],
)
async def test_wrong_credentials_are_refused_with_entras_codes(azure, changes, code) -> None:
    async with azure.new_credential(**changes) as credential:
        with pytest.raises((ClientAuthenticationError, ValueError), match=code):
            await credential.get_token("https://management.azure.com/.default")


async def test_no_token_and_a_forged_token_are_401(azure) -> None:
    for header in ({}, {"Authorization": "Bearer a.b.c"}):

        class Raw:
            async def get_token(self, *scopes, **kwargs):
                raise AssertionError("not reached")

        status, body = await _get(azure, header)
        assert status == 401
        assert body["error"]["code"] in {"AuthenticationFailed", "InvalidAuthenticationToken"}


async def _get(azure, headers):
    import ssl

    import aiohttp

    context = ssl.create_default_context(cafile=azure.lab.ca_file)
    url = f"{azure.lab.base_url}/subscriptions/{azure.lab.subscription}/resourcegroups?api-version=2025-04-01"
    async with aiohttp.ClientSession() as session, session.get(url, ssl=context, headers=headers) as answer:
        return answer.status, await answer.json()


async def test_a_token_expires_and_the_server_says_so(azure) -> None:
    await azure.resources.resource_groups.get("farshore-dr")
    await azure.ctl(azure.control.expire_tokens)
    with azure.refused("ExpiredAuthenticationToken", 401):
        await azure.resources.resource_groups.get("farshore-dr")
    async with (
        azure.new_credential() as fresh,
        ResourceManagementClient(fresh, azure.lab.subscription, **azure.options) as client,
    ):
        await client.resource_groups.get("farshore-dr")


async def test_a_tokens_lifetime_is_a_knob(azure) -> None:
    await azure.ctl(azure.control.turn, token_seconds=1)
    async with azure.new_credential() as credential:
        token = (await credential.get_token("https://management.azure.com/.default")).token
    await asyncio.sleep(1.1)  # the lifetime itself; there is no condition to wait for
    status, body = await _get(azure, {"Authorization": f"Bearer {token}"})
    assert (status, body["error"]["code"]) == (401, "ExpiredAuthenticationToken")


async def test_a_storage_token_does_not_open_arm_but_opens_the_blobs(azure) -> None:
    async with azure.new_credential() as credential:
        token = (await credential.get_token("https://storage.azure.com/.default")).token
        status, body = await _get(azure, {"Authorization": f"Bearer {token}"})
        assert (status, body["error"]["code"]) == (401, "InvalidAuthenticationTokenAudience")
        async with BlobServiceClient(
            azure.lab.describe()["blob"], credential=credential, connection_verify=azure.lab.ca_file
        ) as blobs:
            await blobs.create_container("by-token")


async def test_another_subscription_is_not_found(azure) -> None:
    async with ResourceManagementClient(
        azure.credential, "33333333-3333-3333-3333-333333333333", **azure.options
    ) as client:
        with pytest.raises(HttpResponseError) as caught:
            await client.resource_groups.get("farshore-dr")
    assert caught.value.error.code == "SubscriptionNotFound"
