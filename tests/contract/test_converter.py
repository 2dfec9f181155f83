"""What crosses the wire arrives as it left; what does not fit is explained."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, get_type_hints

import pytest
from pydantic import BaseModel
from temporalio import workflow
from temporalio.api.common.v1 import Payload
from temporalio.api.failure.v1 import Failure
from temporalio.exceptions import ApplicationError

from farshore.activities import messages as activity_messages
from farshore.contract import machine, runs
from farshore.contract.converter import data_converter
from farshore.contract.errors import error_view, to_application_error
from farshore.contract.runs import ErrorView, Message
from farshore.domain.errors import CATALOGUE, Code, FarshoreError
from farshore.workers.worker import RUNS
from farshore.workflows import messages as workflow_messages
from farshore.workflows.machine_protection import MachineProtection

from .samples import message

ROOMS = (runs, machine, activity_messages, workflow_messages)
MESSAGES = sorted(
    {
        value
        for room in ROOMS
        for value in vars(room).values()
        if inspect.isclass(value) and issubclass(value, Message) and value is not Message
    },
    key=lambda kind: f"{kind.__module__}.{kind.__name__}",
)
WORKFLOWS = (*RUNS, MachineProtection)


def inputs(of: type) -> Iterator[tuple[str, Any]]:
    """What a workflow takes: its own argument, and those of its updates and signals."""
    definition = workflow._Definition.must_from_class(of)
    run = definition.run_fn
    yield of.__name__, next(iter(get_type_hints(run).values()))
    for name, update in definition.updates.items():
        yield f"{of.__name__}.{name}", (update.arg_types or [None])[0]


INPUTS = [pytest.param(kind, id=name) for of in WORKFLOWS for name, kind in inputs(of)]


def test_there_are_messages_to_look_at() -> None:
    assert len(MESSAGES) > 50


@pytest.mark.parametrize("full", [False, True], ids=["smallest", "full"])
@pytest.mark.parametrize("kind", MESSAGES, ids=lambda k: k.__name__)
async def test_every_message_arrives_as_it_left(kind: type[BaseModel], full: bool) -> None:
    there = message(kind, full=full)
    payloads = await data_converter.encode([there])
    assert payloads[0].metadata["encoding"] == b"json/plain", "readable in the UI, and by any other language"
    (back,) = await data_converter.decode(payloads, [kind])
    assert back == there
    assert type(back) is kind


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda k: k.__name__)
def test_every_message_is_frozen_and_knows_no_unknown_field(kind: type[BaseModel]) -> None:
    assert kind.model_config.get("frozen")
    assert kind.model_config.get("extra") == "forbid"


@pytest.mark.parametrize("kind", INPUTS)
async def test_every_input_of_a_workflow_explains_what_is_wrong_with_it(kind: type[BaseModel]) -> None:
    assert issubclass(kind, Message)
    fitting = message(kind, full=True).model_dump(mode="json")
    (payload,) = await data_converter.encode([fitting | {"tpyo": 1}])
    with pytest.raises(ApplicationError) as failure:
        await data_converter.decode([payload], [kind])
    assert failure.value.type == Code.INVALID_INPUT
    assert failure.value.non_retryable
    assert "tpyo: is not a known field" in failure.value.message
    assert kind.__name__ in failure.value.message


async def test_what_is_not_json_is_called_so() -> None:
    broken = Payload(metadata={"encoding": b"json/plain"}, data=b"{plan: crm}")
    with pytest.raises(ApplicationError) as failure:
        await data_converter.decode([broken], [runs.FailoverInput])
    assert failure.value.type == Code.INVALID_INPUT


async def test_an_explanation_never_repeats_a_secret() -> None:
    class Login(Message):
        password: int

    (payload,) = await data_converter.encode([{"password": "hunter2"}])
    with pytest.raises(ApplicationError) as failure:
        await data_converter.decode([payload], [Login])
    assert "password" in failure.value.message
    assert "hunter2" not in failure.value.message
    assert "hunter2" not in str(failure.value.details)


@pytest.mark.parametrize("code", list(Code), ids=str)
async def test_every_error_keeps_its_advice_on_its_way_and_ours_lose_the_stack_trace(code: Code) -> None:
    try:
        raise to_application_error(FarshoreError(code, "it broke", subject="db", details={"n": 1}))
    except ApplicationError as error:
        failure = Failure()
        await data_converter.encode_failure(error, failure)
    assert (failure.stack_trace == "") is (code is not Code.INTERNAL)
    back = await data_converter.decode_failure(failure)
    view = error_view(back)
    assert view == ErrorView.of(FarshoreError(code, "it broke", subject="db", details={"n": 1}).info)
    assert view.recommended_action == CATALOGUE[code].action
    assert isinstance(back, ApplicationError)
    assert back.non_retryable is not CATALOGUE[code].retryable
