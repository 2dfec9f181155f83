"""vSphere as a source of protected machines: public interfaces only (Web Services API and the datastore browser).

client      session, login and renewal, bulk reads, property watches, own task waiter
inventory   which machine a person means by a name, a path or an id
machine     one machine as it was read, and what follows from it
readiness   which machines and disks qualify, as findings
areas       windows of changed-block answers, checked for coverage (pure)
descriptor  the text descriptor of a virtual disk (pure)
folder      byte ranges out of the datastore browser
source      snapshots, resync rules, reads: fills `replication.ports.Source`
adapter     `VSphereSite`: fills `providers.ports.SourceSite`
errors      every failure becomes a FarshoreError of the catalogue

May import domain, replication.ports, providers.ports and pyVmomi. Nothing here was run against a real vCenter.
"""

from farshore.providers.vsphere.adapter import VSphereSite
from farshore.providers.vsphere.settings import VSphereSettings

__all__ = ["VSphereSettings", "VSphereSite"]
