"""The inventory tree around the machines: folders, data centres, clusters, hosts, pools, datastores, networks."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Any

from farshore.lab.vcenter.objects import Entity, Managed, wsdl
from farshore.lab.vcenter.vim import array, long, make_fault, utc, vim

if TYPE_CHECKING:
    from farshore.lab.vcenter.machine import Machine
    from farshore.lab.vcenter.service import LabVCenter

GIB = 1 << 30
DATASTORE_KINDS = {"vmfs": "VMFS", "nfs_whole": "NFS", "vsan": "vsan", "vvol": "VVOL"}
"""`nfs_whole` answers a change query with one area that covers all; `vsan` and `vvol` hold no readable extents."""


class Folder(Entity):
    vtype = vim.Folder

    def __init__(
        self, lab: LabVCenter, moid: str, name: str, parent: Entity | None, child_types: list[Any]
    ) -> None:
        super().__init__(lab, moid, name, parent)
        self.child_types = child_types
        self.entities: dict[str, Entity] = {}

    def children(self) -> list[Entity]:
        return list(self.entities.values())

    def p_childEntity(self) -> Any:
        return array(vim.ManagedEntity, [e.ref for e in self.children()])

    def p_childType(self) -> Any:
        return list(self.child_types)

    @wsdl
    def CreateFolder(self, name: str) -> Any:
        if any(e.name == name for e in self.children()):
            raise make_fault(
                "vim.fault.DuplicateName", f"The name '{name}' already exists.", name=name, object=self.ref
            )
        return self.lab.tree.add_folder(self, name).ref

    @wsdl
    def CreateVM_Task(self, config: Any, pool: Any, host: Any = None) -> Any:
        from farshore.lab.vcenter import provision

        return self.lab.tasks.start(
            self,
            "CreateVM_Task",
            lambda _task: provision.create_from_spec(self.lab, self, config).ref,
            exclusive=False,
        )

    @wsdl
    def RegisterVM_Task(
        self, path: str, name: str | None = None, asTemplate: bool = False, pool: Any = None, host: Any = None
    ) -> Any:
        from farshore.lab.vcenter import provision

        return self.lab.tasks.start(
            self,
            "RegisterVM_Task",
            lambda _task: provision.register(self.lab, self, path, name).ref,
            exclusive=False,
        )


class Datacenter(Entity):
    vtype = vim.Datacenter

    def __init__(self, lab: LabVCenter, moid: str, name: str, parent: Entity) -> None:
        super().__init__(lab, moid, name, parent)
        self.vm_folder: Folder
        self.host_folder: Folder
        self.datastore_folder: Folder
        self.network_folder: Folder
        self.datastores: dict[str, Datastore] = {}
        self.networks: dict[str, Network] = {}
        self.clusters: dict[str, Cluster] = {}

    def children(self) -> list[Entity]:
        return [self.vm_folder, self.host_folder, self.datastore_folder, self.network_folder]

    def p_vmFolder(self) -> Any:
        return self.vm_folder.ref

    def p_hostFolder(self) -> Any:
        return self.host_folder.ref

    def p_datastoreFolder(self) -> Any:
        return self.datastore_folder.ref

    def p_networkFolder(self) -> Any:
        return self.network_folder.ref

    def p_datastore(self) -> Any:
        return array(vim.Datastore, [d.ref for d in self.datastores.values()])

    def p_network(self) -> Any:
        return array(vim.Network, [n.ref for n in self.networks.values()])


class Datastore(Entity):
    vtype = vim.Datastore

    def __init__(self, lab: LabVCenter, moid: str, datacenter: Datacenter, item: dict[str, Any]) -> None:
        """`item`: name, kind, capacity_gb."""
        super().__init__(lab, moid, item["name"], datacenter.datastore_folder)
        self.datacenter = datacenter
        self.kind: str = item.get("kind", "vmfs")
        self.capacity = int(item.get("capacity_gb", 2048)) * GIB
        if self.kind not in DATASTORE_KINDS:
            raise ValueError(f"no datastore kind {self.kind!r}")
        self.uuid = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{lab.instance_uuid}/{moid}"))

    @property
    def has_extents(self) -> bool:
        """Whether extents can be read over /folder."""
        return self.kind not in ("vsan", "vvol")

    def _url(self) -> str:
        return f"ds:///vmfs/volumes/{self.uuid}/"

    def p_summary(self) -> Any:
        return vim.Datastore.Summary(
            datastore=self.ref,
            name=self.name,
            url=self._url(),
            capacity=long(self.capacity),
            freeSpace=long(self.capacity // 2),
            uncommitted=long(0),
            accessible=True,
            multipleHostAccess=True,
            type=DATASTORE_KINDS[self.kind],
            maintenanceMode="normal",
        )

    def p_info(self) -> Any:
        common: dict[str, Any] = {
            "name": self.name,
            "url": self._url(),
            "freeSpace": long(self.capacity // 2),
            "maxFileSize": long(64 << 40),
        }
        if self.kind == "vmfs":
            volume = vim.host.VmfsVolume(
                type="VMFS",
                name=self.name,
                capacity=long(self.capacity),
                blockSizeMb=1,
                maxBlocks=1,
                majorVersion=6,
                version="6.82",
                uuid=self.uuid,
                extent=[vim.host.ScsiDisk.Partition(diskName=f"naa.{self.uuid[:8]}", partition=1)],
                vmfsUpgradable=False,
            )
            return vim.host.VmfsDatastoreInfo(vmfs=volume, **common)
        return vim.Datastore.Info(**common)

    def p_host(self) -> Any:
        hosts = [h for c in self.datacenter.clusters.values() for h in c.hosts.values()]
        info = {"mountInfo": vim.host.MountInfo(accessMode="readWrite", path=self._url(), accessible=True)}
        return array(vim.Datastore.HostMount, [vim.Datastore.HostMount(key=h.ref, **info) for h in hosts])

    def p_vm(self) -> Any:
        return array(vim.VirtualMachine, [m.ref for m in self.lab.machines() if self in m.datastores()])

    def p_capability(self) -> Any:
        return vim.Datastore.Capability(
            directoryHierarchySupported=True,
            rawDiskMappingsSupported=self.kind == "vmfs",
            perFileThinProvisioningSupported=True,
        )


class Network(Entity):
    vtype = vim.Network

    def __init__(self, lab: LabVCenter, moid: str, name: str, datacenter: Datacenter) -> None:
        super().__init__(lab, moid, name, datacenter.network_folder)
        self.datacenter = datacenter

    def p_summary(self) -> Any:
        return vim.Network.Summary(network=self.ref, name=self.name, accessible=True)

    def p_host(self) -> Any:
        return array(
            vim.HostSystem, [h.ref for c in self.datacenter.clusters.values() for h in c.hosts.values()]
        )

    def p_vm(self) -> Any:
        return array(
            vim.VirtualMachine,
            [m.ref for m in self.lab.machines() if any(n["network"] == self.moid for n in m.nics)],
        )


class ResourcePool(Entity):
    vtype = vim.ResourcePool

    def __init__(self, lab: LabVCenter, moid: str, cluster: Cluster) -> None:
        super().__init__(lab, moid, "Resources", cluster)
        self.cluster = cluster

    def p_owner(self) -> Any:
        return self.cluster.ref

    def p_vm(self) -> Any:
        return array(vim.VirtualMachine, [m.ref for m in self.cluster.machines()])


class Cluster(Entity):
    vtype = vim.ClusterComputeResource

    def __init__(self, lab: LabVCenter, moid: str, name: str, datacenter: Datacenter) -> None:
        super().__init__(lab, moid, name, datacenter.host_folder)
        self.datacenter = datacenter
        self.hosts: dict[str, Host] = {}
        self.pool: ResourcePool

    def children(self) -> list[Entity]:
        return [self.pool, *self.hosts.values()]

    def machines(self) -> list[Machine]:
        return [m for m in self.lab.machines() if m.host.cluster is self]

    def p_host(self) -> Any:
        return array(vim.HostSystem, [h.ref for h in self.hosts.values()])

    def p_resourcePool(self) -> Any:
        return self.pool.ref

    def p_datastore(self) -> Any:
        return self.datacenter.p_datastore()

    def p_network(self) -> Any:
        return self.datacenter.p_network()

    def p_summary(self) -> Any:
        count = len(self.hosts)
        return vim.ClusterComputeResource.Summary(
            totalCpu=count * 32000,
            totalMemory=long(count * 256 * GIB),
            numCpuCores=count * 16,
            numCpuThreads=count * 32,
            effectiveCpu=count * 30000,
            effectiveMemory=long(count * 250 * 1024),
            numHosts=count,
            numEffectiveHosts=count,
            overallStatus="green",
            currentFailoverLevel=1,
            numVmotions=0,
        )


class Host(Entity):
    vtype = vim.HostSystem

    def __init__(self, lab: LabVCenter, moid: str, name: str, cluster: Cluster) -> None:
        super().__init__(lab, moid, name, cluster)
        self.cluster = cluster
        self.uuid = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{lab.instance_uuid}/{moid}"))

    def p_vm(self) -> Any:
        return array(vim.VirtualMachine, [m.ref for m in self.lab.machines() if m.host is self])

    def p_datastore(self) -> Any:
        return self.cluster.p_datastore()

    def p_network(self) -> Any:
        return self.cluster.p_network()

    def p_runtime(self) -> Any:
        return vim.host.RuntimeInfo(
            connectionState="connected",
            powerState="poweredOn",
            standbyMode="none",
            inMaintenanceMode=False,
            inQuarantineMode=False,
            bootTime=self.lab.started,
        )

    def p_hardware(self) -> Any:
        return vim.host.HardwareInfo(
            systemInfo=vim.host.SystemInfo(vendor="Farshore", model="Laboratory host", uuid=self.uuid),
            cpuInfo=vim.host.CpuInfo(
                numCpuPackages=2, numCpuCores=16, numCpuThreads=32, hz=long(2_000_000_000)
            ),
            cpuPkg=[
                vim.host.CpuPackage(
                    index=i,
                    vendor="intel",
                    hz=long(2_000_000_000),
                    busHz=long(100_000_000),
                    description="Laboratory CPU",
                    threadId=list(range(i * 16, i * 16 + 16)),
                    cpuFeature=[
                        vim.host.CpuIdInfo(
                            level=n,
                            eax="0000:0000:0000:0001:0000:0110:0101:0100",
                            ebx="0000:0000:0000:0000:0000:1000:0000:0000",
                            ecx="0000:0000:0000:0000:0000:0000:0000:0000",
                            edx="0010:0000:0000:0000:0000:0000:0000:0000",
                        )
                        for n in (0, 1, -2147483648, -2147483647)
                    ],
                )
                for i in range(2)
            ],
            memorySize=long(256 * GIB),
        )

    def p_summary(self) -> Any:
        return vim.host.Summary(
            host=self.ref,
            hardware=vim.host.Summary.HardwareSummary(
                vendor="Farshore",
                model="Laboratory host",
                uuid=self.uuid,
                memorySize=long(256 * GIB),
                cpuModel="Laboratory CPU",
                cpuMhz=2000,
                numCpuPkgs=2,
                numCpuCores=16,
                numCpuThreads=32,
                numNics=2,
                numHBAs=1,
            ),
            runtime=self.p_runtime(),
            config=vim.host.Summary.ConfigSummary(
                name=self.name, port=902, product=self.lab.about("VMware ESXi", "esx"), vmotionEnabled=True
            ),
            quickStats=vim.host.Summary.QuickStats(overallCpuUsage=100, overallMemoryUsage=1024),
            overallStatus="green",
            rebootRequired=False,
        )


class Tree:
    """Builds the tree from a configuration and finds things in it."""

    def __init__(self, lab: LabVCenter) -> None:
        self._lab = lab
        self.root = Folder(lab, "group-d1", "Datacenters", None, [vim.Folder, vim.Datacenter])
        lab.add(self.root)
        self.datacenters: dict[str, Datacenter] = {}

    def build(self, config: dict[str, Any]) -> None:
        """`config`: see `config.DEFAULT`. Numbers of objects follow from the order, so a restart gives the same."""
        for entry in config["datacenters"]:
            self.add_datacenter(entry)

    def add_folder(self, parent: Folder, name: str, moid: str | None = None) -> Folder:
        letter = "v" if vim.VirtualMachine in parent.child_types else "d"
        folder = Folder(
            self._lab, moid or f"group-{letter}{self._lab.next_number()}", name, parent, parent.child_types
        )
        self._place(folder, parent)
        if letter == "v":
            self._lab.store.put("folder", folder.moid, {"name": name, "parent": parent.moid})
        parent.touch()
        return folder

    def restore_folders(self) -> None:
        """Machine folders made by clients in earlier runs."""
        records = self._lab.store.all("folder")
        for moid in sorted(records, key=lambda m: int(m.lstrip("group-vd"))):
            parent = self._lab.find_moid(records[moid]["parent"])
            if isinstance(parent, Folder) and self._lab.find_moid(moid) is None:
                self._place(
                    Folder(self._lab, moid, records[moid]["name"], parent, parent.child_types), parent
                )

    def restore_kinds(self) -> None:
        """Datastore kinds set over the control API in earlier runs."""
        kinds: dict[str, str] = self._lab.store.get("lab", "datastore_kinds") or {}
        for datacenter in self.datacenters.values():
            for store in datacenter.datastores.values():
                store.kind = kinds.get(store.name, store.kind)

    def add_datacenter(self, entry: dict[str, Any]) -> Datacenter:
        lab = self._lab
        parent = self.root
        for part in [p for p in entry.get("folder", "").split("/") if p]:
            existing = next((f for f in parent.children() if f.name == part and isinstance(f, Folder)), None)
            parent = existing or self._child(parent, part)
        number = lab.next_static
        datacenter = Datacenter(lab, f"datacenter-{number()}", entry["name"], parent)
        self._place(datacenter, parent)
        datacenter.vm_folder = Folder(
            lab, f"group-v{number()}", "vm", datacenter, [vim.Folder, vim.VirtualMachine]
        )
        datacenter.host_folder = Folder(
            lab, f"group-h{number()}", "host", datacenter, [vim.Folder, vim.ComputeResource]
        )
        datacenter.datastore_folder = Folder(
            lab, f"group-s{number()}", "datastore", datacenter, [vim.Folder, vim.Datastore]
        )
        datacenter.network_folder = Folder(
            lab, f"group-n{number()}", "network", datacenter, [vim.Folder, vim.Network]
        )
        for folder in datacenter.children():
            lab.add(folder)
        stores: list[dict[str, Any]] = entry.get("datastores") or [{"name": "ds1"}]
        clusters: list[dict[str, Any]] = entry.get("clusters") or [
            {"name": "C0", "hosts": ["esx1.lab.local"]}
        ]
        for item in stores:
            store = Datastore(lab, f"datastore-{number()}", datacenter, item)
            datacenter.datastores[store.name] = store
            self._place(store, datacenter.datastore_folder)
        for name in entry.get("networks") or ["VM Network"]:
            network = Network(lab, f"network-{number()}", name, datacenter)
            datacenter.networks[name] = network
            self._place(network, datacenter.network_folder)
        for item in clusters:
            cluster = Cluster(lab, f"domain-c{number()}", item["name"], datacenter)
            cluster.pool = ResourcePool(lab, f"resgroup-{number()}", cluster)
            lab.add(cluster.pool)
            for name in item["hosts"]:
                host = Host(lab, f"host-{number()}", name, cluster)
                cluster.hosts[name] = host
                lab.add(host)
            datacenter.clusters[cluster.name] = cluster
            self._place(cluster, datacenter.host_folder)
        self.datacenters[datacenter.path()] = datacenter
        return datacenter

    def datacenter(self, path: str | None) -> Datacenter | None:
        """By inventory path, or the only one there is for None."""
        if path is None:
            return next(iter(self.datacenters.values())) if len(self.datacenters) == 1 else None
        return self.datacenters.get(path.strip("/"))

    def find(self, path: str) -> Entity | None:
        """By inventory path (`DC0/vm/tier/web`)."""
        node: Entity = self.root
        for part in [p for p in path.split("/") if p]:
            found = next((c for c in node.children() if c.name == part), None)
            if found is None:
                return None
            node = found
        return node

    def _child(self, parent: Folder, name: str) -> Folder:
        folder = Folder(self._lab, f"group-d{self._lab.next_static()}", name, parent, parent.child_types)
        self._place(folder, parent)
        return folder

    def _place(self, entity: Entity, folder: Folder) -> None:
        self._lab.add(entity)
        folder.entities[entity.moid] = entity


class SearchIndex(Managed):
    vtype = vim.SearchIndex

    @wsdl
    def FindByUuid(
        self, uuid: str, vmSearch: bool, datacenter: Any = None, instanceUuid: bool | None = None
    ) -> Any:
        found = self.FindAllByUuid(uuid, vmSearch, datacenter, instanceUuid)
        return found[0] if found else None

    @wsdl
    def FindAllByUuid(
        self, uuid: str, vmSearch: bool, datacenter: Any = None, instanceUuid: bool | None = None
    ) -> Any:
        wanted = uuid.lower()
        if not vmSearch:
            hosts = [o for o in self.lab.entities() if isinstance(o, Host) and o.uuid == wanted]
            return array(vim.ManagedEntity, [h.ref for h in hosts])
        found = [
            m
            for m in self.lab.machines()
            if (m.instance_uuid if instanceUuid else m.uuid) == wanted
            and (datacenter is None or m.datacenter.moid == datacenter._moId)
        ]
        return array(vim.ManagedEntity, [m.ref for m in found])

    @wsdl
    def FindByInventoryPath(self, inventoryPath: str) -> Any:
        found = self.lab.tree.find(inventoryPath)
        return found.ref if found else None

    @wsdl
    def FindByDatastorePath(self, datacenter: Any, path: str) -> Any:
        found = [m for m in self.lab.machines() if m.vmx == path and m.datacenter.moid == datacenter._moId]
        return found[0].ref if found else None

    @wsdl
    def FindByDnsName(self, dnsName: str, vmSearch: bool, datacenter: Any = None) -> Any:
        found = [m for m in self.lab.machines() if vmSearch and m.tools_running and m.hostname == dnsName]
        return found[0].ref if found else None

    @wsdl
    def FindByIp(self, ip: str, vmSearch: bool, datacenter: Any = None) -> Any:
        found = [m for m in self.lab.machines() if vmSearch and m.tools_running and ip in m.addresses()]
        return found[0].ref if found else None

    @wsdl
    def FindChild(self, entity: Any, name: str) -> Any:
        node = self.lab.find(entity)
        found = (
            next((c for c in node.children() if c.name == name), None) if isinstance(node, Entity) else None
        )
        return found.ref if found else None


class ServiceInstance(Managed):
    vtype = vim.ServiceInstance

    def p_content(self) -> Any:
        return self.lab.content()

    def p_serverClock(self) -> Any:
        return self.CurrentTime()

    @wsdl
    def RetrieveServiceContent(self) -> Any:
        return self.lab.content()

    @wsdl
    def CurrentTime(self) -> Any:
        return utc(time.time())


class VirtualDiskManager(Managed):
    vtype = vim.VirtualDiskManager

    @wsdl
    def ExtendVirtualDisk_Task(
        self, name: str, newCapacityKb: int, datacenter: Any = None, eagerZero: bool | None = None
    ) -> Any:
        machine, disk = self.lab.disk_by_name(name)
        if machine is None or disk is None:
            raise make_fault("vim.fault.FileNotFound", f"File {name} was not found", file=name)
        return self.lab.tasks.start(
            machine,
            "ExtendVirtualDisk_Task",
            lambda _task: machine.extend(disk, newCapacityKb * 1024, offline=True),
        )
