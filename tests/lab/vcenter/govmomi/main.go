// A foreign client of the laboratory vCenter: Debian's govmomi, which shares no code with pyVmomi.
// It prints one "name=value" line for each fact; the test compares them. Any surprise ends it with status 1.
package main

import (
	"context"
	"crypto/x509"
	"flag"
	"fmt"
	"io/ioutil"
	"net/url"
	"os"

	"github.com/vmware/govmomi"
	"github.com/vmware/govmomi/find"
	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/property"
	"github.com/vmware/govmomi/session"
	"github.com/vmware/govmomi/view"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

func check(what string, err error) {
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", what, err)
		os.Exit(1)
	}
}

func say(name string, value interface{}) { fmt.Printf("%s=%v\n", name, value) }

func connect(ctx context.Context, address, user, password, ca string) (*govmomi.Client, error) {
	u, err := soap.ParseURL(address)
	check("url", err)
	s := soap.NewClient(u, false)
	pem, err := ioutil.ReadFile(ca)
	check("ca", err)
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	s.DefaultTransport().TLSClientConfig.RootCAs = pool
	v, err := vim25.NewClient(ctx, s)
	check("service content", err)
	c := &govmomi.Client{Client: v, SessionManager: session.NewManager(v)}
	return c, c.Login(ctx, url.UserPassword(user, password))
}

func disk(hardware types.VirtualHardware) (*types.VirtualDisk, *types.VirtualDiskFlatVer2BackingInfo) {
	for _, device := range hardware.Device {
		if d, ok := device.(*types.VirtualDisk); ok {
			if b, ok := d.Backing.(*types.VirtualDiskFlatVer2BackingInfo); ok {
				return d, b
			}
		}
	}
	fmt.Fprintln(os.Stderr, "no flat disk")
	os.Exit(1)
	return nil, nil
}

func main() {
	address := flag.String("url", "", "")
	user := flag.String("user", "", "")
	password := flag.String("password", "", "")
	ca := flag.String("ca", "", "")
	name := flag.String("vm", "", "")
	flag.Parse()
	ctx := context.Background()

	_, err := connect(ctx, *address, *user, "wrong", *ca)
	say("refused", err)
	c, err := connect(ctx, *address, *user, *password, *ca)
	check("login", err)
	say("about", c.ServiceContent.About.ApiType)

	manager := view.NewManager(c.Client)
	v, err := manager.CreateContainerView(ctx, c.ServiceContent.RootFolder, []string{"VirtualMachine"}, true)
	check("view", err)
	var all []mo.VirtualMachine
	fields := []string{"name", "config", "runtime", "guest", "capability", "snapshot", "summary", "datastore", "network", "layoutEx"}
	check("retrieve", v.Retrieve(ctx, []string{"VirtualMachine"}, fields, &all))
	say("machines", len(all))
	var machine mo.VirtualMachine
	for _, m := range all {
		if m.Name == *name {
			machine = m
		}
	}
	say("power", machine.Runtime.PowerState)
	say("tools", machine.Guest.ToolsRunningStatus)
	say("address", machine.Guest.IpAddress)
	say("mac", machine.Guest.Net[0].MacAddress)
	say("tracking.supported", *machine.Capability.ChangeTrackingSupported)
	say("host.set", machine.Runtime.Host != nil)
	say("snapshot.set", machine.Snapshot != nil)
	say("datastores", len(machine.Datastore))
	say("summary.name", machine.Summary.Config.Name)
	say("layout.files", len(machine.LayoutEx.File) > 0)

	finder := find.NewFinder(c.Client, true)
	dc, err := finder.DefaultDatacenter(ctx)
	check("datacenter", err)
	finder.SetDatacenter(dc)
	found, err := finder.VirtualMachine(ctx, *name)
	check("find", err)
	say("path", found.InventoryPath)
	hosts, err := finder.HostSystemList(ctx, "*/*")
	check("hosts", err)
	say("hosts", len(hosts))
	stores, err := finder.DatastoreList(ctx, "*")
	check("datastores", err)
	var store mo.Datastore
	check("datastore", property.DefaultCollector(c.Client).RetrieveOne(ctx, stores[0].Reference(), []string{"summary", "info"}, &store))
	say("datastore.type", store.Summary.Type)

	vm := object.NewVirtualMachine(c.Client, found.Reference())
	on := true
	task, err := vm.Reconfigure(ctx, types.VirtualMachineConfigSpec{ChangeTrackingEnabled: &on})
	check("reconfigure", err)
	check("reconfigure task", task.Wait(ctx))
	task, err = vm.CreateSnapshot(ctx, "from-go", "", false, false)
	check("snapshot", err)
	info, err := task.WaitForResult(ctx, nil)
	check("snapshot task", err)
	ref := info.Result.(types.ManagedObjectReference)
	say("snapshot.type", ref.Type)
	var snapshot mo.VirtualMachineSnapshot
	collector := property.DefaultCollector(c.Client)
	check("snapshot properties", collector.RetrieveOne(ctx, ref, []string{"config"}, &snapshot))
	d, b := disk(snapshot.Config.Hardware)
	say("frozen.file", b.FileName)
	say("frozen.changeId", b.ChangeId)
	answer, err := methods.QueryChangedDiskAreas(ctx, c.Client, &types.QueryChangedDiskAreas{
		This: vm.Reference(), Snapshot: &ref, DeviceKey: d.Key, StartOffset: 0, ChangeId: "*"})
	check("query", err)
	for _, area := range answer.Returnval.ChangedArea {
		say("area", fmt.Sprintf("%d+%d", area.Start, area.Length))
	}
	say("query.length", answer.Returnval.Length)
	_, err = methods.QueryChangedDiskAreas(ctx, c.Client, &types.QueryChangedDiskAreas{
		This: vm.Reference(), Snapshot: &ref, DeviceKey: d.Key, StartOffset: d.CapacityInBytes, ChangeId: "*"})
	say("query.beyond", err)

	var live mo.VirtualMachine
	check("live", collector.RetrieveOne(ctx, vm.Reference(), []string{"config", "snapshot"}, &live))
	for _, device := range live.Config.Hardware.Device {
		if disk, ok := device.(*types.VirtualDisk); ok {
			backing := disk.Backing.(*types.VirtualDiskFlatVer2BackingInfo)
			say("live.file", backing.FileName)
			say("live.parent", backing.Parent.FileName)
		}
	}
	say("tree", live.Snapshot.RootSnapshotList[0].Name)
	consolidate := true
	task, err = vm.RemoveSnapshot(ctx, "from-go", false, &consolidate)
	check("remove", err)
	check("remove task", task.Wait(ctx))

	task, err = vm.PowerOn(ctx)
	check("power on", err)
	err = task.Wait(ctx)
	say("power.on.twice", err)
	say("power.on.fault", fmt.Sprintf("%T", err.(interface{ Fault() types.BaseMethodFault }).Fault()))

	check("logout", c.Logout(ctx))
	_, err = methods.QueryChangedDiskAreas(ctx, c.Client, &types.QueryChangedDiskAreas{
		This: vm.Reference(), DeviceKey: d.Key, ChangeId: "*"})
	say("after.logout", fmt.Sprintf("%T", soap.ToSoapFault(err).VimFault()))
}
