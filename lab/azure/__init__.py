"""Laboratory Azure: Entra's token endpoint and Azure Resource Manager over TLS, with real disk bytes.

The room is for: everything Farshore asks of Azure's management plane, spoken so that the unchanged azure-identity and
azure-mgmt clients cannot tell the difference. It may touch: the SDK's generated code (to derive the contract), the
standard library, aiohttp, cryptography and the sister page-blob server in `farshore.lab.blob`. It never imports the product.

Nothing here was compared with real Azure; it follows the SDK's contract and published documents (docs: azure reference).
"""

from farshore.lab.azure.control import AzureControl
from farshore.lab.azure.lab import LabAzure, LabAzureThread
from farshore.lab.azure.whole import LabAzureWhole

__all__ = ["AzureControl", "LabAzure", "LabAzureThread", "LabAzureWhole"]
