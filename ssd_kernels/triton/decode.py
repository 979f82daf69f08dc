"""The fused decode step (docs/specification.md, section 3): append, attention, scores and eviction in one launch.

One program serves one (batch row, KV head), so scores and the choice of victims never leave it. Heads start in the
order of the head table's last column, longest first, so that the launch does not end with one long head on its own.

Heads are not split over programs. The reasons are estimates, not measured on a GPU, for Janus-Pro in bfloat16: a block
of 32 slots takes each of two warps 420 to 460 instructions, one in two to three clocks at 1.7 GHz, while copies of the
next blocks are under way.

* The longest possible head holds a picture and its prompt, about 640 slots: 10 to 16 us. At a budget of 20% a head
  holds some 200 slots, prompt and row buffer included: 3 to 6 us. Only full heads with few rows, and so fewer programs
  than multiprocessors, would gain: four parts bring 10 to 16 us down to some 4. With many rows the bytes of all heads
  decide, and long heads start first.
* Where the operator is called with a table on the device, the host does not know how long heads are. It would launch
  every head in as many parts as the longest possible one. With 256 rows x 16 heads, 12,288 of 16,384 programs would
  only find out that there is nothing to do: at 1 us each and 5 at a time on each of 132 multiprocessors about 20 us,
  beside 60 us of reading.
* Parts leave a maximum, a sum and a vector each, and are counted where there must be 0 before: one more tensor in every
  cache and operator, or a second launch that clears it.

A row's cursor moves when its last program is done. Until then the programs that are done are counted in the high bits
of the cursor itself (`ARRIVALS`), so one launch needs neither a second one nor a counter that somebody has to clear.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..heads import DECAY
from .attend import attend_lanes, attend_matrices, combined, product
from .evict import DECAYED, first_to_lose, lose, rank_of
from .int8 import magnitude, quantised
from .slots import COLUMNS, HEAVY, copy_vectors, head_columns, slot_of

ARRIVALS = 20  # cursor bits below are the step, those above count programs; both limits are checked on the host
STEP_MASK = tl.constexpr((1 << ARRIVALS) - 1)
ONE_ARRIVAL = tl.constexpr(1 << ARRIVALS)
ARRIVAL_SHIFT = tl.constexpr(ARRIVALS)

KEPT_SHARE = tl.constexpr(DECAY)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def turns(cos, sin, position, placed, dim, D: tl.constexpr):
    """Rotary embedding in the halves layout: the other element of each pair [D_PAD], and the factors of both.

    ``placed``: whether there is such a position.
    """
    HALF: tl.constexpr = D // 2
    first = dim < HALF
    pair = tl.where(first, dim, dim - HALF)
    at = position.to(tl.int64) * HALF + pair
    mask = (dim < D) & placed
    turn = tl.load(cos + at, mask=mask, other=0.0)
    swing = tl.load(sin + at, mask=mask, other=0.0)
    return tl.where(first, dim + HALF, dim - HALF), turn, tl.where(first, -swing, swing)


# Compiled once for all batches, pictures and strides.
NUMBERS = ["q_row", "q_head", "k_row", "k_head", "v_row", "v_head", "batch", "heads", "slots", "scored_slots",
           "max_prompt", "num_visual_tokens", "pin_words", "period", "shared_prompts"]


@triton.jit(do_not_specialize=NUMBERS)
def decode_kernel(q, k, v, keys, values, scores, positions, cursors, table, pinned, out, logits, lists, cos, sin,
                  prompt_keys, prompt_values, prompt_of, key_scales, value_scales, prompt_key_scales,
                  prompt_value_scales, q_row, q_head, k_row, k_head, v_row, v_head, batch, heads,
                  slots, scored_slots, max_prompt, num_visual_tokens, pin_words, period, shared_prompts, scale,
                  INT8: tl.constexpr, KEEP_PROMPT: tl.constexpr, SHARED: tl.constexpr, PROMPT_SCORES: tl.constexpr,
                  EVERY_STEP: tl.constexpr, SCORED: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
                  GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, MATRICES: tl.constexpr, BLOCK: tl.constexpr,
                  ROTARY: tl.constexpr, SCORE_BLOCK: tl.constexpr, EVICT_BLOCK: tl.constexpr,
                  COPY_BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """One (batch row, head) of one decode step. Tensors as in `ssd_kernels.state.LayerState`.

    ``q`` [B, Hq, D], ``k`` and ``v`` [B, H, D] with the given strides, ``out`` [B, Hq, D] contiguous.
    ``logits``: float32 [B, GROUP, T], scratch; ``lists``: the same memory as int32.
    ``cos``, ``sin``: float32 [N, D / 2], read if ROTARY.
    ``prompt_keys``, ``prompt_values``, ``prompt_of``, ``shared_prompts``: of prompts that rows share, read if SHARED.
    ``key_scales`` and those after: of keys and values in 8 bits, read and written if INT8.
    ``period``: max(R, 1). ``scale``: of the dot products.
    ``BLOCK``: warps if MATRICES, else slots read at once: the parts of `attend_matrices` and `attend_lanes`.
    ``EVICT_BLOCK``: at least the evictable tokens of any heavy head.
    """
    program = tl.program_id(0)
    row = (program % batch).to(tl.int64)
    cursors += row * 2
    prompt_len = tl.load(cursors)
    cursor = tl.load(cursors + 1, volatile=True)  # other programs count in it meanwhile
    head = tl.minimum(tl.maximum(tl.load(table + (program // batch) * COLUMNS + 7), 0), heads - 1)
    step, arrived = cursor & STEP_MASK, cursor >> ARRIVAL_SHIFT
    position = prompt_len + step
    # Neither cursors nor table can be checked on the host without waiting for the device.
    fine = (prompt_len >= 0) & (prompt_len <= max_prompt) & (arrived >= 0) & (arrived < heads)
    fine &= step < num_visual_tokens
    if SHARED:
        prompt = tl.load(prompt_of + row)
        fine &= (prompt >= 0) & (prompt < shared_prompts)

    # All that is known by its head alone is loaded together, before anything waits for the head's row of the table.
    kind, offset, capacity, keep, recent, rule, score_offset = head_columns(table, head)
    dim, member = tl.arange(0, D_PAD), tl.arange(0, GROUP_PAD)
    in_group = member < GROUP
    in_dim = dim < D
    out += (row * heads + head) * GROUP * D
    out_at = out + member[:, None] * D + dim[None, :]  # [GROUP_PAD, D_PAD]
    out_mask = in_group[:, None] & in_dim[None, :]
    key_at = k + row * k_row + head * k_head
    query_at = q + row * q_row + (head * GROUP + member)[:, None] * q_head
    new_key = tl.load(key_at + dim, mask=in_dim, other=0.0)
    new_value = tl.load(v + row * v_row + head * v_head + dim, mask=in_dim, other=0.0)
    queries = tl.load(query_at + dim[None, :], mask=out_mask, other=0.0)  # [GROUP_PAD, D_PAD]
    if ROTARY:
        partner, turn, swing = turns(cos, sin, position, fine, dim, D)
        other_key = tl.load(key_at + partner, mask=in_dim, other=0.0)
        other_queries = tl.load(query_at + partner[None, :], mask=out_mask, other=0.0)

    # Slot arithmetic: layout.RowView.
    if KEEP_PROMPT:
        base, first, ring = prompt_len, 0, capacity - max_prompt
    else:
        base, first, ring = 0, prompt_len, capacity
    apart, unscored, slab_slots, score_slots = 0, 0, capacity, capacity
    if SHARED:
        apart, slab_slots = base, ring
        if not PROMPT_SCORES:
            unscored, score_slots = base, ring
    block_start = step // period * period
    evictable = tl.minimum(keep, first + block_start) + step - block_start
    fine &= (keep >= 0) & (offset >= 0) & (slab_slots <= slots - offset) & (evictable < ring)
    fine &= (score_offset >= -1) & ((score_offset < 0) | (score_offset <= scored_slots - score_slots))
    if not fine:
        tl.store(out_at, tl.zeros([GROUP_PAD, D_PAD], out.dtype.element_ty), mask=out_mask)
        return

    total = base + evictable  # kept so far, the prompt included
    is_heavy = kind == HEAVY
    begin = tl.where(is_heavy, 0, (first + step - evictable) % ring)
    wrapped = tl.maximum(begin + evictable - ring, 0)  # evictable tokens that lie before the free slots
    cut, skip = base + wrapped, tl.where(wrapped > 0, ring - evictable, begin)
    new_slot = base + tl.where(is_heavy, evictable, (first + step) % ring)

    slab_at = row * slots + offset - apart
    keys += slab_at * D
    values += slab_at * D
    if INT8:
        key_scales += slab_at
        value_scales += slab_at
    scored_at = row * scored_slots + score_offset - unscored
    logits += row * GROUP * scored_slots + score_offset - unscored
    if SHARED:
        prompt_at = (prompt.to(tl.int64) * heads + head) * max_prompt
        prompt_keys += prompt_at * D
        prompt_values += prompt_at * D
        if INT8:
            prompt_key_scales += prompt_at
            prompt_value_scales += prompt_at

    # Attend. The new token is taken from registers: nothing of this step is read back from memory.
    if ROTARY:
        turned = queries.to(tl.float32) * turn[None, :] + other_queries.to(tl.float32) * swing[None, :]
        queries = turned.to(queries.dtype)
        new_key = (new_key.to(tl.float32) * turn + other_key.to(tl.float32) * swing).to(new_key.dtype)
    to_log2 = scale * LOG2E
    keep_scores = score_offset >= 0
    scored_total = tl.where(keep_scores, total, 0)
    if MATRICES:
        highest, norm, acc = attend_matrices(queries, keys, values, prompt_keys, prompt_values, key_scales,
                                             value_scales, prompt_key_scales, prompt_value_scales, apart, logits, total,
                                             cut, skip, unscored, scored_total, to_log2, scored_slots, D, D_PAD, GROUP,
                                             GROUP_PAD, BLOCK, STAGES, SCORED, SHARED, INT8)
    else:
        highest, norm, acc = attend_lanes(queries, keys, values, prompt_keys, prompt_values, key_scales, value_scales,
                                          prompt_key_scales, prompt_value_scales, apart, logits, total, cut, skip,
                                          unscored, scored_total, to_log2, scored_slots, D, D_PAD, GROUP, GROUP_PAD,
                                          BLOCK, STAGES, SCORED, SHARED, INT8)
    if INT8:
        new_key, new_key_scale = quantised(new_key, tl.max(magnitude(new_key), 0))
        new_value, new_value_scale = quantised(new_value, tl.max(magnitude(new_value), 0))
        tl.store(key_scales + new_slot, new_key_scale)
        tl.store(value_scales + new_slot, new_value_scale)
    tl.store(keys + new_slot * D + dim, new_key, mask=in_dim)
    tl.store(values + new_slot * D + dim, new_value, mask=in_dim)
    seen_key, seen_value = new_key.to(tl.float32), new_value.to(tl.float32)
    new_logit = tl.sum(product(queries.to(tl.float32), seen_key[None, :]), 1)  # [GROUP_PAD]
    if INT8:
        new_logit *= new_key_scale
        seen_value *= new_value_scale
    new_logit *= to_log2
    highest, norm, acc = combined(highest, norm, acc, new_logit, seen_value)
    # Of queries that only pad the group: not NaN, whatever keys hold.
    highest, new_logit = tl.where(in_group, highest, 0.0), tl.where(in_group, new_logit, 0.0)
    tl.store(out_at, acc / norm[:, None], mask=out_mask)

    if SCORED:
        if keep_scores:
            score_at = scores + scored_at
            position_at = positions + scored_at
            tl.debug_barrier()  # logits were written by other threads of this program
            share = tl.where(in_group, 1.0 / norm, 0.0)
            kept_share = tl.where(rule == DECAYED, KEPT_SHARE, 1.0)
            for start in range(unscored, total, SCORE_BLOCK):
                index = start + tl.arange(0, SCORE_BLOCK)
                live = index < total
                slot = slot_of(index, cut, skip)
                given = tl.zeros([SCORE_BLOCK], tl.float32)
                for one in tl.static_range(GROUP):
                    logit = tl.load(logits + one * scored_slots + slot, mask=live, other=-float("inf"))
                    top = tl.sum(tl.where(member == one, highest, 0.0), 0)
                    given += tl.exp2(logit - top) * tl.sum(tl.where(member == one, share, 0.0), 0)
                known = tl.load(score_at + slot, mask=live, other=0.0)
                tl.store(score_at + slot, known * kept_share + given, mask=live)
            tl.store(score_at + new_slot, tl.sum(product(tl.exp2(new_logit - highest), share), 0))
            tl.store(position_at + new_slot, position)

            losers = evictable + 1 - keep
            if is_heavy & ((step + 1) % period == 0) & (losers > 0):
                tl.debug_barrier()  # scores were
                index = tl.arange(0, EVICT_BLOCK)
                valid = index <= evictable
                at = base + index
                held = tl.load(position_at + at, mask=valid, other=0)
                score = tl.load(score_at + at, mask=valid, other=0.0)
                rank = rank_of(score, held, position, prompt_len, step + 1, recent, rule, pinned + head * pin_words,
                               num_visual_tokens, valid)
                tl.debug_barrier()  # before scores and positions of losers are overwritten
                if EVERY_STEP:
                    # One token leaves. If it is not the new one, the new one takes its slot.
                    loser = base + first_to_lose(rank, valid, EVICT_BLOCK)
                    if loser < new_slot:
                        tl.store(keys + loser * D + dim, new_key, mask=in_dim)
                        tl.store(values + loser * D + dim, new_value, mask=in_dim)
                        if INT8:
                            tl.store(key_scales + loser, new_key_scale)
                            tl.store(value_scales + loser, new_value_scale)
                        tl.store(score_at + loser, tl.load(score_at + new_slot))
                        tl.store(position_at + loser, position)
                else:
                    # The losers among the first ``keep`` slots are listed where the logits were, and after them the
                    # winners beyond, which are as many.
                    moving = valid & (lose(rank, valid, losers, EVICT_BLOCK) == (index < keep))
                    number = tl.cumsum(moving.to(tl.int32), 0)
                    moves = tl.sum(moving.to(tl.int32), 0) // 2  # 2 x moves <= keep + losers
                    to_list = lists + row * GROUP * scored_slots + score_offset
                    from_list = to_list + moves
                    tl.store(to_list + number - 1, at, mask=moving)
                    tl.debug_barrier()
                    for start in range(0, moves, COPY_BLOCK):
                        move = start + tl.arange(0, COPY_BLOCK)
                        listed = move < moves
                        source = tl.load(from_list + move, mask=listed, other=0)
                        target = tl.load(to_list + move, mask=listed, other=0)
                        copy_vectors(keys, values, source, keys, values, target, listed, D, D_PAD)
                        if INT8:
                            tl.store(key_scales + target, tl.load(key_scales + source, mask=listed), mask=listed)
                            tl.store(value_scales + target, tl.load(value_scales + source, mask=listed), mask=listed)
                        tl.store(score_at + target, tl.load(score_at + source, mask=listed), mask=listed)
                        tl.store(position_at + target, tl.load(position_at + source, mask=listed), mask=listed)

    # Step forward: the row's last program writes the next step, with no arrivals.
    if tl.atomic_add(cursors + 1, ONE_ARRIVAL, sem="acq_rel") >> ARRIVAL_SHIFT == heads - 1:
        tl.atomic_xchg(cursors + 1, step + 1, sem="relaxed")
