"""Connecting to Temporal: converter, TLS, metrics, search attributes."""

from __future__ import annotations

from pathlib import Path

from temporalio.api.enums.v1 import IndexedValueType
from temporalio.api.operatorservice.v1 import AddSearchAttributesRequest, ListSearchAttributesRequest
from temporalio.client import Client
from temporalio.runtime import PrometheusConfig, Runtime, TelemetryConfig
from temporalio.service import TLSConfig

from farshore.contract import names
from farshore.contract.converter import data_converter
from farshore.domain.errors import Code, FarshoreError
from farshore.workers.settings import Settings, TemporalSettings, secret


def runtime(metrics: str | None) -> Runtime | None:
    """A runtime that serves Prometheus metrics at `metrics` (host:port), or None for the default one."""
    if metrics is None:
        return None
    return Runtime(telemetry=TelemetryConfig(metrics=PrometheusConfig(bind_address=metrics)))


async def connect(settings: TemporalSettings, *, use: Runtime | None = None) -> Client:
    """A client with our converter. TemporalUnreachable tells the address."""
    tls: TLSConfig | bool = False
    if settings.tls_ca_file is not None:
        tls = TLSConfig(server_root_ca_cert=Path(settings.tls_ca_file).read_bytes())
    try:
        return await Client.connect(
            settings.address,
            namespace=settings.namespace,
            data_converter=data_converter,
            tls=tls,
            api_key=secret(settings.api_key, "temporal.api_key") if settings.api_key else None,
            runtime=use,
        )
    except RuntimeError as error:  # what the SDK raises when it can't connect
        raise FarshoreError(
            Code.TEMPORAL_UNREACHABLE, f"Temporal does not answer at {settings.address}: {error}."[:300]
        ) from None


async def ensure_search_attributes(client: Client) -> list[str]:
    """Add what is missing; returns the names added. An unknown attribute would make workflows hang."""
    there = await client.operator_service.list_search_attributes(
        ListSearchAttributesRequest(namespace=client.namespace)
    )
    missing = [key.name for key in names.SEARCH_ATTRIBUTES if key.name not in there.custom_attributes]
    if missing:
        await client.operator_service.add_search_attributes(
            AddSearchAttributesRequest(
                namespace=client.namespace,
                search_attributes=dict.fromkeys(missing, IndexedValueType.INDEXED_VALUE_TYPE_KEYWORD),
            )
        )
    return missing


async def connect_with(settings: Settings) -> Client:
    """As `connect`, with the metrics of the worker's settings."""
    return await connect(settings.temporal, use=runtime(settings.worker.metrics))
