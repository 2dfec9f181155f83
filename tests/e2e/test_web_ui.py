"""A person runs a plan in Temporal's web UI, with Chromium: nothing here knows more than what stands on the pages.

Pictures of the pages are written into the folder that FARSHORE_SCREENSHOTS names.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    FrameLocator,
    Locator,
    Page,
    ViewportSize,
    expect,
    sync_playwright,
)

from farshore.lab.stack import Stack

CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
]
SIZE = ViewportSize(width=1440, height=1000)
STEP = 120_000.0  # ms for one thing to appear: generous, for machines that do much else
RUN = 400_000.0  # ms for the slow halves of a failover# Errors of the UI's own scripts, which know nothing of what runs here; our texts are shown in a frame without scripts.
UIS_OWN = (
    # thrown now and then under load, when a part of the page that it measures has just been replaced
    "Failed to execute 'getComputedStyle' on 'Window': parameter 1 is not of type 'Element'.",
)

pytestmark = [
    pytest.mark.ui,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(
        not Path(CHROMIUM).exists(), reason=f"{CHROMIUM} is not there (Debian: apt install chromium)"
    ),
]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    expect.set_options(timeout=STEP)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


class Person:
    """Somebody with a browser. Every error that a page logs is kept, with the address it came from."""

    def __init__(self, browser: Browser, stack: Stack) -> None:
        self.ui = f"{stack.ui}/namespaces/default/workflows"
        context = browser.new_context(viewport=SIZE, locale="en-GB", timezone_id="UTC")
        context.set_default_timeout(STEP)
        context.on("console", self._heard)
        context.on("weberror", lambda error: self._threw(str(error.error)))
        self.errors: list[str] = []
        self.page: Page = context.new_page()

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(f"{message.text} [{message.location['url']}]")

    def _threw(self, error: str) -> None:
        if error not in UIS_OWN:
            self.errors.append(error)

    # -- what is on the pages -----------------------------------------------------------------------------------

    def open(self, run: str) -> None:
        self.page.goto(f"{self.ui}/{quote(run, safe='')}")
        expect(self.page.get_by_role("heading", level=1, name=run)).to_be_visible()

    def find(self, query: str) -> None:
        self.page.goto(f"{self.ui}?query={quote(query, safe='')}")

    def tab(self, name: str) -> None:
        self.page.get_by_test_id(f"{name}-tab").click()

    def timeline(self, text: str | re.Pattern[str]) -> Locator:
        return self.page.get_by_role("button", name=re.compile("^Event ")).filter(has_text=text).first

    def status(self, name: str, timeout: float = STEP) -> None:
        expect(self.page.get_by_role("status").filter(has_text=name).first).to_be_visible(timeout=timeout)

    def details(self) -> FrameLocator:
        """The frame with what the workflow says of itself."""
        self.tab("user-metadata")
        return self.page.frame_locator('iframe[src*="/render"] >> nth=-1')

    # -- what a person does ---------------------------------------------------------------------------------------

    def type_json(self, where: Locator, value: object) -> None:
        """Typed as the editor lays it out when it loses the focus: else what lies below would move under the mouse."""
        where.locator(".cm-content:visible").first.click()
        self.page.keyboard.insert_text(json.dumps(value, indent=2))
        expect(where.locator(".cm-line:visible").last).to_have_text("}")

    def start(self, run: str, ask: object) -> None:
        """The start form, prefilled by its address; afterwards the run's page."""
        self.page.goto(
            f"{self.ui}/start-workflow?workflowId={quote(run, safe='')}&taskQueue=farshore&workflowType=Failover"
        )
        expect(self.page.get_by_text("Task Queue is Active")).to_be_visible()
        self.type_json(self.page.locator("main"), ask)
        self.page.get_by_test_id("start-workflow-button").click()
        expect(self.page.get_by_text("Workflow started successfully").first).to_be_attached()
        self.open(run)

    def send_decide(self, payload: object) -> Locator:
        """More Actions, Send an Update, decide, Submit; the dialog."""
        self.page.get_by_role("button", name="More Actions").click()
        self.page.get_by_role("menuitem").filter(has_text="Update").first.click()
        dialog = self.page.locator("dialog[open]#update-confirmation-modal")
        dialog.get_by_role("button", name="Select an Update").click()
        option = self.page.get_by_role("option").filter(has_text="decide")
        expect(option).to_contain_text("Answer what the run waits for")
        option.click()
        self.type_json(dialog, payload)
        dialog.get_by_role("button", name="Submit").click()
        return dialog

    def picture(self, name: str, height: int) -> None:
        """A picture for the documentation, if one is wanted."""
        folder = os.environ.get("FARSHORE_SCREENSHOTS")
        if not folder:
            return
        self.page.set_viewport_size(ViewportSize(width=SIZE["width"], height=height))
        self.page.screenshot(path=Path(folder) / name, animations="disabled")
        self.page.set_viewport_size(SIZE)


def test_a_person_fails_a_plan_over_in_the_web_ui(chromium: Browser, make_stack):
    stack = make_stack(manual=True)
    done = stack.run("protect", "crm")
    assert done.returncode == 0, done.stdout + done.stderr
    me, run = Person(chromium, stack), "crm/planned/by-hand"

    # the start form, and the running plan with labels that need no knowledge of the code
    me.start(run, {"plan": "crm", "kind": "planned", "reason": "site maintenance"})
    me.status("Running")
    for label in (
        "Read and pin plan crm",
        "Check westeurope: networks, addresses, quota, names",
        "Group data: crm-db01",
        "Group application: crm-app01",
        "Group web: crm-web01",
    ):
        expect(me.timeline(label)).to_be_visible()

    # it waits for a person: on the timeline without a reload, and first thing in the details
    expect(me.timeline("Waiting for a person: Check the database")).to_be_visible(timeout=RUN)
    text = me.details()
    expect(text.locator("blockquote")).to_contain_text("WAITING FOR A PERSON: Check the database")
    expect(text.locator("blockquote")).to_contain_text("Look at crm-db01.")
    expect(text.locator("main > *").first).to_contain_text("WAITING FOR A PERSON")
    expect(text.get_by_text("1 of 3 machines done")).to_be_visible()
    expect(text.get_by_text("Reason: site maintenance")).to_be_visible()
    machine = text.locator("li", has=text.get_by_role("link", name="crm-db01"))
    expect(machine).to_contain_text("starting machines ✓ — runs since")
    expect(text.get_by_text("crm-app01: making disks ✓ — 1 disk made")).to_be_visible()
    me.picture("run-waiting.png", 1270)
    answer = json.loads(text.locator("pre").inner_text())  # what a person would copy

    # from there to the machine's own page
    with me.page.context.expect_page() as opened:
        text.get_by_role("link", name="crm-app01").click()
    child = opened.value
    expect(child.get_by_role("heading", level=1, name=f"{run}/crm-app01")).to_be_visible()
    for label in ("Shutting down the source machine: crm-app01", "Making disk disk0 (12 MiB): crm-app01"):
        row = child.get_by_role("button", name=re.compile("^Event ")).filter(has_text=label)
        expect(row).to_be_visible()
    child.close()

    # a wrong answer is refused in words and changes nothing; the right one is taken
    dialog = me.send_decide(answer | {"action": "no-such-action", "by": "alice"})
    expect(dialog).to_contain_text("'no-such-action' is not pending")
    expect(dialog).to_contain_text("this run waits for check-the-database")
    dialog.get_by_test_id("cancel-modal-button").click()
    expect(dialog).to_be_hidden()
    me.open(run)
    me.status("Running")
    dialog = me.send_decide(answer | {"by": "alice", "observation": "it answers"})
    expect(dialog).to_be_hidden()

    # finished, seen without a reload, with its result
    me.status("Completed", timeout=RUN)
    result = me.page.get_by_role("textbox", name="Result")
    expect(result).to_contain_text('"status": "Succeeded"')
    me.open(run)
    expect(me.timeline("Run mark.sh")).to_be_visible()
    me.picture("run-finished-timeline.png", 1750)
    expect(me.details().get_by_text("ended: Succeeded").first).to_be_visible()

    # the machine's lasting page: state, what is allowed, at a glance
    me.open("machine/crm-db01")
    text = me.details()
    expect(text.get_by_text("crm-db01 is PlannedCommitPending; it runs at the recovery site")).to_be_visible()
    expect(text.get_by_text(re.compile("Allowed now: .*Commit"))).to_be_visible()

    # the list, by search attributes
    me.find('FarshorePlan="crm" AND FarshoreKind="planned"')
    for id in (run, f"{run}/group/data", f"{run}/crm-db01"):
        expect(me.page.get_by_role("link", name=id, exact=True)).to_be_visible()
    expect(me.page.get_by_role("link", name="machine/crm-db01", exact=True)).to_have_count(0)
    me.find('FarshorePlan="crm" AND FarshoreState="PlannedCommitPending"')
    expect(me.page.get_by_role("link", name="machine/crm-db01", exact=True)).to_be_visible()
    assert me.errors == []


def test_a_wrong_start_ends_at_once_in_words_on_the_page(chromium: Browser, make_stack):
    stack = make_stack()
    me = Person(chromium, stack)
    wrong = {
        "crm/wrong-kind": ({"plan": "crm", "kind": "live"}, "kind: Input should be"),
        "crm/unknown-plan": ({"plan": "crn", "kind": "test"}, "crm"),  # and the near match is named
    }
    for run, (ask, words) in wrong.items():
        me.start(run, ask)
        me.status("Failed")
        expect(me.page.get_by_role("textbox", name="Result")).to_contain_text(words)
        shown = me.page.locator("main").inner_text()
        assert "Traceback" not in shown
        assert 'File "' not in shown
        assert ".py" not in shown
    assert me.errors == []
