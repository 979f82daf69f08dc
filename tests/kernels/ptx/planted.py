"""Faults that the executor must notice: instructions left out, and changed sources of the CUDA kernels."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ssd_kernels import CachePlan, HeadSpec

from ..cases import BF16, F32, PART, Case
from ..pair import Pair
from ..split import LONG, long_pair
from . import build, schedules, triton

ORDERING = ["bar.sync", "membar", "fence", "cp.async.wait", "cp.async.commit"]  # how opcodes begin
CASE = Case("ptx")


@dataclass(frozen=True)
class Kernel:
    """A kernel of a module, by part of its name, and what its runs are made with."""

    module: str
    name: str
    dtype: torch.dtype
    head_dim: int
    group: int


KERNELS = {"bf16-D128-G1": Kernel("decode_bf16", "decode_kernelINS0_8BFloat16ELi128ELi1E", BF16, 128, 1),
           "f32-D40-G5": Kernel("decode_f32", "decode_kernelIfLi0ELi4E", F32, 40, 5)}


def runs(kernel: Kernel) -> list[Callable[[], object]]:
    """Short ones that together reach every instruction that orders something."""
    def pair(plan: CachePlan, steps: int, lengths: tuple[int, int]) -> object:
        both = Pair(plan, CASE, group=kernel.group, head_dim=kernel.head_dim, max_prompt=max(lengths), steps=steps,
                    dtype=kernel.dtype)
        both.prefill(lengths)
        return both.run(steps)

    refreshed = (HeadSpec.heavy(40), HeadSpec.heavy(4, recent=1), HeadSpec.window(5), HeadSpec.full())
    return [lambda: pair(CachePlan([refreshed], row_buffer=3, keep_prompt=False), 4, (70, 3)),
            lambda: long_pair(kernel.dtype, case=CASE, row_buffer=2, keep_prompt=False, heads=LONG[:2],
                              group=kernel.group, head_dim=kernel.head_dim, lengths=(PART + 3, 2)).run(2),
            lambda: pair(CachePlan([[HeadSpec.heavy(4, recent=1), HeadSpec.heavy(40)]]), 6, (2, 70))]


def noticed(attempts: Iterable[Callable[[], object]], names: Iterable[str] = schedules.SCHEDULES, seed: int = 1
            ) -> str | None:
    """What is first said of a fault by runs under schedules, by name: a report, or a wrong result."""
    attempts = list(attempts)
    for name in names:
        for attempt in attempts:
            with schedules.scheduled(replace(schedules.SCHEDULES[name], seed=seed)):
                try:
                    attempt()
                except (AssertionError, RuntimeError, KeyError, IndexError) as error:
                    return f"{name}: {error}"
    return None


def source_line(place: str) -> str:
    """What the CUDA source says at an instruction's place, "file:line<file:line": at the last, where all is inlined."""
    file, _, line = place.rpartition("<")[2].rpartition(":")
    text = (build.SOURCES / "cuda" / file).read_text().splitlines()[int(line) - 1]
    return text.partition("//")[0].strip()


def omissions(kernel: Kernel) -> Iterator[str]:
    """Leaves out the kernel's ordering instructions in turn, and gives the source lines they come from."""
    executor = build.module()
    for index, _, place in executor.sites(kernel.module, kernel.name, ORDERING):
        executor.leave_out(kernel.module, kernel.name, index, True)
        try:
            yield source_line(place)
        finally:
            executor.leave_out(kernel.module, kernel.name, index, False)


def triton_omissions(attempt: Callable[[], object]) -> Iterator[str]:
    """Leaves out in turn the barriers that decode.py asks for, in what a run compiles, and gives its source lines."""
    from ssd_kernels.triton import decode

    source = Path(decode.__file__).read_text().splitlines()
    triton.compiled.cache_clear()
    first, executor = len(triton.LOADED), build.module()
    attempt()
    for module in triton.LOADED[first:]:
        for index, _, place in executor.sites(module, "", ["bar.sync"]):
            file, _, number = place.partition("<")[0].rpartition(":")
            line = source[int(number) - 1].strip() if file == "decode.py" else ""
            if not line.startswith("tl.debug_barrier()"):
                continue  # Triton's own
            executor.leave_out(module, "", index, True)
            try:
                yield line
            finally:
                executor.leave_out(module, "", index, False)


# Changed sources: (file, what it says, what it says instead).
Change = tuple[str, str, str]
CHANGES: dict[str, tuple[Change, ...]] = {
    "no fence": (("port.cuh", "{ __threadfence(); }", "{}"),),
    "a fence of the block only": (("port.cuh", "__threadfence();", "__threadfence_block();"),),
    "the cursor by a plain load": (("item.cuh", "port::load_relaxed(&at->step)", "at->step"),),
    "waits for a stage too few": (("attend.cuh", "port::wait_copies<kStages - 2>();\n      fetch(tile +",
                                   "port::wait_copies<kStages - 1>();\n      fetch(tile +"),),
    "parts are counted before they are stored": (
        ("decode.cuh", "last_part() const {\n    port::sync_block();", "last_part() const {"),),
    "a shuffle of some lanes": (("attend.cuh", "const float logit = reduce(dot[g]);",
                                 "const float logit = j < count ? reduce(dot[g]) : 0.0f;"),),
    "a barrier of some threads": (("evict.cuh", "if (warp == 0 && lane == 0) *moves = length;",
                                   "if (warp == 0 && lane == 0) { *moves = length; port::sync_block(); }"),),
    "copies from odd addresses": (("attend.cuh", "lane() * 16;", "lane() * 16 + 2;"),),
    "absent tokens are copied": (("attend.cuh", "16, present);", "16, true);"),
                                 ("attend.cuh", "present ? from + (j < gap ? 0 : skip) : lane_keys;",
                                  "from + (j < gap ? 0 : skip);")),
    "a slot outside the slab": (("item.cuh", "(heavy ? view.evictable : at);",
                                 "(heavy ? view.evictable : at) + 100000;"),),
    "a sum that nothing starts": (("attend.cuh", "norm[g] = adds_new ? port::power_of_two("
                                   "shared.logits[g][kNewToken] - highest[g]) : 0.0f;", ""),),
    "a wrong first bit": (("port.cuh", "__ffs(static_cast<int>(x)) - 1", "__ffs(static_cast<int>(x))"),),
    "a ring that wraps too early": (("item.cuh", "begin + view.evictable - view.ring, 0",
                                     "begin + view.evictable - view.ring - 1, 0"),),
    "ties the wrong way": (("../common/evict.h", "static_cast<uint32_t>(position));",
                            "~static_cast<uint32_t>(position));"),),
    "a key that is not appended": (("decode.cuh", "const_cast<T*>(keys)[slot + e] = key;", ""),),
    "a token too many": (("attend.cuh", "smaller(item.total - begin, kPartSlots)",
                          "smaller(item.total - begin + 1, kPartSlots)"),),
}


def changed_sources(changes: Iterable[Change], folder: Path) -> Path:
    """A copy of csrc with changes. Raises ValueError if the sources no longer say what would be changed."""
    sources = folder / "csrc"
    shutil.copytree(build.SOURCES, sources)
    for file, right, wrong in changes:
        path = sources / "cuda" / file
        text = path.read_text()
        if text.count(right) != 1:
            raise ValueError(f"{file} says {right!r} {text.count(right)} times")
        path.write_text(text.replace(right, wrong))
    # One kernel is enough, and quick to compile.
    (sources / "cuda" / "decode_f32.cu").write_text(
        '#include "cuda/decode.cuh"\n'
        "template int ssd::cuda::start_decode<float, 0>(const DecodeParams&, const Launch&, void*);\n")
    return sources


def ties() -> object:
    """Windows that wrap, and heavy heads in which all tokens but one have a score of exactly 0."""
    plan = CachePlan([[HeadSpec.window(5), HeadSpec.heavy(4)]])
    pair = Pair(plan, CASE, head_dim=32, max_prompt=1, steps=9, scale=1.0)
    loud = torch.zeros(2, 2, 1, 32)
    loud[..., 0] = 100.0  # quiet keys' logits are 2e4 below, and their probability 0
    pair.prefill((1, 1), k=loud)
    return [pair.step(q=loud[:, :, 0], k=-loud[:, :, 0]) for _ in range(9)]


@contextmanager
def changed(changes: Iterable[Change], folder: Path) -> Iterator[None]:
    """Runs the float32 kernel of changed sources, for head_dims other than 64 and 128."""
    executor = build.module()
    executor.load("decode_f32", build.compile_cuda("decode_f32", changed_sources(changes, folder)))
    try:
        yield
    finally:
        executor.load("decode_f32", build.cuda_ptx("decode_f32"))
