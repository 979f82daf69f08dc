"""The sizes of a Janus model that a plan has to fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ssd_kernels import CachePlan, HeadSpec


def placement(model: Any) -> tuple[torch.device, torch.dtype]:
    """Where a Janus draws its tokens, and in which dtype: the language model's, which caches follow.

    ``model.device`` and ``model.dtype`` are the first parameter's, which belongs to the vision tower.
    """
    weight = model.model.language_model.get_input_embeddings().weight
    return weight.device, weight.dtype


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the language model and of the picture grid, read from a model's configuration.

    Attributes:
        num_layers: decoder layers.
        num_heads: KV heads per layer.
        num_query_heads: query heads per layer, a multiple of ``num_heads``.
        head_dim: D.
        num_visual_tokens: tokens of a picture.
        columns: tokens in one grid row.
    """

    num_layers: int
    num_heads: int
    num_query_heads: int
    head_dim: int
    num_visual_tokens: int
    columns: int

    @classmethod
    def of(cls, model: Any) -> ModelShape:
        """The shape of a ``JanusForConditionalGeneration``."""
        text = model.model.language_model.config
        return cls(num_layers=text.num_hidden_layers,
                   num_heads=text.num_key_value_heads,
                   num_query_heads=text.num_attention_heads,
                   head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
                   num_visual_tokens=model.model.vision_model.config.num_image_tokens,
                   columns=model.config.vq_config.num_patches)

    def full_plan(self) -> CachePlan:
        """The plan that keeps every token: ordinary dense attention."""
        return CachePlan.uniform(HeadSpec.full(), self.num_layers, self.num_heads)

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
