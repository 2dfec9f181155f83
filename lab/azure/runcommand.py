"""Run Command: RunShellScript scripts really run, as a process of the laboratory beside the machine's disk files.

The script finds LAB_VM_NAME and LAB_DISK_0 … LAB_DISK_n (OS disk first, then data disks by LUN; files made read-only). It has
no other tie to a guest: nothing is mounted, nothing listens.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from farshore.lab.azure import disks, vm_parts, vm_view
from farshore.lab.azure.model import Answer, ArmError, Call, Json, items
from farshore.lab.azure.operations import KINDS, Kind, Operation
from farshore.lab.azure.world import World

_LIMIT = 4096
"""Azure returns the last 4096 bytes of each stream."""
_VARIABLE = re.compile(r"^[A-Za-z_]\w*$")


def start(world: World, call: Call) -> Answer:
    vm = world.require(vm_parts.vm_id(world, call))
    world.compute_busy(vm)
    command = str(call.body.get("commandId") or "")
    if command not in {"RunShellScript", "RunPowerShellScript"}:
        raise ArmError(404, "NotFound", f"The entity was not found: there is no command '{command}' here.")
    if vm.hidden.get("power") != "running":
        raise ArmError(
            409, "OperationNotAllowed", f"The operation requires the VM to be running (or set to run); '{vm.name}' is "
            f"{vm.hidden.get('power')}.",
        )  # fmt: skip
    script = call.body.get("script")
    if not isinstance(script, list) or not all(isinstance(line, str) for line in script):
        raise ArmError(400, "InvalidParameter", "'script' must be a list of lines.")
    variables = {str(p.get("name")): str(p.get("value") or "") for p in items(call.body, "parameters")}
    bad = [name for name in variables if not _VARIABLE.match(name)]
    if bad:
        raise ArmError(400, "InvalidParameter", f"Invalid parameter names: {', '.join(bad)}.")
    files = [str(disks.file_of(world, disk)) for disk in disks.attached_disks(world, vm)]
    operation = world.start(
        call, "vm.runCommand", vm, command=command, script="\n".join(script), variables=variables, files=files,
        timeout=world.knobs.run_command_timeout, ready=vm_view.agent_ready(vm), name=vm.name,
    )  # fmt: skip
    return world.accepted(call, operation, 202, None)


def _work(world: World, operation: Operation) -> Json:
    args = operation.args
    if not args["ready"]:
        raise ArmError(
            409, "VMAgentStatusCommunicationError", f"VM '{args['name']}' has not reported status for VM agent. "
            "Verify the VM has a running VM agent and try again.",
        )  # fmt: skip
    if args["command"] == "RunPowerShellScript":
        raise ArmError(
            409,
            "VMExtensionProvisioningError",
            "The laboratory has no PowerShell in its guests; use RunShellScript.",
        )
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=world.root))
    try:
        return _streams(*_execute(args, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _execute(args: Json, folder: Path) -> tuple[bytes, bytes]:
    script = folder / "script.sh"
    script.write_text(args["script"] + "\n")
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(folder),
        "LANG": "C.UTF-8",
        **args["variables"],
        "LAB_VM_NAME": args["name"],
        **{f"LAB_DISK_{index}": path for index, path in enumerate(args["files"])},
    }
    process = subprocess.Popen(
        ["/bin/sh", str(script)], cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        return process.communicate(timeout=args["timeout"])
    except subprocess.TimeoutExpired as late:
        os.killpg(process.pid, 9)
        process.communicate()
        raise ArmError(
            409, "VMExtensionProvisioningTimeout", f"The script did not end within {args['timeout']:g} s."
        ) from late


def _streams(out: bytes, err: bytes) -> Json:
    """The one status that Linux's Run Command answers, both streams in its message."""
    text = "\n".join(
        ["Enable succeeded: ", "[stdout]", out[-_LIMIT:].decode(errors="replace"), "[stderr]",
         err[-_LIMIT:].decode(errors="replace")]
    )  # fmt: skip
    return {
        "value": [
            {
                "code": "ProvisioningState/succeeded",
                "level": "Info",
                "displayStatus": "Provisioning succeeded",
                "message": text,
            }
        ]
    }


def _complete(world: World, operation: Operation, result: Any) -> Any:
    operation.output = result
    return result


KINDS["vm.runCommand"] = Kind(10, _complete, lambda w, o, e: None, _work)
