"""Where activities find their adapters. The composition root fills it; activities never know what is behind."""

from __future__ import annotations

from typing import Protocol

from farshore.providers.ports import SourceSite, TargetSite
from farshore.replication.ports import ReplicaStore


class Sites(Protocol):
    """The sites this worker can reach."""

    def source(self, site: str) -> SourceSite:
        """SiteUnknown when this worker has no such source."""
        ...

    def target(self, site: str) -> TargetSite:
        """SiteUnknown when this worker has no such target."""
        ...

    def open_store(self, site: str) -> ReplicaStore:
        """Only the replicas of a target, for who writes them: the whole adapter costs a source's worker a third of its
        memory. The caller closes it. SiteUnknown."""
        ...
