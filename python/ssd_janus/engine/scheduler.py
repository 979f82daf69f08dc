"""Pictures in the order in which they were asked for, drawn by one thread in the slots of an engine."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from ssd_kernels.arguments import check_int

from .slots import Joining, PictureRequest, Slots

PROMPT_TOKENS = 256  # of joining pictures between two steps of those that are drawn
# So many may be launched before the first has been computed: a picture that joins waits for all of them.
STEPS_AHEAD = 2

RowsDrawn = Callable[[torch.Tensor], Any]


class QueueFull(RuntimeError):
    """As many pictures wait as may."""


class Closed(RuntimeError):
    """No more pictures are drawn."""


class Ticket(Future[torch.Tensor]):
    """A picture that was asked for: the future of its tokens, long [steps] on the CPU.

    `cancel` works until they are there, while the picture is drawn, too; `asyncio.wrap_future` passes it on. Callbacks
    of `add_done_callback` run in the drawing thread, or in that which cancels.

    Attributes:
        request: what is drawn.
        drawn: tokens so far.
        cache_bytes: of a cache for it alone.
        submitted, joined, first_row, finished: these moments by the scheduler's clock; None before.
    """

    def __init__(self, scheduler: Scheduler, request: PictureRequest, rows_drawn: RowsDrawn | None,
                 submitted: float) -> None:
        super().__init__()
        self.request, self.rows_drawn, self.drawn = request, rows_drawn, 0
        self.cache_bytes = scheduler._slots.cache_bytes(request)
        self.submitted = submitted
        self.joined: float | None = None
        self.first_row: float | None = None
        self.finished: float | None = None
        self._scheduler = scheduler

    def cancel(self) -> bool:
        """Draw no more of it; its place is free before the next step. False: there is a result already."""
        cancelled = super().cancel()
        if cancelled:
            self._scheduler._cancelled(self)
        return cancelled


@dataclass(frozen=True)
class Load:
    """What a scheduler does at a moment: pictures that wait, whose prompts are run, that are drawn, and that may be
    drawn at once; and how many have been drawn since it was made."""

    waiting: int
    joining: int
    running: int
    capacity: int
    finished: int


class Scheduler:
    """Draws pictures in slots, as many at once as there are, the others in their order after them.

    Every method may be called from any thread. A picture that fails gives its error to its own ticket.
    """

    def __init__(self, slots: Slots, *, max_waiting: int = 256, prompt_tokens: int = PROMPT_TOKENS,
                 clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            slots: for this scheduler alone.
            max_waiting: pictures that may wait.
            prompt_tokens: of joining pictures that are run between two steps of those that are drawn, about; at least
                a layer of one prompt is.
            clock: of the tickets' times, in seconds.
        """
        check_int("max_waiting", max_waiting, 1)
        check_int("prompt_tokens", prompt_tokens, 1)
        self._slots, self._max_waiting, self._prompt_tokens = slots, max_waiting, prompt_tokens
        self._clock = clock
        self._columns = slots.engine.shape.columns
        self._changed = threading.Condition()  # holds what follows
        self._waiting: deque[Ticket] = deque()
        self._closed = False
        self._failure: Exception | None = None
        # The drawing thread's own:
        self._alone: deque[Ticket] = deque()  # that failed together, and join one by one
        self._entering: list[Ticket] = []
        self._joining: Joining | None = None
        self._running: dict[int, Ticket] = {}
        self._finished = 0
        self._steps: deque[Any] = deque()  # events of those that were launched last
        self._thread = threading.Thread(target=self._run, name="ssd_janus drawing", daemon=True)
        self._thread.start()

    def submit(self, request: PictureRequest, rows_drawn: RowsDrawn | None = None) -> Ticket:
        """Ask for a picture.

        Args:
            request: of it.
            rows_drawn: called in the drawing thread, which waits for it, with the tokens so far, long [tokens] on the
                CPU, whenever a row of the grid is complete. An error that it raises ends its picture.

        Raises:
            TypeError, ValueError: it cannot be drawn.
            QueueFull: as many pictures wait as may.
            Closed: after `close`, or after the device failed.
        """
        return self.submit_all([request], [rows_drawn])[0]

    def submit_all(self, requests: Sequence[PictureRequest], rows_drawn: Sequence[RowsDrawn | None]) -> list[Ticket]:
        """Ask for several pictures, for all or for none of them; see `submit`."""
        for request in requests:
            self._slots.check(request)
        tickets = [Ticket(self, *both, self._clock()) for both in zip(requests, rows_drawn, strict=True)]
        with self._changed:
            if self._closed:
                raise Closed("no more pictures are drawn") from self._failure
            if len(self._waiting) + len(tickets) > self._max_waiting:
                raise QueueFull(f"at most {self._max_waiting} pictures may wait; {len(self._waiting)} do, and "
                                f"{len(tickets)} more were asked for")
            self._waiting.extend(tickets)
            self._changed.notify()
        return tickets

    @property
    def load(self) -> Load:
        """At this moment."""
        with self._changed:
            return Load(len(self._waiting), len(self._entering) + len(self._alone), len(self._running),
                        self._slots.capacity, self._finished)

    @property
    def closed(self) -> bool:
        """Whether no more pictures are taken: after `close`, or after the device failed."""
        with self._changed:
            return self._closed

    def close(self, cancel: bool = False, timeout: float | None = None) -> bool:
        """Take no more pictures, and wait for those that were asked for.

        Args:
            cancel: them instead.
            timeout: seconds to wait at most.

        Returns:
            whether the drawing thread has ended.
        """
        with self._changed:
            self._closed = True
            tickets = [*self._waiting, *self._alone, *self._entering, *self._running.values()] if cancel else []
            self._changed.notify()
        for ticket in tickets:
            ticket.cancel()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, *error: object) -> None:
        self.close(cancel=True)

    def _cancelled(self, ticket: Ticket) -> None:
        """A ticket has just been cancelled."""
        with self._changed:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                ticket.set_running_or_notify_cancel()
            self._changed.notify()

    def _run(self) -> None:
        """The drawing thread."""
        try:
            while self._has_work():
                self._let_go()
                self._admit()
                self._draw()
        except Exception as error:
            self._failure = error
        with self._changed:
            self._closed = True
            left = [*self._running.values(), *self._entering, *self._alone, *self._waiting]
            self._waiting.clear()
        for ticket in left:
            _fail(ticket, self._failure or Closed("no more pictures are drawn"))

    def _has_work(self) -> bool:
        """Wait until there is something to draw; False: there will not be."""
        with self._changed:
            while not (self._waiting or self._alone or self._entering or self._running):
                if self._closed:
                    return False
                self._changed.wait()
            return True

    def _let_go(self) -> None:
        """Free the slots of cancelled pictures."""
        for slot, ticket in [*self._running.items()]:
            if ticket.cancelled():
                self._leave(slot)
                ticket.set_running_or_notify_cancel()
        if self._joining is not None and all(ticket.cancelled() for ticket in self._entering):
            self._joining.abandon()
            for ticket in self._end_joining():
                ticket.set_running_or_notify_cancel()

    def _admit(self) -> None:
        """Go on with the prompts of the pictures that have waited longest."""
        try:
            if self._joining is None:
                self._take()
            if self._joining is None:
                return
            joined = self._joining.advance(self._prompt_tokens if self._running else None)
        except Exception as error:
            tickets = self._end_joining()
            if not tickets:
                raise
            if len(tickets) > 1:
                self._alone.extend(tickets)
            else:
                _fail(tickets[0], error)
            return
        if joined:
            slots, now = [picture.slot for picture in self._joining.pictures], self._clock()
            with self._changed:  # or `close` and `load` would not see them in between
                tickets = self._end_joining()
                self._running.update(zip(slots, tickets, strict=True))
            for slot, ticket in zip(slots, tickets, strict=True):
                ticket.joined = now
                self._progressed(slot, ticket)

    def _take(self) -> None:
        """Begin with the prompts of waiting pictures, as many as have slots and bytes, up to a part's tokens."""
        room, tokens, held = len(self._slots.free), 0, sum(ticket.cache_bytes for ticket in self._running.values())
        if not (room or self._running):
            raise RuntimeError("no slot is free although no picture is drawn")
        with self._changed:
            queue = self._alone or self._waiting
            while queue and len(self._entering) < room:
                tokens += len(queue[0].request.prompt) * (1 + queue[0].request.guided)
                if self._entering and (tokens > self._prompt_tokens or queue is self._alone):
                    break
                held += queue[0].cache_bytes
                if held > self._slots.max_cache_bytes and (self._running or self._entering):
                    break
                self._entering.append(queue.popleft())
        if self._entering:
            self._joining = self._slots.join([ticket.request for ticket in self._entering])

    def _end_joining(self) -> list[Ticket]:
        with self._changed:
            tickets, self._entering, self._joining = self._entering, [], None
        return tickets

    def _draw(self) -> None:
        """One step."""
        if not self._running:
            return
        self._slots.step()
        self._keep_pace()
        for slot, ticket in [*self._running.items()]:
            self._progressed(slot, ticket)

    def _keep_pace(self) -> None:
        device = self._slots.weights.device
        if device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            self._steps.append(event)
            if len(self._steps) > STEPS_AHEAD:
                self._steps.popleft().synchronize()

    def _progressed(self, slot: int, ticket: Ticket) -> None:
        """A picture has one more token."""
        ticket.drawn = self._slots.running[slot].done
        try:
            if ticket.drawn % self._columns == 0:
                tokens = self._slots.drawn(slot) if ticket.rows_drawn is not None else None
                ticket.first_row = ticket.first_row or self._clock()
                if ticket.rows_drawn is not None and not ticket.cancelled():
                    ticket.rows_drawn(tokens)
            if ticket.drawn < self._slots.steps:
                return
            tokens = self._slots.drawn(slot)
        except Exception as error:
            self._leave(slot)
            _fail(ticket, error)
            return
        ticket.finished = self._clock()
        self._leave(slot)
        self._finished += 1
        if ticket.set_running_or_notify_cancel():
            ticket.set_result(tokens)

    def _leave(self, slot: int) -> None:
        with self._changed:
            del self._running[slot]
        self._slots.leave(slot)


def _fail(ticket: Ticket, error: Exception) -> None:
    """Give an error to a ticket, unless it was cancelled."""
    if ticket.set_running_or_notify_cancel():
        ticket.set_exception(error)
