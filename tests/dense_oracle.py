"""docs/specification.md, section 3 without any cache: every key is kept, and what a plan has evicted is masked.

Registered under a name of its own and run by transformers' unchanged code with a `DynamicCache`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from ssd_kernels import CachePlan


class DenseOracle:
    """Attention of one generation: the conditional and any other rows of one batch."""

    def __init__(self, plan: CachePlan) -> None:
        self.plan = plan
        self.kept: dict[int, torch.Tensor] = {}
        self.scores: dict[int, torch.Tensor] = {}
        self.prompt: torch.Tensor | None = None

    @contextmanager
    def on(self, decoder: Any) -> Iterator[None]:
        """Attention of the decoder is this while it lasts."""
        name = f"test_oracle_{id(self)}"
        AttentionInterface.register(name, self.attend)
        AttentionMaskInterface.register(name, self.mask)
        before, decoder.config._attn_implementation = decoder.config._attn_implementation, name
        try:
            yield
        finally:
            decoder.config._attn_implementation = before

    @staticmethod
    def mask(**kwargs: Any) -> torch.Tensor | None:
        return sdpa_mask(**{**kwargs, "allow_is_causal_skip": False})

    def attend(self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               attention_mask: torch.Tensor, scaling: float, **kwargs: Any) -> tuple[torch.Tensor, None]:
        rows, heads, tokens = key.shape[:3]
        group = query.shape[1] // heads
        visible = attention_mask[:, 0, None].expand(rows, heads, query.shape[2], tokens)
        if query.shape[2] == 1:
            self.append(module.layer_idx, rows, heads, tokens)
            visible = visible & self.kept[module.layer_idx][:, :, None]
        else:
            self.prompt = attention_mask[:, 0, -1]
        grouped = query.double().unflatten(1, (heads, group))
        logits = grouped @ key.double().unsqueeze(2).transpose(-1, -2) * scaling
        probabilities = logits.masked_fill(~visible[:, :, None], -torch.inf).softmax(-1).nan_to_num(0.0)
        if query.shape[2] == 1:
            self.score_and_evict(module.layer_idx, probabilities.sum((2, 3)))
        out = (probabilities @ value.double().unsqueeze(2)).flatten(1, 2)
        return out.transpose(1, 2).to(query.dtype).contiguous(), None

    def append(self, layer: int, rows: int, heads: int, tokens: int) -> None:
        assert self.prompt is not None
        if layer not in self.kept:
            self.kept[layer] = self.prompt[:, None].repeat(1, heads, 1)
            self.scores[layer] = torch.zeros(rows, heads, tokens - 1, dtype=torch.double)
            if not self.plan.keep_prompt:
                self.evict(layer)
        self.kept[layer] = torch.cat([self.kept[layer], torch.ones(rows, heads, 1, dtype=torch.bool)], 2)
        self.scores[layer] = torch.cat([self.scores[layer], torch.zeros(rows, heads, 1)], 2)

    def score_and_evict(self, layer: int, mass: torch.Tensor) -> None:
        assert self.prompt is not None
        for head, spec in enumerate(self.plan.layers[layer]):
            if spec.score == "decayed":
                self.scores[layer][:, head] *= 0.96
        self.scores[layer] += mass
        if (mass.shape[-1] - self.prompt.shape[1]) % max(self.plan.row_buffer, 1) == 0:
            self.evict(layer)

    def evict(self, layer: int) -> None:
        assert self.prompt is not None
        slots = self.prompt.shape[1]
        first = slots if self.plan.keep_prompt else 0
        rows, _, tokens = self.kept[layer].shape
        for row in range(rows):
            for head, spec in enumerate(self.plan.layers[layer]):
                if spec.size is None:
                    continue
                kept = self.kept[layer][row, head]
                candidates = [slot for slot in range(first, tokens) if kept[slot]]
                recent = spec.size if spec.kind == "window" else spec.recent
                newest = candidates[max(len(candidates) - recent, 0):]
                others = [slot for slot in candidates if slot not in newest]
                keys = self.scores[layer][row, head].tolist()
                if spec.score == "mean":
                    keys = [key / max(tokens - max(slot, slots), 1) for slot, key in enumerate(keys)]
                if spec.score == "position":
                    keys = list(range(tokens))
                # Numbers of the picture's tokens, of those that rank above all others.
                others.sort(key=lambda slot: (slot - slots in spec.pinned, keys[slot], slot), reverse=True)  # noqa: B023
                stay = set(newest + others[:max(spec.size - recent, 0)])
                for slot in candidates:
                    kept[slot] = slot in stay
