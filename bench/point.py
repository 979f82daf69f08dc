"""What is benchmarked: one decode step of one layer, described by plain numbers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ssd_kernels import CachePlan, HeadSpec
from ssd_kernels.kv_format import vector_bytes
from ssd_kernels.layout import LayerLayout, RowView

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SPREADS = ("uniform", "two-class", "skewed")
SHORT = 0.25  # of the mean: the short class of a two-class layer


@dataclass(frozen=True)
class Point:
    """One benchmark point.

    Attributes:
        batch: rows; a picture with guidance takes two. heads: KV heads of the layer. head_dim: D.
        dtype: a name in `DTYPES`.
        lengths: tokens each head attends to, the new one included; with a row buffer on average over its steps.
        full: tokens of the full cache.
        label: what the lengths come from, for tables.
        plan: a plan of one layer to run, else None: plans are made from ``lengths``.
        prompt, start: with a plan, prompt tokens and visual tokens already in the cache.
    """

    batch: int
    heads: int
    head_dim: int
    dtype: str
    lengths: tuple[int, ...]
    full: int
    label: str
    plan: CachePlan | None = None
    prompt: int = 0
    start: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    @classmethod
    def of_lengths(cls, batch: int = 16, heads: int = 16, head_dim: int = 128, dtype: str = "bfloat16",
                   mean: int = 120, full: int = 600, spread: str = "skewed") -> Point:
        """A layer whose heads hold ``mean`` tokens on average, spread as `head_lengths` says."""
        if heads < 1:
            raise ValueError(f"heads must be at least 1, got {heads}")
        return cls(batch, heads, head_dim, dtype, tuple(head_lengths(heads, mean, full, spread)), full,
                   f"{spread}, mean {mean} of {full}")

    @classmethod
    def of_plan(cls, plan: CachePlan, layer: int, label: str, batch: int, head_dim: int, dtype: str, prompt: int,
                start: int, tokens: int) -> Point:
        """One layer of a plan, filled by ``prompt`` and ``start`` of the picture's ``tokens`` visual tokens."""
        if not 0 <= layer < plan.num_layers:
            raise ValueError(f"layer must be within 0 .. {plan.num_layers - 1}, got {layer}")
        if not 0 <= start < tokens:
            raise ValueError(f"start must be within 0 .. {tokens - 1}, got {start}")
        period = max(plan.row_buffer, 1)
        start = start // period * period
        one = replace(plan, layers=[plan.layers[layer]])
        layout = LayerLayout.build(one.layers[0], one, prompt, start + 2 * period)
        lengths = []
        for head in range(one.num_heads):
            views = [RowView.of(layout, head, prompt, start + phase) for phase in range(period)]
            lengths.append(round(sum(view.base + view.evictable + 1 for view in views) / period))
        return cls(batch, one.num_heads, head_dim, dtype, tuple(lengths), prompt + tokens, label, one, prompt, start)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def mean(self) -> int:
        """Mean tokens per head, rounded."""
        return round(sum(self.lengths) / self.heads)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def attend_bytes(self, slots: int | None = None, kv_format: str = "auto") -> int:
        """Bytes of the keys and values of ``slots`` per row (None: those kept), of the queries and of the output."""
        held = sum(self.lengths) if slots is None else slots
        vector, stored = (vector_bytes(kind, self.head_dim, self.torch_dtype) for kind in ("auto", kv_format))
        return 2 * self.batch * (held * stored + self.heads * vector)

    def to_dict(self) -> dict[str, Any]:
        """JSON form; the plan by its label only."""
        data = asdict(self) | {"mean": self.mean, "row_buffer": self.plan.row_buffer if self.plan else None}
        return {name: value for name, value in data.items() if name != "plan"} | {"lengths": list(self.lengths)}


def head_lengths(heads: int, mean: int, full: int, spread: str) -> list[int]:
    """Tokens per head, with the asked mean and none above ``full``.

    - ``uniform``: all alike;
    - ``two-class``: every second head a quarter of the mean, as spatial heads need few tokens, the others the rest;
    - ``skewed``: exponentially spread, as budgets solved per head come out: some heads need far more than the mean.

    Raises:
        ValueError: an unknown spread or a mean outside 2 .. full.
    """
    if spread not in SPREADS:
        raise ValueError(f"spread must be one of {', '.join(SPREADS)}, got {spread!r}")
    if not 2 <= mean <= full:
        raise ValueError(f"mean must be within 2 .. full = {full}, got {mean}")
    if spread == "uniform" or heads == 1:
        return [mean] * heads
    if spread == "two-class":
        long_heads = (heads + 1) // 2
        short = max(2, round(SHORT * mean))
        long = min(full, round((mean * heads - short * (heads - long_heads)) / long_heads))
        short = round((mean * heads - long * long_heads) / (heads - long_heads))  # takes up what ``full`` cut off
        return [long if head % 2 == 0 else short for head in range(heads)]
    quantiles = [-math.log(1 - (head + 0.5) / heads) for head in range(heads)]
    low, high = 0.0, full / quantiles[0]  # at which every head is full
    for _ in range(60):
        scale = (low + high) / 2
        total = sum(min(max(2, round(scale * quantile)), full) for quantile in quantiles)
        low, high = (scale, high) if total < mean * heads else (low, scale)
    return [min(max(2, round(high * quantile)), full) for quantile in quantiles]


def specs(lengths: tuple[int, ...], scored: bool, row_buffer: int) -> list[HeadSpec]:
    """Head specs that hold ``lengths`` tokens during a step, on average over the steps of a row buffer.

    Scored heads are heavy ones of the paper's rule, the others windows.
    """
    appended = (max(row_buffer, 1) + 1) / 2
    sizes = [max(1, round(length - appended)) for length in lengths]
    return [HeadSpec.heavy(size) if scored else HeadSpec.window(size) for size in sizes]
