"""Steps of a cache's rows, counted on the host, so that running past the end raises without reading the device."""

from __future__ import annotations

from collections.abc import Sequence

from .layout import KEEP_ALL

__all__ = ["StepCounts"]


class StepCounts:
    """Decode calls of every layer, and the call at which each row last restarted."""

    def __init__(self, num_layers: int, batch_size: int, num_visual_tokens: int) -> None:
        self._num_visual_tokens = num_visual_tokens
        self._calls = [0] * num_layers
        self._started = [[0] * batch_size for _ in range(num_layers)]
        self._last_call = [num_visual_tokens] * num_layers

    def check(self, layer: int) -> None:
        """ValueError if some row of a layer has taken all its steps."""
        if self._calls[layer] >= self._last_call[layer]:
            raise ValueError(f"layer {layer} has taken all num_visual_tokens = {self._num_visual_tokens} steps of a "
                             "row; call prefill or reset to start over")

    def count(self, layer: int) -> None:
        """All rows of a layer have taken a step."""
        self._calls[layer] += 1

    def restart(self, layer: int, rows: Sequence[int], finished: bool = False) -> None:
        """Rows of a layer start over, or take no more steps until they do."""
        for row in rows:
            self._started[layer][row] = KEEP_ALL if finished else self._calls[layer]
        self._last_call[layer] = min(self._started[layer]) + self._num_visual_tokens

    def most(self, layer: int) -> int:
        """Steps that a layer's row has taken at most since it restarted."""
        return self._calls[layer] - min(self._started[layer])
