"""A thread that draws: pictures wait, join, are cancelled, and fail alone."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, wait
from pathlib import Path
from typing import Any

import pretend
import pytest
import torch
from picture_requests import LONG, PROMPTS, REQUESTS, STEPS, WAIT, Pause, alone, tiny_engine
from pretend import guard
from test_engine import plan_of_budget

from ssd_janus.engine import Closed, Engine, QueueFull, Sampling, Scheduler, Slots, Ticket, own_caches, scheduler


@pytest.fixture
def drawer() -> Iterator[Callable[..., Scheduler]]:
    """Makes schedulers over the tiny engine."""
    made = []

    def make(capacity: int, **options: Any) -> Scheduler:
        made.append(Scheduler(tiny_engine()[0].slots(capacity, steps=STEPS), **options))
        return made[-1]

    yield make
    while Pause.made:  # a test that has failed does not let go of them
        Pause.made.pop().go_on.set()
    for each in made:
        assert each.close(cancel=True, timeout=WAIT)


def test_pictures_are_drawn_in_their_order(drawer: Callable[..., Scheduler]) -> None:
    """Never more at once than there are slots; and everyone gets what is his."""
    expected, most = tiny_engine()[1], 0
    rows: dict[int, list[torch.Tensor]] = {index: [] for index in expected}
    times_of_rows: dict[int, list[float]] = {index: [] for index in expected}

    def seen(index: int, tokens: torch.Tensor) -> None:
        nonlocal most
        most = max(most, made.load.running)
        rows[index].append(tokens)
        times_of_rows[index].append(time.monotonic())

    made = drawer(2)
    tickets = [made.submit(request, lambda tokens, index=index: seen(index, tokens))
               for index, request in enumerate(REQUESTS)]
    for index, ticket in enumerate(tickets):
        tokens = expected[index]
        assert torch.equal(ticket.result(WAIT), tokens) and ticket.drawn == STEPS
        assert [len(part) for part in rows[index]] == [6, 12, 18]
        assert all(torch.equal(part, tokens[:len(part)]) for part in rows[index])
        times = [ticket.submitted, ticket.joined, ticket.first_row, *times_of_rows[index], ticket.finished]
        assert None not in times and times == sorted(times)
    joined = [ticket.joined for ticket in tickets]
    assert joined == sorted(joined) and most == 2
    assert made.load == scheduler.Load(0, 0, 0, 2, len(tickets))


def test_cancelled_pictures_make_way(drawer: Callable[..., Scheduler]) -> None:
    """One that is drawn, one that waits; the next one in the queue takes the slot."""
    made, pause, last = drawer(1), Pause(), threading.Event()
    drawn = made.submit(REQUESTS[0], pause)
    waiting, next_one = made.submit(REQUESTS[1]), made.submit(REQUESTS[2])
    assert pause.reached.wait(WAIT)
    next_one.add_done_callback(lambda ticket: last.set())
    assert waiting.cancel() and drawn.cancel() and drawn.cancel() and made.load.waiting == 1
    pause.go_on.set()
    assert torch.equal(next_one.result(WAIT), tiny_engine()[1][2]) and last.wait(WAIT)
    for ticket in (waiting, drawn):
        with pytest.raises(CancelledError):
            ticket.result(0)
    assert wait([waiting, drawn], WAIT).not_done == set(), "who waits for cancelled ones is told"
    assert drawn.drawn == 6 and waiting.joined is None and not next_one.cancel()


@pytest.mark.parametrize("close", [False, True])
def test_cancelling_pictures_whose_prompts_are_run(drawer: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch,
                                                   close: bool) -> None:
    """No more of them is run; alone, or with all others."""
    made, pause, advance, within = drawer(3, prompt_tokens=1), Pause(), scheduler.Joining.advance, Pause()

    def advanced(self: Any, tokens: float | None) -> bool:
        if self.pictures[0].request is REQUESTS[5] and not within.go_on.is_set():
            within(self)
        return advance(self, tokens)

    monkeypatch.setattr(scheduler.Joining, "advance", advanced)
    others = made.submit_all([REQUESTS[0], REQUESTS[2]], [pause, None])
    assert pause.reached.wait(WAIT)
    joining = made.submit(REQUESTS[5])
    pause.go_on.set()
    assert within.reached.wait(WAIT) and made.load.joining == 1
    if close:
        made.close(cancel=True, timeout=0)
    else:
        assert joining.cancel()
    within.go_on.set()
    if close:
        assert made.close(timeout=WAIT) and all(ticket.cancelled() for ticket in (joining, *others))
    else:
        for index, ticket in zip((0, 2), others, strict=True):
            assert torch.equal(ticket.result(WAIT), tiny_engine()[1][index])
        assert torch.equal(made.submit(REQUESTS[5]).result(WAIT), tiny_engine()[1][5])
    assert joining.joined is None and made.load.joining == made.load.running == 0


def test_no_rows_of_cancelled_pictures(drawer: Callable[..., Scheduler]) -> None:
    """Not even of the step in which they are cancelled."""
    made, asked, seen = drawer(2), threading.Event(), []

    def first_row(tokens: torch.Tensor) -> None:
        assert asked.wait(WAIT) and tickets[1].cancel()

    tickets = made.submit_all([REQUESTS[0], REQUESTS[4]], [first_row, seen.append])
    asked.set()
    assert torch.equal(tickets[0].result(WAIT), tiny_engine()[1][0]) and tickets[1].cancelled() and not seen


@pytest.mark.parametrize("fail", [False, True])
def test_who_joins_together_leaves_alone(drawer: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch, fail: bool
                                         ) -> None:
    """One that is cancelled takes none with it; after a group failed, those that are to join again are let go, too."""
    made, within, advance = drawer(3), Pause(), scheduler.Joining.advance

    def advanced(self: Any, tokens: float | None) -> bool:
        if fail and len(self.pictures) > 1:
            self.abandon()
            raise MemoryError("no room for so many")
        within(self)
        return advance(self, 1)  # a part, so that there is a moment at which they may be let go

    monkeypatch.setattr(scheduler.Joining, "advance", advanced)
    numbers = (0, 2, 4)
    tickets = made.submit_all([REQUESTS[index] for index in numbers], [None] * 3)
    assert within.reached.wait(WAIT) and made.load.joining == 3
    if fail:
        made.close(cancel=True, timeout=0)
    else:
        assert tickets[1].cancel()
    assert [ticket.cancelled() for ticket in tickets] == [fail, True, fail]
    within.go_on.set()
    if not fail:
        for index, ticket in zip(numbers, tickets, strict=True):
            assert ticket.cancelled() or torch.equal(ticket.result(WAIT), tiny_engine()[1][index])
    assert made.close(timeout=WAIT) and made.load == scheduler.Load(0, 0, 0, 3, 0 if fail else 2)


def test_the_queue_is_bounded(drawer: Callable[..., Scheduler]) -> None:
    made, pause = drawer(1, max_waiting=2), Pause()
    first = made.submit(REQUESTS[1], pause)
    assert pause.reached.wait(WAIT)
    second = made.submit(REQUESTS[1])
    with pytest.raises(QueueFull, match="at most 2 pictures may wait; 1 do, and 2 more were asked for"):
        made.submit_all([REQUESTS[1]] * 2, [None] * 2)
    third = made.submit(REQUESTS[1])
    with pytest.raises(QueueFull):
        made.submit(REQUESTS[1])
    assert third.cancel()
    third = made.submit(REQUESTS[1])
    pause.go_on.set()
    assert all(torch.equal(ticket.result(WAIT), tiny_engine()[1][1]) for ticket in (first, second, third))


def test_a_picture_that_fails_harms_no_other(drawer: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither when its prompt is run, together with others, nor when its callback raises."""
    expected, cached = tiny_engine()[1], own_caches.CompressedCache

    def scarce(plan: Any, rows: int, heads: int, head_dim: int, max_prompt: int, *others: Any) -> Any:
        if max_prompt == len(LONG):
            raise MemoryError("no room for long prompts")
        return cached(plan, rows, heads, head_dim, max_prompt, *others)

    def raising(tokens: torch.Tensor) -> None:
        raise OSError("nobody listens")

    monkeypatch.setattr(own_caches, "CompressedCache", scarce)
    made, numbers = drawer(4), (0, 5, 2, 1, 4)
    tickets = made.submit_all([REQUESTS[index] for index in numbers], [None, None, None, raising, None])
    with pytest.raises(MemoryError, match="no room for long"):
        tickets[1].result(WAIT)
    with pytest.raises(OSError, match="nobody listens"):
        tickets[3].result(WAIT)
    for ticket, index in zip(tickets, numbers, strict=True):
        if index not in (5, 1):
            assert torch.equal(ticket.result(WAIT), expected[index])
    single = drawer(1)
    with pytest.raises(OSError, match="nobody listens"):
        single.submit(REQUESTS[1], raising).result(WAIT)
    assert torch.equal(single.submit(REQUESTS[1]).result(WAIT), expected[1]), "the slot is free again"


def test_a_step_that_fails_tells_everyone(drawer: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch) -> None:
    made, pause = drawer(2), Pause()
    tickets = made.submit_all(REQUESTS[:4], [pause, None, None, None])
    assert pause.reached.wait(WAIT) and tickets[3].cancel()

    def broken(self: Slots) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(Slots, "step", broken)
    pause.go_on.set()
    for ticket in tickets[:3]:
        with pytest.raises(RuntimeError, match="the device is gone"):
            ticket.result(WAIT)
    with pytest.raises(CancelledError):
        tickets[3].result(WAIT)
    with pytest.raises(Closed) as raised:
        made.submit(REQUESTS[0])
    assert str(raised.value.__cause__) == "the device is gone"


def test_a_step_that_fails_tells_those_that_join(drawer: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch
                                                 ) -> None:
    """One whose prompt is run, and one that is to join after it, as they failed together."""
    made, pause, joining = drawer(3), Pause(), []
    step, advance = Slots.step, scheduler.Joining.advance

    def advanced(self: Any, tokens: float | None) -> bool:
        if len(self.pictures) > 1:
            self.abandon()
            raise MemoryError("no room for so many")
        joining.append(self.pictures[0].request)
        return advance(self, 1)

    def stepped(self: Slots) -> None:
        if REQUESTS[0] in joining:
            raise RuntimeError("the device is gone")
        step(self)

    monkeypatch.setattr(scheduler.Joining, "advance", advanced)
    monkeypatch.setattr(Slots, "step", stepped)
    tickets = [made.submit(REQUESTS[1], pause)]
    assert pause.reached.wait(WAIT)
    tickets += made.submit_all([REQUESTS[0], REQUESTS[2]], [None, None])
    pause.go_on.set()
    for ticket in tickets:
        with pytest.raises(RuntimeError, match="the device is gone"):
            ticket.result(WAIT)
    assert REQUESTS[2] not in joining


@pytest.mark.parametrize("cancel", [False, True])
def test_closing(drawer: Callable[..., Scheduler], cancel: bool) -> None:
    """Draws what was asked for, or lets go of it; either way nothing is taken any more, and every ticket is done."""
    made, pause = drawer(1), Pause()
    tickets = made.submit_all(REQUESTS[:3], [pause, None, None])
    assert pause.reached.wait(WAIT) and not made.close(cancel, timeout=0)
    with pytest.raises(Closed):
        made.submit(REQUESTS[0])
    pause.go_on.set()
    assert made.close(timeout=WAIT)
    assert [ticket.cancelled() for ticket in tickets] == [cancel] * 3
    if not cancel:
        assert all(torch.equal(ticket.result(0), tiny_engine()[1][index]) for index, ticket in enumerate(tickets))


def test_many_threads_ask_and_cancel(drawer: Callable[..., Scheduler]) -> None:
    made, expected = drawer(3), tiny_engine()[1]
    done: list[bool] = []

    def ask(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(4):
            index = chance.randrange(len(REQUESTS))
            ticket = made.submit(REQUESTS[index])
            if chance.random() < 0.4:
                threading.Event().wait(chance.random() / 50)
                done.append(ticket.cancel() or torch.equal(ticket.result(0), expected[index]))
            else:
                done.append(torch.equal(ticket.result(WAIT), expected[index]))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == [True] * 24 and made.submit(REQUESTS[1]).result(WAIT) is not None
    assert made.load.running == made.load.waiting == 0


def test_long_prompts_do_not_stall_others(drawer: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two steps no more of them is run than was said, or a layer; and not before the steps are over."""
    made, pause, log, groups = drawer(3, prompt_tokens=30), Pause(), [], set()
    step, advance = Slots.step, scheduler.Joining.advance

    def stepped(self: Slots) -> None:
        log.append("step")
        step(self)

    def advanced(self: Any, tokens: float | None) -> bool:
        log.append(tokens)
        groups.add(len(self.pictures))
        return advance(self, tokens)

    monkeypatch.setattr(Slots, "step", stepped)
    monkeypatch.setattr(scheduler.Joining, "advance", advanced)
    first = made.submit(REQUESTS[1], pause)
    assert pause.reached.wait(WAIT)
    log.clear()
    others = made.submit_all([REQUESTS[5]] * 2, [None] * 2)
    pause.go_on.set()
    assert first.result(WAIT) is not None
    assert all(torch.equal(other.result(WAIT), tiny_engine()[1][5]) for other in others)
    # Two rows of 52 tokens in 3 layers are 35 tokens' way each.
    assert log[:6] == [30, "step", 30, "step", 30, "step"] and set(log) == {30, "step"} and groups == {1}
    joining = tiny_engine()[0].slots(1, steps=STEPS).join([REQUESTS[5]])
    assert [joining.advance(34), joining.advance(36), joining.advance(1)] == [False, False, True]


def test_observers_and_plain_batches_go_on_beside(drawer: Callable[..., Scheduler]) -> None:
    """An engine may draw in slots and in batches at a time."""
    made, engine = drawer(2), tiny_engine()[0]
    tickets: list[Ticket] = []
    seen: list[int] = []

    class Watch:
        def prefill(self, *_: Any) -> None:
            pass

        def decode(self, layer: int, *_: Any) -> None:
            if not layer:
                seen.append(len(tickets))
                if len(tickets) < 3:
                    tickets.append(made.submit(REQUESTS[len(tickets)]))

    options = {"guidance": 2.0, "seeds": 1, "steps": STEPS}
    assert torch.equal(engine.generate(PROMPTS, observer=Watch(), **options), engine.generate(PROMPTS, **options))
    assert len(seen) == STEPS - 1
    assert all(torch.equal(ticket.result(WAIT), tiny_engine()[1][index]) for index, ticket in enumerate(tickets))


def test_the_example_of_the_guide(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "engine.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "Scheduler" in block)
    exec(code, {"engine": tiny_engine()[0], "prompts": PROMPTS, "Sampling": Sampling})
    assert capsys.readouterr().out.splitlines() == ["6", "12", "18", "24", "30", "36", "torch.Size([36])"]


@pytest.mark.skipif(guard.unsupported() is not None, reason="no machine to pretend")
def test_a_scheduler_on_a_device_keeps_pace(fresh: Any) -> None:
    """It waits for a step before it launches the second after it, and never for the last."""
    plan = plan_of_budget(fresh, 0.2)
    with pretend.pretended(devices=1) as machine:
        engine = Engine(fresh.to("cuda"), plan, backend="triton")
        expected = [alone(engine, request, 6) for request in REQUESTS[:2]]
        slots = engine.slots(2, steps=6)
        machine.log.clear()
        with Scheduler(slots) as made:
            tickets = made.submit_all(REQUESTS[:2], [None, None])
            assert all(torch.equal(ticket.result(WAIT), drawn) for ticket, drawn in zip(tickets, expected, strict=True))
        waits = [event.place.partition(":")[0] for event in machine.of_kind("wait")]
        assert waits.count("python/ssd_janus/engine/scheduler.py") == 5 - scheduler.STEPS_AHEAD
