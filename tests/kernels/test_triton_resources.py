"""Ahead-of-time compilation of the decode kernel, by whichever release of Triton is at hand: no spills, asynchronous
copies, and as many programs at once as recorded. By the release of the record also: no more registers than recorded.

`python -m tests.kernels.test_triton_resources` writes the record anew, with the Triton at hand: the one that the pinned
torch brings along.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

RECORD = Path(__file__).with_name("triton_resources.json")
# architecture, dtype, head_dim, group, row buffer, largest heavy head: the shapes of Janus-Pro and the included model
# first, then the edges of what is served.
SHAPES: tuple[tuple[int, str, int, int, int, int], ...] = (
    *((architecture, "bf16", 128, 1, 24, 256) for architecture in (80, 86, 89, 90)),
    *((architecture, "bf16", 128, 1, 0, 256) for architecture in (80, 86, 90)),
    (80, "bf16", 64, 1, 24, 256),
    (90, "bf16", 64, 1, 24, 256),
    (80, "bf16", 32, 1, 24, 256),
    (80, "fp32", 128, 1, 24, 256),
    (90, "bf16", 128, 4, 24, 256),
    (90, "bf16", 128, 1, 24, 1024),
    (80, "fp16", 256, 1, 24, 256),
    (80, "fp32", 40, 1, 24, 64),
    (86, "fp32", 32, 1, 24, 256),
    (90, "fp32", 128, 1, 0, 1024),
    (86, "bf16", 96, 4, 24, 256),
    (86, "fp32", 128, 4, 24, 256),
    (80, "fp32", 256, 8, 24, 256),
    (80, "bf16", 128, 8, 24, 1024),
)
# architecture: threads, KB of shared memory, both of a multiprocessor; each has 64 K registers.
MULTIPROCESSORS = {80: (2048, 164), 86: (1536, 100), 89: (1536, 100), 90: (2048, 228)}


def name(shape: tuple[int, str, int, int, int, int]) -> str:
    architecture, dtype, head_dim, group, row_buffer, largest = shape
    return f"sm_{architecture} {dtype} D{head_dim} G{group} R{row_buffer} M{largest}"


def measured(shape: tuple[int, str, int, int, int, int]) -> Any:
    from ssd_kernels.triton import compiled

    return compiled.resources(compiled.compile_decode(*shape))


def programs(architecture: int, threads: int, registers: int, shared: int) -> int:
    """How many programs run on a multiprocessor at once; hardware hands out registers by 8 a thread, and keeps 1 KB."""
    all_threads, kilobytes = MULTIPROCESSORS[architecture]
    return min(all_threads // threads, 65536 // (threads * -(-registers // 8) * 8), kilobytes * 1024 // (shared + 1024))


def running(shape: tuple[int, str, int, int, int, int], taken: Any) -> int:
    return programs(shape[0], 32 * taken.warps, taken.registers, taken.shared)


def test_programs() -> None:
    """Each limit alone, worked out by hand for compute capability 8.0."""
    assert programs(80, 128, 96, 0) == 5 and programs(80, 128, 97, 0) == 4
    assert programs(80, 128, 16, 31 * 1024) == 5 and programs(80, 128, 16, 163 * 1024) == 1
    assert programs(80, 1024, 16, 0) == 2


@pytest.mark.parametrize("shape", SHAPES, ids=map(name, SHAPES))
def test_resources(shape: tuple[int, str, int, int, int, int]) -> None:
    """What decides speed, by any release: nothing spills, copies stay asynchronous, multiprocessors stay full."""
    import triton

    now, file = measured(shape), json.loads(RECORD.read_text())
    record = file["kernels"][name(shape)]
    assert now.local_accesses == 0 and now.stack == 0, f"spills: {now}"
    assert now.async_copies >= record["async_copies"] > 0, now
    assert running(shape, now) >= record["programs"], (now, record)
    assert (now.products > 0) == (shape[1] != "fp32" and shape[3] > 1), "only half precision has matrix instructions"
    if triton.__version__ == file["triton"]:
        assert now.registers <= record["registers"], (now, record)
        assert now.shared <= record["shared"], (now, record)


def test_multiply_adds_are_fused_whatever_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.10 fuses only where told to; TRITON_DEFAULT_FP_FUSION=0 asks older releases for the same."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    from ssd_kernels.triton import compiled

    assert "fma.rn.f32" in compiled.compile_decode(80, "bf16", 64).asm["ptx"]


def write() -> None:
    import triton

    kernels = {}
    for shape in SHAPES:
        taken = measured(shape)
        kernels[name(shape)] = {**taken.as_json(), "programs": running(shape, taken)}
    RECORD.write_text(json.dumps({"triton": triton.__version__, "kernels": kernels}, indent=1) + "\n")


if __name__ == "__main__":
    write()
