"""Pages with `nextLink`, as every list of the management plane has them."""

from __future__ import annotations

from urllib.parse import quote, urlencode

from farshore.lab.azure.model import Answer, ArmError, Call, Json
from farshore.lab.azure.world import World


def page(world: World, call: Call, rows: list[Json], *, top: str | None = None) -> Answer:
    """One page of `rows`; the skip token is the position."""
    token = call.query.get("$skiptoken") or "0"
    if not token.isdigit():
        raise ArmError(400, "InvalidSkipToken", f"The skip token '{token}' is invalid.")
    start, size = int(token), world.knobs.page_size
    if top is not None:
        if not top.isdigit() or int(top) < 1:
            raise ArmError(400, "InvalidTopQueryParameter", f"The $top '{top}' is invalid.")
        size = min(size, int(top))
    body: Json = {"value": rows[start : start + size]}
    if start + size < len(rows):
        query = {**call.query, "$skiptoken": str(start + size)}
        body["nextLink"] = f"{call.base}{quote(call.path)}?{urlencode(query)}"
    return Answer(200, body)
