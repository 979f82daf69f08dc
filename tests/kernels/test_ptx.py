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

# Lines that ask for order in vain, and why. They are noticed as soon as they no longer do.
REDUNDANT = {
    "port::wait_copies<0>();": "the groups of copies that are committed last are empty",
    "port::sync_block();  // the ranks are there":
        "threads count the ranks that they wrote themselves, and the counting has barriers before others are read",
}
ONE_PASS = {
    "port::sync_block();  // the sums lie where the stages were": "one query passes over the slots once",
}
REDUNDANT_IN_TRITON = {
    "tl.debug_barrier()  # logits were written by other threads of this program": "a reduction has a barrier",
    "tl.debug_barrier()  # before scores and positions of losers are overwritten": "a reduction has a barrier",
    'if tl.atomic_add(cursors + 1, ONE_ARRIVAL, sem="acq_rel") >> ARRIVAL_SHIFT == heads - 1:':
        "programs share only the cursor, always by strong accesses",
    'tl.atomic_xchg(cursors + 1, step + 1, sem="relaxed")': "the addition before it acquires",
}


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


# Where nothing should be noticed, all schedules take long.
QUIET = ("lockstep", "adversarial")
each_order_of_cuda = pytest.mark.parametrize(("name", "order"), [
    pytest.param(name, order, id=f"{name}-{order.place if order else 'all'}",
                 marks=[] if name == "f32-D40-G5" and order else [EXHAUSTIVE])
    for name in ("f32-D40-G5", "bf16-D128-G1", "i8-D40-G1") for order in (None, *planted.cuda_orders())])
each_order_of_triton = pytest.mark.parametrize("order", [
    pytest.param(order, id=order.place if order else "all", marks=[] if order else [EXHAUSTIVE])
    for order in (None, *planted.triton_orders())])


@needs_nvcc
@each_order_of_cuda
def test_order_in_cuda_is_noticed(name: str, order: planted.Order | None, tmp_path: Path) -> None:
    """Every barrier, fence, wait, commit and strong access that the sources ask for, left out in turn."""
    _case("ptx")
    kernel = planted.KERNELS[name]
    backends.get("ptx").extension()
    redundant = order is None or order.line in REDUNDANT or (kernel.group == 1 and order.line in ONE_PASS)
    with planted.changed(kernel, [order.without] if order else [], tmp_path):
        said = planted.noticed(planted.runs(kernel), QUIET if redundant else SCHEDULES)
    assert (said is None) == redundant, said


@each_order_of_triton
def test_order_in_triton_is_noticed(order: planted.Order | None, tmp_path: Path) -> None:
    """Every barrier and atomic that the sources ask for."""
    _case("ptx_triton")
    redundant = order is None or order.line in REDUNDANT_IN_TRITON
    with planted.changed_triton(order.without if order else None, tmp_path):
        said = planted.noticed(planted.triton_runs(), QUIET if redundant else SCHEDULES)
    assert (said is None) == redundant, said


def test_without_nvcc_triton_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "nvcc", lambda: None)
    assert backends.get("ptx").unavailable() == "no nvcc, which makes the CUDA kernels' PTX"
    assert "nvcc" not in (backends.get("ptx_triton").unavailable() or "")


def test_all_that_orders_is_known() -> None:
    """What port.cuh has for order has a twin without, and what is redundant is one line of the sources."""
    assert planted.asking_functions() == sorted(planted.twins())
    lines = [order.line for order in planted.cuda_orders() + planted.triton_orders()]
    assert [lines.count(line) for line in {**REDUNDANT, **ONE_PASS, **REDUNDANT_IN_TRITON}] == [1] * 7


@needs_nvcc
@pytest.mark.parametrize(("kernel", "change"), [
    *(pytest.param(planted.KERNELS["f32-D40-G1"], change, id=name) for name, change in planted.CHANGES.items()),
    *(pytest.param(planted.KERNELS["i8-D40-G1"], change, id=name)
      for name, change in planted.CHANGES_TO_BYTES.items())])
def test_each_changed_source_is_noticed(kernel: planted.Kernel, change: tuple[planted.Change, ...],
                                        tmp_path: Path) -> None:
    _case("ptx")
    backends.get("ptx").extension()
    with planted.changed(kernel, change, tmp_path):
        assert planted.noticed([*planted.runs(kernel), lambda: planted.ties(kernel),
                                lambda: planted.halves(kernel)]) is not None
