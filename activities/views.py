"""From the domain's and the ports' values to what goes over the wire, and back."""

from __future__ import annotations

from farshore.activities.messages import OwnedCall
from farshore.contract.runs import PointView, ResourceView
from farshore.domain.points import RecoveryPoint
from farshore.plans.model import MachinePlan
from farshore.providers.ports import Owner, Purpose, Resource, TargetNic, TargetSpec


def point_view(point: RecoveryPoint) -> PointView:
    """A point as results show it."""
    return PointView(
        id=point.id,
        machine=point.machine,
        cycle=point.cycle,
        taken_at=point.taken_at,
        consistency=point.consistency.value,
        final=point.final,
        size_bytes=point.size_bytes,
    )


def resource_view(resource: Resource) -> ResourceView:
    """A resource as results show it."""
    return ResourceView(id=resource.id, kind=resource.kind, name=resource.name)


def resource(view: ResourceView) -> Resource:
    """Back to the port's form."""
    return Resource(id=view.id, kind=view.kind, name=view.name)


def purpose(test: bool) -> Purpose:
    """Test and failover never meet."""
    return Purpose.TEST if test else Purpose.FAILOVER


def owner(call: OwnedCall) -> Owner:
    """Who the resources of this call belong to."""
    return Owner(plan=call.plan, run=call.run, machine=call.machine, purpose=purpose(call.test))


def target_spec(machine: str, settings: MachinePlan, network: str, *, test: bool) -> TargetSpec:
    """What the plan says of a machine, as the target's port wants it. A test gets no public address."""
    t = settings.target
    nic = TargetNic(
        network=network,
        subnet=t.subnet,
        address=t.address,
        public=t.public and not test,
        security_group=t.security_group,
    )
    return TargetSpec(
        machine=machine,
        name=t.name or machine,
        size=t.size,
        os=t.os,
        firmware=t.firmware,
        zone=t.zone,
        nics=(nic,),
        tags=dict(t.tags),
    )
