"""Rule 4's fixed priorities: `pinned` tokens above all others, and `score="position"`, decided by hand."""

from __future__ import annotations

import pytest
import torch

from ssd_kernels import CachePlan, CompressedCache, HeadSpec

from .cases import Case, each_backend, each_format, uniform
from .pair import Pair

BUFFERS = pytest.mark.parametrize("row_buffer", [0, 1, 4], ids="R{}".format)
PROMPT = pytest.mark.parametrize("keep_prompt", [True, False], ids=["keep_prompt", "evict_prompt"])
NAN, INF = float("nan"), float("inf")


def _kept(pair: Pair, head: int = 0, row: int = 0) -> list[int]:
    return pair.cache.positions(0, head)[row].tolist()


def _set_scores(pair: Pair, scores: dict[int, float]) -> None:
    """Give kept positions of row 0 and head 0 these running sums, in the cache and in its oracle."""
    state = pair.cache._layers[0]
    slots = pair.cache._kept(state, 0, 0)
    for position, score in scores.items():
        state.scores[0, state.layout.heads[0].score_offset + slots[position]] = score
        pair.oracles[0].kept[0][0][position].score = score


@each_format
@BUFFERS
@pytest.mark.parametrize("score", ["sum", "mean", "position", "decayed"])
def test_pinned_tokens_stay_whatever_their_score(case: Case, score: str, row_buffer: int) -> None:
    """"rank above all tokens that are not pinned": nobody looks at tokens 1 and 2, and they stay."""
    pair = Pair(uniform(HeadSpec.heavy(4, 0, score, pinned=[1, 2]), 1, row_buffer), case, batch=1, max_prompt=0,
                steps=16, scale=1.0)
    q, quiet, loud = torch.zeros(3, 1, 1, 40)
    q[..., 0], quiet[..., 0], loud[..., 0] = 10.0, -10.0, 10.0
    for t in range(16):
        pair.step(q=q, k=quiet if t in (1, 2) else loud)
    assert {1, 2} < set(_kept(pair)) and len(_kept(pair)) == 4
    if score == "position":
        assert _kept(pair) == [1, 2, 14, 15]


@each_backend
@BUFFERS
@pytest.mark.parametrize(("recent", "expected"), [(0, [5, 6, 7]), (1, [6, 7, 19]), (2, [7, 18, 19]), (3, [17, 18, 19])])
def test_more_pinned_tokens_than_slots(case: Case, recent: int, expected: list[int], row_buffer: int) -> None:
    """"the `recent` newest, then pinned tokens"; among those "ties: the older position is evicted"."""
    pair = Pair(uniform(HeadSpec.heavy(3, recent, pinned=[0, 2, 5, 6, 7]), 1, row_buffer), case, batch=1,
                max_prompt=0, steps=20)
    pair.run(20)
    assert _kept(pair) == expected


@each_backend
@PROMPT
def test_prompt_tokens_are_never_pinned(case: Case, keep_prompt: bool) -> None:
    """"`pinned` counts visual tokens": 0 is the first token of the picture, wherever a row's prompt ends."""
    pair = Pair(uniform(HeadSpec.heavy(2, 1, pinned=[0]), 1, keep_prompt=keep_prompt), case, max_prompt=4, steps=9)
    pair.prefill([4, 1], scores=torch.full((2, 1, 4), 1e30))
    pair.run(9)
    for row, prompt in enumerate((4, 1)):
        assert _kept(pair, row=row) == [*(range(prompt) if keep_prompt else ()), prompt, prompt + 8]
    pair.prefill([2], rows=[0], scores=torch.full((1, 1, 4), 1e30))
    pair.reset([1])
    pair.run(9)
    assert _kept(pair, row=0) == [*(range(2) if keep_prompt else ()), 2, 10] and _kept(pair, row=1) == [0, 8]


@each_backend
@BUFFERS
def test_pinned_keys_are_no_scores(case: Case, row_buffer: int) -> None:
    """"a pinned token with NaN score is still pinned", an infinite score of another does not reach it, and among
    pinned tokens scores decide nothing.
    """
    pair = Pair(uniform(HeadSpec.heavy(3, pinned=[0, 1, 6, 7]), 1, row_buffer), case, batch=1, max_prompt=0, steps=8)
    pair.run(3)
    _set_scores(pair, {0: NAN, 1: -INF, 2: INF})
    pair.run(2)
    if row_buffer < 2:
        assert _kept(pair) == [0, 1, 2]  # the best of the others is the infinite one
        _set_scores(pair, {0: INF, 1: NAN})
    pair.run(3)
    assert _kept(pair) == [1, 6, 7]


@each_backend
@pytest.mark.parametrize("steps", [31, 32, 33, 64, 65, 70])
def test_every_bit_of_the_mask(case: Case, steps: int) -> None:
    """One pinned token a head, beside the borders of the mask's words and beyond the picture; bits of one head are
    not those of another.
    """
    pinned = sorted({t for word in (0, 32, 64) for t in (word - 2, word - 1, word, word + 1)
                     if t >= 0} | {steps - 1, steps, 95, 96, 10**12})
    plan = CachePlan([[HeadSpec.heavy(2, 1, "position", pinned=[t]) for t in pinned]])
    pair = Pair(plan, case, batch=1, head_dim=32, max_prompt=3, steps=steps)
    pair.prefill([2])
    pair.run(steps)
    for head, t in enumerate(pinned):
        other = t if t < steps - 1 else steps - 2
        assert _kept(pair, head) == [0, 1, 2 + other, 2 + steps - 1]


@each_backend
@BUFFERS
@PROMPT
def test_position_is_a_window_with_scores(case: Case, keep_prompt: bool, row_buffer: int) -> None:
    """`score="position"`: newest wins, scores NaN or infinite included; they are summed but do not decide."""
    plan = CachePlan([[HeadSpec.window(4), HeadSpec.heavy(4, score="position"), HeadSpec.heavy(4, 2, "position")]],
                     row_buffer, keep_prompt)
    pair = Pair(plan, case, batch=1, max_prompt=7, steps=14, track_scores=True)
    pair.prefill([7], scores=torch.tensor([INF, 5.0, NAN, 3.0, NAN, 1.0, 0.0]).expand(1, 3, 7),
                 k=pair.draw(1, 1, 7, 40).expand(1, 3, 7, 40))
    for _ in range(14):
        q, k, v = (pair.draw(1, 1, 40).expand(1, 3, 40) for _ in range(3))
        pair.step(q=q, k=k, v=v)
        for head in (1, 2):
            assert _kept(pair, head) == _kept(pair, 0)
            torch.testing.assert_close(pair.cache.scores(0, head)[0], pair.cache.scores(0, 0)[0], equal_nan=True)


@each_backend
def test_positions_up_to_the_largest_int32(case: Case) -> None:
    """Positions are compared as integers: neighbours far above 2**24, which float32 cannot tell apart.

    A head that evicts its prompt needs few slots for a prompt of any length, so the cursors can be put there by hand.
    """
    steps, keep, row_buffer = 40, 3, 4
    start = 2**31 - 1 - steps
    plan = CachePlan([[HeadSpec.heavy(keep, score="position"), HeadSpec.heavy(keep, 0, "position", pinned=[0, 33]),
                       HeadSpec.heavy(keep, 1, "mean", pinned=[39, 2, 5, 64])]], row_buffer, keep_prompt=False)
    cache = CompressedCache(plan, batch_size=1, num_query_heads=3, head_dim=32, max_prompt=start,
                            num_visual_tokens=steps, device=case.device, backend=case.name)
    state = cache._layers[0]
    state.cursors[0, 0] = start
    for span in state.layout.heads:
        held = torch.tensor([start - 2, start - 1, start - 3], dtype=torch.int32)
        state.positions[0, span.score_offset:span.score_offset + keep] = held
    for _ in range(steps):
        cache.decode(0, *(torch.randn(1, 3, 32).to(case.device) for _ in range(3)))
    kept = [(cache.positions(0, head)[0] - start).tolist() for head in range(3)]
    assert kept[0] == [37, 38, 39] and kept[1] == [0, 33, 39] and kept[2] == [2, 5, 39]


def test_the_mask_is_counted_and_small() -> None:
    """One bit per head and visual token, in int32 words, whatever the batch: part of `nbytes`."""
    sizes = {"batch_size": 3, "head_dim": 32, "max_prompt": 2}
    for specs in ([HeadSpec.heavy(4)] * 5, [HeadSpec.heavy(4, pinned=range(40))] * 5):
        cache = CompressedCache(CachePlan([specs]), num_query_heads=5, num_visual_tokens=33, backend="reference",
                                **sizes)
        mask = cache._layers[0].pinned
        assert mask.shape == (5, 2) and mask.dtype == torch.int32 and mask.nbytes == 40
        assert cache.nbytes == CachePlan([specs]).nbytes(num_visual_tokens=33, dtype=torch.float32, **sizes)
    assert mask.tolist() == [[-1, 1]] * 5  # token 33 and later are not there
