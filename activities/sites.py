"""Where activities find their adapters. The composition root fills it; activities never know what is behind."""

from __future__ import annotations

from typing import Protocol

from farshore.providers.ports import SourceSite, TargetSite


class Sites(Protocol):
    """The sites this worker can reach."""

    def source(self, site: str) -> SourceSite:
        """SiteUnknown when this worker has no such source."""
        ...

    def target(self, site: str) -> TargetSite:
        """SiteUnknown when this worker has no such target."""
        ...
