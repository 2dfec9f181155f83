"""What is installed: every package is listed, and the wheel holds `farshore` and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest


def test_every_folder_with_an_init_is_a_listed_package(
    root: Path, files: list[Path], pyproject: dict[str, Any], rooms: dict[str, str]
) -> None:
    found = {
        "farshore." + ".".join(path.parent.relative_to(root).parts)
        for path in files
        if path.name == "__init__.py" and path.relative_to(root).parts[0] in rooms.values()
    }
    listed = set(pyproject["tool"]["setuptools"]["packages"])
    assert found - listed == set(), "add these to [tool.setuptools] packages in pyproject.toml"
    assert listed - found == set(), "these packages of pyproject.toml are not there"


def test_every_module_lies_in_a_package(root: Path, files: list[Path], rooms: dict[str, str]) -> None:
    stray = [
        path.relative_to(root)
        for path in files
        if path.suffix == ".py"
        and path.relative_to(root).parts[0] in rooms.values()
        and not (path.parent / "__init__.py").exists()
    ]
    assert stray == [], "their folders have no __init__.py, so the wheel would lack them"


def test_tools_that_list_the_rooms_list_the_same_ones(
    root: Path, pyproject: dict[str, Any], rooms: dict[str, str]
) -> None:
    folders = list(rooms.values())
    assert rooms == {f"farshore.{folder}": folder for folder in folders}
    assert [Path(p).name for p in pyproject["tool"]["pyright"]["include"]] == folders
    assert f"ROOMS := {' '.join(folders)}\n" in (root / "Makefile").read_text()
    assert not (root / "__init__.py").exists(), "farshore is a namespace package"


@pytest.fixture(scope="module")
def wheel(root: Path, files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, since setuptools leaves a build folder in the tree, and without any package index."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in files:
        target = source / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    built = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-index",
            "--no-build-isolation",
            "-w",
            str(out),
            ".",
        ],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (file,) = out.glob("*.whl")
    return zipfile.ZipFile(file)


def test_the_wheels_only_top_level_is_farshore(wheel: zipfile.ZipFile, pyproject: dict[str, Any]) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"farshore", f"farshore-{pyproject['project']['version']}.dist-info"}
    assert "farshore/__init__.py" not in wheel.namelist()


def test_the_wheel_holds_every_module_and_every_data_file_of_the_rooms(
    wheel: zipfile.ZipFile, root: Path, files: list[Path], rooms: dict[str, str]
) -> None:
    prose = {".md"}  # formats are documented beside their code, for readers of the source
    wanted = {
        f"farshore/{path.relative_to(root).as_posix()}"
        for path in files
        if path.relative_to(root).parts[0] in rooms.values() and path.suffix not in prose
    }
    missing = wanted - set(wheel.namelist())
    assert missing == set(), "add their pattern to [tool.setuptools.package-data] in pyproject.toml"


def test_the_wheel_is_typed_and_brings_the_example_plans(
    wheel: zipfile.ZipFile, root: Path, rooms: dict[str, str]
) -> None:
    names = set(wheel.namelist())
    assert {f"farshore/{folder}/py.typed" for folder in rooms.values()} <= names
    examples = {f"farshore/{p.relative_to(root)}" for p in (root / "plans" / "examples").rglob("*.y*ml")}
    assert examples, "plans/examples holds no plan"
    assert examples <= names


def test_the_wheel_offers_the_commands_and_the_licence(wheel: zipfile.ZipFile) -> None:
    (points,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    text = wheel.read(points).decode()
    assert "farshore = " in text
    assert "temporal-farshore = " in text
    assert any(name.endswith("/licenses/LICENSE") for name in wheel.namelist())
