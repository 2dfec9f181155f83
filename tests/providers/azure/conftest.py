"""A laboratory Azure for the whole session, and a fresh `AzureSite` with its own names for every test."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator

import pytest
from azure.core.credentials import AzureNamedKeyCredential
from azure.storage.blob import BlobServiceClient

from farshore.lab.azure.control import AzureControl
from farshore.lab.azure.lab import LabAzureThread
from farshore.lab.azure.whole import LabAzureWhole
from farshore.providers.azure.adapter import AzureSite
from farshore.providers.azure.settings import AzureSettings

from .bench import Azure, World


@pytest.fixture(scope="session")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azure]:
    lab = LabAzureWhole(tmp_path_factory.mktemp("azure"))
    with LabAzureThread(lab):
        about = lab.describe()
        settings = AzureSettings(
            tenant=about["tenant"],
            client_id=about["client_id"],
            client_secret=about["client_secret"],
            subscription=about["subscription"],
            resource_group=about["resource_group"],
            location=about["location"],
            base_url=about["arm"],
            authority=about["arm"],
            ca_file=about["ca"],
            storage_account_id=about["storage_account_id"],
            blob_endpoint=about["blob"],
            storage_account=about["account"],
            storage_key=about["account_key"],
            polling_interval=0.02,
            checkpoint_interval=0.05,
            removal_patience=5,
        )
        service = BlobServiceClient(
            settings.blob_endpoint,
            credential=AzureNamedKeyCredential(settings.storage_account, settings.storage_key),
            connection_verify=settings.ca_file,
        )
        container = service.create_container(settings.container)
        try:
            yield Azure(lab, AzureControl(lab.control_url), settings, container)
        finally:
            container.close()
            service.close()


@pytest.fixture
def cloud(azure: Azure) -> Azure:
    """The laboratory without faults."""
    azure.reset()
    return azure


@pytest.fixture
async def site(cloud: Azure) -> AsyncIterator[AzureSite]:
    made = AzureSite(cloud.settings, snapshot_url=lambda handle: handle)
    yield made
    await made.close()


@pytest.fixture
def world(cloud: Azure) -> World:
    tag = uuid.uuid4().hex[:8]
    return World(cloud, tag)
