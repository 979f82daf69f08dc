"""docs/specification.md, section 3, sentence by sentence: every backend beside the oracle (`Pair` compares steps)."""

from __future__ import annotations

import math

import pytest
import torch

from ssd_kernels import CachePlan, HeadSpec

from .cases import PART, Case, each_backend, each_dtype, each_format, each_storage, mixed, uniform
from .pair import Pair, bits, of_rows

STEPS = 20
BUFFERS = pytest.mark.parametrize("row_buffer", [0, 1, 3, 4, 6, STEPS, STEPS + 7], ids="R{}".format)
PROMPT = pytest.mark.parametrize("keep_prompt", [True, False], ids=["keep_prompt", "evict_prompt"])


@each_storage
@PROMPT
@pytest.mark.parametrize("row_buffer", [0, 4], ids="R{}".format)
def test_every_kind_of_head(case: Case, dtype: torch.dtype, row_buffer: int, keep_prompt: bool) -> None:
    """All four rules, in every storage type: eight different heads, rows with different prompts (one empty)."""
    pair = Pair(mixed(8, row_buffer, keep_prompt), case, batch=3, max_prompt=9, steps=STEPS, dtype=dtype)
    pair.prefill([4, 0, 9])
    pair.run(STEPS)


@each_format
@PROMPT
@BUFFERS
def test_row_buffer(case: Case, row_buffer: int, keep_prompt: bool) -> None:
    """"R > 0: keep everything since the last refresh, refresh when (t + 1) % R == 0"; also R past the end."""
    pair = Pair(mixed(8, row_buffer, keep_prompt), case, batch=2, max_prompt=5, steps=STEPS)
    pair.prefill([5, 2])
    pair.run(STEPS)


@each_backend
@PROMPT
@pytest.mark.parametrize("row_buffer", [0, 3], ids="R{}".format)
@pytest.mark.parametrize("spec", [HeadSpec.window(0), HeadSpec.window(1), HeadSpec.heavy(1),
                                  HeadSpec.heavy(1, recent=1), HeadSpec.heavy(4, recent=4),
                                  HeadSpec.heavy(1, score="mean"), HeadSpec.heavy(5, recent=2, score="mean"),
                                  HeadSpec.heavy(1, score="position"), HeadSpec.heavy(4, 1, "position"),
                                  HeadSpec.heavy(1, score="decayed"), HeadSpec.heavy(4, 1, "decayed"),
                                  HeadSpec.heavy(1, pinned=[3]), HeadSpec.heavy(4, recent=4, pinned=[0, 5]),
                                  HeadSpec.heavy(2, 1, "mean", pinned=range(30))],
                         ids=["W0", "W1", "M1", "M1-recent1", "M4-recent4", "M1-mean", "M5-recent2-mean", "M1-position",
                              "M4-recent1-position", "M1-decayed", "M4-recent1-decayed", "M1-pinned",
                              "M4-recent4-pinned", "M2-recent1-all-pinned"])
def test_smallest_sizes(case: Case, spec: HeadSpec, row_buffer: int, keep_prompt: bool) -> None:
    """"W = 1; M = recent" (and W = 0, M = 1), by the step and by the row."""
    pair = Pair(uniform(spec, 2, row_buffer, keep_prompt), case, max_prompt=6, steps=14)
    pair.prefill([6, 3])
    pair.run(14)


@each_format
@PROMPT
@pytest.mark.parametrize(("keep", "row_buffer"), [(13, 6), (17, 16), (31, 2), (33, 0), (61, 5)],
                         ids=["M13-R6", "M17-R16", "M31-R2", "M33-R0", "M61-R5"])
def test_sizes_off_block_boundaries(case: Case, keep: int, row_buffer: int, keep_prompt: bool) -> None:
    """"M + R not a multiple of any block size": sums just beside 16, 32 and 64, and evictions on both sides."""
    margin = range(0, 72, 6)
    plan = CachePlan([[HeadSpec.heavy(keep), HeadSpec.window(keep), HeadSpec.heavy(keep, recent=5, score="mean"),
                       HeadSpec.heavy(keep, pinned=margin), HeadSpec.heavy(keep, 5, "position", pinned=margin)]],
                     row_buffer=row_buffer, keep_prompt=keep_prompt)
    pair = Pair(plan, case, batch=1, max_prompt=3, steps=72)
    pair.prefill([3])
    pair.run(72)


@each_dtype
@PROMPT
@pytest.mark.parametrize("row_buffer", [0, 6], ids="R{}".format)
def test_all_full_is_dense_causal_attention(case: Case, dtype: torch.dtype, row_buffer: int,
                                            keep_prompt: bool) -> None:
    """"with every head `full` the result equals ordinary dense causal attention, token for token"."""
    prompt, dim, group = 7, 40, 2
    pair = Pair(uniform(HeadSpec.full(), 2, row_buffer, keep_prompt), case, group=group, head_dim=dim,
                max_prompt=prompt, steps=STEPS, dtype=dtype)
    q, k, v = pair.draw(2, 2 * group, prompt + STEPS, dim), *pair.draw(2, 2, 2, prompt + STEPS, dim)
    keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
    dense, native = (
        torch.softmax((qs @ ks.mT / math.sqrt(dim)).masked_fill(
            torch.ones(prompt + STEPS, prompt + STEPS).tril() == 0, -math.inf), -1) @ vs
        for qs, ks, vs in ((q.double(), keys.double(), values.double()), (q, keys, values)))
    pair.cache.prefill(0, k[:, :, :prompt].to(case.device), v[:, :, :prompt].to(case.device), [prompt, prompt])
    for t in range(prompt, prompt + STEPS):
        out = pair.cache.decode(0, *(x[:, :, t].contiguous().to(case.device) for x in (q, k, v))).cpu()
        pair.compare_outputs(0, out, dense[:, :, t], native[:, :, t].double())


@each_format
@PROMPT
@pytest.mark.parametrize("row_buffer", [0, 5, STEPS + 1], ids="R{}".format)
@pytest.mark.parametrize("extra", [0, 1, 10**6])
def test_large_enough_heads_equal_full(case: Case, extra: int, row_buffer: int, keep_prompt: bool) -> None:
    """"a plan whose W and M are >= 576 equals `full`" (here >= the evictable tokens of the sequence)."""
    prompt = 4
    size = STEPS + (0 if keep_prompt else prompt) + extra
    plan = CachePlan([[HeadSpec.full(), HeadSpec.window(size), HeadSpec.heavy(size),
                       HeadSpec.heavy(size, recent=3, score="mean")]], row_buffer=row_buffer, keep_prompt=keep_prompt)
    pair = Pair(plan, case, batch=1, max_prompt=prompt, steps=STEPS)
    k, v = pair.draw(1, 1, prompt, 40).expand(1, 4, -1, -1), pair.draw(1, 1, prompt, 40).expand(1, 4, -1, -1)
    pair.cache.prefill(0, k.to(case.device), v.to(case.device), [prompt])
    for _ in range(STEPS):
        q, k, v = (pair.draw(1, 1, 40).repeat(1, 4, 1).to(case.device) for _ in range(3))
        out = pair.cache.decode(0, q, k, v)
        for head in (1, 2, 3):
            torch.testing.assert_close(out[:, head], out[:, 0], rtol=0, atol=1e-6)
    for head in range(4):
        assert pair.cache.positions(0, head)[0].tolist() == list(range(prompt + STEPS))


@each_dtype
def test_mass_is_conserved(case: Case, dtype: torch.dtype) -> None:
    """"the sum of all scores ever given to a `heavy` head equals steps x group size", nothing being evicted yet."""
    group = 4
    plan = CachePlan([[HeadSpec.heavy(2), HeadSpec.heavy(1, score="mean")]], row_buffer=STEPS + 1)
    pair = Pair(plan, case, group=group, steps=STEPS, dtype=dtype)
    pair.prefill([5, 0])
    for step in range(STEPS):
        pair.step()
        for head in range(2):
            for scores in pair.cache.scores(0, head):
                assert scores.sum().item() == pytest.approx((step + 1) * group, rel=1e-5)


@each_format
@PROMPT
@pytest.mark.parametrize("row_buffer", [0, 4], ids="R{}".format)
def test_mass_is_conserved_through_evictions(case: Case, row_buffer: int, keep_prompt: bool) -> None:
    """"mass is conserved, evictions included": what is kept plus what the oracle saw leave."""
    group = 2
    plan = CachePlan([[HeadSpec.heavy(3), HeadSpec.heavy(4, recent=2, score="mean"),
                       HeadSpec.heavy(3, score="position"), HeadSpec.heavy(3, pinned=(2, 9))]],
                     row_buffer=row_buffer, keep_prompt=keep_prompt)
    pair = Pair(plan, case, group=group, steps=STEPS)
    pair.prefill([5, 1])
    pair.run(STEPS)
    for head in range(4):
        for row, scores in enumerate(pair.cache.scores(0, head)):
            forgotten = pair.oracles[0].forgotten[row, head].item()
            assert forgotten > 0.5
            assert scores.sum().item() + forgotten == pytest.approx(STEPS * group, rel=1e-5)


@each_backend
def test_evicted_score_is_forgotten(case: Case) -> None:
    """"The evicted slot's score is forgotten": M = recent = 3 and q = 0 give 1/4 a step for 3 steps."""
    pair = Pair(uniform(HeadSpec.heavy(3, recent=3), 2), case, max_prompt=0, steps=STEPS)
    for _ in range(STEPS):
        pair.step(q=torch.zeros(2, 2, 40))
    for scores in pair.cache.scores(0, 0):
        assert scores.tolist() == [0.75, 0.5, 0.25]


@each_format
@pytest.mark.parametrize("row_buffer", [0, 4], ids="R{}".format)
def test_track_scores_gives_every_head_scores(case: Case, row_buffer: int) -> None:
    """Rule 3: "and any head when a caller asks for scores"; the other results stay as they are."""
    asked = Pair(mixed(8, row_buffer), case, steps=STEPS, track_scores=True, group=2)
    plain = Pair(mixed(8, row_buffer), case, steps=STEPS, group=2)
    for pair in (asked, plain):
        pair.prefill([5, 3])
    torch.testing.assert_close(asked.run(STEPS), plain.run(STEPS), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="track_scores"):
        plain.cache.scores(0, 1)


@each_format
@pytest.mark.parametrize("scale", [0.0, 0.05, 1.0, -0.3], ids="scale{}".format)
def test_scale_argument(case: Case, scale: float) -> None:
    """Rule 2: "scale = 1/sqrt(head_dim) unless given"."""
    pair = Pair(mixed(4), case, steps=10, scale=scale)
    pair.prefill([5, 3])
    pair.run(10)


def _channel_zero(keys: torch.Tensor, where: slice, value: float) -> torch.Tensor:
    """Keys ``[B, H, P, D]`` whose first channel is 0, but ``value`` in tokens ``where``, and there nothing else."""
    keys[..., 0] = 0
    keys[:, :, where] = 0
    keys[:, :, where, 0] = value
    return keys


@each_backend
@pytest.mark.parametrize("group", [1, 2], ids="G{}".format)
@pytest.mark.parametrize(("where", "new"), [(slice(PART, 2 * PART), False), (slice(2 * PART, None), False),
                                            (slice(PART), True)], ids=["a-part", "the-last", "the-first-and-new"])
def test_logits_of_minus_infinity(case: Case, where: slice, new: bool, group: int) -> None:
    """Rule 2: such tokens have probability 0, also if they are all that one part of a split head has."""
    length, dim = 2 * PART + 1, 32
    plan = CachePlan([[HeadSpec.full(), HeadSpec.heavy(length)]], keep_prompt=False)
    pair = Pair(plan, case, batch=1, group=group, head_dim=dim, max_prompt=length, steps=2, track_scores=True)
    pair.prefill([length], k=_channel_zero(pair.draw(1, 2, length, dim), where, -math.inf))
    for _ in range(2):
        q = pair.draw(1, 2 * group, dim)
        q[..., 0] = 1
        pair.step(q=q, k=_channel_zero(pair.draw(1, 2, 1, dim), slice(int(new)), -math.inf)[:, :, 0])


@each_backend
@pytest.mark.parametrize("group", [1, 2], ids="G{}".format)
@pytest.mark.parametrize("length", [3, 2 * PART + 1], ids="P{}".format)
@pytest.mark.parametrize(("value", "where"), [(-math.inf, slice(None)), (math.nan, slice(1, 2)),
                                              (math.nan, slice(-1, None))],
                         ids=["all-minus-infinity", "nan-early", "nan-late"])
def test_no_softmax_gives_nan(case: Case, value: float, where: slice, length: int, group: int) -> None:
    """Where torch's softmax is NaN, outputs and scores are too: nothing is made up, and other heads do not notice."""
    dim = 32
    plan = CachePlan([[HeadSpec.full(), HeadSpec.full()]])
    pair = Pair(plan, case, batch=1, group=group, head_dim=dim, max_prompt=length, steps=2, track_scores=True)
    k, v = pair.draw(2, 1, 2, length, dim)
    k[:, 1:] = _channel_zero(k[:, 1:], where, value)
    pair.cache.prefill(0, k.to(case.device), v.to(case.device), [length])
    q, new = torch.ones(1, 2 * group, dim), pair.draw(1, 2, dim)
    if value == -math.inf:
        new[:, 1] = k[:, 1, 0]
    out = pair.cache.decode(0, *(x.to(case.device) for x in (q, new, v[:, :, 0])))
    assert out[:, :group].isfinite().all() and out[:, group:].isnan().all()
    assert pair.cache.scores(0, 0)[0].isfinite().all() and pair.cache.scores(0, 1)[0].isnan().all()


@each_format
def test_no_prompt_and_no_prefill(case: Case) -> None:
    """A cache may be decoded straight away: every row starts with an empty prompt."""
    pair = Pair(mixed(8, 3), case, max_prompt=0, steps=12)
    pair.run(12)


@each_format
@PROMPT
def test_prompts_longer_than_what_heads_keep(case: Case, keep_prompt: bool) -> None:
    """"with `keep_prompt=False` rule 4 is applied to it once, at the end of prefill": P far above W and M."""
    pair = Pair(mixed(8, 3, keep_prompt), case, batch=4, max_prompt=33, steps=12)
    pair.prefill([33, 8, 1, 0])
    pair.run(12)


@each_format
@PROMPT
def test_prefill_scores(case: Case, keep_prompt: bool) -> None:
    """"Prefill stores the prompt with scores 0 (or the given `scores` [B, Hkv, P])"; P may exceed the lengths."""
    pair = Pair(mixed(8, 0, keep_prompt), case, batch=3, max_prompt=16, steps=12)
    pair.prefill([12, 16, 5], scores=torch.rand(3, 8, 16, generator=pair.random))
    pair.run(12)


@each_format
def test_layers_are_independent(case: Case) -> None:
    """Every layer follows its own head specs and keeps its own tokens."""
    pair = Pair(mixed(4, 3, num_layers=3), case, steps=12)
    pair.prefill([5, 2])
    pair.run(12)


@each_format
@PROMPT
@pytest.mark.parametrize("row_buffer", [0, 4], ids="R{}".format)
def test_rows_restart_midway(case: Case, row_buffer: int, keep_prompt: bool) -> None:
    """"only these rows restart with a new prompt, the others go on undisturbed": rows at different steps."""
    pair = Pair(mixed(8, row_buffer, keep_prompt), case, batch=4, max_prompt=9, steps=STEPS)
    pair.prefill([4, 0, 9, 2])
    pair.run(6)
    pair.prefill([9, 3], rows=[3, 1])
    pair.run(5)
    pair.prefill([7], rows=torch.tensor([0]))
    pair.reset([2])
    pair.run(9)


@each_format
@pytest.mark.parametrize("how", ["prefill", "reset"])
def test_other_rows_do_not_notice_a_restart(case: Case, how: str) -> None:
    """The other rows' outputs, slots and scores are bitwise those of a cache in which nothing restarted."""
    random = torch.Generator().manual_seed(1)
    inputs = [torch.randn(3, 3, 8, 40, generator=random) for _ in range(14)]
    pairs, outs = [], []
    for restarts in (False, True):
        pair = Pair(mixed(8, 3), case, batch=3, max_prompt=5, steps=STEPS)
        pair.prefill([4, 5, 1])
        for step, qkv in enumerate(inputs):
            if restarts and step == 7:
                pair.prefill([2], rows=[1]) if how == "prefill" else pair.reset([1])
            out = pair.step(*qkv)
        pairs.append(pair)
        outs.append(out)
    for row in (0, 2):
        assert torch.equal(outs[0][:, row], outs[1][:, row])
        for one, other in zip(*(of_rows(pair.cache) for pair in pairs), strict=True):
            assert torch.equal(bits(one[row]), bits(other[row]))
    assert not torch.equal(outs[0][:, 1], outs[1][:, 1])


@each_backend
def test_reset_empties_rows(case: Case) -> None:
    """`reset(rows)` leaves the rows as if nothing had been prefilled; `reset()` all of them."""
    pair = Pair(mixed(8, 3), case, batch=3, steps=STEPS)
    pair.prefill([4, 5, 1])
    pair.run(7)
    pair.reset([0, 2])
    assert [len(kept) for kept in pair.cache.positions(0, 2)] == [0, 12, 0]
    pair.run(5)
    pair.reset()
    assert all(len(kept) == 0 for head in range(8) for kept in pair.cache.positions(0, head))
    pair.run(9)


@each_storage
def test_whole_picture_twice(case: Case, dtype: torch.dtype) -> None:
    """A second picture in the same cache, after all steps of the first, sees nothing of it."""
    pair = Pair(mixed(4, 4), case, steps=9, dtype=dtype)
    for lengths in ([5, 2], [1, 5]):
        pair.prefill(lengths)
        pair.run(9)
        with pytest.raises(ValueError, match="num_visual_tokens"):
            pair.cache.decode(0, *(torch.zeros(2, 4, 40, dtype=dtype, device=case.device),) * 3)
