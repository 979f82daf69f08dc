"""Policies that treat all heads alike and need no profile."""

from __future__ import annotations

import numpy as np

from ..arguments import check_int
from ..heads import HeadSpec, ScoreRule
from ..plan import CachePlan
from .raster import raster_of
from .solve import BudgetTooSmall, Shape, check, check_share, largest, make


def full(shape: Shape, budget: float = 1.0, row_buffer: int | None = None) -> CachePlan:
    """Keep everything. ``budget`` can only be 1, and a row buffer changes nothing.

    Raises:
        BudgetTooSmall: another budget.
    """
    check(shape, budget, row_buffer)
    if budget != 1:
        raise BudgetTooSmall(1.0, "for policy full, which keeps every token", budget)
    return make(shape, row_buffer or 0, lambda layer, head: HeadSpec.full())


def window(shape: Shape, budget: float, row_buffer: int | None = None) -> CachePlan:
    """Every head keeps its most recent visual tokens."""
    return largest(shape, budget, row_buffer, lambda size: lambda layer, head: HeadSpec.window(size),
                   shape.num_visual_tokens)


def h2o(shape: Shape, budget: float, row_buffer: int | None = None, *, recent: float = 0.5,
        score: ScoreRule = "sum") -> CachePlan:
    """Heavy hitters and recent tokens, the same in every head (H2O, arXiv 2306.14048).

    The prompt is kept besides, as everywhere here; H2O lets it compete.

    Args:
        recent: share of the slots for the newest tokens; H2O's own is one half.
        score: H2O sums attention over all steps.
    """
    share = check_share("recent", recent)
    return largest(shape, budget, row_buffer,
                   lambda size: lambda layer, head: HeadSpec.heavy(size, recent=int(share * size), score=score),
                   shape.num_visual_tokens)


def heavy(shape: Shape, budget: float, row_buffer: int | None = None, *, recent: float = 0.5) -> CachePlan:
    """`h2o` by the mean attention per step, so that new tokens are not starved by old ones' long sums.

    Args:
        recent: share of the slots for the newest tokens.
    """
    return h2o(shape, budget, row_buffer, recent=recent, score="mean")


def decayed(shape: Shape, budget: float, row_buffer: int | None = None, *, recent: float = 0.5) -> CachePlan:
    """`h2o` by sums that forget half in 17 steps, less than a row of 24, so that what counts is recent attention.

    The factor, `ssd_kernels.heads.DECAY` per step, is the best of those that docs/policy-results.md, "What was tried",
    has, for the model it names.

    Args:
        recent: share of the slots for the newest tokens.
    """
    return h2o(shape, budget, row_buffer, recent=recent, score="decayed")


SINKS = 4  # StreamingLLM's own number of first tokens


def first_and_newest(size: int, first: int = SINKS) -> HeadSpec:
    """The ``first`` tokens of the picture and the newest, ``size`` in all; the newest one always."""
    return HeadSpec.heavy(size, score="position", pinned=range(min(first, size - 1)))


def streaming_llm(shape: Shape, budget: float, row_buffer: int | None = None, *, first: int = SINKS) -> CachePlan:
    """The first tokens and a window of recent ones (StreamingLLM, arXiv 2309.17453).

    The paper's sinks are the first tokens of the sequence, which here is the prompt and kept anyway; the first tokens
    of the picture are kept besides.

    Args:
        first: visual tokens kept from the start.
    """
    check_int("first", first, 0)
    return largest(shape, budget, row_buffer, lambda size: lambda layer, head: first_and_newest(size, first),
                   shape.num_visual_tokens)


def rows(shape: Shape, budget: float, row_buffer: int | None = None, *, first_rows: int = 1) -> CachePlan:
    """The first rows of the picture and its most recent ones, in the manner of LineAR (arXiv 2512.04857).

    LineAR also keeps lines in between by the attention of the line before; without code or details published, what
    lies in between is dropped here.

    Args:
        first_rows: grid rows kept from the start, as far as half of the slots allow.
    """
    check_int("first_rows", first_rows, 0)
    raster = raster_of(shape)
    anchors = range(raster.head + first_rows * raster.stride)
    return largest(
        shape, budget, row_buffer,
        lambda size: lambda layer, head: HeadSpec.heavy(size, score="position", pinned=anchors[:size // 2]),
        shape.num_visual_tokens)


def random(shape: Shape, budget: float, row_buffer: int | None = None, *, seed: int = 0) -> CachePlan:
    """A floor to beat: every head keeps a random draw of the picture's tokens.

    Slots whose tokens have not been generated yet hold the newest ones.

    Args:
        seed: of the draw, at least 0.
    """
    check_int("seed", seed, 0)
    tokens = shape.num_visual_tokens
    orders = np.random.default_rng(seed).permuted(
        np.tile(np.arange(tokens), (shape.num_layers, shape.num_heads, 1)), axis=2)
    return largest(
        shape, budget, row_buffer,
        lambda size: lambda layer, head: HeadSpec.heavy(
            size, score="position", pinned=[int(token) for token in orders[layer, head, :max(size - 1, 0)]]), tokens)
