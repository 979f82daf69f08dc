"""Decoder layers in one call: the bits of one call for every operation, whatever the rows, threads and caches."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from instruction_sets import using

from ssd_kernels import CachePlan, CompressedCache, info
from ssd_kernels.layers import DecoderLayers, LayerProducts, reference
from ssd_kernels.linear import Product

from .cases import BF16, F16, F32, mixed, short

SETS = info()["extension"].get("instruction_sets", [])
pytestmark = pytest.mark.skipif(not SETS, reason="the extension is not built")
every_dtype = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=short)
QUERY_HEADS, HEADS, DIM, PROMPT, TOKENS = 4, 2, 32, 3, 20
SCALE = 0.2


def made(dtype: torch.dtype, hidden: int = 40, middle: int = 56, layers: int = 3,
         int8: bool = False) -> list[LayerProducts]:
    """Layers of random weights, odd biases and norms."""
    generator = torch.Generator().manual_seed(hidden + middle)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def product(inputs: int, outputs: int, norm: bool, **options: Any) -> Product:
        weight = torch.randn(outputs, inputs, generator=generator) * inputs ** -0.5
        if int8:
            scale = weight.abs().amax(1) / 127
            options |= {"scale": scale, "dtype": dtype}
            weight = (weight / scale[:, None]).round().to(torch.int8)
        return Product(weight if int8 else weight.to(dtype), norm=1 + 0.1 * randn(inputs) if norm else None, **options)

    projected = (QUERY_HEADS + 2 * HEADS) * DIM
    return [LayerProducts(product(hidden, projected, True, bias=randn(projected)),
                          product(QUERY_HEADS * DIM, hidden, False),
                          product(hidden, 2 * middle, True, activation="swiglu"),
                          product(middle, hidden, False, bias=randn(hidden))) for _ in range(layers)]


def started(plan: CachePlan, rows: int, dtype: torch.dtype) -> CompressedCache:
    """A cache whose rows have prompts of different lengths."""
    cache = CompressedCache(plan, rows, QUERY_HEADS, DIM, PROMPT, TOKENS, dtype, backend="cpu")
    generator = torch.Generator().manual_seed(rows)
    for layer in range(plan.num_layers):
        k, v = torch.randn(2, rows, HEADS, PROMPT, DIM, generator=generator).to(dtype)
        cache.prefill(layer, k, v, [row % (PROMPT + 1) for row in range(rows)])
    return cache


def tables(positions: int = PROMPT + TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.arange(positions)[:, None] * 0.7 ** torch.arange(DIM // 2)
    return angles.cos(), angles.sin()


def everything(caches: Sequence[CompressedCache]) -> list[torch.Tensor]:
    return [tensor for cache in caches for state in cache.states for tensor in state.everything]


def check(layers: list[LayerProducts], plan: CachePlan, rows: Sequence[int], dtype: torch.dtype, steps: int,
          twin: Any = None) -> None:
    """Steps of caches with so many rows against the twin's, by all bits of hidden states and of caches."""
    together = DecoderLayers(layers, QUERY_HEADS, HEADS, DIM)
    caches, others = ([started(plan, count, dtype) for count in rows] for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(sum(rows), layers[0].qkv.inputs, generator=generator).to(dtype)
        before = x.clone()
        out = together(x, caches, SCALE, tables())
        assert torch.equal(x, before)
        assert torch.equal(out.hidden, reference(layers, x, others, SCALE, tables()))
        assert out.linear_seconds > 0 and out.attention_seconds > 0
    for mine, other in zip(everything(caches), everything(others), strict=True):
        assert torch.equal(mine, other)


@every_dtype
@pytest.mark.parametrize("name", SETS)
def test_steps_have_the_bits_of_single_calls(name: str, dtype: torch.dtype) -> None:
    with using(name):
        check(made(dtype), mixed(HEADS, num_layers=3), [2], dtype, steps=12)


@every_dtype
@pytest.mark.parametrize("rows", [[1], [3, 1, 2], [70]], ids=str)
def test_caches_side_by_side(dtype: torch.dtype, rows: list[int]) -> None:
    check(made(dtype), mixed(HEADS, row_buffer=3, num_layers=3), rows, dtype, steps=7)


@every_dtype
def test_bytes_of_weights_and_of_caches(dtype: torch.dtype) -> None:
    check(made(dtype, int8=True), replace(mixed(HEADS, num_layers=3), kv_format="int8"), [2, 1], dtype, steps=8)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_any_number_of_threads(threads: int) -> None:
    """Enough work for eight of them, whose pieces are few."""
    before = torch.get_num_threads()
    layers = made(F32, hidden=192, middle=2000, layers=2)
    assert sum(product.weight.nbytes for layer in layers for product in layer) > 8 * 10**6
    torch.set_num_threads(threads)
    try:
        for rows in ([2], [5, 1]):
            check(layers, mixed(HEADS, num_layers=2), rows, F32, steps=20)
    finally:
        torch.set_num_threads(before)


def test_threads_of_python_step_caches_of_their_own() -> None:
    layers = made(F32, hidden=192, middle=2000, layers=2)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            check(layers, mixed(HEADS, num_layers=2), [2], F32, steps=10)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_rows_restart_while_others_go_on() -> None:
    layers, plan = made(F32), mixed(HEADS, num_layers=3)
    together, caches = DecoderLayers(layers, QUERY_HEADS, HEADS, DIM), [started(plan, 2, F32) for _ in range(2)]
    x = torch.randn(2, 40, generator=torch.Generator().manual_seed(2))
    for step in range(TOKENS + 5):
        if step == 6:
            for cache in caches:
                cache.reset([1])
        if step == TOKENS:
            break
        out = together(x, caches[:1], SCALE, tables())
        assert torch.equal(out.hidden, reference(layers, x, caches[1:], SCALE, tables()))
    for cache in caches:  # row 0 has taken all its steps, row 1 has not
        with pytest.raises(ValueError, match=r"layer 0 has taken all num_visual_tokens = 20 steps"):
            together(x, [cache], SCALE, tables())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rows": ({"x": torch.zeros(3, 40)}, r"x must be \[rows of the caches, hidden\] = \[2, 40\]"),
    "dtype": ({"x": torch.zeros(2, 40, dtype=BF16)}, "of torch.float32 on cpu, got .* of torch.bfloat16"),
    "kind": ({"x": [[0.0] * 40] * 2}, "x must be a tensor"),
    "no caches": ({"x": torch.zeros(0, 40), "caches": []}, "caches must not be empty"),
    "backend": ({"backend": "reference"}, r"caches\[0\] must be of .*'cpu'.* got .*'reference'"),
    "layers": ({"plan": mixed(HEADS, num_layers=2)}, r"caches\[0\] must be of .* got"),
    "rotary": ({"rotary": tables(5)}, "cos must be contiguous float32 .at least 23"),
    "cursor": ({"step": TOKENS}, "row 1 has taken 20 steps"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_calls_are_refused_untouched(name: str) -> None:
    given, message = REFUSED[name]
    layers, plan = made(F32), given.get("plan", mixed(HEADS, num_layers=3))
    together = DecoderLayers(layers, QUERY_HEADS, HEADS, DIM)
    cache = CompressedCache(plan, 2, QUERY_HEADS, DIM, PROMPT, TOKENS, F32, backend=given.get("backend", "cpu"))
    if "step" in given:  # of a layer that is not the first
        cache.states[1].cursors[1, 1] = given["step"]
    caches = given.get("caches", [cache])
    before = [tensor.clone() for tensor in everything(caches)]
    with pytest.raises((TypeError, ValueError), match=message):
        together(given.get("x", torch.zeros(2, 40)), caches, SCALE, given.get("rotary", tables()))
    assert all(torch.equal(*pair) for pair in zip(before, everything(caches), strict=True))
    for other in caches:
        assert other.steps.most(0) == 0


def test_the_same_cache_twice_is_refused() -> None:
    together, cache = DecoderLayers(made(F32), QUERY_HEADS, HEADS, DIM), started(mixed(HEADS, num_layers=3), 1, F32)
    with pytest.raises(ValueError, match="caches must be different ones"):
        together(torch.zeros(2, 40), [cache, cache], SCALE, tables())


def test_layers_that_do_not_fit_are_refused() -> None:
    layers = made(F32)
    with pytest.raises(ValueError, match=r"layers\[1\]\.down must be \(inputs, outputs, dtype\)"):
        DecoderLayers([layers[0], layers[0]._replace(down=made(F32, middle=48)[0].down)], QUERY_HEADS, HEADS, DIM)
    with pytest.raises(ValueError, match=r"layers\[0\]\.qkv must be"):
        DecoderLayers(layers, QUERY_HEADS + 1, HEADS, DIM)
    with pytest.raises(ValueError, match="layers must not be empty"):
        DecoderLayers([], QUERY_HEADS, HEADS, DIM)
