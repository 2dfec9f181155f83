"""How JSON becomes objects and errors become readable failures. The same converter in client, worker and replayer.

Two corrections to the SDK's defaults (measured in the reference, temporal.md §5): an input that does not fit ends the
workflow at once with a list of fields instead of leaving it running for ever, and an error of ours is shown without
a stack trace, which would tell the person on call nothing.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from temporalio.api.common.v1 import Payload
from temporalio.api.failure.v1 import Failure
from temporalio.contrib.pydantic import PydanticJSONPlainPayloadConverter, ToJsonOptions
from temporalio.converter import (
    CompositePayloadConverter,
    DataConverter,
    DefaultFailureConverter,
    DefaultPayloadConverter,
    JSONPlainPayloadConverter,
    PayloadConverter,
)
from temporalio.exceptions import ApplicationError

from farshore.domain.errors import CATALOGUE, Code

_SECRET_WORDS = ("secret", "password", "token", "key")


def explain(error: ValidationError) -> str:
    """The fields that are wrong, what they were and what would be right."""
    parts: list[str] = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"]) or "input"
        got = ""
        if item["type"] != "missing" and not any(word in where.lower() for word in _SECRET_WORDS):
            shown = repr(item["input"])
            got = f" (got {shown[:77] + '…' if len(shown) > 78 else shown})"
        text = {
            "missing": "is required",
            "extra_forbidden": "is not a known field",
        }.get(item["type"], item["msg"])
        parts.append(f"{where}: {text}{got}")
    return f"{error.title} is not valid — " + "; ".join(parts)


class _ExplainingJson(PydanticJSONPlainPayloadConverter):
    def from_payload(self, payload: Payload, type_hint: type | None = None) -> Any:
        try:
            return super().from_payload(payload, type_hint)
        except ValidationError as error:
            entry = CATALOGUE[Code.INVALID_INPUT]
            fields = [
                {"field": ".".join(map(str, item["loc"])), "problem": item["msg"]}
                for item in error.errors(include_url=False, include_input=False, include_context=False)
            ]
            raise ApplicationError(
                f"{explain(error)}. {entry.action}", fields, type=Code.INVALID_INPUT.value, non_retryable=True
            ) from None
        except ValueError as error:  # not JSON at all
            raise ApplicationError(
                f"The input is not valid JSON: {error}. {CATALOGUE[Code.INVALID_INPUT].action}",
                type=Code.INVALID_INPUT.value,
                non_retryable=True,
            ) from None


class FarshorePayloadConverter(CompositePayloadConverter):
    """The SDK's composite, with our JSON half."""

    def __init__(self) -> None:
        json_half = _ExplainingJson(ToJsonOptions(exclude_unset=False))
        super().__init__(
            *(
                json_half if isinstance(c, JSONPlainPayloadConverter) else c
                for c in DefaultPayloadConverter.default_encoding_payload_converters
            )
        )


_OURS = {code.value for code in Code} - {Code.INTERNAL.value}


class FarshoreFailureConverter(DefaultFailureConverter):
    """Leaves the stack trace out of errors that are ours, in the whole chain of causes."""

    def to_failure(
        self, exception: BaseException, payload_converter: PayloadConverter, failure: Failure
    ) -> None:
        super().to_failure(exception, payload_converter, failure)
        link = failure
        seen_ours = False
        while True:
            if link.HasField("application_failure_info") and link.application_failure_info.type in _OURS:
                seen_ours = True
            if not link.HasField("cause"):
                break
            link = link.cause
        if seen_ours:
            link = failure
            while True:
                link.stack_trace = ""
                if not link.HasField("cause"):
                    break
                link = link.cause


data_converter = DataConverter(
    payload_converter_class=FarshorePayloadConverter,
    failure_converter_class=FarshoreFailureConverter,
)
