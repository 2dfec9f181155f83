"""YAML text to plain data, with the line and column of every key and value.

Only the YAML 1.2 core schema is understood, so that `on`, `yes` and `12:30` stay text. Anchors and merge keys work.
Every duplicate key is reported, not just the first. No object of a YAML library leaves this module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

MAX_PARTS = 100_000  # of a plan once its anchors are written out
MAX_BYTES = 1_000_000  # a plan is pinned into the history of its runs, whose payloads end at 2 MB

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Position:
    """A place in the text. Both count from 1."""

    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with the text itself."""

    position: Position
    code: str
    message: str
    fix: str
    path: Path = ()


@dataclass(slots=True)
class Source:
    """What was read. `data` is None when the text cannot be parsed."""

    data: Any = None
    values: dict[Path, Position] = field(default_factory=dict[Path, Position])
    keys: dict[Path, Position] = field(default_factory=dict[Path, Position])
    problems: list[Problem] = field(default_factory=list[Problem])

    def at(self, path: Path, *, key: bool = False) -> Position:
        """Where `path` stands: its value, or its key; where there is none, that of the nearest part around it."""
        for end in range(len(path), 0, -1):
            part = path[:end]
            first, second = (self.keys, self.values) if key or end < len(path) else (self.values, self.keys)
            found = first.get(part) or second.get(part)
            if found is not None:
                return found
        return self.values.get((), Position(1, 1))


# What the parser says, and what a person understands by it.
_PLAIN: tuple[tuple[str, str, str], ...] = (
    (r"found character '\\t'|found a tab", "a tab stands where only spaces may", "Indent with spaces."),
    (
        r"mapping values are not allowed",
        "a colon stands where none may",
        "Check the indentation of this line and the one before; put text with a colon in quotes.",
    ),
    (
        r"could not find expected ':'",
        "a key without its colon",
        "Write `key: value`, with a space after the colon.",
    ),
    (
        r"expected <block end>",
        "the indentation does not fit the lines above",
        "Align the line with its neighbours of the same level.",
    ),
    (
        r"unexpected end of stream|expected the node content, but found '<stream end>'",
        "the text ends in the middle of something",
        "Close the quote or bracket that is open.",
    ),
    (
        r"expected ',' or '[\]}]'",
        "a list or map in brackets is not closed",
        "Add the missing comma or bracket.",
    ),
    (
        r"found undefined alias|undefined alias",
        "an alias without its anchor",
        "Define the anchor before its use.",
    ),
    (
        r"found unknown escape",
        "an unknown escape in double quotes",
        "Use single quotes, or double the backslash.",
    ),
    (
        r"expected a single document",
        "more than one document in the file",
        "Keep one plan in a file; remove `---`.",
    ),
    (r"cannot start any token", "a character that cannot stand here", "Put the text in quotes."),
)


def read(text: str) -> Source:
    """Parse a text. Problems of the text are in the result; nothing is raised for them."""
    source = Source()
    size = len(text.encode(errors="replace"))
    if size > MAX_BYTES:
        source.problems.append(
            Problem(
                Position(1, 1),
                "too-large",
                f"the plan has {size:,} bytes, more than the {MAX_BYTES:,} that fit into a run",
                "Split it into several plans.",
            )
        )
        return source
    yaml = YAML(typ="safe", pure=True)
    try:
        node: Node | None = yaml.compose(text)  # pyright: ignore[reportUnknownMemberType]  untyped library
    except YAMLError as error:
        source.problems.append(_syntax(error, text))
        return source
    except RecursionError:
        source.problems.append(
            Problem(Position(1, 1), "yaml", "the text is nested too deeply", "A plan has at most six levels.")
        )
        return source
    if node is None:
        source.problems.append(
            Problem(
                Position(1, 1), "empty", "the file is empty", "Begin with `farshore: 1` and `plan: <name>`."
            )
        )
        return source
    _Builder(source).build_root(node)
    return source


def _syntax(error: YAMLError, text: str) -> Problem:
    if isinstance(error, ReaderError):
        position = _offset(text, int(error.position))
        return Problem(
            position,
            "yaml",
            f"a control character (code {error.character!r}) that YAML does not allow",
            "Remove it.",
        )
    raw = str(error)
    position = Position(1, 1)
    if isinstance(error, MarkedYAMLError):
        raw = " ".join(part for part in (error.context, error.problem) if part)
        mark = error.problem_mark or error.context_mark
        if mark is not None:
            position = Position(mark.line + 1, mark.column + 1)
    for pattern, message, fix in _PLAIN:
        if re.search(pattern, raw):
            return Problem(position, "yaml", f"not valid YAML: {message}", fix)
    return Problem(position, "yaml", f"not valid YAML: {raw}", "Correct the text at this place.")


_LINE_END = re.compile("\r\n|[\n\r]")  # as YAML 1.2 and editors count lines


def _offset(text: str, offset: int) -> Position:
    lines = _LINE_END.split(text[:offset])
    return Position(len(lines), len(lines[-1]) + 1)


class _TooLarge(Exception):
    pass


_TAGS = frozenset({"str", "int", "float", "bool", "null", "timestamp", "merge", "value", "seq", "map"})


class _Builder:
    def __init__(self, source: Source) -> None:
        self._source = source
        self._open: set[int] = set()
        self._parts = 0

    def build_root(self, node: Node) -> None:
        try:
            self._source.data = self._build(node, ())
        except _TooLarge:
            self._source.data = None
            self._source.problems = [
                Problem(
                    Position(1, 1),
                    "too-large",
                    f"the plan has more than {MAX_PARTS:,} parts once its anchors are written out",
                    "Split it into several plans.",
                )
            ]

    def _problem(self, node: Node, path: Path, code: str, message: str, fix: str) -> None:
        self._source.problems.append(Problem(_position(node), code, message, fix, path))

    def _build(self, node: Node, path: Path) -> Any:
        self._parts += 1
        if self._parts > MAX_PARTS:  # a few nested anchors can stand for more than memory holds
            raise _TooLarge
        self._source.values[path] = _position(node)
        tag = str(node.tag)
        if not tag.startswith("tag:yaml.org,2002:") or tag.partition("2002:")[2] not in _TAGS:
            self._problem(node, path, "yaml", f"the tag {tag} means nothing in a plan", "Remove it.")
            return None
        if isinstance(node, ScalarNode):
            return _scalar(node)
        if id(node) in self._open:
            self._problem(node, path, "yaml", "an anchor that holds itself", "Write the part out.")
            return None
        self._open.add(id(node))
        try:
            if isinstance(node, SequenceNode):
                return [self._build(item, (*path, i)) for i, item in enumerate(node.value)]
            if isinstance(node, MappingNode):
                return self._mapping(node, path)
        finally:
            self._open.discard(id(node))
        return None

    def _mapping(self, node: MappingNode, path: Path) -> dict[str, Any]:
        result: dict[str, Any] = {}
        merged: list[Node] = []
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode):
                self._problem(
                    key_node, path, "key", "a key that is a list or a map", "Use a plain word as key."
                )
                continue
            key = str(key_node.value)
            if key == "<<" and key_node.style is None:
                merged.extend(value_node.value if isinstance(value_node, SequenceNode) else [value_node])
                continue
            if key in result:
                first = self._source.keys[(*path, key)]
                self._problem(
                    key_node,
                    (*path, key),
                    "duplicate-key",
                    f"{key!r} is given twice (first in line {first.line})",
                    "Keep one of the two.",
                )
                continue
            self._source.keys[(*path, key)] = _position(key_node)
            result[key] = self._build(value_node, (*path, key))
        for part in merged:
            if not isinstance(part, MappingNode) or id(part) in self._open:
                self._problem(part, path, "yaml", "`<<` merges something that is not a map", "Merge a map.")
                continue
            other = self._mapping_aside(part, path)
            result.update({key: value for key, value in other.items() if key not in result})
        return result

    def _mapping_aside(self, node: MappingNode, path: Path) -> Mapping[str, Any]:
        """A merged map: its positions count only where the map around it says nothing of the same key."""
        own = (dict(self._source.keys), dict(self._source.values))
        self._open.add(id(node))
        try:
            result = self._mapping(node, path)
        finally:
            self._open.discard(id(node))
        self._source.keys.update(own[0])
        self._source.values.update(own[1])
        return result


def _position(node: Node) -> Position:
    mark = node.start_mark
    return Position(mark.line + 1, mark.column + 1)


_INT = re.compile(r"[-+]?\d+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.\d+|\d+(?:\.\d*)?)(?:[eE][-+]?\d+)?")
_WORDS: Mapping[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


def _scalar(node: ScalarNode) -> Any:
    text = str(node.value)
    if (
        node.style is not None or node.tag == "tag:yaml.org,2002:str"
    ):  # in quotes, a block of text, or marked !!str
        return text
    if text in _WORDS:
        return _WORDS[text]
    try:
        if _INT.fullmatch(text):
            return int(text)
        if _OCTAL.fullmatch(text):
            return int(text[2:], 8)
        if _HEX.fullmatch(text):
            return int(text[2:], 16)
    except ValueError:  # more digits than Python turns into a number: not a number of ours
        return text
    if _FLOAT.fullmatch(text):
        return float(text)
    return text
