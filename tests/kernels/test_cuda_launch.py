"""The CUDA backend's host side: launch sizes, split heads, what it refuses, and who serves a GPU without it."""

from __future__ import annotations

import warnings

import pytest
import torch

from ssd_kernels import CachePlan, CompressedCache, HeadSpec, backends
from ssd_kernels.backends.cuda import SHARED_BYTES, CUDABackend, count_parts
from ssd_kernels.layout import LayerLayout

from .cases import BF16, F32, mixed, uniform
from .ptx import build

pytestmark = pytest.mark.skipif(build.unsupported() is not None, reason=str(build.unsupported()))
needs_nvcc = pytest.mark.skipif(build.nvcc() is None, reason="needs nvcc")


@pytest.fixture(scope="module")
def extension():
    backend = backends.get("ptx")
    assert isinstance(backend, CUDABackend)
    return backend.extension()


def layout(plan: CachePlan, max_prompt: int = 20, tokens: int = 576) -> LayerLayout:
    return LayerLayout.build(plan.layers[0], plan, max_prompt, tokens)


def test_a_block_for_every_part_of_every_row(extension):
    part = extension.CUDA_PART_SLOTS
    full = layout(uniform(HeadSpec.full(), num_heads=16))
    assert count_parts(full, 16, part) == 16 * -(-596 // part)
    compressed = layout(uniform(HeadSpec.heavy(96), num_heads=16, row_buffer=24))
    assert count_parts(compressed, 16, part) == 16
    for batch in (1, 2, 512):
        blocks, threads, _ = extension.cuda_decode_launch(batch, 16, 16, 128, 16, 120)
        assert (blocks, threads) == (batch * 16, 128)


@pytest.mark.parametrize("capacity", [1, 255, 256, 257, 512, 513])
def test_parts_are_counted_by_slots(extension, capacity):
    heads = layout(uniform(HeadSpec.window(capacity - 1), num_heads=3), max_prompt=0, tokens=2000)
    assert heads.heads[0].capacity == capacity
    parts = count_parts(heads, 3, extension.CUDA_PART_SLOTS)
    assert parts == 3 * -(-capacity // extension.CUDA_PART_SLOTS)
    unknown = LayerLayout((), heads.slots, 0, 0, 2000, 0, True, 0, capacity)
    bound = count_parts(unknown, 3, extension.CUDA_PART_SLOTS)
    assert parts <= bound <= parts + 3 and (bound == 3) == (capacity <= extension.CUDA_PART_SLOTS)


def test_shared_memory_leaves_room_for_four_blocks(extension):
    # 164 KB of an A100's multiprocessor, of which each block takes 1 KB for the system.
    for head_dim in (64, 128):
        shared = extension.cuda_decode_launch(1, 16, 16, head_dim, 16, 120)[2]
        assert 4 * (shared + 1024) <= 164 * 1024
        assert shared <= 48 * 1024


def test_shared_memory_grows_with_what_is_ranked(extension):
    sizes = [extension.cuda_decode_launch(1, 1, 1, 128, 1, largest)[2] for largest in (100, 1000, 3000)]
    assert sizes == sorted(sizes) and sizes[2] >= 16 * 3001


@needs_nvcc
def test_too_many_evictable_tokens_are_refused():
    plan = uniform(HeadSpec.heavy(SHARED_BYTES // 16))
    cache = CompressedCache(plan, batch_size=1, num_query_heads=2, head_dim=32, max_prompt=0, num_visual_tokens=9000,
                            dtype=F32, backend="ptx")
    before = [tensor.clone() for tensor in cache._layers[0].tensors]
    with pytest.raises(ValueError, match="evictable tokens of a heavy head"):
        cache.decode(0, torch.zeros(1, 2, 32), torch.zeros(1, 2, 32), torch.zeros(1, 2, 32))
    assert all(torch.equal(old, new) for old, new in zip(before, cache._layers[0].tensors, strict=True))


@needs_nvcc
def test_warmup_makes_what_split_heads_need():
    cache = CompressedCache(mixed(3), batch_size=2, num_query_heads=3, head_dim=32, max_prompt=600,
                            num_visual_tokens=5, dtype=BF16, backend="ptx")
    cache.warmup()
    assert cache._layers[0].native.arrivals.shape == (2, 3)


def test_old_devices_and_odd_heads_are_refused(monkeypatch):
    backend = CUDABackend()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0 or newer, got (7, 5)" in str(backend.unsupported(torch.device("cuda"), BF16, 128))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert backend.unsupported(torch.device("cuda"), BF16, 128) is None
    assert "head_dim" in str(backend.unsupported(torch.device("cuda"), BF16, 20))
    assert "device cuda" in str(backend.unsupported(torch.device("cpu"), BF16, 128))


def test_triton_serves_a_gpu_without_the_build_and_says_so_once(monkeypatch):
    device = torch.device("cuda")
    triton = backends.get("triton")
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    monkeypatch.setattr(triton, "unsupported", lambda *arguments: None)
    monkeypatch.setattr(backends.get("cuda"), "unavailable", lambda: "built without CUDA")
    backends._warn_without_cuda.cache_clear()
    with pytest.warns(UserWarning, match="Triton backend on the GPU .*built without CUDA"):
        assert backends.resolve("auto", device, BF16, 128) is triton
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.resolve("auto", device, BF16, 128) is triton
    monkeypatch.setattr(backends.get("cuda"), "unavailable", lambda: None)
    monkeypatch.setattr(backends.get("cuda"), "unsupported", lambda *arguments: None)
    assert backends.resolve("auto", device, BF16, 128).name == "cuda"
