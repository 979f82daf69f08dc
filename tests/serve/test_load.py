"""``ssd-janus serve`` under load: a process of its own, and hundreds of clients at once."""

from __future__ import annotations

import asyncio
import base64
import collections
import itertools
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from clients import CAPACITY, IMAGES, KEY, PATH, WAIT, Expected, Load, Process

pytestmark = pytest.mark.serve

WAITING = 24
KEPT_SECONDS = 30
GROWTH = 30  # objects of one type in a load, which has hundreds of requests
GROWTH_BYTES = 4 << 20  # resident; about one MB is noise
CLIENTS = {"draws": 40, "watches": 12, "leaves": 40, "stops_short": 20, "misspells": 50, "babbles": 6, "floods": 2,
           "sends_two": 4, "dawdles": 8, "browses": 4}


@pytest.fixture(scope="module")
def expected() -> Expected:
    return Expected()


@pytest.fixture
def serve(expected: Expected, tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Starts servers, and kills what is left of them."""
    made: list[Process] = []

    def start(*options: str) -> Process:
        room = tmp_path / str(len(made))
        expected.save(room)
        made.append(Process(room, *options))
        return made[-1]

    yield start
    for each in made:
        each.end()


def test_hundreds_of_clients(serve: Callable[..., Process], expected: Expected) -> None:
    """Nothing crashes, everyone has what he asked for, once; the counts add up; and nothing is left behind."""
    server = serve("--max-waiting", str(WAITING), "--keep-seconds", str(KEPT_SECONDS))
    held, before = [], {}

    async def load(seed: int) -> tuple[Load, dict[str, float]]:
        clients = Load(server.url, expected, random.Random(seed))
        try:
            await clients.come(CLIENTS)
            return clients, await clients.metrics()
        finally:
            await clients.close()

    for seed in range(3):
        clients, after = asyncio.run(load(seed))
        grown = {name: value - before.get(name, 0) for name, value in after.items()}
        before = after
        statuses: dict[int, int] = collections.Counter()
        for name, value in grown.items():
            if found := re.fullmatch(rf'ssd_janus_requests_total{{path="({PATH}|none)",status="(\d+)"}}', name):
                if found[1] == PATH or found[2] == "404":  # others without a route are /openapi.json
                    statuses[int(found[2])] += int(value)
        lost = sum(statuses.values()) - clients.answers.total()
        assert lost == clients.gone, (statuses, clients.answers)
        assert statuses.keys() <= {200, 400, 401, 404, 405, 413, 415, 422, 429, 499}
        for status, count in statuses.items():
            seen = clients.answers[status]
            assert seen <= count <= seen + clients.gone * (status in (200, 400, 413, 429, 499)), (status, statuses)
        assert clients.answers[429] and clients.answers[200] >= CLIENTS["draws"]

        drawn, cancelled, failed = (int(grown.get(f'ssd_janus_pictures_total{{outcome="{outcome}"}}', 0))
                                    for outcome in ("drawn", "cancelled", "failed"))
        accepted = int(grown["ssd_janus_pictures_accepted_total"])
        assert accepted == drawn + cancelled and not failed and cancelled
        assert clients.drawn <= drawn and accepted <= clients.drawn + clients.gone_pictures
        assert grown["ssd_janus_drawing_seconds_count"] == drawn
        assert all(after[f"ssd_janus_pictures_{name}"] == 0 for name in ("waiting", "joining", "running"))
        held.append(server.holds())
    log = server.log
    assert "Traceback" not in log and "Task" not in log, log
    assert after["ssd_janus_pictures_kept"]
    end = time.monotonic() + KEPT_SECONDS + WAIT
    while "ssd_janus_pictures_kept 0.0" not in httpx2.get(f"{server.url}/metrics").text:
        assert time.monotonic() < end
        time.sleep(1)
    held[-1] = server.holds()
    assert_nothing_grows(held)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(WAIT) == 0


def assert_nothing_grows(held: list[dict[str, Any]]) -> None:
    """In every load after the first: what is made once, or fluctuates, is no leak."""
    grown = {name: min(later["objects"].get(name, 0) - former["objects"].get(name, 0)
                       for former, later in itertools.pairwise(held)) for name in held[-1]["objects"]}
    assert all(count < GROWTH for count in grown.values()), {name: grown[name] for name in grown if grown[name] > 9}
    for name in ("tasks", "threads", "descriptors"):
        assert held[-1][name] <= held[0][name] + 3, (name, [each[name] for each in held])
    assert min(later["bytes"] - former["bytes"] for former, later in itertools.pairwise(held)) < GROWTH_BYTES, [
        each["bytes"] for each in held]


@pytest.mark.parametrize(("grace", "signals", "code"), [(300, 1, 0), (0, 1, 0), (300, 2, 130)])
def test_ending_under_load(serve: Callable[..., Process], expected: Expected, grace: int, signals: int, code: int
                           ) -> None:
    """What was asked for is drawn, or refused after the grace period; a second signal does not wait for it."""
    server, clients = serve("--max-waiting", "200", "--grace", str(grace)), 30

    async def one(load: Load) -> int:
        wanted = load.wanted(IMAGES)
        try:
            answer = await load.http.post(server.url + PATH, json=wanted, headers={"Authorization": f"Bearer {KEY}"})
        except (httpx2.NetworkError, httpx2.RemoteProtocolError):
            return 0
        if answer.status_code == 200:
            load.check(wanted, [base64.b64decode(each["b64_json"]) for each in answer.json()["data"]])
        else:
            assert answer.json()["error"]["code"] == "unavailable" and int(answer.headers["retry-after"]) >= 1
        return answer.status_code

    async def load() -> tuple[list[int], int]:
        made = Load(server.url, expected, random.Random(grace + signals))
        try:
            asked = [asyncio.create_task(one(made)) for _ in range(clients)]
            while (await made.metrics())["ssd_janus_pictures_accepted_total"] < clients * IMAGES:
                await asyncio.sleep(0.01)
            server.process.send_signal(signal.SIGTERM)
            assert int(await asyncio.to_thread(server.said, r"ending: (\d+) pictures have ")) > CAPACITY
            late = await one(made)
            if signals == 2:
                server.process.send_signal(signal.SIGTERM)
            return await asyncio.wait_for(asyncio.gather(*asked), WAIT), late
        finally:
            await made.close()

    statuses, late = asyncio.run(load())
    assert server.process.wait(WAIT) == code, server.log
    assert set(statuses) <= {(300, 1): {200}, (0, 1): {200, 503}, (300, 2): {200, 0}}[grace, signals]
    assert late in (503, 0) and (grace, signals) == (300, 1) or statuses.count(200) < clients
    assert "Traceback" not in server.log, server.log
