"""Tasks: states, progress, cancellation, one at a time for a machine."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from farshore.lab.vcenter.objects import Entity, Managed, wsdl
from farshore.lab.vcenter.soap import system_error
from farshore.lab.vcenter.vim import MethodFault, array, make_fault, support, utc, vim

if TYPE_CHECKING:
    from farshore.lab.vcenter.service import LabVCenter

log = logging.getLogger(__name__)
KEPT = 2000
"""Finished tasks that can still be read; a real vCenter forgets them after about ten minutes."""
_DESCRIPTIONS = {
    "CreateSnapshot_Task": "VirtualMachine.createSnapshot",
    "CreateSnapshotEx_Task": "VirtualMachine.createSnapshot",
    "RemoveSnapshot_Task": "vm.Snapshot.remove",
    "RevertToSnapshot_Task": "vm.Snapshot.revert",
    "RemoveAllSnapshots_Task": "VirtualMachine.removeAllSnapshots",
    "RevertToCurrentSnapshot_Task": "VirtualMachine.revertToCurrentSnapshot",
    "ConsolidateVMDisks_Task": "VirtualMachine.consolidateDisks",
    "ReconfigVM_Task": "VirtualMachine.reconfigure",
    "PowerOnVM_Task": "VirtualMachine.powerOn",
    "PowerOffVM_Task": "VirtualMachine.powerOff",
    "RegisterVM_Task": "Folder.registerVm",
    "CreateVM_Task": "Folder.createVm",
    "Destroy_Task": "ManagedEntity.destroy",
    "Rename_Task": "ManagedEntity.rename",
    "ExtendVirtualDisk_Task": "VirtualDiskManager.extendVirtualDisk",
}


class CanceledError(Exception):
    """The task was cancelled while it waited."""


class Task(Managed):
    """One run of a `*_Task` method."""

    vtype = vim.Task

    def __init__(self, lab: LabVCenter, moid: str, entity: Entity, method: str, user: str) -> None:
        super().__init__(lab, moid)
        self.entity = entity
        self.cancel = threading.Event()
        self.done = threading.Event()
        info: Any = vim.TaskInfo(
            key=moid,
            task=self.ref,
            description=None,
            name=support.GetWsdlMethod("urn:vim25", method),
            descriptionId=_DESCRIPTIONS.get(method, method.removesuffix("_Task")),
            entity=entity.ref,
            entityName=entity.name,
            state="queued",
            cancelled=False,
            cancelable=True,
            reason=vim.TaskReasonUser(userName=user),
            queueTime=utc(time.time()),
            eventChainId=int(moid.rpartition("-")[2]),
        )
        self.info_value = info

    def p_info(self) -> Any:
        return self.info_value

    def update(self, **fields: Any) -> None:
        """Publish a new state; readers see the old one or the new one, never a mixture."""
        info = copy.copy(self.info_value)
        for name, value in fields.items():
            setattr(info, name, value)
        self.info_value = info
        self.touch()

    def progress(self, percent: int) -> None:
        self.update(progress=percent)

    def wait(self, seconds: float, start: int = 0, end: int = 100) -> None:
        """Spend time, showing progress from `start` to `end` percent. Raises `CanceledError`."""
        if seconds <= 0:
            return
        begin = time.monotonic()
        while (left := begin + seconds - time.monotonic()) > 0:
            if self.cancel.wait(min(left, max(0.05, seconds / 20))):
                raise CanceledError
            share = min(1.0, (time.monotonic() - begin) / seconds)
            percent = int(start + (end - start) * share)
            if percent != self.info_value.progress and percent < 100:
                self.progress(percent)

    @wsdl
    def CancelTask(self) -> None:
        if self.info_value.state in ("success", "error"):
            raise make_fault("vim.fault.InvalidState", "The task has finished.")
        self.cancel.set()


class Tasks:
    """All tasks of the laboratory."""

    def __init__(self, lab: LabVCenter) -> None:
        self._lab = lab
        self._recent: deque[Task] = deque()
        self._lock = threading.Lock()

    def recent(self) -> list[Task]:
        with self._lock:
            return list(self._recent)[-100:]

    def recent_of(self, entity: Entity) -> list[Task]:
        with self._lock:
            return [t for t in self._recent if t.entity is entity][-10:]

    def start(
        self, entity: Entity, method: str, work: Callable[[Task], Any], *, exclusive: bool = True
    ) -> Any:
        """Run `work` as a task of `entity` and return the task's reference.

        `exclusive`: two such tasks of one entity never overlap; the second fails with `TaskInProgress`.
        """
        lab = self._lab
        task = Task(lab, f"task-{lab.next_number()}", entity, method, lab.calls.user)
        lab.add(task)
        with self._lock:
            self._recent.append(task)
            while len(self._recent) > KEPT and self._recent[0].done.is_set():
                lab.forget(self._recent.popleft())
        thread = threading.Thread(
            target=self._run, args=(task, method, work, exclusive), name=f"{task.moid} {method}", daemon=True
        )
        thread.start()
        return task.ref

    def _run(self, task: Task, method: str, work: Callable[[Task], Any], exclusive: bool) -> None:
        lab = self._lab
        holder: Any = None
        result: Any = None
        fault: Any = None
        try:
            if exclusive:
                holder = lab.occupy(task)
            task.update(state="running", startTime=utc(time.time()), progress=0)
            plan = lab.faults.task_plan(method, task.entity.label)
            lasting = lab.settings.duration(method) if plan is None or plan.delay is None else plan.delay
            if plan is not None and plan.stuck:
                task.progress(plan.percent)
                task.cancel.wait()
                raise CanceledError
            if plan is not None and plan.fault is not None and not plan.after:
                task.wait(lasting, 0, plan.percent)
                raise plan.fault
            task.wait(lasting)
            result = work(task)
            if plan is not None and plan.fault is not None:
                raise plan.fault
        except CanceledError:
            fault = make_fault("vmodl.fault.RequestCanceled", "The task was canceled by a user.")
            task.info_value.cancelled = True
        except MethodFault as raised:
            fault = raised
        except (
            Exception
        ) as error:  # every defect has to reach the client as a fault, not as a task that never ends
            log.exception("task %s failed", method)
            fault = system_error(f"{type(error).__name__}: {error}")
        finally:
            if holder is not None:
                lab.release(holder, task)
            end = utc(time.time())
            if fault is not None:
                if isinstance(fault, MethodFault) and fault.msg is None:
                    fault.msg = support.GetWsdlName(type(fault))
                task.update(state="error", error=fault, completeTime=end, cancelable=False)
            else:
                task.update(state="success", result=result, completeTime=end, progress=100, cancelable=False)
            task.done.set()


class TaskManager(Managed):
    """`TaskManager`: recent tasks only."""

    vtype = vim.TaskManager

    def p_recentTask(self) -> Any:
        return array(vim.Task, [t.ref for t in self.lab.tasks.recent()])

    def p_maxCollector(self) -> Any:
        return 32
