"""The `cpu` backend's instruction sets: each one this machine has, against the oracle and by batch invariance."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ssd_kernels import info, native

from .cases import BF16, F16, F32, Case, mixed, short
from .pair import Pair

CASE = Case("cpu")
SETS = info()["extension"].get("instruction_sets", [])
pytestmark = pytest.mark.skipif(not SETS, reason="the extension is not built")


@pytest.fixture(params=SETS or ["none"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn; the best one again afterwards."""
    extension = native.extension()
    best = extension.instruction_set()
    try:
        extension.set_instruction_set(request.param)
    except ValueError:
        pytest.skip(f"this machine lacks {request.param}")
    yield request.param
    extension.set_instruction_set(best)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=short)
@pytest.mark.parametrize(("heads", "group", "head_dim", "row_buffer"), [(8, 3, 40, 4), (4, 1, 72, 0), (4, 1, 128, 5)],
                         ids=["H8-G3-D40-R4", "H4-G1-D72-R0", "H4-G1-D128-R5"])
def test_instruction_set(instruction_set: str, dtype: torch.dtype, heads: int, group: int, head_dim: int,
                         row_buffer: int) -> None:
    """"AVX-512, AVX2 and portable code chosen at run time": the same contract holds for each."""
    pair = Pair(mixed(heads, row_buffer), CASE, group=group, head_dim=head_dim, max_prompt=7, steps=20, dtype=dtype)
    pair.prefill([7, 2])
    pair.run(20)


def test_every_head_dim(instruction_set: str) -> None:
    """head_dim 32 to 256 in multiples of 8: every tail of every vector width."""
    for head_dim in range(32, 257, 8):
        pair = Pair(mixed(2), CASE, head_dim=head_dim, max_prompt=2, steps=4, dtype=BF16, batch=1)
        pair.prefill([2])
        pair.run(4)


@pytest.mark.parametrize("threads", [2, 3], ids=["row-by-row", "head-by-head"])
def test_both_orders_of_items(instruction_set: str, threads: int) -> None:
    """From 4 rows per thread on, threads go through the slabs row by row; fewer rows are shared out by heads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        pair = Pair(mixed(8), CASE, head_dim=64, max_prompt=3, steps=8, dtype=BF16, batch=9)
        pair.prefill([row % 4 for row in range(9)])
        pair.run(8)
    finally:
        torch.set_num_threads(before)


def test_unknown_instruction_set_is_refused() -> None:
    """Bad input names the argument."""
    with pytest.raises(ValueError, match="name must be an instruction set.*sse9"):
        native.extension().set_instruction_set("sse9")
