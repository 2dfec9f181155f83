"""Names and tags are functions of plan, run and machine, valid for Azure, and unambiguous."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.domain.errors import Code, FarshoreError
from farshore.providers.azure import names
from farshore.providers.ports import Owner, Purpose, TargetSpec

TEXT = st.text(min_size=1, max_size=300)
MACHINE = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9-]{0,62}[A-Za-z0-9])?", fullmatch=True)
VALID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}")
PURPOSES = st.sampled_from(list(Purpose))
OWNERS = st.builds(Owner, plan=TEXT, run=TEXT, machine=TEXT, purpose=PURPOSES)


def spec(name: str) -> TargetSpec:
    return TargetSpec("m", name, "s", "linux", "efi", None, ())


@settings(max_examples=50, deadline=None)
@given(OWNERS, MACHINE, st.integers(0, 63))
def test_every_name_is_one_that_azure_takes(owner: Owner, name: str, index: int) -> None:
    made = [
        names.disk(owner, index),
        names.nic(owner, spec(name), index),
        names.public_address(owner, spec(name), index),
        names.test_network(owner),
    ]
    assert all(VALID.fullmatch(n) for n in made)
    assert len(set(made)) == len(made)
    assert len(names.machine(spec(name), owner.purpose)) <= 64
    assert names.staging_blob(owner, index).endswith(".vhd")


@settings(max_examples=50, deadline=None)
@given(MACHINE)
def test_a_test_and_a_failover_never_share_a_machine_name(name: str) -> None:
    assert names.machine(spec(name), Purpose.TEST) != names.machine(spec(name), Purpose.FAILOVER)


@settings(max_examples=50, deadline=None)
@given(TEXT, TEXT, TEXT)
def test_different_machines_have_different_disks(one: str, two: str, run: str) -> None:
    names_of = [names.disk(Owner("p", run, machine, Purpose.TEST), 0) for machine in (one, two)]
    assert (names_of[0] == names_of[1]) is (one == two)


@settings(max_examples=50, deadline=None)
@given(OWNERS, OWNERS)
def test_a_name_is_the_same_every_time(owner: Owner, other: Owner) -> None:
    assert names.disk(owner, 1) == names.disk(Owner(other.plan, owner.run, owner.machine, other.purpose), 1)


def test_names_people_will_see() -> None:
    owner = Owner("crm", "failover-crm-1", "web1", Purpose.FAILOVER)
    assert names.disk(owner, 0) == "web1-disk0-" + names.short("failover-crm-1")
    assert names.nic(owner, spec("web1"), 1) == "web1-nic1-" + names.short("failover-crm-1")
    test = Owner("crm", "t", "web1", Purpose.TEST)
    assert names.machine(spec("web1"), Purpose.TEST) == "web1-test"
    assert names.nic(test, spec("web1"), 0) == "web1-test-nic0-" + names.short("t")


@pytest.mark.parametrize("name", ["", "a b", "-a", "a-", "ä", "a" * 65, "a.b", "a/b"])
def test_a_machine_name_that_azure_refuses_is_refused_here(name: str) -> None:
    with pytest.raises(FarshoreError) as caught:
        names.machine(spec(name), Purpose.FAILOVER)
    assert caught.value.code is Code.INVALID_INPUT


@settings(max_examples=50, deadline=None)
@given(OWNERS, st.dictionaries(TEXT, TEXT, max_size=3))
def test_what_is_tagged_is_found_again_and_fits(owner: Owner, extra: dict[str, str]) -> None:
    tags = names.tags(owner, extra)
    assert all(len(value) <= 256 for value in tags.values())
    assert names.is_of(owner, tags)
    assert names.matches(tags, purpose=owner.purpose, plan=owner.plan, run=owner.run, machine=owner.machine)
    assert names.matches(
        {k.upper(): v for k, v in tags.items() if k.startswith("farshore")}, purpose=owner.purpose
    )


@settings(max_examples=50, deadline=None)
@given(OWNERS, OWNERS)
def test_tags_tell_owners_apart(one: Owner, two: Owner) -> None:
    assert names.is_of(one, names.tags(two)) is (one == two)


@settings(max_examples=50, deadline=None)
@given(OWNERS, TEXT)
def test_metadata_of_a_blob_carries_the_same_tags(owner: Owner, point: str) -> None:
    metadata = names.metadata(owner, point)
    assert all(re.fullmatch(r"[a-z_]+", name) for name in metadata)
    assert all(value.isascii() and value.isprintable() for value in metadata.values())
    assert names.is_of(owner, names.from_metadata(metadata))


def test_the_plans_own_tags_cannot_pass_for_farshores() -> None:
    owner = Owner("p", "r", "m", Purpose.TEST)
    assert names.tags(owner, {"Farshore-Run": "x", "farshore-purpose": "failover", "team": "t"}) == {
        **names.tags(owner),
        "team": "t",
    }


@pytest.mark.parametrize(
    "tags",
    [
        None,
        {},
        {"farshore-purpose": "test"},
        {"farshore-purpose": "test", "farshore-run": "r"},
        {"farshore-purpose": "test", "farshore-plan": "p"},
        {"farshore-run": "r", "farshore-plan": "p"},
        {"farshore-purpose": "failover", "farshore-run": "r", "farshore-plan": "p"},
        {"farshore-purpose": "TEST", "farshore-run": "r", "farshore-plan": "p"},
    ],
)
def test_half_tagged_is_not_ours(tags: dict[str, str] | None) -> None:
    assert not names.matches(tags, purpose=Purpose.TEST)
