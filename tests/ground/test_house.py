"""Rules of the house that a reader could overlook."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

# Split, so that this file does not hold what it looks for.
MACHINE = [
    r"(?<![\w.])/wo" + r"rk/",
    r"(?<![\w.])/ro" + r"ot/",
    "/tmp/bash" + "_jobs",
    "/home" + r"/[a-z]",
    r"/Us" + r"ers/[a-z]",
]
REGISTRIES = [
    re.escape(".".join(host))
    for host in (
        ("pypi", "org"),
        ("files", "pythonhosted", "org"),
        ("registry", "npmjs", "org"),
        ("deb", "debian", "org"),
        ("proxy", "golang", "org"),
    )
]


def found(files: list[Path], root: Path, pattern: str) -> list[str]:
    hits: list[str] = []
    for path in files:
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # a picture or a recorded history
        for number, line in enumerate(text.splitlines(), 1):
            if re.search(pattern, line):
                hits.append(f"{path.relative_to(root)}:{number}: {line.strip()[:120]}")
    return hits


def test_no_file_holds_a_path_of_the_machine_it_was_written_on(files: list[Path], root: Path) -> None:
    assert not (hits := found(files, root, "|".join(MACHINE))), "\n".join(hits)


def test_no_file_names_a_package_registry(files: list[Path], root: Path) -> None:
    assert not (hits := found(files, root, "|".join(REGISTRIES))), "\n".join(hits)


@pytest.fixture(scope="module")
def code(root: Path, files: list[Path], rooms: dict[str, str]) -> list[Path]:
    folders = {*rooms.values(), "benchmarks"}
    return [p for p in files if p.suffix == ".py" and p.relative_to(root).parts[0] in folders]


def test_nothing_is_left_to_be_done_later(code: list[Path], root: Path) -> None:
    assert not (hits := found(code, root, r"\b(TODO|FIXME|XXX|NotImplementedError)\b")), "\n".join(hits)


def test_the_product_has_no_mocks(code: list[Path], root: Path) -> None:
    assert not (hits := found(code, root, r"unittest\.mock|MagicMock|monkeypatch")), "\n".join(hits)


def catches_everything(handler: ast.ExceptHandler) -> bool:
    types = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(
        t is None or (isinstance(t, ast.Name) and t.id in {"Exception", "BaseException"}) for t in types
    )


def test_whoever_catches_every_exception_says_why(code: list[Path], root: Path) -> None:
    """Whoever catches all and does not raise it again has a comment: on the line, alone before it, or just after it."""
    unexplained: list[str] = []
    for path in code:
        text = path.read_text()
        lines = ["", *text.splitlines(), ""]
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.ExceptHandler) or not catches_everything(node):
                continue
            last, at = node.body[-1], node.lineno
            if isinstance(last, ast.Raise) and last.exc is None:
                continue
            near = [n for n in lines[at - 1 : node.body[0].lineno + 1] if "#" in n]
            if not any(not re.search(r"#\s*noqa(:[A-Z0-9, ]*)?$", n) for n in near):
                unexplained.append(f"{path.relative_to(root)}:{at}: {lines[at].strip()}")
    assert not unexplained, "\n".join(unexplained)


def test_every_package_says_what_it_is_for(root: Path, files: list[Path], rooms: dict[str, str]) -> None:
    silent = [
        str(path.relative_to(root))
        for path in files
        if path.name == "__init__.py"
        and path.relative_to(root).parts[0] in rooms.values()
        and (
            not path.read_text().lstrip().startswith('"""')
            or "Room of the house; see docs" in path.read_text()
        )
    ]
    assert not silent, "\n".join(silent)


def test_the_readme_sets_up_with_exactly_two_commands(root: Path) -> None:
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", (root / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    targets = re.findall(r"^\s*(?:\$ )?make ([a-z-]+)", "\n".join(blocks), re.MULTILINE)
    assert set(targets) == {"demo", "test"}


def test_decisions_are_numbered_and_complete(root: Path) -> None:
    decisions = sorted((root / "docs" / "decisions").glob("*.md"))
    numbers = [int(re.match(r"(\d{3})-[a-z0-9-]+\.md$", path.name).group(1)) for path in decisions]  # type: ignore[union-attr]
    assert len(numbers) == len(set(numbers)), "two decisions share a number"
    for path in decisions:
        text = path.read_text()
        assert all(
            re.search(rf"^(## |\*\*){part}", text, re.MULTILINE)
            for part in ("Context", "Decision", "Consequence")
        ), path.name
