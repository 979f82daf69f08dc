"""Random plans, shapes, storage types, prompts and restarts against the oracle (`HYPOTHESIS_PROFILE=explore`: more)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssd_kernels import CachePlan, HeadSpec

from .cases import Case, each_backend
from .pair import Pair


@st.composite
def head_specs(draw: st.DrawFn, largest: int = 12) -> HeadSpec:
    """Any head spec, mostly small ones."""
    kind = draw(st.sampled_from(["heavy", "heavy", "window", "full"]))
    if kind == "full":
        return HeadSpec.full()
    if kind == "window":
        return HeadSpec.window(draw(st.integers(0, largest)))
    size = draw(st.integers(1, largest))
    rules = st.sampled_from(["sum", "mean", "position", "decayed"])
    return HeadSpec.heavy(size, draw(st.integers(0, size)), draw(rules),
                          pinned=draw(st.just(()) | st.sets(st.integers(0, 45))))


@st.composite
def pairs(draw: st.DrawFn, case: Case) -> Pair:
    """A cache of at most 4 rows, 4 KV heads and 40 steps, beside its oracle; on the executor, which runs blocks one by
    one, of at most 2 rows and 2 heads."""
    most = 2 if case.name.startswith("ptx") else 4
    heads = draw(st.integers(1, most))
    layers = draw(st.lists(st.lists(head_specs(), min_size=heads, max_size=heads), min_size=1, max_size=2))
    plan = CachePlan(layers, draw(st.sampled_from([0, 0, 1, 2, 3, 5, 8, 24, 50])), draw(st.booleans()))
    batch = draw(st.integers(1, most))
    shares = plan.keep_prompt and draw(st.booleans())
    return Pair(plan, case, batch=batch, shared_prompts=batch if shares else None,
                group=draw(st.sampled_from([1, 1, 2, 3])), head_dim=8 * draw(st.integers(4, 12)),
                max_prompt=draw(st.integers(0, 16)),
                steps=draw(st.integers(1, 40)), dtype=draw(st.sampled_from(case.dtypes)),
                scale=draw(st.sampled_from([None, None, 0.3])), track_scores=draw(st.booleans()),
                seed=draw(st.integers(0, 999)))


@each_backend
@given(data=st.data())
def test_random_caches_follow_the_oracle(case: Case, data: st.DataObject) -> None:
    """docs/specification.md, section 3, for whatever plan a user may write, with rows that restart at any step."""
    pair = data.draw(pairs(case), "pair")
    length = st.integers(0, pair.max_prompt)
    if data.draw(st.booleans(), "prefill"):
        pair.prefill(data.draw(st.lists(length, min_size=pair.batch, max_size=pair.batch), "prompt_lens"),
                     scores=data.draw(st.sampled_from([None, torch.rand(pair.batch, pair.heads, pair.max_prompt)]))
                     if pair.cache._layers[0].layout.prompt_scores else None)
    pair.run(data.draw(st.integers(0, pair.steps), "steps before"))
    rows = data.draw(st.lists(st.integers(0, pair.batch - 1), unique=True, max_size=pair.batch), "rows")
    if rows:
        lengths = data.draw(st.lists(length, min_size=len(rows), max_size=len(rows)), "prompt_lens")
        entry = st.integers(0, len(rows) - 1)
        share = data.draw(st.none() | st.lists(entry, min_size=len(rows), max_size=len(rows)), "share")
        pair.prefill(lengths, rows=rows, share=share if pair.plan.keep_prompt else None
                     ) if data.draw(st.booleans(), "prefill") else pair.reset(rows)
    pair.run(pair.steps - max(pair.oracles[0].step))
    with pytest.raises(ValueError, match="num_visual_tokens"):
        pair.step()
