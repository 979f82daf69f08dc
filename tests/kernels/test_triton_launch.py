"""The host side of the Triton kernels: plain functions of plain numbers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from ssd_kernels import CachePlan, HeadSpec, backends
from ssd_kernels.backends.triton import TritonBackend
from ssd_kernels.layout import LayerLayout
from ssd_kernels.state import LayerState
from ssd_kernels.triton import launch
from ssd_kernels.triton.launch import check_limits


@pytest.mark.parametrize(("n", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_power_of_two(n: int, power: int) -> None:
    assert launch.power_of_two(n) == power


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100])
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("item_size", [2, 4])
@pytest.mark.parametrize("head_dim", [32, 40, 64, 96, 128, 192, 256])
def test_blocks_fit(head_dim: int, item_size: int, int8: bool, group: int, capability: int) -> None:
    """Powers of two, and tiles of which every multiprocessor's shared memory holds two programs' worth."""
    config = launch.decode_config(head_dim, item_size, group, 256, capability, int8)
    assert config.registers * 32 * config.warps <= 65536
    for size in (config.block, config.score_block, config.copy_block, config.warps):
        assert size & (size - 1) == 0
    assert config.block >= 8 and config.stages >= 2
    shared = (config.stages - 1) * 2 * config.block * launch.power_of_two(head_dim) * (1 if int8 else item_size)
    assert 2 * shared <= (100 if capability in (86, 89) else 164) * 1024


@pytest.mark.parametrize(("arguments", "variant"), [
    ((128, 2, 1, 256, 90), (True, 32, 2, 3, 255)),
    ((128, 2, 1, 256, 86), (True, 32, 2, 2, 255)),  # shared memory for one block and four programs
    ((128, 2, 4, 256, 90), (True, 32, 2, 3, 255)),
    ((64, 2, 1, 256, 80), (True, 32, 2, 4, 168)),
    ((40, 2, 5, 256, 80), (True, 32, 2, 4, 168)),
    ((128, 2, 1, 1024, 90), (True, 32, 2, 3, 255)),
    ((128, 2, 1, 2048, 90), (True, 64, 4, 2, 255)),  # more ranks than two warps hold in registers
    ((256, 2, 1, 256, 80), (True, 32, 4, 2, 255)),  # two warps share their slots and halve the dimension
    ((128, 4, 1, 256, 80), (False, 16, 4, 3, 128)),
    ((32, 4, 1, 256, 86), (False, 64, 4, 2, 128)),
    ((128, 4, 4, 256, 80), (False, 8, 4, 4, 255)),
    ((128, 4, 8, 256, 80), (False, 8, 8, 4, 255)),
    ((128, 2, 1, 256, 90, True), (True, 64, 2, 3, 200)),  # in 8 bits, the same bytes
    ((128, 2, 1, 256, 86, True), (True, 64, 2, 2, 200)),
    ((64, 2, 1, 256, 80, True), (True, 64, 2, 4, 144)),
    ((256, 2, 1, 256, 80, True), (True, 32, 4, 3, 255)),
    ((128, 4, 1, 256, 80, True), (False, 16, 4, 4, 128)),
], ids=str)
def test_variants(arguments: tuple[int, ...], variant: tuple[bool, int, int, int, int]) -> None:
    """Which variant serves what: matrices or multiply-adds, slots at once, warps, stages, registers."""
    config = launch.decode_config(*arguments)
    assert (config.matrices, config.block, config.warps, config.stages, config.registers) == variant


def test_config_does_not_depend_on_the_batch() -> None:
    """docs/specification.md, section 3.9: nothing about the batch is asked for."""
    assert "batch" not in launch.decode_config.__code__.co_varnames


def layout(*specs: HeadSpec, row_buffer: int = 0, tokens: int = 576, kv_format: str = "auto") -> LayerLayout:
    return LayerLayout.build(specs, CachePlan([specs], row_buffer, kv_format=kv_format), 10, tokens)


def test_bytes_of_a_full_head() -> None:
    """30 prompt and visual tokens and the new one, K and V of 64 bfloat16; q, k, v and output; two cursors twice."""
    assert launch.step_bytes(layout(HeadSpec.full()), 10, 20, 64, 2) == 2 * 128 * 31 + 4 * 128 + 16


def test_bytes_of_a_full_head_in_8_bits() -> None:
    """64 bytes and a scale for each vector that is kept."""
    assert launch.step_bytes(layout(HeadSpec.full(), kv_format="int8"), 10, 20, 64, 2) == 2 * 68 * 31 + 4 * 128 + 16


def test_bytes_stop_growing_with_the_window() -> None:
    window = layout(HeadSpec.window(7))
    found = [launch.step_bytes(window, 3, step, 64, 2) for step in (0, 6, 7, 8, 500)]
    assert found[0] < found[1] < found[2] == found[3] == found[4]
    assert found[2] == 2 * 128 * (3 + 7 + 1) + 4 * 128 + 16


def test_bytes_of_scores_and_evictions() -> None:
    """A heavy head also reads and writes scores (4 bytes), writes one position, and reads positions to evict."""
    heavy, window = layout(HeadSpec.heavy(7), row_buffer=4), layout(HeadSpec.window(7), row_buffer=4)
    for step, held in ((12, 7), (15, 10)):
        extra = launch.step_bytes(heavy, 3, step, 64, 2) - launch.step_bytes(window, 3, step, 64, 2)
        assert extra == 8 * (3 + held) + 8 + (4 * held if step == 15 else 0)


def test_queries_of_a_group_share_the_slots() -> None:
    one, four = (launch.step_bytes(layout(HeadSpec.full()), 10, 20, 64, 2, query_heads=n) for n in (1, 4))
    assert four - one == 2 * 3 * 128


def test_byte_count_follows_the_sizes_of_the_tensors() -> None:
    """With everything kept, the slabs' bytes: an independent way to the same number."""
    full = layout(HeadSpec.full(), HeadSpec.full(), tokens=30)
    slabs = full.nbytes(1, 64, torch.bfloat16) - 8 - 2 * 4 * (8 + full.pin_words)
    assert launch.step_bytes(full, 10, 29, 64, 2) == slabs + 16 + 128 * 4 * 2


def test_auto_takes_triton_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the compiled CUDA extension, `backend="auto"` serves CUDA tensors with Triton."""
    monkeypatch.setattr(TritonBackend, "unavailable", lambda self: None)
    assert backends.resolve("auto", torch.device("cuda"), torch.bfloat16, 128).name == "triton"
    with pytest.raises(ValueError, match="head_dim"):
        backends.resolve("triton", torch.device("cuda"), torch.bfloat16, 20)


def test_launches_on_the_device_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes the current device; both kernels are launched while that is the tensors' own, and told to fuse."""
    events: list[object] = []

    @contextmanager
    def device(index: int) -> Iterator[None]:
        events.append(index)
        yield
        events.append("leave")

    class Kernel:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *arguments, **constants: events.append(constants["enable_fp_fusion"])

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: 3)
    monkeypatch.setattr("ssd_kernels.backends.triton._kernels",
                        lambda: SimpleNamespace(decode_kernel=Kernel(), prefill_kernel=Kernel()))
    state = LayerState.allocate(layout(HeadSpec.full()), [HeadSpec.full()], 1, 64, torch.float32, torch.device("cpu"))
    x = torch.ones(1, 1, 64)
    TritonBackend().decode(state, x, x, x, 1.0)
    TritonBackend().prefill(state, x[:, :, None], x[:, :, None], [1], None, [0])
    assert events == [3, True, "leave"] * 2


def test_import_needs_no_triton() -> None:
    """`import ssd_kernels` loads torch only; Triton comes with the first use of its backend."""
    code = "import sys, ssd_kernels; ssd_kernels.info(); sys.exit('triton.language' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_bytes_that_cannot_be_read_by_fours() -> None:
    """Slabs of the operators' callers may start anywhere."""
    specs = [HeadSpec.full()]
    state = LayerState.allocate(LayerLayout.build(specs, CachePlan([specs], kv_format="int8"), 10, 8), specs, 1, 64,
                                torch.float32, torch.device("cpu"))
    state.values = torch.zeros(state.values.numel() + 2, dtype=torch.int8)[2:].view(state.values.shape)
    x = torch.ones(1, 1, 64)
    for call in (lambda: TritonBackend().decode(state, x, x, x, 1.0),
                 lambda: TritonBackend().prefill(state, x[:, :, None], x[:, :, None], [1], None, [0])):
        with pytest.raises(ValueError, match="values must start at a multiple of 4 bytes with kv_format='int8', got"):
            call()


@pytest.mark.parametrize(("heads", "steps"), [(launch.MAX_HEADS + 1, 8), (2, launch.MAX_STEPS + 1)])
def test_limits_are_refused(heads: int, steps: int) -> None:
    """The cursor's bits hold so many steps and programs."""
    with pytest.raises(ValueError, match="at most"):
        check_limits(heads, steps)
