"""Where a plan's tokens live: slot ranges, the head table, the pin mask, and the arithmetic from cursors to slots.

The same arithmetic stands in csrc/common/layout.h for the compiled backends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from .arguments import check_int
from .heads import SCORE_RULES, HeadSpec
from .kv_format import vector_bytes
from .reading import shown

KEEP_ALL = 2**31 - 1
TABLE_COLUMNS = 8
RECENT = 4  # the head table's column of protected newest tokens
WORD_BITS = 32
KIND_CODES = {"full": 0, "window": 1, "heavy": 2}


class Rules(Protocol):
    """What a plan says for all heads alike; `CachePlan` says it."""

    @property
    def row_buffer(self) -> int: ...
    @property
    def keep_prompt(self) -> bool: ...
    @property
    def kv_format(self) -> str: ...


def peak_tokens(keep: int | None, first: int, num_visual_tokens: int, row_buffer: int) -> int:
    """Largest number of evictable tokens a head ever holds, the newest one before its eviction included.

    Tokens are evicted down to ``keep`` at the end of every block of ``max(row_buffer, 1)`` steps.

    Args:
        keep: W or M; None keeps everything.
        first: evictable tokens present before the first step (the prompt when it is not kept for good, else 0).
        num_visual_tokens: decode steps of a whole picture.
        row_buffer: R, in steps.
    """
    if keep is None:
        return first + num_visual_tokens
    period = max(row_buffer, 1)
    # The count only ever falls at block ends, so its maximum is at the end of the last whole block or of the rest.
    last_whole = num_visual_tokens // period * period
    starts_and_ends = [(last_whole, num_visual_tokens)]
    if last_whole:
        starts_and_ends.append((last_whole - period, last_whole))
    return max(min(keep, first + start) + end - start for start, end in starts_and_ends)


@dataclass(frozen=True)
class HeadRange:
    """The slots of one KV head inside a layer's slab.

    A head's range starts with the prompt (``prompt_len`` slots, when the prompt is kept), directly followed by its
    evictable tokens: a ring of ``ring`` slots for full and window heads, a packed set for heavy heads. Where rows share
    prompts these lie in a slab of their own, and the range in the rows' slab starts with the evictable tokens; slots
    are numbered as if the prompt came before them all the same.

    Attributes:
        kind: ``"full"``, ``"window"`` or ``"heavy"``.
        offset: first slot of the range in the slab.
        capacity: slots of the head, the prompt's included wherever it lies.
        keep: W or M; `KEEP_ALL` for full heads.
        recent: protected newest tokens of a heavy head.
        rule: index into `SCORE_RULES`.
        score_offset: first entry of the range in the layer's scores and positions, or -1 when not scored.
        ring: evictable tokens the range has room for.
    """

    kind: str
    offset: int
    capacity: int
    keep: int
    recent: int
    rule: int
    score_offset: int
    ring: int


@dataclass(frozen=True)
class LayerLayout:
    """Slot ranges of all KV heads of one layer.

    Attributes:
        heads: one range per KV head, in head order, contiguous.
        slots: slots per batch row, over all heads.
        scored_slots: slots per batch row that carry a score and a position.
        max_prompt, num_visual_tokens, row_buffer, keep_prompt: as given to the cache; ``row_buffer`` is R, at most
            `KEEP_ALL`.
        largest: evictable tokens that the largest heavy head has room for, 0 without heavy heads.
        longest: slots of the longest head.
        shared_prompts: prompts in a slab of their own, which rows share; 0: every row has its own prompt.
        prompt_scores: scored heads have scores of prompt tokens that are kept. Only with ``shared_prompts`` it may be
            False.
        kv_format: how slots hold keys and values, see `ssd_kernels.kv_format`.
    """

    heads: tuple[HeadRange, ...]
    slots: int
    scored_slots: int
    max_prompt: int
    num_visual_tokens: int
    row_buffer: int
    keep_prompt: bool
    largest: int
    longest: int
    shared_prompts: int = 0
    prompt_scores: bool = True
    kv_format: str = "auto"

    @classmethod
    def build(cls, specs: Sequence[HeadSpec], plan: Rules, max_prompt: int, num_visual_tokens: int,
              track_scores: bool = False, shared_prompts: int | None = None) -> LayerLayout:
        """Lay out one layer's heads one after the other.

        Args:
            track_scores: gives all heads scores, not only heavy ones, and all kept tokens, not only visual ones.
            shared_prompts: prompts that rows share; None gives every row room for its own.

        Raises:
            TypeError, ValueError: ``max_prompt``, ``num_visual_tokens`` or ``shared_prompts`` is no int, or too small
                or too large; or prompts that may be evicted would be shared.
        """
        check_int("max_prompt", max_prompt, 0)
        check_int("num_visual_tokens", num_visual_tokens, 1)
        if max_prompt + num_visual_tokens > KEEP_ALL:
            raise ValueError(f"max_prompt and num_visual_tokens must be together at most {KEEP_ALL}, got "
                             f"{shown(max_prompt)} and {shown(num_visual_tokens)}")
        if shared_prompts is not None:
            check_shared_prompts(shared_prompts, plan.keep_prompt)
        apart = 0 if shared_prompts is None else max_prompt
        unscored = 0 if track_scores else apart
        heads: list[HeadRange] = []
        offset = score_offset = 0
        for spec in specs:
            evictable_prompt = 0 if plan.keep_prompt else max_prompt
            ring = peak_tokens(spec.size, evictable_prompt, num_visual_tokens, plan.row_buffer)
            capacity = ring + max_prompt - evictable_prompt
            scored = track_scores or spec.kind == "heavy"
            keep = KEEP_ALL if spec.size is None else min(spec.size, KEEP_ALL)
            heads.append(HeadRange(spec.kind, offset, capacity, keep, min(spec.recent, keep),
                                   SCORE_RULES.index(spec.score), score_offset if scored else -1, ring))
            offset += capacity - apart
            score_offset += capacity - unscored if scored else 0
        together = sum(head.capacity for head in heads)
        if together > KEEP_ALL:
            raise ValueError(f"max_prompt = {max_prompt} and num_visual_tokens = {num_visual_tokens} give the heads of "
                             f"a layer {together} slots together, more than {KEEP_ALL}")
        return cls(tuple(heads), offset, score_offset, max_prompt, num_visual_tokens, min(plan.row_buffer, KEEP_ALL),
                   plan.keep_prompt, max((head.ring for head in heads if head.kind == "heavy"), default=0),
                   max(head.capacity for head in heads), shared_prompts or 0, not unscored, plan.kv_format)

    def table(self) -> torch.Tensor:
        """Head table int32 [num_heads, 8]: kind, offset, capacity, keep, recent, rule, score_offset, launch order.

        Launch order lists the heads by falling capacity, so that the longest start first.
        """
        order = sorted(range(len(self.heads)), key=lambda head: -self.heads[head].capacity)
        rows = [[KIND_CODES[head.kind], head.offset, head.capacity, head.keep, head.recent, head.rule,
                 head.score_offset, order[index]] for index, head in enumerate(self.heads)]
        return torch.tensor(rows, dtype=torch.int32)

    @classmethod
    def from_table(cls, table: torch.Tensor, slots: int, scored_slots: int, max_prompt: int, num_visual_tokens: int,
                   row_buffer: int, keep_prompt: bool, largest: int, longest: int, shared_prompts: int = 0,
                   prompt_scores: bool = True, kv_format: str = "auto", read: bool = True) -> LayerLayout:
        """The layout whose `table` this is.

        Args:
            read: False leaves ``heads`` empty and the table's values unread: on a GPU, reading waits for the device.

        Raises:
            ValueError: the table is not int32 [num_heads, 8], or a range leaves the slab, cannot hold what its head
                may keep, is heavy and larger than ``largest``, or is longer than ``longest``.
        """
        if table.dtype != torch.int32 or table.dim() != 2 or table.shape[1] != TABLE_COLUMNS \
                or not table.is_contiguous():
            raise ValueError(f"table must be contiguous int32 [num_heads, {TABLE_COLUMNS}], got {table.dtype} "
                             f"{list(table.shape)} with strides {table.stride()}")
        check_int("max_prompt", max_prompt, 0)
        check_int("num_visual_tokens", num_visual_tokens, 1)
        check_int("row_buffer", row_buffer, 0)
        check_int("largest", largest, 0)
        check_int("longest", longest, 0)
        if shared_prompts:
            check_shared_prompts(shared_prompts, keep_prompt)
        layout = cls((), slots, scored_slots, max_prompt, num_visual_tokens, row_buffer, keep_prompt, largest, longest,
                     shared_prompts, prompt_scores or not shared_prompts, kv_format)
        if not read:
            return layout
        evictable_prompt = 0 if keep_prompt else max_prompt
        kinds = {code: kind for kind, code in KIND_CODES.items()}
        heads = []
        for index, (kind, offset, capacity, keep, recent, rule, score_offset, _) in enumerate(table.tolist()):
            ring = capacity - max_prompt + evictable_prompt
            needed = peak_tokens(keep, evictable_prompt, num_visual_tokens, row_buffer)
            inside = 0 <= offset and 0 <= recent <= keep and needed <= ring
            inside = inside and offset + capacity - layout.apart <= slots
            unscored = score_offset == -1 and kind != KIND_CODES["heavy"]
            scored = 0 <= score_offset <= scored_slots - capacity + layout.unscored
            inside = inside and capacity <= longest and (ring <= largest or kind != KIND_CODES["heavy"])
            if kind not in kinds or not 0 <= rule < len(SCORE_RULES) or not inside or not (scored or unscored):
                raise ValueError(f"table row {index} does not describe a range within {slots} slots and "
                                 f"{scored_slots} scores: {table[index].tolist()}")
            heads.append(HeadRange(kinds[kind], offset, capacity, keep, recent, rule, score_offset, ring))
        return replace(layout, heads=tuple(heads))

    @property
    def apart(self) -> int:
        """Slots of every head that are in the slab of shared prompts and not in the rows' slab."""
        return self.max_prompt if self.shared_prompts else 0

    @property
    def unscored(self) -> int:
        """Slots of every scored head without score and position: those of kept prompts, where it is not asked for."""
        return 0 if self.prompt_scores else self.max_prompt

    @property
    def pin_words(self) -> int:
        """int32 words of one head's pin mask: a bit per visual token."""
        return -(-self.num_visual_tokens // WORD_BITS)

    def pin_mask(self, specs: Sequence[HeadSpec]) -> torch.Tensor:
        """The heads' pinned tokens, int32 [num_heads, pin_words]: visual token t is bit t % 32 of word t // 32."""
        rows = [[0] * self.pin_words for _ in specs]
        for row, spec in zip(rows, specs, strict=True):
            for token in spec.pinned:
                if token < self.num_visual_tokens:
                    row[token // WORD_BITS] |= 1 << token % WORD_BITS
        return torch.tensor(rows, dtype=torch.uint32).view(torch.int32)

    def nbytes(self, batch_size: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of one layer: K and V slabs, scales and scores (float32), positions, cursors, table, pin mask (int32).

        Where prompts are shared: their K and V slabs and scales and the rows' numbers of prompts (int32), too.
        """
        slots = batch_size * self.slots + self.shared_prompts * len(self.heads) * self.apart
        per_row = 8 * self.scored_slots + 8 + (4 if self.shared_prompts else 0)
        per_head = 4 * (TABLE_COLUMNS + self.pin_words)
        stored = 2 * slots * vector_bytes(self.kv_format, head_dim, dtype)
        return stored + batch_size * per_row + per_head * len(self.heads)


def check_shared_prompts(shared_prompts: int, keep_prompt: bool) -> None:
    """Raise TypeError or ValueError unless rows can share so many prompts."""
    if check_int("shared_prompts", shared_prompts, 1) > KEEP_ALL:
        raise ValueError(f"shared_prompts must be at most {KEEP_ALL}, got {shown(shared_prompts)}")
    if not keep_prompt:
        raise ValueError(f"shared_prompts must be None with keep_prompt=False, for rows evict on their own, got "
                         f"{shared_prompts}")


def pinned_tokens(words: Sequence[int], num_visual_tokens: int) -> set[int]:
    """The visual tokens whose bits are set in one head's row of `LayerLayout.pin_mask`."""
    return {t for t in range(num_visual_tokens) if words[t // WORD_BITS] >> t % WORD_BITS & 1}


@dataclass(frozen=True)
class RowView:
    """Slot arithmetic of one (batch row, head) from its cursors; nothing here reads a tensor.

    Evictable tokens carry an index: visual token t has index ``first + t``, where ``first`` counts the prompt
    tokens that are evictable. Slots are relative to the head's range.

    Attributes:
        head: the head's range.
        base: slots that are never evicted (the prompt, when kept); evictable slots follow.
        first: evictable prompt tokens.
        step: visual tokens appended so far.
        period: steps between evictions, max(R, 1).
        apart: slots, the first ones, that are in the slab of shared prompts.
        unscored: slots, the first ones, without score and position.
    """

    head: HeadRange
    base: int
    first: int
    step: int
    period: int
    apart: int
    unscored: int

    @classmethod
    def of(cls, layout: LayerLayout, head: int, prompt_len: int, step: int) -> RowView:
        base = prompt_len if layout.keep_prompt else 0
        return cls(layout.heads[head], base, prompt_len - base, step, max(layout.row_buffer, 1),
                   base if layout.shared_prompts else 0, 0 if layout.prompt_scores else base)

    @property
    def origin(self) -> int:
        """What to add to a slot from ``apart`` on to find it in the row's slab."""
        return self.head.offset - self.apart

    @property
    def score_origin(self) -> int:
        """What to add to a slot from ``unscored`` on of a scored head to find its score and position."""
        return self.head.score_offset - self.unscored

    @property
    def evictable(self) -> int:
        """Evictable tokens held now, between two steps."""
        block = self.step // self.period * self.period
        return min(self.head.keep, self.first + block) + self.step - block

    @property
    def next_slot(self) -> int:
        """Slot of the token that the next step appends."""
        if self.head.kind == "heavy":
            return self.base + self.evictable
        return self.base + (self.first + self.step) % self.head.ring

    def slots(self, appended: int = 0) -> list[int]:
        """Slots of the kept set in order of age (heavy heads: in slot order), prompt first.

        Args:
            appended: 1 counts the token appended in the current, unfinished step as kept.
        """
        count = self.evictable + appended
        if self.head.kind == "heavy":
            return list(range(self.base + count))
        newest = self.first + self.step + appended
        ring = [self.base + index % self.head.ring for index in range(newest - count, newest)]
        return list(range(self.base)) + ring

    def positions(self, appended: int = 0) -> list[int]:
        """Positions of a full or window head's kept set, aligned with `slots`."""
        count = self.evictable + appended
        newest = self.base + self.first + self.step + appended
        return list(range(self.base)) + list(range(newest - count, newest))
