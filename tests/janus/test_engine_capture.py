"""The step could be a CUDA graph: recorded once and replayed, it draws the rest of the picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from test_engine import plan_of_budget, prompts_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ssd_attach.online import OnlinePlan
from ssd_janus.engine import Engine, Sampling
from ssd_janus.shape import ModelShape
from ssd_kernels import CachePlan

# Operations that would have to wait for the device, or whose output has a size that only the device knows.
SYNCHRONISING = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "unique", "masked_select",
                 "repeat_interleave.Tensor", "bincount")


class Recording(TorchDispatchMode):
    """What a CUDA graph keeps of a piece of code: operations, Python numbers, and where tensors are."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[-1]
        assert name.split(".")[0] not in SYNCHRONISING and name not in SYNCHRONISING, f"{name} waits for the device"
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, tree_flatten(result)[0]))
        return result

    def replay(self) -> None:
        for func, args, kwargs, results in self.operations:
            again = tree_flatten(func(*args, **kwargs))[0]
            for old, new in zip(results, again, strict=True):
                if isinstance(old, torch.Tensor) and place(old) != place(new):
                    old.copy_(new)


def place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def record(advance: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> Recording:
    """Run one step and record it."""
    # Otherwise the cache calls its backend without torch seeing it.
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    with Recording() as recording:
        advance()
    monkeypatch.undo()
    return recording


@pytest.mark.parametrize("budget", [1, 0.2])
@pytest.mark.parametrize("options", [{"greedy": True}, {"temperature": 0.9, "top_k": 40, "top_p": 0.9}], ids=str)
def test_one_recorded_step_draws_the_rest(model: Any, budget: float, options: dict[str, Any],
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = Sampling(greedy=True) if "greedy" in options else Sampling.make(**options)
    engine = Engine(model, plan_of_budget(model, budget), products="torch")  # whose operations can be recorded
    prompts, guidance = prompts_of(tiny.image_inputs()), [5.0, 2.0, 2.0, 1.0]
    expected = engine.generate(prompts, guidance=guidance, seeds=3, sampling=sampling)
    batch = engine.batch(prompts, guidance=guidance, seeds=3, sampling=sampling)
    batch.step()
    batch.prepare()
    with torch.no_grad():
        recording = record(batch.advance, monkeypatch)
        for _ in range(3, tiny.TOKENS):
            batch.prepare()
            recording.replay()
    assert torch.equal(batch.tokens, expected)


def test_online_typing_reads_nothing_back_and_then_makes_way(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, greedy = prompts_of(tiny.image_inputs()), Sampling(greedy=True)
    plan = OnlinePlan(ModelShape.of(model), 0.7, 6, loss=0.42)
    engine = Engine(model, plan, products="torch")
    expected = engine.generate(prompts, guidance=2.0, sampling=greedy)
    kept = engine.generate(prompts, guidance=2.0, sampling=greedy, steps=plan.rows * tiny.GRID + 1)
    assert torch.equal(kept, expected[:, :kept.shape[1]])
    batch = engine.batch(prompts, guidance=2.0, sampling=greedy)
    with torch.no_grad():
        while batch.observer is not None:
            record(batch.step, monkeypatch)
            assert batch.done <= plan.rows * tiny.GRID + 1
        assert batch.done == plan.rows * tiny.GRID + 1, "the boundary at which heads are typed"
        recording = record(batch.advance, monkeypatch)
        for _ in range(batch.done + 1, tiny.TOKENS):
            recording.replay()
    assert torch.equal(batch.tokens, expected)
    heavy = Engine(model, CachePlan(plan.layers, 6)).generate(prompts, guidance=2.0, sampling=greedy)
    assert not torch.equal(heavy, expected), "typing must make a difference here"


def test_what_a_graph_would_get_wrong_is_noticed(fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail: a step that reads the device, and one that counts in Python."""
    prompts, greedy = prompts_of(tiny.image_inputs()), Sampling(greedy=True)
    engine = Engine(fresh)
    expected = engine.generate(prompts, guidance=2.0, sampling=greedy)
    batch = engine.batch(prompts, guidance=2.0, sampling=greedy)
    with pytest.raises(AssertionError, match="_local_scalar_dense waits for the device"):
        record(lambda: batch.column.fill_(int(batch.column)), monkeypatch)
    monkeypatch.undo()

    def counting_in_python() -> None:
        batch.column.fill_(batch.done)
        batch.advance()

    with torch.no_grad():
        recording = record(counting_in_python, monkeypatch)
        for _ in range(2, tiny.TOKENS):
            recording.replay()
    assert torch.equal(batch.tokens[:, 0], expected[:, 0]) and not torch.equal(batch.tokens, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [Sampling(greedy=True), Sampling.make(0.9, 40)], ids=["greedy", "sampling"])
def test_a_cuda_graph_draws_the_same(fresh: Any, sampling: Sampling) -> None:
    fresh.to("cuda")
    prompts, plan = prompts_of(tiny.image_inputs()), plan_of_budget(fresh, 0.2)
    drawn = [Engine(fresh, plan, capture=capture).generate(prompts, guidance=[5.0, 2.0, 1.0, 2.0], sampling=sampling)
             for capture in (False, True)]
    assert torch.equal(*drawn)
