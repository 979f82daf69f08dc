"""What is read and written: "No input may read or write outside the slab", "Eviction moves no data in memory"."""

from __future__ import annotations

import itertools

import pytest
import torch

from ssd_kernels import CompressedCache

from .cases import Case, each_backend, each_dtype, mixed
from .pair import Pair, bits

PAD = 4096  # guard elements on both sides of every tensor
INT32 = (-(2**31), -(2**31) + 1, -1000, -1, 2**30, 2**31 - 1)


class Guarded:
    """A cache whose tensors lie between guard regions: NaN, so that reads show too, and compared bit by bit."""

    def __init__(self, cache: CompressedCache) -> None:
        self.guards: list[tuple[torch.Tensor, torch.Tensor]] = []
        for state in cache._layers:
            shared = ("prompt_keys", "prompt_values", "prompt_of") if state.shared else ()
            for name in ("keys", "values", "scores", "positions", "cursors", "pinned", *shared):
                tensor = getattr(state, name)
                fill = float("nan") if tensor.is_floating_point() else 0x5A5A5A5A
                whole = torch.full((tensor.numel() + 2 * PAD,), fill, dtype=tensor.dtype, device=tensor.device)
                inside = whole[PAD:-PAD].view(tensor.shape)
                inside.copy_(tensor)
                setattr(state, name, inside)
                self.guards.append((whole, whole.clone()))
            state.native = None  # what a backend remembers of the tensors' addresses

    def check(self) -> None:
        """No guard element has changed."""
        for whole, before in self.guards:
            assert torch.equal(bits(whole[:PAD]), bits(before[:PAD])), "written before the tensor"
            assert torch.equal(bits(whole[-PAD:]), bits(before[-PAD:])), "written behind the tensor"


@each_dtype
@pytest.mark.parametrize("keep_prompt", [True, False], ids=["keep_prompt", "evict_prompt"])
@pytest.mark.parametrize("row_buffer", [0, 4], ids="R{}".format)
def test_guards_stay_whole(case: Case, dtype: torch.dtype, row_buffer: int, keep_prompt: bool) -> None:
    """Nothing outside the tensors is written, and what is read there (NaN) does not reach any result."""
    pair = Pair(mixed(8, row_buffer, keep_prompt), case, batch=3, max_prompt=9, steps=12, dtype=dtype, group=2)
    guarded = Guarded(pair.cache)
    pair.prefill([9, 0, 4])
    pair.run(6)
    pair.prefill([9], rows=[2])
    pair.run(6)
    guarded.check()


@each_backend
@pytest.mark.parametrize("row_buffer", [0, 4], ids="R{}".format)
def test_eviction_moves_no_data(case: Case, row_buffer: int) -> None:
    """A step writes the appended slot, and at a refresh one slot for each token that left; nothing else."""
    pair = Pair(mixed(8, row_buffer), case, batch=2, max_prompt=3, steps=20)
    pair.prefill([3, 1])
    state = pair.cache._layers[0]
    for _ in range(20):
        before, held = bits(state.keys).clone(), [[len(kept) for kept in row] for row in pair.oracles[0].kept]
        pair.step()
        changed = (bits(state.keys) != before).any(-1)
        for row, (head, span) in itertools.product(range(2), enumerate(state.layout.heads)):
            left = held[row][head] + 1 - len(pair.oracles[0].kept[row][head])
            written = int(changed[row, span.offset:span.offset + span.capacity].sum())
            assert written <= 1 + (left if span.kind == "heavy" else 0), (row, head, written, left)


@each_backend
def test_a_row_writes_only_its_own_slots(case: Case) -> None:
    """Prefill of some rows leaves every byte of the others alone, and every byte beyond the prompt."""
    pair = Pair(mixed(8), case, batch=3, max_prompt=5)
    state = pair.cache._layers[0]
    before = [bits(tensor).clone() for tensor in state.tensors]
    pair.prefill([2], rows=[1])
    for old, tensor in zip(before, state.tensors[:5], strict=False):
        assert torch.equal(old[[0, 2]], bits(tensor)[[0, 2]])
    written = (bits(state.keys) != before[0]).any(-1)[1]
    for span in state.layout.heads:
        assert written[span.offset:span.offset + span.capacity].tolist() == [True] * 2 + [False] * (span.capacity - 2)


def _step_with_damage(pair: Pair, guarded: Guarded, row: int) -> None:
    """Decode once: either refused with everything untouched, or the damaged row is left as it is."""
    tensors = pair.cache._layers[0].tensors
    before = [bits(tensor).clone() for tensor in tensors]
    inputs = [pair.draw(pair.batch, pair.heads, pair.head_dim).to(pair.case.device) for _ in range(3)]
    try:
        pair.cache.decode(0, *inputs)
    except ValueError:
        rows = slice(None)
    else:
        rows = slice(row, row + 1)
    for old, tensor in zip(before[:5], tensors, strict=False):
        assert torch.equal(old[rows], bits(tensor)[rows])
    guarded.check()


@each_backend
@pytest.mark.parametrize("keep_prompt", [True, False], ids=["keep_prompt", "evict_prompt"])
@pytest.mark.parametrize("cursor", ["prompt_len", "step"])
def test_damaged_cursors(case: Case, cursor: str, keep_prompt: bool) -> None:
    """Cursors off by one, huge or negative: a ValueError or an untouched row, never an access outside the slab."""
    column = ["prompt_len", "step"].index(cursor)
    pair = Pair(mixed(8, 3, keep_prompt), case, batch=3, max_prompt=5, steps=12)
    pair.prefill([5, 2, 0])
    pair.run(4)
    guarded = Guarded(pair.cache)
    cursors = pair.cache._layers[0].cursors
    whole = cursors[1, column].item()
    for bad in (*INT32, [5, 11][column] + 1):
        cursors[1, column] = bad
        _step_with_damage(pair, guarded, 1)
    cursors[1, column] = whole
    pair.cache.reset()


@each_backend
@pytest.mark.parametrize("what", ["positions", "scores", "both"])
def test_damaged_scores_and_positions(case: Case, what: str) -> None:
    """Positions and scores decide who is evicted, never where anything is written: junk there stays inside."""
    pair = Pair(mixed(8, 3, keep_prompt=False), case, batch=2, max_prompt=5, steps=12)
    pair.prefill([5, 2])
    guarded = Guarded(pair.cache)
    state = pair.cache._layers[0]
    for step in range(12):
        if what != "scores":
            junk = torch.tensor(INT32, dtype=torch.int32)[torch.randint(6, state.positions.shape)]
            state.positions.copy_(junk.roll(step))
        if what != "positions":
            junk = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, -0.0, 1.0])
            state.scores.copy_(junk[torch.randint(6, state.scores.shape)])
        pair.cache.decode(0, *(pair.draw(2, 8, 40).to(case.device) for _ in range(3)))
        guarded.check()
    assert state.cursors.tolist() == [[5, 12], [2, 12]]


@each_dtype
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf")], ids=["nan", "inf", "-inf"])
def test_junk_input_stays_in_its_row_and_head(case: Case, dtype: torch.dtype, junk: float, name: str) -> None:
    """NaN and infinity in q, k, v: no crash, nothing outside, other rows and heads bitwise as ever, restart heals."""
    clean, dirty = (Pair(mixed(8, 3), case, batch=2, max_prompt=3, steps=10, dtype=dtype) for _ in range(2))
    guarded = Guarded(dirty.cache)
    for pair in (clean, dirty):
        pair.prefill([3, 1])
    others = [(row, head) for row in range(2) for head in range(8) if (row, head) != (1, 3)]
    random = torch.Generator().manual_seed(1)
    for step in range(7):
        inputs = {key: torch.randn(2, 8, 40, generator=random).to(dtype) for key in "qkv"}
        expected = clean.step(**inputs)[0]
        if step == 2:
            inputs[name][1, 3, ::3] = junk
        out = dirty.cache.decode(0, *(inputs[key].to(case.device) for key in "qkv")).cpu()
        for row, head in others:
            assert torch.equal(out[row, head], expected[row, head])
        for head in range(8):
            for row, (one, other) in enumerate(zip(clean.cache.positions(0, head), dirty.cache.positions(0, head),
                                                   strict=True)):
                assert len(other) == len(one) and other.unique().numel() == len(other)
                assert torch.equal(one, other) or (row, head) == (1, 3)
    guarded.check()
    dirty.reset()
    dirty.prefill([3, 1])
    dirty.run(3)
