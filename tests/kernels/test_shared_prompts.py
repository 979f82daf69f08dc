"""docs/specification.md, section 3.12: rows that share prompts give what rows with copies of their own give."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from ssd_kernels import CachePlan, CompressedCache, HeadSpec, ops

from .cases import BF16, F32, PART, Case, each_backend, each_format, each_format_of, each_storage, mixed, uniform
from .pair import Pair, assert_untouched, bits, poison, snapshot
from .test_memory import INT32, Guarded

B, H, D, P, N = 4, 8, 40, 9, 16
STEPS = 14


@each_storage
@pytest.mark.parametrize(("row_buffer", "track_scores"), [(0, True), (4, False)], ids=["R0-track_scores", "R4-plain"])
def test_kinds_of_heads_behind_shared_prompts(case: Case, dtype: torch.dtype, row_buffer: int,
                                              track_scores: bool) -> None:
    """All rules over shared prompts, one of them empty, while single rows restart with others."""
    pair = Pair(mixed(H, row_buffer), case, batch=B, group=2, max_prompt=P, steps=STEPS, dtype=dtype, shared_prompts=3,
                track_scores=track_scores)
    pair.prefill([4, 9], share=[0, 1, 1, 0])
    pair.run(6)
    pair.prefill([7], rows=[2], share=[0])
    pair.run(3)
    pair.prefill([0, 2], rows=[3, 0, 1], share=[1, 0, 1])
    pair.run(5)


@each_format
def test_large_heads(case: Case) -> None:
    """Windows and sets that wrap around and refresh, behind a prompt of its own for each row: nothing is shared."""
    plan = CachePlan([[HeadSpec.window(13), HeadSpec.heavy(17, recent=3), HeadSpec.full()]], row_buffer=6)
    pair = Pair(plan, case, max_prompt=21, steps=40, shared_prompts=2)
    pair.prefill([21, 3])
    pair.run(40)


def _inputs(random: torch.Generator, case: Case, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=random).to(dtype).to(case.device)


def _both(plan: CachePlan, case: Case, dtype: torch.dtype, group: int, head_dim: int, longest: int, steps: int,
          shared_prompts: int, track_scores: bool = False) -> tuple[CompressedCache, CompressedCache]:
    """A cache whose rows share prompts, and one whose rows have copies; slots are poisoned."""
    plan = case.stored(plan)
    caches = [CompressedCache(plan, B, plan.num_heads * group, head_dim, longest, steps, dtype, case.device, case.name,
                              track_scores, count) for count in (shared_prompts, None)]
    for cache in caches:
        poison(cache)
    return caches[0], caches[1]


def _assert_equal_bits(shared: CompressedCache, copies: CompressedCache, prompts: Sequence[int]) -> None:
    """Kept sets, scores of visual tokens and contents."""
    for head in range(shared.plan.num_heads):
        for one, other in zip(shared.positions(0, head), copies.positions(0, head), strict=True):
            assert torch.equal(one, other)
        if shared._layers[0].layout.heads[head].score_offset >= 0:
            for one, other, length in zip(shared.scores(0, head), copies.scores(0, head), prompts, strict=True):
                first = 0 if shared._layers[0].layout.prompt_scores else length
                assert torch.equal(bits(one[first:]), bits(other[first:])) and not one[first:].isnan().any()


@each_storage
@pytest.mark.parametrize(("group", "head_dim", "row_buffer", "rotary"), [
    (1, 40, 0, True), (2, 72, 4, False), (1, 128, 4, True), (3, 64, 0, True), (1, 64, 4, False), (1, 104, 0, False)],
    ids=["G1-D40-R0-rotary", "G2-D72-R4", "G1-D128-R4-rotary", "G3-D64-R0-rotary", "G1-D64-R4", "G1-D104-R0"])
def test_bits_are_those_of_copies(case: Case, dtype: torch.dtype, group: int, head_dim: int, row_buffer: int,
                                  rotary: bool) -> None:
    """"Results are bitwise those of separate copies": prompts that end everywhere in a block, rows that restart."""
    lengths, heads = ([13, 6, 0, 11], [9, 16, 1, 3]), H if group == 1 else 4
    plan = mixed(heads, row_buffer)
    shared, copies = _both(plan, case, dtype, group, head_dim, 16, STEPS, 3)
    random = torch.Generator().manual_seed(row_buffer)
    angles = torch.rand(16 + STEPS, head_dim // 2, generator=random)
    tables = (angles.cos().to(case.device), angles.sin().to(case.device)) if rotary else None
    held = [0] * B
    for rows, share, some in (([0, 1, 2, 3], [0, 1, 0, 2], lengths[0][:3]), ([3], [0], lengths[1][:1]),
                              ([0, 1], [1, 1], lengths[1][1:3])):
        k, v = _inputs(random, case, dtype, 2, len(some), heads, 16, head_dim)
        shared.prefill(0, k, v, some, rows=rows, share=share)
        copies.prefill(0, k[share], v[share], [some[entry] for entry in share], rows=rows)
        for row, entry in zip(rows, share, strict=True):
            held[row] = some[entry]
        for _ in range(4):
            q = _inputs(random, case, dtype, B, heads * group, head_dim)
            new_k, new_v = _inputs(random, case, dtype, 2, B, heads, head_dim)
            outs = [cache.decode(0, q, new_k, new_v, rotary=tables) for cache in (shared, copies)]
            assert torch.equal(outs[0], outs[1]) and outs[0].isfinite().all()
            _assert_equal_bits(shared, copies, held)


@each_format
@pytest.mark.parametrize("group", [1, 2], ids="G{}".format)
@pytest.mark.parametrize("length", [PART - 1, PART, 2 * PART + 1], ids="P{}".format)
def test_prompts_longer_than_a_block(case: Case, length: int, group: int) -> None:
    """Long heads may be split, within a prompt and behind it; tracked scores are those of copies, the prompt's too."""
    plan = CachePlan([[HeadSpec.full(), HeadSpec.heavy(3), HeadSpec.window(2)]], row_buffer=2)
    shared, copies = _both(plan, case, BF16, group, 32, length, 6, 2, track_scores=True)
    random = torch.Generator().manual_seed(length)
    k, v = _inputs(random, case, BF16, 2, 2, 3, length, 32)
    given = torch.rand(2, 3, length, generator=random).to(case.device)
    share = [1, 0, 1, 1]
    shared.prefill(0, k, v, [3, length], given, share=share)
    copies.prefill(0, k, v, [3, length], given, share=share)  # which makes copies, as it must
    for _ in range(5):
        q = _inputs(random, case, BF16, B, 3 * group, 32)
        new_k, new_v = _inputs(random, case, BF16, 2, B, 3, 32)
        assert torch.equal(shared.decode(0, q, new_k, new_v), copies.decode(0, q, new_k, new_v))
        _assert_equal_bits(shared, copies, [length, 3, length, length])


def _cache(case: Case, plan: CachePlan | None = None, shared_prompts: int | None = 2, **changes: Any
           ) -> CompressedCache:
    return CompressedCache(case.stored(plan or mixed(H, 3, num_layers=2)), B, H, D, P, N, device=case.device,
                           backend=case.name, shared_prompts=shared_prompts, **changes)


def _ones(case: Case, *shape: int) -> torch.Tensor:
    return torch.ones(shape, device=case.device)


def _start(cache: CompressedCache, case: Case, rows: Sequence[int] | None, share: Sequence[int] | None,
           layer: int = 0) -> None:
    count = len(set(share)) if share is not None else B if rows is None else len(rows)
    cache.prefill(layer, *[_ones(case, count, H, P, D)] * 2, [P] * count, rows=rows, share=share)


@each_backend
def test_rows_let_go_of_their_prompts(case: Case) -> None:
    """Who restarts or is reset holds a prompt no longer; the last to do so makes room, in every layer for itself."""
    cache = _cache(case)

    def refused(rows: list[int], share: list[int], room: int) -> None:
        before = snapshot(cache)
        with pytest.raises(ValueError, match=f"share must name at most {room} different prompts.*shared_prompts = 2 and"
                                             f" other rows hold {2 - room} of them, got {len(set(share))}"):
            _start(cache, case, rows, share)
        assert_untouched(cache, before)

    for layer in range(2):
        _start(cache, case, None, [0, 1, 1, 0], layer)
    refused([0], [0], 0)  # row 3 has the old one still
    refused([1, 3], [0, 1], 0)
    _start(cache, case, [0, 3], [0, 0])
    refused([0, 3], [0, 1], 1)
    cache.reset([1, 2])
    for layer in range(2):
        _start(cache, case, [0], [0], layer)
    refused([1], [0], 0)
    refused([0, 1, 2, 3], [0, 1, 1, 2], 2)
    _start(cache, case, None, [1, 0, 1, 0])


@each_format
def test_a_restart_leaves_other_rows_their_prompt(case: Case) -> None:
    """A prompt that another row still reads is not overwritten, whatever restarts in what order."""
    pair = Pair(mixed(H, 3), case, batch=B, max_prompt=P, steps=30, shared_prompts=4)
    pair.prefill([5, 8, 2], share=[2, 1, 0, 1])
    for lengths, rows, share in (([9], [1], [0]), ([3], [0], [0]), ([4], [2, 0], [0, 0]), ([7, 1], [3, 2], [1, 0]),
                                 ([6], [0, 1, 3], [0, 0, 0])):
        pair.run(2)
        pair.prefill(lengths, rows=rows, share=share)
    pair.run(3)


@each_backend
def test_rows_without_share_have_a_prompt_each(case: Case) -> None:
    """`share=None`: "each its own"; a prompt that nobody takes is not stored and takes no room."""
    pair = Pair(mixed(H), case, batch=3, max_prompt=5, shared_prompts=3)
    pair.prefill([4, 0, 5])
    pair.run(3)
    pair.prefill([1, 2, 3, 4], rows=[1, 0], share=[3, 3])
    pair.run(3)
    pair.prefill([], rows=[], share=[])
    pair.reset([0])
    pair.run(2)


Call = Callable[[CompressedCache, Case], object]


def _prefill(share: Any, count: int = 2, rows: Any = None, **more: Any) -> Call:
    def call(cache: CompressedCache, case: Case) -> object:
        given = {"k": _ones(case, count, H, P, D), "v": _ones(case, count, H, P, D), "prompt_lens": [1] * count}
        return cache.prefill(0, **{**given, **more}, rows=rows, share=share)
    return call


BAD_CALLS: dict[str, tuple[Call, type[Exception], str]] = {
    "high": (_prefill([0, 1, 2, 0]), ValueError, r"share\[2\] must be within 0 .. 1.*got 2"),
    "negative": (_prefill([0, 1, 0, -1]), ValueError, r"share\[3\].*-1"),
    "count": (_prefill([0, 1, 0]), ValueError, "share must hold a number for each of the 4 rows, got 3"),
    "count-of-rows": (_prefill([0, 1, 0, 0], rows=[0, 1]), ValueError, "share.*2 rows, got 4"),
    "float": (_prefill([0, 1.0, 0, 0]), TypeError, r"share\[1\].*1.0"),
    "bools": (_prefill(torch.tensor([True] * 4)), TypeError, "share must hold integers.*bool"),
    "2d": (_prefill(torch.zeros(4, 1, dtype=torch.long)), ValueError, "share must be 1-D"),
    "number": (_prefill(0), TypeError, "share"),
    "string": (_prefill("0000"), TypeError, "share"),
    "none-given": (_prefill([0] * 4, count=0), ValueError, r"share\[0\].*got 0"),
    "too-many": (_prefill([0, 1, 2, 2], count=3), ValueError, "share must name at most 2 different prompts.*got 3"),
    "lengths": (_prefill([0, 1, 0, 1], prompt_lens=[1] * 4), ValueError, "prompt_lens must hold 2 lengths, got 4"),
    "k-dims": (_prefill([0] * 4, k=torch.ones(H, P, D)), ValueError, "k must be .N, H, P, D"),
    "k-scalar": (_prefill([0] * 4, k=torch.ones(())), ValueError, "k must be .N, H, P, D"),
    "v-count": (_prefill([0] * 4, v=torch.ones(3, H, P, D)), ValueError, "v must be .N, H, P, D"),
    "scores": (_prefill([0] * 4, scores=torch.ones(2, H, P)), ValueError, "scores must be None.*track_scores"),
    "without-share": (_prefill(None, count=4), ValueError, "share must name at most 2.*got 4"),
}


@each_backend
@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_refused_untouched(case: Case, name: str) -> None:
    """By name, and nothing is written; nobody has lost a prompt."""
    call, error, message = BAD_CALLS[name]
    cache = _cache(case)
    _start(cache, case, None, [0, 1, 1, 0])
    before = snapshot(cache)
    with pytest.raises(error, match=message):
        call(cache, case)
    assert_untouched(cache, before)
    with pytest.raises(ValueError, match="other rows hold 2"):
        _start(cache, case, [1], [0])


def test_caches_that_cannot_share() -> None:
    """Prompts that rows may evict are not shared, and numbers are numbers."""
    evicting, sizes = mixed(H, keep_prompt=False), {"batch_size": B, "head_dim": D, "max_prompt": P, "dtype": F32}
    for count, error, message in ((0, ValueError, "at least 1, got 0"), (2**31, ValueError, "at most 2147483647"),
                                  (True, TypeError, "an int"), ("2", TypeError, "an int")):
        with pytest.raises(error, match=f"shared_prompts must be {message}"):
            _cache(Case("reference"), shared_prompts=count)
    with pytest.raises(ValueError, match="shared_prompts must be None with keep_prompt=False"):
        _cache(Case("reference"), evicting)
    with pytest.raises(ValueError, match="shared_prompts must be None with keep_prompt=False"):
        evicting.nbytes(**sizes, shared_prompts=2)
    cache = _cache(Case("reference"), evicting, None)
    with pytest.raises(ValueError, match="share must be None with keep_prompt=False"):
        _start(cache, Case("reference"), None, [0, 0, 0, 0])


@each_format
@pytest.mark.parametrize("track_scores", [False, True])
def test_prompts_take_their_memory_once(case: Case, track_scores: bool) -> None:
    """`nbytes` is what is allocated, and what a formula says: each different prompt once per layer."""
    plan = case.stored(mixed(H, 3, num_layers=3))
    cache = _cache(case, plan, track_scores=track_scores)
    copies = _cache(case, plan, None, track_scores=track_scores)
    unscored = 0 if track_scores else sum(spec.kind == "heavy" for heads in plan.layers for spec in heads)
    vector = 4 * D if case.kv_format == "auto" else D + 4
    saved = (B - 2) * H * P * 2 * vector * 3 + B * unscored * P * 8 - 4 * B * 3
    assert cache.nbytes == copies.nbytes - saved
    if not track_scores:
        assert cache.nbytes == plan.nbytes(batch_size=B, head_dim=D, max_prompt=P, dtype=F32, num_visual_tokens=N,
                                           shared_prompts=2)


def test_eight_samples_of_a_long_prompt() -> None:
    """Janus-Pro-1B at 20%, guided: 16 rows of 512 prompt tokens hold two prompts."""
    plan = CachePlan.uniform(HeadSpec.heavy(90), 24, 16, row_buffer=24)
    sizes = {"batch_size": 16, "head_dim": 128, "max_prompt": 512, "dtype": BF16}
    assert plan.budget() == pytest.approx(0.2, abs=0.003)
    token, heads = 2 * 128 * 2, 24 * 16
    visual = 16 * heads * (90 + 24) * (token + 8)
    bookkeeping = 16 * 24 * (8 + 4) + heads * 4 * (8 + 18)
    assert plan.nbytes(**sizes, shared_prompts=2) == visual + 2 * heads * 512 * token + bookkeeping
    assert plan.nbytes(**sizes) / plan.nbytes(**sizes, shared_prompts=2) > 3.4


@each_format
@pytest.mark.parametrize("row_buffer", [0, 4], ids="R{}".format)
def test_guards_stay_whole(case: Case, row_buffer: int) -> None:
    """Nothing outside the tensors is written, and what lies there does not reach any result."""
    pair = Pair(mixed(H, row_buffer), case, batch=3, max_prompt=P, steps=12, group=2, shared_prompts=2)
    guarded = Guarded(pair.cache)
    pair.prefill([9, 4], share=[1, 0, 1])
    pair.run(6)
    pair.prefill([9], rows=[1], share=[0])
    pair.run(6)
    guarded.check()


@each_backend
def test_damaged_prompt_numbers(case: Case) -> None:
    """A row that reads none of the prompts: refused with everything untouched, or left as it is."""
    pair = Pair(mixed(H, 3), case, batch=3, max_prompt=5, steps=12, shared_prompts=2)
    pair.prefill([5, 2], share=[0, 1, 1])
    pair.run(2)
    guarded = Guarded(pair.cache)
    state = pair.cache._layers[0]
    whole = state.prompt_of[1].item()
    for bad in (*INT32, 2):
        state.prompt_of[1] = bad
        before = [bits(tensor).clone() for tensor in state.tensors]
        inputs = [pair.draw(3, H, D).to(case.device) for _ in range(3)]
        try:
            pair.cache.decode(0, *inputs)
        except ValueError as error:
            rows = slice(None)
            assert "prompt_of of row 1 must be within 0 .. 1" in str(error)
        else:
            rows = slice(1, 2)
            state.cursors[::2, 1] = 2  # the others' next step is the same again
        for old, tensor in zip(before[:5], state.tensors, strict=False):
            assert torch.equal(old[rows], bits(tensor)[rows])
        guarded.check()
    state.prompt_of[1] = whole


@each_format
def test_a_row_does_not_depend_on_who_shares(case: Case) -> None:
    """A row's bits are the same alone and among others, whoever reads the same prompt."""
    random = torch.Generator().manual_seed(2)
    k, v = _inputs(random, case, F32, 2, 3, H, P, D)
    inputs = [_inputs(random, case, F32, 3, B, H, D) for _ in range(8)]
    outs = []
    for rows, share, count in (([0, 1, 2, 3], [0, 1, 1, 2], 3), ([2], [1], 1), ([2, 0, 1], [1, 1, 1], 2)):
        cache = CompressedCache(case.stored(mixed(H, 3)), len(rows), H, D, P, N, device=case.device, backend=case.name,
                                shared_prompts=count)
        cache.prefill(0, k, v, [P, 6, 0], share=share)
        at = rows.index(2)
        outs.append(torch.stack([cache.decode(0, *step[:, rows])[at] for step in inputs]))
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@each_format
@pytest.mark.parametrize("engine", ["eager", "aot_eager"])
def test_compiled_decode(case: Case, engine: str) -> None:
    """`torch.compile(fullgraph=True)`, which goes through the operator, gives the same bits."""
    torch._dynamo.reset()
    caches = [_cache(case), _cache(case)]
    random = torch.Generator().manual_seed(3)
    k, v = _inputs(random, case, F32, 2, 2, H, P, D)
    for cache in caches:
        cache.prefill(0, k, v, [P, 3], share=[0, 0, 1, 0])
    fast = torch.compile(lambda q, k, v: caches[1].decode(0, q, k, v), backend=engine, fullgraph=True)
    for _ in range(6):
        q, new_k, new_v = _inputs(random, case, F32, 3, B, H, D)
        assert torch.equal(caches[0].decode(0, q, new_k, new_v), fast(q, new_k, new_v))
    for one, other in zip(*map(snapshot, caches), strict=True):
        assert torch.equal(one, other)


def _operator(cache: CompressedCache, case: Case, shared: Sequence[Any]) -> torch.Tensor:
    """`torch.ops.ssd_kernels.decode` of ones with these arguments of shared prompts."""
    state = cache._layers[0]
    out: torch.Tensor = torch.ops.ssd_kernels.decode(
        *[_ones(case, B, H, D)] * 3, *state.tensors, *ops.layout_arguments(state.layout), 1.0, case.name, None, None,
        *shared)
    return out


@each_format
def test_opcheck(case: Case) -> None:
    """Mutation annotations and fakes hold for the operator's last arguments too."""
    state = _cache(case)._layers[0]
    arguments = (*[_ones(case, B, H, D)] * 3, *state.tensors, *ops.layout_arguments(state.layout), 1.0, case.name, None,
                 None, *ops.shared_arguments(state))
    checks = torch.library.opcheck(torch.ops.ssd_kernels.decode.default, arguments, ops.scale_arguments(state))
    assert set(checks.values()) == {"SUCCESS"}


Change = Callable[[Any], Any]
BAD_SHARED: dict[str, tuple[int, Change, str]] = {
    "keys-none": (0, lambda x: None, "prompt_keys must be given"),
    "values-none": (1, lambda x: None, "prompt_values must be given"),
    "of-none": (2, lambda x: None, "prompt_of must be given"),
    "keys-2d": (0, lambda x: x[0], "prompt_keys must be contiguous"),
    "keys-empty": (0, lambda x: x[:0], "prompt_keys must be contiguous .*'N'"),
    "keys-short": (0, lambda x: x[:, 1:].contiguous(), "prompt_keys must be contiguous"),
    "keys-dtype": (0, lambda x: x.half(), "prompt_keys must be contiguous"),
    "values-count": (1, lambda x: x[:1], "prompt_values must be contiguous"),
    "values-strided": (1, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), "prompt_values must be contiguous"),
    "of-rows": (2, lambda x: x[1:], "prompt_of must be contiguous"),
    "of-dtype": (2, lambda x: x.long(), "prompt_of must be contiguous"),
    "scores": (3, lambda x: True, "table row"),
}


@each_backend
@pytest.mark.parametrize("name", BAD_SHARED)
def test_operators_refuse_what_does_not_fit(case: Case, name: str) -> None:
    """By name, before anything is written; also a layer with room for its own prompts, and one without."""
    place, change, message = BAD_SHARED[name]
    cache = _cache(case, uniform(HeadSpec.heavy(3), H))
    shared = [*ops.shared_arguments(cache._layers[0])]
    before = snapshot(cache)
    shared[place] = change(shared[place])
    for given, words in ((shared, message), ([], "table row")):
        with pytest.raises(ValueError, match=words):
            _operator(cache, case, given)
        assert_untouched(cache, before)


@each_format_of("cpu", "reference")
def test_copies_go_their_own_way(case: Case) -> None:
    """A copy of a cache knows who holds which prompt, and writes to its own."""
    cache = _cache(case)
    _start(cache, case, None, [0, 1, 1, 0])
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        before = snapshot(cache)
        with pytest.raises(ValueError, match="other rows hold 2"):
            _start(other, case, [0], [0])
        other.prefill(0, *[2 * _ones(case, 1, H, P, D)] * 2, [P], share=[0, 0, 0, 0])
        assert_untouched(cache, before)
    with pytest.raises(ValueError, match="other rows hold 2"):
        _start(cache, case, [0], [0])


@each_format_of("cpu", "reference")
def test_results_carry_no_gradient(case: Case) -> None:
    """Whatever is given."""
    cache = _cache(case)
    given = torch.ones(1, H, P, D, requires_grad=True)
    cache.prefill(0, 2 * given, 3 * given, [P], share=[0] * B)
    assert not any(tensor.requires_grad for tensor in cache._layers[0].everything)
