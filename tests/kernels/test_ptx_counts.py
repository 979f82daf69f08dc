"""What a decode step executes and moves, counted in the PTX of both GPU backends: nothing more than recorded. What
docs/cuda.md says of it is what is recorded.

`python -m tests.kernels.test_ptx_counts` writes the record anew, for the compilers it names.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ssd_kernels import CachePlan, CompressedCache, HeadSpec, backends
from ssd_kernels.files import write_atomically
from ssd_kernels.layout import RowView
from ssd_kernels.triton.launch import step_bytes

from . import cases, test_cuda_resources, test_triton_resources
from .ptx import build, schedules

RECORD = Path(__file__).with_name("ptx_counts.json")
COMMAND = "python -m tests.kernels.test_ptx_counts"
DOCUMENT = Path(__file__).parents[2] / "docs" / "cuda.md"
# Columns of its table between the backend and the blocks per multiprocessor, and their decimals.
COLUMNS = {"instructions_per_warp": 0, "instructions_per_slot": 0, "instructions_before_copy": 0,
           "waits_before_copy": 0, "barriers_per_block": 1, "bytes_over_useful": 2}
ARCHITECTURE = "SSD_PTX_ARCHITECTURE"  # the variable that says what Triton compiles for; CUDA's PTX is for all
ARCHITECTURES = ("80", "90")
HEADS, PROMPT, TOKENS = 4, 24, 576
BUDGETED = HeadSpec.heavy(96, recent=48, score="mean")
LARGE = HeadSpec.heavy(376, recent=188, score="mean")
GLOBAL = ("ld.global", "st.global", "cp.async", "atom.global")  # how opcodes begin
SHARED = ("ld.shared", "st.shared", "cp.async", "ldmatrix", "stmatrix")
FIELDS = {
    "instructions_per_warp": "instructions that a warp executes",
    "instructions_per_slot": "instructions of all warps, by kept slot",
    "sectors": "sectors of 32 bytes that accesses to global memory touch",
    "sectors_over_best": "sectors, by what the same bytes would take side by side",
    "bytes_over_useful": "bytes of sectors, by what a step has to move",
    "wavefronts": "passes over the banks of shared memory",
    "wavefronts_over_best": "passes, by what they would be without conflicts",
    "barriers_per_block": "barriers of a block",
    "instructions_before_copy": "instructions that a warp executes before its first copy of 16 bytes",
    "waits_before_copy": "loads from global memory that it waits for before that, one after the other",
}


@dataclass(frozen=True)
class Step:
    """A decode step of one row: ``step`` tokens have been decoded before it."""

    name: str
    spec: HeadSpec
    row_buffer: int
    step: int
    group: int = 1
    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 128
    kv_format: str = "auto"


STEPS = (
    Step("heavy, between refreshes", BUDGETED, 24, 130),
    Step("heavy, refresh", BUDGETED, 24, 143),
    Step("heavy of 400, between refreshes", LARGE, 24, 540),
    Step("heavy of 400, refresh", LARGE, 24, 551),
    Step("heavy, one loser", HeadSpec.heavy(115, recent=57), 0, 130),
    Step("window", HeadSpec.window(115), 0, 130),
    Step("full, 524 slots", HeadSpec.full(), 0, 500),
    Step("heavy, 4 queries a head", BUDGETED, 24, 130, group=4),
    Step("heavy, float32", BUDGETED, 24, 130, dtype=torch.float32),
    Step("heavy, head_dim 64", BUDGETED, 24, 130, head_dim=64),
    Step("heavy, int8", BUDGETED, 24, 130, kv_format="int8"),
    Step("heavy, int8, refresh", BUDGETED, 24, 143, kv_format="int8"),
    Step("full, int8, 524 slots", HeadSpec.full(), 0, 500, kv_format="int8"),
    Step("heavy, float32, int8", BUDGETED, 24, 130, dtype=torch.float32, kv_format="int8"),
)
RUNS = [(case.name, step) for case in cases.CASES if case.name in ("ptx", "ptx_triton") for step in STEPS
        if step.kv_format in backends.get(case.name).kv_formats]


def launched(backend: str, step: Step) -> dict[str, Any]:
    """What one launch did (`take` of the executor's module), and how many warps and kept slots it had."""
    plan = CachePlan.uniform(step.spec, num_layers=1, num_heads=HEADS, row_buffer=step.row_buffer,
                             kv_format=step.kv_format)
    cache = CompressedCache(plan, batch_size=1, num_query_heads=HEADS * step.group, head_dim=step.head_dim,
                            max_prompt=PROMPT, num_visual_tokens=TOKENS, dtype=step.dtype, backend=backend)
    random = torch.Generator().manual_seed(0)
    state = cache._layers[0]
    for tensor in (state.keys, state.values, state.scores, *state.scales):
        values = torch.randn(tensor.shape, generator=random)
        tensor.copy_((40 * values).clamp(-127, 127) if tensor.dtype == torch.int8 else values)
    for tensor in (state.scores, *state.scales):
        tensor.abs_()
    for tensor in state.scales:
        tensor /= 40
    for head in state.layout.heads:
        if head.score_offset >= 0:  # no two tokens have a position
            state.positions[:, head.score_offset:head.score_offset + head.capacity] = torch.randperm(
                max(PROMPT + step.step, head.capacity), generator=random)[:head.capacity]
    state.cursors.copy_(torch.tensor([[PROMPT, step.step]]))
    before = [tensor.clone() for tensor in state.everything]
    q, k, v = (torch.randn(1, heads, step.head_dim, generator=random).to(step.dtype)
               for heads in (HEADS * step.group, HEADS, HEADS))
    cache.decode(0, q, k, v)  # compiles, and makes what split heads need
    for tensor, old in zip(state.everything, before, strict=True):
        tensor.copy_(old)
    module = build.module()
    module.take()
    with schedules.scheduled(replace(schedules.SCHEDULES["lockstep"], races=False, counts=True)):
        cache.decode(0, q, k, v)
    counted: dict[str, Any] = module.take()
    views = [RowView.of(state.layout, head, PROMPT, step.step) for head in range(HEADS)]
    counted["slots"] = sum(view.base + view.evictable for view in views)
    counted["useful"] = step_bytes(state.layout, PROMPT, step.step, step.head_dim, step.dtype.itemsize,
                                   HEADS * step.group)
    return counted


def measured(backend: str, step: Step) -> dict[str, float]:
    """The fields of the record, rounded to three places."""
    counted = launched(backend, step)
    (rows,) = counted["counts"].values()

    def total(column: int, *kinds: str) -> int:
        return sum(row[column] for row in rows if row[0].startswith(kinds))

    warps, sectors = counted["warps"], total(4, *GLOBAL)
    wavefronts = total(6, *SHARED)
    numbers = {
        "instructions_per_warp": counted["warp_instructions"] / warps,
        "instructions_per_slot": counted["warp_instructions"] / counted["slots"],
        "sectors": sectors,
        "sectors_over_best": sectors / total(5, *GLOBAL),
        "bytes_over_useful": 32 * sectors / counted["useful"],
        "wavefronts": wavefronts,
        "wavefronts_over_best": wavefronts / total(7, *SHARED),
        "barriers_per_block": counted["barriers"] / counted["blocks"],
        "instructions_before_copy": counted["instructions_before_copy"] / counted["copying_warps"],
        "waits_before_copy": counted["waits_before_copy"] / counted["copying_warps"],
    }
    return {name: round(number, 3) for name, number in numbers.items()}


def recorded_as(backend: str, architecture: str | None = None) -> str:
    """Its name in the record: Triton compiles for each architecture, by default the one that the executor is told."""
    return backend if backend == "ptx" else f"{backend} sm_{architecture or os.environ.get(ARCHITECTURE, '80')}"


def compiler(backend: str) -> str:
    """Which compiler the numbers are of: they say nothing of another one's."""
    if backend == "ptx":
        match = re.search(r"release (\S+),", build.nvcc_version())
        return f"nvcc {match[1] if match else '?'}"
    import triton

    return f"triton {triton.__version__}"


@pytest.mark.parametrize(("backend", "step"), RUNS, ids=[f"{backend}-{step.name}" for backend, step in RUNS])
def test_counts(backend: str, step: Step) -> None:
    """No field is worse than in the record."""
    if reason := backends.available()[backend]:
        pytest.skip(f"{backend}: {reason}")
    record = json.loads(RECORD.read_text()).get(recorded_as(backend), {"steps": {}})
    assert step.name in record["steps"], f"{recorded_as(backend)}, {step.name}: not recorded; `{COMMAND}` writes it"
    if record["compiler"] != compiler(backend):
        pytest.skip(f"compiled by {compiler(backend)}, recorded for {record['compiler']}; `{COMMAND}` writes it anew")
    now, before = measured(backend, step), record["steps"][step.name]
    worse = [f"{now[field]} {meaning}, recorded {before[field]}" for field, meaning in FIELDS.items()
             if now[field] > before[field]]
    assert not worse, "\n".join(worse)


def blocks(backend: str, step: Step, architecture: int) -> str:
    """Blocks per multiprocessor as docs/cuda.md gives them: by the records of machine code, "-" if in neither."""
    if backend == "ptx":
        kernels = json.loads(test_cuda_resources.RECORD.read_text())["kernels"]
        dtype = "i8" if step.kv_format == "int8" else "f32" if step.dtype == torch.float32 else "bf16"
        name = f"decode {dtype} D{step.head_dim} G{step.group} sm_{architecture}"
        return str(kernels[name][f"blocks_{architecture}"])
    kernels = json.loads(test_triton_resources.RECORD.read_text())["kernels"]
    shape = (architecture, "fp32" if step.dtype == torch.float32 else "bf16", step.head_dim, step.group,
             step.row_buffer, 1024 if step.spec is LARGE else 256, step.kv_format == "int8")
    return str(kernels.get(test_triton_resources.name(shape), {}).get("programs", "-"))


def test_the_documented_counts_are_the_recorded_ones() -> None:
    """Of every step, by both backends: what docs/cuda.md gives behind the slashes."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in DOCUMENT.read_text().splitlines()
            if re.match(r"\|[^|]*\| (CUDA|Triton) \|", line)]
    documented = {(backend, step): [cell.split(" / ")[-1] for cell in cells] for step, backend, *cells in rows}
    record = json.loads(RECORD.read_text())
    expected = {}
    for backend, step in RUNS:
        counts = record[recorded_as(backend, "80")]["steps"][step.name]
        expected["CUDA" if backend == "ptx" else "Triton", step.name] = [
            *(f"{counts[field]:.{decimals}f}" for field, decimals in COLUMNS.items()),
            *(blocks(backend, step, architecture) for architecture in (80, 90))]
    assert documented == expected and len(rows) == len(expected)


def write() -> None:
    record: dict[str, Any] = {}
    for architecture in ARCHITECTURES:
        os.environ[ARCHITECTURE] = architecture
        for backend, step in RUNS:
            if reason := backends.available()[backend]:
                raise SystemExit(f"{backend}: {reason}")
            if backend == "ptx" and architecture != ARCHITECTURES[0]:
                continue
            of_backend = record.setdefault(recorded_as(backend), {"compiler": compiler(backend), "steps": {}})
            of_backend["steps"][step.name] = measured(backend, step)
    text = json.dumps(record, indent=1) + "\n"
    write_atomically(RECORD, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    write()
