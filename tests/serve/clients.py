"""A server of ssd_janus in a process of its own, and its clients, many of which misbehave."""

from __future__ import annotations

import asyncio
import base64
import collections
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from PIL import Image

from ssd_janus import Pipeline
from ssd_janus.checks import sampling_options
from ssd_janus.engine import Engine, Sampling
from ssd_kernels.policies import build

sys.path.insert(0, str(Path(__file__).parents[1] / "janus"))
import tiny  # noqa: E402
from test_engine import plan_of_budget  # noqa: E402

PATH = "/v1/images/generations"
KEY = "a key"
CAPACITY, IMAGES, BODY = 4, 3, 3000
SEEDS = 2  # of the first picture of a request
WAIT = 600  # seconds, on a machine with much other work
SETTINGS: tuple[dict[str, Any], ...] = (
    {}, {"guidance_scale": 1}, {"guidance_scale": 4.0, "temperature": 0.8}, {"top_k": 5},
    {"guidance_scale": 0, "top_p": 0.8, "temperature": 1.3}, {"temperature": 0}, {"policy": "window", "budget": 0.4})
MALFORMED = (b"", b"{", b"[]", b"null", b"\0" * 50, b'{"prompt": "\xff"}', b"[" * 2000, b'{"prompt": {"a": 1}}',
             b'{"prompt": "a", "n": 1e99}', b'{"prompt": "a", "size": "9x9"}', b'{"prompt": "a", "seed": "1"}',
             b'{"prompt": "a", "stream": true, "n": 2}', b'{"prompt": "a", "guidance_scale": -1}')


class Expected:
    """What the engine draws of all that clients ask for."""

    def __init__(self) -> None:
        self._pipe = pipe = Pipeline(tiny.build_model(), tiny.build_processor())
        self._plan = plan_of_budget(pipe.model, 0.5)
        self._drawn: dict[str, np.ndarray] = {}
        asked = [(prompt, seed) for prompt in tiny.PROMPTS for seed in range(SEEDS + IMAGES - 1)]
        for settings in SETTINGS:
            sampling = sampling_options(*(settings.get(name) for name in ("temperature", "top_k", "top_p")))
            plan = build(settings["policy"], pipe.shape, settings["budget"]) if "policy" in settings else self._plan
            tokens = Engine(pipe.model, plan).generate(
                pipe.prompt_tokens([prompt for prompt, _ in asked]), guidance=settings.get("guidance_scale", 2.0),
                seeds=[seed for _, seed in asked], sampling=Sampling.of(pipe.model, **sampling))
            # One by one: pictures that are decoded together may be a bit off.
            for request, drawn in zip(asked, tokens, strict=True):
                self._drawn[repr((*request, settings))] = np.asarray(pipe.decode(drawn[None])[0])

    def save(self, folder: Path) -> None:
        """The model, its processor and the plan."""
        self._pipe.model.save_pretrained(folder)
        self._pipe.processor.save_pretrained(folder)
        self._plan.save(folder / "plan.json")

    def __call__(self, prompt: str, seed: int, settings: dict[str, Any]) -> np.ndarray:
        return self._drawn[repr((prompt, seed, settings))]


class Process:
    """A server, told to draw with a small model at a small budget."""

    def __init__(self, folder: Path, *options: str) -> None:
        """
        Args:
            folder: see `Expected.save`.
        """
        self._held, self._log = folder / "held.json", folder / "log.txt"
        command = [sys.executable, str(Path(__file__).with_name("probed_serve.py")), str(self._held), "serve",
                   "--model", str(folder), "--plan", str(folder / "plan.json"), "--port", "0", "--name", "tiny",
                   "--batch-size", str(CAPACITY), "--max-images", str(IMAGES), "--max-body", str(BODY), *options]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "SSD_JANUS_API_KEY": KEY,
                       "OMP_NUM_THREADS": "1"}
        with self._log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        self.url = self.said(r"drawing tiny, 24x24, at (http://127\.0\.0\.1:\d+)")

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def said(self, pattern: str) -> str:
        """What the server has said, once it has."""
        end = time.monotonic() + WAIT
        while not (found := re.search(pattern, self.log)):
            assert self.process.poll() is None and time.monotonic() < end, self.log
            time.sleep(0.05)
        return found[1]

    def holds(self) -> dict[str, Any]:
        """See `probed_serve.tell`."""
        self._held.unlink(missing_ok=True)
        self.process.send_signal(signal.SIGUSR1)
        end = time.monotonic() + WAIT
        while not self._held.exists():
            assert self.process.poll() is None and time.monotonic() < end, self.log
            time.sleep(0.05)
        found: dict[str, Any] = json.loads(self._held.read_text(encoding="utf-8"))
        return found

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclass
class Load:
    """Clients of one server.

    Attributes:
        answers: of requests that were sent wholly and whose answers were read, by their status.
        gone: requests whose answers nobody has read; ``gone_pictures``: that these asked for.
        drawn: pictures that were read.
        late: what is done after all others.
    """

    url: str
    expected: Expected
    chance: random.Random
    answers: collections.Counter[int] = field(default_factory=collections.Counter)
    gone: int = 0
    gone_pictures: int = 0
    drawn: int = 0
    late: list[Callable[[], Awaitable[None]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.http = httpx2.AsyncClient(timeout=WAIT, limits=httpx2.Limits(max_connections=None))
        self.user = openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=WAIT)

    def wanted(self, n: int = 1) -> dict[str, Any]:
        """A request for pictures, a few of which many ask for."""
        chance = self.chance
        return {"prompt": chance.choice(tiny.PROMPTS), "seed": chance.randrange(SEEDS), "n": n, "user": "me",
                **chance.choice(SETTINGS)}

    def check(self, wanted: dict[str, Any], pngs: list[bytes]) -> None:
        """Pictures are all that were asked for."""
        settings = {name: value for name, value in wanted.items() if name not in ("prompt", "seed", "n", "user")}
        assert len(pngs) == wanted["n"]
        for number, png in enumerate(pngs):
            with Image.open(io.BytesIO(png), formats=["PNG"]) as picture:
                found = np.asarray(picture)
            assert (found == self.expected(wanted["prompt"], wanted["seed"] + number, settings)).all(), wanted
        self.drawn += len(pngs)

    def head(self, length: int | str, *more: str, key: str = KEY) -> bytes:
        sent = f"Content-Length: {length}" if isinstance(length, int) else f"Transfer-Encoding: {length}"
        return "\r\n".join([f"POST {PATH} HTTP/1.1", "Host: a", "Content-Type: application/json",
                            f"Authorization: Bearer {key}", sent, *more, "", ""]).encode()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, port = self.url.removeprefix("http://").split(":")
        return await asyncio.open_connection(host, int(port))

    def count(self, status: int) -> None:
        self.answers[status] += 1

    async def draws(self) -> None:
        """Tries again as long as the queue is full."""
        wanted = self.wanted(self.chance.randint(1, IMAGES))
        settings = {name: wanted[name] for name in wanted if name not in ("prompt", "n", "user")}
        by_url = self.chance.random() < 0.3
        while True:
            try:
                answer = await self.user.images.generate(
                    prompt=wanted["prompt"], n=wanted["n"], user="me", size="24x24", extra_body=settings,
                    response_format="url" if by_url else "b64_json")
                break
            except openai.RateLimitError as error:
                assert int(error.response.headers["retry-after"]) >= 1
                assert error.type == "rate_limit_error" and error.code == "queue_full"
                self.count(429)
                await asyncio.sleep(self.chance.random())
        self.count(200)
        assert [each.seed for each in answer.data] == [wanted["seed"] + number for number in range(wanted["n"])]
        if by_url:
            files = [await self.http.get(each.url) for each in answer.data]
            assert all(file.headers["content-type"] == "image/png" for file in files)
            self.check(wanted, [file.content for file in files])
        else:
            self.check(wanted, [base64.b64decode(each.b64_json) for each in answer.data])

    async def watches(self) -> None:
        """Rows as they are drawn."""
        wanted = self.wanted()
        body = {**wanted, "stream": True, "partial_images": self.chance.randrange(6)}
        answer = await self.http.post(self.url + PATH, json=body, headers={"Authorization": f"Bearer {KEY}"})
        self.count(answer.status_code)
        if answer.status_code == 429:
            return
        assert answer.status_code == 200, answer.text
        events = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines()
                  if line.startswith("data: ")]
        assert [event["type"].rpartition(".")[2] for event in events] == (
            ["partial_image"] * body["partial_images"] + ["completed"]), answer.text[:1000]
        self.check(wanted, [base64.b64decode(events[-1]["b64_json"])])

    async def leaves(self) -> None:
        """Before there is an answer, in the middle of a stream, after one more request, or when there may be one."""
        reader, writer = await self.connect()
        stream, wanted = self.chance.random() < 0.5, self.wanted()
        body = json.dumps({**wanted, **({"stream": True, "partial_images": 5} if stream else {})}).encode()
        self.gone, self.gone_pictures = self.gone + 1, self.gone_pictures + 1
        writer.write(self.head(len(body)) + body)
        await writer.drain()
        if stream and self.chance.random() < 0.7:
            if (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200"):
                await reader.readuntil(b"\n\n")
        else:
            await asyncio.sleep(self.chance.random() / 5)
        if self.chance.random() < 0.5:
            writer.transport.abort()
        writer.close()

    async def stops_short(self) -> None:
        """Leaves, or ends its stream, within a request."""
        reader, writer = await self.connect()
        begun = self.head(100, "Expect: 100-continue") + b'{"prompt": '
        cut = self.chance.choice([0, 1, 30, len(begun) - 5, len(begun)])
        writer.write(begun[:cut])
        await writer.drain()
        await asyncio.sleep(self.chance.random() / 5)
        if cut >= len(begun) - 11:
            self.gone += 1  # it had a head
        writer.close()

    async def refused(self, status: int, sent: bytes) -> None:
        """A request on a connection of its own, and exactly one answer."""
        reader, writer = await self.connect()
        try:
            writer.write(sent)
            answer = await reader.read()
        finally:
            writer.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(f"HTTP/1.1 {status} ".encode()) and answer.count(b"HTTP/1.1 ") == 1, answer
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
        self.count(status)

    async def misspells(self) -> None:
        close, body = "Connection: close", self.chance.choice(MALFORMED)
        long = b" " * self.chance.choice([BODY + 1, 20 * BODY])
        chunk = b"%x\r\n%s\r\n" % (len(long) // 3, long[:len(long) // 3])
        fine = json.dumps(self.wanted()).encode()
        many = json.dumps({**self.wanted(), "n": IMAGES + 1}).encode()
        await self.refused(*self.chance.choice([
            (400, self.head(len(body), close) + body), (400, self.head(len(body), close) + body),
            (413, self.head(len(long), close) + long), (413, self.head("chunked", close) + 4 * chunk + b"0\r\n\r\n"),
            (401, self.head(len(fine), close, key="another") + fine), (422, self.head(len(many), close) + many),
            (415, self.head(len(fine), close).replace(b"/json", b"/xml") + fine),
            (405, b"PUT" + self.head(0, close)[4:]), (404, self.head(len(fine), close).replace(b"v1", b"v2") + fine)]))

    async def babbles(self) -> None:
        """What is no HTTP."""
        reader, writer = await self.connect()
        writer.write(self.chance.choice([b"\x16\x03\x01\x02\0", b"\0" * 70_000, b"GET / HTTP/9\r\n\r\n", b"a" * 99]))
        writer.write(b"\r\n\r\n")
        try:
            assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
        except ConnectionResetError:  # it still wrote
            pass
        writer.close()

    async def floods(self) -> None:
        """A body without end, which nobody reads for long."""
        reader, writer = await self.connect()
        self.gone += 1
        writer.write(self.head("chunked"))
        with pytest.raises(ConnectionError):
            while True:
                writer.write(b"400\r\n%s\r\n" % (b" " * 1024))
                await writer.drain()
        writer.close()

    async def browses(self) -> None:
        """What else there is."""
        for path in ("/", "/v1/plans", "/v1/models", "/metrics", "/openapi.json"):
            assert (await self.http.get(self.url + path, headers={"Authorization": f"Bearer {KEY}"})).is_success

    async def sends_two(self) -> None:
        """At once, on one connection: answered in their order."""
        reader, writer = await self.connect()
        asked = [self.wanted(), self.wanted(2)]
        bodies = [json.dumps(each).encode() for each in asked]
        writer.write(self.head(len(bodies[0])) + bodies[0] + self.head(len(bodies[1]), "Connection: close") + bodies[1])
        for wanted in asked:
            head = await reader.readuntil(b"\r\n\r\n")
            status, length = int(head.split()[1]), re.search(rb"content-length: (\d+)", head)
            assert length is not None
            body = json.loads(await reader.readexactly(int(length[1])))
            self.count(status)
            if status != 429:
                self.check(wanted, [base64.b64decode(each["b64_json"]) for each in body["data"]])
        assert await reader.read() == b""
        writer.close()

    async def dawdles(self) -> None:
        """Reads only when all others have been served, or never."""
        reader, writer = await self.connect()
        wanted, never = self.wanted(IMAGES), self.chance.random() < 0.5
        body = json.dumps(wanted).encode()
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(self.head(len(body), "Connection: close") + body)
        if never:
            self.gone, self.gone_pictures = self.gone + 1, self.gone_pictures + IMAGES

        async def read() -> None:
            if not never:
                writer.transport.resume_reading()  # type: ignore[attr-defined]
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
                self.count(int(head.split()[1]))
                if not head.startswith(b"HTTP/1.1 429"):
                    self.check(wanted, [base64.b64decode(each["b64_json"]) for each in json.loads(body)["data"]])
            writer.close()

        self.late.append(read)

    async def come(self, clients: dict[str, int]) -> None:
        """So many of each kind, in any order, within two seconds; until all have gone."""
        async def one(kind: str) -> None:
            await asyncio.sleep(self.chance.random() * 2)
            await getattr(self, kind)()

        await asyncio.gather(*(asyncio.wait_for(one(kind), WAIT) for kind, count in clients.items()
                               for _ in range(count)))
        for late in self.late:
            await asyncio.wait_for(late(), WAIT)
        while any(await self.busy()):
            await asyncio.sleep(0.05)

    async def busy(self) -> tuple[int, ...]:
        answer = (await self.http.get(f"{self.url}/health")).json()
        assert answer["status"] == "ok" and answer["capacity"] == CAPACITY
        return tuple(answer[name] for name in ("waiting", "joining", "running"))

    async def metrics(self) -> dict[str, float]:
        text = (await self.http.get(f"{self.url}/metrics")).text
        return {name: float(value) for name, value in re.findall(r"^(ssd_janus\S+) (\S+)$", text, re.MULTILINE)}

    async def close(self) -> None:
        await self.http.aclose()
        await self.user.close()
