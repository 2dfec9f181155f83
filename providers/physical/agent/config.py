"""The agent's configuration: a TOML file, read once. Every mistake is told with its place; nothing is guessed."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from farshore.providers.physical.agent.hooks import Hook

MIB = 1 << 20
TRACKING = ("auto", "trace", "hash", "thin", "era")


class BadConfig(Exception):
    """The text names the entry and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class DiskConfig:
    """A disk to protect. `path` should be a name that survives reboots (/dev/disk/by-id/…). `metadata`: of dm-era."""

    key: str
    path: str
    boot: bool = False
    tracking: str = "auto"


@dataclass(frozen=True, slots=True)
class Config:
    """Durations in seconds."""

    name: str
    state: Path  # survives reboots
    run: Path  # does not (tmpfs): notes about freezes
    ca: Path
    certificate: Path
    key: Path
    clients: tuple[str, ...]  # common names that may ask; the CA alone is not enough
    disks: tuple[DiskConfig, ...]
    listen: str = "127.0.0.1"
    port: int = 0
    spool: Path = Path("/dev/shm")  # noqa: S108  memory; files there are made without a name
    spool_mib: int = 1024
    freeze_limit: float = 10.0  # the watchdog's
    freeze_copy_mib: float = (
        8.0  # what a busy disk without snapshots may have copied inside a freeze; 0: never
    )
    freeze_copy_seconds: float = 0.25
    rounds: int = 6  # barriers of one cut before it gives up
    trace_buffer_kib: int = 8192  # per CPU
    tracefs: Path | None = None
    hooks: tuple[Hook, ...] = field(default_factory=tuple)


def load(path: Path) -> Config:
    """BadConfig."""
    try:
        return parse(tomllib.loads(path.read_text()))
    except OSError as error:
        raise BadConfig(f"{path} cannot be read: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise BadConfig(f"{path}: {error}") from error


def parse(data: Mapping[str, Any]) -> Config:
    """BadConfig."""
    top = _Table("", data)
    agent, tls, freeze = top.table("agent"), top.table("tls"), top.table("freeze", optional=True)
    trace = top.table("trace", optional=True)
    disks: list[DiskConfig] = []
    for entry in top.tables("disk"):
        disk = DiskConfig(
            key=entry.text("key"),
            path=entry.text("path"),
            boot=entry.flag("boot"),
            tracking=entry.text("tracking", "auto"),
        )
        entry.done()
        if disk.tracking not in TRACKING:
            raise BadConfig(f"disk {disk.key}: tracking is one of {', '.join(TRACKING)}")
        if not disk.key.replace("-", "").replace("_", "").isalnum():
            raise BadConfig(f"disk key {disk.key!r}: letters, digits, - and _ only")
        disks.append(disk)
    if not disks:
        raise BadConfig("no [[disk]] is configured")
    if len({disk.key for disk in disks}) != len(disks) or len({disk.path for disk in disks}) != len(disks):
        raise BadConfig("two [[disk]] have the same key or path")
    hooks: list[Hook] = []
    for entry in top.tables("hook"):
        hooks.append(
            Hook(
                entry.text("name"),
                entry.words("before"),
                entry.words("after"),
                entry.number("timeout", 30.0),
            )
        )
        entry.done()
    defaults = {name: item.default for name, item in Config.__dataclass_fields__.items()}
    config = Config(
        name=agent.text("name"),
        state=Path(agent.text("state", "/var/lib/farshore-agent")),
        run=Path(agent.text("run", "/run/farshore-agent")),
        listen=agent.text("listen", "127.0.0.1"),
        port=int(agent.number("port", 0)),
        spool=Path(agent.text("spool", str(defaults["spool"]))),
        spool_mib=int(agent.number("spool_mib", defaults["spool_mib"])),
        ca=Path(tls.text("ca")),
        certificate=Path(tls.text("certificate")),
        key=Path(tls.text("key")),
        clients=tls.words("clients"),
        disks=tuple(disks),
        freeze_limit=freeze.number("limit", defaults["freeze_limit"]),
        freeze_copy_mib=freeze.number("copy_mib", defaults["freeze_copy_mib"]),
        freeze_copy_seconds=freeze.number("copy_seconds", defaults["freeze_copy_seconds"]),
        rounds=int(freeze.number("rounds", defaults["rounds"])),
        trace_buffer_kib=int(trace.number("buffer_kib", defaults["trace_buffer_kib"])),
        tracefs=Path(folder) if (folder := trace.text("tracefs", "")) else None,
        hooks=tuple(hooks),
    )
    for table in (agent, tls, freeze, trace, top):
        table.done()
    if not config.clients:
        raise BadConfig("tls.clients names nobody who may connect")
    if config.freeze_limit <= 0 or config.freeze_copy_seconds >= config.freeze_limit or config.rounds < 1:
        raise BadConfig("freeze: limit must be positive and longer than copy_seconds, rounds at least 1")
    return config


class _Table:
    """A TOML table whose entries are taken one by one; what nobody took is a mistake."""

    def __init__(self, name: str, data: Any) -> None:
        if not isinstance(data, Mapping):
            raise BadConfig(f"{name} is not a table")
        self._name = name
        self._data: dict[str, Any] = {str(key): value for key, value in data.items()}

    def _take(self, key: str, kinds: tuple[type, ...], default: Any) -> Any:
        value = self._data.pop(key, default)
        where = f"{self._name}.{key}".lstrip(".")
        if value is None:
            raise BadConfig(f"{where} is missing")
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise BadConfig(f"{where} is a {type(value).__name__}, not a {kinds[0].__name__}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        return str(self._take(key, (str,), default))

    def flag(self, key: str) -> bool:
        return bool(self._take(key, (bool,), False))

    def number(self, key: str, default: Any = None) -> float:
        return float(self._take(key, (float, int), default))

    def words(self, key: str) -> tuple[str, ...]:
        found: list[Any] = self._take(key, (list,), [])
        if not all(isinstance(word, str) for word in found):
            raise BadConfig(f"{self._name}.{key} is a list of texts")
        return tuple(str(word) for word in found)

    def table(self, key: str, *, optional: bool = False) -> _Table:
        return _Table(key, self._take(key, (dict,), {} if optional else None))

    def tables(self, key: str) -> list[_Table]:
        return [_Table(key, entry) for entry in self._take(key, (list,), [])]

    def done(self) -> None:
        if self._data:
            raise BadConfig(
                f"unknown: {', '.join(f'{self._name}.{key}'.lstrip('.') for key in sorted(self._data))}"
            )
