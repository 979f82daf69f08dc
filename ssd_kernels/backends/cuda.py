"""Backend ``cuda``: csrc/cuda, one launch per layer and step on NVIDIA GPUs, built where nvcc is at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from .. import native
from ..layout import LayerLayout
from ..state import LayerState, Rotary
from .base import Backend
from .cpu import layer_arguments

OLDEST_CAPABILITY = (8, 0)
ALIGNMENT = 16  # bytes of one asynchronous copy
ALTERNATING_BLOCKS = 6  # of a multiprocessor
SHARED_BYTES = 99 * 1024  # what a block may have on every device served


@dataclass
class Native:
    """What the backend remembers about a layer: the extension's view of it, and what split heads need.

    Attributes:
        layer: `_C.CUDALayer`.
        parts: blocks per batch row.
        arrivals: int32 ``[B, H]``, zero between launches; None if no head is split.
        items: int32 ``[parts, 12]``, what each block serves; None if the layout's ranges are unknown.
        checked_for: query heads that shared memory is known to suffice for.
    """

    layer: Any
    parts: int
    arrivals: torch.Tensor | None
    items: torch.Tensor | None
    checked_for: int = 0


def count_parts(layout: LayerLayout, heads: int, part_slots: int) -> int:
    """Blocks that one batch row needs: long heads are split by their slots, whatever the batch.

    An upper bound if the layout's ranges are unknown; blocks beyond the last part have nothing to do.
    """
    if layout.longest <= part_slots:
        return heads
    if layout.heads:
        return sum(max(1, -(-head.capacity // part_slots)) for head in layout.heads)
    return heads + (layout.slots + heads * layout.apart) // part_slots


def alternates(extension: ModuleType, capability: int, head_dim: int) -> bool:
    """Whether long and short heads start by turns, and not the longest first.

    That is where so many blocks share a multiprocessor that it stays busy at the end of a launch.

    Args:
        capability: compute capability, 80 for 8.0. head_dim: D.
    """
    blocks: int = extension.cuda_blocks_per_multiprocessor(capability, head_dim, 1)
    return blocks >= ALTERNATING_BLOCKS


class CUDABackend(Backend):
    """Blocks over (row, head), or parts of a long head; everything a step needs to know is read on the device."""

    name = "cuda"
    reads_table = False
    device_type = "cuda"

    def extension(self) -> ModuleType:
        """Where the kernels are; the tests put others here."""
        return native.extension()

    def unavailable(self) -> str | None:
        if reason := native.missing():
            return reason
        if not hasattr(self.extension(), "CUDALayer"):
            return "the extension was built without CUDA (nvcc was not found, or SSD_KERNELS_CUDA=0)"
        reason = self.extension().cuda_unavailable()
        return None if reason is None else str(reason)

    def unsupported(self, device: torch.device, dtype: torch.dtype, head_dim: int,
                    kv_format: str = "auto") -> str | None:
        if device.type != self.device_type:
            return f"it needs device {self.device_type}, got {device}"
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
            return f"it needs compute capability 8.0 or newer, got {torch.cuda.get_device_capability(device)}"
        return self.unsupported_by_kernels(dtype, head_dim, kv_format)

    def decode(self, state: LayerState, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
               scale: float, rotary: Rotary | None = None) -> torch.Tensor:
        layout, heads = state.layout, state.table.shape[0]
        known = self._native(state)
        self._check_shared(known, state, q.shape[1])
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        partials = logits = 0
        if known.arrivals is not None:
            # From torch's caching allocator, so that all layers share it and a graph keeps it.
            batch, group = q.shape[0], q.shape[1] // heads
            both = q.new_empty((batch * known.parts * group * (q.shape[2] + 2) + batch * group * layout.scored_slots,),
                               dtype=torch.float32)
            partials = both.data_ptr()
            logits = partials + 4 * batch * known.parts * group * (q.shape[2] + 2)
        known.layer.decode(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), q.shape[1],
                           *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], scale,
                           *((0, 0) if rotary is None else (table.data_ptr() for table in rotary)), partials, logits,
                           *(0 if tensor is None else tensor.data_ptr() for tensor in (known.arrivals, known.items)),
                           known.parts, layout.largest,
                           *self._place(q.device))
        return out

    def warmup(self, states: Sequence[LayerState], query_heads: int, rotary: bool) -> None:
        for state in states:
            known = self._native(state)
            self._check_shared(known, state, query_heads)
            self.decode_finished_row(state, query_heads, rotary)
            self.prefill_empty_row(state)

    def prefill(self, state: LayerState, k: torch.Tensor, v: torch.Tensor, prompt_lens: Sequence[int],
                scores: torch.Tensor | None, rows: Sequence[int]) -> None:
        if not rows:
            return
        k, v = (tensor if tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0
                else tensor.clone(memory_format=torch.contiguous_format) for tensor in (k, v))
        scores = None if scores is None else scores.contiguous()
        if 16 * k.shape[2] > SHARED_BYTES:
            raise ValueError(f"backend='cuda' takes prompts of at most {SHARED_BYTES // 16} tokens, got k with P = "
                             f"{k.shape[2]}")
        lengths, indices = (torch.tensor(list(numbers), dtype=torch.int32).to(k.device, non_blocking=True)
                            for numbers in (prompt_lens, rows))
        self._native(state).layer.prefill(k.data_ptr(), v.data_ptr(), 0 if scores is None else scores.data_ptr(),
                                          k.shape[2], len(rows), lengths.data_ptr(), indices.data_ptr(),
                                          *self._place(k.device))

    def _place(self, device: torch.device) -> tuple[int, int]:
        """The device's index and its current stream."""
        stream = torch.cuda.current_stream(device)
        return stream.device_index, stream.cuda_stream

    def _check_shared(self, known: Native, state: LayerState, query_heads: int) -> None:
        """Raise ValueError if a block cannot have the shared memory it needs."""
        if query_heads == known.checked_for:
            return
        heads, largest = state.table.shape[0], state.layout.largest
        needed = 16 * largest  # beyond it the extension's sum could overflow
        if needed <= SHARED_BYTES:
            needed = self.extension().cuda_decode_launch(1, heads, query_heads, state.keys.shape[2], known.parts,
                                                         largest, state.layout.kv_format == "int8")[2]
        if needed > SHARED_BYTES:
            raise ValueError(f"backend='cuda' cannot rank the {largest} evictable tokens of a heavy head for "
                             f"{query_heads // heads} query heads: that takes at least {needed} bytes of shared "
                             f"memory, more than {SHARED_BYTES}")
        known.checked_for = query_heads

    def _native(self, state: LayerState) -> Native:
        """The extension's view of the layer's tensors, made once: their addresses never change."""
        if isinstance(state.native, Native):
            return state.native
        layout, heads, extension = state.layout, state.table.shape[0], self.extension()
        names = ("keys", "values", "prompt_keys", "prompt_values")
        for name, slab in zip(names, (state.keys, state.values, *state.shared[:2]), strict=False):
            if slab.data_ptr() % ALIGNMENT:
                raise ValueError(f"{name} must start at a multiple of {ALIGNMENT} bytes, got address {slab.data_ptr()}")
        parts = count_parts(layout, heads, extension.CUDA_PART_SLOTS)
        if parts > extension.CUDA_MAX_PARTS or layout.num_visual_tokens > extension.CUDA_MAX_STEPS:
            raise ValueError(f"backend='cuda' serves layers of at most {extension.CUDA_MAX_PARTS} parts of "
                             f"{extension.CUDA_PART_SLOTS} slots and {extension.CUDA_MAX_STEPS} visual tokens, got "
                             f"{parts} and {layout.num_visual_tokens}")
        arrivals = None
        if parts > heads:
            arrivals = torch.zeros((state.keys.shape[0], heads), dtype=torch.int32, device=state.keys.device)
        layer = extension.CUDALayer(*layer_arguments(state))
        if state.keys.is_cuda and torch.cuda.is_current_stream_capturing():
            # Counters made now are zero only in replays of the graph, so they are its alone; and nothing may be copied
            # to the device.
            return Native(layer, parts, arrivals, None)
        known = Native(layer, parts, arrivals, self._list_items(state, layer, parts))
        state.native = known
        return known

    def _list_items(self, state: LayerState, layer: Any, parts: int) -> torch.Tensor | None:
        """What each block of a row serves, on the device: see csrc/cuda/decode.h."""
        if not state.layout.heads:
            return None
        table, extension = state.layout.table(), self.extension()
        items = torch.empty((parts, extension.CUDA_ITEM_WORDS), dtype=torch.int32)
        alternating = alternates(extension, self._capability(state.keys.device), state.keys.shape[2])
        layer.list_items(table.data_ptr(), alternating, items.data_ptr())
        return items.to(state.keys.device)

    def _capability(self, device: torch.device) -> int:
        """The device's compute capability, 80 for 8.0."""
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
