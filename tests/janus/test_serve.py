"""``ssd-janus serve``: real sockets, OpenAI's own client, and clients that misbehave."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
import tiny
import torch
from servers import LIMITS, PATH, Serve, client, expected, held_steps, pixels, post, started, until
from typer.testing import CliRunner

import ssd_janus.cli
from ssd_janus import Pipeline
from ssd_janus.engine import PictureRequest, Slots, Ticket
from ssd_janus.serve import connections
from ssd_janus.serve.kept import KeptPictures
from ssd_janus.serve.metrics import Metrics
from ssd_janus.serve.server import Server
from ssd_janus.serve.service import Limits, Service

HEAD = f"POST {PATH} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n".encode()


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline(tiny.build_model(), tiny.build_processor())


@pytest.fixture
def serve(pipe: Pipeline) -> Iterator[Serve]:
    with started(pipe) as start:
        yield start


def connection(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), 60)


def read(client: socket.socket) -> bytes:
    """All that comes until the server ends the connection, in whichever way."""
    parts = []
    with suppress(ConnectionError):
        while parts[-1:] != [b""]:
            parts.append(client.recv(1 << 16))
    return b"".join(parts)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    with held_steps() as let_go:
        yield let_go


def load(server: Server) -> dict[str, Any]:
    return httpx2.get(f"{server.url}/health").json()


def busy(server: Server) -> tuple[int, int, int]:
    found = server.service.scheduler.load
    return found.waiting, found.joining, found.running


def test_concurrent_requests_have_their_own_pictures(serve: Serve, pipe: Pipeline) -> None:
    """Each answered once, with what the engine draws of its seed; nothing is left behind."""
    server = serve(Limits(batch=3, waiting=40))
    asked = [(tiny.PROMPTS[number % 4], 100 + number // 2) for number in range(8)]

    def draw(request: tuple[str, int]) -> list[np.ndarray]:
        images = client(server).images.generate(prompt=request[0], n=1 + request[1] % 2, size="24x24",
                                                response_format="b64_json", extra_body={"seed": request[1]})
        return [pixels(base64.b64decode(image.b64_json)) for image in images.data]

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(draw, asked))
    for (prompt, seed), pictures in zip(asked, answers, strict=True):
        assert len(pictures) == 1 + seed % 2
        for number, picture in enumerate(pictures):
            assert (picture == expected(pipe, prompt, seed + number)).all()
    assert not any(busy(server)) and server.service.scheduler.load.finished == sum(map(len, answers))
    text = httpx2.get(f"{server.url}/metrics").text
    assert f'ssd_janus_pictures_total{{outcome="drawn"}} {sum(map(len, answers))}.0' in text
    assert f'ssd_janus_requests_total{{path="{PATH}",status="200"}} 8.0' in text
    assert "ssd_janus_pictures_capacity 3.0" in text and "ssd_janus_waiting_seconds_count 12.0" in text
    assert "ssd_janus_pictures_accepted_total 12.0" in text and "ssd_janus_pictures_kept 0.0" in text


def test_openais_client(serve: Serve, pipe: Pipeline) -> None:
    """Models, URLs, a seed that is told, settings, and rows while they are drawn."""
    server = serve(api_key="secret")
    user = client(server, "secret")
    assert [model.id for model in user.models.list()] == ["tiny/janus"] and user.models.retrieve("tiny/janus").created
    answer = user.images.generate(prompt="a heart", model="tiny/janus", response_format="url", user="me", n=2)
    first, second = answer.data
    assert first.url != second.url and first.b64_json is None and answer.size == "24x24"
    assert second.seed == first.seed + 1 and answer.usage.output_tokens == 2 * tiny.TOKENS
    file = httpx2.get(first.url)
    assert file.headers["content-type"] == "image/png"
    assert (pixels(file.content) == expected(pipe, "a heart", first.seed)).all()
    assert httpx2.get(f"{server.url}/pictures/guess.png").json()["error"]["code"] == "picture_not_found"

    settings = {"temperature": 0.8, "top_k": 3, "top_p": 0.9}
    unguided = user.images.generate(prompt="a heart", extra_body={"seed": 5, "guidance_scale": 1, **settings})
    assert (pixels(base64.b64decode(unguided.data[0].b64_json)) == expected(pipe, "a heart", 5, 1.0, **settings)).all()
    events = list(user.images.generate(prompt="a heart", stream=True, partial_images=2, extra_body={"seed": 5}))
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image", "partial_image", "completed"]
    parts = [pixels(base64.b64decode(event.b64_json)) for event in events]
    assert (parts[-1] == expected(pipe, "a heart", 5)).all()
    for part, rows in zip(parts, (2, 4), strict=False):
        assert part.shape == parts[-1].shape and (part[4 * rows:] == 127).all()
        assert not (part[4 * rows - 4:4 * rows] == 127).all()
    assert [event.partial_image_index for event in events[:2]] == [0, 1]

    for header in ("", "Bearer", "secret", "Basic secret", "Bearer Secret", "Bearer secret2", "Bearer sécret"):
        refusal = post(server, {"prompt": "a heart"}, headers={"Authorization": header.encode()})
        assert refusal.status_code == 401 and refusal.json()["error"]["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        client(server, "wrong").models.list()
    assert httpx2.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize(("body", "status", "param", "message"), [
    (b"", 400, None, "the body must be a JSON object"), (b"{", 400, None, "the body must be a JSON object"),
    (b"[]", 400, None, "the body must be a JSON object"), (b"[" * 900, 400, None, "the body must be a JSON"),
    (b'{"prompt": "\xff"}', 400, None, ""), (b'{"prompt": "\\ud800"}', 400, None, ""),
    ({}, 400, "prompt", "missing required parameter: 'prompt'"), ({"prompt": 5}, 400, "prompt", "got '5'"),
    ({"prompt": " "}, 400, "prompt", "must not be blank"), ({"prompt": "a" * 81}, 422, "prompt", "at most 80 charac"),
    ({"prompt": "a <image_placeholder>"}, 400, "prompt", "must not contain <image_placeholder>"),
    ({"prompt": "é" * 40}, 422, "prompt", "tokens long"),
    ({"prompt": "a", "n": 0}, 400, "n", "greater than"), ({"prompt": "a", "n": True}, 400, "n", "valid integer"),
    ({"prompt": "a", "n": 4}, 422, "n", "n must be within 1 .. 3, got 4"),
    ({"prompt": "a", "size": "1024x1024"}, 400, "size", "size must be 24x24"),
    ({"prompt": "a", "model": "other"}, 404, "model", "does not exist"),
    ({"prompt": "a", "response_format": "jpeg"}, 400, "response_format", "got 'jpeg'"),
    ({"prompt": "a", "quality": "hd"}, 400, "quality", "got 'hd'"),
    ({"prompt": "a", "steps": 4}, 400, "steps", "unknown parameter: 'steps'"),
    ({"prompt": "a", "seed": -1}, 400, "seed", "got '-1'"), ({"prompt": "a", "seed": 2**63}, 400, "seed", ""),
    ({"prompt": "a", "top_p": 0}, 400, "top_p", "greater than 0"), (b'{"prompt": "a", "top_p": NaN}', 400, None, ""),
    ({"prompt": "a", "partial_images": 1}, 400, "partial_images", "needs stream"),
    ({"prompt": "a", "stream": True, "partial_images": 6}, 400, "partial_images", "within 0 .. 5"),
    ({"prompt": "a", "stream": True, "n": 2}, 400, "n", "n must be 1 with stream"),
    (b" " * 1000, 400, None, "the body must be a JSON object"),
    (b" " * 1001, 413, None, "at most 1000 bytes"), (b" " * 10**6, 413, None, "at most 1000 bytes")])
def test_malformed_requests(refusing: Server, body: Any, status: int, param: str | None, message: str) -> None:
    answer = post(refusing, body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert (answer.headers.get("connection") == "close") == (status == 413)
    assert message in error["message"] and len(error["message"]) < 300
    if param is not None:
        assert error["param"] == param


@pytest.fixture(scope="module")
def refusing(pipe: Pipeline) -> Iterator[Server]:
    """A server that has drawn nothing in the end."""
    server = Server(Service(pipe, limits=LIMITS), port=0)
    yield server
    assert server.service.scheduler.load.finished == 0
    server.stop(0)


def test_other_kinds_of_bad_requests(refusing: Server) -> None:
    assert post(refusing, b'{"prompt": "a"}', headers={"Content-Type": "text/plain"}).status_code == 415
    for path, method, status in (("/nowhere", "GET", 404), (PATH, "GET", 405), ("/pictures/..%2f.png", "GET", 404)):
        answer = httpx2.request(method, refusing.url + path)
        assert answer.status_code == status and answer.json()["error"]["type"] == "invalid_request_error"
        assert answer.headers.get("allow") == ("POST" if status == 405 else None)
    with connection(refusing) as slow:  # sends no more of its body
        slow.sendall(HEAD + b"Content-Length: 9\r\n\r\n{")
        assert read(slow).startswith(b"HTTP/1.1 408 ")
    with connection(refusing) as rude:
        rude.sendall(b"\x16\x03\x01 nonsense\r\n\r\n")
        assert read(rude).startswith(b"HTTP/1.1 400 ")
    with connection(refusing) as leaves:  # within its body
        leaves.sendall(HEAD + b"Content-Length: 9\r\n\r\n{")
        until(lambda: refusing._server.server_state.tasks)
    until(lambda: f'{{path="{PATH}",status="499"}} 1.0' in httpx2.get(f"{refusing.url}/metrics").text)
    assert load(refusing)["status"] == "ok"


def test_bodies_of_unknown_length(refusing: Server) -> None:
    """Are limited, too, and without end read for a while only; the same key and kind is wanted of them."""
    for size, kind, status in ((1001, "application/json", 413), (0, "application/json", 400), (9, "text/plain", 415)):
        answer = post(refusing, iter([b" " * size]), headers={"Content-Type": kind})
        assert answer.request.headers["transfer-encoding"] == "chunked" and answer.status_code == status
    with connection(refusing) as endless:
        endless.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        with pytest.raises(ConnectionError):
            while True:
                endless.sendall(b"100\r\n" + b" " * 256 + b"\r\n")


def test_nothing_moves(serve: Serve, gate: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who does not send, or does not read, is let go; who waits for a picture is not."""
    monkeypatch.setattr(connections, "STALLED", 1.0)
    server = serve(api_key="secret")
    body = json.dumps({"prompt": "a heart"}).encode()
    with ExitStack() as stack:
        waiting = stack.enter_context(connection(server))
        waiting.sendall(HEAD + b"Authorization: Bearer secret\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" %
                        len(body) + body)
        silent, slow, late, deaf = (stack.enter_context(connection(server)) for _ in range(4))
        slow.sendall(HEAD)
        late.sendall(HEAD + b"Content-Length: 9\r\n\r\n{")  # is answered, for it has no key
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        deaf.settimeout(0.5)
        with suppress(OSError):
            while True:
                deaf.sendall(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n" * 100)
        assert read(silent) == read(slow) == b"" and read(late).startswith(b"HTTP/1.1 401 ")
        until(lambda: len(server._server.server_state.connections) == 1)
        gate.set()
        assert read(waiting).startswith(b"HTTP/1.1 200 ")
    assert server.service.scheduler.load.finished == 1


def test_vanished_clients_free_their_slots_and_a_full_queue_refuses(serve: Serve, gate: threading.Event) -> None:
    server = serve(replace(LIMITS, batch=1, waiting=4))
    body = [json.dumps({"prompt": "a heart", **more}).encode() for more in ({}, {"stream": True, "partial_images": 5})]
    sockets = []
    for number in range(5):  # one is drawn, the others wait
        sockets.append(connection(server))
        sockets[-1].sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body[number % 2]) + body[number % 2])
        until(lambda number=number: sum(busy(server)) == number + 1)
    refusal = post(server, {"prompt": "a heart"})
    assert refusal.status_code == 429 and int(refusal.headers["retry-after"]) >= 1
    assert refusal.json()["error"]["type"] == "rate_limit_error" and "may wait" in refusal.json()["error"]["message"]
    for each in sockets:
        each.sendall(body[0])  # what they send more does not hide that they leave
        time.sleep(0.05)
        each.close()
    until(lambda: 'outcome="cancelled"} 5.0' in httpx2.get(f"{server.url}/metrics").text)
    gate.set()
    until(lambda: not any(busy(server)))
    assert server.service.scheduler.load.finished == 0
    assert post(server, {"prompt": "a heart", "n": 2}).status_code == 200


def test_ending_draws_what_was_asked_for(serve: Serve, gate: threading.Event) -> None:
    """New ones are refused meanwhile, and after the grace period the others, too."""
    for grace, status in ((60, 200), (0, 503)):
        gate.clear()
        server = serve()
        with ThreadPoolExecutor(2) as threads:
            answers = [threads.submit(post, server, {"prompt": "a heart", "n": 3})]
            until(lambda server=server: server.service.scheduler.load.waiting == 1)
            ending = threads.submit(server.stop, grace)
            until(lambda server=server: server.service.closing)
            if grace:
                answer = post(server, {"prompt": "a heart"})
                assert answer.status_code == 503 and "retry-after" in answer.headers
                assert httpx2.get(f"{server.url}/health").status_code == 503
            gate.set()
            assert answers[0].result(60).status_code == status
            ending.result(60)
        with pytest.raises(httpx2.ConnectError):
            load(server)


def test_a_broken_device_is_told(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Slots) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(Slots, "step", broken)
    server = serve()
    with pytest.raises(openai.InternalServerError, match="drawing failed; the server's log says why"):
        client(server).images.generate(prompt="a heart")
    assert 'ssd_janus_pictures_total{outcome="failed"} 1.0' in httpx2.get(f"{server.url}/metrics").text
    assert load(server)["status"] == "failed" and post(server, {"prompt": "a heart"}).status_code == 503


def test_errors_end_streams(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()

    def broken(*_: Any) -> bytes:
        raise MemoryError("no room")

    monkeypatch.setattr(Service, "_png", broken)
    with pytest.raises(openai.APIError, match="drawing failed"):
        list(client(server).images.generate(prompt="a heart", stream=True, partial_images=1))
    until(lambda: not any(busy(server)))


def test_kept_pictures_are_bounded_and_expire() -> None:
    now = [0.0]
    kept = KeptPictures(10, 5, lambda: now[0])
    first, second = kept.keep(b"12345"), kept.keep(b"1234")
    assert first != second and len(first) >= 32 and kept.get(first) == b"12345"
    third = kept.keep(b"12")
    assert kept.get(first) is None and kept.get(second) == b"1234" and kept.nbytes == 6
    now[0] = 5.0
    assert kept.get(third) is None and kept.nbytes == 0 and kept.get(kept.keep(b"1" * 11)) is None


def test_times_are_from_the_request_on(serve: Serve) -> None:
    scheduler = serve().service.scheduler
    metrics, ticket = Metrics(scheduler), Ticket(scheduler, PictureRequest([3]), None, 1.0)
    ticket.joined, ticket.first_row, ticket.finished = 3.0, 4.0, 9.0
    ticket.set_result(torch.zeros(1))
    metrics.done(ticket)
    text = metrics.text().decode()
    for name, seconds in (("waiting", 2.0), ("first_row", 3.0), ("drawing", 8.0)):
        assert f"ssd_janus_{name}_seconds_sum {seconds}" in text


def test_limits_are_checked() -> None:
    with pytest.raises(ValueError, match="batch must be at least 1"):
        Limits(batch=0)
    with pytest.raises(ValueError, match="images of a request must be at most waiting = 4, got 10"):
        Limits(waiting=4)


def test_the_command(folder: Path) -> None:
    """From the start to SIGTERM, which lets a picture be finished."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "SSD_JANUS_API_KEY": "from the environment",
                   "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "ssd_janus.cli", "serve", "--model", str(folder), "--port", "0", "--policy", "window",
         "--budget", "0.5", "--name", "tiny"], stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        url = re.search(r"drawing tiny, 24x24, at (http://127\.0\.0\.1:\d+)", process.stderr.readline())
        assert url is not None
        user = client(url[1], "from the environment")
        assert user.images.generate(prompt="a heart", model="tiny").data[0].b64_json
        with pytest.raises(openai.AuthenticationError):
            client(url[1], "another").images.generate(prompt="a heart")
        events = iter(user.images.generate(prompt="a heart", stream=True, partial_images=5))
        assert next(events).partial_image_index == 0
        process.send_signal(signal.SIGTERM)
        assert [event.type for event in events][-1] == "image_generation.completed"
        assert process.wait(60) == 0
        assert "pictures have 30 s" in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_what_the_command_refuses(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """In one line; a missing extra is named before a model is loaded."""
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(ssd_janus.cli.app, ["serve", "--model", str(folder), *arguments])
        assert result.exit_code == 2, result.output
        return " ".join(result.stderr.split())

    assert "must not be blank" in run("--api-key", " ")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "ddress already in use" in run("--port", str(taken.getsockname()[1]))
    assert "host must be a name or address of this machine" in run("--host", "no.such.host.invalid")
    monkeypatch.setattr(ssd_janus, "serve", ssd_janus.serve)  # which the import below replaces
    for module in [name for name in sys.modules if name.startswith(("ssd_janus.serve", "uvicorn"))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.setattr("ssd_janus.cli.serve.load", lambda *_: pytest.fail("loaded"))
    assert "this needs uvicorn, which is not installed: pip install '.[serve]'" in run()
