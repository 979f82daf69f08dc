"""`HeadSpec` and `CachePlan`: what is accepted, the budget by its definition, and the bytes a cache takes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssd_kernels import CachePlan, CompressedCache, HeadSpec
from ssd_kernels.kv_format import KV_FORMATS

from .cases import MIX, mixed, uniform
from .test_random import head_specs

BAD_SPECS = {
    "window-negative": (lambda: HeadSpec.window(-1), ValueError, "size.*-1"),
    "window-bool": (lambda: HeadSpec.window(True), TypeError, "size.*True"),
    "window-float": (lambda: HeadSpec.window(4.0), TypeError, "size.*4.0"),
    "window-none": (lambda: HeadSpec.window(None), TypeError, "size.*None"),
    "heavy-zero": (lambda: HeadSpec.heavy(0), ValueError, "size.*0"),
    "heavy-negative": (lambda: HeadSpec.heavy(-3), ValueError, "size.*-3"),
    "heavy-string": (lambda: HeadSpec.heavy("4"), TypeError, "size.*'4'"),
    "recent-negative": (lambda: HeadSpec.heavy(4, recent=-1), ValueError, "recent.*-1"),
    "recent-above-M": (lambda: HeadSpec.heavy(4, recent=5), ValueError, "recent.*4.*5"),
    "recent-float": (lambda: HeadSpec.heavy(4, recent=1.0), TypeError, "recent.*1.0"),
    "recent-bool": (lambda: HeadSpec.heavy(4, recent=True), TypeError, "recent.*True"),
    "score-unknown": (lambda: HeadSpec.heavy(4, score="max"), ValueError, "score.*sum.*mean.*max"),
    "kind-unknown": (lambda: HeadSpec("sparse", 4), ValueError, "kind.*full.*window.*heavy.*sparse"),
    "full-sized": (lambda: HeadSpec("full", 4), ValueError, "size.*4"),
    "window-recent": (lambda: HeadSpec("window", 4, recent=1), ValueError, "recent"),
    "pinned-negative": (lambda: HeadSpec.heavy(4, pinned=[2, -1]), ValueError, r"pinned\[1\].*-1"),
    "pinned-float": (lambda: HeadSpec.heavy(4, pinned=[1.0]), TypeError, r"pinned\[0\].*1.0"),
    "pinned-bool": (lambda: HeadSpec.heavy(4, pinned=(1, True)), TypeError, r"pinned\[1\].*True"),
    "pinned-number": (lambda: HeadSpec.heavy(4, pinned=7), TypeError, "pinned.*7"),
    "pinned-none": (lambda: HeadSpec.heavy(4, pinned=None), TypeError, "pinned.*None"),
    "pinned-string": (lambda: HeadSpec.heavy(4, pinned="12"), TypeError, "pinned.*'12'"),
    "pinned-bytes": (lambda: HeadSpec.heavy(4, pinned=b"12"), TypeError, "pinned.*b'12'"),
    "pinned-tensor": (lambda: HeadSpec.heavy(4, pinned=torch.tensor([1])), TypeError, r"pinned\[0\].*Tensor"),
    "pinned-too-many": (lambda: HeadSpec.heavy(4, pinned=range(2**20 + 1)), ValueError, "pinned.*1048576.*1048577"),
    "window-pinned": (lambda: HeadSpec("window", 4, pinned=(1,)), ValueError, "pinned.*heavy.*window"),
    "full-pinned": (lambda: HeadSpec("full", pinned=(1,)), ValueError, "pinned.*heavy.*full"),
    "window-position": (lambda: HeadSpec("window", 4, score="position"), ValueError, "score.*position"),
    "window-score": (lambda: HeadSpec("window", 4, score="mean"), ValueError, "score"),
}

BAD_PLANS = {
    "no-layer": (lambda: CachePlan([]), ValueError, "layers"),
    "no-head": (lambda: CachePlan([[]]), ValueError, "layers.*head"),
    "ragged": (lambda: CachePlan([MIX[:2], MIX[:3]]), ValueError, "layers.*layer 1 has 3"),
    "not-nested": (lambda: CachePlan([HeadSpec.full()]), TypeError, "layers"),
    "not-a-sequence": (lambda: CachePlan(7), TypeError, "layers"),
    "not-a-spec": (lambda: CachePlan([[HeadSpec.full(), "window"]]), TypeError, r"layers\[0\]\[1\].*window"),
    "row_buffer-negative": (lambda: CachePlan([MIX], row_buffer=-1), ValueError, "row_buffer.*-1"),
    "row_buffer-float": (lambda: CachePlan([MIX], row_buffer=1.5), TypeError, "row_buffer.*1.5"),
    "row_buffer-bool": (lambda: CachePlan([MIX], row_buffer=True), TypeError, "row_buffer.*True"),
    "keep_prompt-int": (lambda: CachePlan([MIX], keep_prompt=1), TypeError, "keep_prompt.*1"),
    "num_layers-zero": (lambda: CachePlan.uniform(MIX[0], num_layers=0, num_heads=1), ValueError, "num_layers.*0"),
    "num_heads-zero": (lambda: CachePlan.uniform(MIX[0], num_layers=1, num_heads=0), ValueError, "num_heads.*0"),
    "budget-of-nothing": (lambda: mixed().budget(0), ValueError, "num_visual_tokens.*0"),
}


@pytest.mark.parametrize("name", [*BAD_SPECS, *BAD_PLANS])
def test_bad_specs_and_plans_are_refused(name: str) -> None:
    """"Bad input raises a `ValueError`/`TypeError` that names the argument, what was given and what is allowed"."""
    make, error, message = {**BAD_SPECS, **BAD_PLANS}[name]
    with pytest.raises(error, match=message):
        make()


def test_specs_and_plans_are_plain_frozen_data() -> None:
    """"plain data": equal when their contents are, hashable, and not to be changed afterwards."""
    assert HeadSpec.heavy(4) == HeadSpec.heavy(4, recent=0, score="sum") != HeadSpec.heavy(4, recent=1)
    assert HeadSpec.window(4) == HeadSpec("window", 4) and HeadSpec.full() == HeadSpec("full")
    for pinned in ([3, 1, 3], {1, 3}, (n for n in (1, 3)), range(1, 4, 2), {3: "x", 1: "y"}):
        assert HeadSpec.heavy(4, pinned=pinned) == HeadSpec("heavy", 4, 0, "sum", (1, 3)) != HeadSpec.heavy(4)
    assert HeadSpec.heavy(4, pinned=[3, 1]).pinned == (1, 3) and HeadSpec.full().pinned == ()
    assert hash(HeadSpec.heavy(4, pinned=[3, 1])) == hash(HeadSpec.heavy(4, pinned=(1, 3)))
    plan = mixed(3, row_buffer=4, num_layers=2)
    assert plan == mixed(3, row_buffer=4, num_layers=2) and hash(plan) == hash(mixed(3, row_buffer=4, num_layers=2))
    assert plan != mixed(3, row_buffer=5, num_layers=2) != mixed(3, row_buffer=5, num_layers=2, keep_prompt=False)
    assert (plan.num_layers, plan.num_heads, plan.row_buffer, plan.keep_prompt) == (2, 3, 4, True)
    with pytest.raises(AttributeError):
        plan.row_buffer = 0
    with pytest.raises(AttributeError):
        MIX[0].size = 0


def test_plans_do_not_follow_the_lists_they_were_made_of() -> None:
    """A plan keeps its own copy of `layers`."""
    layers = [[HeadSpec.full()], [HeadSpec.window(3)]]
    plan = CachePlan(layers)
    layers[0][0] = HeadSpec.window(0)
    assert plan.layers == ((HeadSpec.full(),), (HeadSpec.window(3),))


def held_tokens(size: int | None, prompt: int, tokens: int, row_buffer: int) -> int:
    """The most evictable tokens a head ever holds, by playing the rules with nothing but a counter."""
    held = most = prompt if size is None else min(prompt, size)
    for t in range(tokens):
        held += 1
        most = max(most, held)
        if row_buffer == 0 or (t + 1) % row_buffer == 0:
            held = held if size is None else min(held, size)
    return most


PLANS = st.integers(1, 4).flatmap(lambda heads: st.builds(
    CachePlan, st.lists(st.lists(head_specs(40), min_size=heads, max_size=heads), min_size=1, max_size=3),
    row_buffer=st.integers(0, 45), keep_prompt=st.booleans(), kv_format=st.sampled_from(KV_FORMATS)))


@given(plan=PLANS, tokens=st.integers(1, 40))
def test_budget_is_what_heads_hold(plan: CachePlan, tokens: int) -> None:
    """"mean over heads of the largest number of visual slots a head ever holds (row buffer included)" / tokens."""
    most = [held_tokens(spec.size, 0, tokens, plan.row_buffer) for heads in plan.layers for spec in heads]
    assert plan.budget(num_visual_tokens=tokens) == pytest.approx(sum(most) / len(most) / tokens, rel=1e-12)


def test_budget_of_the_paper() -> None:
    """A window of 115 with the paper's row buffer of 24, by hand: 115 + 24 slots of 576; full is 1."""
    assert uniform(HeadSpec.window(115), row_buffer=24).budget() == pytest.approx(139 / 576)
    assert uniform(HeadSpec.window(115)).budget() == pytest.approx(116 / 576)
    assert uniform(HeadSpec.full()).budget() == 1.0


@given(plan=PLANS, tokens=st.integers(1, 40), max_prompt=st.integers(0, 20), head_dim=st.sampled_from([32, 40, 128]),
       batch=st.integers(1, 3), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_slots_are_exactly_what_heads_hold(plan: CachePlan, tokens: int, max_prompt: int, head_dim: int, batch: int,
                                           dtype: torch.dtype) -> None:
    """`nbytes` is the cache's, and heads' ranges tile the slab, with room for what any prompt makes them hold."""
    cache = CompressedCache(plan, batch_size=batch, num_query_heads=plan.num_heads, head_dim=head_dim,
                            max_prompt=max_prompt, num_visual_tokens=tokens, dtype=dtype, backend="reference")
    assert cache.nbytes == sum(tensor.nbytes for state in cache._layers for tensor in state.everything)
    assert cache.nbytes == plan.nbytes(batch_size=batch, head_dim=head_dim, max_prompt=max_prompt, dtype=dtype,
                                       num_visual_tokens=tokens)
    for specs, state in zip(plan.layers, cache._layers, strict=True):
        begin = 0
        for spec, span in zip(specs, state.layout.heads, strict=True):
            if plan.keep_prompt:
                needed = max_prompt + held_tokens(spec.size, 0, tokens, plan.row_buffer)
            else:
                needed = max(held_tokens(spec.size, prompt, tokens, plan.row_buffer)
                             for prompt in range(max_prompt + 1))
            assert (span.offset, span.capacity) == (begin, needed)
            begin += needed
        assert state.keys.shape == state.values.shape == (batch, begin, head_dim)


def test_compressed_caches_are_small() -> None:
    """The point of it all: Janus-Pro-1B at a 20% budget takes a fifth of the full cache's bytes and a little more."""
    sizes = {"batch_size": 8, "head_dim": 128, "max_prompt": 0, "dtype": torch.bfloat16}
    full = CachePlan.uniform(HeadSpec.full(), 24, 16).nbytes(**sizes)
    assert full == pytest.approx(8 * 576 * 196_608, rel=1e-4)  # Janus-Pro-1B: 196,608 bytes per token and row
    small = CachePlan.uniform(HeadSpec.heavy(114), 24, 16)
    assert small.budget() == pytest.approx(0.2, abs=1e-3)
    assert 0.2 < small.nbytes(**sizes) / full / small.budget() * 0.2 < 0.206
