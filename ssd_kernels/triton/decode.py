"""The fused decode step (docs/specification.md, section 3): append, attention, scores and eviction in one launch.

One program serves one (batch row, KV head), so scores and the choice of victims never leave it. Heads start in the
order of the head table's last column, longest first, so that the launch does not end with one long head on its own.

Heads are not split over programs. The reasons are estimates, not measured on a GPU, for Janus-Pro in bfloat16: 512
bytes a slot, three blocks of 8 KB under way and 0.6 to 1 us of memory latency, so 24 to 40 bytes a nanosecond for one
program.

* The longest possible head holds a picture and its prompt, about 640 slots or 330 KB: 8 to 14 us. At a budget of 20% a
  head holds some 200 slots, prompt and row buffer included: 3 to 4 us. Only full heads with few rows, and so fewer
  programs than multiprocessors, would gain: four parts bring 8 to 14 us down to some 3. With many rows the bytes of all
  heads decide, and long heads start first.
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

ARRIVALS = 20  # cursor bits below are the step, those above count programs; both limits are checked on the host
STEP_MASK = tl.constexpr((1 << ARRIVALS) - 1)
ONE_ARRIVAL = tl.constexpr(1 << ARRIVALS)
ARRIVAL_SHIFT = tl.constexpr(ARRIVALS)

# Columns of the head table and codes, as in ssd_kernels/layout.py.
COLUMNS = tl.constexpr(8)
HEAVY = tl.constexpr(2)
SUM = tl.constexpr(0)
MEAN = tl.constexpr(1)
DECAYED = tl.constexpr(3)
KEPT_SHARE = tl.constexpr(DECAY)
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-(2**31))
HIGHEST = tl.constexpr(2**31 - 1)
PROTECTED = tl.constexpr(2**63 - 1)
ONE_EACH = tl.constexpr(4 * 32 * 8)  # elements of a block, of which each thread reads 16 bytes once
LEAST_FLOAT = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def product(x, y):
    """``x * y``, rounded by itself before it is summed over threads.

    A compiler that fuses a thread's own product with its neighbour's rounds differently in both, which then hold
    different copies of one sum.
    """
    return tl.fma(x, y, 0.0)


@triton.jit
def turns(cos, sin, position, dim, D: tl.constexpr):
    """Rotary embedding in the halves layout: the other element of each pair [D_PAD], and the factors of both."""
    HALF: tl.constexpr = D // 2
    first = dim < HALF
    pair = tl.where(first, dim, dim - HALF)
    at = position.to(tl.int64) * HALF + pair
    turn = tl.load(cos + at, mask=dim < D, other=0.0)
    swing = tl.load(sin + at, mask=dim < D, other=0.0)
    return tl.where(first, dim + HALF, dim - HALF), turn, tl.where(first, -swing, swing)


@triton.jit
def slot_of(index, base, begin, ring):
    """Slot of the ``index``-th kept token: the prompt lies first, the rest in a ring that starts at ``begin``.

    Kept tokens never fill the ring, so none lies more than once around it.
    """
    turn = tl.where(index < base + ring - begin, begin, begin - ring)
    return tl.where(index < base, index, index + turn)


@triton.jit
def head_columns(table, head):
    """A head's kind, first slot, capacity, keep, recent, rule and first scored slot: layout.LayerLayout.table."""
    at = table + head * COLUMNS
    return (tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5),
            tl.load(at + 6))


@triton.jit
def load_slots(keys, values, start, total, base, begin, ring, D: tl.constexpr, D_PAD: tl.constexpr,
               BLOCK: tl.constexpr):
    """The kept tokens from ``start`` on: slots [BLOCK], whether each exists, keys and values [BLOCK, D_PAD]."""
    dim = tl.arange(0, D_PAD)
    index = start + tl.arange(0, BLOCK)
    live = index < total
    slot = slot_of(index, base, begin, ring)
    where = slot[:, None] * D + dim[None, :]
    mask = live[:, None] & (dim < D)[None, :]
    return slot, live, tl.load(keys + where, mask=mask, other=0.0), tl.load(values + where, mask=mask, other=0.0)


@triton.jit
def copy_vectors(k, v, source, keys, values, target, mask, D: tl.constexpr, D_PAD: tl.constexpr):
    """Keys and values of rows ``source`` [N] of k and v into rows ``target`` [N] of the slabs, where ``mask`` [N]."""
    dim = tl.arange(0, D_PAD)
    both = mask[:, None] & (dim < D)[None, :]
    source_at = source[:, None] * D + dim[None, :]  # [N, D_PAD]
    target_at = target[:, None] * D + dim[None, :]
    tl.store(keys + target_at, tl.load(k + source_at, mask=both), mask=both)
    tl.store(values + target_at, tl.load(v + source_at, mask=both), mask=both)


@triton.jit
def eviction_rank(key, position):
    """An int64 that sorts like rule 4: NaN below every key, of equal keys the older position first."""
    key = tl.where(key == 0.0, 0.0, key)  # -0 and +0 are equal keys
    bits = key.to(tl.int32, bitcast=True)
    ordered = tl.where(key == key, bits ^ ((bits >> 31) & HIGHEST), LOWEST)
    return (ordered.to(tl.int64) << 32) + position.to(tl.int64)


@triton.jit
def rank_of(score, position, newest, prompt_len, steps, recent, rule, pinned, num_visual_tokens, valid):
    """Rule 4's order as int64: protected tokens above pinned ones above keys.

    ``score``, ``position``, ``valid``: [N]. ``newest``: highest position held. ``steps``: decode steps taken, this one
    included. ``pinned``: the head's row of the pin mask.
    """
    attended = tl.maximum(steps - tl.maximum(position - prompt_len, 0), 1)
    mean = tl.div_rn(score, attended.to(tl.float32))
    rank = eviction_rank(tl.where(rule == MEAN, mean, score), position)
    rank = tl.where((rule == SUM) | (rule == MEAN) | (rule == DECAYED), rank, position.to(tl.int64))
    token = position - prompt_len
    visual = valid & (token >= 0) & (token < num_visual_tokens)
    word = tl.load(pinned + token // 32, mask=visual, other=0)
    is_pinned = visual & (((word >> (token & 31)) & 1) == 1)
    highest: tl.constexpr = HIGHEST
    rank = tl.where(is_pinned, (tl.full(rank.shape, highest, tl.int64) << 32) + position.to(tl.int64), rank)
    return tl.where(position > newest - recent, PROTECTED, rank)


@triton.jit
def lose(rank, valid, losers, BLOCK: tl.constexpr):
    """Mark the ``losers`` smallest of the valid ranks [BLOCK], one after the other; equal ones by index.

    A refresh every R steps has at most R losers, so this is at most one reduction per decode step.
    """
    index = tl.arange(0, BLOCK)
    lost = index < 0
    for _ in range(losers):
        remaining = valid & ~lost
        least = tl.min(tl.where(remaining, rank, PROTECTED), 0)
        lost |= index == tl.min(tl.where(remaining & (rank == least), index, BLOCK), 0)
    return lost


@triton.jit
def raised(highest, logit):
    """The new maximum, never -inf: logits of -inf then weigh 0 and not NaN, even where there are no others."""
    return tl.maximum(tl.maximum(highest, logit), LEAST_FLOAT)


@triton.jit
def attend_one(q, keys, values, logits, new_logit, new_value, total, base, begin, ring, scored_total, scale,
               D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
               SCORED: tl.constexpr):
    """Attention of one query [D_PAD] over ``total`` slots and the new token: maximum, sum [1] and output [1, D_PAD].

    ``scored_total``: of how many slots logits are stored, all or none.
    """
    highest = new_logit
    norm = 1.0
    acc = new_value  # [D_PAD]
    for start in tl.range(0, total, BLOCK, num_stages=STAGES):
        slot, live, k, v = load_slots(keys, values, start, total, base, begin, ring, D, D_PAD, BLOCK)
        logit = tl.sum(k.to(tl.float32) * q[None, :], 1) * scale
        if SCORED:
            tl.store(logits + slot, logit, mask=start + tl.arange(0, BLOCK) < scored_total)
        logit = tl.where(live, logit, -float("inf"))
        new_highest = raised(highest, tl.max(logit, 0))
        weight = tl.exp2(logit - new_highest)
        fade = tl.exp2(highest - new_highest)
        norm = norm * fade + tl.sum(weight, 0)
        if BLOCK * D_PAD <= ONE_EACH:
            acc = acc * fade + tl.sum(product(weight[:, None], v.to(tl.float32)), 0)
        else:
            acc = acc * fade + tl.sum(weight[:, None] * v.to(tl.float32), 0)
        highest = new_highest
    return tl.full([1], 0.0, tl.float32) + highest, tl.full([1], 0.0, tl.float32) + norm, acc[None, :]


@triton.jit
def attend_group(q, keys, values, logits, new_logit, new_value, total, base, begin, ring, scored_total, scale,
                 scored_slots, D: tl.constexpr, D_PAD: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,
                 BLOCK: tl.constexpr, STAGES: tl.constexpr, SCORED: tl.constexpr):
    """`attend_one` for the queries [GROUP_PAD, D_PAD] of a group, which read every slot together."""
    member = tl.arange(0, GROUP_PAD)
    highest = new_logit  # [GROUP_PAD]
    norm = tl.full([GROUP_PAD], 1.0, tl.float32)
    acc = tl.zeros([GROUP_PAD, D_PAD], tl.float32) + new_value[None, :]
    for start in tl.range(0, total, BLOCK, num_stages=STAGES):
        slot, live, k, v = load_slots(keys, values, start, total, base, begin, ring, D, D_PAD, BLOCK)
        logit = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [GROUP_PAD, BLOCK]
        if SCORED:
            tl.store(logits + member[:, None] * scored_slots + slot[None, :], logit,
                     mask=(member < GROUP)[:, None] & (start + tl.arange(0, BLOCK) < scored_total)[None, :])
        logit = tl.where(live[None, :], logit, -float("inf"))
        new_highest = raised(highest, tl.max(logit, 1))
        weight = tl.exp2(logit - new_highest[:, None])
        fade = tl.exp2(highest - new_highest)
        norm = norm * fade + tl.sum(weight, 1)
        # One rounding to 16 bits would be an error of the weights as large as that of the whole result may be.
        high = weight.to(v.dtype)
        low = (weight - high.to(tl.float32)).to(v.dtype)
        acc = acc * fade[:, None] + tl.dot(high, v, input_precision="ieee")
        if v.dtype != tl.float32:
            acc += tl.dot(low, v, input_precision="ieee")
        highest = new_highest
    # Of queries that only pad the group: not NaN, whatever keys hold.
    return tl.where(member < GROUP, highest, 0.0), norm, acc


# Compiled once for all batches, pictures and strides.
NUMBERS = ["q_row", "q_head", "k_row", "k_head", "v_row", "v_head", "batch", "heads", "slots", "scored_slots",
           "max_prompt", "num_visual_tokens", "pin_words", "period"]


@triton.jit(do_not_specialize=NUMBERS)
def decode_kernel(q, k, v, keys, values, scores, positions, cursors, table, pinned, out, logits, lists, cos, sin,
                  q_row, q_head, k_row, k_head, v_row, v_head, batch, heads, slots, scored_slots, max_prompt,
                  num_visual_tokens, pin_words, period, scale,
                  KEEP_PROMPT: tl.constexpr, EVERY_STEP: tl.constexpr, SCORED: tl.constexpr, D: tl.constexpr,
                  D_PAD: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, BLOCK: tl.constexpr,
                  ROTARY: tl.constexpr, EVICT_BLOCK: tl.constexpr, COPY_BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """One (batch row, head) of one decode step. Tensors as in `ssd_kernels.state.LayerState`.

    ``q`` [B, Hq, D], ``k`` and ``v`` [B, H, D] with the given strides, ``out`` [B, Hq, D] contiguous.
    ``logits``: float32 [B, GROUP, T], scratch; ``lists``: the same memory as int32.
    ``cos``, ``sin``: float32 [N, D / 2], read if ROTARY.
    ``period``: max(R, 1). ``scale``: of the dot products.
    ``EVICT_BLOCK``: at least the evictable tokens of any heavy head.
    """
    program = tl.program_id(0)
    row = (program % batch).to(tl.int64)
    head = tl.minimum(tl.maximum(tl.load(table + (program // batch) * COLUMNS + 7), 0), heads - 1)
    kind, offset, capacity, keep, recent, rule, score_offset = head_columns(table, head)
    cursors += row * 2
    prompt_len = tl.load(cursors)
    cursor = tl.load(cursors + 1, volatile=True)  # other programs count in it meanwhile
    step, arrived = cursor & STEP_MASK, cursor >> ARRIVAL_SHIFT

    dim, member = tl.arange(0, D_PAD), tl.arange(0, GROUP_PAD)
    in_group = member < GROUP
    in_dim = dim < D
    out += (row * heads + head) * GROUP * D
    out_at = out + member[:, None] * D + dim[None, :]  # [GROUP_PAD, D_PAD]
    out_mask = in_group[:, None] & in_dim[None, :]
    # Slot arithmetic: layout.RowView.
    if KEEP_PROMPT:
        base, first, ring = prompt_len, 0, capacity - max_prompt
    else:
        base, first, ring = 0, prompt_len, capacity
    block_start = step // period * period
    evictable = tl.minimum(keep, first + block_start) + step - block_start

    # Neither cursors nor table can be checked on the host without waiting for the device.
    fine = (prompt_len >= 0) & (prompt_len <= max_prompt) & (arrived >= 0) & (arrived < heads)
    fine &= (step < num_visual_tokens) & (keep >= 0) & (offset >= 0) & (capacity <= slots - offset)
    fine &= (evictable < ring) & (score_offset >= -1) & ((score_offset < 0) | (score_offset <= scored_slots - capacity))
    if not fine:
        tl.store(out_at, tl.zeros([GROUP_PAD, D_PAD], out.dtype.element_ty), mask=out_mask)
        return

    total = base + evictable  # kept so far, the prompt included
    is_heavy = kind == HEAVY
    begin = tl.where(is_heavy, 0, (first + step - evictable) % ring)
    new_slot = base + tl.where(is_heavy, evictable, (first + step) % ring)
    position = prompt_len + step

    slab_at = row * slots + offset
    keys += slab_at * D
    values += slab_at * D
    scored_at = row * scored_slots + score_offset
    logits += row * GROUP * scored_slots + score_offset

    # Append.
    key_at = k + row * k_row + head * k_head
    new_key = tl.load(key_at + dim, mask=in_dim, other=0.0)
    if ROTARY:
        partner, turn, swing = turns(cos, sin, position, dim, D)
        swapped = tl.load(key_at + partner, mask=in_dim, other=0.0)
        new_key = (new_key.to(tl.float32) * turn + swapped.to(tl.float32) * swing).to(new_key.dtype)
    new_value = tl.load(v + row * v_row + head * v_head + dim, mask=in_dim, other=0.0)
    tl.store(keys + new_slot * D + dim, new_key, mask=in_dim)
    tl.store(values + new_slot * D + dim, new_value, mask=in_dim)
    new_key, new_value = new_key.to(tl.float32), new_value.to(tl.float32)

    # Attend. The new token is taken from registers: nothing of this step is read back from memory.
    to_log2 = scale * LOG2E
    keep_scores = score_offset >= 0
    scored_total = tl.where(keep_scores, total, 0)
    query_at = q + row * q_row + (head * GROUP + member)[:, None] * q_head
    queries = tl.load(query_at + dim[None, :], mask=out_mask, other=0.0)  # [GROUP_PAD, D_PAD]
    if ROTARY:
        swapped = tl.load(query_at + partner[None, :], mask=out_mask, other=0.0)
        turned = queries.to(tl.float32) * turn[None, :] + swapped.to(tl.float32) * swing[None, :]
        queries = turned.to(queries.dtype)
    new_logit = tl.sum(product(queries.to(tl.float32), new_key[None, :]), 1) * to_log2  # [GROUP_PAD]
    if GROUP == 1:
        query = tl.sum(queries.to(tl.float32), 0)  # [D_PAD]
        highest, norm, acc = attend_one(query, keys, values, logits, tl.sum(new_logit, 0), new_value, total, base,
                                        begin, ring, scored_total, to_log2, D, D_PAD, BLOCK, STAGES, SCORED)
    else:
        new_logit = tl.where(in_group, new_logit, 0.0)
        highest, norm, acc = attend_group(queries, keys, values, logits, new_logit, new_value, total, base, begin,
                                          ring, scored_total, to_log2, scored_slots, D, D_PAD, GROUP, GROUP_PAD, BLOCK,
                                          STAGES, SCORED)
    tl.store(out_at, acc / norm[:, None], mask=out_mask)

    if SCORED:
        if keep_scores:
            score_at = scores + scored_at
            position_at = positions + scored_at
            tl.debug_barrier()  # logits were written by other threads of this program
            share = tl.where(in_group, 1.0 / norm, 0.0)
            kept_share = tl.where(rule == DECAYED, KEPT_SHARE, 1.0)
            for start in range(0, total, EVICT_BLOCK):
                index = start + tl.arange(0, EVICT_BLOCK)
                live = index < total
                slot = slot_of(index, base, begin, ring)
                given = tl.load(logits + member[:, None] * scored_slots + slot[None, :],
                                mask=in_group[:, None] & live[None, :], other=-float("inf"))
                given = tl.sum(product(tl.exp2(given - highest[:, None]), share[:, None]), 0)  # [EVICT_BLOCK]
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
                    lost = lose(rank, valid, 1, EVICT_BLOCK)
                    loser = base + tl.min(tl.where(lost, index, EVICT_BLOCK), 0)
                    if loser < new_slot:
                        tl.store(keys + loser * D + dim, new_key.to(keys.dtype.element_ty), mask=in_dim)
                        tl.store(values + loser * D + dim, new_value.to(values.dtype.element_ty), mask=in_dim)
                        tl.store(score_at + loser, tl.load(score_at + new_slot))
                        tl.store(position_at + loser, position)
                else:
                    # The losers among the first ``keep`` slots and the winners beyond them, both counted from 0, are
                    # listed where the logits were.
                    lost = lose(rank, valid, losers, EVICT_BLOCK)
                    leaving = lost & (index < keep)
                    staying = valid & ~lost & (index >= keep)
                    moves = tl.sum(leaving.to(tl.int32), 0)  # and as many stay: 2 x moves <= keep + losers
                    from_list = lists + row * GROUP * scored_slots + score_offset
                    to_list = from_list + moves
                    tl.store(from_list + tl.cumsum(staying.to(tl.int32), 0) - 1, at, mask=staying)
                    tl.store(to_list + tl.cumsum(leaving.to(tl.int32), 0) - 1, at, mask=leaving)
                    tl.debug_barrier()
                    for start in range(0, moves, COPY_BLOCK):
                        move = start + tl.arange(0, COPY_BLOCK)
                        moving = move < moves
                        source = tl.load(from_list + move, mask=moving, other=0)
                        target = tl.load(to_list + move, mask=moving, other=0)
                        copy_vectors(keys, values, source, keys, values, target, moving, D, D_PAD)
                        tl.store(score_at + target, tl.load(score_at + source, mask=moving), mask=moving)
                        tl.store(position_at + target, tl.load(position_at + source, mask=moving), mask=moving)

    # Step forward: the row's last program writes the next step, with no arrivals.
    if tl.atomic_add(cursors + 1, ONE_ARRIVAL, sem="acq_rel") >> ARRIVAL_SHIFT == heads - 1:
        tl.atomic_xchg(cursors + 1, step + 1, sem="relaxed")
