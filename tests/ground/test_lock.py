"""The lock: everything is pinned, everything has hashes, nothing tells where it came from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


@pytest.fixture(scope="module")
def locked(root: Path) -> dict[str, tuple[Requirement, list[str]]]:
    """Name → the pinned requirement and its hashes."""
    text = (root / "requirements.lock").read_text().replace("\\\n", " ")
    entries: dict[str, tuple[Requirement, list[str]]] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        spec, *hashes = re.split(r"\s+--hash=", line)
        requirement = Requirement(spec)
        entries[canonicalize_name(requirement.name)] = (requirement, [h.strip() for h in hashes])
    return entries


def test_every_requirement_is_pinned_and_hashed(locked: dict[str, tuple[Requirement, list[str]]]) -> None:
    assert len(locked) > 50
    for name, (requirement, hashes) in locked.items():
        assert [s.operator for s in requirement.specifier] == ["=="], name
        assert requirement.url is None, name
        assert hashes, name
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", h) for h in hashes), name


def test_the_lock_names_no_index_and_no_address(root: Path) -> None:
    text = (root / "requirements.lock").read_text()
    assert "://" not in text
    assert not re.search(
        r"^\s*(-i|-f|--index-url|--extra-index-url|--find-links|--trusted-host)\b", text, re.MULTILINE
    )


def test_the_lock_satisfies_the_project(
    locked: dict[str, tuple[Requirement, list[str]]], pyproject: dict[str, Any]
) -> None:
    project = pyproject["project"]
    declared = [*project["dependencies"], *pyproject["build-system"]["requires"]]
    for extra in project["optional-dependencies"].values():
        declared += extra
    for text in declared:
        wanted = Requirement(text)
        assert canonicalize_name(wanted.name) in locked, f"{text}: run `make lock`"
        (pin,) = locked[canonicalize_name(wanted.name)][0].specifier
        assert wanted.specifier.contains(Version(pin.version)), f"{text}: run `make lock`"
