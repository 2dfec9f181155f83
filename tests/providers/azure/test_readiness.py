"""What a check finds before a run, against the laboratory Azure, and its rules by themselves."""

from __future__ import annotations

import ipaddress

import pytest
from azure.mgmt.network import models as nm
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.domain.errors import Code
from farshore.providers.azure.adapter import AzureSite
from farshore.providers.azure.readiness import Size, address_problem, check_quota, check_sizes
from farshore.providers.ports import Finding, Purpose, Severity, TargetNic

from .bench import Azure, World


def codes(findings: list[Finding]) -> list[str]:
    return [f.code for f in findings if f.severity is Severity.ERROR]


async def test_a_good_plan_has_no_findings_and_nothing_is_changed(
    site: AzureSite, cloud: Azure, world: World
) -> None:
    spec = world.spec(nics=(TargetNic("dr-vnet", "db", "10.20.3.250"), TargetNic("dr-vnet", "web")), zone="3")
    mark = cloud.last_request()
    assert await site.check([spec], purpose=Purpose.FAILOVER) == []
    assert {r.method for r in cloud.control.requests(mark) if r.operation != "entra.token"} == {"GET"}


@pytest.mark.parametrize(
    ("nic", "code", "text"),
    [
        (TargetNic("nowhere", "web"), Code.NETWORK_NOT_FOUND, "nowhere"),
        (TargetNic("dr-vnet", "nowhere"), Code.NETWORK_NOT_FOUND, "nowhere"),
        (TargetNic("dr-vnet", "web", security_group="gone"), Code.NETWORK_NOT_FOUND, "gone"),
        (TargetNic("dr-vnet", "web", "10.20.9.9"), Code.INVALID_INPUT, "lies outside 10.20.1.0/24"),
        (TargetNic("dr-vnet", "web", "10.20.1.3"), Code.INVALID_INPUT, "keeps for itself"),
        (TargetNic("dr-vnet", "web", "not-an-ip"), Code.INVALID_INPUT, "not an IP address"),
    ],
)
async def test_networks_and_addresses_of_the_plan(
    site: AzureSite, world: World, nic: TargetNic, code: Code, text: str
) -> None:
    (finding,) = await site.check([world.spec(nics=(nic,))], purpose=Purpose.FAILOVER)
    assert (finding.severity, finding.code, finding.subject) == (
        Severity.ERROR,
        code.value,
        f"web-{world.tag}",
    )
    assert text in finding.message
    assert finding.action


async def test_an_address_that_somebody_has(site: AzureSite, world: World) -> None:
    nic = TargetNic("dr-vnet", "app", "10.20.2.251")
    await site.create_nic(world.owner("holder"), world.spec("holder"), 0, nic)
    (finding,) = await site.check([world.spec(nics=(nic,))], purpose=Purpose.FAILOVER)
    assert finding.code == Code.ADDRESS_IN_USE.value
    assert "10.20.2.251" in finding.message
    await site.remove(purpose=Purpose.FAILOVER, machine=f"holder-{world.tag}", checkpoint=lambda _: None)


async def test_an_address_that_the_plan_gives_twice(site: AzureSite, world: World) -> None:
    nic = TargetNic("dr-vnet", "db", "10.20.3.249")
    found = await site.check(
        [world.spec("a", nics=(nic,)), world.spec("b", nics=(nic,))], purpose=Purpose.FAILOVER
    )
    assert [(f.code, f.subject) for f in found] == [(Code.ADDRESS_IN_USE.value, f"b-{world.tag}")]


async def test_sizes_that_the_location_lacks_or_refuses(site: AzureSite, cloud: Azure, world: World) -> None:
    cloud.control.short_of("Standard_D2s_v5", listed=True)
    cloud.control.short_of("Standard_D4s_v5", zone="2", listed=True)
    found = await site.check(
        [
            world.spec("a", size="Standard_Nope"),
            world.spec("b", size="Standard_D2s_v5"),
            world.spec("c", size="standard_d4s_v5", zone="2"),
            world.spec("d", size="standard_d4s_v5", zone="1"),
        ],
        purpose=Purpose.FAILOVER,
    )
    assert [(f.subject.split("-")[0], f.code) for f in found] == [
        ("a", "InvalidInput"), ("b", "CapacityExhausted"), ("c", "CapacityExhausted"),
    ]  # fmt: skip


async def test_quota_is_checked_for_all_machines_together(
    site: AzureSite, cloud: Azure, world: World
) -> None:
    await site.remove(purpose=Purpose.TEST, plan=world.owner().plan, checkpoint=lambda _: None)
    used = next(
        u.current_value
        for u in [u async for u in site._clients.compute.usage.list("westeurope")]
        if u.name.value == "cores"
    )
    cloud.control.quota("westeurope", cores=used + 6, standardESv5Family=7)
    one = world.spec("a", size="Standard_E4s_v5")
    assert await site.check([one], purpose=Purpose.FAILOVER) == []
    found = await site.check([one, world.spec("b", size="Standard_E4s_v5")], purpose=Purpose.FAILOVER)
    assert [f.code for f in found] == ["QuotaExceeded", "QuotaExceeded"]
    assert "8 needed, 6 left" in found[0].message
    assert "standardesv5family" in found[1].message


async def test_names_that_are_taken(site: AzureSite, world: World) -> None:
    await world.machine(site)
    (finding,) = await site.check([world.spec()], purpose=Purpose.FAILOVER)
    assert finding.code == Code.NAME_TAKEN.value
    assert f"run-{world.tag}" in finding.message
    assert finding.severity.value == "warning", "a rerun of the same machine replaces it"
    assert await site.check([world.spec()], purpose=Purpose.TEST) == []  # a test has its own name


async def test_names_that_azure_refuses_or_the_plan_gives_twice(site: AzureSite, world: World) -> None:
    found = await site.check(
        [
            world.spec("a", name="no good_name"),
            world.spec("b", name=f"x-{world.tag}"),
            world.spec("c", name=f"X-{world.tag}"),
        ],
        purpose=Purpose.FAILOVER,
    )
    assert [f.code for f in found] == ["InvalidInput", "NameTaken"]


async def test_a_public_address_in_a_test_is_a_warning(site: AzureSite, world: World) -> None:
    spec = world.spec(nics=(TargetNic("dr-vnet", "web", public=True),))
    assert await site.check([spec], purpose=Purpose.FAILOVER) == []
    (finding,) = await site.check([spec], purpose=Purpose.TEST)
    assert finding.severity is Severity.WARNING


SUBNET = nm.Subnet(name="s", properties=nm.SubnetPropertiesFormat(address_prefix="10.0.0.0/28"))


@settings(max_examples=50, deadline=None)
@given(st.integers(min_value=0, max_value=2**32 - 1))
def test_an_address_is_good_exactly_when_it_is_inside_and_not_reserved(number: int) -> None:
    address = ipaddress.IPv4Address(number)
    good = int(ipaddress.ip_address("10.0.0.4")) <= number <= int(ipaddress.ip_address("10.0.0.14"))
    assert (address_problem(str(address), SUBNET) == "") is good


@pytest.mark.parametrize("last", range(16))
def test_every_address_of_a_small_subnet(last: int) -> None:
    assert (address_problem(f"10.0.0.{last}", SUBNET) == "") is (4 <= last <= 14)


def size(name: str = "S", family: str = "F", cores: int = 2, **more: object) -> Size:
    values: dict[str, object] = {
        "max_nics": None, "generations": frozenset({"V1", "V2"}), "zones": frozenset({"1"}), "refused": "",
        "refused_zones": frozenset(), **more,
    }  # fmt: skip
    return Size(name, family, cores, **values)  # type: ignore[arg-type]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 10))
def test_quota_is_exceeded_exactly_when_use_and_need_pass_the_limit(
    used: int, limit: int, count: int
) -> None:
    from farshore.providers.ports import TargetSpec

    specs = [TargetSpec(str(n), str(n), "s", "linux", "efi", None, ()) for n in range(count)]
    found = check_quota(specs, {"s": size()}, {"cores": (used, limit)}, "here")
    assert bool(found) is (used + 2 * count > limit)


def test_firmware_and_number_of_interfaces_have_to_suit_the_size() -> None:
    from farshore.providers.ports import TargetSpec

    nics = (TargetNic("n", "s"), TargetNic("n", "s"))
    spec = TargetSpec("m", "m", "s", "linux", "efi", None, nics)
    found = check_sizes([spec], {"s": size(max_nics=1, generations=frozenset({"V1"}))}, "here")
    assert len(found) == 2
    assert "EFI" in found[1].message
