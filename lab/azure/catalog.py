"""Machine sizes, SKUs, usages: what a location offers, and what the subscription has used up."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass

from farshore.lab.azure.model import DISK, NIC, PUBLIC_IP, VM, VNET, Answer, ArmError, Call, Json, sub
from farshore.lab.azure.paging import page
from farshore.lab.azure.world import LOCATIONS, World


@dataclass(frozen=True)
class Size:
    """One virtual machine size."""

    name: str
    family: str
    cores: int
    memory_gb: float
    data_disks: int
    generations: str = "V1,V2"


SIZES = {
    size.name.lower(): size
    for size in (
        Size("Standard_B1s", "standardBSFamily", 1, 1, 2),
        Size("Standard_B1ms", "standardBSFamily", 1, 2, 2),
        Size("Standard_B2s", "standardBSFamily", 2, 4, 4),
        Size("Standard_B2ms", "standardBSFamily", 2, 8, 4),
        Size("Standard_B4ms", "standardBSFamily", 4, 16, 8),
        *(
            Size(f"Standard_D{n}s_v3", "standardDSv3Family", n, 4 * n, min(32, 2 * n))
            for n in (2, 4, 8, 16, 32)
        ),
        *(
            Size(f"Standard_D{n}s_v5", "standardDSv5Family", n, 4 * n, min(32, 2 * n))
            for n in (2, 4, 8, 16, 32)
        ),
        *(
            Size(f"Standard_D{n}as_v5", "standardDASv5Family", n, 4 * n, min(32, 2 * n))
            for n in (2, 4, 8, 16, 32)
        ),
        *(
            Size(f"Standard_E{n}s_v5", "standardESv5Family", n, 8 * n, min(32, 2 * n))
            for n in (2, 4, 8, 16, 32)
        ),
        *(
            Size(f"Standard_F{n}s_v2", "standardFSv2Family", n, 2 * n, min(32, 2 * n))
            for n in (2, 4, 8, 16, 32)
        ),
    )
}
DEFAULT_LIMITS = {"cores": 100, "virtualMachines": 25_000}
_DEFAULT_FAMILY_LIMIT = 100
_ZONES = ("1", "2", "3")


def size_of(name: str, location: str) -> Size:
    """Raises: ArmError 400 for a size that doesn't exist."""
    found = SIZES.get(name.lower())
    if found is None:
        raise ArmError(
            400,
            "InvalidParameter",
            f"The value {name} provided for the VM size is not valid. The valid sizes in the current region "
            f"'{location}' are: {', '.join(size.name for size in SIZES.values())}.",
        )
    return found


def limit(world: World, location: str, name: str) -> int:
    table = world.knobs.quota.get(location, {})
    return table.get(name, DEFAULT_LIMITS.get(name, _DEFAULT_FAMILY_LIMIT))


def used(world: World, location: str, *, without: str = "") -> dict[str, int]:
    """Machines and cores by family. A Failed or deallocated machine counts until it is deleted."""
    out: dict[str, int] = {"cores": 0, "virtualMachines": 0}
    for vm in world.store.of_type(VM):
        if vm.location != location or vm.key == without:
            continue
        size = SIZES[str(sub(vm.properties, "hardwareProfile")["vmSize"]).lower()]
        out["virtualMachines"] += 1
        out["cores"] += size.cores
        out[size.family] = out.get(size.family, 0) + size.cores
    return out


def check_quota(world: World, location: str, size: Size, *, without: str = "") -> None:
    """Raises: ArmError 409 OperationNotAllowed in the words that carry limit, usage and need (B.4)."""
    usage = used(world, location, without=without)
    for name, title in (("cores", "Total Regional Cores"), (size.family, f"{size.family} Cores")):
        ceiling, now = limit(world, location, name), usage.get(name, 0)
        if now + size.cores > ceiling:
            raise ArmError(
                409,
                "OperationNotAllowed",
                f"Operation could not be completed as it results in exceeding approved {title} quota. "
                f"Additional details - Deployment Model: Resource Manager, Location: {location}, Current Limit: {ceiling}, "
                f"Current Usage: {now}, Additional Required: {size.cores}, (Minimum) New Limit Required: "
                f"{now + size.cores}. Submit a request for quota increase.",
            )


def shortage(world: World, location: str, size: Size, zone: str | None, when: str) -> ArmError | None:
    """What the capacity table says of this machine at this moment."""
    for entry in world.knobs.capacity:
        if entry.when != when or entry.location.lower() != location or entry.remaining == 0:
            continue
        if entry.zone not in {"*", zone}:
            continue
        if not fnmatch.fnmatchcase(size.name.lower(), entry.size.lower()):
            continue
        if entry.remaining is not None:
            entry.remaining -= 1
            world.store.set_setting("knobs", world.knobs.to_json())
        where = f"location '{location}'" + (f", zone '{zone}'" if zone else "")
        return ArmError(
            409, entry.code, f"The requested VM size '{size.name}' is currently not available in {where} ({entry.code}). "
            "Try another size or deploy to a different location or zone.",
        )  # fmt: skip
    return None


def usages(world: World, call: Call) -> Answer:
    """GET …/locations/{location}/usages of Microsoft.Compute."""
    location = _location(call)
    usage = used(world, location)
    names = {"cores": "Total Regional vCPUs", "virtualMachines": "Virtual Machines"}
    names |= {size.family: f"{size.family} vCPUs" for size in SIZES.values()}
    rows = [
        {"unit": "Count", "currentValue": usage.get(name, 0), "limit": limit(world, location, name),
         "name": {"value": name, "localizedValue": title}}
        for name, title in names.items()
    ]  # fmt: skip
    return page(world, call, rows)


def network_usages(world: World, call: Call) -> Answer:
    location = _location(call)
    rows: list[Json] = []
    for name, type_, ceiling in (
        ("VirtualNetworks", VNET, 1000),
        ("NetworkInterfaces", NIC, 65_536),
        ("PublicIPAddresses", PUBLIC_IP, 1000),
    ):
        now = sum(r.location == location for r in world.store.of_type(type_))
        rows.append({"id": f"/subscriptions/{world.subscription}/providers/Microsoft.Network/locations/{location}/usages/{name}",
                     "unit": "Count", "currentValue": now, "limit": ceiling,
                     "name": {"value": name, "localizedValue": name}})  # fmt: skip
    return page(world, call, rows)


def _location(call: Call) -> str:
    location = call.get("location").replace(" ", "").lower()
    if location not in LOCATIONS:
        raise ArmError(
            400,
            "NoRegisteredProviderFound",
            f"No registered resource provider found for location '{location}'.",
        )
    return location


_BY_LOCATION = re.compile(r"^\s*location\s+eq\s+'([^']+)'\s*$", re.IGNORECASE)


def skus(world: World, call: Call) -> Answer:
    """GET …/skus; the only filter is by location."""
    text, wanted = call.query.get("$filter") or "", list(LOCATIONS)
    if text:
        found = _BY_LOCATION.match(text)
        if found is None:
            raise ArmError(400, "InvalidParameter", f"The filter '{text}' is not supported.")
        wanted = [place for place in LOCATIONS if place == found[1].replace(" ", "").lower()]
    rows = [row for place in wanted for row in _skus_at(world, place)]
    return page(world, call, rows)


def _skus_at(world: World, location: str) -> list[Json]:
    rows: list[Json] = []
    for size in SIZES.values():
        rows.append(
            {
                "resourceType": "virtualMachines",
                "name": size.name,
                "tier": "Standard",
                "size": size.name.split("_", 1)[1],
                "family": size.family,
                "locations": [location],
                "locationInfo": [{"location": location, "zones": list(_ZONES), "zoneDetails": []}],
                "capabilities": [
                    {"name": "vCPUs", "value": str(size.cores)},
                    {"name": "MemoryGB", "value": f"{size.memory_gb:g}"},
                    {"name": "MaxDataDiskCount", "value": str(size.data_disks)},
                    {"name": "HyperVGenerations", "value": size.generations},
                    {"name": "CpuArchitectureType", "value": "x64"},
                    {"name": "PremiumIO", "value": "True"},
                ],
                "restrictions": _restrictions(world, location, size),
            }
        )
    for name in ("Standard_LRS", "StandardSSD_LRS", "Premium_LRS"):
        rows.append(
            {"resourceType": DISK.split("/")[1], "name": name, "tier": name.split("_")[0], "locations": [location],
             "locationInfo": [{"location": location, "zones": list(_ZONES), "zoneDetails": []}],
             "capabilities": [], "restrictions": []}
        )  # fmt: skip
    return rows


def _restrictions(world: World, location: str, size: Size) -> list[Json]:
    out: list[Json] = []
    for entry in world.knobs.capacity:
        if (
            entry.listed
            and entry.location.lower() == location
            and fnmatch.fnmatchcase(size.name.lower(), entry.size.lower())
        ):
            zonal = entry.zone != "*"
            out.append(
                {"type": "Zone" if zonal else "Location", "values": [location],
                 "restrictionInfo": {"locations": [location], **({"zones": [entry.zone]} if zonal else {})},
                 "reasonCode": "NotAvailableForSubscription"}
            )  # fmt: skip
    return out


def sizes(world: World, call: Call) -> Answer:
    """GET …/locations/{location}/vmSizes."""
    _location(call)
    rows = [
        {"name": size.name, "numberOfCores": size.cores, "osDiskSizeInMB": 1_047_552, "resourceDiskSizeInMB": 0,
         "memoryInMB": int(size.memory_gb * 1024), "maxDataDiskCount": size.data_disks}
        for size in SIZES.values()
    ]  # fmt: skip
    return page(world, call, rows)
