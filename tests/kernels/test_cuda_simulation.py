"""The CUDA kernels on the host simulation: split heads, thread orders, sanitizers, and that planted faults are seen.

The contract tests run there too, as the backend ``simulated_cuda``.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ssd_kernels import CachePlan, CompressedCache, HeadSpec, backends

from . import simulation
from .cases import BF16, F16, F32, MIX, Case, mixed, uniform
from .pair import Pair, snapshot

pytestmark = pytest.mark.skipif(not simulation.is_supported(), reason="needs Linux and a C++ compiler")
CASE = Case("simulated_cuda")
PART = 256  # csrc/cuda/decode.h kPartSlots
BARRIERS = 13  # that a block of the runs below meets
WAITS = 8

LONG = (HeadSpec.full(), HeadSpec.heavy(PART + 20, recent=2), HeadSpec.window(PART + 9), HeadSpec.heavy(3),
        HeadSpec.heavy(2 * PART, score="mean", pinned=(1,)))


def simulated() -> simulation.SimulatedCUDABackend:
    backend = backends.get(CASE.name)
    assert isinstance(backend, simulation.SimulatedCUDABackend)
    return backend


@pytest.fixture
def module():
    """The simulation, without faults before and after."""
    extension = simulated().extension()
    extension.set_fault("", 0)
    yield extension
    extension.set_fault("", 0)
    extension.set_seed(0)


def long_pair(dtype: torch.dtype = F32, *, row_buffer: int = 0, keep_prompt: bool = True, group: int = 1,
              heads: tuple[HeadSpec, ...] = LONG, lengths: tuple[int, int] = (2 * PART + 40, PART - 1)) -> Pair:
    """Prompts that fill more than one part, the second row's ending just before a part does."""
    plan = CachePlan([heads], row_buffer=row_buffer, keep_prompt=keep_prompt)
    pair = Pair(plan, CASE, group=group, head_dim=32, max_prompt=max(lengths), steps=8, dtype=dtype, track_scores=True)
    pair.prefill(lengths)
    return pair


@pytest.mark.parametrize("keep_prompt", [True, False], ids=["keep_prompt", "evict_prompt"])
@pytest.mark.parametrize(("dtype", "row_buffer", "group"), [(F32, 0, 1), (BF16, 3, 5), (F16, 3, 1)],
                         ids=["f32-R0", "bf16-R3-G5", "f16-R3"])
def test_heads_split_over_blocks(dtype: torch.dtype, row_buffer: int, group: int, keep_prompt: bool) -> None:
    long_pair(dtype, row_buffer=row_buffer, keep_prompt=keep_prompt, group=group).run(4)


def test_more_heads_than_lanes_and_some_split() -> None:
    heads = tuple(HeadSpec.full() if index % 20 == 19 else HeadSpec.window(2) for index in range(41))
    pair = long_pair(heads=heads, keep_prompt=False, lengths=(PART + 1, 3))
    assert pair.cache._layers[0].native.parts > len(heads)
    pair.run(2)


def test_split_heads_do_not_depend_on_their_batch() -> None:
    both = long_pair(BF16)
    alone = CompressedCache(both.plan, batch_size=1, num_query_heads=len(LONG), head_dim=32,
                            max_prompt=both.max_prompt, num_visual_tokens=both.steps, dtype=BF16, track_scores=True,
                            backend=CASE.name)
    for ours, theirs in zip(alone._layers[0].tensors[:5], both.cache._layers[0].tensors[:5], strict=True):
        ours.copy_(theirs[:1])
    for _ in range(3):
        q, k, v = (both.draw(2, len(LONG), 32) for _ in range(3))
        together = both.cache.decode(0, q, k, v)
        assert torch.equal(together[:1], alone.decode(0, q[:1], k[:1], v[:1]))
    for mine, other in zip(snapshot(alone)[:5], snapshot(both.cache)[:5], strict=True):
        assert torch.equal(mine[0], other[0])


@pytest.mark.parametrize("group", [1, 2])
def test_any_order_of_threads_gives_the_same_bits(module, group: int) -> None:
    seen = []
    for seed in range(4):
        module.set_seed(seed)
        pair = Pair(mixed(8, row_buffer=3), CASE, group=group, head_dim=48, steps=7)
        pair.prefill((2, 5))
        seen.append([pair.run(7).view(torch.int32), *snapshot(pair.cache)])
    for others in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], others, strict=True))


def fails(scenario: Callable[[], None], seeds: int = 6) -> bool:
    """Whether the scenario fails with one of the seeds, or crashes: a faulty kernel may write anywhere."""
    process = multiprocessing.get_context("fork").Process(target=_run_quietly, args=(scenario, seeds))
    process.start()
    process.join()
    return process.exitcode != 0


def _run_quietly(scenario: Callable[[], None], seeds: int) -> None:
    faulthandler.disable()
    for seed in range(seeds):
        simulated().extension().set_seed(seed)
        try:
            scenario()
        except (AssertionError, RuntimeError, IndexError, KeyError):
            os._exit(1)
    os._exit(0)


def short_run() -> None:
    """All kinds of heads, refreshes of more tokens than a warp has lanes, a group that takes two passes over slots."""
    heads = (HeadSpec.heavy(40), HeadSpec.heavy(4, recent=1), HeadSpec.window(5), HeadSpec.full())
    pair = Pair(CachePlan([heads], row_buffer=3, keep_prompt=False), CASE, group=5, head_dim=64, max_prompt=70, steps=6)
    pair.prefill((70, 3))
    pair.run(6)


def split_run() -> None:
    """Heads of three parts, and one of them evicts."""
    long_pair(row_buffer=2, keep_prompt=False, heads=LONG[:2]).run(3)


@pytest.mark.parametrize(("fault", "count"), [("barrier", BARRIERS), ("wait", WAITS)])
def test_no_barrier_and_no_wait_can_be_left_out(module, fault: str, count: int) -> None:
    """Skip them one after the other: each must be seen by one of the runs above in some order of the threads."""
    unseen = []
    for index in range(count):
        module.set_fault(fault, index)
        if not (fails(short_run) or fails(split_run)):
            unseen.append(index)
    assert not unseen


PLANTS = {
    "wrap": ("item.cuh", "at < view.ring ? at", "at <= view.ring ? at"),
    "tie": ("../common/evict.h", "static_cast<uint32_t>(position));", "~static_cast<uint32_t>(position));"),
    "append": ("decode.cuh", "const_cast<T*>(keys)[slot + e] = key;", ""),
    "mask": ("decode.cuh", "token(tile, depth) < count);", "token(tile, depth) <= count);"),
}


@pytest.mark.parametrize("name", PLANTS)
def test_planted_bugs_are_seen(name: str, tmp_path: Path) -> None:
    file, right, wrong = PLANTS[name]
    sources = tmp_path / "csrc"
    shutil.copytree(simulation.ROOT / "csrc", sources)
    path = sources / "cuda" / file
    text = path.read_text()
    assert text.count(right) == 1, f"{file} no longer says {right!r}"
    path.write_text(text.replace(right, wrong))
    backend = simulation.SimulatedCUDABackend(simulation.build(sources, only="decode_f32.cu"))
    original = simulated()
    backends.register(backend)
    try:
        assert fails(ring_and_ties, seeds=1)
    finally:
        backends.register(original)
    assert not fails(ring_and_ties, seeds=1)


def ring_and_ties() -> None:
    """Windows that wrap, and heavy heads whose scores are all equal."""
    pair = Pair(uniform(HeadSpec.window(5)), CASE, head_dim=32, steps=14)
    pair.prefill((2, 5))
    pair.run(14)
    pair = Pair(CachePlan([[HeadSpec.heavy(4), *MIX[:2]]], row_buffer=0), CASE, head_dim=32, steps=7)
    pair.prefill((0, 0))
    for _ in range(7):
        same = torch.zeros(2, 3, 32)
        pair.step(same, same + 1, pair.draw(2, 3, 32))


@pytest.mark.skipif(simulation.SANITIZED, reason="this is the run with sanitizers")
def test_contract_under_sanitizers() -> None:
    """AddressSanitizer and UndefinedBehaviorSanitizer watch the kernels in a Python of their own."""
    asked = [str(simulation.compiler()), "-print-file-name=libasan.so"]
    library = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(library):
        pytest.skip("the compiler brings no AddressSanitizer")
    environment = {**os.environ, "SSD_SIMULATION_SANITIZED": "1", "LD_PRELOAD": os.path.realpath(library),
                   "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0", "SSD_SIMULATION_SEED": "7"}
    chosen = ("simulated_cuda and (test_every_kind_of_head and R4 or test_damaged or test_guards and R4-evict) "
              "or test_heads_split")
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-k",
                          chosen, str(Path(__file__).parent)], env=environment, capture_output=True, text=True,
                         cwd=simulation.ROOT)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
