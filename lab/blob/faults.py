"""What can go wrong with the blob service, on request: rules per operation and blob, outage, limits, copies, keys.

Everything is JSON in and JSON out (`handle_control`), so that the laboratory's control server can merge it. Chance
is seeded: the same rules and requests fail in the same places.
"""

from __future__ import annotations

import fnmatch
import random
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from . import leases
from .errors import STATUS, StorageError
from .limits import RateLimits
from .store import BlobStore

ACTIONS = ("status", "delay", "reset-before", "reset-after", "lease-lost")


class Reset(Exception):
    """Cut the connection without an answer."""


@dataclass(slots=True)
class Rule:
    """One fault. `op` and `blob` are shell patterns (operation name, `account/container/blob`).

    status: answer `status`/`code` instead of doing anything, with Retry-After if given. delay: wait `delay` seconds
    first. reset-before: cut the connection, nothing done. reset-after: do it, then cut the connection (lost
    answer). lease-lost: somebody breaks the blob's lease just before. A rule skips `skip` matching requests, then
    acts on `count` of them (None = for ever), each with `probability`.
    """

    action: str
    op: str = "*"
    blob: str = "*"
    status: int = 503
    code: str = "ServerBusy"
    retry_after: float | None = None
    delay: float = 0.0
    skip: int = 0
    count: int | None = None
    probability: float = 1.0
    id: int = 0
    hits: int = 0

    def matches(self, op: str, path: str) -> bool:
        return fnmatch.fnmatchcase(op, self.op) and fnmatch.fnmatchcase(path, self.blob)


@dataclass(slots=True)
class Verdict:
    """What is to happen to one request."""

    delay: float = 0.0
    reset_before: bool = False
    reset_after: bool = False
    lose_lease: bool = False
    error: StorageError | None = None


@dataclass(slots=True)
class Seen:
    """One line of the request log."""

    op: str
    path: str
    status: int
    code: str = ""
    bytes: int = 0


@dataclass(slots=True)
class _State:
    rules: list[Rule] = field(default_factory=list[Rule])
    outage: str = ""  # "", "503" or "reset"
    ids: int = 0


class BlobFaults:
    """Control object of one blob server; thread-safe. `seed` drives every probability."""

    def __init__(self, seed: int = 0) -> None:
        self.limits = RateLimits()
        self._random = random.Random(seed)
        self._state = _State()
        self._stores: dict[str, BlobStore] = {}
        self._lock = threading.Lock()
        self.log: deque[Seen] = deque(maxlen=5000)
        self.counts: Counter[str] = Counter()

    def attach(self, store: BlobStore) -> None:
        self._stores[store.account] = store

    # --- from code ------------------------------------------------------------------------------------------

    def add(self, action: str, **options: Any) -> Rule:
        """Add a rule; unknown options or actions raise ValueError."""
        known = {f.name for f in fields(Rule)} - {"id", "hits", "action"}
        if action not in ACTIONS or not options.keys() <= known:
            raise ValueError(f"a rule has action {', '.join(ACTIONS)} and {', '.join(sorted(known))}")
        with self._lock:
            self._state.ids += 1
            rule = Rule(action, **options, id=self._state.ids)
            self._state.rules.append(rule)
        return rule

    def clear(self) -> None:
        """No rules, no outage; limits, copies and keys stay."""
        with self._lock:
            self._state.rules.clear()
            self._state.outage = ""

    def outage(self, kind: str) -> None:
        """ "503": every request is refused; "reset": connections are cut; "" ends it."""
        if kind not in ("", "503", "reset"):
            raise ValueError('an outage is "503", "reset" or ""')
        self._state.outage = kind

    # --- from the server ------------------------------------------------------------------------------------

    def judge(self, op: str, path: str) -> Verdict:
        """Decide about a request before anything is done for it."""
        verdict = Verdict()
        with self._lock:
            if self._state.outage == "reset":
                verdict.reset_before = True
                return verdict
            if self._state.outage == "503":
                verdict.error = StorageError("ServerBusy", "The region is out of order.")
                return verdict
            for rule in self._state.rules:
                if not rule.matches(op, path):
                    continue
                rule.hits += 1
                turn = rule.hits - rule.skip
                if turn <= 0 or (rule.count is not None and turn > rule.count):
                    continue
                if rule.probability < 1 and self._random.random() >= rule.probability:
                    continue
                self._apply(rule, verdict)
        return verdict

    def _apply(self, rule: Rule, verdict: Verdict) -> None:
        verdict.delay += rule.delay
        if rule.action == "status":
            headers = {} if rule.retry_after is None else {"Retry-After": f"{rule.retry_after:g}"}
            verdict.error = StorageError(rule.code, "Injected fault.", status=rule.status, headers=headers)
        elif rule.action == "reset-before":
            verdict.reset_before = True
        elif rule.action == "reset-after":
            verdict.reset_after = True
        elif rule.action == "lease-lost":
            verdict.lose_lease = True

    def seen(self, entry: Seen) -> None:
        self.log.append(entry)
        self.counts[entry.op] += 1

    # --- the control API ------------------------------------------------------------------------------------

    def handle_control(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """One call of the control API. ValueError for an unknown path or wrong body (a 400 of the control server).

        state · rules/add {action, op?, blob?, status?, code?, retry_after?, delay?, skip?, count?, probability?} ·
        rules/remove {id} · clear · outage {kind} · limits {requests_per_s, bytes_per_s} · premium {account, on} ·
        copy {account, bytes_per_s?, delay?, hold?, fail?} · rotate-key {account, key} ·
        lose-lease {account, container, blob} · log {clear?}
        """
        handler = self._routes().get(path.strip("/"))
        if handler is None:
            raise ValueError(f"the blob control API has {', '.join(self._routes())}")
        try:
            return handler(dict(body or {}))
        except (KeyError, TypeError) as e:
            raise ValueError(f"{path}: missing or wrong field {e}") from e

    def _routes(self) -> dict[str, Callable[[dict[str, Any]], dict[str, Any]]]:
        return {
            "state": lambda _: self._describe(),
            "rules/add": lambda b: asdict(self.add(**b)),
            "rules/remove": self._c_remove,
            "clear": self._c_clear,
            "outage": self._c_outage,
            "limits": self._c_limits,
            "premium": self._c_premium,
            "copy": self._c_copy,
            "rotate-key": self._c_rotate,
            "lose-lease": self._c_lose,
            "log": self._c_log,
        }

    def _describe(self) -> dict[str, Any]:
        with self._lock:
            return {
                "rules": [asdict(r) for r in self._state.rules],
                "outage": self._state.outage,
                "limits": {
                    "requests_per_s": self.limits.requests_per_s,
                    "bytes_per_s": self.limits.bytes_per_s,
                },
                "copy": {name: asdict(s.copy_policy) for name, s in self._stores.items()},
                "premium": {name: asdict(s.premium) for name, s in self._stores.items()},
                "counts": dict(self.counts),
                "codes": sorted(STATUS),
            }

    def _c_remove(self, body: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            self._state.rules = [r for r in self._state.rules if r.id != body["id"]]
        return self._describe()

    def _c_clear(self, _: dict[str, Any]) -> dict[str, Any]:
        self.clear()
        return self._describe()

    def _c_outage(self, body: dict[str, Any]) -> dict[str, Any]:
        self.outage(body["kind"])
        return self._describe()

    def _c_limits(self, body: dict[str, Any]) -> dict[str, Any]:
        self.limits.set(body.get("requests_per_s"), body.get("bytes_per_s"))
        return self._describe()

    def _c_premium(self, body: dict[str, Any]) -> dict[str, Any]:
        self._store(body["account"]).premium.enable(bool(body["on"]))
        return self._describe()

    def _c_copy(self, body: dict[str, Any]) -> dict[str, Any]:
        policy = self._store(body.pop("account")).copy_policy
        for name, value in body.items():
            if name not in ("bytes_per_s", "delay", "hold", "fail"):
                raise ValueError(f"copy has no {name}")
            setattr(policy, name, value)
        return self._describe()

    def _c_rotate(self, body: dict[str, Any]) -> dict[str, Any]:
        self._store(body["account"]).keys = [body["key"]]
        return {}

    def _c_lose(self, body: dict[str, Any]) -> dict[str, Any]:
        self.lose_lease(body["account"], body["container"], body["blob"])
        return {}

    def _c_log(self, body: dict[str, Any]) -> dict[str, Any]:
        lines = [asdict(s) for s in list(self.log)]
        if body.get("clear"):
            self.log.clear()
            self.counts.clear()
        return {"log": lines}

    def _store(self, account: str) -> BlobStore:
        if account not in self._stores:
            raise ValueError(f"there is no storage account {account}")
        return self._stores[account]

    def lose_lease(self, account: str, container: str, blob: str) -> None:
        """Somebody breaks the blob's lease, at once. Blocking."""
        store = self._stores.get(account)
        if store is not None and store.catalog.blob(container, blob) is not None:
            store.lease_blob(container, blob, lambda lease, _: leases.lose(lease))
