"""What a backend must offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch

from .. import sharing
from ..kv_format import KV_FORMATS
from ..state import LayerState, Rotary

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Backend(ABC):
    """Computes docs/specification.md, section 3, on a `LayerState`. The caller has validated the arguments.

    Shapes: q ``[B, Hq, D]``, k and v ``[B, H, D]``, each with a unit stride in the last dimension.
    """

    name: ClassVar[str]
    reads_table: ClassVar[bool] = True  # on the host; if False, ``state.layout.heads`` may be empty
    kv_formats: ClassVar[tuple[str, ...]] = KV_FORMATS

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why this backend cannot run on this machine, or None when it can."""

    @abstractmethod
    def unsupported(self, device: torch.device, dtype: torch.dtype, head_dim: int,
                    kv_format: str = "auto") -> str | None:
        """Why this backend cannot serve such tensors and caches, or None when it can."""

    def unsupported_by_kernels(self, dtype: torch.dtype, head_dim: int, kv_format: str) -> str | None:
        """The part of `unsupported` that all compiled backends share: types and head size."""
        if kv_format not in self.kv_formats:
            return f"kv_format={kv_format!r} is not supported by backend {self.name!r}"
        if dtype not in KERNEL_DTYPES:
            return f"it needs dtype float32, bfloat16 or float16, got {dtype}"
        if head_dim % 8 or not 32 <= head_dim <= 256:
            return f"it needs head_dim to be a multiple of 8 within 32 .. 256, got {head_dim}"
        return None

    @abstractmethod
    def decode(self, state: LayerState, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
               scale: float, rotary: Rotary | None = None) -> torch.Tensor:
        """One decode step; see `ssd_kernels.reference.decode`."""

    def warmup(self, states: Sequence[LayerState], query_heads: int, rotary: bool) -> None:
        """Compile or load what `decode` and `prefill` of these layers will run, by default nothing; they stay as they
        are."""
        return None

    def decode_finished_row(self, state: LayerState, query_heads: int, rotary: bool) -> None:
        """One `decode` of a row that has no step left, which kernels leave as it is: a `warmup` of what a GPU runs."""
        row = self._first_row(state, state.layout.num_visual_tokens)
        q, k = (state.keys.new_zeros((1, heads, state.keys.shape[2]), dtype=state.dtype)
                for heads in (query_heads, state.table.shape[0]))
        tables = k.new_zeros((1, k.shape[2] // 2), dtype=torch.float32)
        self.decode(row, q, k, k, 1.0, (tables, tables) if rotary else None)

    def prefill_empty_row(self, state: LayerState) -> None:
        """One `prefill` of a prompt without tokens, which stores nothing: a `warmup` of what a GPU runs.

        Not where rows share prompts: torch's own operations store these (`ssd_kernels.sharing.store`).
        """
        if state.shared:
            return
        k = state.keys.new_zeros((1, state.table.shape[0], 1, state.keys.shape[2]), dtype=state.dtype)
        self.prefill(self._first_row(state, 0), k, k, [0], None, [0])

    @staticmethod
    def _first_row(state: LayerState, step: int) -> LayerState:
        """The first row of a layer, with cursors of its own that say it is at ``step`` after an empty prompt."""
        return state.row(0, torch.tensor([[0, step]], dtype=torch.int32, device=state.keys.device))

    @abstractmethod
    def prefill(self, state: LayerState, k: torch.Tensor, v: torch.Tensor, prompt_lens: Sequence[int],
                scores: torch.Tensor | None, rows: Sequence[int]) -> None:
        """Restart rows with new prompts; see `ssd_kernels.reference.prefill`."""

    def prefill_shared(self, state: LayerState, k: torch.Tensor, v: torch.Tensor, prompt_lens: Sequence[int],
                       scores: torch.Tensor | None, rows: Sequence[int], share: Sequence[int],
                       places: dict[int, int]) -> None:
        """Restart rows with prompts that they share; see `ssd_kernels.sharing.store`."""
        sharing.store(state, k, v, prompt_lens, scores, rows, share, places)
