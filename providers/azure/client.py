"""The SDK's asynchronous clients, made when first needed and closed together, on one pool of connections.

SDK-level retries are off (`retry_total=0`): Temporal owns them, and the SDK would repeat even POSTs that answered
with Retry-After. A token is renewed by the SDK before it ends; one that Azure refuses early is dropped by `renew`.

The pool is ours because the SDK's own transport builds a TLS context for every request when it is given a CA file, and so
never uses a connection twice. Below it aiohttp may send a GET, PUT or DELETE once more when a kept connection turns out to
be closed: every PUT here bears that.
"""

from __future__ import annotations

import ssl
from typing import Any

import aiohttp
from azure.core.credentials import AzureNamedKeyCredential
from azure.core.pipeline.transport import AioHttpTransport
from azure.identity.aio import ClientSecretCredential
from azure.mgmt.compute.aio import ComputeManagementClient
from azure.mgmt.network.aio import NetworkManagementClient
from azure.storage.blob.aio import ContainerClient

from farshore.providers.azure.settings import AzureSettings

CONNECT_SECONDS = 10.0
READ_SECONDS = 60.0
CONNECTIONS = 64


class AzureClients:
    """One identity's clients. They belong to the event loop that first used them."""

    def __init__(self, settings: AzureSettings) -> None:
        self.settings = settings
        self._credential: ClientSecretCredential | None = None
        self._compute: ComputeManagementClient | None = None
        self._network: NetworkManagementClient | None = None
        self._container: ContainerClient | None = None
        self._retired: list[Any] = []
        self._session: aiohttp.ClientSession | None = None

    @property
    def compute(self) -> ComputeManagementClient:
        if self._compute is None:
            self._compute = ComputeManagementClient(
                self._identity(), self.settings.subscription, self.settings.base_url, **self._options()
            )
        return self._compute

    @property
    def network(self) -> NetworkManagementClient:
        if self._network is None:
            self._network = NetworkManagementClient(
                self._identity(), self.settings.subscription, self.settings.base_url, **self._options()
            )
        return self._network

    @property
    def container(self) -> ContainerClient:
        """The container of replicas, where staging blobs live too; authorised by the account's key."""
        if self._container is None:
            self._container = ContainerClient(
                self.settings.blob_endpoint,
                self.settings.container,
                credential=AzureNamedKeyCredential(self.settings.storage_account, self.settings.storage_key),
                **self._transport(),
            )
        return self._container

    def renew(self) -> None:
        """Forget identity and tokens; the next call signs in anew. Calls under way keep what they hold."""
        self._retired += [c for c in (self._compute, self._network, self._credential) if c is not None]
        self._compute = self._network = self._credential = None

    async def close(self) -> None:
        clients = [*self._retired, self._compute, self._network, self._container, self._credential]
        self._compute = self._network = self._container = self._credential = None
        self._retired = []
        for client in clients:
            if client is not None:
                await client.close()
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _identity(self) -> ClientSecretCredential:
        if self._credential is None:
            s = self.settings
            where: dict[str, Any] = {}
            if s.authority is not None:
                # Instance discovery would ask the public cloud about an authority it need not know.
                where = {"authority": s.authority, "disable_instance_discovery": True}
            self._credential = ClientSecretCredential(
                s.tenant, s.client_id, s.client_secret, **where, **self._transport()
            )
        return self._credential

    def _options(self) -> dict[str, Any]:
        return {
            "credential_scopes": [self.settings.credential_scope],
            "polling_interval": self.settings.polling_interval,
            **self._transport(),
        }

    def _transport(self) -> dict[str, Any]:
        """Needs a running event loop, like everything that calls it."""
        if self._session is None:
            context = ssl.create_default_context(cafile=self.settings.ca_file)
            # As the SDK's own session would be: proxies from the environment, no cookies, bodies left as they come.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=context, limit=CONNECTIONS),
                trust_env=True,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
            )
        transport = AioHttpTransport(
            session=self._session,
            session_owner=False,
            connection_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
        )
        return {"retry_total": 0, "transport": transport}
