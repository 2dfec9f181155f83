"""Settings of workers and command line: one TOML file, secrets by reference.

    [temporal]   address, namespace, tls_ca_file …
    [plans]      folder
    [sites.east]         provider = "vsphere", host, user, password = "file:/run/secrets/vcenter"
    [sites.hall]         provider = "physical", ca_file, certificate_file, key_file, servers.db1 = { host = "…" } …
    [sites.westeurope]   provider = "azure", tenant, client_id, client_secret = "env:AZURE_CLIENT_SECRET" …

A reference is `env:NAME` or `file:PATH`; a literal where a secret belongs is refused.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from farshore.contract import names
from farshore.contract.converter import explain
from farshore.domain.errors import Code, FarshoreError

SETTINGS_VARIABLE = "FARSHORE_SETTINGS"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TemporalSettings(_Part):
    address: str = "127.0.0.1:7233"
    namespace: str = "default"
    ui: str = Field(default="http://127.0.0.1:8233", description="where people find the web UI, for links")
    tls_ca_file: str | None = None
    api_key: str | None = Field(default=None, description="secret reference")


class PlanSettings(_Part):
    folder: Path


class Deployment(_Part):
    """Worker versioning: runs stay on the build that began them, protection loops move on to the current build."""

    build: str = Field(min_length=1, description="id of this build; workers of one build share it")
    activate: bool = Field(default=True, description="make this build the current one when its workers poll")


class RateFrom(_Part):
    """A rate from a time of day on."""

    at: str = Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d$", description="local time, HH:MM")
    mbytes: float = Field(gt=0, description="10^6 bytes a second")

    @property
    def minute(self) -> int:
        """Of the day."""
        hours, minutes = self.at.split(":")
        return int(hours) * 60 + int(minutes)


class WorkerTuning(_Part):
    """How a worker uses its machine. Seconds."""

    leg: float = Field(default=3600.0, gt=0, description="length of one replication activity")
    activities: int = Field(default=100, gt=0, le=400, description="steps at the same time")
    legs: int = Field(
        default=200, gt=0, le=600, description="machines replicated by this worker at the same time"
    )
    bandwidth: tuple[RateFrom, ...] = Field(
        default=(),
        description="most that this worker's legs send together, by time of day; none: no limit. The final cycle of a "
        "failover goes first, then changes, resyncs and first copies",
    )
    cache: Path | None = Field(
        default=None,
        description="folder for leaf tables (256 KiB per GiB of disk) and nothing that is needed; none: farshore in the "
        "user's cache folder",
    )
    base_every: float = Field(
        default=900.0,
        gt=0,
        description="between two frozen states of a replica: bounds what a restore replays",
    )
    scrub_days: float = Field(
        default=7.0, ge=0, description="all that is stored is read and verified once in this time; 0: never"
    )
    audit_days: float = Field(
        default=30.0,
        ge=0,
        description="all of a source disk is read once in this time, whatever its change tracking reports; 0: never",
    )
    heartbeat_throttle: float = Field(default=3.0, gt=0, description="longest delay of a heartbeat")
    graceful_shutdown: float = Field(default=10.0, ge=0)
    metrics: str | None = Field(default=None, description="host:port for Prometheus; none: no metrics")
    deployment: Deployment | None = Field(default=None, description="none: workers are not versioned")


class VSphereSite(_Part):
    provider: Literal["vsphere"]
    host: str
    port: int = 443
    user: str
    password: str = Field(description="secret reference")
    ca_file: str | None = None
    thumbprint: str | None = None
    datacenter: str | None = None
    encode_twice: bool = False
    max_connections: int = 4


class AzureSite(_Part):
    provider: Literal["azure"]
    tenant: str
    client_id: str
    client_secret: str = Field(description="secret reference")
    subscription: str
    resource_group: str
    location: str
    storage_account_id: str
    blob_endpoint: str
    storage_account: str
    storage_key: str = Field(description="secret reference")
    encryption_key: str | None = Field(
        default=None,
        description="secret reference: 64 hexadecimal digits that wrap the replicas' data keys. None: the data keys lie "
        "beside the data, which protects against damage and not against readers. Who loses it loses every replica",
    )
    base_url: str = "https://management.azure.com"
    authority: str | None = None
    ca_file: str | None = None
    container: str = "farshore"
    polling_interval: float = 5.0


class AgentAddress(_Part):
    host: str = Field(description="as in the agent's certificate")
    port: int = 7443


class PhysicalSite(_Part):
    """Servers with an agent. All show certificates of one authority; keys are files of their own."""

    provider: Literal["physical"]
    ca_file: str
    certificate_file: str
    key_file: str
    servers: dict[str, AgentAddress] = Field(min_length=1)
    seed_folder: Path | None = Field(
        default=None, description="room for first copies of disks without a snapshot device"
    )


Site = Annotated[VSphereSite | PhysicalSite | AzureSite, Field(discriminator="provider")]


class Settings(_Part):
    """Everything a worker or the command line needs to know."""

    temporal: TemporalSettings = TemporalSettings()
    plans: PlanSettings
    sites: dict[str, Site]
    worker: WorkerTuning = WorkerTuning()

    def queue(self, site: str, *, wanted: str) -> str:
        """The task queue of a site. SiteUnknown when the settings don't have it."""
        found = self.sites.get(site)
        if found is None:
            raise FarshoreError(
                Code.SITE_UNKNOWN,
                f"There is no site {site!r}; the settings have {', '.join(sorted(self.sites)) or 'none'}.",
                subject=site,
                details={"wanted_as": wanted},
            )
        return names.site_queue(site, found.provider)

    def source_queue(self, site: str) -> str:
        """Where steps on source machines run."""
        return self.queue(site, wanted="source")

    def target_queue(self, site: str) -> str:
        """Where steps at the target run."""
        return self.queue(site, wanted="target")


def load_settings(path: Path | None = None) -> Settings:
    """Read the settings file: `path`, else the variable FARSHORE_SETTINGS, else ./farshore.toml.

    Raises ConfigurationInvalid with the fields that are wrong.
    """
    chosen = path or Path(os.environ.get(SETTINGS_VARIABLE, "farshore.toml"))
    try:
        text = chosen.read_text(encoding="utf-8")
    except OSError as error:
        raise FarshoreError(
            Code.CONFIGURATION_INVALID,
            f"The settings file {chosen} can't be read: {error.strerror}.",
            action=f"Give its path with --settings or in {SETTINGS_VARIABLE}.",
        ) from None
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise FarshoreError(Code.CONFIGURATION_INVALID, f"{chosen} is not valid TOML: {error}.") from None
    try:
        settings = Settings.model_validate(data)
    except ValidationError as error:
        raise FarshoreError(Code.CONFIGURATION_INVALID, f"{chosen}: {explain(error)}.") from None
    folder = settings.plans.folder
    if not folder.is_absolute():
        plans = PlanSettings(folder=(chosen.parent / folder).resolve())
        settings = settings.model_copy(update={"plans": plans})
    return settings


def cache_folder(settings: Settings) -> Path:
    """Where this worker keeps what it can compute anew."""
    if settings.worker.cache is not None:
        return settings.worker.cache
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()) / "farshore"


def key(reference: str, what: str) -> bytes:
    """Resolve a reference to 32 bytes in hexadecimal. SecretUnavailable, also when it is something else."""
    text = secret(reference, what)
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if len(value) != 32:
        raise FarshoreError(
            Code.SECRET_UNAVAILABLE,
            f"The secret {what} is not a key: it must be 64 hexadecimal digits.",
            subject=what,
            action="Make one with: openssl rand -hex 32",
        )
    return value


def secret(reference: str, what: str) -> str:
    """Resolve `env:NAME` or `file:PATH`. SecretUnavailable tells which reference of which setting, never the value."""
    scheme, _, rest = reference.partition(":")
    if scheme == "env":
        value = os.environ.get(rest)
        if value:
            return value
        problem = f"the variable {rest} is not set"
    elif scheme == "file":
        try:
            return Path(rest).read_text(encoding="utf-8").strip()
        except OSError as error:
            problem = f"the file {rest} can't be read ({error.strerror})"
    else:
        problem = "it must be a reference such as env:NAME or file:PATH, not the secret itself"
    raise FarshoreError(
        Code.SECRET_UNAVAILABLE, f"The secret {what} is not available: {problem}.", subject=what
    )
