"""The CUDA kernels on the host simulation: split heads, thread orders, sanitizers, and that planted faults are seen.

The contract tests run there too, as the backend ``simulated_cuda``; and the tests of split heads on a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssd_kernels import CompressedCache, HeadSpec

from . import simulation
from .cases import BF16, F16, F32, PART, Case, each_cuda, mixed
from .pair import Pair, snapshot
from .planted import CASE, LONG, PLANTS, long_pair, simulated

pytestmark = pytest.mark.skipif(not simulation.is_supported(), reason="needs Linux and a C++ compiler")
BARRIERS = 13  # that a block of the runs below meets
WAITS = 8


@pytest.fixture
def module():
    """The simulation, without faults before and after."""
    extension = simulated().extension()
    extension.set_fault("", 0)
    yield extension
    extension.set_fault("", 0)
    extension.set_seed(0)


@each_cuda
@pytest.mark.parametrize("keep_prompt", [True, False], ids=["keep_prompt", "evict_prompt"])
@pytest.mark.parametrize(("dtype", "row_buffer", "group"), [(F32, 0, 1), (BF16, 3, 5), (F16, 3, 1)],
                         ids=["f32-R0", "bf16-R3-G5", "f16-R3"])
def test_heads_split_over_blocks(case: Case, dtype: torch.dtype, row_buffer: int, group: int,
                                 keep_prompt: bool) -> None:
    long_pair(dtype, case=case, row_buffer=row_buffer, keep_prompt=keep_prompt, group=group).run(4)


@each_cuda
def test_more_heads_than_lanes_and_some_split(case: Case) -> None:
    heads = tuple(HeadSpec.full() if index % 20 == 19 else HeadSpec.window(2) for index in range(41))
    pair = long_pair(case=case, heads=heads, keep_prompt=False, lengths=(PART + 1, 3))
    assert pair.cache._layers[0].native.parts > len(heads)
    pair.run(2)


@each_cuda
def test_split_heads_do_not_depend_on_their_batch(case: Case) -> None:
    both = long_pair(BF16, case=case)
    alone = CompressedCache(both.plan, batch_size=1, num_query_heads=len(LONG), head_dim=32,
                            max_prompt=both.max_prompt, num_visual_tokens=both.steps, dtype=BF16, track_scores=True,
                            device=case.device, backend=case.name)
    for ours, theirs in zip(alone._layers[0].tensors[:5], both.cache._layers[0].tensors[:5], strict=True):
        ours.copy_(theirs[:1])
    for _ in range(3):
        q, k, v = (both.draw(2, len(LONG), 32).to(case.device) for _ in range(3))
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


@pytest.mark.parametrize(("what", "argument"),
                         [("barrier", BARRIERS), ("wait", WAITS), *((name, "") for name in PLANTS)])
def test_whatever_is_planted_is_seen(what: str, argument: object, tmp_path: Path) -> None:
    """No barrier and no wait can be left out, and no bug put in, without a run that fails."""
    run = subprocess.run([sys.executable, "-m", "tests.kernels.planted", what, str(argument or tmp_path)],
                         cwd=simulation.ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.skipif(simulation.SANITIZED, reason="this is the run with sanitizers")
def test_contract_under_sanitizers() -> None:
    """AddressSanitizer and UndefinedBehaviorSanitizer watch the kernels in a Python of their own."""
    libraries = []  # Python links no libstdc++, and AddressSanitizer must find it when it starts, or exceptions crash
    for name in ("libasan.so", "libstdc++.so"):
        asked = [str(simulation.compiler()), f"-print-file-name={name}"]
        libraries.append(os.path.realpath(subprocess.run(asked, capture_output=True, text=True).stdout.strip()))
    if not all(map(os.path.exists, libraries)):
        pytest.skip("the compiler brings no AddressSanitizer")
    environment = {**os.environ, "SSD_SIMULATION_SANITIZED": "1", "LD_PRELOAD": " ".join(libraries),
                   "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0", "SSD_SIMULATION_SEED": "7"}
    chosen = ("simulated_cuda and (test_every_kind_of_head and R4 or test_damaged or test_guards and R4-evict "
              "or test_heads_split or test_operators_refuse and q-heads)")
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-k",
                          chosen, str(Path(__file__).parent)], env=environment, capture_output=True, text=True,
                         cwd=simulation.ROOT)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
