"""Rule 4 of docs/specification.md, section 3: in which order tokens leave."""

from __future__ import annotations

import triton
import triton.language as tl

# Codes of rules, as in ssd_kernels/heads.py.
SUM = tl.constexpr(0)
MEAN = tl.constexpr(1)
DECAYED = tl.constexpr(3)
LOWEST = tl.constexpr(-(2**31))
HIGHEST = tl.constexpr(2**31 - 1)
PROTECTED = tl.constexpr(2**63 - 1)
PINNED = tl.constexpr((2**31 - 1) << 32)  # the least rank of a pinned token


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
def _earlier(rank, index, other_rank, other_index):
    """The smaller of two ranks, of equal ones that with the smaller index."""
    takes = (rank < other_rank) | ((rank == other_rank) & (index < other_index))
    return tl.where(takes, rank, other_rank), tl.where(takes, index, other_index)


@triton.jit
def first_to_lose(rank, valid, BLOCK: tl.constexpr):
    """Index of the smallest of the valid ranks [BLOCK], of equal ones the first; BLOCK if none is valid."""
    index = tl.where(valid, tl.arange(0, BLOCK), BLOCK)
    return tl.reduce((tl.where(valid, rank, PROTECTED), index), 0, _earlier)[1]


@triton.jit
def lose(rank, valid, losers, BLOCK: tl.constexpr):
    """Mark the ``losers`` smallest of the valid ranks [BLOCK], at least one; of equal ones the first.

    The interval that holds the last loser's rank is halved until as many ranks are up to its middle as have to leave:
    for unlike ranks some log2(BLOCK) times, and never more than once a bit. ``valid`` is a prefix of the indices.
    """
    rank = tl.where(valid, rank, PROTECTED)
    lowest, highest = tl.min(rank, 0), tl.full((), PROTECTED, tl.int64)
    border = tl.max(tl.where(rank < PINNED, rank, lowest), 0)  # the others leave only where there is nothing else
    reached = tl.sum((rank <= border).to(tl.int32), 0)
    while (reached != losers) & (lowest < highest):
        highest = tl.where(reached > losers, border, highest)
        lowest = tl.where(reached < losers, border + 1, lowest)
        border = (lowest & highest) + ((lowest ^ highest) >> 1)  # their mean; their sum might overflow
        reached = tl.sum((rank <= border).to(tl.int32), 0)
    last = tl.full((), BLOCK, tl.int32)  # index of the last loser of rank ``border``
    if reached > losers:
        equal = (rank == border).to(tl.int32)
        leaving = losers - reached + tl.sum(equal, 0)
        last = tl.sum((tl.cumsum(equal, 0) < leaving).to(tl.int32), 0)
    return (rank < border) | ((rank == border) & (tl.arange(0, BLOCK) <= last))
