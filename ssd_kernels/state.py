"""The tensors of one layer's cache, as every backend receives them."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .heads import HeadSpec
from .layout import LayerLayout

# cos and sin, float32 [N, D / 2] contiguous: how far a token at each position is turned; N covers every position.
Rotary = tuple[torch.Tensor, torch.Tensor]


def physical_memory() -> float:
    """Bytes of the machine's memory, infinite where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return math.inf


@dataclass
class LayerState:
    """One layer's compressed cache. B batch rows, S slots, T scored slots, D head_dim, H KV heads.

    Attributes:
        layout: slot ranges of the heads.
        keys, values: slabs ``[B, S, D]``, contiguous; keys are stored after RoPE.
        scores: float32 ``[B, T]``, running sums of attention probability.
        positions: int32 ``[B, T]``, position of the token in each scored slot.
        cursors: int32 ``[B, 2]``: prompt length, and visual tokens appended so far.
        table: int32 ``[H, 8]``, `LayerLayout.table` on the slabs' device.
        pinned: int32 ``[H, W]``, `LayerLayout.pin_mask` there.
        prompt_keys, prompt_values: where rows share prompts, slabs ``[N, H * max_prompt, D]`` of N prompts, head by
            head; else None.
        prompt_of: int32 ``[B]``, which of these a row reads; None without them.
        native: whatever a backend wants to remember about these tensors (their addresses never change).
    """

    layout: LayerLayout
    keys: torch.Tensor
    values: torch.Tensor
    scores: torch.Tensor
    positions: torch.Tensor
    cursors: torch.Tensor
    table: torch.Tensor
    pinned: torch.Tensor
    prompt_keys: torch.Tensor | None = None
    prompt_values: torch.Tensor | None = None
    prompt_of: torch.Tensor | None = None
    native: Any = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def allocate(cls, layout: LayerLayout, specs: Sequence[HeadSpec], batch_size: int, head_dim: int,
                 dtype: torch.dtype, device: torch.device) -> LayerState:
        """Empty caches of the ``specs`` that ``layout`` was built from, with all cursors at zero.

        Ordinary tensors in `torch.inference_mode` too, so that the cache may be changed outside it.
        """
        slab = (batch_size, layout.slots, head_dim)
        scored = (batch_size, layout.scored_slots)
        prompts = (layout.shared_prompts, len(layout.heads) * layout.max_prompt, head_dim)
        with torch.inference_mode(False):
            shared = (torch.zeros(prompts, dtype=dtype, device=device),
                      torch.zeros(prompts, dtype=dtype, device=device),
                      torch.zeros(batch_size, dtype=torch.int32, device=device)) if layout.shared_prompts else ()
            return cls(layout,
                       torch.zeros(slab, dtype=dtype, device=device),
                       torch.zeros(slab, dtype=dtype, device=device),
                       torch.zeros(scored, dtype=torch.float32, device=device),
                       torch.zeros(scored, dtype=torch.int32, device=device),
                       torch.zeros((batch_size, 2), dtype=torch.int32, device=device),
                       layout.table().to(device),
                       layout.pin_mask(specs).to(device), *shared)

    def __getstate__(self) -> dict[str, Any]:
        """For copies: without ``native``, which knows this layer's addresses."""
        return {**self.__dict__, "native": None}

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Those of every layer."""
        return self.keys, self.values, self.scores, self.positions, self.cursors, self.table, self.pinned

    @property
    def shared(self) -> tuple[torch.Tensor, ...]:
        """Those of shared prompts: keys, values, and which prompt a row reads; none if every row has its own."""
        if self.prompt_keys is None or self.prompt_values is None or self.prompt_of is None:
            return ()
        return self.prompt_keys, self.prompt_values, self.prompt_of

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.tensors, *self.shared))
