"""What is read and written: "No input may read or write outside the slab", "Eviction moves no data in memory"."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch

from ssd_kernels import CompressedCache
from ssd_kernels.state import LayerState

from .cases import Case, each_backend, each_dtype, each_format, each_storage, mixed
from .pair import POISONED_BYTE, Pair, bits, of_rows

PAD = 4096  # guard elements on both sides of every tensor
INT32 = (-(2**31), -(2**31) + 1, -1000, -1, 2**30, 2**31 - 1)


class Guarded:
    """A cache whose tensors lie between guard regions: NaN, so that reads show too, and compared bit by bit."""

    def __init__(self, cache: CompressedCache) -> None:
        self.guards: list[tuple[torch.Tensor, torch.Tensor]] = []
        for state in cache._layers:
            for name, tensor in list(vars(state).items()):
                if not isinstance(tensor, torch.Tensor) or name == "table":
                    continue
                fill = float("nan") if tensor.is_floating_point() else 0x5A5A5A5A
                if tensor.dtype == torch.int8:
                    fill = POISONED_BYTE
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


@each_storage
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


def _written(state: LayerState, before: Sequence[torch.Tensor]) -> torch.Tensor:
    """Slots ``[B, S]`` of which a key, a value or a scale differs from ``before``, the `bits` of the layer's slabs."""
    changed = [bits(slab) != old for slab, old in zip(state.slabs, before, strict=True)]
    return torch.stack([each.flatten(2).any(-1) if each.dim() > 2 else each for each in changed]).any(0)


@each_format
@pytest.mark.parametrize("row_buffer", [0, 4], ids="R{}".format)
def test_eviction_moves_no_data(case: Case, row_buffer: int) -> None:
    """A step writes the appended slot, and at a refresh one slot for each token that left; nothing else."""
    pair = Pair(mixed(8, row_buffer), case, batch=2, max_prompt=3, steps=20)
    pair.prefill([3, 1])
    state = pair.cache._layers[0]
    for _ in range(20):
        before = [bits(slab).clone() for slab in state.slabs]
        held = [[len(kept) for kept in row] for row in pair.oracles[0].kept]
        pair.step()
        changed = _written(state, before)
        for row, (head, span) in itertools.product(range(2), enumerate(state.layout.heads)):
            left = held[row][head] + 1 - len(pair.oracles[0].kept[row][head])
            written = int(changed[row, span.offset:span.offset + span.capacity].sum())
            assert written <= 1 + (left if span.kind == "heavy" else 0), (row, head, written, left)


@each_format
def test_a_row_writes_only_its_own_slots(case: Case) -> None:
    """Prefill of some rows leaves every byte of the others alone, and every byte beyond the prompt."""
    pair = Pair(mixed(8), case, batch=3, max_prompt=5)
    state = pair.cache._layers[0]
    before, slabs = ([bits(tensor).clone() for tensor in tensors] for tensors in (of_rows(pair.cache), state.slabs))
    pair.prefill([2], rows=[1])
    for old, tensor in zip(before, of_rows(pair.cache), strict=True):
        assert torch.equal(old[[0, 2]], bits(tensor)[[0, 2]])
    written = _written(state, slabs)[1]
    for span in state.layout.heads:
        assert written[span.offset:span.offset + span.capacity].tolist() == [True] * 2 + [False] * (span.capacity - 2)


def _step_with_damage(pair: Pair, guarded: Guarded, row: int) -> None:
    """Decode once: either refused with everything untouched, or the damaged row is left as it is."""
    tensors = of_rows(pair.cache)
    before = [bits(tensor).clone() for tensor in tensors]
    inputs = [pair.draw(pair.batch, pair.heads, pair.head_dim).to(pair.case.device) for _ in range(3)]
    try:
        pair.cache.decode(0, *inputs)
    except ValueError:
        rows = slice(None)
    else:
        rows = slice(row, row + 1)
    for old, tensor in zip(before, tensors, strict=True):
        assert torch.equal(old[rows], bits(tensor)[rows])
    guarded.check()


@each_format
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
