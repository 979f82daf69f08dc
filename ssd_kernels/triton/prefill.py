"""Prompts into the slabs; with ``keep_prompt=False`` rule 4 of docs/specification.md is applied to them once."""

from __future__ import annotations

import triton
import triton.language as tl

from .evict import lose, rank_of
from .int8 import store_quantised
from .slots import HEAVY, copy_vectors, head_columns


@triton.jit(do_not_specialize=["prompt_stride", "heads", "slots", "scored_slots", "max_prompt", "num_visual_tokens",
                               "pin_words"])
def prefill_kernel(k, v, given, prompt_lens, rows, keys, values, scores, positions, cursors, table, pinned, key_scales,
                   value_scales, slot_list, prompt_stride, heads, slots, scored_slots, max_prompt, num_visual_tokens,
                   pin_words, INT8: tl.constexpr, KEEP_PROMPT: tl.constexpr, GIVEN: tl.constexpr, D: tl.constexpr,
                   D_PAD: tl.constexpr, PROMPT_BLOCK: tl.constexpr, BLOCK: tl.constexpr):
    """One (entry, head) of a prefill. ``k``, ``v`` [N, H, P, D] and ``given`` scores [N, H, P], contiguous.

    ``slot_list``: int32 [N, H, PROMPT_BLOCK], scratch: the slot of every prompt token, -1 if it is not kept.
    ``key_scales``, ``value_scales``: written if INT8. ``PROMPT_BLOCK``: at least the longest prompt.
    """
    entry = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    kind, offset, capacity, keep, recent, rule, score_offset = head_columns(table, head)
    prompt_len = tl.load(prompt_lens + entry)
    row = tl.load(rows + entry).to(tl.int64)
    item = entry * heads + head

    position = tl.arange(0, PROMPT_BLOCK)
    valid = position < prompt_len
    slot = position
    if not KEEP_PROMPT:
        ring = capacity
        lost = (position < prompt_len - keep) & valid
        if (kind == HEAVY) & (prompt_len > keep):
            if GIVEN:
                score = tl.load(given + item * prompt_stride + position, mask=valid, other=0.0)
            else:
                score = tl.zeros([PROMPT_BLOCK], tl.float32)
            # No token is visual yet, so none is pinned, and no step divides the score.
            rank = rank_of(score, position, prompt_len - 1, prompt_len, 0, recent, rule, pinned + head * pin_words,
                           0, valid)
            lost = lose(rank, valid, prompt_len - keep, PROMPT_BLOCK)
        valid = valid & ~lost
        slot = tl.where(kind == HEAVY, tl.cumsum(valid.to(tl.int32), 0) - 1, position % ring)
    tl.store(slot_list + item * PROMPT_BLOCK + position, tl.where(valid, slot, -1))
    tl.debug_barrier()

    for start in range(0, prompt_len, BLOCK):
        token = start + tl.arange(0, BLOCK)
        target = tl.load(slot_list + item * PROMPT_BLOCK + token, mask=token < prompt_len, other=-1)
        source_at, target_at = item * prompt_stride + token, row * slots + offset + target
        if INT8:
            store_quantised(k, source_at, keys, key_scales, target_at, target >= 0, D, D_PAD)
            store_quantised(v, source_at, values, value_scales, target_at, target >= 0, D, D_PAD)
        else:
            copy_vectors(k, v, source_at, keys, values, target_at, target >= 0, D, D_PAD)
        scored = tl.where(score_offset >= 0, target, -1) >= 0
        scored_at = row * scored_slots + score_offset + target
        if GIVEN:
            first_score = tl.load(given + item * prompt_stride + token, mask=scored, other=0.0)
        else:
            first_score = tl.zeros([BLOCK], tl.float32)
        tl.store(scores + scored_at, first_score, mask=scored)
        tl.store(positions + scored_at, token, mask=scored)
    if head == 0:
        tl.store(cursors + row * 2, prompt_len)
        tl.store(cursors + row * 2 + 1, 0)
