"""From Azure's words to ours: by code, then message, then status; total, and free of secrets."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from azure.core.exceptions import (
    AzureError,
    ClientAuthenticationError,
    DecodeError,
    HttpResponseError,
    ResourceExistsError,
    ServiceRequestError,
    ServiceResponseError,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.domain.errors import CATALOGUE, Code
from farshore.providers.azure.errors import (
    CODES,
    classify,
    is_missing,
    quota_numbers,
    retry_after,
    said,
    scrub,
)

QUOTA = (
    "Operation could not be completed as it results in exceeding approved Total Regional Cores quota. Additional details - "
    "Deployment Model: Resource Manager, Location: westeurope, Current Limit: 10, Current Usage: 8, Additional Required: 4."
)


class Response:
    """What an exception of the SDK keeps of an HTTP answer."""

    def __init__(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        self.status_code, self.reason, self.headers = status, "reason", headers or {}
        self._text = body if isinstance(body, str) else json.dumps(body)

    def text(self) -> str:
        return self._text


def refused(
    status: int, code: str, message: str = "m", *, details: list[str] | None = None, headers: dict[str, str] | None = None,
    kind: type[HttpResponseError] = HttpResponseError,
) -> HttpResponseError:  # fmt: skip
    body = {
        "error": {
            "code": code,
            "message": message,
            "details": [{"code": d, "message": d} for d in details or []],
        }
    }
    return kind(response=Response(status, body, headers))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "late", "code", "retryable"),
    [
        # B.1 throttling
        (refused(429, "TooManyRequests"), False, Code.TARGET_THROTTLED, True),
        (refused(429, "OperationNotAllowed", "too many requests have been received"), False, Code.TARGET_THROTTLED, True),
        (refused(429, "Whatever"), False, Code.TARGET_THROTTLED, True),
        (refused(503, "ServerBusy"), False, Code.TARGET_THROTTLED, True),
        # B.2 busy
        (refused(429, "RetryableErrorDueToAnotherOperation"), False, Code.TARGET_BUSY, True),
        (refused(429, "RetryableError", details=["ReferencedResourceNotProvisioned"]), False, Code.TARGET_BUSY, True),
        (refused(409, "AnotherOperationInProgress"), False, Code.TARGET_BUSY, True),
        (refused(200, "AnotherOperationInProgress"), True, Code.TARGET_BUSY, True),
        (refused(409, "OperationNotAllowed", "The VM is marked for deletion."), False, Code.TARGET_BUSY, True),
        # B.4 quota and capacity, in every place where they appear
        (refused(409, "OperationNotAllowed", QUOTA), False, Code.QUOTA_EXCEEDED, False),
        (refused(200, "OperationNotAllowed", QUOTA), True, Code.QUOTA_EXCEEDED, False),
        (refused(400, "QuotaExceeded"), False, Code.QUOTA_EXCEEDED, False),
        (refused(409, "SkuNotAvailable", kind=ResourceExistsError), False, Code.CAPACITY_EXHAUSTED, True),
        (refused(200, "AllocationFailed"), True, Code.CAPACITY_EXHAUSTED, True),
        (refused(200, "ZONALALLOCATIONFAILED"), True, Code.CAPACITY_EXHAUSTED, True),
        (refused(200, "OverconstrainedAllocationRequest"), True, Code.CAPACITY_EXHAUSTED, True),
        # other refusals
        (refused(400, "PrivateIPAddressIsAllocated"), False, Code.ADDRESS_IN_USE, False),
        (refused(403, "AuthorizationFailed"), False, Code.ACCESS_DENIED, False),
        (refused(401, "ExpiredAuthenticationToken"), False, Code.ACCESS_DENIED, True),
        (refused(403, "RequestDisallowedByPolicy"), False, Code.TARGET_REJECTED, False),
        (refused(409, "MissingSubscriptionRegistration"), False, Code.TARGET_REJECTED, False),
        (refused(404, "ResourceGroupNotFound"), False, Code.TARGET_REJECTED, False),
        (refused(400, "InvalidParameter"), False, Code.TARGET_REJECTED, False),
        (refused(409, "Conflict", "nothing known"), False, Code.TARGET_REJECTED, False),
        (refused(409, "OperationNotAllowed", "The operation requires the VM to be running"), False, Code.MACHINE_NOT_RUNNING, True),
        # the cloud's own trouble
        (refused(500, "InternalServerError"), False, Code.TARGET_UNREACHABLE, True),
        (refused(503, "Unheard", "x"), False, Code.TARGET_UNREACHABLE, True),
        (refused(200, "InternalExecutionError"), True, Code.TARGET_OPERATION_FAILED, True),
        (refused(200, "", "The disk could not be written"), True, Code.TARGET_OPERATION_FAILED, True),
        (HttpResponseError(response=Response(502, "<html>Bad Gateway</html>")), False, Code.TARGET_UNREACHABLE, True),  # type: ignore[arg-type]
        # no answer
        (ServiceRequestError("Cannot connect"), False, Code.TARGET_UNREACHABLE, True),
        (ServiceResponseError("reset"), False, Code.TARGET_UNREACHABLE, True),
        (DecodeError("not JSON"), False, Code.TARGET_UNREACHABLE, True),
        (TimeoutError(), False, Code.TARGET_UNREACHABLE, True),
        # sign-in
        (ClientAuthenticationError("AADSTS7000215: Invalid client secret"), False, Code.ACCESS_DENIED, False),
        (ClientAuthenticationError("down", response=Response(503, "")), False, Code.TARGET_UNREACHABLE, True),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_what_azure_says_and_what_we_make_of_it(
    error: BaseException, late: bool, code: Code, retryable: bool
) -> None:
    found = classify(error, doing="doing this", subject="web1", late=late)
    assert (found.code, found.retryable) == (code, retryable)
    assert "doing this" in found.info.message
    assert found.info.subject == "web1"


@settings(max_examples=50, deadline=None)
@given(
    status=st.one_of(st.none(), st.integers(100, 599)),
    code=st.one_of(st.sampled_from(sorted(CODES)), st.text(max_size=40)),
    message=st.text(max_size=200),
    after=st.one_of(st.none(), st.text(max_size=30)),
    late=st.booleans(),
)
def test_every_answer_becomes_an_error_that_can_travel(
    status: int | None, code: str, message: str, after: str | None, late: bool
) -> None:
    headers = {} if after is None else {"Retry-After": after}
    body = {"error": {"code": code, "message": message}}
    error = HttpResponseError(response=None if status is None else Response(status, body, headers))  # type: ignore[arg-type]
    found = classify(error, doing="x", late=late)
    assert found.code in CATALOGUE
    assert found.retry_after is None or found.retry_after >= 0
    json.dumps(found.info.to_dict())


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(sorted(CODES)), st.sampled_from([200, 400, 404, 409, 412, 500]), st.booleans())
def test_a_known_code_decides_whatever_status_or_case(code: str, status: int, late: bool) -> None:
    kinds = {
        classify(refused(status, c), doing="x", late=late).code for c in (code, code.upper(), code.title())
    }
    assert kinds == {CODES[code]}


def test_azures_words_are_kept() -> None:
    found = classify(
        refused(409, "SkuNotAvailable", "No such size here.", headers={"x-ms-request-id": "r-1"}), doing="x"
    )
    assert found.info.details == {
        "azure_code": "SkuNotAvailable", "azure_message": "No such size here.", "status": 409, "request_id": "r-1",
    }  # fmt: skip
    assert "SkuNotAvailable" in found.info.message


def test_quota_in_numbers() -> None:
    found = classify(refused(409, "OperationNotAllowed", QUOTA), doing="x")
    assert (
        found.info.details | {"limit": 10, "usage": 8, "required": 4, "quota": "Total Regional Cores"}
        == found.info.details
    )
    assert quota_numbers("nothing") == {}


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "17"}, 17.0),
        ({"Retry-After": " 0 "}, 0.0),
        ({"retry-after-ms": "1500"}, 1.5),
        ({"x-ms-retry-after-ms": "200", "Retry-After": "9"}, 0.2),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "-5"}, None),
        ({}, None),
    ],
)
def test_how_long_azure_asks_to_wait(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds


def test_a_date_to_wait_for() -> None:
    at = datetime.now(UTC) + timedelta(seconds=60)
    found = retry_after({"Retry-After": format_datetime(at, usegmt=True)})
    assert found is not None
    assert 55 < found <= 61
    assert retry_after({"Retry-After": format_datetime(at - timedelta(days=1), usegmt=True)}) == 0


SECRET = st.text(alphabet="abcdefABCDEF0123456789", min_size=8, max_size=40)


@settings(max_examples=50, deadline=None)
@given(SECRET)
def test_no_secret_passes(secret: str) -> None:
    for text in (
        f"https://a.blob/x?sv=1&sig={secret}%3D&se=2",
        f"AccountKey={secret}==;EndpointSuffix=x",
        f'{{"access_token": "{secret}"}}',
        f"client_secret={secret}&grant_type=x",
        f"Authorization: Bearer {secret}",
        f"SharedKey account:{secret}=",
        f"token eyJ0eXAiOiJKV1Qi.{secret}.x",
    ):
        assert secret not in scrub(text)
        found = classify(refused(400, "InvalidParameter", text), doing="x")
        assert secret not in json.dumps(found.info.to_dict())


def test_what_is_missing_and_what_is_wrong_around_it() -> None:
    assert is_missing(refused(404, "ResourceNotFound"))
    assert is_missing(refused(400, "InvalidResourceReference"))
    assert is_missing(HttpResponseError(response=Response(404, "")))  # type: ignore[arg-type]
    assert not is_missing(refused(404, "ResourceGroupNotFound"))
    assert not is_missing(ServiceRequestError("x"))


def test_a_strange_exception_is_read_without_fuss() -> None:
    assert said(AzureError("odd")).message == "odd"
    assert classify(KeyError("x"), doing="y").code is Code.INTERNAL
