"""Slots of one cache, whose step is one graph, whoever joins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ssd_kernels import CompressedCache
from ssd_kernels.filters import PerPicture
from ssd_kernels.sampling import sample_in_one_launch

from .capture import CapturedStep
from .sampling import signed
from .slots import Kept, Lineup, PictureRequest, Slots

if TYPE_CHECKING:
    from .engine import Engine


class OneCache(Slots):
    """One cache with two rows for every slot, and a step of all rows that reads buffers which stay where they are:
    one graph, whoever joins. Rows without a picture are finished ones, which kernels leave alone."""

    any_plan = False

    def __init__(self, engine: Engine, capacity: int, max_prompt: int, steps: int) -> None:
        super().__init__(engine, capacity, max_prompt, steps)
        self._all = AllRows(self)
        self._captured = CapturedStep(self._all) if engine.capture else None

    @property
    def nbytes(self) -> int:
        return self._all.cache.nbytes

    def check(self, request: PictureRequest) -> None:
        super().check(request)
        if not request.sampling.greedy and request.sampling.numbers is None:
            raise ValueError("sampling must be greedy, or by temperature, top-k and top-p in this order, for all slots "
                             f"draw in one launch, got {request.sampling}")

    def prepare(self, lineup: Lineup) -> None:
        pass

    def store(self, lineup: Lineup, part: Kept, kept: list[Kept]) -> None:
        kept.append(part)  # a layer that has started goes on with every step

    def _first(self, lineup: Lineup, logits: torch.Tensor, kept: Sequence[Kept]) -> None:
        everything, slots = self._all, [picture.slot for picture in lineup.pictures]
        rows = [*slots, *(self.capacity + slot for slot in slots[:len(lineup.scale)])]
        for group, layer, keys, values in kept:
            replace(group, rows=[rows[row] for row in group.rows]).start(everything.cache, layer, keys, values)
        requests, device = [picture.request for picture in lineup.pictures], logits.device
        each = PerPicture.of([(0.0, 0, 1.0) if request.sampling.greedy else request.sampling.numbers or (1.0, 0, 1.0)
                              for request in requests], device)
        seeds = torch.tensor([signed(request.seed) for request in requests], device=device)
        first = torch.zeros_like(seeds)
        token = sample_in_one_launch(logits.contiguous(), lineup.scale, seeds, first, each=each)
        self.tokens.index_put_((lineup.slots, first), token)
        scale = torch.tensor([request.guidance for request in requests], dtype=torch.float32, device=device)
        inputs = self.weights.following(token)
        for buffer, values in ((everything.scale, scale), (everything.seeds, seeds), (everything.columns, first + 1),
                               (everything.active, first + 1), *zip(everything.each, each, strict=True)):
            buffer.index_copy_(0, lineup.slots, values)
        for offset in (0, self.capacity):
            everything.inputs.index_copy_(0, lineup.slots + offset, inputs)

    def _empty(self, slot: int) -> None:
        everything = self._all
        everything.cache.finish([slot, self.capacity + slot])
        everything.columns[slot] = self.steps
        everything.active[slot] = 0

    def _step(self) -> None:
        if self._captured is not None:
            self._captured()
        else:
            self._all.step()


class AllRows:
    """The step of `OneCache`: every slot's row, then every slot's unconditional row."""

    def __init__(self, slots: OneCache) -> None:
        engine, weights, capacity = slots.engine, slots.weights, slots.capacity
        self.weights, self.layers, self.done = weights, slots.layers, 0
        self.rows, self.tokens, device = 2 * capacity, slots.tokens, weights.device
        self.cache = CompressedCache(
            engine.plan, self.rows, engine.shape.num_query_heads, engine.shape.head_dim, slots.max_prompt,
            engine.shape.num_visual_tokens, slots.dtype, device, engine.backend)
        self.cache.warmup(rotary=True)
        self.cache.finish(range(self.rows))
        padded = self.layers.padded(self.rows)
        self.inputs = torch.zeros(padded, weights.embed.shape[1], device=device, dtype=weights.dtype)
        self.attended = torch.zeros(padded, weights.num_query_heads * weights.head_dim, device=device,
                                    dtype=weights.dtype)
        pictures = [*range(capacity), *range(capacity)] + [0] * (padded - self.rows)
        self.picture_of_row = torch.tensor(pictures, device=device)
        self.scale = torch.ones(capacity, device=device)
        self.seeds, self.active = (torch.zeros(capacity, dtype=torch.long, device=device) for _ in range(2))
        self.columns = torch.full((capacity,), slots.steps, device=device)
        self.each = PerPicture.same(capacity, 1.0, 0, 1.0, device)

    def prepare(self) -> None:
        """Nothing: the noise is counted."""

    def step(self) -> None:
        """One operation at a time."""
        self.advance()
        self.done += 1

    @torch.no_grad()
    def advance(self) -> None:
        """Reads and writes the buffers only."""
        hidden = self.layers.step(self.inputs, self.rows, self.attended, self._attend)
        logits = self.layers.logits(hidden, self.rows).contiguous()
        token = sample_in_one_launch(logits, self.scale, self.seeds, self.columns, each=self.each)
        self.tokens.scatter_(1, self.columns[:, None], token[:, None])
        self.columns += self.active
        self.inputs.copy_(self.weights.following(token.index_select(0, self.picture_of_row)))

    def _attend(self, layer: int, *heads: torch.Tensor) -> torch.Tensor:
        heads = tuple(tensor.to(self.cache.dtype) for tensor in heads)
        return self.cache.decode(layer, *heads, self.weights.scale, self.weights.rotary)
