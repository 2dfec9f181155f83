"""Create if absent: one way to make every kind of ARM resource so that a repeat makes nothing twice.

    go on with the token, if there is one → read → foreign: NameTaken · Succeeded: take it · Failed: delete, make again
    · under way: wait for it · absent: make it → read again where create-only was refused

A lost answer is therefore healed by the next attempt's read, never by guessing.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from azure.core.exceptions import AzureError
from azure.core.polling import AsyncLROPoller

from farshore.domain.errors import Code, FarshoreError
from farshore.providers.azure import names
from farshore.providers.azure.errors import classify, is_exists, is_in_use, is_missing
from farshore.providers.azure.lro import Begin, LateFailure, OperationLost, drive, silent
from farshore.providers.azure.settings import AzureSettings
from farshore.providers.ports import Checkpoint, Owner

T = TypeVar("T")
_ROUNDS = 6  # reads before giving up: create, refused, read, delete the failed one, create, read


class Births:
    """When this process made, or first heard of, a resource: a 404 soon after is lag, later it is drift."""

    def __init__(self, grace: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._grace = grace
        self._clock = clock
        self._at: dict[str, float] = {}

    def note(self, id_: str | None) -> None:
        """A resource was made just now."""
        if id_:
            self._forget_old()
            self._at[id_.lower()] = self._clock()

    def heard_of(self, id_: str) -> None:
        """Somebody says that it exists; counts from the first time."""
        self._at.setdefault(id_.lower(), self._clock())

    def is_young(self, id_: str) -> bool:
        at = self._at.get(id_.lower())
        return at is not None and self._clock() - at < self._grace

    def _forget_old(self) -> None:
        if len(self._at) > 4096:
            limit = self._clock() - self._grace
            self._at = {k: at for k, at in self._at.items() if at >= limit}


@dataclass(frozen=True)
class Wanted(Generic[T]):
    """A resource that shall exist, and how it is read, made and deleted."""

    what: str  # for a person: "disk web1-disk0-1a2b3c"
    id: str
    read: Callable[[], Awaitable[T]]
    make: Begin[T]
    delete: Callable[[], Awaitable[AsyncLROPoller[None]]]
    owner: Owner
    step: str  # name of the step inside checkpoints
    stale: Callable[[T], str] = field(default=lambda _: "")
    """Why an existing one of ours has to be replaced although it is whole; "" when it need not."""


class Ensurer:
    """Makes `Wanted` resources; shared by everything that belongs to one site."""

    def __init__(self, settings: AzureSettings, births: Births) -> None:
        self.settings = settings
        self.births = births

    async def __call__(
        self, wanted: Wanted[T], *, resume: Mapping[str, Any] | None = None, checkpoint: Checkpoint = silent
    ) -> T:
        note: dict[str, Any] = {"step": wanted.step}
        mine = resume if resume is not None and resume.get("step") == wanted.step else {}
        if mine.get("token"):
            # What became of a lost or failed operation is read below: a Failed resource is deleted and made again.
            with contextlib.suppress(OperationLost, LateFailure):
                return self._born(wanted, await self._drive(wanted, checkpoint, note, str(mine["token"])))
        refused = False
        for _ in range(_ROUNDS):
            found = await read_or_none(wanted.read, doing=f"reading {wanted.what}", subject=wanted.what)
            if found is None:
                if refused:
                    raise self.not_visible(wanted.what)
                made = await self._make(wanted, checkpoint, note)
                if made is not None:
                    return self._born(wanted, made)
                refused = True
                continue
            refused = False
            tags = tags_of(found)
            if not names.is_of(wanted.owner, tags):
                raise FarshoreError(
                    Code.NAME_TAKEN,
                    f"There is a {wanted.what} already; {names.describe(tags)}.",
                    subject=wanted.what,
                    details={"id": wanted.id},
                )
            state = state_of(found).lower()
            stale = wanted.stale(found) if state == "succeeded" else ""
            if state == "succeeded" and not stale:
                return found
            if state in ("failed", "canceled") or stale:
                await self.delete(wanted, checkpoint=checkpoint, note=note)
                continue
            await self._settle(wanted, checkpoint, note)
        raise FarshoreError(
            Code.TARGET_BUSY, f"{wanted.what} changes faster than it can be read.", subject=wanted.what
        )

    async def delete(
        self, wanted: Wanted[T], *, checkpoint: Checkpoint = silent, note: Mapping[str, Any] | None = None
    ) -> None:
        """Delete what is there; gone already is fine."""
        doing = f"deleting {wanted.what}"

        async def begin(_token: str | None) -> AsyncLROPoller[None]:
            return await wanted.delete()

        # The token of a deletion stays out of the checkpoint: a successor reads the resource instead.
        try:
            await drive(
                begin,
                doing=doing,
                subject=wanted.what,
                checkpoint=lambda _: checkpoint(dict(note or {})),
            )
        except AzureError as error:
            if is_missing(error):
                return
            found = classify(error, doing=doing, subject=wanted.what)
            if is_in_use(error):
                raise FarshoreError(
                    Code.TARGET_BUSY,
                    found.info.message,
                    subject=wanted.what,
                    details=found.info.details,
                ) from error
            raise found from error

    def not_visible(self, what: str) -> FarshoreError:
        return FarshoreError(Code.TARGET_NOT_VISIBLE_YET, f"Azure does not show {what} yet.", subject=what)

    async def _make(self, wanted: Wanted[T], checkpoint: Checkpoint, note: Mapping[str, Any]) -> T | None:
        try:
            return await self._drive(wanted, checkpoint, note, None)
        except AzureError as error:
            if is_exists(error):
                return None  # somebody was faster, or an answer of ours was lost: read who it is
            raise classify(error, doing=f"creating {wanted.what}", subject=wanted.what) from error

    async def _drive(
        self, wanted: Wanted[T], checkpoint: Checkpoint, note: Mapping[str, Any], token: str | None
    ) -> T:
        async def begin(continuation: str | None) -> AsyncLROPoller[T]:
            poller = await wanted.make(continuation)
            self.births.note(wanted.id)
            return poller

        return await drive(
            begin if token is None else wanted.make,
            doing=f"creating {wanted.what}",
            subject=wanted.what,
            checkpoint=checkpoint,
            note=note,
            token=token,
        )

    async def _settle(self, wanted: Wanted[T], checkpoint: Checkpoint, note: Mapping[str, Any]) -> None:
        """Wait until a resource that somebody works on is at rest (or gone)."""
        while True:
            checkpoint(dict(note))
            await asyncio.sleep(min(self.settings.polling_interval, self.settings.checkpoint_interval))
            found = await read_or_none(wanted.read, doing=f"reading {wanted.what}", subject=wanted.what)
            if found is None or state_of(found).lower() in ("succeeded", "failed", "canceled"):
                return

    def _born(self, wanted: Wanted[T], made: T) -> T:
        self.births.note(wanted.id)
        return made


async def read_or_none(read: Callable[[], Awaitable[T]], *, doing: str, subject: str) -> T | None:
    """What a GET shows, None for a 404. Raises: FarshoreError."""
    try:
        return await read()
    except AzureError as error:
        if is_missing(error):
            return None
        raise classify(error, doing=doing, subject=subject) from error


def tags_of(resource: Any) -> Mapping[str, str]:
    tags: Mapping[str, str] | None = getattr(resource, "tags", None)
    return tags or {}


def state_of(resource: Any) -> str:
    """The provisioning state; a resource without one is done."""
    properties: Any = getattr(resource, "properties", None)
    state: Any = getattr(properties, "provisioning_state", None)
    return str(getattr(state, "value", state) or "Succeeded")
