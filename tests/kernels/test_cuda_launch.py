"""The CUDA backend's host side: launch sizes, split heads, what it refuses, and who serves a GPU without it."""

from __future__ import annotations

import warnings

import pytest
import torch

from ssd_kernels import CachePlan, CompressedCache, HeadSpec, backends
from ssd_kernels.backends.cuda import SHARED_BYTES, CUDABackend, alternates, count_parts
from ssd_kernels.layout import LayerLayout

from .cases import BF16, F32, PART, Case, mixed, uniform
from .pair import snapshot
from .ptx import build
from .ptx.cuda import PTXBackend
from .split import LONG, long_pair

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


def test_blocks_per_multiprocessor(extension):
    """The table that a measurement would change, and that shared memory has room for it."""
    table = {(80, 128, 1): 4, (80, 64, 1): 4, (80, 40, 1): 4, (80, 128, 4): 3,
             (90, 128, 1): 6, (90, 64, 1): 6, (90, 40, 1): 5, (90, 128, 4): 4,
             (90, 64, 4): 4, (90, 40, 4): 3}
    table = {**{(*variant, False): blocks for variant, blocks in table.items()},
             **{(*variant, True): blocks for variant, blocks in table.items()},
             (80, 128, 4, True): 2, (80, 40, 4, True): 2}
    for variant, blocks in table.items():
        capability, head_dim, group, int8 = variant
        assert extension.cuda_blocks_per_multiprocessor(*variant) == blocks, variant
        # Of an A100's or H100's multiprocessor each block takes 1 KB for the system.
        shared = extension.cuda_decode_launch(1, 16, 16 * group, head_dim, 16, 120, int8)[2]
        assert blocks * (shared + 1024) <= (164 if capability == 80 else 228) * 1024, variant
        assert shared <= 48 * 1024


def launch_items(layout: LayerLayout, alternating: bool = False) -> list[list[int]]:
    """What `CUDALayer.list_items` of the executor's module lists."""
    extension = build.module()
    heads = len(layout.heads)
    layer = extension.CUDALayer(*[0] * 7, 0, 1, heads, 32, layout.slots, layout.scored_slots, layout.max_prompt,
                                layout.num_visual_tokens, layout.row_buffer, layout.keep_prompt, *[0] * 4, False,
                                *[0] * 4)
    parts = count_parts(layout, heads, extension.CUDA_PART_SLOTS)
    table, items = layout.table(), torch.empty((parts, extension.CUDA_ITEM_WORDS), dtype=torch.int32)
    layer.list_items(table.data_ptr(), alternating, items.data_ptr())
    return items.tolist()


@pytest.mark.parametrize("alternating", [False, True])
def test_launch_items(alternating):
    """Every part of every head once, with what its row of the table says, in the order of launching."""
    plan = CachePlan([[HeadSpec.heavy(size) for size in (30, 600, 7, 300, 100)]], row_buffer=4)
    expected = layout(plan, max_prompt=10, tokens=900)
    items = launch_items(expected, alternating)
    heads = [item[0] for item in items if item[1] == 0]
    assert heads == ([1, 2, 3, 0, 4] if alternating else [1, 3, 4, 0, 2])
    table = expected.table()
    for rank, (head, part, parts, first_part, kind, offset, keep, rule, score_offset, ring, _, _) in enumerate(items):
        assert rank == first_part + part and parts == -(-expected.heads[head].capacity // 256)
        assert [kind, offset, keep, rule, score_offset] == table[head, [0, 1, 3, 5, 6]].tolist()
        assert ring == expected.heads[head].ring
    assert sorted((item[0], item[1]) for item in items) == sorted(
        (head, part) for head, span in enumerate(expected.heads) for part in range(-(-span.capacity // 256)))


def test_slots_of_a_ring_are_found_without_division():
    """The multiplication and shift of a launch item are exact for every number that a kernel may divide."""
    for size in (1, 2, 3, 5, 7, 24, 64, 115, 255, 256, 257, 641, 4095, 65537, 2**20 - 1):
        plan = uniform(HeadSpec.window(size), num_heads=1)
        items = launch_items(layout(plan, max_prompt=0, tokens=size + 1))
        ring, multiplier, shift = items[0][9:]
        for n in {0, 1, ring - 1, ring, ring + 1, 2**20 + 3, 2**31 - 1 - 2**31 % ring, 2**31 - 1}:
            assert n * (multiplier % 2**32) >> shift == n // ring, (ring, n)


@pytest.mark.parametrize(("variant", "alternating"), [((90, 128), True), ((90, 64), True), ((80, 128), False),
                                                      ((90, 40), False)])
def test_heads_alternate_where_six_blocks_fit(extension, variant, alternating):
    assert alternates(extension, *variant) == alternating


@needs_nvcc
def test_the_order_of_launching_changes_no_bits(monkeypatch):
    seen = []
    for capability in (80, 90):
        monkeypatch.setattr(PTXBackend, "_capability", lambda self, device, given=capability: given)
        pair = long_pair(BF16, case=Case("ptx"), heads=LONG[1:4], lengths=(PART + 3, 2), head_dim=64)
        seen.append([pair.run(1).float().view(torch.int32), *snapshot(pair.cache)])
        state = pair.cache._layers[0]
        capacities = [state.layout.heads[head].capacity for head in state.native.items[:, 0].tolist()]
        assert (capacities == sorted(capacities, reverse=True)) == (capability == 80)
    assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))


def test_shared_memory_grows_with_what_is_ranked(extension):
    sizes = [extension.cuda_decode_launch(1, 1, 1, 128, 1, largest)[2] for largest in (100, 1000, 3000)]
    assert sizes == sorted(sizes) and sizes[2] >= 12 * 3001


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
