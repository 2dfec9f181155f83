"""The laboratory vCenter: real SOAP over TLS on pyVmomi's types, disks with real bytes, change tracking, `/folder`.

In this process: `LabVCenter(root)`; as its own: `python -m farshore.lab.vcenter --root DIR`. Tests steer it with
`VCenterControl`. It may import SDK types and the standard library, never the product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from farshore.lab.vcenter.config import DEFAULT_PASSWORD, DEFAULT_USER
from farshore.lab.vcenter.control import ControlError, VCenterControl

if TYPE_CHECKING:
    from farshore.lab.vcenter.service import LabVCenter

__all__ = ["DEFAULT_PASSWORD", "DEFAULT_USER", "ControlError", "LabVCenter", "VCenterControl"]


def __getattr__(name: str) -> Any:
    """Load the service (and pyVmomi with it) only when it is asked for."""
    if name == "LabVCenter":
        from farshore.lab.vcenter.service import LabVCenter

        return LabVCenter
    raise AttributeError(name)
