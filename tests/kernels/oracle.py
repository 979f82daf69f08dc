"""An independent oracle (docs/specification.md, section 3): float64, dense attention, explicit sets of kept tokens.

Written from the specification and not from `ssd_kernels`: it remembers every key and value ever given, keeps a python
dict of the tokens that are still kept, and knows nothing of slots, rings or blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ssd_kernels import HeadSpec

NEAR_TIE = 1e-5  # relative distance below which float32 and float64 may disagree about the order of two keys


@dataclass
class Token:
    """A kept token: its running score, and the decode steps it has been attended to."""

    score: float = 0.0
    attended: int = 0

    def key(self, rule: str) -> float:
        """What the rules `sum`, `mean` and `decayed` sort by."""
        return self.score / max(self.attended, 1) if rule == "mean" else self.score


def survivors(tokens: dict[int, Token], spec: HeadSpec, prompt_len: int) -> set[int]:
    """Rule 4: the positions that stay, of all evictable ones."""
    newest_first = sorted(tokens, reverse=True)
    if spec.kind == "full":
        return set(newest_first)
    if spec.kind == "window":
        return set(newest_first[:spec.size])
    protected, contest = newest_first[:spec.recent], newest_first[spec.recent:]
    pinned = [p for p in contest if p - prompt_len in spec.pinned]
    others = [p for p in contest if p not in pinned]
    if spec.score != "position":
        others.sort(key=lambda p: _rank(tokens[p].key(spec.score), p), reverse=True)
    return {*protected, *(pinned + others)[:spec.size - spec.recent]}


def _rank(key: float, position: int) -> tuple[bool, float, int]:
    return (False, 0.0, position) if math.isnan(key) else (True, key, position)


def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What section 3.13 stores of finite vectors ``[..., D]``: bytes int8 ``[..., D]`` and scales float32 ``[...]``.

    A quotient or product of two float32 numbers that float64 gives and float32 then rounds is the one that IEEE
    float32 gives: 53 bits are more than twice 24 and 2.
    """
    exact = x.float().double()
    amax = exact.abs().amax(-1)
    scales = (amax / 127).float()
    scales[scales < torch.finfo(torch.float32).smallest_normal] = 0.0
    inverse = (127 / amax).float().double()
    nearest = (exact * inverse[..., None]).float().round()
    data = torch.where(scales[..., None] > 0, nearest.clamp(-127, 127), 0.0)
    return data.to(torch.int8), scales


class Oracle:
    """What one layer must do, for B rows of H KV heads with G query heads each.

    Attributes:
        k, v: float64 ``[B, H, length, D]``, every key and value given, as they are read.
        contents: what slots must hold of them, ``[B, H, length, ...]`` each: keys, values and, in 8 bits, their scales.
    """

    def __init__(self, specs: Sequence[HeadSpec], *, row_buffer: int, keep_prompt: bool, batch: int, group: int,
                 head_dim: int, length: int, scale: float | None = None, kv_format: str = "auto") -> None:
        self.specs, self.row_buffer, self.keep_prompt, self.group = list(specs), row_buffer, keep_prompt, group
        self.scale = 1 / math.sqrt(head_dim) if scale is None else scale
        self.k = torch.zeros(batch, len(specs), length, head_dim, dtype=torch.float64)
        self.v = torch.zeros_like(self.k)
        self.contents = (self.k, self.v)
        if kv_format == "int8":
            data = (torch.zeros_like(self.k, dtype=torch.int8) for _ in range(2))
            scales = (torch.zeros(batch, len(specs), length) for _ in range(2))
            self.contents = (*data, *scales)
        self.kept: list[list[dict[int, Token]]] = [[{} for _ in specs] for _ in range(batch)]
        self.forgotten = torch.zeros(batch, len(specs), dtype=torch.float64)  # scores of evicted tokens
        self.prompt_len, self.step = [0] * batch, [0] * batch

    def _store(self, row: int, where: slice, k: torch.Tensor, v: torch.Tensor) -> None:
        """Remember k and v ``[H, n, D]`` of positions ``where``."""
        if len(self.contents) == 2:
            self.k[row, :, where], self.v[row, :, where] = k.double(), v.double()
            return
        for place, (given, history) in enumerate(((k, self.k), (v, self.v))):
            data, scales = quantised(given)
            self.contents[place][row, :, where], self.contents[place + 2][row, :, where] = data, scales
            history[row, :, where] = data.double() * scales.double()[..., None]

    def reset(self, row: int) -> None:
        """Empty a row."""
        self.kept[row] = [{} for _ in self.specs]
        self.forgotten[row] = 0
        self.prompt_len[row] = self.step[row] = 0

    def prefill(self, row: int, k: torch.Tensor, v: torch.Tensor, length: int, scores: torch.Tensor | None) -> None:
        """Restart ``row`` with a prompt: k, v ``[H, P, D]`` valid in ``[0, length)``, scores ``[H, P]``."""
        self.reset(row)
        self.prompt_len[row] = length
        self._store(row, slice(length), k[:, :length], v[:, :length])
        for head, spec in enumerate(self.specs):
            tokens = {p: Token(0.0 if scores is None else float(scores[head, p])) for p in range(length)}
            stay = set(tokens) if self.keep_prompt else survivors(tokens, spec, length)
            self.kept[row][head] = {p: token for p, token in tokens.items() if p in stay}

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rules 1 to 3 for every row: q ``[B, Hq, D]``, k and v ``[B, H, D]``.

        Returns:
            ``[B, Hq, D]`` in float64, and the same computation done by torch in q's own dtype.
        """
        batch, heads, length, dim = self.k.shape
        mask = torch.zeros(batch, heads, 1, length, dtype=torch.bool)
        for row in range(batch):
            position = self.prompt_len[row] + self.step[row]
            self._store(row, slice(position, position + 1), k[row, :, None], v[row, :, None])
            for head in range(heads):
                self.kept[row][head][position] = Token()
                mask[row, head, 0, list(self.kept[row][head])] = True
        queries = q.reshape(batch, heads, self.group, dim)
        keys = torch.where(mask.mT, self.k, 0)
        values = torch.where(mask.mT, self.v, 0)
        probabilities, exact = _dense(queries.double(), keys, values, mask, self.scale)
        _, native = _dense(queries, keys.to(q.dtype), values.to(q.dtype), mask, self.scale)
        given = probabilities.sum(2)
        for row in range(batch):
            for head in range(heads):
                kept_share = 0.96 if self.specs[head].score == "decayed" else 1.0
                for position, token in self.kept[row][head].items():
                    token.score = kept_share * token.score + given[row, head, position].item()
                    token.attended += 1
        return exact.reshape(q.shape), native.reshape(q.shape).double()

    def evict(self, row: int, head: int, choice: set[int]) -> None:
        """Rule 4 for one head, after `attend`, when it is due. ``choice``: the positions that the backend kept.

        Where two keys are nearly but not exactly equal, float32 may order them otherwise; the oracle follows then.
        """
        step = self.step[row]
        if self.row_buffer and (step + 1) % self.row_buffer:
            return
        first = self.prompt_len[row] if self.keep_prompt else 0
        spec, tokens = self.specs[head], self.kept[row][head]
        evictable = {p: token for p, token in tokens.items() if p >= first}
        stay = survivors(evictable, spec, self.prompt_len[row])
        chosen = {p for p in choice if p >= first}
        exact = {p for p in evictable if p - self.prompt_len[row] in spec.pinned}
        if chosen != stay and not exact & (chosen ^ stay) and _within_rounding(evictable, spec, stay, chosen):
            stay = chosen
        self.forgotten[row, head] += sum(token.score for p, token in evictable.items() if p not in stay)
        self.kept[row][head] = {p: token for p, token in tokens.items() if p < first or p in stay}

    def advance(self) -> None:
        """End the step of every row."""
        self.step = [step + 1 for step in self.step]


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor,
           scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    logits = (q @ k.mT * scale).masked_fill(~mask, -math.inf)
    probabilities = torch.softmax(logits, -1)
    return probabilities, probabilities @ v


def _within_rounding(tokens: dict[int, Token], spec: HeadSpec, stay: set[int], chosen: set[int]) -> bool:
    """Whether ``chosen`` differs from ``stay`` only in keys that float32 cannot be asked to order."""
    if spec.kind != "heavy" or spec.score == "position" or len(chosen) != len(stay) or not chosen <= set(tokens):
        return False
    lost = [tokens[p].key(spec.score) for p in stay - chosen]
    gained = [tokens[p].key(spec.score) for p in chosen - stay]
    protected = set(sorted(tokens, reverse=True)[:spec.recent])
    if not protected <= chosen or set(lost) & set(gained):  # the latter: an exact tie that went the wrong way
        return False
    return max(lost) - min(gained) <= NEAR_TIE * abs(max(lost)) + 1e-30  # False for NaN
