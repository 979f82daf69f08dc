"""Backend ``cpu``: csrc/cpu, one call per layer and step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import native
from ..state import LayerState, Rotary
from .base import Backend

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class CPUBackend(Backend):
    """Parallel over (row, head) on torch's OpenMP threads; AVX-512, AVX2 or portable code, chosen at run time."""

    name = "cpu"

    def unavailable(self) -> str | None:
        return native.missing()

    def unsupported(self, device: torch.device, dtype: torch.dtype, head_dim: int,
                    kv_format: str = "auto") -> str | None:
        if device.type != "cpu":
            return f"it needs device cpu, got {device}"
        return self.unsupported_by_kernels(dtype, head_dim, kv_format)

    def decode(self, state: LayerState, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
               scale: float, rotary: Rotary | None = None) -> torch.Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        native_layer(state).decode(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), q.shape[1],
                             *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], scale,
                             *((0, 0) if rotary is None else (table.data_ptr() for table in rotary)),
                             torch.get_num_threads())
        return out

    def prefill(self, state: LayerState, k: torch.Tensor, v: torch.Tensor, prompt_lens: Sequence[int],
                scores: torch.Tensor | None, rows: Sequence[int]) -> None:
        k, v = k.contiguous(), v.contiguous()
        scores = None if scores is None else scores.contiguous()
        native_layer(state).prefill(k.data_ptr(), v.data_ptr(), 0 if scores is None else scores.data_ptr(), k.shape[2],
                              list(prompt_lens), list(rows), torch.get_num_threads())


def layer_arguments(state: LayerState) -> tuple[int | bool, ...]:
    """What the extension's views of a layer are made with."""
    layout = state.layout
    return (*(tensor.data_ptr() for tensor in state.tensors), DTYPE_CODES[state.dtype], state.keys.shape[0],
            state.table.shape[0], state.keys.shape[2], layout.slots, layout.scored_slots, layout.max_prompt,
            layout.num_visual_tokens, layout.row_buffer, layout.keep_prompt,
            *([tensor.data_ptr() for tensor in state.shared] or (0, 0, 0)), layout.shared_prompts,
            layout.prompt_scores, *_scale_addresses(state))


def _scale_addresses(state: LayerState) -> list[int]:
    """Of the scales of keys, of values, and of the shared prompts' keys and values; 0: there are none."""
    every = state.key_scales, state.value_scales, state.prompt_key_scales, state.prompt_value_scales
    return [0 if tensor is None else tensor.data_ptr() for tensor in every]


def native_layer(state: LayerState) -> Any:
    """The extension's view of the layer's tensors, made once: their addresses never change."""
    if state.native is None:
        state.native = native.extension().Layer(*layer_arguments(state))
    return state.native
