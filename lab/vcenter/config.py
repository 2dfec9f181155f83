"""The inventory a laboratory starts with, from a JSON or YAML file or a dictionary.

    {"credentials": {"administrator@lab.local": "…"},
     "datacenters": [{"name": "DC0", "folder": "Europe", "datastores": [{"name": "ds1", "kind": "vmfs"}],
                      "networks": ["VM Network"], "clusters": [{"name": "C0", "hosts": ["esx1.lab.local"]}]}],
     "settings": {"idle_timeout": 1800},
     "vms": [{"name": "web", "disks": [{"size": 67108864}], "networks": ["VM Network"], "power": "poweredOn",
              "workload": {"records_per_second": 20, "churn_bytes_per_second": 1048576}}]}

Only `credentials` and `vms` are commonly given; it is read at the first start on a root and ignored afterwards.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

DEFAULT_USER = "administrator@lab.local"
DEFAULT_PASSWORD = "Farshore-lab-1"
DEFAULT: dict[str, Any] = {
    "datacenters": [
        {
            "name": "DC0",
            "folder": "",
            "datastores": [{"name": "ds1"}, {"name": "ds2"}],
            "networks": ["VM Network", "Backend"],
            "clusters": [{"name": "C0", "hosts": ["esx1.lab.local", "esx2.lab.local"]}],
        }
    ],
    "credentials": {DEFAULT_USER: DEFAULT_PASSWORD},
    "settings": {},
    "vms": [],
}


def load(source: Path | dict[str, Any] | None) -> dict[str, Any]:
    """The configuration with defaults filled in. Raises `ValueError` for an unknown key."""
    given: dict[str, Any]
    if isinstance(source, Path):
        text = source.read_text()
        if source.suffix in (".yaml", ".yml"):
            from ruamel.yaml import YAML

            given = json.loads(json.dumps(YAML(typ="safe").load(text)))
        else:
            given = json.loads(text)
    else:
        given = copy.deepcopy(source or {})
    unknown = set(given) - set(DEFAULT)
    if unknown:
        raise ValueError(f"unknown keys in the configuration: {', '.join(sorted(unknown))}")
    return {**copy.deepcopy(DEFAULT), **given}
