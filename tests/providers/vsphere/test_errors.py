"""Every failure becomes an error of the catalogue with the right code and the right advice to retry."""

from __future__ import annotations

import ssl
from http.client import RemoteDisconnected

import pytest
from pyVmomi import vim, vmodl

from farshore.domain.errors import Code
from farshore.providers.vsphere.errors import classify

FAULTS = [
    (vim.fault.InvalidLogin(), Code.ACCESS_DENIED, False),
    (vim.fault.NoPermission(privilegeId="VirtualMachine.State.CreateSnapshot"), Code.ACCESS_DENIED, False),
    (vim.fault.NotAuthenticated(privilegeId="System.View"), Code.ACCESS_DENIED, True),
    (vim.fault.TaskInProgress(), Code.SOURCE_BUSY, True),
    (vim.fault.InvalidPowerState(), Code.SOURCE_BUSY, True),
    (vim.fault.FileLocked(file="[ds] x.vmdk"), Code.SOURCE_BUSY, True),
    (vmodl.fault.HostNotReachable(), Code.SOURCE_UNREACHABLE, True),
    (vmodl.fault.ManagedObjectNotFound(), Code.SOURCE_MACHINE_NOT_FOUND, True),
    (vim.fault.ApplicationQuiesceFault(), Code.SNAPSHOT_FAILED, True),
    (vim.fault.TooManySnapshotLevels(), Code.SNAPSHOT_FAILED, True),
    (ConnectionRefusedError(111, "Connection refused"), Code.SOURCE_UNREACHABLE, True),
    (TimeoutError("timed out"), Code.SOURCE_UNREACHABLE, True),
    (RemoteDisconnected("closed"), Code.SOURCE_UNREACHABLE, True),
    (ssl.SSLCertVerificationError(1, "self-signed certificate"), Code.CONFIGURATION_INVALID, False),
    (ZeroDivisionError("oops"), Code.INTERNAL, True),
]


@pytest.mark.parametrize(("exc", "code", "retryable"), FAULTS, ids=lambda v: type(v).__name__)
def test_a_failure_has_its_code(exc, code, retryable):
    error = classify(exc, doing="taking a snapshot", subject="web01")
    assert (error.code, error.retryable) == (code, retryable)
    assert "taking a snapshot" in error.info.message
    assert error.info.subject == "web01"
    assert error.info.recommended_action


def test_a_missing_privilege_is_named():
    error = classify(vim.fault.NoPermission(privilegeId="VirtualMachine.State.CreateSnapshot"), doing="x")
    assert "VirtualMachine.State.CreateSnapshot" in error.info.message


def test_an_unknown_fault_gets_the_code_of_the_step():
    error = classify(
        vim.fault.GenericVmConfigFault(reason="odd", msg="Odd."), doing="x", fallback=Code.SNAPSHOT_FAILED
    )
    assert error.code is Code.SNAPSHOT_FAILED
    assert "Odd." in error.info.message
    assert error.info.details == {"fault": "vim.fault.GenericVmConfigFault"}
