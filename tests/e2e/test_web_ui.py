"""A person runs a plan in Temporal's web UI, with Chromium: nothing here knows more than what stands on the pages.

Pictures of the pages are written into the folder that FARSHORE_SCREENSHOTS names.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
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
RUN = 400_000.0  # ms for the slow halves of a failover

pytestmark = [
    pytest.mark.ui,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(
        not Path(CHROMIUM).exists(), reason=f"{CHROMIUM} is not there (Debian: apt install chromium)"
    ),
]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
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
        context.on("weberror", lambda error: self.errors.append(str(error.error)))
        self.errors: list[str] = []
        self.page: Page = context.new_page()

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(f"{message.text} [{message.location['url']}]")

    # -- what is on the pages -----------------------------------------------------------------------------------

    def open(self, run: str) -> None:
        self.page.goto(f"{self.ui}/{quote(run, safe='')}")
        expect(self.page.get_by_role("heading", level=1, name=run)).to_be_visible(timeout=STEP)

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
        """Type an object and leave the field: the editor then lays it out, and what lies below it moves."""
        where.locator(".cm-content:visible").first.click()
        self.page.keyboard.insert_text(json.dumps(value))
        where.locator("h1:visible, h2:visible, h3:visible").first.click()
        expect(where.locator(".cm-line:visible").nth(1)).to_be_visible(timeout=STEP)

    def start(self, run: str, ask: object) -> None:
        """The start form, prefilled as the README's link does."""
        self.page.goto(
            f"{self.ui}/start-workflow?workflowId={quote(run, safe='')}&taskQueue=farshore&workflowType=Failover"
        )
        expect(self.page.get_by_text("Task Queue is Active")).to_be_visible(timeout=STEP)
        self.type_json(self.page.locator("main"), ask)
        self.page.get_by_test_id("start-workflow-button").click()
