"""The laboratory's routes are those of the installed SDK."""

from __future__ import annotations

import re

import pytest

from farshore.lab.azure import routes, wheel_contract, wheel_schema

SERVED = [entry.route for entry in routes.TABLE]
FROM_WHEELS = [r for r in SERVED if r.package in wheel_contract.PACKAGES]


def test_all_but_storage_and_polling_comes_from_a_wheel() -> None:
    by_hand = {r.operation for r in SERVED if r not in FROM_WHEELS}
    assert {name for name in by_hand if not name.startswith("storage.")} == {
        routes.LRO_STATUS,
        routes.LRO_RESULT,
    }
    assert len(FROM_WHEELS) >= 80


def test_every_route_agrees_with_the_sdk_in_method_url_version_codes_and_body() -> None:
    wrong: list[str] = []
    for route in FROM_WHEELS:
        contract = wheel_contract.of(route.operation)
        assert contract is not None, route.operation
        for what, ours, theirs in (
            ("method", route.method, contract.method),
            ("URL", route.template, contract.url),
            ("api-version", route.api_version, contract.api_version),
            ("body", route.body, contract.body),
        ):
            if ours != theirs:
                wrong.append(f"{route.operation}: {what} is {ours}, the SDK's {theirs}")
        if not set(route.codes) <= set(contract.codes):
            wrong.append(f"{route.operation}: answers {route.codes}, the SDK accepts {contract.codes}")
        if 202 in route.codes and not contract.lro:
            wrong.append(f"{route.operation}: answers 202, but the SDK does not poll")
    assert not wrong, "\n".join(wrong)


def test_only_machines_take_preconditions() -> None:
    conditional = {
        r.operation for r in FROM_WHEELS if (found := wheel_contract.of(r.operation)) and found.etag
    }
    assert conditional == {"compute.VirtualMachines.create_or_update", "compute.VirtualMachines.update"}


def test_paths_are_found_whatever_their_case() -> None:
    path = "/SUBSCRIPTIONS/s/ResourceGroups/g/PROVIDERS/microsoft.compute/DISKS/d"
    found = routes.find("GET", path)
    assert found is not None
    assert found[0].route.operation == "compute.Disks.get"
    assert found[1] == {"subscriptionId": "s", "resourceGroupName": "g", "diskName": "d"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "least"), [("compute", 300), ("network", 800), ("resource.resources", 40)]
)
def test_every_operation_of_the_wheels_can_be_read(package, least) -> None:
    everything = wheel_contract.operations(package)
    assert len(everything) >= least
    for route in FROM_WHEELS:
        if route.package == package:
            assert wheel_contract.of(route.operation) == everything[route.operation]


# the extraction fails on whatever it does not understand


SMALL = """
def build_things_get_request(**kwargs):
    api_version = kwargs.pop("api_version", _params.pop("api-version", "2026-01-01"))
    _url = "/things/{name}"
    _params["api-version"] = api_version
    return HttpRequest(method="GET", url=_url)

class ThingsOperations:
    def get(self, **kwargs):
        _request = build_things_get_request()
        if response.status_code not in [200]:
            error = _failsafe_deserialize(_models.Oops, response)
        return _deserialize(_models.Thing, response.json())
"""


def test_a_small_client_is_read_completely() -> None:
    (contract,) = wheel_contract.parse("toy", SMALL).values()
    assert contract == wheel_contract.Contract(
        name="toy.Things.get", method="GET", url="/things/{name}", api_version="2026-01-01", codes=(200,),
        query=("api-version",), etag=False, lro=False, lro_headers=(), body=None, response="Thing", paged=False, error="Oops",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda s: s.replace('_url = "/things/{name}"', "_url = somewhere()"), "no URL"),
        (lambda s: s.replace('method="GET"', "method=verb"), "no method"),
        (lambda s: s.replace("not in [200]", "!= 200"), "no accepted codes"),
        (
            lambda s: s.replace("_request = build_things_get_request()", "_request = other()"),
            "sends no request",
        ),
        (lambda s: s.replace("ThingsOperations", "ThingsStuff"), "builders without an operation"),
        (lambda s: s.replace("def get(", "def _get_initial("), "without its begin_"),
    ],
)
def test_an_unreadable_operation_is_an_error_not_a_gap(spoil, complaint) -> None:
    spoiled = spoil(SMALL)
    assert spoiled != SMALL
    with pytest.raises(wheel_contract.ContractError, match=re.escape(complaint)):
        wheel_contract.parse("toy", spoiled)


# the schema


GOOD = {"location": "westeurope", "properties": {"creationData": {"createOption": "Empty"}, "diskSizeGB": 1}}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"colour": "red"}, "Disk.colour: is not a member"),
        ({"location": 3}, "Disk.location: 3 is no str"),
        ({"zones": "1"}, "Disk.zones: not a list"),
        ({"tags": {"a": 1}}, "Disk.tags.a: 1 is no str"),
        (
            {"properties": {"creationData": {"createOption": "Magic"}}},
            "Disk.properties.creationData.createOption: 'Magic'",
        ),
        (
            {"properties": {"creationData": {"createOption": "Empty"}, "diskSizeGB": True}},
            "diskSizeGB: True is no int",
        ),
        ({"properties": {}}, "Disk.properties.creationData: missing"),
        (
            {"properties": {"creationData": {"createOption": "Empty"}, "timeCreated": "soon"}},
            "is no date and time",
        ),
    ],
)
def test_the_schema_finds_unknown_names_and_wrong_types(change, complaint) -> None:
    assert wheel_schema.problems("compute", "Disk", GOOD) == []
    assert any(complaint in line for line in wheel_schema.problems("compute", "Disk", {**GOOD, **change}))
