"""The page at ``/`` in a browser: Chromium, as Debian packages it, without a window."""

from __future__ import annotations

import base64
import io
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from browsing import OpenTab, chromium, tabs
from PIL import Image
from playwright.sync_api import Browser, expect

from ssd_janus import Pipeline
from ssd_janus.serve.service import Limits, Service
from ssd_kernels import CachePlan

sys.path.insert(0, str(Path(__file__).parents[1] / "janus"))
import tiny  # noqa: E402
from servers import PATH, Serve, expected, held_steps, pixels, started, until  # noqa: E402

pytestmark = pytest.mark.serve

PROMPT = "two blue squares"
ROWS, CELL = 24, 4  # of the included model's pictures: rows, and pixels of each


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started_:
        yield started_


@pytest.fixture
def open_tab(browser: Browser) -> Iterator[OpenTab]:
    with tabs(browser) as opened:
        yield opened


@pytest.fixture(scope="module")
def included() -> Iterator[str]:
    """The address of a server process with the included model."""
    with command("--batch-size", "4") as (url, _):
        yield url
        assert busy(url) == 0


class command:
    """``ssd-janus serve``: its address and its process, which is gone afterwards."""

    def __init__(self, *options: str) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([sys.executable, "-m", "ssd_janus.cli", "serve", "--port", "0", *options],
                                        stderr=subprocess.PIPE, text=True, env=environment)

    def __enter__(self) -> tuple[str, subprocess.Popen[str]]:
        assert self.process.stderr is not None
        try:
            found = re.search(r"at (http://127\.0\.0\.1:\d+)", self.process.stderr.readline())
            assert found is not None
        except BaseException:
            self.__exit__()
            raise
        return found[1], self.process

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline(tiny.build_model(), tiny.build_processor())


@pytest.fixture
def serve(pipe: Pipeline) -> Iterator[Serve]:
    with started(pipe) as start:
        yield start


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    with held_steps() as let_go:
        yield let_go


def busy(url: str) -> int:
    """Pictures that wait or are drawn."""
    load = httpx2.get(f"{url}/health").json()
    return load["waiting"] + load["joining"] + load["running"]


def cancelled(url: str) -> int:
    """Pictures that were let go of."""
    found = re.search(r'^ssd_janus_pictures_total{outcome="cancelled"} (\d+)', httpx2.get(f"{url}/metrics").text, re.M)
    return int(found[1]) if found else 0


def test_a_picture_grows_beside_the_full_cache(included: str, open_tab: OpenTab) -> None:
    """Row by row; in the end both are what the API draws, and what is told of them is what it tells."""
    tab = open_tab(included)
    expect(tab.page.locator("#policy")).to_have_value("adaptive")
    expect(tab.page.locator("#budget")).to_have_value("0.2")
    tab.draw(PROMPT, 7)
    plans = ({"policy": "adaptive", "budget": 0.2}, {"policy": "full"})
    with ThreadPoolExecutor(2) as threads:
        answers = [threads.submit(httpx2.post, included + PATH, json={"prompt": PROMPT, "seed": 7, **plan}, timeout=600)
                   for plan in plans]
        seen = []
        for rows in (r"row ([2-9]|1\d)", r"row (1[4-9]|2\d)"):
            tab.states(*[re.compile(rows)] * 2)
            seen.append(tab.canvases())
        tab.states("done", "done")
        answers = [answer.result().raise_for_status().json() for answer in answers]
    for pair in zip(*seen, strict=True):
        drawn = []
        for state, picture in pair:
            drawn.append(int(re.fullmatch(r"row (\d+) of 24", state)[1]))
            assert (picture[:CELL * drawn[-1], :, 3] == 255).all() and not picture[CELL * drawn[-1]:].any(), state
        assert 1 < drawn[0] < drawn[1] < ROWS
    figures = tab.page.locator("figure")
    for index, (picture, answer, plan) in enumerate(zip(tab.pictures(), answers, plans, strict=True)):
        png = base64.b64decode(answer["data"][0]["b64_json"])
        assert (picture == pixels(png)).all(), plan
        figure = figures.nth(index)
        expect(figure.locator("h2")).to_have_text(("adaptive, 20%", "full")[index])
        expect(figure.locator(".cache")).to_have_text(f"{answer['cache_bytes'] / 1e6:.1f} MB")
        saved = 1 - answer["cache_bytes"] / answer["full_cache_bytes"]
        expect(figure.locator(".saved")).to_have_text(f"{saved:.0%}")
        expect(figure.locator(".kept")).to_have_text(f"{answer['plan_budget']:.1%}")
        assert float(figure.locator(".seconds").text_content()) > 0
        with tab.page.expect_popup() as popup:
            figure.get_by_role("link", name="Plan").click()
        shown = popup.value.locator("body").text_content()
        popup.value.close()
        assert f'"row_buffer":{24 if index == 0 else 0}' in shown.replace(" ", "")
        address = included + "/" + figure.get_by_role("link", name="Plan").get_attribute("href")
        kept = CachePlan.from_dict(httpx2.get(address).json()).budget(ROWS * ROWS)
        assert round(kept, 4) == answer["plan_budget"] and (kept == 1) == (index == 1)
        with tab.page.expect_download() as download:
            figure.get_by_role("link", name="Save picture").click()
        assert Path(download.value.path()).read_bytes() == png
        assert download.value.suggested_filename == f"two-blue-squares-{('adaptive-20%', 'full')[index]}-7.png"
    expect(tab.page.get_by_role("status")).to_have_text(
        re.compile(r"Drawn together with seed 7: adaptive, 20% in \d+\.\d s; full in \d+\.\d s\."))
    assert saved == 0 and answers[0]["cache_bytes"] < answers[1]["cache_bytes"] / 2


def test_who_cancels_or_leaves_frees_the_slots(included: str, open_tab: OpenTab) -> None:
    tab = open_tab(included)
    expect(tab.page.locator("#cancel")).to_be_disabled()
    tab.draw(PROMPT)
    tab.states(*[re.compile("row ")] * 2)
    assert busy(included) == 2
    tab.page.get_by_role("button", name="Cancel").click()
    tab.states(*[re.compile(r"^stopped at row \d+ of 24$")] * 2)
    expect(tab.page.get_by_role("status")).to_have_text("Cancelled.")
    expect(tab.page.locator("#cancel")).to_be_disabled()
    expect(tab.page.get_by_role("alert")).to_be_hidden()
    until(lambda: (busy(included), cancelled(included)) == (0, 2))
    tab.page.get_by_role("button", name="Draw").click()
    tab.states(*[re.compile("row ")] * 2)
    tab.page.close()
    until(lambda: (busy(included), cancelled(included)) == (0, 4))


def test_errors_are_shown_in_the_servers_words(included: str, open_tab: OpenTab) -> None:
    tab = open_tab(included)
    for prompt, message in (("x" * 4001, "Prompt must be at most 4000 characters long, got 4001"),
                            (" ", "Prompt must not be blank")):
        tab.draw(prompt)
        tab.alert(message)
        expect(tab.page.locator("figure")).to_have_count(0)
        expect(tab.page.locator("#cancel")).to_be_disabled()
    assert tab.complaints and all("Failed to load resource" in text for text in tab.complaints)
    tab.complaints.clear()
    tab.page.fill("#seed", "-1")
    tab.draw(PROMPT)
    tab.alert("Seed must be a whole number")
    expect(tab.page.locator("#seed")).to_be_focused()
    assert busy(included) == 0


def test_a_server_that_is_gone(open_tab: OpenTab) -> None:
    """In the middle of a picture, whose rows stay, and after it."""
    with command("--batch-size", "2") as (url, process):
        tab = open_tab(url)
        tab.draw(PROMPT)
        tab.states(*[re.compile("row ")] * 2)
        process.send_signal(signal.SIGKILL)
        tab.alert("The connection to the server broke")
        tab.states(*[re.compile("^stopped at row ")] * 2)
        process.wait()
        tab.draw(PROMPT)
        tab.alert("The server cannot be reached")
        assert tab.complaints and all("net::ERR_" in text for text in tab.complaints), tab.complaints
        tab.complaints.clear()


def test_errors_while_a_picture_is_drawn(serve: Serve, open_tab: OpenTab,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> bytes:
        raise MemoryError("no room")

    monkeypatch.setattr(Service, "_png", broken)
    server = serve()
    tab = open_tab(server.url)
    tab.draw("a heart")
    tab.alert("Drawing failed; the server's log says why")
    until(lambda: busy(server.url) == 0)


def test_a_full_queue_is_said(serve: Serve, open_tab: OpenTab, gate: threading.Event) -> None:
    """With the time after which it may help to ask again; what had a place is let go with the other."""
    server = serve(Limits(batch=1, waiting=1, images=1))
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(httpx2.post, server.url + PATH, json={"prompt": "a heart"}, timeout=600)
        until(lambda: busy(server.url) == 1)
        tab = open_tab(server.url)
        tab.draw("a heart")
        tab.alert("1 more were asked for. Try again in 1 s.")
        tab.refused(429)
        until(lambda: cancelled(server.url) == 1)
        gate.set()
        assert other.result().status_code == 200
        tab.page.uncheck("#beside")
        tab.draw("a heart", 3)
        tab.states("done")
        expect(tab.page.get_by_role("alert")).to_be_hidden()


def test_the_keyboard_alone(serve: Serve, open_tab: OpenTab, gate: threading.Event, pipe: Pipeline) -> None:
    """Every control is reached in order and seen to be; Enter draws, Escape cancels."""
    server = serve()
    tab = open_tab(server.url)
    page = tab.page
    expect(page.locator("#prompt")).to_be_focused()
    expect(page.locator("#policy option")).not_to_have_count(0)
    keys = page.keyboard
    keys.press("Control+A")
    keys.type("a heart")
    keys.press("Shift+Enter")
    keys.press("Backspace")
    for name, pressed in (("policy", "w"), ("budget", "ArrowDown"), ("seed", "5"), ("beside", "Space"), ("turns", "")):
        keys.press("Tab")
        expect(page.locator(f"#{name}")).to_be_focused()
        outline = page.locator(f"#{name}").evaluate("node => getComputedStyle(node).outlineStyle")
        assert outline == "solid", name
        if pressed:
            keys.press(pressed)
    expect(page.locator("#policy")).to_have_value("window")
    expect(page.locator("#budget")).to_have_value("0.35")
    expect(page.locator("#beside")).not_to_be_checked()
    assert busy(server.url) == 0
    keys.press("Tab")
    expect(page.get_by_role("button", name="Draw")).to_be_focused()
    keys.press("Enter")
    until(lambda: busy(server.url) == 1)
    keys.press("Tab")
    expect(page.get_by_role("button", name="Cancel")).to_be_focused()
    keys.press("Escape")
    expect(page.get_by_role("status")).to_have_text("Cancelled.")
    expect(page.locator("#prompt")).to_be_focused()
    gate.set()
    until(lambda: busy(server.url) == 0)
    keys.press("Enter")
    tab.states("done")
    answer = httpx2.post(server.url + PATH, json={"prompt": "a heart", "seed": 5, "policy": "window", "budget": 0.35})
    assert (tab.pictures()[0] == pixels(base64.b64decode(answer.json()["data"][0]["b64_json"]))).all()


def test_a_phone(serve: Serve, open_tab: OpenTab) -> None:
    """360 pixels wide: nothing is cut off or to be scrolled sideways, in any state, and fingers find the controls."""
    server = serve(api_key="secret")
    tab = open_tab(server.url, viewport={"width": 360, "height": 740}, device_scale_factor=2, is_mobile=True,
                   has_touch=True)
    page = tab.page

    def fits() -> None:
        sizes = page.evaluate("""() => [...document.querySelectorAll("body *")].filter(node => node.checkVisibility())
          .map(node => [node.tagName, node.getBoundingClientRect().left, node.getBoundingClientRect().right])""")
        assert page.evaluate("document.documentElement.scrollWidth") == 360 == page.evaluate("innerWidth")
        assert not [size for size in sizes if size[1] < 0 or size[2] > 360]

    expect(page.locator("#key")).to_be_visible()
    fits()
    page.fill("#key", "w" * 200)
    page.get_by_role("button", name="Use key").tap()
    tab.alert("Incorrect or missing API key")
    fits()
    page.fill("#key", "secret")
    page.get_by_role("button", name="Use key").tap()
    expect(page.locator("#policy option")).not_to_have_count(0)
    tab.refused(401)
    page.fill("#prompt", "a heart")
    page.get_by_role("button", name="Draw").tap()
    tab.states("done", "done")
    fits()
    left, right = (page.locator(".frame").nth(index).bounding_box() for index in (0, 1))
    assert left["y"] == right["y"] and left["x"] + left["width"] < right["x"] and left["width"] > 140
    for control in page.locator("textarea, select, input:not([type=checkbox]), button, .choices label").all():
        box = control.bounding_box()
        assert box is None or box["height"] >= 28, box
    for picture in page.locator("figure").all():
        assert picture.locator("canvas").evaluate("node => getComputedStyle(node).imageRendering") == "pixelated"
    page.fill("#prompt", "x" * 100)
    page.get_by_role("button", name="Draw").tap()
    tab.alert("Prompt must be at most 80 characters long")
    fits()
    tab.complaints.clear()


def test_a_key(serve: Serve, open_tab: OpenTab, pipe: Pipeline) -> None:
    """Is asked for, sent, and remembered by this tab; a wrong one is said."""
    server = serve(api_key="sécret 鍵")
    tab = open_tab(server.url)
    page = tab.page
    expect(page.get_by_label("API key")).to_be_focused()
    expect(page.get_by_role("alert")).to_be_hidden()
    page.keyboard.type("another")
    page.keyboard.press("Enter")
    tab.alert("Incorrect or missing API key")
    page.fill("#key", "sécret 鍵")
    page.press("#key", "Enter")
    expect(page.locator("#key-form")).to_be_hidden()
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.locator("#prompt")).to_be_focused()
    tab.refused(401)
    page.reload()
    expect(page.locator("#policy option")).not_to_have_count(0)
    expect(page.locator("#key-form")).to_be_hidden()
    page.uncheck("#beside")
    page.select_option("#policy", "full")
    tab.draw("a heart", 5)
    tab.states("done")
    assert (tab.pictures()[0] == expected(pipe, "a heart", 5)).all()
    with page.expect_download() as download:
        page.get_by_role("link", name="Plan").click()
    assert CachePlan.load(download.value.path()) == pipe.shape.full_plan()
    assert download.value.suggested_filename == "full.json"
    other = open_tab(server.url)
    expect(other.page.get_by_label("API key")).to_be_visible()
    other.refused(401)


def test_two_tabs_at_once(serve: Serve, open_tab: OpenTab, pipe: Pipeline, gate: threading.Event) -> None:
    """Everyone has his own picture."""
    server = serve(Limits(batch=4))
    tabs = [open_tab(server.url) for _ in range(2)]
    for tab, prompt, seed in zip(tabs, tiny.PROMPTS, (1, 2), strict=False):
        tab.draw(prompt, seed)
    until(lambda: busy(server.url) == 4)
    gate.set()
    for tab, prompt, seed in zip(tabs, tiny.PROMPTS, (1, 2), strict=False):
        tab.states("done", "done")
        assert (tab.pictures()[1] == expected(pipe, prompt, seed)).all()


def test_one_after_the_other(serve: Serve, open_tab: OpenTab, gate: threading.Event) -> None:
    """The second waits until the first is done, though there is a place for it; a new drawing ends the last one."""
    server = serve()
    tab = open_tab(server.url)
    tab.page.check("#turns")
    tab.draw("a heart", 1)
    until(lambda: busy(server.url) == 1)
    tab.draw("a heart", 2)
    until(lambda: cancelled(server.url) == 1)
    assert sum(each.endswith(PATH) for each in tab.requests) == 2
    tab.states("waits", "waits")
    gate.set()
    tab.states("done", "done")
    expect(tab.page.get_by_role("status")).to_have_text(re.compile("^Drawn one after the other with seed 2: "))
    assert sum(each.endswith(PATH) for each in tab.requests) == 3


def test_light_and_dark(serve: Serve, open_tab: OpenTab) -> None:
    """As the reader's system has it."""
    server, shots = serve(), []
    for scheme in ("light", "dark"):
        page = open_tab(server.url, color_scheme=scheme, viewport={"width": 900, "height": 700}).page
        expect(page.locator("#policy option")).not_to_have_count(0)
        with Image.open(io.BytesIO(page.screenshot())) as shot:
            shots.append(np.asarray(shot.convert("L")))
    assert shots[0].mean() > 200 and shots[1].mean() < 60
