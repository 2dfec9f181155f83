"""Leases as a small state machine (REST reference, "Lease Blob": the tables of outcomes by state)."""

from __future__ import annotations

import uuid

from .errors import StorageError
from .rows import Lease

INFINITE = -1


def state_at(lease: Lease, now: float) -> str:
    """available, leased, expired, breaking or broken."""
    if not lease.id:
        return "available"
    if lease.breaks is not None:
        return "breaking" if now < lease.breaks else "broken"
    if lease.expires is not None and now >= lease.expires:
        return "expired"
    return "leased"


def locked(lease: Lease, now: float) -> bool:
    return state_at(lease, now) in ("leased", "breaking")


def headers(lease: Lease, now: float) -> dict[str, str]:
    """What Get Properties and List tell about a lease."""
    state = state_at(lease, now)
    out = {
        "x-ms-lease-status": "locked" if state in ("leased", "breaking") else "unlocked",
        "x-ms-lease-state": state,
    }
    if state == "leased":
        out["x-ms-lease-duration"] = "infinite" if lease.duration == INFINITE else "fixed"
    return out


def acquire(lease: Lease, now: float, duration: int, proposed: str) -> str:
    """Take the lease; returns its id."""
    _check_duration(duration)
    state = state_at(lease, now)
    if state == "breaking" and lease.id == proposed:
        raise StorageError("LeaseIsBreakingAndCannotBeAcquired")
    if state == "breaking" or (state == "leased" and lease.id != proposed):
        raise StorageError("LeaseAlreadyPresent", "There is already a lease present.")
    _set(lease, now, proposed or str(uuid.uuid4()), duration)
    return lease.id


def renew(lease: Lease, now: float, lease_id: str) -> str:
    state = state_at(lease, now)
    if state == "available" or lease.id != lease_id:
        raise StorageError("LeaseIdMismatchWithLeaseOperation")
    if state in ("breaking", "broken"):
        raise StorageError("LeaseIsBrokenAndCannotBeRenewed")
    _set(lease, now, lease.id, lease.duration)
    return lease.id


def change(lease: Lease, now: float, lease_id: str, proposed: str) -> str:
    state = state_at(lease, now)
    if state == "breaking":
        raise StorageError("LeaseIsBreakingAndCannotBeChanged")
    if state != "leased":
        raise StorageError("LeaseNotPresentWithLeaseOperation")
    if lease.id not in (lease_id, proposed):
        raise StorageError("LeaseIdMismatchWithLeaseOperation")
    lease.id = proposed
    return lease.id


def release(lease: Lease, now: float, lease_id: str) -> None:
    if state_at(lease, now) == "available" or lease.id != lease_id:
        raise StorageError("LeaseIdMismatchWithLeaseOperation")
    lease.id = ""
    lease.expires = lease.breaks = None


def break_(lease: Lease, now: float, period: int | None) -> int:
    """Start breaking; returns the seconds left before anybody may acquire."""
    state = state_at(lease, now)
    if state == "available":
        raise StorageError("LeaseNotPresentWithLeaseOperation")
    if state in ("broken", "expired"):
        lease.breaks = now
        return 0
    if state == "breaking" and lease.breaks is not None:
        remaining = lease.breaks - now
    elif lease.expires is None:
        remaining = 0.0 if period is None else float(period)
    else:
        remaining = lease.expires - now
    wait = remaining if period is None else min(remaining, float(period))
    lease.breaks = now + wait
    return max(0, round(wait))


def lose(lease: Lease) -> None:
    """Somebody broke the lease at once and took nothing: the fault "lease lost"."""
    if lease.id:
        lease.breaks = 0.0


def check_write(lease: Lease, now: float, lease_id: str, *, what: str = "Blob") -> None:
    """A write is allowed to the holder only; 412 otherwise."""
    state = state_at(lease, now)
    if state in ("leased", "breaking"):
        if not lease_id:
            raise StorageError("LeaseIdMissing", f"There is currently a lease on the {what.lower()}.")
        if lease_id.lower() != lease.id.lower():
            raise StorageError(f"LeaseIdMismatchWith{what}Operation")
    elif lease_id:
        raise StorageError(_gone(state, what))


def check_read(lease: Lease, now: float, lease_id: str, *, what: str = "Blob") -> None:
    """A read needs no lease, but one that is named must be the right one."""
    if not lease_id:
        return
    state = state_at(lease, now)
    if state not in ("leased", "breaking"):
        raise StorageError(_gone(state, what))
    if lease_id.lower() != lease.id.lower():
        raise StorageError(f"LeaseIdMismatchWith{what}Operation")


def _gone(state: str, what: str) -> str:
    return "LeaseLost" if state in ("expired", "broken") else f"LeaseNotPresentWith{what}Operation"


def _set(lease: Lease, now: float, lease_id: str, duration: int) -> None:
    lease.id = lease_id
    lease.duration = duration
    lease.expires = None if duration == INFINITE else now + duration
    lease.breaks = None


def _check_duration(duration: int) -> None:
    if duration != INFINITE and not 15 <= duration <= 60:
        raise StorageError("InvalidHeaderValue", "x-ms-lease-duration must be -1 or 15 to 60 seconds.")
