"""Decoder layers over one token of every row, products and attention, in one call on a CPU.

Between two operations of a step lie microseconds, and waking a thread takes tens of them: here threads are woken once
for all layers (csrc/cpu/layers.h). Results have the bits of `Product` and `CompressedCache.decode`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import native, ops
from .arguments import plain
from .backends.cpu import native_layer
from .cache import CompressedCache
from .linear import Product
from .state import Rotary

__all__ = ["DecoderLayers", "LayerProducts", "LayersOutput", "reference"]


class LayerProducts(NamedTuple):
    """Products of a layer of Llama's kind (arXiv 2302.13971), each with what comes before and after it.

    Attributes:
        qkv: of the layer's input, its norm before: queries ``[Hq D]``, keys and values ``[H D]`` above one another.
        out: of what the queries attend to.
        gated: of the input plus that, its norm before: what the activation makes.
        down: of what comes of ``gated``.
    """

    qkv: Product
    out: Product
    gated: Product
    down: Product


class LayersOutput(NamedTuple):
    """Last hidden states ``[rows, hidden]``, and seconds that products and attention took."""

    hidden: torch.Tensor
    linear_seconds: float
    attention_seconds: float


class DecoderLayers:
    """Layers, one after another. Their weights are read where they are at every call."""

    def __init__(self, layers: Sequence[LayerProducts], num_query_heads: int, num_heads: int, head_dim: int) -> None:
        """
        Args:
            layers: all of one shape and dtype; weights may be bytes in some of them.
            num_query_heads, num_heads, head_dim: Hq, H and D of the attention.

        Raises:
            ValueError: shapes or dtypes do not fit together.
        """
        if not layers:
            raise ValueError("layers must not be empty")
        self._heads = num_query_heads, num_heads, head_dim
        self.dtype, self.hidden = layers[0].qkv.dtype, layers[0].qkv.inputs
        middle = layers[0].down.inputs
        shapes = ((self.hidden, (num_query_heads + 2 * num_heads) * head_dim),
                  (num_query_heads * head_dim, self.hidden), (self.hidden, middle), (middle, self.hidden))
        self._layers = tuple(layers)  # which keeps their weights alive
        self._native = native.extension().Layers()
        for index, layer in enumerate(layers):
            for name, product, shape in zip(LayerProducts._fields, layer, shapes, strict=True):
                wanted, found = (*shape, self.dtype), (product.inputs, product.outputs, product.dtype)
                if found != wanted:
                    raise ValueError(f"layers[{index}].{name} must be (inputs, outputs, dtype) = {wanted}, got {found}")
            self._native.add(*(product.native for product in layer))

    def __call__(self, x: torch.Tensor, caches: Sequence[CompressedCache], scale: float,
                 rotary: Rotary) -> LayersOutput:
        """One token of every row: as `reference`.

        Args:
            x: ``[rows, hidden]`` of `dtype` on a CPU.
            caches: on the backend ``"cpu"``, in `dtype`, with a layer for each of these; their rows are those of ``x``,
                cache by cache.
            scale: factor on the dot products of the attention.
            rotary: (cos, sin) as `CompressedCache.decode` takes them.

        Raises:
            TypeError, ValueError: an argument is wrong or a row has taken all its steps; nothing has been written then.
        """
        x = plain("x", x)
        rows = sum(cache.batch_size for cache in caches)
        if x.shape != (rows, self.hidden) or x.dtype != self.dtype or not x.is_cpu:
            raise ValueError(f"x must be [rows of the caches, hidden] = [{rows}, {self.hidden}] of {self.dtype} on "
                             f"cpu, got {list(x.shape)} of {x.dtype} on {x.device}")
        if not caches:
            raise ValueError("caches must not be empty")
        if len({id(cache) for cache in caches}) != len(caches):
            raise ValueError("caches must be different ones")
        for index, cache in enumerate(caches):
            self._check(index, cache)
        rotary = ops.checked_rotary(rotary, max(cache.max_prompt + cache.num_visual_tokens for cache in caches),
                                    x.new_empty(0, 1, self._heads[2]))
        hidden = x.clone(memory_format=torch.contiguous_format)
        seconds = self._native.run(
            hidden.data_ptr(), rows, [[native_layer(state) for state in cache.states] for cache in caches],
            self._heads[0], float(scale), *(table.data_ptr() for table in rotary), torch.get_num_threads())
        for cache in caches:
            for layer in range(len(self._layers)):
                cache.steps.count(layer)
        return LayersOutput(hidden, *seconds)

    def _check(self, index: int, cache: CompressedCache) -> None:
        found = (cache.backend, cache.dtype, len(cache.states), cache.num_query_heads, cache.plan.num_heads,
                 cache.head_dim)
        wanted = ("cpu", self.dtype, len(self._layers), *self._heads)
        if found != wanted:
            raise ValueError(f"caches[{index}] must be of (backend, dtype, layers, query heads, heads, head_dim) = "
                             f"{wanted}, got {found}")
        for layer in range(len(self._layers)):
            cache.steps.check(layer)


def reference(layers: Sequence[LayerProducts], x: torch.Tensor, caches: Sequence[CompressedCache], scale: float,
              rotary: Rotary) -> torch.Tensor:
    """The twin of `DecoderLayers`: the same by one call for every product, and for every cache's attention."""
    sizes = [cache.batch_size for cache in caches]
    for index, layer in enumerate(layers):
        attended = []
        for cache, rows in zip(caches, torch.split(layer.qkv(x), sizes), strict=True):
            q, k, v = torch.split(rows.view(len(rows), -1, cache.head_dim), [
                cache.num_query_heads, cache.plan.num_heads, cache.plan.num_heads], 1)
            attended.append(cache.decode(index, q, k, v, scale, rotary).flatten(1))
        x = layer.out(torch.cat(attended), x)
        x = layer.down(layer.gated(x), x)
    return x
