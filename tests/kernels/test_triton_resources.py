"""Ahead-of-time compilation of the decode kernel: no spills, asynchronous copies, and no more registers than recorded.

`python -m tests.kernels.test_triton_resources` writes the record anew, for the versions it names.
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
)


def name(shape: tuple[int, str, int, int, int, int]) -> str:
    architecture, dtype, head_dim, group, row_buffer, largest = shape
    return f"sm_{architecture} {dtype} D{head_dim} G{group} R{row_buffer} M{largest}"


def measured(shape: tuple[int, str, int, int, int, int]) -> Any:
    from ssd_kernels.triton import compiled

    return compiled.resources(compiled.compile_decode(*shape))


@pytest.mark.parametrize("shape", SHAPES, ids=map(name, SHAPES))
def test_resources(shape: tuple[int, str, int, int, int, int]) -> None:
    """The record stands: registers and shared memory do not grow, copies stay asynchronous."""
    now, record = measured(shape), json.loads(RECORD.read_text())["kernels"][name(shape)]
    assert now.local_accesses == 0 and now.stack == 0, f"spills: {now}"
    assert now.async_copies >= record["async_copies"] > 0, now
    assert now.registers <= record["registers"], (now, record)
    assert now.shared <= record["shared"], (now, record)
    assert (now.products > 0) == (shape[3] > 1), "groups of queries multiply matrices, single queries do not"


def write() -> None:
    import triton

    kernels = {name(shape): measured(shape).as_json() for shape in SHAPES}
    RECORD.write_text(json.dumps({"triton": triton.__version__, "kernels": kernels}, indent=1) + "\n")


if __name__ == "__main__":
    write()
