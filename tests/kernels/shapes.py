"""The sizes of a model that the tests of policies give."""

from __future__ import annotations

from dataclasses import dataclass

from ssd_kernels.policies import Raster


@dataclass(frozen=True)
class Shape:
    num_layers: int
    num_heads: int
    num_visual_tokens: int
    columns: int
    raster: Raster | None = None
    head_dim: int = 128
