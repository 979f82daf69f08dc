"""What Triton compiles while pictures are drawn: one kernel per kind of layer, and nothing later.

Triton's own launch path decides, with a driver that stands for a GPU. A compilation in the middle of a run takes a
second, and inside a capture it fails.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ssd_kernels import CachePlan, CompressedCache, HeadSpec
from ssd_kernels.backends.triton import TritonBackend

from .cases import BF16, F32

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's own driver is in use")

H, D = 4, 64
HALF = [HeadSpec.window(21) if head % 2 else HeadSpec.heavy(21, recent=5, score="mean") for head in range(H)]
FULL = [HeadSpec.full()] * H
PLAN = CachePlan([HALF, HALF, FULL], row_buffer=24)

Count = Callable[[Callable[[], object]], int]


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Count:
    """Counts the kernels that a call would compile which no earlier call did."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    seen: set[Any] = set()

    def hook(*, key: Any, fn: Any, **others: Any) -> bool:
        seen.add((fn.name, key))
        return True  # nothing is compiled

    def count(call: Callable[[], object]) -> int:
        before = len(seen)
        call()
        return len(seen) - before

    pretended = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 0,
                                get_current_target=lambda: GPUTarget("cuda", 90, 32),
                                get_device_interface=lambda: torch.cuda)
    monkeypatch.setattr(type(driver), "active", property(lambda self: pretended))
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", hook)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(TritonBackend, "unavailable", lambda self: None)
    monkeypatch.setattr(TritonBackend, "unsupported", lambda *arguments: None)
    monkeypatch.setattr(TritonBackend, "capability", lambda self, device: 90)
    return count


def cache(plan: CachePlan = PLAN, batch: int = 4, dtype: torch.dtype = BF16, prompt: int = 24,
          tokens: int = 96) -> CompressedCache:
    return CompressedCache(plan, batch, plan.num_heads, D, prompt, tokens, dtype, "cpu", "triton")


def step(made: CompressedCache, fused: bool = True, rotary: bool = True, scale: float | None = None,
         layers: int | None = None) -> None:
    """One step of every layer; q, k and v from one tensor, or each contiguous."""
    heads, batch, positions = made.plan.num_heads, made.batch_size, made.max_prompt + made.num_visual_tokens
    x = torch.zeros(batch, 3 * heads, D, dtype=made.dtype)
    q, k, v = x.split(heads, 1) if fused else (part.contiguous() for part in x.split(heads, 1))
    tables = (torch.ones(positions, D // 2),) * 2 if rotary else None
    for layer in range(layers or made.plan.num_layers):
        made.decode(layer, q, k, v, scale, tables)


def start(made: CompressedCache, length: int, rows: list[int] | None = None) -> None:
    count = made.batch_size if rows is None else len(rows)
    k = torch.zeros(count, made.plan.num_heads, length, D, dtype=made.dtype)
    for layer in range(made.plan.num_layers):
        made.prefill(layer, k, k, [length] * count, rows=rows)


def test_one_per_kind_of_layer_and_all_in_the_warmup(compilations: Count) -> None:
    made = cache()
    # Two kinds of layers, with and without scores; prompts are stored alike in both.
    assert compilations(lambda: made.warmup(rotary=True)) == 2 + 1
    for length in (24, 17, 16, 1, 8):
        assert compilations(lambda: start(made, length)) == 0  # noqa: B023
    assert compilations(lambda: start(made, 7, rows=[1])) == 0
    for _ in range(26):
        assert compilations(lambda: step(made)) == 0


def test_none_for_sizes_and_strides(compilations: Count) -> None:
    assert compilations(lambda: cache().warmup(rotary=True)) == 2 + 1
    for batch, prompt, tokens in ((1, 24, 96), (2, 24, 96), (16, 24, 96), (2, 1, 24), (2, 16, 1024), (3, 64, 25)):
        for fused in (True, False):
            made = cache(batch=batch, prompt=prompt, tokens=tokens)
            assert compilations(lambda: (start(made, prompt), step(made, fused))) == 0  # noqa: B023
    one = cache(CachePlan([[HeadSpec.heavy(21, recent=9)]], 24), batch=1)  # strides of one head are those of a row
    assert compilations(lambda: (start(one, 3), step(one, fused=False))) == 0


@pytest.mark.parametrize("scale", [1, 2, 0.5, True])
def test_none_for_scales(compilations: Count, scale: float) -> None:
    made = cache()
    assert compilations(lambda: step(made)) == 2
    assert compilations(lambda: step(made, scale=scale)) == 0


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "f32"])
def test_caches_in_8_bits_compile_in_their_warmup_too(compilations: Count, dtype: torch.dtype) -> None:
    made = cache(replace(PLAN, kv_format="int8"), dtype=dtype)
    assert compilations(lambda: made.warmup(rotary=True)) == 2 + 1
    assert compilations(lambda: (start(made, 24), start(made, 7, rows=[1]), step(made), step(made, fused=False))) == 0
    shared = CompressedCache(made.plan, 4, H, D, 24, 96, dtype, "cpu", "triton", shared_prompts=2)
    assert compilations(lambda: shared.warmup(rotary=True)) == 2
    assert compilations(lambda: step(shared)) == 0
    assert compilations(lambda: cache(dtype=dtype).warmup(rotary=True)) == 2 + 1, "in the cache's type"


def test_one_for_the_draws_of_a_model(compilations: Count) -> None:
    """Not for another batch, share of guided pictures or number; to leave a filter out is another kernel."""
    from ssd_kernels import sampling

    def draw(pictures: int, guided: int, temperature: float, top_k: int, top_p: float) -> None:
        seeds = torch.arange(pictures)
        sampling.launch_kernel(sampling._kernel(), torch.empty_like(seeds), torch.zeros(pictures + guided, 64),
                               torch.ones(guided), seeds, torch.zeros(1, dtype=torch.long).expand(pictures),
                               temperature, top_k, top_p)

    assert compilations(lambda: draw(4, 4, 0.9, 50, 0.9)) == 1
    for others in ((1, 1, 1, 1, 0.5), (2, 0, 1.5, 63, 1e-6), (16, 3, 2, 16, 0.999)):
        assert compilations(lambda: draw(*others)) == 0  # noqa: B023
    assert compilations(lambda: draw(4, 4, 0.9, 0, 0.9)) == 1
    assert compilations(lambda: draw(4, 4, 0.9, 64, 0.8)) == 0, "as many as there are"


def test_others_are_counted(compilations: Count) -> None:
    """The counts above can fail: what is a constant of the kernel, compiles another one."""
    assert compilations(lambda: step(cache(), layers=1)) == 1
    assert compilations(lambda: step(cache(), layers=1, rotary=False)) == 1
    assert compilations(lambda: step(cache(dtype=F32), layers=1)) == 1
    assert compilations(lambda: step(cache(CachePlan([HALF])), layers=1)) == 1, "evicts at every step"
    assert compilations(lambda: step(cache(CachePlan([[HeadSpec.heavy(80)] * H], 24)), layers=1)) == 1, "ranks more"
    assert compilations(lambda: step(cache(CachePlan([HALF], 24)), layers=1)) == 0
