"""Steps at a machine's source: look, shut down, prove that it is off, copy its last changes, start it again."""

from __future__ import annotations

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from farshore.activities import messages as m
    from farshore.activities import signatures as s
    from farshore.contract.machine import FenceKind, FenceToken, Halt
    from farshore.contract.runs import RunKind
    from farshore.domain.errors import Code, FarshoreError
    from farshore.workflows.details import many
    from farshore.workflows.machine_work import MachineWork


class SourceSteps(MachineWork):
    """Steps that touch the source site. Those named `try` never fail for an unreachable one."""

    async def _check_source(self) -> None:
        seen = await self._step(
            s.INSPECT_SOURCE,
            self._source_call(),
            queue=self._spec.source_queue,
            summary=self._say("looking at the source machine"),
        )
        if seen.errors:
            raise FarshoreError(
                Code.NOT_READY,
                f"{self._in.machine} is not ready: {'; '.join(seen.errors)}",
                subject=self._in.machine,
            )

    async def _shut_down(self) -> None:
        await self._power_off(None)

    async def _power_off(self, rules: s.Rules | None) -> None:
        self._source_stopped = True
        down = await self._step(
            s.SHUT_DOWN_SOURCE,
            m.ShutDownCall(
                site=self._spec.source_site,
                machine=self._in.machine,
                source=self._spec.source,
                guest_timeout=self._in.guest_timeout,
                force=self._in.force_off,
            ),
            queue=self._spec.source_queue,
            summary=self._say("shutting down the source machine"),
            rules=rules,
            longer_by=self._in.guest_timeout,
        )
        how = "was off" if down.already_off else "shut itself down" if down.graceful else "was powered off"
        self._done.append(f"source {how} at {down.at:%H:%M:%S} UTC")

    async def _try_shut_down(self) -> None:
        if not self._in.try_shutdown:
            self._done.append("shutdown of the source was not wanted")
            return
        await self._attempt(self._power_off(s.SOURCE_BEST_EFFORT), "the source was not shut down")

    async def _halt(self) -> None:
        self._say("stopping the replication loop")
        await self._update("halt", Halt(run=self._in.run, wait=self._in.kind is RunKind.PLANNED), "halt")

    async def _final_cycle(self, rules: s.Rules | None = None, patience: float = 3600.0) -> None:
        self._final = await self._step(
            s.FINAL_CYCLE,
            m.FinalCycleCall(spec=self._spec, owner=self._in.run, patience=patience),
            queue=self._spec.source_queue,
            summary=self._say("copying the last changes"),
            rules=rules,
        )
        self._done.append(f"last changes are in point {self._final.id}")

    async def _try_final_cycle(self) -> None:
        if self._fence is None or self._in.choice != "latest" or not self._reachable:
            return  # a machine that may still write gives no last point; the newest one is as good
        await self._attempt(
            self._final_cycle(s.SOURCE_BEST_EFFORT, patience=60.0), "the last changes could not be copied"
        )

    async def _prove(self, rules: s.Rules | None = None) -> None:
        proof = await self._step(
            s.PROVE_SOURCE_OFF,
            self._source_call(),
            queue=self._spec.source_queue,
            summary=self._say("proving that the source can't write"),
            rules=rules,
        )
        self._fence = FenceToken(
            machine=self._in.machine,
            run=self._in.run,
            kind=FenceKind(proof.kind),
            evidence=proof.evidence,
            at=proof.at,
        )
        self._done.append(f"fence: {proof.evidence}")

    async def _try_fence(self) -> None:
        if self._reachable:
            await self._attempt(self._prove(s.SOURCE_BEST_EFFORT), "the source is not proven off")

    async def _start_source(self) -> None:
        await self._step(
            s.POWER_ON_SOURCE,
            self._source_call(),
            queue=self._spec.source_queue,
            summary=self._say("starting the source machine"),
        )
        self._done.append("source machine started")

    async def _reap(self) -> None:
        gone = await self._step(
            s.REAP_SOURCE,
            self._source_call(),
            queue=self._spec.source_queue,
            summary=self._say("removing Farshore's snapshots at the source"),
            rules=s.SOURCE_BEST_EFFORT,
        )
        if gone.ids:
            self._done.append(f"{many(len(gone.ids), 'left-over snapshot')} removed at the source")

    def _source_call(self) -> m.SourceCall:
        return m.SourceCall(site=self._spec.source_site, machine=self._in.machine, source=self._spec.source)
