"""Rule 4's small print: "ties: the older position is evicted", "NaN keys never win", `score="mean"`, `recent`.

Decisions are made on scores that are exact in float32, so that kept sets must be equal on every backend.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssd_kernels import CachePlan, HeadSpec

from .cases import Case, each_backend, each_dtype, uniform
from .pair import Pair

BUFFERS = pytest.mark.parametrize("row_buffer", [0, 1, 4], ids="R{}".format)
BIG = 2.0**30  # adding probabilities to multiples of this changes nothing in float32


@each_dtype
def test_equal_sums_evict_the_oldest(case: Case, dtype: torch.dtype) -> None:
    """q = 0, 7 kept + 1 new: all have exactly 1/8 after the first step, and the oldest goes."""
    pair = Pair(uniform(HeadSpec.heavy(7), 1, keep_prompt=False), case, batch=1, max_prompt=7, steps=4, dtype=dtype)
    pair.prefill([7])
    pair.step(q=torch.zeros(1, 1, 40, dtype=dtype))
    assert pair.cache.positions(0, 0)[0].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert pair.cache.scores(0, 0)[0].tolist() == [0.125] * 7
    pair.step(q=torch.zeros(1, 1, 40, dtype=dtype))  # the new token has only 1/8, all others 2/8: it goes itself
    assert pair.cache.positions(0, 0)[0].tolist() == [1, 2, 3, 4, 5, 6, 7]


@each_dtype
def test_equal_means_make_a_window(case: Case, dtype: torch.dtype) -> None:
    """q = 0, 7 kept + 1 new, `mean`: every key is exactly 1/8 at every step, so the oldest always goes."""
    pair = Pair(uniform(HeadSpec.heavy(7, score="mean"), 1, keep_prompt=False), case, batch=1, max_prompt=7, steps=20,
                dtype=dtype)
    pair.prefill([7])
    for step in range(20):
        pair.step(q=torch.zeros(1, 1, 40, dtype=dtype))
        assert pair.cache.positions(0, 0)[0].tolist() == list(range(step + 1, step + 8))


@each_backend
@BUFFERS
@pytest.mark.parametrize("recent", [0, 1, 2], ids="recent{}".format)
@pytest.mark.parametrize("rule", ["sum", "mean", "decayed"])
def test_zero_scores_evict_the_oldest(case: Case, rule: str, recent: int, row_buffer: int) -> None:
    """Logits 2e4 below the highest give exactly 0: tokens nobody looks at tie, and the newest of them stay."""
    pair = Pair(uniform(HeadSpec.heavy(4, recent, rule), 2, row_buffer), case, max_prompt=2, steps=13, scale=1.0)
    prompt = torch.zeros(2, 2, 2, 40)
    prompt[..., 0] = 100.0  # the prompt draws all attention
    q, k = torch.zeros(2, 2, 40), torch.zeros(2, 2, 40)
    q[..., 0], k[..., 0] = 100.0, -100.0
    pair.prefill([2, 1], k=prompt)
    for step in range(13):
        pair.step(q=q, k=k)
        if row_buffer == 0 or (step + 1) % row_buffer == 0:
            newest = [2 + t for t in range(max(step - 3, 0), step + 1)]
            assert pair.cache.positions(0, 0)[0].tolist() == [0, 1, *newest]


@each_backend
@BUFFERS
def test_high_ties_survive_low_newcomers(case: Case, row_buffer: int) -> None:
    """Two loud prompt tokens share the attention (exactly 1/2 each, equal sums); quiet ones tie at 0 behind them."""
    pair = Pair(uniform(HeadSpec.heavy(3), 1, row_buffer, keep_prompt=False), case, batch=1, max_prompt=2, steps=12,
                scale=1.0)
    q, loud, quiet = torch.zeros(1, 1, 40), torch.zeros(1, 1, 2, 40), torch.zeros(1, 1, 40)
    q[..., 0], loud[..., 0], quiet[..., 0] = 100.0, 100.0, -100.0
    pair.prefill([2], k=loud)
    for _ in range(12):
        pair.step(q=q, k=quiet)
    assert pair.cache.positions(0, 0)[0].tolist() == [0, 1, 13]
    assert pair.cache.scores(0, 0)[0].tolist() == [6.0, 6.0, 0.0]


RULES = st.sampled_from(["sum", "mean", "position", "decayed"])
PINNED = st.just(()) | st.sets(st.integers(0, 11))
SCORES = st.sampled_from([0.0, BIG, BIG, 2 * BIG, 3 * BIG, 0.5, 0.5, -1.0, float("inf"), float("nan"), float("nan")])


@each_backend
@given(data=st.data())
def test_prefill_keeps_the_best_of_given_scores(case: Case, data: st.DataObject) -> None:
    """Rule 4 at the end of prefill, on given scores full of ties, NaN and infinity."""
    size = data.draw(st.integers(1, 12), "M")
    spec = HeadSpec.heavy(size, data.draw(st.integers(0, size), "recent"), data.draw(RULES, "rule"),
                          pinned=data.draw(PINNED, "pinned"))
    prompt = data.draw(st.integers(1, 20), "P")
    scores = data.draw(st.lists(SCORES, min_size=2 * prompt, max_size=2 * prompt), "scores")
    pair = Pair(uniform(spec, 1, keep_prompt=False), case, head_dim=32, max_prompt=prompt, steps=2)
    pair.prefill([prompt, data.draw(st.integers(0, prompt), "P1")], scores=torch.tensor(scores).reshape(2, 1, prompt))


@each_backend
@given(data=st.data())
def test_decode_keeps_the_best_of_equal_scores(case: Case, data: st.DataObject) -> None:
    """"Kept sets must be equal across backends given equal scores": scores too large for a step to change."""
    size = data.draw(st.integers(1, 9), "M")
    spec = HeadSpec.heavy(size, data.draw(st.integers(0, size), "recent"), data.draw(RULES, "rule"),
                          pinned=data.draw(PINNED, "pinned"))
    row_buffer = data.draw(st.sampled_from([0, 0, 1, 4]), "R")
    pair = Pair(uniform(spec, 2, row_buffer, data.draw(st.booleans(), "keep_prompt")), case, head_dim=32,
                max_prompt=9, steps=10)
    pair.prefill([data.draw(st.integers(0, 9), "P0"), data.draw(st.integers(0, 9), "P1")])
    pair.run(data.draw(st.integers(0, 8), "steps before"))
    table, inf, nan = pair.cache._layers[0].scores, float("inf"), float("nan")
    for head in range(2):
        for row in range(2):
            slots = pair.cache._kept(pair.cache._layers[0], head, row)
            for position, token in sorted(pair.oracles[0].kept[row][head].items()):
                token.score = data.draw(st.sampled_from([0.0, BIG, BIG, 2 * BIG, 3 * BIG, inf, nan]), "score")
                table[row, pair.cache._layers[0].layout.heads[head].score_offset + slots[position]] = token.score
    pair.run(2)


@each_backend
@BUFFERS
def test_nan_scores_never_win(case: Case, row_buffer: int) -> None:
    """"NaN keys never win": tokens with NaN scores leave first, even those older tokens tie with 0."""
    pair = Pair(CachePlan([[HeadSpec.heavy(4), HeadSpec.heavy(4, recent=1)]], row_buffer, keep_prompt=False), case,
                batch=1, max_prompt=4, steps=8)
    nan = float("nan")
    pair.prefill([4], scores=torch.tensor([[[nan, 1.0, nan, 0.0], [nan, nan, nan, nan]]]))
    pair.run(1)
    if row_buffer < 2:
        assert pair.cache.positions(0, 0)[0].tolist() == [1, 2, 3, 4]
    pair.run(7)
    for head in range(2):
        kept = pair.cache.positions(0, head)[0].tolist()
        assert not {0, 2} & set(kept) and not pair.cache.scores(0, head)[0].isnan().any()


@each_backend
def test_mean_lets_new_tokens_in(case: Case) -> None:
    """`score="mean"`: "so that new tokens are not starved by old ones"; by `sum` the first two would stay."""
    pair = Pair(CachePlan([[HeadSpec.heavy(2, score="sum"), HeadSpec.heavy(2, score="mean")]]), case, batch=1,
                max_prompt=0, steps=12)
    for _ in range(9):
        pair.step(q=torch.zeros(1, 2, 40))
    loud = torch.zeros(1, 2, 40)
    loud[..., 0] = 4.0
    pair.step(q=loud, k=loud)
    assert 9 not in pair.cache.positions(0, 0)[0].tolist()
    assert 9 in pair.cache.positions(0, 1)[0].tolist()


@each_backend
def test_decayed_scores_let_new_tokens_in(case: Case) -> None:
    """`score="decayed"`: tokens that nobody looks at any more lose what they had; by `sum` the first two would stay."""
    pair = Pair(CachePlan([[HeadSpec.heavy(2, score="sum"), HeadSpec.heavy(2, score="decayed")]]), case, batch=1,
                max_prompt=0, steps=130)
    pair.prefill([0])
    for _ in range(50):
        pair.step(q=torch.zeros(1, 2, 40))
    loud = torch.zeros(1, 2, 40)
    loud[..., 0] = 12.0
    for _ in range(80):  # a newcomer gets at least 1 / 2 a step, the first two have had 1 / (3 x 0.04) and get nothing
        pair.step(q=loud, k=loud)
    assert pair.cache.positions(0, 0)[0].tolist() == [0, 1]
    assert min(pair.cache.positions(0, 1)[0].tolist()) >= 50


@each_dtype
def test_decayed_scores_forget_evenly(case: Case, dtype: torch.dtype) -> None:
    """Every step keeps 0.96 of all scores and gives the group size: the whole mass is a geometric sum."""
    group, steps = 4, 30
    pair = Pair(uniform(HeadSpec.heavy(2, score="decayed"), 1, row_buffer=steps + 1), case, group=group, max_prompt=5,
                steps=steps, dtype=dtype)
    pair.prefill([5, 0])
    for step in range(steps):
        pair.step()
        for scores in pair.cache.scores(0, 0):
            assert scores.sum().item() == pytest.approx(group * (1 - 0.96 ** (step + 1)) / 0.04, rel=1e-5)
