"""Chromium, as Debian packages it, without a window, and its tabs."""

from __future__ import annotations

import base64
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1] / "janus"))
from servers import pixels  # noqa: E402

ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync"]
CANVASES = """() => [...document.querySelectorAll("figure")].map(figure =>
  [figure.querySelector(".state").textContent, figure.querySelector("canvas").toDataURL()])"""
expect.set_options(timeout=600_000)  # on a machine with much other work


@contextmanager
def chromium() -> Iterator[Browser]:
    """With an empty folder of its own for what it remembers."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert path, "no Chromium: apt install chromium"
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        try:
            yield started
        finally:
            started.close()


@dataclass
class Tab:
    """A page that a test looks at, and all that it asked for and complained about."""

    page: Page
    url: str
    context: BrowserContext
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def draw(self, prompt: str, seed: int | None = None) -> None:
        if seed is not None:
            self.page.fill("#seed", str(seed))
        self.page.fill("#prompt", prompt)
        self.page.press("#prompt", "Enter")

    def states(self, *wanted: str | re.Pattern[str]) -> None:
        """Wait for these of the pictures."""
        expect(self.page.locator(".state")).to_have_text(list(wanted))

    def canvases(self) -> list[tuple[str, np.ndarray]]:
        """State and pixels [height, width, 4] of every picture."""
        return [(state, pixels(base64.b64decode(url.partition(",")[2]))) for state, url in self.page.evaluate(CANVASES)]

    def pictures(self) -> list[np.ndarray]:
        """Pixels of finished ones, [height, width, 3]."""
        found = self.canvases()
        assert all(state == "done" and (picture[..., 3] == 255).all() for state, picture in found)
        return [picture[..., :3] for _, picture in found]

    def alert(self, text: str) -> None:
        """Wait until it says this, visibly."""
        expect(self.page.get_by_role("alert")).to_contain_text(text)
        expect(self.page.get_by_role("alert")).to_be_visible()

    def refused(self, status: int) -> None:
        """The browser has said so by itself, and nothing else is wrong."""
        assert self.complaints and all(f"status of {status}" in text for text in self.complaints), self.complaints
        self.complaints.clear()


OpenTab = Callable[..., Tab]


@contextmanager
def tabs(browser: Browser) -> Iterator[OpenTab]:
    """Every one in a context of its own; in the end nothing has been asked of others than the server."""
    made: list[Tab] = []

    def opened(url: str, **options: Any) -> Tab:
        context = browser.new_context(**options)
        tab = Tab(context.new_page(), url, context)
        made.append(tab)
        context.on("request", lambda request: tab.requests.append(request.url))
        tab.page.on("console", lambda message: message.type in ("error", "warning")
                    and tab.complaints.append(message.text))
        tab.page.on("pageerror", lambda error: tab.complaints.append(str(error)))
        tab.page.goto(url)
        return tab

    yield opened
    for tab in made:
        tab.context.close()
    for tab in made:
        assert tab.requests and not [each for each in tab.requests if not each.startswith((f"{tab.url}/", "blob:"))]
        assert tab.complaints == []
