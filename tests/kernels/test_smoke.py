"""The smallest runs of a backend: the first thing to try on a GPU, one case in a process.

With ``-s`` each says what it is about to do, so that of a run that hangs or dies the last line tells where.
"""

from __future__ import annotations

import pytest
import torch

from ssd_kernels import CachePlan, HeadSpec

from .cases import BF16, F16, F32, Case, each_backend
from .pair import Pair
from .split import LONG, long_pair
from .test_rotary import test_rotating_inside_is_rotating_before as rotating_inside

HEADS = (HeadSpec.full(), HeadSpec.window(3), HeadSpec.heavy(4, recent=1), HeadSpec.heavy(3, score="mean"))
STEPS = 8
CASES = {  # dtype, head_dim, query heads per KV head, row buffer
    "plain": (F32, 64, 1, 0), "refresh": (BF16, 128, 1, 3), "grouped": (F16, 64, 4, 0), "split": (BF16, 128, 1, 0),
    "rotary": (BF16, 40, 2, 3)}


@each_backend
@pytest.mark.parametrize("name", CASES)
def test_smoke(case: Case, name: str) -> None:
    def say(what: str) -> None:
        if case.device == "cuda":
            torch.cuda.synchronize()
        print(f"{case.name}, {name}: {what}", flush=True)

    dtype, head_dim, group, row_buffer = CASES[name]
    if name == "rotary":
        say("caches, and steps with rotation inside")
        return rotating_inside(case, dtype)
    say("caches and prompts")
    if name == "split":
        pair = long_pair(dtype, case=case, heads=LONG[:3], head_dim=head_dim)
    else:
        pair = Pair(CachePlan([HEADS], row_buffer), case, group=group, head_dim=head_dim, steps=STEPS, dtype=dtype)
        pair.prefill([5, 2])
    for step in range(STEPS):
        say(f"step {step}")
        pair.step()
    say("done")
