"""Our errors in Temporal's form, and back."""

from __future__ import annotations

import contextlib
from datetime import timedelta

from pydantic import ValidationError
from temporalio.exceptions import (
    ActivityError,
    ApplicationError,
    CancelledError,
    ChildWorkflowError,
    TerminatedError,
    TimeoutError,
    TimeoutType,
)

from farshore.contract.runs import ErrorView
from farshore.domain.errors import CATALOGUE, Code, FarshoreError


def to_application_error(error: FarshoreError) -> ApplicationError:
    """Type = code, text for a person, the whole error as details, retry as the error says."""
    return ApplicationError(
        error.info.text(),
        error.info.to_dict(),
        type=error.code.value,
        non_retryable=not error.retryable,
        next_retry_delay=timedelta(seconds=error.retry_after) if error.retry_after else None,
    )


def view_to_application_error(view: ErrorView) -> ApplicationError:
    """For the end of a workflow: never retried."""
    return ApplicationError(
        f"{view.message} Recommended action: {view.recommended_action}",
        view.model_dump(mode="json"),
        type=view.code,
        non_retryable=True,
    )


def error_view(
    error: BaseException, *, subject: str = "", unreachable: Code = Code.SOURCE_UNREACHABLE
) -> ErrorView:
    """What a failed step, child or update means to a person. `unreachable` names the side whose worker was awaited."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, FarshoreError):
            return ErrorView.of(link.info)
        if isinstance(link, ApplicationError):
            for detail in link.details:
                if isinstance(detail, dict) and "recommended_action" in detail:
                    with contextlib.suppress(ValidationError):  # of another version: its text is below
                        return ErrorView.model_validate(detail)
            code = Code(link.type) if link.type in set(Code) else Code.INTERNAL
            return _plain(code, link.message, subject)
        if isinstance(link, TimeoutError):
            if link.type is TimeoutType.SCHEDULE_TO_START:
                return _plain(
                    unreachable, f"No worker took the step for {subject or 'the site'} in time.", subject
                )
            what = "answer" if link.type is TimeoutType.HEARTBEAT else "finish the step"
            return _plain(unreachable, f"The worker did not {what} in time.", subject)
        if isinstance(link, (CancelledError, TerminatedError)):
            return _plain(Code.RUN_ABORTED, "The run was stopped.", subject)
        if isinstance(link, (ActivityError, ChildWorkflowError)) or link.__cause__ is not None:
            link = link.__cause__
            continue
        break
    return _plain(Code.INTERNAL, f"{type(error).__name__}: {error}"[:300], subject)


def _plain(code: Code, message: str, subject: str) -> ErrorView:
    entry = CATALOGUE[code]
    return ErrorView(
        code=code.value,
        message=message,
        possible_causes=entry.causes,
        recommended_action=entry.action,
        resolvability=entry.resolvability.value,
        subject=subject,
    )
