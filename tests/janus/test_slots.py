"""Pictures that join and leave: the tokens of every one are those that it has alone."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pretend
import pytest
import tiny
import torch
from picture_requests import LONG, PROMPTS, REQUESTS, STEPS, WAIT, alone, tiny_engine
from pretend import guard
from test_engine import plan_of_budget
from transformers import MinPLogitsWarper

from ssd_attach.online import OnlinePlan
from ssd_janus.engine import Engine, PictureRequest, Sampling, Scheduler, layers, own_caches, scheduler
from ssd_janus.engine.capture import WARM_STEPS
from ssd_kernels import CachePlan, HeadSpec, backends


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
