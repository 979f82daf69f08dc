"""Servers in this process, and what clients make of them."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from PIL import Image

from ssd_janus import Pipeline
from ssd_janus.engine import Engine, Sampling, Slots
from ssd_janus.serve.server import Server
from ssd_janus.serve.service import Limits, Service

LIMITS = Limits(batch=2, waiting=3, images=3, prompt=80, body=1000, body_seconds=1)
PATH = "/v1/images/generations"
Serve = Callable[..., Server]


@contextmanager
def started(pipe: Pipeline) -> Iterator[Serve]:
    """Starts servers of a model in this process, which end with the block."""
    made = []

    def start(limits: Limits = LIMITS, api_key: str | None = None) -> Server:
        made.append(Server(Service(pipe, name="tiny/janus", limits=limits), port=0, api_key=api_key))
        return made[-1]

    try:
        yield start
    finally:
        for server in made:
            server.stop(0)


@contextmanager
def held_steps() -> Iterator[threading.Event]:
    """Holds the drawing threads before every step until the event is set, or the block ends."""
    open_, step = threading.Event(), Slots.step

    def held(slots: Slots) -> None:
        assert open_.wait(60)
        step(slots)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Slots, "step", held)
        try:
            yield open_
        finally:
            open_.set()


def client(server: Server | str, key: str = "none", **options: Any) -> openai.OpenAI:
    url = server if isinstance(server, str) else server.url
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, **{"max_retries": 0, "timeout": 60, **options})


def post(server: Server, body: Any, **options: Any) -> httpx2.Response:
    data = {"json": body} if isinstance(body, dict) else {"content": body}
    headers = {"Content-Type": "application/json", **options.pop("headers", {})}
    return httpx2.post(server.url + PATH, headers=headers, timeout=60, **data, **options)


def pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png), formats=["PNG"]) as picture:
        return np.asarray(picture)


@cache
def engine(pipe: Pipeline) -> Engine:
    return Engine(pipe.model)


@cache
def expected(pipe: Pipeline, prompt: str, seed: int, guidance: float = 2.0, **settings: Any) -> np.ndarray:
    """What the engine draws alone."""
    tokens = engine(pipe).generate(pipe.prompt_tokens([prompt]), guidance=guidance, seeds=[seed],
                                   sampling=Sampling.of(pipe.model, do_sample=True, **settings))
    return np.asarray(pipe.decode(tokens)[0])


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)
