"""The REST contract, read out of the installed azure-mgmt wheels: no specification files are shipped.

The generated clients hold everything a stand-in must agree with. `operations` parses `_operations.py` with `ast`; whatever
does not look as expected — an operation without URL, method, accepted codes — is an error, never a gap. Hand-written
`_patch.py` code and the asynchronous twin are not read; the generator makes both from one description.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGES = ("compute", "network", "resource.resources")


class ContractError(Exception):
    """The generated code does not look as this module expects; the layout of the generator has changed."""


@dataclass(frozen=True)
class Contract:
    """One operation, as the SDK calls it and reads its answer."""

    name: str
    """package.Group.method, without `begin_`."""
    method: str
    url: str
    api_version: str | None
    """None where the caller must give it (operations by resource id)."""
    codes: tuple[int, ...]
    query: tuple[str, ...]
    etag: bool
    """Whether the call can carry If-Match and If-None-Match."""
    lro: bool
    lro_headers: tuple[str, ...]
    body: str | None
    """Model of the request."""
    response: str | None
    """Model of the answer, of the item where `paged`, of the final answer where `lro`."""
    paged: bool
    error: str | None


@dataclass(frozen=True)
class _Builder:
    method: str
    url: str
    api_version: str | None
    query: tuple[str, ...]
    etag: bool


@cache
def operations(package: str) -> dict[str, Contract]:
    """Contract of every operation of `azure.mgmt.<package>` by name. Raises: ContractError, ImportError.

    Reads up to 140,000 lines; `group` is the quick way to some of it.
    """
    return parse(package, source_of(package))


@cache
def group(package: str, name: str) -> dict[str, Contract]:
    """Contracts of one group, such as `Disks`, as strictly as `operations` reads them all."""
    blocks = _blocks(package)
    class_name = next((n for n in (f"{name}Operations", f"_{name}OperationsMixin") if n in blocks), None)
    if class_name is None:
        raise ContractError(f"{package}: no group {name}")
    text = blocks[class_name]
    builders = sorted(set(re.findall(r"\bbuild_\w+_request\b", text)))
    missing = [builder for builder in builders if builder not in blocks]
    if missing:
        raise ContractError(f"{package}.{name}: no builders {', '.join(missing)}")
    return parse(package, "\n".join([*(blocks[builder] for builder in builders), text]))


def of(operation: str) -> Contract | None:
    """The contract of `package.Group.method`, or None where the group has no such operation."""
    package, group_name, _ = operation.rsplit(".", 2)
    return group(package, group_name).get(operation)


@cache
def _blocks(package: str) -> dict[str, str]:
    """Text of each top-level class and function by name."""
    out: dict[str, str] = {}
    for block in re.split(r"(?m)^(?=def |class )", source_of(package)):
        found = re.match(r"(?:def|class) (\w+)", block)
        if found is not None:
            out[found[1]] = block
    return out


def source_of(package: str) -> str:
    """Text of the generated operations of an installed package."""
    found = importlib.util.find_spec(f"azure.mgmt.{package}")
    if found is None or found.origin is None:
        raise ImportError(f"azure.mgmt.{package} is not installed")
    return (Path(found.origin).parent / "operations" / "_operations.py").read_text()


def parse(package: str, source: str) -> dict[str, Contract]:
    """Contracts in the text of an `_operations.py`. Raises: ContractError."""
    tree = ast.parse(source)
    builders = {
        node.name: _builder(node)
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("build_")
    }
    if not builders:
        raise ContractError(f"{package}: no request builders found")
    out: dict[str, Contract] = {}
    used: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name.endswith(("Operations", "OperationsMixin")):
            for contract, builder in _group(package, node, builders):
                if contract.name in out:
                    raise ContractError(f"{contract.name}: found twice")
                out[contract.name] = contract
                used.add(builder)
    unused = sorted(set(builders) - used)
    if unused:
        raise ContractError(f"{package}: builders without an operation: {', '.join(unused)}")
    return out


def _builder(function: ast.FunctionDef) -> _Builder:
    url: str | None = None
    method: str | None = None
    version: str | None = None
    query: list[str] = []
    etag = False
    for node in ast.walk(function):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and target.id == "_url" and isinstance(node.value, ast.Constant):
                url = str(node.value.value)
            name = _subscript(target, "_params")
            if name is not None:
                query.append(name)
        elif isinstance(node, ast.Call):
            called = _called(node)
            if called == "HttpRequest":
                method = _keyword(node, "method")
            elif called == "pop" and len(node.args) == 2 and _constant(node.args[0]) == "api-version":
                version = _constant(node.args[1])
            elif called in {"prep_if_match", "prep_if_none_match"}:
                etag = True
    if url is None or method is None:
        raise ContractError(f"{function.name}: no {'URL' if url is None else 'method'} found")
    return _Builder(method, url, version, tuple(sorted(set(query))), etag)


def _group(
    package: str, class_: ast.ClassDef, builders: dict[str, _Builder]
) -> Iterator[tuple[Contract, str]]:
    """Operations of one group, each with its builder's name. The last of several overloads is the implementation."""
    functions = {node.name: node for node in class_.body if isinstance(node, ast.FunctionDef)}
    group_name = class_.name.removesuffix("Mixin").removesuffix("Operations").lstrip("_")
    for name, function in functions.items():
        calls = [c for c in _calls(function) if _called(c).startswith("build_")]
        if not calls:
            if not name.startswith(("_", "begin_")):
                raise ContractError(f"{package}.{group_name}.{name}: sends no request")
            continue
        names = {_called(call) for call in calls}
        if len(names) != 1 or (builder_name := names.pop()) not in builders:
            raise ContractError(f"{package}.{group_name}.{name}: no single known builder: {sorted(names)}")
        lro = name.endswith("_initial")
        operation = name.removeprefix("_").removesuffix("_initial") if lro else name
        begin = functions.get(f"begin_{operation}")
        if lro and begin is None:
            raise ContractError(f"{package}.{group_name}.{operation}: an initial request without its begin_")
        full = f"{package}.{group_name}.{operation}"
        codes = _codes(function)
        if not codes:
            raise ContractError(f"{full}: no accepted codes found")
        builder = builders[builder_name]
        response, paged = _response(begin if lro and begin is not None else function)
        yield (
            Contract(
                name=full,
                method=builder.method,
                url=builder.url,
                api_version=builder.api_version,
                codes=codes,
                query=builder.query,
                etag=builder.etag,
                lro=lro,
                lro_headers=_lro_headers(function) if lro else (),
                body=_body(function),
                response=response,
                paged=paged,
                error=_error(function),
            ),
            builder_name,
        )


def _codes(function: ast.FunctionDef) -> tuple[int, ...]:
    for node in ast.walk(function):
        if (
            isinstance(node, ast.Compare)
            and isinstance(node.ops[0], ast.NotIn)
            and isinstance(node.left, ast.Attribute)
            and node.left.attr == "status_code"
            and isinstance(node.comparators[0], ast.List)
        ):
            return tuple(
                int(item.value)
                for item in node.comparators[0].elts
                if isinstance(item, ast.Constant) and isinstance(item.value, int)
            )
    return ()


def _response(function: ast.FunctionDef) -> tuple[str | None, bool]:
    """(model, whether it is the item of a page)."""
    for call in _calls(function):
        if _called(call) != "_deserialize" or not call.args:
            continue
        target = call.args[0]
        if isinstance(target, ast.Subscript):
            model = _model(target.slice)
            if model is not None:
                return model, any(
                    isinstance(n, ast.FunctionDef) and n.name == "extract_data" for n in function.body
                )
        model = _model(target)
        if model is not None:
            return model, False
    return None, False


def _body(function: ast.FunctionDef) -> str | None:
    """The model in an argument annotated `Union[_models.X, _types.X, IO[bytes]]`."""
    for argument in [*function.args.args, *function.args.kwonlyargs]:
        note = argument.annotation
        if isinstance(note, ast.Subscript) and isinstance(note.slice, ast.Tuple):
            model = _model(note.slice.elts[0])
            if model is not None and any("IO" in ast.unparse(e) for e in note.slice.elts):
                return model
    return None


def _error(function: ast.FunctionDef) -> str | None:
    for call in _calls(function):
        if _called(call) == "_failsafe_deserialize":
            return _model(call.args[0])
    return None


def _lro_headers(function: ast.FunctionDef) -> tuple[str, ...]:
    found: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            name = _subscript(node.targets[0], "response_headers")
            if name is not None:
                found.add(name)
    return tuple(sorted(found))


def _model(node: ast.expr) -> str | None:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "_models":
        return node.attr
    return None


def _calls(function: ast.FunctionDef) -> Iterator[ast.Call]:
    return (node for node in ast.walk(function) if isinstance(node, ast.Call))


def _called(call: ast.Call) -> str:
    if isinstance(call.func, ast.Name):
        return call.func.id
    return call.func.attr if isinstance(call.func, ast.Attribute) else ""


def _constant(node: ast.expr) -> str | None:
    return str(node.value) if isinstance(node, ast.Constant) else None


def _keyword(call: ast.Call, name: str) -> str | None:
    for keyword in call.keywords:
        if keyword.arg == name:
            return _constant(keyword.value)
    return None


def _subscript(node: ast.expr, holder: str) -> str | None:
    """The name in `holder["name"]`."""
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == holder:
        return _constant(node.slice)
    return None
