"""Backend ``reference``: plain torch on any device and dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import reference
from ..state import LayerState, Rotary
from .base import Backend


class ReferenceBackend(Backend):
    """Gives no gradients, as the other backends do not."""

    name = "reference"

    def unavailable(self) -> str | None:
        return None

    def unsupported(self, device: torch.device, dtype: torch.dtype, head_dim: int,
                    kv_format: str = "auto") -> str | None:
        return None

    @torch.no_grad()
    def decode(self, state: LayerState, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
               scale: float, rotary: Rotary | None = None) -> torch.Tensor:
        return reference.decode(state, q, k, v, scale, rotary)

    @torch.no_grad()
    def prefill(self, state: LayerState, k: torch.Tensor, v: torch.Tensor, prompt_lens: Sequence[int],
                scores: torch.Tensor | None, rows: Sequence[int]) -> None:
        reference.prefill(state, k, v, prompt_lens, scores, rows)

    @torch.no_grad()
    def prefill_shared(self, state: LayerState, k: torch.Tensor, v: torch.Tensor, prompt_lens: Sequence[int],
                       scores: torch.Tensor | None, rows: Sequence[int], share: Sequence[int],
                       places: dict[int, int]) -> None:
        for entry in places:
            reference.check_finite(state.layout, k[entry, :, :prompt_lens[entry]], v[entry, :, :prompt_lens[entry]])
        super().prefill_shared(state, k, v, prompt_lens, scores, rows, share, places)
