"""What a run says of itself: its phase, its log, its errors, and whether somebody has stopped it."""

from __future__ import annotations

from collections.abc import Callable

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from farshore.contract import names
    from farshore.contract.runs import ErrorView
    from farshore.domain.errors import Code, FarshoreError

_KEPT = 100  # lines of the log
_LINE = 300  # characters of one


class Stop(Exception):
    """The run ends here; the machines settle."""

    def __init__(self, view: ErrorView) -> None:
        super().__init__(view.message)
        self.view = view


def problem(code: Code, message: str) -> ErrorView:
    """An error of ours, as it stands in results."""
    return ErrorView.of(FarshoreError(code, message).info)


class Journal:
    """Shared by the parts of one run. `show` renders the run's page."""

    def __init__(self, show: Callable[[], None]) -> None:
        self.show = show
        self.phase = "starting"
        self.lines: list[str] = []
        self.errors: list[ErrorView] = []
        self.abort: ErrorView | None = None

    def say(self, line: str) -> None:
        """Add a line to the log."""
        self.lines.append(f"{workflow.now():%H:%M:%S} {line}"[:_LINE])
        del self.lines[:-_KEPT]

    def enter(self, phase: str, *, state: str = "") -> None:
        """Go to a phase; `state` is also written to the search attribute."""
        self.phase = phase
        if state:
            workflow.upsert_search_attributes([names.STATE.value_set(state)])
        self.say(phase)
        self.show()

    def look_for_abort(self) -> None:
        """Raises Stop if a person has stopped or cancelled the run."""
        if self.abort is not None:
            raise Stop(self.abort)
        if workflow.cancellation_reason() is not None:  # however the cancellation was received
            raise Stop(problem(Code.RUN_ABORTED, "The run was cancelled."))
