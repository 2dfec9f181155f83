"""Adapters of this worker's sites, made when first needed. The only place that knows which class serves a provider;
each SDK is imported only if a site needs it.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farshore.domain.errors import Code, FarshoreError
from farshore.providers.ports import SourceSite, TargetSite
from farshore.workers.settings import (
    AzureSite,
    PhysicalSite,
    Settings,
    Site,
    VSphereSite,
    cache_folder,
    key,
    secret,
)

if TYPE_CHECKING:
    from farshore.providers.azure.settings import AzureSettings
    from farshore.replication.ports import ReplicaStore


class ConfiguredSites:
    """Fills `activities.sites.Sites` from the settings. Thread-safe."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._made: dict[str, Any] = {}
        self._lock = threading.Lock()

    def source(self, site: str) -> SourceSite:
        """The adapter of a source site."""
        found = self._site(site)
        if isinstance(found, AzureSite):
            raise self._unknown(site, "source")
        with self._lock:
            if site not in self._made:
                self._made[site] = (
                    _physical(found) if isinstance(found, PhysicalSite) else _vsphere(site, found)
                )
            return self._made[site]

    def target(self, site: str) -> TargetSite:
        """The adapter of a target site."""
        found = self._site(site)
        if not isinstance(found, AzureSite):
            raise self._unknown(site, "target")
        with self._lock:
            if site not in self._made:
                self._made[site] = _azure(site, found, cache_folder(self._settings))
            return self._made[site]

    def open_store(self, site: str) -> ReplicaStore:
        """The replicas of a target."""
        found = self._site(site)
        if not isinstance(found, AzureSite):
            raise self._unknown(site, "target")
        from farshore.providers.azure.pageblobs import AzureReplicaStore

        return AzureReplicaStore(_azure_settings(site, found, cache_folder(self._settings)))

    async def close(self) -> None:
        """End the sessions of all sites."""
        for site in list(self._made.values()):
            await site.close()

    def _site(self, site: str) -> Site:
        found = self._settings.sites.get(site)
        if found is None:
            raise self._unknown(site, "source or target")
        return found

    def _unknown(self, site: str, role: str) -> FarshoreError:
        return FarshoreError(Code.SITE_UNKNOWN, f"{site!r} is not a {role} of this worker.", subject=site)


def _vsphere(name: str, site: VSphereSite) -> SourceSite:
    from farshore.providers.vsphere.adapter import VSphereSite as Adapter
    from farshore.providers.vsphere.settings import VSphereSettings

    return Adapter(
        VSphereSettings(
            host=site.host,
            port=site.port,
            user=site.user,
            password=secret(site.password, f"sites.{name}.password"),
            ca_file=site.ca_file,
            thumbprint=site.thumbprint,
            datacenter=site.datacenter,
            encode_twice=site.encode_twice,
            max_connections=site.max_connections,
        )
    )


def _physical(site: PhysicalSite) -> SourceSite:
    from farshore.providers.physical.adapter import PhysicalSite as Adapter
    from farshore.providers.physical.settings import PhysicalSettings

    return Adapter(
        {
            name: PhysicalSettings(
                host=server.host,
                port=server.port,
                ca_file=site.ca_file,
                certificate_file=site.certificate_file,
                key_file=site.key_file,
                seed_folder=site.seed_folder,
            )
            for name, server in site.servers.items()
        }
    )


def _azure(name: str, site: AzureSite, cache: Path) -> TargetSite:
    from farshore.providers.azure.adapter import AzureSite as Adapter

    return Adapter(_azure_settings(name, site, cache))


def _azure_settings(name: str, site: AzureSite, cache: Path) -> AzureSettings:
    from farshore.providers.azure.settings import AzureSettings

    return AzureSettings(
        tenant=site.tenant,
        client_id=site.client_id,
        client_secret=secret(site.client_secret, f"sites.{name}.client_secret"),
        subscription=site.subscription,
        resource_group=site.resource_group,
        location=site.location,
        base_url=site.base_url,
        authority=site.authority,
        ca_file=site.ca_file,
        storage_account_id=site.storage_account_id,
        blob_endpoint=site.blob_endpoint,
        storage_account=site.storage_account,
        storage_key=secret(site.storage_key, f"sites.{name}.storage_key"),
        encryption_key=key(site.encryption_key, f"sites.{name}.encryption_key")
        if site.encryption_key
        else None,
        container=site.container,
        cache=cache / name,
        polling_interval=site.polling_interval,
    )
