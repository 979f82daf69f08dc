"""Backend ``triton``: ssd_kernels/triton, one launch per layer and step on NVIDIA GPUs; no compiler to install."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from ..state import LayerState, Rotary
from ..triton import launch
from .base import Backend

WORD_BYTES = 4

class TritonBackend(Backend):
    """Programs over (row, head); everything a step needs to know is read on the device.

    Triton launches on the current device, which need not be the tensors'.
    """

    name = "triton"
    reads_table = False

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed: pip install '.[triton]' in a checkout of ssd_kernels"
        return None if torch.cuda.is_available() else "no CUDA device"

    def unsupported(self, device: torch.device, dtype: torch.dtype, head_dim: int,
                    kv_format: str = "auto") -> str | None:
        if device.type != "cuda":
            return f"it needs device cuda, got {device}"
        return self.unsupported_by_kernels(dtype, head_dim, kv_format)

    def kernels(self) -> Any:
        """The kernels; the tests put others here."""
        return _kernels()

    def capability(self, device: torch.device) -> int:
        """The device's compute capability, 80 for 8.0."""
        return _capability(device)

    def decode(self, state: LayerState, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
               scale: float, rotary: Rotary | None = None) -> torch.Tensor:
        layout, (batch, slots, head_dim), heads = state.layout, state.keys.shape, state.table.shape[0]
        group = q.shape[1] // heads
        launch.check_limits(heads, layout.num_visual_tokens)
        _check_words(state)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        # From torch's caching allocator, so that all layers share it and a graph keeps it.
        logits = torch.empty((batch, group, layout.scored_slots), dtype=torch.float32, device=q.device)
        constants, options = launch.decode_constants(
            head_dim, q.element_size(), group, layout.row_buffer, layout.largest, layout.scored_slots > 0,
            layout.keep_prompt, rotary is not None, self.capability(q.device), bool(state.shared),
            layout.prompt_scores, layout.kv_format == "int8")
        with torch.cuda.device(q.get_device()):
            self.kernels().decode_kernel[(batch * heads,)](
                q, k, v, *state.tensors, out, logits, logits.view(torch.int32),
                *(rotary or (state.scores, state.scores)), *(state.shared or (state.keys, state.keys, state.table)),
                *_scales(state),
                *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], batch, heads, slots, layout.scored_slots,
                layout.max_prompt, layout.num_visual_tokens, layout.pin_words, max(layout.row_buffer, 1),
                layout.shared_prompts, scale,
                **constants, **options)
        return out

    def warmup(self, states: Sequence[LayerState], query_heads: int, rotary: bool) -> None:
        for state in states:
            self.decode_finished_row(state, query_heads, rotary)
            self.prefill_empty_row(state)

    def prefill(self, state: LayerState, k: torch.Tensor, v: torch.Tensor, prompt_lens: Sequence[int],
                scores: torch.Tensor | None, rows: Sequence[int]) -> None:
        layout, heads = state.layout, state.table.shape[0]
        launch.check_limits(heads, layout.num_visual_tokens)
        if not rows:
            return
        _check_words(state)
        k, v = k.contiguous(), v.contiguous()
        scores = None if scores is None else scores.contiguous()
        # Of the longest prompt that the cache may get, not of this one: the same kernel for all of them.
        longest = max(layout.max_prompt, launch.MIN_EVICT_BLOCK)
        constants, options = launch.prefill_constants(k.shape[3], k.element_size(), longest, layout.keep_prompt,
                                                      scores is not None, layout.kv_format == "int8")
        lengths, indices = (torch.tensor(list(numbers), dtype=torch.int32).to(k.device, non_blocking=True)
                            for numbers in (prompt_lens, rows))
        slot_list = torch.empty((len(rows), heads, constants["PROMPT_BLOCK"]), dtype=torch.int32, device=k.device)
        with torch.cuda.device(k.get_device()):
            self.kernels().prefill_kernel[(len(rows), heads)](
                k, v, k if scores is None else scores, lengths, indices, *state.tensors,
                *_scales(state)[:2], slot_list, k.shape[2], heads, state.keys.shape[1],
                layout.scored_slots, layout.max_prompt, layout.num_visual_tokens, layout.pin_words,
                **constants, **options)


def _scales(state: LayerState) -> tuple[torch.Tensor, ...]:
    """Scales of keys, of values, and of shared prompts' keys and values; others in the place of those there are not."""
    every = state.key_scales, state.value_scales, state.prompt_key_scales, state.prompt_value_scales
    return tuple(state.scores if tensor is None else tensor for tensor in every)


def _check_words(state: LayerState) -> None:
    """Raise ValueError if bytes cannot be read by fours."""
    if state.layout.kv_format != "int8":
        return
    names = ("keys", "values", "prompt_keys", "prompt_values")
    for name, slab in zip(names, (state.keys, state.values, *state.shared[:2]), strict=False):
        if slab.data_ptr() % WORD_BYTES:
            raise ValueError(f"{name} must start at a multiple of {WORD_BYTES} bytes with kv_format='int8', got "
                             f"address {slab.data_ptr()}")


@cache
def _kernels() -> Any:
    """The kernels: importing them imports Triton, which `import ssd_kernels` must not."""
    from ..triton.decode import decode_kernel
    from ..triton.prefill import prefill_kernel

    return SimpleNamespace(decode_kernel=decode_kernel, prefill_kernel=prefill_kernel)


@cache
def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
