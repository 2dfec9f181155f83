"""Who may import whom: the arrow table of the house, enforced by import-linter, and the enforcement itself checked."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOMS = (
    "domain",
    "plans",
    "contract",
    "replication",
    "providers",
    "activities",
    "workflows",
    "workers",
    "lab",
)
PRODUCT = tuple(room for room in ROOMS if room != "lab")

# A room → what it may import of ours. "room.module" allows that module only.
ARROWS: dict[str, set[str]] = {
    "domain": set(),
    "plans": {"domain"},
    "contract": {"plans", "domain"},
    "replication": {"domain"},
    "providers": {"domain", "replication.ports", "replication.backend", "replication.engine"},
    "activities": {"providers.ports", "replication", "plans", "contract", "domain"},
    "workflows": {"activities", "plans", "contract", "domain"},
    "workers": set(PRODUCT) - {"workers"},
    "lab": set(),
}


def lint(
    root: Path, *, cwd: Path | None = None, path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    return subprocess.run(
        [
            str(Path(sys.executable).parent / "lint-imports"),
            "--no-cache",
            "--config",
            str(root / ".importlinter"),
        ],
        cwd=cwd or root,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


def verdicts(output: str) -> dict[str, str]:
    """Contract name → KEPT or BROKEN."""
    found = re.findall(r"^(.+?) (KEPT|BROKEN)\b", re.sub(r"\x1b\[[0-9;]*m", "", output), re.MULTILINE)
    return {name.strip(): verdict for name, verdict in found}


@pytest.fixture(scope="module")
def contracts(root: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(root / ".importlinter")
    return parser


def lines(value: str) -> set[str]:
    return {line.strip() for line in value.splitlines() if line.strip()}


def test_every_import_in_the_repository_follows_the_arrow_table(root: Path) -> None:
    result = lint(root)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_contracts_are_exactly_the_arrow_table(contracts: configparser.ConfigParser) -> None:
    for room, allowed in ARROWS.items():
        section = contracts[f"importlinter:contract:{room}"]
        whole = {name for name in allowed if "." not in name}
        parts = {name for name in allowed if "." in name}
        forbidden = {f"farshore.{other}" for other in ROOMS if other != room and other not in whole}
        assert lines(section["source_modules"]) == {f"farshore.{room}"}
        assert lines(section["forbidden_modules"]) == forbidden, room
        assert lines(section.get("ignore_imports", "")) == {
            f"farshore.{room}.** -> farshore.{p}" for p in parts
        }, room


def test_every_room_is_linted(contracts: configparser.ConfigParser, rooms: dict[str, str]) -> None:
    assert (
        lines(contracts["importlinter"]["root_packages"])
        == set(rooms)
        == {f"farshore.{room}" for room in ROOMS}
    )


def test_every_provider_is_kept_from_its_siblings_and_has_an_extra(
    contracts: configparser.ConfigParser, root: Path, pyproject: dict[str, Any]
) -> None:
    providers = {folder.parent.name for folder in (root / "providers").glob("*/__init__.py")}
    assert lines(contracts["importlinter:contract:siblings"]["modules"]) == {
        f"farshore.providers.{p}" for p in providers
    }
    assert providers <= set(pyproject["project"]["optional-dependencies"])


MUTANTS = {
    ("domain", "from farshore.plans import model"): "domain imports nothing of ours",
    ("plans", "import farshore.contract"): "plans import domain",
    ("contract", "import farshore.activities"): "contract imports plans, domain",
    ("replication", "import farshore.providers"): "replication imports domain",
    (
        "providers/azure",
        "import farshore.replication.loop",
    ): "providers import domain and what replication lets a store fill: ports, backend, engine",
    ("providers/vsphere", "import farshore.providers.azure"): "a provider does not know its siblings",
    ("activities", "from farshore.providers.azure import client"): (
        "activities import providers.ports, replication, plans, contract, domain"
    ),
    (
        "workflows",
        "from farshore.replication import ports",
    ): "workflows import activities, plans, contract, domain",
    ("workers", "import farshore.lab"): "workers import everything of the product",
    ("lab", "import farshore.domain"): "lab never imports the product",
    (
        "lab/vcenter",
        "import temporalio",
    ): "Temporal is known only to contract, activities, workflows and workers",
    ("workers/cli", "from azure.identity import DefaultAzureCredential"): (
        "the Azure SDKs stay in providers.azure (and the laboratory)"
    ),
    ("workers/cli", "import pyVmomi"): "pyVmomi stays in providers.vsphere (and the laboratory)",
    ("activities", "import requests"): "what a workflow loads reaches no SDK, not even through another room",
}


def skeleton(at: Path) -> Path:
    """Rooms with nothing but the modules that the contracts name."""
    modules = [
        "plans/model",
        "providers/ports",
        "replication/ports",
        "replication/engine",
        "providers/azure/client",
    ]
    folders = [
        *ROOMS,
        "providers/azure",
        "providers/nbd",
        "providers/physical",
        "providers/vsphere",
        "workers/cli",
        "lab/vcenter",
    ]
    for folder in folders:
        (at / "farshore" / folder).mkdir(parents=True, exist_ok=True)
        (at / "farshore" / folder / "__init__.py").write_text("")
    for module in modules:
        (at / "farshore" / f"{module}.py").write_text("")
    (at / "farshore/activities/ok.py").write_text("from farshore.providers import ports\n")
    (at / "farshore/providers/azure/ok.py").write_text(
        "import farshore.replication.ports\nimport azure.identity\n"
    )
    return at


def test_an_import_against_the_table_is_found_by_the_contract_that_forbids_it(
    root: Path, tmp_path: Path
) -> None:
    clean = lint(root, cwd=skeleton(tmp_path / "clean"), path=tmp_path / "clean")
    assert clean.returncode == 0, clean.stdout + clean.stderr

    # All wrong imports at once, each in a module of its own: every contract must break, none is vacuous.
    broken = skeleton(tmp_path / "broken")
    for number, (room, statement) in enumerate(MUTANTS):
        (broken / "farshore" / room / f"wrong_{number}.py").write_text(statement + "\n")
    result = lint(root, cwd=broken, path=broken)
    assert result.returncode == 1, result.stdout + result.stderr
    told = verdicts(result.stdout)
    assert {name for name, verdict in told.items() if verdict == "BROKEN"} >= set(MUTANTS.values())
    assert set(told) == set(MUTANTS.values()), "every contract has a mutant"
    for number, (room, _) in enumerate(MUTANTS):
        module = f"farshore.{room.replace('/', '.')}.wrong_{number}"
        assert module in result.stdout, f"{module} is not reported"
