"""What the Azure provider needs to know, resolved: no references to secrets any more, only their values.

Built by the composition root from the workers' settings; never serialised, never part of an error or a log.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class AzureSettings:
    """One Azure target: identity, place, and the storage account that keeps the replicas.

    `base_url` and `authority` point elsewhere for sovereign clouds (and for anything else that speaks ARM);
    `authority` None means the public login endpoint. `ca_file` is a PEM bundle, None means the system's. Durations are
    seconds. Secrets are excluded from `repr`.
    """

    tenant: str
    client_id: str
    client_secret: str = field(repr=False)
    subscription: str
    resource_group: str
    location: str
    storage_account_id: str  # ARM id of the account that holds the replicas
    blob_endpoint: str  # e.g. https://ACCOUNT.blob.core.windows.net
    storage_account: str
    storage_key: str = field(repr=False)
    encryption_key: bytes | None = field(
        default=None, repr=False
    )  # 32 bytes that wrap the replicas' data keys
    base_url: str = "https://management.azure.com"
    authority: str | None = None
    credential_scope: str = "https://management.azure.com/.default"
    ca_file: str | None = None
    container: str = "farshore"
    cache: Path | None = None  # folder for leaf tables; None: computed anew by every writer
    polling_interval: float = 5.0  # between polls of an operation where Azure gives no Retry-After
    checkpoint_interval: float = 3.0  # longest silence towards the caller's checkpoint while a step waits
    visibility_grace: float = 300.0  # after our own create, a 404 within this time is lag, not drift
    copy_before_import: bool = (
        True  # False: import the blob snapshot's own address (unconfirmed on real Azure)
    )
    disk_sku: str = "StandardSSD_LRS"
    network_parallel: int = (
        8  # interfaces of one virtual network written at a time; 1 where Azure bears no more
    )
    removal_patience: float = (
        240.0  # how long a clean-up waits for what is busy, e.g. an interface that stays reserved
    )
    removal_parallel: int = 8  # deletions at a time inside one kind of resource
