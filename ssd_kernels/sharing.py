"""Prompts that rows share (docs/specification.md, section 3.12): which row reads which, and storing them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .arguments import integers
from .kv_format import encoded
from .layout import LayerLayout, Rules
from .reading import shown
from .state import LayerState

__all__ = ["PromptShares", "checked_share", "store"]


class PromptShares:
    """Which of one layer's shared prompts each batch row reads, known to the host: who restarts lets go of it.

    Attributes:
        count: prompts that the layer has room for.
        of_row: a prompt's number by row; -1: the row has none.
    """

    def __init__(self, count: int, batch_size: int) -> None:
        self.count = count
        self.of_row = [-1] * batch_size

    def place(self, rows: Sequence[int], share: Sequence[int]) -> dict[int, int]:
        """Where to store what ``rows`` restart with; changes nothing.

        Args:
            rows: batch rows, each at most once. share: which of the given prompts each of them takes.

        Returns:
            a free prompt's number for every given prompt that is taken.

        Raises:
            ValueError: there are not so many.
        """
        restarted = set(rows)
        held = {prompt for row, prompt in enumerate(self.of_row) if row not in restarted and prompt >= 0}
        free = [prompt for prompt in range(min(self.count, len(held) + len(rows))) if prompt not in held]
        taken = sorted(set(share))
        if len(taken) > len(free):
            raise ValueError(f"share must name at most {self.count - len(held)} different prompts, for the cache has "
                             f"shared_prompts = {self.count} and other rows hold {len(held)} of them, got {len(taken)}")
        return dict(zip(taken, free, strict=False))

    def assign(self, rows: Sequence[int], share: Sequence[int], places: dict[int, int]) -> None:
        """The rows read their new prompts from now on, and no longer their old ones."""
        for row, entry in zip(rows, share, strict=True):
            self.of_row[row] = places[entry]

    def release(self, rows: Sequence[int]) -> None:
        """The rows have no prompt any more."""
        for row in rows:
            self.of_row[row] = -1


def checked_share(share: Sequence[int] | torch.Tensor, prompts: int, rows: Sequence[int],
                  plan: Rules) -> list[int]:
    """Which of the given ``prompts`` each of the rows takes.

    Raises:
        TypeError, ValueError: not so, or rows may evict prompt tokens.
    """
    if not plan.keep_prompt:
        raise ValueError("share must be None with keep_prompt=False, for rows evict prompt tokens on their own, got "
                         f"{shown(share)}")
    entries = integers("share", share)
    if len(entries) != len(rows):
        raise ValueError(f"share must hold a number for each of the {len(rows)} rows, got {len(entries)}")
    for index, entry in enumerate(entries):
        if not 0 <= entry < prompts:
            raise ValueError(f"share[{index}] must be within 0 .. {prompts - 1}, the prompts given, got {entry}")
    return entries


@torch.no_grad()
def store(state: LayerState, k: torch.Tensor, v: torch.Tensor, prompt_lens: Sequence[int],
          scores: torch.Tensor | None, rows: Sequence[int], share: Sequence[int], places: dict[int, int]) -> None:
    """Restart ``rows`` of a layer with shared prompts, on any device; reads nothing back from it.

    Args:
        state: the layer's cache, changed in place.
        k, v: ``[M, H, P, D]``; of entry i the first ``prompt_lens[i]`` positions are valid.
        prompt_lens: prompt length of each of the M entries.
        scores: float32 ``[M, H, P]`` to start from, or None for zeros. Only where prompt tokens have scores.
        rows: batch rows, each at most once. share: the entry that each of them takes.
        places: where to store each entry that is taken, see `PromptShares.place`.
    """
    if state.prompt_of is None:
        raise ValueError("state must have been allocated with shared prompts")
    if not rows:
        return
    layout, heads = state.layout, state.table.shape[0]
    for length in {prompt_lens[entry] for entry in places}:
        entries = [entry for entry in places if prompt_lens[entry] == length]
        source, target = _indices(entries, k.device), _indices([places[entry] for entry in entries], k.device)
        held = encoded(layout.kv_format, *(given[:, :, :length].index_select(0, source) for given in (k, v)))
        for slab, given in zip(state.prompt_slabs, held, strict=True):
            prompts = slab.view(layout.shared_prompts, heads, layout.max_prompt, *slab.shape[2:])
            prompts[:, :, :length].index_copy_(0, target, given)
    if layout.prompt_scores:
        _start_scores(state, layout, prompt_lens, scores, rows, share)
    at = _indices(rows, k.device)
    state.prompt_of.index_copy_(0, at, _indices([places[entry] for entry in share], k.device).to(torch.int32))
    state.cursors.index_copy_(0, at, _indices([[prompt_lens[entry], 0] for entry in share], k.device).to(torch.int32))


def _start_scores(state: LayerState, layout: LayerLayout, prompt_lens: Sequence[int], scores: torch.Tensor | None,
                  rows: Sequence[int], share: Sequence[int]) -> None:
    """Scores and positions of the prompt tokens, of every row for itself."""
    device = state.scores.device
    for length in {prompt_lens[entry] for entry in share}:
        pairs = [(row, entry) for row, entry in zip(rows, share, strict=True) if prompt_lens[entry] == length]
        at, source = (_indices(numbers, device) for numbers in zip(*pairs, strict=True))
        for head, span in enumerate(layout.heads):
            if span.score_offset < 0:
                continue
            slots = slice(span.score_offset, span.score_offset + length)
            state.scores[at, slots] = 0.0 if scores is None else scores[source, head, :length]
            state.positions[at, slots] = torch.arange(length, dtype=torch.int32, device=device)


def _indices(numbers: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.long).to(device, non_blocking=True)
