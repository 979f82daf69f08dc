"""The decoder's layers over rows of hidden states: whole prompts, and one token of every row."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from ssd_kernels import CompressedCache
from ssd_kernels.layers import DecoderLayers, LayerProducts
from ssd_kernels.linear import Product
from ssd_kernels.reference import rotate

from .linear import KernelLinear
from .timing import StepTiming
from .weights import Layer, Weights

# torch's float32 products on a CPU give a row the same bits in every batch whose size is a multiple of this, and other
# bits in some smaller ones (docs/engine.md, "Seeds").
ROW_MULTIPLE = 8
PREFILL_TOKENS = 4096  # of prompts that go through the layers together, where any number may
# Where it has to be the same number at all times, so that nothing is compiled or set up for another prompt; a power of
# two. By its data sheet an H200 computes with bfloat16 weights as long as it reads them at 206 tokens: products of much
# fewer would take as long, and those of much more longer, which one prompt alone would feel.
PREFILL_CHUNK = 512
SHORTEST_WIDTH = 32  # that prompts are padded to then


@dataclass
class PromptGroup:
    """Different prompts that go through the layers together.

    Attributes:
        prompts: without padding.
        width: tokens that each is padded to behind its end, where causal attention does not look; ``count``: how many
            there are with those that pad them. Nobody reads what comes of padding.
        rows: that start with them; ``share``: which of the prompts each of these takes.
    """

    prompts: Sequence[tuple[int, ...]]
    width: int
    count: int
    rows: list[int]
    share: list[int]
    _copies: torch.Tensor | None = None

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt."""
        return [len(prompt) for prompt in self.prompts]

    def start(self, cache: CompressedCache, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Start the rows in a cache's layer with keys and values [prompts, heads, width, D]."""
        if cache.plan.keep_prompt:
            cache.prefill(layer, keys, values, self.lengths, rows=self.rows, share=self.share)
            return
        if self._copies is None:
            self._copies = torch.tensor(self.share, device=keys.device)
        lengths = self.lengths
        cache.prefill(layer, keys[self._copies], values[self._copies], [lengths[entry] for entry in self.share],
                      rows=self.rows)


def grouped(prompts: Sequence[Sequence[int]], chunk: int | None) -> Iterator[PromptGroup]:
    """The prompts of all rows, in groups: equal ones once, and those of equal `prefill_width` together.

    Args:
        prompts: one of every row. chunk: as of `Layers`.
    """
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows_of.setdefault(tuple(prompt), []).append(row)
    widths: dict[int, list[tuple[int, ...]]] = {}
    for text in rows_of:
        widths.setdefault(prefill_width(len(text), chunk), []).append(text)
    for width, group in widths.items():
        size = max(1, (chunk or PREFILL_TOKENS) // width)
        for part in (group[first:first + size] for first in range(0, len(group), size)):
            share = [index for index, text in enumerate(part) for _ in rows_of[text]]
            yield PromptGroup(part, width, size if chunk else len(part),
                              [row for text in part for row in rows_of[text]], share)


def finished(prompts: Generator[float, None, torch.Tensor]) -> torch.Tensor:
    """What `Layers.prompts` returns, once all of it is done."""
    while True:
        try:
            next(prompts)
        except StopIteration as done:
            return done.value


class Layers:
    """What lies between the inputs of rows and their last hidden states.

    Attributes:
        weights: of the model.
        chunk: tokens of prompts that go through a layer's products at once, always; None: as many as there are.
    """

    def __init__(self, weights: Weights, *, row_multiple: int = 1, compiled: bool = False,
                 timing: StepTiming | None = None) -> None:
        """
        Args:
            weights: of the model.
            row_multiple: pad the rows of every product to a multiple of this.
            compiled: run what lies between two attentions through torch.compile; its prompts go in chunks then.
            timing: takes the time of products, and nothing goes through torch.compile.
        """
        self.weights = weights if timing is None else weights.timed(functools.partial(timing.timed, "linear"))
        self.row_multiple, self._timing = row_multiple, timing
        compiles = compiled and timing is None
        self._together = None if compiles else _together(weights)
        self.chunk = PREFILL_CHUNK if compiled or weights.device.type == "cuda" else None
        self._project = _compiled(project) if compiles else project
        self._mix = _compiled(mix) if compiles else mix

    def padded(self, rows: int) -> int:
        """Rows of products of so many."""
        return -(-rows // self.row_multiple) * self.row_multiple

    def step(self, hidden: torch.Tensor, rows: int, attended: torch.Tensor, attend: Callable[..., torch.Tensor],
             caches: Sequence[CompressedCache] = ()) -> torch.Tensor:
        """One token of every row.

        Args:
            hidden: inputs [padded rows, hidden].
            rows: without the padding.
            attended: buffer [padded rows, Hq D].
            attend: from a layer's number, queries [rows, Hq, D], keys and values [rows, H, D], which are not rotated,
                to what the queries attend to.
            caches: if ``attend`` does nothing but step these, whose rows follow one another.

        Returns:
            last hidden states [padded rows, hidden].
        """
        if caches and self._together is not None and self._together.take(rows, caches):
            out = self._together.layers(hidden, caches, self.weights.scale, self.weights.rotary)
            if self._timing is not None:
                self._timing.add("linear", out.linear_seconds)
                self._timing.add("attention", out.attention_seconds)
            return out.hidden
        for index, layer in enumerate(self.weights.layers):
            heads = self._heads(self._project(hidden, layer)[:rows])
            out = attend(index, *heads).flatten(1)
            if len(attended) != rows:
                attended[:rows] = out
                out = attended
            hidden = self._mix(hidden, out, layer)
        return hidden

    def logits(self, hidden: torch.Tensor, rows: int) -> torch.Tensor:
        """float32 [rows, codes] of last hidden states [padded rows, hidden]."""
        return self.weights.head(hidden)[:rows].float()

    @torch.no_grad()
    def prompts(self, group: PromptGroup, dtype: torch.dtype, store: Callable[..., None]
                ) -> Generator[float, None, torch.Tensor]:
        """Run prompts, a layer at a time: after each it yields to how many tokens' way through all layers that amounts.

        Args:
            group: of them.
            dtype: of the cache.
            store: called with every layer's number, and keys, which are rotated, and values [prompts, heads, width, D].

        Returns:
            last hidden states [rows of the group, hidden].
        """
        weights, width, count = self.weights, group.width, group.count
        size = count * width
        padding = [0] * (self.padded(size) - width * len(group.prompts))
        tokens = torch.tensor([token for prompt in group.prompts for token in (*prompt, *[0] * (width - len(prompt)))]
                              + padding, device=weights.device)
        # Of what comes behind a prompt, positions beyond the rotary table do not matter.
        positions = torch.arange(width, device=weights.device).clamp(max=len(weights.rotary[0]) - 1).repeat(count)
        hidden = functional.embedding(tokens, weights.embed)
        for index, layer in enumerate(weights.layers):
            query, keys, values = self._heads(self._in_chunks(self._project, layer, hidden)[:size])
            query, keys = (rotate(tensor, weights.rotary, positions) for tensor in (query, keys))
            # [prompts, heads, width, D]
            query, keys, values = (tensor.unflatten(0, (count, width)).transpose(1, 2)
                                   for tensor in (query, keys, values))
            store(index, *(tensor[:len(group.prompts)].to(dtype) for tensor in (keys, values)))
            out = functional.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=weights.scale,
                                                          enable_gqa=weights.num_heads != weights.num_query_heads)
            attended = hidden.new_zeros(len(hidden), out.shape[1] * out.shape[3])
            attended[:size] = out.transpose(1, 2).flatten(2).flatten(0, 1)
            hidden = self._in_chunks(self._mix, layer, hidden, attended)
            yield size / len(weights.layers)
        lengths = group.lengths
        ends = torch.tensor([entry * width + lengths[entry] - 1 for entry in group.share], device=weights.device)
        return hidden.index_select(0, ends)

    def _in_chunks(self, function: Callable[..., torch.Tensor], layer: Layer, *tensors: torch.Tensor) -> torch.Tensor:
        """`project` or `mix` of tensors [tokens, ...], `chunk` tokens at a time."""
        if self.chunk is None or len(tensors[0]) == self.chunk:
            return function(*tensors, layer)
        chunks = zip(*(tensor.split(self.chunk) for tensor in tensors), strict=True)
        return torch.cat([function(*chunk, layer) for chunk in chunks])

    def _heads(self, projected: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries [N, Hq, D], keys and values [N, H, D] of [N, (Hq + 2 H) D]."""
        weights = self.weights
        heads = projected.view(len(projected), -1, weights.head_dim)
        return heads.split((weights.num_query_heads, weights.num_heads, weights.num_heads), 1)


@dataclass(frozen=True)
class Together:
    """All layers in one call.

    Attributes:
        layers: that call. most_rows: that it takes; None: any number.
    """

    layers: DecoderLayers
    most_rows: int | None

    def take(self, rows: int, caches: Sequence[CompressedCache]) -> bool:
        """Whether it takes so many rows of these caches."""
        return ((self.most_rows is None or rows <= self.most_rows)
                and all(cache.backend == "cpu" and cache.dtype == self.layers.dtype for cache in caches))


def _together(weights: Weights) -> Together | None:
    """The layers in one call, where our kernel makes all of their products."""
    products, limits = list[LayerProducts](), list[int]()
    for layer in weights.layers:
        fused = list[Product]()
        for linear in (layer.qkv, layer.out, layer.gated, layer.down):
            if not isinstance(linear, KernelLinear) or linear.fused is None:
                return None
            fused.append(linear.fused)
            if linear.most_rows is not None:
                limits.append(linear.most_rows)
        products.append(LayerProducts(*fused))
    layers = DecoderLayers(products, weights.num_query_heads, weights.num_heads, weights.head_dim)
    return Together(layers, min(limits, default=None))


def prefill_width(length: int, chunk: int | None) -> int:
    """Tokens that a prompt of ``length`` is padded to: none is added where there is no constant ``chunk``; where there
    is, the attention sees powers of two from `SHORTEST_WIDTH` on."""
    return length if chunk is None else max(SHORTEST_WIDTH, 1 << (length - 1).bit_length())


def project(hidden: torch.Tensor, layer: Layer) -> torch.Tensor:
    """Queries, keys and values [rows, (Hq + 2 H) D] of ``hidden`` [rows, hidden]."""
    return layer.qkv(hidden)


def mix(hidden: torch.Tensor, attended: torch.Tensor, layer: Layer) -> torch.Tensor:
    """The rest of a layer: output projection and feed-forward network."""
    hidden = layer.out(attended, hidden)
    return layer.down(layer.gated(hidden), hidden)


@functools.cache
def _compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return torch.compile(function, dynamic=False)
