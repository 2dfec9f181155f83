"""Managed disks from recovery points: copy the frozen replica, write the journal since onto the copy, import it, delete it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from azure.core.polling import AsyncLROPoller
from azure.mgmt.compute import models as cm

from farshore.domain.errors import Code, FarshoreError
from farshore.providers.azure import names
from farshore.providers.azure.client import AzureClients
from farshore.providers.azure.ensure import Ensurer, Wanted, tags_of
from farshore.providers.azure.staging import Staging
from farshore.providers.ports import Checkpoint, DiskRequest, Owner, Resource, TargetSpec

SnapshotUrl = Callable[[str], str]
"""The URL of a frozen replica, from its handle in the manifest."""


class Disks:
    """Everything of Microsoft.Compute/disks that Farshore makes."""

    def __init__(
        self, clients: AzureClients, ensure: Ensurer, staging: Staging, snapshot_url: SnapshotUrl
    ) -> None:
        self._clients = clients
        self._settings = clients.settings
        self._ensure = ensure
        self._staging = staging
        self._snapshot_url = snapshot_url

    async def create(
        self,
        owner: Owner,
        spec: TargetSpec,
        request: DiskRequest,
        *,
        resume: Mapping[str, Any],
        checkpoint: Checkpoint,
    ) -> Resource:
        """The disk of one recovery point. Raises PointExpired, NameTaken, TargetOperationFailed and what Azure says."""
        name = names.disk(owner, request.index)
        rg, client = self._settings.resource_group, self._clients
        tags = {**names.tags(owner, spec.tags), names.POINT: names.tag_value(request.point)}

        async def make(token: str | None) -> AsyncLROPoller[cm.Disk]:
            if token is not None:
                # Going on with an operation sends no body; the SDK wants one all the same.
                return await client.compute.disks.begin_create_or_update(
                    rg, name, cm.Disk(location=self._settings.location), continuation_token=token
                )
            body = self._body(spec, request, await self._source(owner, request, checkpoint), tags)
            return await client.compute.disks.begin_create_or_update(rg, name, body)

        def stale(found: cm.Disk) -> str:
            held = names.read_tag(tags_of(found), names.POINT)
            if held == tags[names.POINT]:
                return ""
            if found.managed_by:
                raise FarshoreError(
                    Code.NAME_TAKEN,
                    f"Disk {name} holds point {held or 'unknown'}, not {request.point}, and a machine uses it already.",
                    subject=spec.machine,
                    action="Remove the machine, then run again with the other point.",
                )
            return f"it holds point {held or 'unknown'}"

        wanted = Wanted[cm.Disk](
            what=f"disk {name}",
            id=self._id(name),
            read=lambda: client.compute.disks.get(rg, name),
            make=make,
            delete=lambda: client.compute.disks.begin_delete(rg, name),
            owner=owner,
            step=f"disk{request.index}",
            stale=stale,
        )
        made = await self._ensure(wanted, resume=resume, checkpoint=checkpoint)
        if self._settings.copy_before_import or request.journal is not None:
            await self._staging.remove(names.staging_blob(owner, request.index))
        return Resource(id=made.id or wanted.id, kind="disk", name=name)

    async def _source(self, owner: Owner, request: DiskRequest, checkpoint: Checkpoint) -> str:
        url = self._snapshot_url(request.snapshot) if request.snapshot else ""
        if request.journal is not None:
            return await self._staging.restore(
                owner,
                request.index,
                point=request.point,
                source_url=url,
                journal=request.journal,
                checkpoint=checkpoint,
            )
        if not self._settings.copy_before_import:
            return url
        return await self._staging.copy(
            owner, request.index, point=request.point, source_url=url, checkpoint=checkpoint
        )

    def _body(self, spec: TargetSpec, request: DiskRequest, source: str, tags: Mapping[str, str]) -> cm.Disk:
        properties = cm.DiskProperties(
            creation_data=cm.CreationData(
                create_option="Import",
                source_uri=source,
                storage_account_id=self._settings.storage_account_id,
            ),
            network_access_policy="DenyAll",
            public_network_access="Disabled",
        )
        if request.index == 0:
            properties.os_type = "Windows" if spec.os == "windows" else "Linux"
            properties.hyper_v_generation = "V2" if spec.firmware == "efi" else "V1"
        body = cm.Disk(
            location=self._settings.location,
            tags=dict(tags),
            sku=cm.DiskSku(name=self._settings.disk_sku),
            properties=properties,
        )
        if spec.zone:
            body.zones = [spec.zone]
        return body

    def _id(self, name: str) -> str:
        s = self._settings
        return f"/subscriptions/{s.subscription}/resourceGroups/{s.resource_group}/providers/Microsoft.Compute/disks/{name}"
