"""`AzureSite`: an Azure subscription as a place where machines are brought up."""

from __future__ import annotations

from farshore.providers.azure.settings import AzureSettings


class AzureSite:
    def __init__(self, settings: AzureSettings) -> None:
        self.settings = settings
