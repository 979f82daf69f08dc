"""ssd_kernels as a contender: caches in their steady state, and the gate that compares them with the reference."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch

from ssd_kernels import CachePlan, CompressedCache, backends
from ssd_kernels.kv_format import decoded, encoded, vector_bytes
from ssd_kernels.layout import LayerLayout, RowView
from ssd_kernels.state import LayerState
from ssd_kernels.triton.launch import step_bytes

from .contender import BYTE_SCALE, Built, Contender, WrongResult, check_output, copies_of, fill, part_of, sample_rows
from .point import Point, specs
from .timing import GRAPH_CALLS, REPETITIONS, WARMUP_CALLS, Work


def contenders(point: Point, backend_names: Sequence[str], scored: Sequence[bool], row_buffers: Sequence[int],
               kv_formats: Sequence[str], device: torch.device) -> list[Contender]:
    """One contender per backend, kind of plan and format that the backend knows; with `Point.plan`, one per backend."""
    found = []
    for backend in backend_names:
        if point.plan is not None:
            found.append(_contender(point, backend, point.plan, point.prompt, point.start, device, "the plan"))
            continue
        known = [kv_format for kv_format in kv_formats
                 if not backends.get(backend).unsupported(device, point.torch_dtype, point.head_dim, kv_format)]
        for kv_format, score, row_buffer in itertools.product(known, scored, row_buffers):
            plan = CachePlan([specs(point.lengths, score, row_buffer)], row_buffer, kv_format=kv_format)
            period = max(row_buffer, 1)
            name = "heavy" if score else "window"
            name += (f", row buffer {row_buffer}" if row_buffer else "") + (", int8" if kv_format == "int8" else "")
            start = -(-point.full // period) * period
            found.append(_contender(point, backend, plan, 0, start, device, name))
    return found


def _contender(point: Point, backend: str, plan: CachePlan, prompt: int, start: int, device: torch.device,
               name: str) -> Contender:
    scored = any(spec.kind == "heavy" for spec in plan.layers[0])
    evicts = any(spec.kind != "full" for spec in plan.layers[0])
    does = ["append", "attend", *(["score"] if scored else [])]
    if evicts:
        does.append(f"refresh every {plan.row_buffer}" if plan.row_buffer > 1 else "evict")
    layout = LayerLayout.build(plan.layers[0], plan, prompt, start + plan.row_buffer + 2)
    one = layout.nbytes(point.batch, point.head_dim, point.torch_dtype)
    layers, _ = layers_and_passes(point.attend_bytes(kv_format=plan.kv_format), plan.row_buffer)
    return Contender(f"ssd_kernels {backend}: {name}", ", ".join(does), "nothing" if scored else "scores",
                     lambda: Steady(point, backend, plan, prompt, start, device).built(), int(1.1 * layers * one),
                     backend,
                     {"row_buffer": plan.row_buffer, "scored": scored, "kv_format": plan.kv_format})


def layers_and_passes(nbytes: int, row_buffer: int) -> tuple[int, int]:
    """Layers that are cold in turn, and passes over them in which every step of a row buffer has its share.

    Layers start at evenly spread steps of the row buffer; then layers x passes / R of the calls refresh.

    Args:
        nbytes: read in one call. row_buffer: R.
    """
    layers, period = copies_of(nbytes), max(row_buffer, 1)
    if layers >= period:
        return -(-layers // period) * period, 1
    layers = next(number for number in range(layers, period + 1) if period % number == 0)
    return layers, period // layers


def phase(layer: int, layers: int, period: int) -> int:
    """Steps since the last refresh that a layer starts with: evenly spread over the layers."""
    return layer * period // layers if layers < period else layer % period


def filled_positions(layout: LayerLayout, prompt: int, step: int) -> torch.Tensor:
    """int32 ``[T]``: in every scored slot a token, the newest half of the budget and others spread before it."""
    positions, period = torch.zeros(layout.scored_slots, dtype=torch.int32), max(layout.row_buffer, 1)
    for head, span in enumerate(layout.heads):
        if span.score_offset < 0:
            continue
        view = RowView.of(layout, head, prompt, step)
        newest = min(view.evictable, step % period + span.keep // 2)
        older = view.evictable - newest
        before = view.first + step - newest  # tokens to choose the older ones from
        tokens = [index * before // max(older, 1) for index in range(older)]
        tokens += range(view.first + step - newest, view.first + step)
        held = torch.tensor([*range(view.unscored, view.base), *(view.base + token for token in tokens)],
                            dtype=torch.int32)
        positions[span.score_offset:span.score_offset + len(held)] = held
    return positions


def fill_slots(state: LayerState) -> None:
    """Random keys, values and scores into all slots of a layer."""
    fill(state.keys)
    fill(state.values)
    for scales in state.scales:
        scales.fill_(BYTE_SCALE)
    state.scores.uniform_()


def steady_state(cache: CompressedCache, prompt: int, start: int) -> None:
    """Fill every layer of a cache with random tokens as after ``prompt`` prompt and about ``start`` visual ones.

    Layers are at evenly spread steps of the row buffer, so that every step of the model has its share of refreshes.
    """
    period, layers = max(cache.plan.row_buffer, 1), cache.plan.num_layers
    for layer, state in enumerate(cache._layers):
        step = start // period * period + phase(layer, layers, period)
        fill_slots(state)
        state.positions.copy_(filled_positions(state.layout, prompt, step).expand_as(state.positions))
        state.cursors.copy_(torch.tensor([prompt, step], dtype=torch.int32).expand_as(state.cursors))


class Steady:
    """Caches of equal layers, all slots of the budget taken, at evenly spread steps of the row buffer.

    Args:
        prompt, start: prompt tokens, and visual tokens that have been appended, in every row.
    """

    def __init__(self, point: Point, backend: str, plan: CachePlan, prompt: int, start: int,
                 device: torch.device) -> None:
        self.point, self.prompt, self.start = point, prompt, start
        self.period = max(plan.row_buffer, 1)
        kept = point.attend_bytes(kv_format=plan.kv_format)
        layers, self.passes = layers_and_passes(kept, plan.row_buffer)
        if device.type == "cuda":
            # Many calls in a graph, all at nearly the same fill: starting over costs a GPU little.
            self.passes *= -(-GRAPH_CALLS // (layers * self.passes))
            self.room = 2 * self.passes
        else:
            warmup = -(-WARMUP_CALLS // (layers * self.passes))
            self.room = self.passes * (REPETITIONS + warmup)
        self.cache = CompressedCache(
            dataclasses.replace(plan, layers=list(plan.layers) * layers), batch_size=point.batch,
            num_query_heads=point.heads, head_dim=point.head_dim, max_prompt=prompt,
            num_visual_tokens=start + self.period + self.room, dtype=point.torch_dtype, device=device, backend=backend)
        self.layers = layers
        # Of calls that are all alike a part will do, as for rivals; a row buffer's are not.
        self.part = part_of(kept) if self.period == 1 and device.type == "cpu" else None
        self.q, self.k, self.v = (
            torch.randn(point.batch, point.heads, point.head_dim, device=device).to(point.torch_dtype)
            for _ in range(3))
        for state in self.cache._layers:
            fill_slots(state)
        layout = self.cache._layers[0].layout
        self._positions = [filled_positions(layout, prompt, start + self.phase(layer)).to(device)
                           for layer in range(min(layers, self.period))]
        self.cache.warmup()
        self.used = self.room * layers  # calls since the last restart: none is left

    def phase(self, layer: int) -> int:
        """Steps since the last refresh that a layer starts with."""
        return phase(layer, self.layers, self.period)

    def restart(self) -> None:
        """Put every layer back to its first step."""
        self.cache.reset()
        for layer, state in enumerate(self.cache._layers):
            cursor = torch.tensor([self.prompt, self.start + self.phase(layer)], dtype=torch.int32)
            state.cursors.copy_(cursor.expand(self.point.batch, 2))
            state.positions.copy_(self._positions[layer % self.period].expand_as(state.positions))
        self.used = 0

    def prepare(self) -> None:
        """Make room for one repetition."""
        calls = self.part or self.passes * self.layers
        if self.used + calls > self.room * self.layers:
            self.restart()
        self.used += calls

    def decode(self, layer: int) -> torch.Tensor:
        """One step of one layer."""
        return self.cache.decode(layer, self.q, self.k, self.v)

    def useful_bytes(self) -> int:
        """Of one step, on average over those of the row buffer (`step_bytes`)."""
        layout = self.cache._layers[0].layout
        total = sum(step_bytes(layout, self.prompt, self.start + phase, self.point.head_dim,
                               self.point.torch_dtype.itemsize) for phase in range(self.period))
        return round(self.point.batch * total / self.period)

    def kept_bytes(self) -> int:
        """Keys and values that one step attends to, on average."""
        layout = self.cache._layers[0].layout
        views = [RowView.of(layout, head, self.prompt, self.start + phase)
                 for head in range(self.point.heads) for phase in range(self.period)]
        slots = sum(view.base + view.evictable + 1 for view in views) / self.period
        stored = vector_bytes(self.cache.plan.kv_format, self.point.head_dim, self.point.torch_dtype)
        return round(2 * self.point.batch * slots * stored)

    def built(self) -> Built:
        # What a picture of the point's size takes; here the slabs of full heads are longer, for room to time in.
        layout = self.cache._layers[0].layout
        tokens = max(self.point.full - self.prompt, self.start % self.period + 1)
        nominal = LayerLayout.build(self.cache.plan.layers[0], self.cache.plan, layout.max_prompt, tokens)
        calls = [lambda layer=layer: self.decode(layer) for layer in range(self.layers)]
        work = Work(calls, passes=self.passes, part=self.part, prepare=self.prepare)
        return Built(work, self.check, self.useful_bytes(), self.kept_bytes(),
                     nominal.nbytes(self.point.batch, self.point.head_dim, self.point.torch_dtype),
                     launches=1)

    def check(self) -> None:
        """Compare output, kept sets and kept bytes with the reference in float64, across an eviction.

        Raises:
            WrongResult: they differ.
        """
        self.restart()
        rows, cache = sample_rows(self.point.batch), self.cache
        late = max(range(self.layers), key=self.phase)  # the layer that refreshes soonest
        oracle = CompressedCache(
            dataclasses.replace(cache.plan, layers=[cache.plan.layers[late]]), batch_size=len(rows),
            num_query_heads=self.point.heads, head_dim=self.point.head_dim, max_prompt=cache.max_prompt,
            num_visual_tokens=cache.num_visual_tokens, dtype=torch.float64, backend="reference")
        state, expected = cache._layers[late], oracle._layers[0]
        steps = self.period - self.phase(late) % self.period + 1
        for _ in range(min(steps, self.room)):
            # Scores are taken over, so that rounding does not add up to another choice of victims.
            for target, source in zip(_changing(expected), _changing(state), strict=True):
                target.copy_(source[rows])
            held = self._held(oracle, rows)
            out = self.decode(late)
            q, k, v = (tensor[rows].double().cpu() for tensor in (self.q, self.k, self.v))
            oracle.decode(0, q, k, v)
            check_output(out, self.q, lambda row, head: held[rows.index(row), head], rows)  # noqa: B023
            self._check_kept(state, oracle, rows)
        self.used = self.room * self.layers

    def _held(self, oracle: CompressedCache, rows: list[int]) -> dict[tuple[int, int],
                                                                     tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values each head attends to in the coming step, in float64 as they are read."""
        found, state = {}, oracle._layers[0]
        new = encoded(state.layout.kv_format, self.k.cpu(), self.v.cpu())
        for index, row in enumerate(rows):
            for head, span in enumerate(state.layout.heads):
                slots = [span.offset + slot for slot in oracle._kept(state, head, index).values()]
                held = tuple(torch.cat([slab[index, slots], one[row, head, None].to(slab)])
                             for slab, one in zip(state.slabs, new, strict=True))
                keys, values = decoded(held, torch.float64)
                found[index, head] = keys.to(self.k.device), values.to(self.v.device)
        return found

    def _check_kept(self, state: LayerState, oracle: CompressedCache, rows: list[int]) -> None:
        small = oracle._layers[0]
        names = [name for name in ("keys", "values", "key_scales", "value_scales", "positions", "cursors")
                 if getattr(small, name) is not None]
        here = dataclasses.replace(small, **{name: getattr(state, name)[rows].cpu() for name in names})
        if not torch.equal(here.cursors, small.cursors):
            raise WrongResult(f"cursors are {here.cursors.tolist()}, expected {small.cursors.tolist()}")
        for index, row in enumerate(rows):
            for head, span in enumerate(small.layout.heads):
                got, expected = oracle._kept(here, head, index), oracle._kept(small, head, index)
                if set(got) != set(expected):
                    raise WrongResult(f"row {row}, head {head} kept other tokens: {sorted(set(got) ^ set(expected))}")
                order = sorted(got)
                for name in names[:-2]:
                    mine = getattr(here, name)[index, [span.offset + got[position] for position in order]]
                    right = getattr(small, name)[index, [span.offset + expected[position] for position in order]]
                    if not torch.equal(mine.to(right), right):
                        raise WrongResult(f"{name} of row {row}, head {head} are not those that were stored")


def _changing(state: LayerState) -> tuple[torch.Tensor, ...]:
    """What a step changes, ``[B, ...]`` each."""
    return *state.slabs, state.scores, state.positions, state.cursors
