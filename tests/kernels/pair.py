"""A `CompressedCache` and the oracle side by side: the same inputs, compared after every step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ssd_kernels import CachePlan, CompressedCache

from .cases import Case
from .oracle import Oracle

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SCORE_RTOL, SCORE_ATOL = 2e-5, 1e-6
POISONED_POSITION = 2**30
POISONED_BYTE = -128  # which no vector has: NaN is not to be had


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes as integers, so that NaN equals itself and 0.0 differs from -0.0."""
    return tensor.contiguous().view(INTEGERS[tensor.dtype.itemsize])


def poison(cache: CompressedCache) -> None:
    """Fill all slots with NaN and impossible positions, as docs/specification.md, section 3.7 asks of tests."""
    for state in cache._layers:
        for tensor in (*state.slabs, *state.prompt_slabs, state.scores):
            tensor.fill_(float("nan") if tensor.is_floating_point() else POISONED_BYTE)
        state.positions.fill_(POISONED_POSITION)


def on_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The tensor there, strides and offset too: `Tensor.to` gives them up where elements do not lie densely."""
    whole = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)
    return whole.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def snapshot(cache: CompressedCache) -> list[torch.Tensor]:
    """Every byte of the cache, to be compared with `assert_untouched`."""
    return [bits(tensor).clone() for state in cache._layers for tensor in state.everything]


def of_rows(cache: CompressedCache) -> tuple[torch.Tensor, ...]:
    """What steps change in the first layer, ``[B, ...]`` each."""
    state = cache._layers[0]
    return *state.tensors[:5], *state.scales[:2]


def assert_untouched(cache: CompressedCache, before: list[torch.Tensor]) -> None:
    """Nothing has been written since ``before``."""
    for old, new in zip(before, snapshot(cache), strict=True):
        assert torch.equal(old, new), "the cache was written to"


class Pair:
    """A cache with NaN-poisoned slots and one oracle per layer, fed the same tokens."""

    def __init__(self, plan: CachePlan, case: Case, *, batch: int = 2, group: int = 1, head_dim: int = 40,
                 max_prompt: int = 5, steps: int = 20, dtype: torch.dtype = torch.float32, scale: float | None = None,
                 track_scores: bool = False, seed: int = 0, shared_prompts: int | None = None) -> None:
        self.plan = plan = case.stored(plan)
        self.case, self.dtype, self.scale, self.track_scores = case, dtype, scale, track_scores
        self.batch, self.heads, self.group, self.head_dim = batch, plan.num_heads, group, head_dim
        self.max_prompt, self.steps = max_prompt, steps
        self.random = torch.Generator().manual_seed(seed)
        self.cache = CompressedCache(plan, batch_size=batch, num_query_heads=plan.num_heads * group,
                                     head_dim=head_dim, max_prompt=max_prompt, num_visual_tokens=steps, dtype=dtype,
                                     device=case.device, backend=case.name, track_scores=track_scores,
                                     shared_prompts=shared_prompts)
        poison(self.cache)
        self.oracles = [Oracle(specs, row_buffer=plan.row_buffer, keep_prompt=plan.keep_prompt, batch=batch,
                               group=group, head_dim=head_dim, length=max_prompt + steps, scale=scale,
                               kv_format=plan.kv_format)
                        for specs in plan.layers]

    def draw(self, *shape: int, factor: float = 1.0) -> torch.Tensor:
        """Normal random numbers in the cache's dtype, on the CPU."""
        return (factor * torch.randn(shape, generator=self.random)).to(self.dtype)

    def prefill(self, lengths: Sequence[int], rows: Sequence[int] | None = None, scores: torch.Tensor | None = None,
                k: torch.Tensor | None = None, share: Sequence[int] | None = None) -> None:
        """Start rows with random prompts, NaN beyond each one's length; ``scores [N, H, P]`` in every layer.

        ``share``: which of the prompts each row takes; None: each its own.
        """
        shape = (len(lengths), self.heads, self.max_prompt if scores is None else scores.shape[2], self.head_dim)
        for layer, oracle in enumerate(self.oracles):
            layer_k = self.draw(*shape) if k is None else k.clone()
            layer_v = self.draw(*shape)
            given = None if scores is None else scores.clone()
            for entry, length in enumerate(lengths):
                for tensor in (layer_k, layer_v, given):
                    if tensor is not None:
                        tensor[entry, :, length:] = float("nan")
            move = self.case.device
            self.cache.prefill(layer, layer_k.to(move), layer_v.to(move), lengths,
                               scores=None if given is None else given.to(move), rows=rows, share=share)
            for index, row in enumerate(range(self.batch) if rows is None else rows):
                entry = index if share is None else share[index]
                oracle.prefill(row, layer_k[entry], layer_v[entry], lengths[entry],
                               None if given is None else given[entry])
            self.check(layer)

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """`CompressedCache.reset` on both sides."""
        self.cache.reset(rows)
        for layer, oracle in enumerate(self.oracles):
            for row in range(self.batch) if rows is None else rows:
                oracle.reset(row)
            self.check(layer)

    def run(self, steps: int) -> torch.Tensor:
        """Take random steps; returns the outputs ``[steps, layers, B, Hq, D]`` on the CPU."""
        outs = [self.step() for _ in range(steps)]
        return torch.stack(outs) if outs else torch.empty(0)

    def step(self, q: torch.Tensor | None = None, k: torch.Tensor | None = None,
             v: torch.Tensor | None = None) -> torch.Tensor:
        """One step of every layer, random unless given, compared with the oracle; returns ``[layers, B, Hq, D]``."""
        outs = []
        for layer, oracle in enumerate(self.oracles):
            inputs = [self.draw(self.batch, heads, self.head_dim, factor=factor) if given is None else given
                      for given, heads, factor in ((q, self.heads * self.group, 1.5), (k, self.heads, 1.0),
                                                   (v, self.heads, 1.0))]
            out = self.cache.decode(layer, *(on_device(tensor, self.case.device) for tensor in inputs),
                                    scale=self.scale).cpu()
            exact, native = oracle.attend(*inputs)
            self.compare_outputs(layer, out, exact, native)
            for head in range(self.heads):
                for row, positions in enumerate(self.cache.positions(layer, head)):
                    oracle.evict(row, head, set(positions.tolist()))
            oracle.advance()
            self.check(layer)
            outs.append(out)
        return torch.stack(outs)

    def compare_outputs(self, layer: int, out: torch.Tensor, exact: torch.Tensor, native: torch.Tensor) -> None:
        """docs/specification.md, section 3.10, for every query head by itself."""
        assert out.dtype == self.dtype and out.shape == exact.shape
        error = (out.double() - exact).abs().amax(-1)
        allowed = 2 * (native - exact).abs().amax(-1) + 1e-5
        wrong = ~(error <= allowed)
        assert not wrong.any(), (f"layer {layer}, steps {self.oracles[layer].step}, (row, query head) "
                                 f"{wrong.nonzero().tolist()}: error {error[wrong].tolist()}, "
                                 f"allowed {allowed[wrong].tolist()}")

    def check(self, layer: int) -> None:
        """Kept positions, scores and slot contents of every row and head against the oracle."""
        oracle, state = self.oracles[layer], self.cache._layers[layer]
        slabs = [tensor.cpu() for tensor in state.slabs]
        prompts = [tensor.cpu() for tensor in state.prompt_slabs] or [None] * len(slabs)
        for head, spec in enumerate(self.plan.layers[layer]):
            all_positions = self.cache.positions(layer, head)
            scored = spec.kind == "heavy" or self.track_scores
            all_scores = self.cache.scores(layer, head) if scored else None
            span = state.layout.heads[head]
            for row, positions in enumerate(all_positions):
                tokens = oracle.kept[row][head]
                where = f"layer {layer}, row {row}, head {head} ({spec}), step {oracle.step[row]}"
                assert positions.dtype == torch.long and positions.tolist() == sorted(tokens), where
                if all_scores is not None:
                    forgets = state.shared and not self.track_scores  # of shared prompts, unless asked for
                    wanted = torch.tensor([float("nan") if forgets and p < oracle.prompt_len[row] else tokens[p].score
                                           for p in sorted(tokens)], dtype=torch.float64)
                    assert all_scores[row].dtype == torch.float32, where
                    torch.testing.assert_close(all_scores[row].double().cpu(), wanted, rtol=SCORE_RTOL,
                                               atol=SCORE_ATOL, equal_nan=True, msg=lambda m, w=where: f"{w}: {m}")
                slots = self.cache._kept(state, head, row)
                stored = torch.tensor([slots[p] for p in positions.tolist()], dtype=torch.long)
                assert len(set(slots.values())) == len(slots), where
                assert all(0 <= slot < span.capacity for slot in slots.values()), where
                apart = oracle.prompt_len[row] if state.shared else 0
                for slab, prompt, history in zip(slabs, prompts, oracle.contents, strict=True):
                    given = history[row, head, positions.cpu()].to(slab.dtype)
                    found = slab[row, span.offset + stored[apart:] - apart]
                    if prompt is not None:
                        shared = prompt[state.shared[2][row]].unflatten(0, (self.heads, self.max_prompt))
                        found = torch.cat([shared[head, :apart], found])
                    assert torch.equal(bits(found), bits(given)), f"{where}: contents differ"
