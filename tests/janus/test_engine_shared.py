"""The engine holds every different prompt once: samples of a prompt, and unconditional rows of equal length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch
from test_engine import plan_of_budget

from ssd_janus.engine import Engine, memory
from ssd_kernels import CachePlan

STEPS = 30
A, B = [0, 5, 6, 7, 8, 3], [0, 9, 10, 11, 12, 3]  # of equal length, so that their unconditional rows are alike
LONGER = [0, *range(20, 40), 3]


def _drawn(engine: Engine, prompts: Sequence[list[int]], **options: Any) -> torch.Tensor:
    return engine.generate(prompts, seeds=3, steps=STEPS, **options)


def _size(plan: CachePlan, rows: int, longest: int, different: int | None) -> int:
    return plan.nbytes(batch_size=rows, head_dim=tiny.HEAD_DIM, max_prompt=longest, dtype=torch.float32,
                       num_visual_tokens=tiny.TOKENS, shared_prompts=different)


@pytest.mark.parametrize(("prompts", "guidance", "different"), [
    ([A] * 8, 5.0, 2), ([A, B, A], 5.0, 3), ([A, B], 1.0, None), ([A, LONGER], 5.0, None),
    ([LONGER, A, LONGER, B], [5.0, 1.0, 1.0, 2.0], 5)],
    ids=["samples", "unconditional", "all-differ", "lengths-differ", "some-guided"])
@pytest.mark.parametrize("keep_prompt", [True, False], ids=["keep_prompt", "evict_prompt"])
def test_tokens_are_those_of_copies(fresh: Any, monkeypatch: pytest.MonkeyPatch, keep_prompt: bool,
                                    prompts: list[list[int]], guidance: Any, different: int | None) -> None:
    """The same tokens, and a cache of the size that the formula says; prompts that rows evict are not shared."""
    plan = plan_of_budget(fresh, 0.2)
    plan = CachePlan(plan.layers, plan.row_buffer, keep_prompt)
    engine = Engine(fresh, plan)
    shared = _drawn(engine, prompts, guidance=guidance)
    run = engine.last_run
    assert run is not None
    longest = max(map(len, prompts))
    assert run.cache_bytes == _size(plan, run.rows, longest, different if keep_prompt else None)
    monkeypatch.setattr(memory, "shared_prompts", lambda *_: None)
    assert torch.equal(shared, _drawn(engine, prompts, guidance=guidance))
    assert engine.last_run is not None and engine.last_run.cache_bytes == _size(plan, run.rows, longest, None)


def test_observers_see_every_row(fresh: Any) -> None:
    """What watches sees the prompts of all rows, whoever holds them, and changes no token."""
    seen: list[tuple[torch.Tensor, list[int]]] = []

    class Watch:
        def prefill(self, cache: Any, layer: int, keys: torch.Tensor, values: torch.Tensor, lengths: list[int]) -> None:
            assert cache.shared_prompts == 3
            seen.append((keys.clone(), lengths))

        def decode(self, *_: Any) -> None:
            pass

    engine = Engine(fresh, plan_of_budget(fresh, 0.2))
    assert torch.equal(_drawn(engine, [A, B, A], observer=Watch()), _drawn(engine, [A, B, A]))
    for keys, lengths in seen:
        assert lengths == [len(A)] * 6
        assert torch.equal(keys[0], keys[2]) and torch.equal(keys[3], keys[5]) and not torch.equal(keys[0], keys[1])


def test_more_samples_fit(fresh: Any) -> None:
    """`max_batch` counts a prompt once for all its samples, and requests are split by what they really hold."""
    engine = Engine(fresh, plan_of_budget(fresh, 0.2))
    weights = memory.weight_bytes(fresh)

    def needed(pictures: int, different: int) -> int:
        return weights + _size(engine.plan, 2 * pictures, 512, different) + memory.step_bytes(
            fresh, pictures, 2 * pictures, 512, different)

    for pictures, different in ((16, 4), (17, 6)):
        room = needed(pictures, different)
        assert engine.max_batch(room, max_prompt=512, samples=8) == pictures
        assert engine.max_batch(room - 1, max_prompt=512, samples=8) == pictures - 1
        assert engine.max_batch(room, max_prompt=512) < pictures
    with pytest.raises(ValueError, match="samples must be at least 1"):
        engine.max_batch(samples=0)


def test_different_prompts_of_a_batch(fresh: Any) -> None:
    """Counted in the batches that will be drawn, unconditional rows included where there are any."""
    engine = Engine(fresh)

    def different(prompts: list[list[int]], size: int, guidance: Any = 5.0) -> int:
        return engine._request(prompts, guidance, 0, STEPS, None, None).different(size)

    runs = [A] * 4 + [B] * 4
    assert [different(runs, size) for size in (1, 2, 3, 4, 5, 8, 100)] == [2, 2, 3, 2, 3, 3, 3]
    assert [different(runs, size, 1.0) for size in (1, 4, 6)] == [1, 1, 2]
    assert different([A, LONGER], 2) == 4 and different([A, B], 2, [1.0, 2.0]) == 3
