"""Steps at a machine's target: choose a point, make disks and a machine from it, or remove what an earlier run made."""

from __future__ import annotations

import asyncio

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from farshore.activities import messages as m
    from farshore.activities import signatures as s
    from farshore.contract.runs import PointView, ResourceView
    from farshore.domain.errors import Code, FarshoreError
    from farshore.workflows.details import many, size
    from farshore.workflows.machine_work import MachineWork


class TargetSteps(MachineWork):
    """Steps that touch the target site."""

    async def _seek_point(self) -> None:
        """A wrong choice of point is found before anything is touched."""
        if self._in.choice == "latest":
            return
        await self._step(
            s.CHOOSE_POINT,
            m.ChoosePointCall(**self._owned(), choice=self._in.choice, hold=False),
            queue=self._spec.target_queue,
            summary=self._say(f"looking for the recovery point ({self._in.choice})"),
        )

    async def _choose_point(self) -> None:
        choice = (
            self._final.id if self._final is not None and self._in.choice == "latest" else self._in.choice
        )
        chosen = await self._step(
            s.CHOOSE_POINT,
            m.ChoosePointCall(**self._owned(), choice=choice),
            queue=self._spec.target_queue,
            summary=self._say(f"choosing the recovery point ({choice})"),
        )
        self._point, self._disks = chosen.point, chosen.disks
        self._done.append(
            f"point {chosen.point.id} of {chosen.point.taken_at:%H:%M:%S} UTC, {chosen.point.consistency}"
        )

    async def _remove_former(self) -> None:
        """A rerun or a change of point replaces what an earlier run of this machine made."""
        gone = await self._step(
            s.REMOVE_RESOURCES,
            m.RemoveCall(**self._owned(plan="", run=""), except_run=self._in.run),
            queue=self._spec.target_queue,
            summary=self._say("removing what an earlier run left"),
        )
        self._must_be_gone(gone)

    async def _make_disks(self) -> None:
        self._say(f"making {many(len(self._disks), 'disk')}")
        point = self._the_point()
        # All are waited for even if one fails: nothing may still be in the making when the machine has settled.
        made = await asyncio.gather(
            *(
                self._step(
                    s.CREATE_DISK,
                    m.DiskCall(
                        **self._owned(),
                        settings=self._in.settings,
                        network=self._network,
                        point=point.id,
                        disk=disk,
                    ),
                    queue=self._spec.target_queue,
                    summary=f"Making disk {disk.label} ({size(disk.size)}): {self._in.machine}",
                )
                for disk in self._disks
            ),
            return_exceptions=True,
        )
        self._made_disks = tuple(one for one in made if isinstance(one, ResourceView))
        for one in made:
            if isinstance(one, BaseException):
                raise one
        self._done.append(f"{many(len(made), 'disk')} made")

    async def _make_nics(self) -> None:
        made = await self._step(
            s.CREATE_NIC,
            m.NicCall(**self._owned(), settings=self._in.settings, network=self._network),
            queue=self._spec.target_queue,
            summary=self._say("making the network interface"),
        )
        self._made_nics = tuple(made)

    async def _boot(self) -> None:
        vm = await self._step(
            s.CREATE_MACHINE,
            m.MachineCall(
                **self._owned(),
                settings=self._in.settings,
                network=self._network,
                disks=self._made_disks,
                nics=tuple(n for n in self._made_nics if n.kind == "network-interface"),
            ),
            queue=self._spec.target_queue,
            summary=self._say("creating the machine"),
        )
        self._made = (*self._made_disks, *self._made_nics, vm)
        up = await self._step(
            s.WAIT_UNTIL_RUNNING,
            m.WaitRunningCall(**self._owned(), resource=vm),
            queue=self._spec.target_queue,
            summary=self._say("waiting until the machine runs"),
        )
        self._addresses, self._running_at = up.addresses, up.at
        self._done.append(f"runs since {up.at:%H:%M:%S} UTC at {', '.join(up.addresses) or 'no address'}")

    async def _remove(self, what: str, *, run_test: bool) -> None:
        owned = self._owned(plan="", run="", test=run_test)
        gone = await self._step(
            s.REMOVE_RESOURCES,
            m.RemoveCall(**owned),
            queue=self._spec.target_queue,
            summary=self._say(what),
        )
        self._must_be_gone(gone)
        self._done.append(f"{many(len(gone.deleted), 'resource')} deleted")

    async def _release(self, holder: str) -> None:
        await self._step(
            s.RELEASE_HOLDS,
            m.StoreCall(site=self._spec.target_site, machine=self._in.machine, holder=holder),
            queue=self._spec.target_queue,
            summary=f"Releasing the held point: {self._in.machine}",
        )

    def _must_be_gone(self, report: m.RemoveReport) -> None:
        self._deleted += report.deleted
        self._leftovers = report.leftovers
        if report.leftovers:
            raise FarshoreError(
                Code.CLEANUP_LEFTOVERS,
                f"{self._in.machine}: could not delete {'; '.join(report.leftovers)}",
                subject=self._in.machine,
                details={"leftovers": list(report.leftovers)},
            )

    def _the_point(self) -> PointView:
        if self._point is None:
            raise FarshoreError(
                Code.NO_RECOVERY_POINT,
                f"No recovery point was chosen for {self._in.machine}.",
                subject=self._in.machine,
            )
        return self._point
