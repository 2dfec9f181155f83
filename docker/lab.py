"""Two small errands of the `lab` profile of docker-compose.yml. They use the laboratory, never the product.

python lab.py inventory FILE          the demo's machines, as the laboratory vCenter reads them at its first start
python lab.py secrets URL FOLDER      what the laboratory Azure made up, as files that the settings refer to
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from farshore.lab.azure.control import AzureControl
from farshore.lab.demo.application import MACHINES
from farshore.lab.vcenter import DEFAULT_PASSWORD

SECRETS = {"azure_client_secret": "client_secret", "azure_storage_key": "account_key"}


def inventory(file: Path) -> None:
    """Write the inventory once; what the laboratory has made of it since stays."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"vms": list(MACHINES)}), encoding="utf-8")


def secrets(url: str, folder: Path) -> None:
    """Ask the laboratory Azure, whose control API is at `url`, and write one file a secret."""
    described = AzureControl(url).describe()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    values = {name: str(described[key]) for name, key in SECRETS.items()} | {
        "vcenter_password": DEFAULT_PASSWORD
    }
    for name, value in values.items():
        (folder / name).touch(mode=0o600)
        (folder / name).write_text(value, encoding="utf-8")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["inventory", file]:
            inventory(Path(file))
        case ["secrets", url, folder]:
            secrets(url, Path(folder))
        case _:
            sys.exit(__doc__)
