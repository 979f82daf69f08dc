"""The executor of PTX: what it must notice, what it must not mind, and schedules beyond those of the contract tests.

The contract tests run on it as the backends ``ptx`` (the CUDA kernels, as nvcc compiles them) and ``ptx_triton``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ssd_kernels import backends

from .cases import BF16, F16, F32, Case, mixed
from .pair import Pair, snapshot
from .ptx import build, planted
from .ptx.schedules import SCHEDULES, scheduled
from .split import LONG, long_pair

NO_EXECUTOR = build.unsupported()
pytestmark = pytest.mark.skipif(NO_EXECUTOR is not None, reason=str(NO_EXECUTOR))
needs_nvcc = pytest.mark.skipif(build.nvcc() is None, reason="needs nvcc")
EXHAUSTIVE = pytest.mark.exhaustive
# What can be left out, by kernel. Groups of copies that are committed last are empty, so that the waits within the
# stream have seen all copies arrive.
LAST_WAIT = "port::wait_copies<0>();"
REDUNDANT = {"bf16-D128-G1": [LAST_WAIT], "f32-D40-G5": [LAST_WAIT]}


def _case(name: str) -> Case:
    if reason := backends.available()[name]:
        pytest.skip(f"{name}: {reason}")
    return Case(name)


each_schedule = pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "lockstep"])


@each_schedule
@pytest.mark.parametrize("name", ["ptx", "ptx_triton"])
@pytest.mark.parametrize(("dtype", "head_dim", "row_buffer", "group"),
                         [(BF16, 128, 3, 1), (F32, 40, 0, 5), pytest.param(F16, 64, 2, 4, marks=EXHAUSTIVE)],
                         ids=["bf16-D128-R3", "f32-D40-R0-G5", "f16-D64-R2-G4"])
def test_schedules(name: str, dtype: torch.dtype, head_dim: int, row_buffer: int, group: int, schedule: str) -> None:
    """Every kind of head, whatever threads and blocks do and whenever stores and copies arrive."""
    pair = Pair(mixed(8, row_buffer), _case(name), group=group, head_dim=head_dim, max_prompt=40, steps=6, dtype=dtype)
    with scheduled(replace(SCHEDULES[schedule], seed=1)):
        pair.prefill((2, 40))
        pair.run(4)


@needs_nvcc
@each_schedule
@pytest.mark.parametrize(("dtype", "group"), [(BF16, 1), pytest.param(F32, 5, marks=EXHAUSTIVE)],
                         ids=["bf16", "f32-G5"])
def test_split_heads_under_schedules(dtype: torch.dtype, group: int, schedule: str) -> None:
    """Blocks that finish what others have begun, while others' stores are late and caches stale."""
    with scheduled(replace(SCHEDULES[schedule], seed=2)):
        long_pair(dtype, case=_case("ptx"), row_buffer=2, keep_prompt=False, heads=LONG[:2], group=group).run(3)


@pytest.mark.parametrize("name", ["ptx", "ptx_triton"])
@pytest.mark.parametrize(("dtype", "head_dim"), [(F32, 32), (BF16, 64)], ids=["f32-D32", "bf16-D64"])
def test_schedules_give_the_same_bits(name: str, dtype: torch.dtype, head_dim: int) -> None:
    seen = []
    for schedule in SCHEDULES.values():
        pair = Pair(mixed(4, row_buffer=3), _case(name), head_dim=head_dim, steps=5, dtype=dtype)
        with scheduled(replace(schedule, races=False, seed=3)):
            pair.prefill((2, 5))
            seen.append([pair.run(4).float().view(torch.int32), *snapshot(pair.cache)])
    for others in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], others, strict=True))


@needs_nvcc
@pytest.mark.parametrize("name", [pytest.param("bf16-D128-G1"), pytest.param("f32-D40-G5", marks=EXHAUSTIVE)])
def test_each_omission_is_noticed(name: str) -> None:
    """No barrier, fence, wait or commit can be left out of the CUDA kernels, but for those known to be redundant."""
    _case("ptx")
    kernel = planted.KERNELS[name]
    backends.get("ptx").extension()
    assert planted.noticed(planted.runs(kernel)) is None, "something is reported with nothing left out"
    unseen = [line for line in planted.omissions(kernel) if planted.noticed(planted.runs(kernel)) is None]
    assert unseen == REDUNDANT[name]


@pytest.mark.parametrize("row_buffer", [3, 0], ids="R{}".format)
def test_each_barrier_of_triton_is_noticed(row_buffer: int) -> None:
    """Those that Triton's kernel asks for. Two are doubled by reductions, which bring barriers of their own."""
    case = _case("ptx_triton")

    def attempt() -> object:
        pair = Pair(mixed(4, row_buffer), case, head_dim=64, max_prompt=40, steps=8, dtype=BF16)
        pair.prefill((40, 3))
        return pair.run(7)

    unseen = {line.partition("# ")[2] for line in planted.triton_omissions(attempt)
              if planted.noticed([attempt]) is None}
    assert unseen == {"logits were written by other threads of this program",
                      "before scores and positions of losers are overwritten"}


@needs_nvcc
@pytest.mark.parametrize("name", planted.CHANGES)
def test_each_changed_source_is_noticed(name: str, tmp_path: Path) -> None:
    _case("ptx")
    backends.get("ptx").extension()
    attempts = [*planted.runs(replace(planted.KERNELS["f32-D40-G5"], group=1)), planted.ties]
    with planted.changed(planted.CHANGES[name], tmp_path):
        assert planted.noticed(attempts) is not None
