"""The tensors of one layer's cache, as every backend receives them."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .heads import HeadSpec
from .layout import LayerLayout
from .pages import zeros_in_huge_pages

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
        dtype: of q, k, v and output.
        keys, values: slabs ``[B, S, D]``, contiguous, in ``dtype`` or int8 (``layout.kv_format``); keys are stored
            after RoPE.
        scores: float32 ``[B, T]``, running sums of attention probability.
        positions: int32 ``[B, T]``, position of the token in each scored slot.
        cursors: int32 ``[B, 2]``: prompt length, and visual tokens appended so far.
        table: int32 ``[H, 8]``, `LayerLayout.table` on the slabs' device.
        pinned: int32 ``[H, W]``, `LayerLayout.pin_mask` there.
        prompt_keys, prompt_values: where rows share prompts, slabs ``[N, H * max_prompt, D]`` of N prompts, head by
            head; else None.
        prompt_of: int32 ``[B]``, which of these a row reads; None without them.
        key_scales, value_scales: float32 ``[B, S]``, contiguous, the slots' scales with ``kv_format="int8"``, or None.
        prompt_key_scales, prompt_value_scales: float32 ``[N, H * max_prompt]``, those of shared prompts; else None.
        native: whatever a backend wants to remember about these tensors (their addresses never change).
    """

    layout: LayerLayout
    dtype: torch.dtype
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
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None
    prompt_key_scales: torch.Tensor | None = None
    prompt_value_scales: torch.Tensor | None = None
    native: Any = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def allocate(cls, layout: LayerLayout, specs: Sequence[HeadSpec], batch_size: int, head_dim: int,
                 dtype: torch.dtype, device: torch.device) -> LayerState:
        """Empty caches of the ``specs`` that ``layout`` was built from, with all cursors at zero.

        Ordinary tensors in `torch.inference_mode` too, so that the cache may be changed outside it.
        """
        stored = dtype if layout.kv_format == "auto" else torch.int8
        slots, scored = (batch_size, layout.slots), (batch_size, layout.scored_slots)
        prompts = (layout.shared_prompts, len(layout.heads) * layout.max_prompt)

        def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return zeros_in_huge_pages(shape, dtype, device)

        def vectors(slots: tuple[int, int]) -> list[torch.Tensor]:
            return [zeros((*slots, head_dim), stored) for _ in range(2)]

        def scales(slots: tuple[int, int]) -> list[torch.Tensor] | list[None]:
            return [None] * 2 if layout.kv_format == "auto" else [zeros(slots, torch.float32) for _ in range(2)]

        with torch.inference_mode(False):
            shared = [*vectors(prompts), zeros((batch_size,), torch.int32)] if layout.shared_prompts else [None] * 3
            keys, values = vectors(slots)
            return cls(layout, dtype, keys, values, zeros(scored, torch.float32), zeros(scored, torch.int32),
                       zeros((batch_size, 2), torch.int32), layout.table().to(device),
                       layout.pin_mask(specs).to(device), *shared, *scales(slots),
                       *(scales(prompts) if layout.shared_prompts else []))

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
    def scales(self) -> tuple[torch.Tensor, ...]:
        """Of keys, values and, where rows share prompts, of theirs, with ``kv_format="int8"``; else none."""
        every = self.key_scales, self.value_scales, self.prompt_key_scales, self.prompt_value_scales
        return tuple(tensor for tensor in every if tensor is not None)

    @property
    def slabs(self) -> tuple[torch.Tensor, ...]:
        """What rows' slots hold of keys and values, ``[B, S, ...]`` each: these and, in 8 bits, their scales."""
        return self.keys, self.values, *self.scales[:2]

    @property
    def prompt_slabs(self) -> tuple[torch.Tensor, ...]:
        """The same of shared prompts, ``[N, H * max_prompt, ...]`` each; none if every row has its own."""
        return *self.shared[:2], *self.scales[2:]

    @property
    def everything(self) -> tuple[torch.Tensor, ...]:
        """Every tensor of the layer."""
        return *self.tensors, *self.shared, *self.scales

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.everything)

    def row(self, row: int, cursors: torch.Tensor) -> LayerState:
        """One row of the layer as a layer of its own, on the same memory but for its ``cursors``, int32 ``[1, 2]``."""
        of_rows = ("keys", "values", "scores", "positions", "prompt_of", "key_scales", "value_scales")
        parts = {name: tensor[row:row + 1] for name in of_rows if (tensor := getattr(self, name)) is not None}
        return replace(self, **parts, cursors=cursors)
