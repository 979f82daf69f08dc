"""What draws for a server: requests become tickets of a `Scheduler`, tokens become PNGs."""

from __future__ import annotations

import asyncio
import io
import math
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from PIL import Image

from ssd_kernels import CachePlan
from ssd_kernels.policies import HeadProfile

from ..checks import check_number, sampling_options
from ..engine import Closed, Engine, PictureRequest, QueueFull, Sampling, Scheduler, Ticket
from ..engine.scheduler import RowsDrawn
from ..pipeline import Pipeline
from .metrics import Metrics
from .plans import Plans
from .schema import ImageRequest, Refused

RANDOM_SEEDS = 2**32
LONGEST_RETRY = 600  # seconds
LETTING_GO = 30.0  # seconds for the last step, after which a device counts as stuck
UNDRAWN = (127, 127, 127)  # what a partial picture has below its rows


@dataclass(frozen=True)
class Limits:
    """Of one server.

    Attributes:
        batch: pictures that are drawn at once; ``waiting``: that may wait for a place.
        images: of one request.
        prompt: characters; ``body``: bytes of a request.
        body_seconds: within which a request has to arrive.
        kept_bytes: of all pictures that are kept under a URL, each for ``kept_seconds``.
    """

    batch: int = 8
    waiting: int = 256
    images: int = 10
    prompt: int = 4000
    body: int = 64 << 10
    body_seconds: int = 30
    kept_bytes: int = 256 << 20
    kept_seconds: int = 3600

    def __post_init__(self) -> None:
        for field in fields(self):
            check_number(field.name, getattr(self, field.name), int, 1)
        if self.images > self.waiting:
            raise ValueError(f"images of a request must be at most waiting = {self.waiting}, got {self.images}")


class Drawn(NamedTuple):
    """A picture, or its first rows, as a PNG, and the seconds that it was drawn for until then."""

    png: bytes
    seconds: float


class Service:
    """A model that draws for many. All but `finish` is for the thread of the event loop.

    Attributes:
        name: of the model; ``size``: of its pictures, as in ``"384x384"``; ``rows``: of their grids.
        limits: in force.
        plans: that requests may name.
        metrics: of what was drawn.
        closing: nothing more is taken.
    """

    def __init__(self, pipe: Pipeline, plan: CachePlan | None = None, *, name: str = "janus",
                 limits: Limits | None = None, guidance_scale: float | None = None,
                 profile: HeadProfile | None = None, any_plan: bool = False) -> None:
        """
        Args:
            pipe: the model. Its weights are read as they are now.
            plan: what caches keep of requests that name no other; None keeps everything.
            name: that clients call it by.
            limits: None for the defaults.
            guidance_scale: of requests that name none; None for the model's default.
            profile: of the model's heads, for requests that name policies which need one.
            any_plan: as of `Engine.slots`; where no step is captured, as on a CPU, requests may always name plans.

        Raises:
            TypeError, ValueError: the engine cannot draw this in slots.
        """
        self.pipe, self.name, self.limits = pipe, name, limits or Limits()
        self.guidance = pipe.guidance(guidance_scale)
        self.closing = False
        self.columns = pipe.shape.columns
        self.rows = pipe.shape.num_visual_tokens // self.columns
        width, height = pipe.decode(torch.zeros(1, self.columns, dtype=torch.long))[0].size
        self.pixels = width, height * self.rows
        self.size = "{}x{}".format(*self.pixels)
        self._slots = Engine(pipe.model, plan, backend=pipe.backend).slots(self.limits.batch, any_plan=any_plan)
        self.plans = Plans(pipe.shape, self._slots.engine.plan, profile, self._slots.any_plan)
        self.scheduler = Scheduler(self._slots, max_waiting=self.limits.waiting)
        self.metrics = Metrics(self.scheduler)
        self._seconds = 0.0  # that the last picture was drawn for
        self._decoding = ThreadPoolExecutor(1, "ssd_janus decoding")  # one at a time, as memory is bounded
        self._planning = ThreadPoolExecutor(1, "ssd_janus planning")

    @property
    def healthy(self) -> bool:
        """Whether pictures are taken; False while closing, and for ever after the device failed."""
        return not (self.closing or self.scheduler.closed)

    async def plan(self, policy: str | None, budget: float | None) -> CachePlan:
        """See `Plans.get`; large models' plans take a while."""
        return await asyncio.get_running_loop().run_in_executor(self._planning, self.plans.get, policy, budget)

    async def offers(self) -> dict[str, Any]:
        """See `Plans.offers`."""
        return await asyncio.get_running_loop().run_in_executor(self._planning, lambda: self.plans.offers)

    def requests(self, asked: ImageRequest, plan: CachePlan | None = None) -> list[PictureRequest]:
        """The pictures that a client asks for, drawn with ``plan`` or the server's own; their seeds count on.

        Raises:
            Refused: this model does not draw them; the error names the parameter.
        """
        n = 1 if asked.n is None else asked.n
        if asked.model not in (None, self.name):
            raise Refused(404, f"the model {asked.model[:60]!r} does not exist; this server draws with {self.name!r}",
                          "model", "model_not_found")
        if n > self.limits.images:
            raise Refused(422, f"n must be within 1 .. {self.limits.images}, got {n}", "n", "invalid_value")
        if asked.size not in (None, "auto", self.size):
            raise Refused(400, f"size must be {self.size}, which is all that this model draws, got {asked.size[:60]!r}",
                          "size", "invalid_value")
        if asked.stream and n != 1:
            raise Refused(400, f"n must be 1 with stream, got {n}", "n", "invalid_value")
        if asked.stream and asked.response_format == "url":
            raise Refused(400, "response_format must be b64_json with stream, got 'url'", "response_format",
                          "invalid_value")
        if asked.partial_images and not asked.stream:
            raise Refused(400, "partial_images needs stream", "partial_images", "invalid_value")
        if (asked.partial_images or 0) >= self.rows:
            raise Refused(400, f"partial_images must be within 0 .. {self.rows - 1}, got {asked.partial_images}",
                          "partial_images", "invalid_value")
        prompt = self._prompt(asked.prompt)
        seed = secrets.randbelow(RANDOM_SEEDS) if asked.seed is None else asked.seed
        guidance = self.guidance if asked.guidance_scale is None else asked.guidance_scale
        try:
            sampling = Sampling.of(self.pipe.model, **sampling_options(asked.temperature, asked.top_k, asked.top_p))
            found = [PictureRequest(prompt, guidance, seed + number, sampling, plan) for number in range(n)]
            self._slots.check(found[0])
        except (TypeError, ValueError) as error:
            raise Refused(400, str(error), code="invalid_value") from None
        return found

    def cache(self, request: PictureRequest) -> dict[str, Any]:
        """What the cache of such a picture keeps and takes, under the names of ``ssd-janus generate --json``."""
        plan = self._slots.plan_of(request)
        return {"plan_budget": round(plan.budget(self.pipe.shape.num_visual_tokens), 4), "kv_format": plan.kv_format,
                "cache_bytes": self._slots.cache_bytes(request),
                "full_cache_bytes": self._slots.cache_bytes(request, self.pipe.shape.full_plan())}

    def submit(self, requests: Sequence[PictureRequest], rows_drawn: RowsDrawn | None = None) -> list[Ticket]:
        """
        Raises:
            Refused: too many wait, or nothing more is drawn.
        """
        try:
            tickets = self.scheduler.submit_all(requests, [rows_drawn] * len(requests))
        except QueueFull as error:
            raise Refused(429, str(error), code="queue_full", retry_after=self.retry_after) from None
        except Closed:
            raise self.closed() from None
        self.metrics.accepted.inc(len(tickets))
        for ticket in tickets:
            ticket.add_done_callback(self._done)
        return tickets

    async def draw(self, requests: Sequence[PictureRequest]) -> list[bytes]:
        """PNGs of pictures. If it is cancelled, so are they."""
        ended = await asyncio.gather(*map(asyncio.wrap_future, self.submit(requests)), return_exceptions=True)
        return [await self.png(self._tokens(each)) for each in ended]

    def draw_rows(self, request: PictureRequest, partial_images: int) -> tuple[Ticket, AsyncIterator[Drawn]]:
        """A picture while it is drawn: its ticket, and so many parts of it, evenly spread, and the whole.

        Raises:
            Refused: as `submit`.
        """
        loop = asyncio.get_running_loop()
        drawn = asyncio.Queue[tuple[torch.Tensor, float] | None]()
        wanted = {round(self.rows * part / (partial_images + 1)) for part in range(1, partial_images + 1)}

        def row_drawn(tokens: torch.Tensor) -> None:
            if len(tokens) // self.columns in wanted:
                loop.call_soon_threadsafe(drawn.put_nowait, (tokens, time.monotonic()))

        def done(ticket: Ticket) -> None:
            loop.call_soon_threadsafe(drawn.put_nowait, None)

        async def pictures() -> AsyncIterator[Drawn]:
            while (part := await drawn.get()) is not None:
                yield Drawn(await self.png(part[0]), part[1] - (ticket.joined or part[1]))
            tokens = self._tokens(CancelledError() if ticket.cancelled() else ticket.exception() or ticket.result())
            yield Drawn(await self.png(tokens), (ticket.finished or 0.0) - (ticket.joined or 0.0))

        ticket = self.submit([request], row_drawn if wanted else None)[0]
        ticket.add_done_callback(done)
        return ticket, pictures()

    async def png(self, tokens: torch.Tensor) -> bytes:
        """Of the tokens of a picture, or of its first rows."""
        return await asyncio.get_running_loop().run_in_executor(self._decoding, self._png, tokens)

    @property
    def retry_after(self) -> int:
        """Seconds until a place may be free: every so many a picture is done."""
        return max(1, min(LONGEST_RETRY, math.ceil(self._seconds / self.limits.batch)))

    def closed(self) -> Refused:
        return Refused(503, "the server is shutting down" if self.closing else "the server cannot draw any more",
                       code="unavailable", retry_after=self.retry_after)

    def finish(self, grace: float) -> None:
        """Take no more requests, and draw what was asked for within ``grace`` seconds; let go of the rest."""
        self.closing = True
        if not self.scheduler.close(timeout=grace):
            self.scheduler.close(cancel=True, timeout=LETTING_GO)

    def release(self) -> None:
        """When nobody waits for pictures any more."""
        self.finish(0)
        self._decoding.shutdown(cancel_futures=True)
        self._planning.shutdown(cancel_futures=True)

    def _prompt(self, text: str) -> list[int]:
        code = "string_above_max_length"
        if len(text) > self.limits.prompt:
            raise Refused(422, f"prompt must be at most {self.limits.prompt} characters long, got {len(text)}",
                          "prompt", code)
        if not text.strip():
            raise Refused(400, "prompt must not be blank", "prompt", "invalid_value")
        if (image := self.pipe.processor.image_token) in text:
            raise Refused(400, f"prompt must not contain {image}, a picture's place", "prompt", "invalid_value")
        try:
            tokens = self.pipe.prompt_tokens([text])[0]
        except ValueError as error:
            raise Refused(422, str(error), "prompt", code) from None
        if len(tokens) > self._slots.max_prompt:
            raise Refused(422, f"prompt must be at most {self._slots.max_prompt} tokens long, got {len(tokens)}",
                          "prompt", code)
        return tokens

    def _done(self, ticket: Ticket) -> None:
        self.metrics.done(ticket)
        if ticket.joined is not None and ticket.finished is not None:
            self._seconds = ticket.finished - ticket.joined

    def _tokens(self, ended: torch.Tensor | BaseException) -> torch.Tensor:
        """Of a ticket that is done."""
        if isinstance(ended, (CancelledError, asyncio.CancelledError)):
            raise self.closed()
        if isinstance(ended, BaseException):
            raise ended
        return ended

    def _png(self, tokens: torch.Tensor) -> bytes:
        with self.metrics.decoded.time():
            picture = self.pipe.decode(tokens[None])[0]
            if picture.size != self.pixels:
                canvas = Image.new("RGB", self.pixels, UNDRAWN)
                canvas.paste(picture)
                picture = canvas
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
        return buffer.getvalue()
