"""Runs of the simulated CUDA backend that must fail once something is wrong with its kernels, and what to get wrong.

``python -m tests.kernels.planted barrier|wait COUNT`` leaves out every barrier or wait for copies in turn;
``python -m tests.kernels.planted NAME FOLDER`` puts one of `PLANTS` into a copy of the sources. Exit 0: all seen.
A process of its own, because every attempt is a fork that may crash or hang, and a test runner has threads.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ssd_kernels import CachePlan, HeadSpec, backends

from . import simulation
from .cases import F32, PART, Case, uniform
from .pair import Pair

CASE = Case("simulated_cuda")
PATIENCE = 60  # seconds; a run takes less than one

LONG = (HeadSpec.full(), HeadSpec.heavy(PART + 20, recent=2), HeadSpec.window(PART + 9), HeadSpec.heavy(3),
        HeadSpec.heavy(2 * PART, score="mean", pinned=(1,)))


PLANTS = {
    "wrap": ("item.cuh", "begin + view.evictable - view.ring, 0", "begin + view.evictable - view.ring - 1, 0"),
    "tie": ("../common/evict.h", "static_cast<uint32_t>(position));", "~static_cast<uint32_t>(position));"),
    "append": ("decode.cuh", "const_cast<T*>(keys)[slot + e] = key;", ""),
    "mask": ("attend.cuh", "smaller(item.total - begin, kPartSlots)", "smaller(item.total - begin + 1, kPartSlots)"),
}


def simulated() -> simulation.SimulatedCUDABackend:
    backend = backends.get(CASE.name)
    assert isinstance(backend, simulation.SimulatedCUDABackend)
    return backend


def long_pair(dtype: torch.dtype = F32, *, case: Case = CASE, row_buffer: int = 0, keep_prompt: bool = True,
              group: int = 1, heads: tuple[HeadSpec, ...] = LONG,
              lengths: tuple[int, int] = (2 * PART + 40, PART - 1)) -> Pair:
    """Prompts that fill more than one part, the second row's ending just before a part does."""
    plan = CachePlan([heads], row_buffer=row_buffer, keep_prompt=keep_prompt)
    pair = Pair(plan, case, group=group, head_dim=32, max_prompt=max(lengths), steps=8, dtype=dtype, track_scores=True)
    pair.prefill(lengths)
    return pair


def fails(scenario: Callable[[], None], seeds: int = 6) -> bool:
    """Whether the scenario fails with one of the seeds, crashes or does not end: a faulty kernel may do anything."""
    process = multiprocessing.get_context("fork").Process(target=_run_quietly, args=(scenario, seeds))
    process.start()
    process.join(PATIENCE)
    process.kill()  # no effect on one that has ended
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


def ring_and_ties() -> None:
    """Windows that wrap, and heavy heads in which all tokens but one have a score of exactly 0."""
    pair = Pair(uniform(HeadSpec.window(5)), CASE, head_dim=32, steps=14)
    pair.prefill((2, 5))
    pair.run(14)
    pair = Pair(uniform(HeadSpec.heavy(4)), CASE, head_dim=32, max_prompt=1, steps=9, scale=1.0)
    loud = torch.zeros(2, 2, 1, 32)
    loud[..., 0] = 100.0  # quiet keys' logits are 2e4 below, and their probability 0
    pair.prefill((1, 1), k=loud)
    for _ in range(9):
        pair.step(q=loud[:, :, 0], k=-loud[:, :, 0])


def unseen_faults(fault: str, count: int) -> list[int]:
    """Which of the first ``count`` barriers or waits of a block can be left out and nothing fails."""
    unseen = []
    for index in range(count):
        simulated().extension().set_fault(fault, index)
        if not (fails(short_run) or fails(split_run)):
            unseen.append(index)
    simulated().extension().set_fault("", 0)
    return unseen


def plant(name: str, folder: Path) -> None:
    """Use kernels with a bug from now on. Raises ValueError if the sources no longer say what would be changed."""
    file, right, wrong = PLANTS[name]
    sources = folder / "csrc"
    shutil.copytree(simulation.ROOT / "csrc", sources)
    path = sources / "cuda" / file
    text = path.read_text()
    if text.count(right) != 1:
        raise ValueError(f"{file} says {right!r} {text.count(right)} times")
    path.write_text(text.replace(right, wrong))
    backends.register(simulation.SimulatedCUDABackend(simulation.build(sources, optimized=False)))
    if simulated().extension().__file__ != str(simulated().path):
        raise ImportError(f"another module than {simulated().path} was loaded before")


def main(what: str, argument: str) -> str | None:
    """What went unseen, or None."""
    simulation.build()  # here, for forks have no patience for that; loaded there, for a process loads one module only
    if fails(short_run, seeds=1) or fails(split_run, seeds=1) or fails(ring_and_ties, seeds=1):
        return "a run fails with nothing planted"
    if what in PLANTS:
        plant(what, Path(argument))
        return None if fails(ring_and_ties) else f"{what} is not seen"
    unseen = unseen_faults(what, int(argument))
    return f"{what} {unseen} can be left out" if unseen else None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
