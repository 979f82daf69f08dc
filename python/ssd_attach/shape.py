"""The sizes of a decoder and of the pictures it writes, which a plan has to fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ssd_kernels import CachePlan, HeadSpec
from ssd_kernels.policies import Raster

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder and of the picture grid.

    Attributes:
        num_layers: decoder layers.
        num_heads: KV heads per layer.
        num_query_heads: query heads per layer, a multiple of ``num_heads``.
        head_dim: D.
        num_visual_tokens: tokens of a picture, those that stand for no place of the grid included.
        columns: tokens in one grid row.
        raster: where grid rows stand among the picture's tokens; None for one after the other, nothing between.

    Raises:
        ValueError: the raster has other sizes.
    """

    num_layers: int
    num_heads: int
    num_query_heads: int
    head_dim: int
    num_visual_tokens: int
    columns: int
    raster: Raster | None = None

    def __post_init__(self) -> None:
        own = self.num_visual_tokens, self.columns
        if self.raster is not None and own != (self.raster.tokens, self.raster.columns):
            raise ValueError(f"raster must have the shape's (num_visual_tokens, columns) = {own}, got "
                             f"{(self.raster.tokens, self.raster.columns)}")

    @classmethod
    def of_decoder(cls, config: Any, raster: Raster) -> Self:
        """The shape of a decoder by its transformers configuration, for pictures of a raster."""
        heads = config.num_attention_heads
        return cls(num_layers=config.num_hidden_layers,
                   num_heads=getattr(config, "num_key_value_heads", None) or heads,
                   num_query_heads=heads,
                   head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
                   num_visual_tokens=raster.tokens,
                   columns=raster.columns,
                   raster=raster)

    def full_plan(self, kv_format: str = "auto") -> CachePlan:
        """The plan that keeps every token: ordinary dense attention, but for how ``kv_format`` stores them."""
        return CachePlan.uniform(HeadSpec.full(), self.num_layers, self.num_heads, kv_format=kv_format)

    def check(self, plan: object) -> CachePlan:
        """``plan`` itself when it fits.

        Raises:
            TypeError: not a `CachePlan`.
            ValueError: another number of layers or KV heads than the model has.
        """
        if not isinstance(plan, CachePlan):
            raise TypeError(f"plan must be a CachePlan, got {type(plan).__name__}")
        if (plan.num_layers, plan.num_heads) != (self.num_layers, self.num_heads):
            raise ValueError(f"plan must have the model's {self.num_layers} layers x {self.num_heads} KV heads, got "
                             f"{plan.num_layers} layers x {plan.num_heads} KV heads")
        return plan
