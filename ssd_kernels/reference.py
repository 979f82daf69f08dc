"""The specification in plain torch: docs/specification.md, section 3, one function per rule, one head at a time.

Runs on any device and dtype and works on the same tensors as the compiled backends. It is the oracle they are
tested against, so it is written to be read, not to be fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import cast

import torch

from .heads import DECAY, SCORE_RULES
from .kv_format import decoded, encoded
from .layout import KEEP_ALL, RECENT, LayerLayout, RowView, pinned_tokens
from .state import LayerState, Rotary


def decode(state: LayerState, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float,
           rotary: Rotary | None = None) -> torch.Tensor:
    """One decode step of one layer for every batch row (docs/specification.md, section 3).

    Args:
        state: the layer's cache, changed in place.
        q: ``[B, Hq, D]`` queries.
        k, v: ``[B, H, D]`` key and value of the new token.
        scale: factor on the dot products.
        rotary: q and k are rotated by it first (`rotate`); None: they are rotated already.

    Returns:
        ``[B, Hq, D]`` in q's dtype.

    Raises:
        ValueError: a row has no step left, or k or v holds what 8 bits cannot; nothing is written then.
    """
    layout = state.layout
    cursors, recent = state.cursors.tolist(), state.table[:, RECENT].tolist()
    check_cursors(cursors, layout)
    if state.prompt_of is not None:
        check_prompts(state.prompt_of.tolist(), layout)
    if rotary is not None:
        positions = [prompt_len + step for prompt_len, step in cursors]
        q, k = rotate(q, rotary, positions), rotate(k, rotary, positions)
    check_finite(layout, k, v)
    held = encoded(layout.kv_format, k, v)
    group = q.shape[1] // len(layout.heads)
    out = torch.empty_like(q)
    for row, (prompt_len, step) in enumerate(cursors):
        for head in range(len(layout.heads)):
            view = RowView.of(layout, head, prompt_len, step)
            append(state, row, view, [given[row, head] for given in held])
            queries = slice(head * group, (head + 1) * group)
            out[row, queries], probabilities = attend(state, row, head, view, q[row, queries], scale)
            if view.head.score_offset >= 0:
                add_scores(state, row, view, probabilities)
            if view.head.kind == "heavy" and (step + 1) % view.period == 0:
                evict(state, row, view, recent[head],
                      pinned_tokens(state.pinned[head].tolist(), layout.num_visual_tokens))
    state.cursors[:, 1] += 1
    return out


def rotate(x: torch.Tensor, rotary: Rotary, positions: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) in the halves layout of Llama.

    Elements i and i + D / 2 are a pair, turned by the angle of ``rotary`` at the token's position; computed in
    float32 or wider and rounded once.

    Args:
        x: ``[B, heads, D]``. rotary: cos and sin ``[N, D / 2]``. positions: B positions below N; a long tensor on the
            device of ``x`` spares a copy to it.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if not isinstance(positions, torch.Tensor):
        positions = torch.tensor(positions, dtype=torch.long, device=x.device)
    cos, sin = (table.index_select(0, positions)[:, None].to(wide) for table in rotary)  # [B, 1, D / 2]
    a, b = x.to(wide).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def append(state: LayerState, row: int, view: RowView, held: Sequence[torch.Tensor]) -> None:
    """Rule 1: store the new token in the head's next slot, with score 0. ``held``: of `kv_format.encoded`."""
    slot = view.next_slot
    for slab, given in zip(state.slabs, held, strict=True):
        slab[row, view.origin + slot] = given
    if view.head.score_offset >= 0:
        state.scores[row, view.score_origin + slot] = 0.0
        state.positions[row, view.score_origin + slot] = view.base + view.first + view.step


def attend(state: LayerState, row: int, head: int, view: RowView, q: torch.Tensor,
           scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rule 2: attention of ``q [G, D]`` over the kept set and the new token, accumulated in float32 or wider.

    Returns:
        output ``[G, D]`` in q's dtype, and the probabilities ``[G, C]`` in the order of ``view.slots(appended=1)``.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    keys, values = decoded(stored(state, row, head, view, view.slots(appended=1)), wide)
    probabilities = torch.softmax(scale * (q.to(wide) @ keys.T), dim=-1)
    return (probabilities @ values).to(q.dtype), probabilities


def stored(state: LayerState, row: int, head: int, view: RowView, slots: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """What a head's slots hold, ``[len(slots), ...]`` in their order, from the row's slabs and its prompt's."""
    device = state.keys.device
    own = torch.tensor([slot for slot in slots if slot >= view.apart], dtype=torch.long, device=device) + view.origin
    found = tuple(slab[row, own] for slab in state.slabs)
    if view.apart == 0 or state.prompt_of is None:
        return found
    apart = torch.tensor([slot for slot in slots if slot < view.apart], dtype=torch.long, device=device)
    apart = apart + head * state.layout.max_prompt
    return tuple(torch.cat([slab[state.prompt_of[row], apart], tail])
                 for slab, tail in zip(state.prompt_slabs, found, strict=True))


def add_scores(state: LayerState, row: int, view: RowView, probabilities: torch.Tensor) -> None:
    """Rule 3: every attended slot gains the probability it received ``[G, C]``, summed over the group's query heads.

    Of "decayed" scores the share `DECAY` of what was there is kept.
    """
    slots = torch.tensor(view.slots(appended=1)[view.unscored:], device=state.scores.device) + view.score_origin
    if SCORE_RULES[view.head.rule] == "decayed":
        state.scores[row, slots] *= DECAY
    state.scores[row, slots] += probabilities.sum(0).to(torch.float32)[view.unscored:]


def evict(state: LayerState, row: int, view: RowView, recent: int, pinned: AbstractSet[int]) -> None:
    """Rule 4 for a heavy head: winners from beyond the first M evictable slots overwrite the losers among those.

    ``recent``: protected newest tokens. ``pinned``: the head's pinned visual tokens, by their numbers in the picture.
    """
    head = view.head
    count = view.evictable + 1
    if count <= head.keep:
        return
    evictable = slice(view.score_origin + view.base, view.score_origin + view.base + count)
    positions = state.positions[row, evictable].tolist()
    prompt_len = view.base + view.first
    scores = state.scores[row, evictable]
    keys = eviction_keys(scores, positions, prompt_len, view.step + 1, SCORE_RULES[head.rule])
    kept = survivors(keys, positions, head.keep, recent, {prompt_len + token for token in pinned})
    losers = [index for index in range(head.keep) if index not in kept]
    winners = [index for index in sorted(kept) if index >= head.keep]
    for loser, winner in zip(losers, winners, strict=True):
        for slab, offset in (*((slab, view.origin) for slab in state.slabs),
                             (state.scores, view.score_origin), (state.positions, view.score_origin)):
            slab[row, offset + view.base + loser] = slab[row, offset + view.base + winner]


def eviction_keys(scores: torch.Tensor, positions: Sequence[int], prompt_len: int, steps: int,
                  rule: str) -> list[float]:
    """The key rule 4 sorts by: the score, the score per decode step the token was attended to, or the position.

    Args:
        scores: float32 ``[n]``.
        positions: positions of the same tokens.
        prompt_len: position of visual token 0.
        steps: decode steps taken, the current one included. A visual token has been attended to since its own step,
            a prompt token since the first; before the first step the score stands undivided.
        rule: ``"sum"``, ``"mean"``, ``"position"`` or ``"decayed"``: the last has decayed where scores are added.

    Returns:
        a key per token; positions are ints, and so compare exactly.
    """
    if rule == "position":
        return list(positions)
    if rule in ("sum", "decayed"):
        return cast("list[float]", scores.tolist())
    attended = [max(steps - max(position - prompt_len, 0), 1) for position in positions]
    return cast("list[float]", (scores / torch.tensor(attended, dtype=torch.float32, device=scores.device)).tolist())


def survivors(keys: Sequence[float], positions: Sequence[int], keep: int, recent: int,
              pinned: AbstractSet[int] = frozenset()) -> set[int]:
    """Rule 4: indices of the ``recent`` newest tokens, then of ``pinned`` positions, then of the highest keys, until
    there are ``keep``.

    Of equal keys, and of pinned tokens, the older position is evicted; a NaN key is below every other.
    """
    def rank(index: int) -> tuple[int, float, int]:
        if positions[index] in pinned:
            return 2, 0.0, positions[index]
        if math.isnan(keys[index]):
            return 0, 0.0, positions[index]
        return 1, keys[index], positions[index]

    by_age = sorted(range(len(keys)), key=lambda index: positions[index], reverse=True)
    protected = by_age[:recent]
    contest = sorted(by_age[recent:], reverse=True, key=rank)
    return set(protected + contest[:max(keep - recent, 0)])


def prefill(state: LayerState, k: torch.Tensor, v: torch.Tensor, prompt_lens: Sequence[int],
            scores: torch.Tensor | None, rows: Sequence[int]) -> None:
    """Restart ``rows`` with new prompts; with ``keep_prompt=False`` rule 4 is applied to them once.

    Args:
        state: the layer's cache, changed in place.
        k, v: ``[len(rows), H, P, D]``; of entry i the first ``prompt_lens[i]`` positions are valid.
        prompt_lens: prompt length of each of ``rows``.
        scores: float32 ``[len(rows), H, P]`` to start from, or None for zeros.
        rows: batch rows, each at most once.

    Raises:
        ValueError: k or v holds what 8 bits cannot; nothing is written then.
    """
    layout = state.layout
    for entry, prompt_len in enumerate(prompt_lens):
        check_finite(layout, k[entry, :, :prompt_len], v[entry, :, :prompt_len])
    held = encoded(layout.kv_format, k, v)
    for entry, (row, prompt_len) in enumerate(zip(rows, prompt_lens, strict=True)):
        state.cursors[row, 0] = prompt_len
        state.cursors[row, 1] = 0
        for head in range(len(layout.heads)):
            view = RowView.of(layout, head, prompt_len, 0)
            given = torch.zeros(prompt_len) if scores is None else scores[entry, head, :prompt_len]
            kept = torch.tensor(_prompt_survivors(view, given), dtype=torch.long, device=k.device)
            slots = torch.tensor(view.slots(), dtype=torch.long, device=k.device)
            for slab, given_vectors in zip(state.slabs, held, strict=True):
                slab[row, view.head.offset + slots] = given_vectors[entry, head, kept]
            if view.head.score_offset >= 0:
                scored = view.head.score_offset + slots
                state.scores[row, scored] = given.to(state.scores)[kept]
                state.positions[row, scored] = kept.to(torch.int32)


def _prompt_survivors(view: RowView, scores: torch.Tensor) -> list[int]:
    """Positions of the prompt tokens a head keeps, ascending."""
    everything = list(range(view.base + view.first))
    if view.base or view.head.keep == KEEP_ALL:
        return everything
    if view.head.kind == "window":
        return everything[max(view.first - view.head.keep, 0):]
    keys = eviction_keys(scores, everything, view.first, 0, SCORE_RULES[view.head.rule])
    return sorted(survivors(keys, everything, view.head.keep, view.head.recent))


def check_finite(layout: LayerLayout, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raise ValueError if the layout stores keys and values in 8 bits and one is not finite in float32."""
    for name, tensor in (("k", k), ("v", v)):
        if layout.kv_format == "int8" and not torch.isfinite(given := tensor.to(torch.float32)).all():
            raise ValueError(f"{name} must be finite with kv_format='int8', got "
                             f"{given[~torch.isfinite(given)][0].item()}")


def check_cursors(cursors: Sequence[Sequence[int]], layout: LayerLayout) -> None:
    """Raise ValueError unless every row's cursors are inside the layout and leave room for one more step."""
    for row, (prompt_len, step) in enumerate(cursors):
        if not 0 <= prompt_len <= layout.max_prompt:
            raise ValueError(f"prompt_len of row {row} must be within 0 .. {layout.max_prompt}, got {prompt_len}")
        if not 0 <= step < layout.num_visual_tokens:
            raise ValueError(f"row {row} has taken {step} steps; the cache holds num_visual_tokens = "
                             f"{layout.num_visual_tokens}. Call prefill or reset to start over")


def check_prompts(prompt_of: Sequence[int], layout: LayerLayout) -> None:
    """Raise ValueError unless every row reads one of the shared prompts."""
    for row, prompt in enumerate(prompt_of):
        if not 0 <= prompt < layout.shared_prompts:
            raise ValueError(f"prompt_of of row {row} must be within 0 .. {layout.shared_prompts - 1}, got {prompt}")
