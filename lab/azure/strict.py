"""Requests are read as strictly as Azure reads them: a name or type that the model does not know is refused."""

from __future__ import annotations

from farshore.lab.azure import wheel_schema
from farshore.lab.azure.model import ArmError, Json, Route
from farshore.lab.azure.routes import TABLE

_CODES = {
    "compute": "BadRequest",
    "network": "InvalidRequestFormat",
    "resource.resources": "InvalidRequestContent",
}
_OWN_CHECKS = (": missing", ": null")
"""What the providers answer for themselves, with better codes; explicit nulls are taken as absent."""


def check(route: Route, body: Json) -> None:
    """Raises: ArmError 400 naming the first member that does not fit the SDK's model of this request."""
    if route.body is None or not body:
        return
    found = wheel_schema.problems(route.package, route.body, body)
    wrong = [line for line in found if not line.endswith(_OWN_CHECKS)]
    if wrong:
        raise ArmError(
            400,
            _CODES[route.package],
            f"The request content was invalid and could not be deserialized: {'; '.join(wrong[:5])}.",
        )


def warm() -> None:
    """Load the models once, off the event loop: importing them takes a second or two."""
    for entry in TABLE:
        if entry.route.body is not None:
            wheel_schema.problems(entry.route.package, entry.route.body, {})
