"""Pictures that join and leave: the tokens of every one are those that it has alone."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, wait
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pretend
import pytest
import tiny
import torch
from pretend import guard
from test_engine import plan_of_budget, prompts_of
from transformers import MinPLogitsWarper, TopKLogitsWarper

from ssd_attach.online import OnlinePlan
from ssd_janus.engine import (
    Closed,
    Engine,
    PictureRequest,
    QueueFull,
    Sampling,
    Scheduler,
    Slots,
    Ticket,
    layers,
    own_caches,
    scheduler,
)
from ssd_janus.engine.capture import WARM_STEPS
from ssd_kernels import CachePlan, HeadSpec, backends

WAIT = 600  # seconds, on a machine with much other work
STEPS = 20  # three rows of the grid, and some
PROMPTS = prompts_of(tiny.image_inputs())
LONG = [0, *(7 + index % 200 for index in range(50)), 3]
GREEDY = Sampling(greedy=True)
REQUESTS = (
    PictureRequest(PROMPTS[0], 5.0, 3, Sampling.make(0.9, 20, 0.9)), PictureRequest(PROMPTS[1], 1.0, 4),
    PictureRequest(PROMPTS[2], 2.0, 5, GREEDY), PictureRequest(PROMPTS[3], 0.0, 2**63 + 5, Sampling.make(0.7)),
    PictureRequest(PROMPTS[0], 5.0, 6, Sampling.make(0.9, 20, 0.9)),
    PictureRequest(LONG, 3.0, -7, Sampling.make(1.0, 5)),
    PictureRequest([3], 2.0, 8, Sampling.make(1.0, 0, 0.5)), PictureRequest(PROMPTS[1], 1.0, 9, GREEDY),
    PictureRequest(PROMPTS[0], 2.0, 3, Sampling(warpers=[TopKLogitsWarper(3), TopKLogitsWarper(2)])))


def alone(engine: Engine, request: PictureRequest, steps: int = STEPS) -> torch.Tensor:
    return engine.generate([request.prompt], guidance=request.guidance, seeds=[request.seed], steps=steps,
                           sampling=request.sampling)[0]


@cache
def tiny_engine(keep_prompt: bool = True, products: str = "auto") -> tuple[Engine, dict[int, torch.Tensor]]:
    """And the tokens of `REQUESTS` by the numbers of these."""
    model = tiny.build_model(heads=4, kv_heads=2 if keep_prompt else 4)
    plan = plan_of_budget(model, 0.2)
    engine = Engine(model, CachePlan(plan.layers, 3, keep_prompt), products=products)
    return engine, {index: alone(engine, request) for index, request in enumerate(REQUESTS)}


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


class Pause:
    """A callback for rows in which the drawing thread waits."""

    made: ClassVar[list[Pause]] = []

    def __init__(self) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        self.made.append(self)

    def __call__(self, tokens: torch.Tensor) -> None:
        self.reached.set()
        assert self.go_on.wait(WAIT)


@pytest.mark.parametrize(("keep_prompt", "products"), [(True, "auto"), (False, "auto"), (True, "torch")])
@pytest.mark.parametrize("seed", range(3))
def test_tokens_do_not_depend_on_company(seed: int, keep_prompt: bool, products: str) -> None:
    """Random arrivals, in groups and parts of prompts, and random departures before the end."""
    engine, expected = tiny_engine(keep_prompt, products)
    assert engine.exact
    chance, slots = random.Random(seed), engine.slots(1 + seed * 2, steps=STEPS)
    waiting, joining, left = chance.sample(range(len(REQUESTS)), len(REQUESTS)), None, 0
    numbers: dict[int, int] = {}
    while waiting or slots.running or joining:
        if joining is None and waiting and slots.free and chance.random() < 0.4:
            group = [waiting.pop() for _ in range(min(len(waiting), chance.randint(1, len(slots.free))))]
            joining = slots.join([REQUESTS[index] for index in group])
            numbers |= {picture.slot: index for picture, index in zip(joining.pictures, group, strict=True)}
        if joining is not None:
            if chance.random() < 0.1:
                joining.abandon()
                waiting += [numbers.pop(picture.slot) for picture in joining.pictures]
                joining = None
            elif joining.advance(chance.choice([1, 10, None])):
                joining = None
        if slots.running:
            slots.step()
        for slot, picture in [*slots.running.items()]:
            early = chance.random() < 0.02
            if picture.done == STEPS or early:
                assert torch.equal(slots.drawn(slot), expected[numbers.pop(slot)][:picture.done])
                slots.leave(slot)
                left += 1
    assert left == len(REQUESTS) and sorted(slots.free) == list(range(slots.capacity)) and slots.nbytes == 0


def test_a_step_costs_what_its_pictures_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither rows nor caches of pictures that have left."""
    slots, rows, sizes, step = tiny_engine()[0].slots(4, steps=STEPS), [], [], layers.Layers.step

    def seen(self: Any, hidden: torch.Tensor, count: int, *others: Any) -> torch.Tensor:
        rows.append(count)
        return step(self, hidden, count, *others)

    monkeypatch.setattr(layers.Layers, "step", seen)
    assert slots.join(REQUESTS[:3]).advance()
    for slot in (0, 1, 2):
        slots.step()
        sizes.append(slots.nbytes)
        slots.leave(slot)
    assert rows == [5, 3, 2] and sizes == sorted(sizes, reverse=True) and slots.nbytes == 0


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


@pytest.mark.parametrize(("request_", "error", "message"), [
    (PictureRequest([]), ValueError, r"prompts\[0\] must be 1 .. 60 tokens long, got 0"),
    (PictureRequest([0] * 61), ValueError, "got 61"),
    (PictureRequest(LONG), ValueError, "prompt must be at most max_prompt = 40 tokens long, got 52"),
    (PictureRequest([10**6]), ValueError, "must hold tokens within"),
    (PictureRequest([3], guidance=float("inf")), ValueError, "guidance must be finite"),
    (PictureRequest([3], guidance="5"), TypeError, "guidance must be a number"),  # type: ignore[arg-type]
    (PictureRequest([3], seed=2**64), ValueError, "seeds must be within"),
    (PictureRequest([3], seed=1.5), TypeError, "seed must be an int"),  # type: ignore[arg-type]
    (PictureRequest([3], plan="full"), TypeError, "plan must be a CachePlan"),  # type: ignore[arg-type]
    (PictureRequest([3], plan=CachePlan.uniform(HeadSpec.full(), 2, 2)), ValueError, "2 layers")])
def test_bad_requests_are_refused(request_: PictureRequest, error: type[Exception], message: str) -> None:
    """And take no slot, alone or among others."""
    slots = tiny_engine()[0].slots(2, max_prompt=40, steps=STEPS)
    for requests in ([request_], [REQUESTS[1], request_]):
        with pytest.raises(error, match=message):
            slots.join(requests)
    with Scheduler(slots) as made, pytest.raises(error, match=message):
        made.submit_all([REQUESTS[1], request_], [None, None])
    assert made.load == scheduler.Load(0, 0, 0, 2, 0) and slots.free == [0, 1]


def test_plans_of_their_own() -> None:
    """Pictures of several plans, in one step: every one has the tokens that an engine of its plan draws."""
    engine = tiny_engine()[0]
    plans = [None, engine.shape.full_plan(), CachePlan.uniform(HeadSpec.window(5), tiny.LAYERS, 2, kv_format="int8")]
    requests = [replace(request, plan=plans[index % 3]) for index, request in enumerate(REQUESTS[:6])]
    slots = engine.slots(6, steps=STEPS)
    assert slots.any_plan and slots.join(requests[:4]).advance()
    slots.step()
    assert slots.join(requests[4:]).advance()
    assert slots.nbytes == sum(map(slots.cache_bytes, requests))
    for index, request in enumerate(requests):
        while slots.running[index].done < STEPS:
            slots.step()
        assert torch.equal(slots.drawn(index), alone(Engine(engine.model, slots.plan_of(request)), request)), index
        slots.leave(index)


def test_larger_caches_leave_room_for_fewer() -> None:
    """As many bytes as the slots would hold of the engine's plan, or one picture of any plan; the order stays."""
    engine = tiny_engine()[0]
    slots = engine.slots(6, max_prompt=9, steps=STEPS)
    small, large = REQUESTS[1], replace(REQUESTS[0], plan=engine.shape.full_plan())
    most, size = slots.max_cache_bytes, slots.cache_bytes(large)
    assert 2 * size < most < 5 * size
    held = []
    with Scheduler(slots) as made:
        tickets = made.submit_all([large, small, large, large, large, large, small], [
            lambda tokens: held.append(slots.nbytes)] * 7)
        for ticket in tickets:
            assert len(ticket.result(WAIT)) == STEPS
    joined = [ticket.joined for ticket in tickets]
    assert joined == sorted(joined) and 2 * size <= max(held) <= most
    tight = Engine(engine.model, CachePlan.uniform(HeadSpec.window(1), tiny.LAYERS, 2)).slots(1, steps=2, max_prompt=60)
    score = CachePlan.uniform(HeadSpec.heavy(36), tiny.LAYERS, 2)
    longest = PictureRequest([0] * 59 + [3], 2.0, plan=score)
    assert tight.cache_bytes(longest) > tight.max_cache_bytes
    with Scheduler(tight) as alone_:
        assert len(alone_.submit(longest).result(WAIT)) == 2


def test_bad_slots_are_refused(fresh: Any) -> None:
    engine = Engine(fresh)
    for options, message in (({"capacity": 0}, "capacity must be"), ({"max_prompt": 61}, "max_prompt must be within 1"),
                             ({"steps": 37}, "steps must be within 1 .. 36")):
        with pytest.raises(ValueError, match=message):
            engine.slots(**{"capacity": 1, **options})
    with pytest.raises(ValueError, match="requests must be at most 1"):
        engine.slots(1).join([REQUESTS[1]] * 2)
    online = OnlinePlan(engine.shape, 0.7, 6, loss=0.42)
    with pytest.raises(ValueError, match="plan must not be an OnlinePlan"):
        Engine(fresh, online).slots(1)


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


def test_slots_made_in_inference_mode_draw_outside(fresh: Any) -> None:
    engine = Engine(fresh)
    with torch.inference_mode():
        slots = engine.slots(1, steps=3)
    with Scheduler(slots) as made:
        assert torch.equal(made.submit(REQUESTS[0]).result(WAIT), alone(engine, REQUESTS[0], 3))


@pytest.mark.skipif(guard.unsupported() is not None, reason="no machine to pretend")
@pytest.mark.parametrize(("backend", "capture"), [("triton", True), ("triton", False), ("cuda", True)])
def test_one_graph_whatever_joins(fresh: Any, backend: str, capture: bool) -> None:
    """On the pretended machine: captured once, and replayed by steps that read and copy nothing."""
    plan = plan_of_budget(fresh, 0.2)
    known = [index for index, request in enumerate(REQUESTS) if request.sampling.greedy or request.sampling.numbers]
    on_cpu = {index: alone(Engine(fresh, plan), REQUESTS[index]) for index in known if REQUESTS[index].sampling.greedy}
    with pretend.pretended(devices=1) as machine:
        if reason := backends.available()[backend]:
            pytest.skip(f"{backend}: {reason}")
        engine = Engine(fresh.to("cuda"), plan, backend=backend, capture=capture)
        expected = {index: alone(engine, REQUESTS[index]) for index in known}
        assert all(torch.equal(expected[index], tokens) for index, tokens in on_cpu.items()) and on_cpu
        machine.graphs.clear()
        slots = engine.slots(3, steps=STEPS)
        with pytest.raises(ValueError, match="sampling must be greedy, or by temperature, top-k and top-p"):
            slots.join([PictureRequest(PROMPTS[0], sampling=Sampling(warpers=[MinPLogitsWarper(0.1)]))])
        with pytest.raises(ValueError, match="plan must be None or the engine's"):
            slots.join([PictureRequest(PROMPTS[0], plan=engine.shape.full_plan())])
        size, allocated = slots.nbytes, []
        waiting, numbers, steps = list(known), {}, 0
        while waiting or slots.running:
            if waiting and slots.free and steps % 3 == 0:
                group = [waiting.pop(0) for _ in range(min(len(slots.free), len(waiting), 2))]
                joining = slots.join([REQUESTS[index] for index in group])
                numbers |= {picture.slot: index for picture, index in zip(joining.pictures, group, strict=True)}
                assert joining.advance()
            begin = len(machine.log)
            slots.step()
            steps += 1
            kinds = [event.kind for event in machine.log[begin:]]
            if capture and steps > WARM_STEPS + 1:
                assert kinds == ["replay"]
            assert not {"to_host", "to_device", "wait"} & set(kinds) or steps <= WARM_STEPS + 1
            allocated.append(torch.cuda.memory_allocated())
            for slot, picture in [*slots.running.items()]:
                if picture.done == STEPS:
                    index = numbers.pop(slot)
                    assert torch.equal(slots.drawn(slot), expected[index]), REQUESTS[index]
                    slots.leave(slot)
                elif index_leaves(picture.done, slot, steps):
                    waiting.append(numbers.pop(slot))  # begins anew
                    slots.leave(slot)
        assert slots.nbytes == size and len(machine.graphs) == capture
        assert not capture or machine.graphs[0].replays == steps - WARM_STEPS
        assert max(allocated[WARM_STEPS + 1:]) - min(allocated[WARM_STEPS + 1:]) < size / 10


def index_leaves(done: int, slot: int, steps: int) -> bool:
    """Whether a picture is let go in the middle."""
    return done == 7 and slot == 1 and steps < 20


@pytest.mark.skipif(guard.unsupported() is not None, reason="no machine to pretend")
def test_own_caches_on_a_device(fresh: Any) -> None:
    """Where a step is not captured; there the noise is counted."""
    plan = plan_of_budget(fresh, 0.2)
    with pretend.pretended(devices=1):
        engine = Engine(fresh.to("cuda"), plan, backend="reference")
        expected, slots = [alone(engine, request, 4) for request in REQUESTS[:3]], engine.slots(2, steps=4)
        assert isinstance(slots, own_caches.OwnCaches)
        waiting, numbers, steps = list(range(3)), {}, 0
        while waiting or slots.running:
            if waiting and slots.free and steps % 2 == 0:
                joining = slots.join([REQUESTS[waiting[0]]])
                numbers[joining.pictures[0].slot] = waiting.pop(0)
                assert joining.advance()
            slots.step()
            steps += 1
            for slot, picture in [*slots.running.items()]:
                if picture.done == 4:
                    assert torch.equal(slots.drawn(slot), expected[numbers[slot]])
                    slots.leave(slot)


@pytest.mark.skipif(guard.unsupported() is not None, reason="no machine to pretend")
def test_plans_of_their_own_on_a_device(fresh: Any) -> None:
    """Only if asked for, as nothing is captured then."""
    with pretend.pretended(devices=1) as machine:
        engine = Engine(fresh.to("cuda"), plan_of_budget(fresh, 0.2), backend="triton")
        requests = [REQUESTS[0], replace(REQUESTS[2], plan=engine.shape.full_plan())]
        expected = [alone(Engine(fresh, plan, backend="triton"), request, 6)
                    for plan, request in zip((engine.plan, engine.shape.full_plan()), requests, strict=True)]
        machine.graphs.clear()
        slots = engine.slots(2, steps=6, any_plan=True)
        with Scheduler(slots) as made:
            tickets = made.submit_all(requests, [None, None])
            assert all(torch.equal(ticket.result(WAIT), drawn) for ticket, drawn in zip(tickets, expected, strict=True))
        assert slots.any_plan and not engine.slots(2, steps=6).any_plan and not machine.graphs


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
