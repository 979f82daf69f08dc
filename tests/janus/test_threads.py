"""Calls in several threads on one model, each of which gets what it gets alone, and leaves nothing behind."""

from __future__ import annotations

import copy
import itertools
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tiny
import torch
from test_hooks import state
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import JanusForConditionalGeneration

from ssd_janus import Pipeline, disable, enable
from ssd_janus.engine import Engine, call, fuse, saying, unfuse, unsupported, weights
from ssd_kernels import CachePlan, HeadSpec

FULL = CachePlan.uniform(HeadSpec.full(), tiny.LAYERS, 4)
NARROW = CachePlan.uniform(HeadSpec.window(2), tiny.LAYERS, 4)
HEAVY = CachePlan.uniform(HeadSpec.heavy(6, recent=2), tiny.LAYERS, 4, row_buffer=3)
PROMPTS = list(tiny.PROMPTS[:2])
WAIT = 100.0  # seconds until a turn is given up; only a failure gets there

Meet = Callable[[], None]
Call = Callable[[Meet], Any]


class Turns:
    """Threads that take turns: each runs up to its next `meet`, then the next one goes on."""

    def __init__(self, count: int) -> None:
        self.turns = [threading.Semaphore(index == 0) for index in range(count)]
        self.over = [False] * count

    def wait(self, index: int) -> None:
        assert self.turns[index].acquire(timeout=WAIT), "the other threads hang"

    def meet(self, index: int) -> None:
        self.turns[self.following(index)].release()
        self.wait(index)

    def end(self, index: int) -> None:
        self.over[index] = True
        if not all(self.over):
            self.turns[self.following(index)].release()

    def following(self, index: int) -> int:
        count = len(self.turns)
        return next(each % count for each in range(index + 1, index + count + 1) if not self.over[each % count])


def together(*calls: Call) -> list[Any]:
    """What the calls return, or raise, in threads of their own that take turns."""
    turns = Turns(len(calls))

    def run(index: int) -> Any:
        turns.wait(index)
        try:
            return calls[index](lambda: turns.meet(index))
        except (Exception, KeyboardInterrupt) as error:
            return error
        finally:
            turns.end(index)

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, range(len(calls))))


class MeetingAtAttention(TorchFunctionMode):
    """Of one thread: it meets before every other dense attention and whenever logits are sampled or compared."""

    def __init__(self, meet: Meet) -> None:
        super().__init__()
        self.meet = meet

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (functional.scaled_dot_product_attention, torch.argmax, torch.multinomial):
            self.meet()
        return func(*args, **(kwargs or {}))


def meeting(function: Callable[[], Any]) -> Call:
    def run(meet: Meet) -> Any:
        with MeetingAtAttention(meet):
            return function()

    return run


class Calls:
    """Calls by name on one model that is enabled under HEAVY, and what each returns alone."""

    def __init__(self, model: JanusForConditionalGeneration) -> None:
        self.model = model
        model.model.vision_model.config.num_image_tokens = 3 * tiny.GRID  # a shorter picture
        pipe = Pipeline(model, tiny.build_processor())
        images = tiny.image_inputs(tuple(PROMPTS))
        batch = tiny.build_processor()(text=PROMPTS, padding=True, return_tensors="pt")
        words = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

        def enabled(**options: Any) -> torch.Tensor:
            return model.generate(**images, generation_mode="image", do_sample=False, **options)

        def by_transformers(plan: CachePlan, seed: int, guidance: float, backend: str) -> torch.Tensor:
            """As where the engine cannot run a model."""
            options = {"do_sample": True, "top_k": 9}
            return pipe._with_transformers(PROMPTS, guidance, seed, plan, backend, options, None,
                                           lambda done, total: None, (), None)[0]

        @torch.no_grad()
        def forward() -> torch.Tensor:
            return torch.stack([model(**words).logits for _ in range(5)])

        functions = {
            "loop": lambda: enabled(logits_processor=[lambda ids, scores: scores]),
            "loop, unguided": lambda: enabled(logits_processor=[lambda ids, scores: scores], guidance_scale=1.0),
            "loop of a pipeline": lambda: by_transformers(NARROW, 3, 2.0, "auto"),
            "loop of a pipeline, unguided": lambda: by_transformers(FULL, 4, 1.0, "reference"),
            "engine": enabled,
            "engine of a pipeline": lambda: pipe.generate_tokens(PROMPTS, seed=5, plan=NARROW),
            "text": lambda: model.generate(**words, max_new_tokens=9, do_sample=False),
            "forward": forward,
        }
        self.calls = {name: meeting(function) for name, function in functions.items()}
        self.results: dict[str, torch.Tensor] = {}

    def alone(self, name: str) -> torch.Tensor:
        if name not in self.results:
            self.results[name] = self.calls[name](lambda: None)
        return self.results[name]


@pytest.fixture(scope="module")
def calls() -> Calls:
    model = tiny.build_model()
    enable(model, HEAVY)
    return Calls(model)


LOOPS = ("loop", "loop, unguided", "loop of a pipeline", "loop of a pipeline, unguided")
OTHERS = ("engine", "engine of a pipeline", "text", "forward")
MIXES = [("loop", "loop"), ("loop", "loop, unguided"), ("loop of a pipeline, unguided", "loop"),
         ("loop, unguided", "loop of a pipeline"), *itertools.product(LOOPS[1:3], OTHERS),
         ("engine", "engine of a pipeline"), LOOPS, ("loop", *OTHERS)]


def test_the_calls_differ(calls: Calls) -> None:
    drawn = [calls.alone(name) for name in (*LOOPS, "engine of a pipeline")]
    assert not any(torch.equal(*pair) for pair in itertools.combinations(drawn, 2))
    assert torch.equal(calls.alone("loop"), calls.alone("engine"))


@pytest.mark.parametrize("names", MIXES, ids=" & ".join)
def test_mixed(calls: Calls, names: tuple[str, ...]) -> None:
    expected = [calls.alone(name) for name in names]
    before = state(calls.model)
    for name, one, result in zip(names, expected, together(*(calls.calls[name] for name in names)), strict=True):
        assert isinstance(result, torch.Tensor), result
        assert torch.equal(result, one), name
    assert state(calls.model) == before


def test_without_taking_turns(calls: Calls) -> None:
    """All at once, and switched as often as the interpreter can."""
    before, interval = state(calls.model), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            names = [*calls.calls, *LOOPS]
            for name, result in zip(names, pool.map(lambda name: calls.calls[name](lambda: None), names), strict=True):
                assert torch.equal(result, calls.alone(name)), name
    finally:
        sys.setswitchinterval(interval)
    assert state(calls.model) == before


def test_an_end_by_force_is_one_callers_own(calls: Calls) -> None:
    model, before = calls.model, state(calls.model)
    images = tiny.image_inputs(tuple(PROMPTS))

    def fail(error: BaseException) -> Call:
        steps = itertools.count()

        def processor(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if next(steps) == 7:
                raise error
            return scores

        return meeting(lambda: model.generate(**images, generation_mode="image", guidance_scale=1.0,
                                              logits_processor=[processor]))

    errors = KeyboardInterrupt(), RuntimeError("planted")
    *found, loop, text = together(*map(fail, errors), calls.calls["loop"], calls.calls["text"])
    assert found == list(errors)
    assert torch.equal(loop, calls.alone("loop")) and torch.equal(text, calls.alone("text"))
    assert state(model) == before


def test_what_one_call_puts_up_is_nothing_to_others(calls: Calls) -> None:
    """The engine draws beside transformers' loop, and whoever meets a hook half put up passes."""
    found: list[Any] = []

    def look(meet: Meet) -> None:
        for _ in range(3):
            meet()
        language_model = calls.model.model.language_model
        (hook,) = language_model._forward_pre_hooks.values()
        found.extend([unsupported(calls.model), hook(language_model, ()), hook(language_model, (), {"input_ids": 0}),
                      copy.deepcopy(hook)(language_model, (), {})])

    loop, _ = together(calls.calls["loop, unguided"], look)
    assert torch.equal(loop, calls.alone("loop, unguided")) and found == [None] * 4


def test_another_attention_implementation_meanwhile_is_refused(calls: Calls) -> None:
    def change(meet: Meet) -> None:
        meet()
        meet()
        calls.model.set_attn_implementation("eager")

    try:
        error, _ = together(calls.calls["loop"], change)
        assert isinstance(error, ValueError) and "must not be changed while a picture is drawn" in str(error)
        assert calls.model.model.language_model.config._attn_implementation == "eager"
        for name in ("loop", "engine"):  # afterwards it may have any
            assert torch.equal(calls.calls[name](lambda: None), calls.alone(name))
    finally:
        calls.model.set_attn_implementation("sdpa")


def test_enabling_disabling_and_copying_while_others_draw(fresh: Any) -> None:
    usual, copies = Calls(fresh), []
    before = state(fresh)

    def other_plans(meet: Meet) -> None:
        for plan in (NARROW, FULL):
            meet()
            enable(fresh, plan)
            meet()
            copies.append(copy.deepcopy(fresh))
            meet()
            disable(fresh)
            unfuse(fresh)

    names = ("loop of a pipeline", "engine of a pipeline", "text", "forward")
    expected = [usual.alone(name) for name in names]
    results = together(*(usual.calls[name] for name in names), other_plans)
    for name, one, result in zip(names, expected, results, strict=False):
        assert torch.equal(result, one), name
    assert state(fresh) == before
    narrow, full = (Calls(other) for other in copies)
    assert not torch.equal(narrow.alone("loop"), full.alone("loop"))
    assert torch.equal(full.alone("loop"), usual.alone("loop"))  # on a stock model by now
    for other in copies:
        disable(other)
        assert state(other)["attention"] == before["attention"]


def test_weights_are_fused_by_one_at_a_time(fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second thread comes when the first is about to look whether weights are fused already."""
    expected = Engine(copy.deepcopy(fresh), products="torch").generate([[0, 9, 3]])
    looking, fused, look = threading.Event(), threading.Event(), weights._consecutive

    def consecutive(parameters: Any) -> bool:
        if not looking.is_set():
            looking.set()
            fused.wait(0.3)  # in vain, because the other has to wait for this thread
        return look(parameters)

    def second() -> None:
        assert looking.wait(WAIT)
        fuse(fresh)
        fused.set()

    monkeypatch.setattr(weights, "_consecutive", consecutive)
    with ThreadPoolExecutor(2) as pool:
        tokens = pool.submit(lambda: Engine(fresh, products="torch").generate([[0, 9, 3]]))
        pool.submit(second).result()
        assert torch.equal(tokens.result(), expected)


def test_seeds_are_the_pictures_own(fresh: Any) -> None:
    """In transformers' loop, too; torch's generator, which is everyone's, is left alone."""
    pipe = Pipeline(fresh, tiny.build_processor())
    expected = pipe.generate_tokens(PROMPTS, 2, seed=3)
    fresh.model.language_model.layers[0].mlp.register_forward_hook(lambda module, args, output: output)
    before = torch.get_rng_state()
    assert torch.equal(pipe.generate_tokens(PROMPTS, 2, seed=3), expected)
    assert torch.equal(pipe.generate_tokens(PROMPTS, 2, seed=3, batch_size=3), expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_reason_is_said_once_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(set[str]):
        def __contains__(self, reason: object) -> bool:
            known = super().__contains__(reason)
            time.sleep(0.01)
            return known

    said: list[str] = []
    monkeypatch.setattr(saying, "_said", Slow())
    monkeypatch.setattr(saying._logger, "warning", lambda *args: said.append(args[-1]))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: call.say_once("planted"), range(8)))
    assert said == ["transformers' own loop draws, not the engine: planted"]
