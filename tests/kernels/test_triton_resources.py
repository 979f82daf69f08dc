"""Ahead-of-time compilation of the kernels, by whichever release of Triton is at hand: no spills, asynchronous copies,
as many programs at once as recorded, and in half precision at most 40 instructions a kept slot. By the release of the
record also: no more registers, shared memory and instructions than recorded.

`python -m tests.kernels.test_triton_resources` writes the record anew, with the Triton at hand: the one that the pinned
torch brings along.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

RECORD = Path(__file__).with_name("triton_resources.json")
# architecture, dtype, head_dim, group, row buffer, largest heavy head: the shapes of Janus-Pro and the included model
# first, then the edges of what is served.
IN_THEIR_TYPE: tuple[tuple[int, str, int, int, int, int], ...] = (
    *((architecture, "bf16", 128, 1, 24, 256) for architecture in (80, 86, 89, 90)),
    *((architecture, "bf16", 128, 1, 0, 256) for architecture in (80, 86, 90)),
    (80, "bf16", 64, 1, 24, 256),
    (90, "bf16", 64, 1, 24, 256),
    (80, "bf16", 32, 1, 24, 256),
    (80, "fp32", 128, 1, 24, 256),
    (90, "bf16", 128, 4, 24, 256),
    (90, "bf16", 128, 1, 24, 1024),
    (80, "fp16", 256, 1, 24, 256),
    (80, "fp32", 128, 4, 24, 256),
    (80, "fp32", 72, 4, 24, 64),
    (80, "fp32", 40, 1, 24, 64),
    (80, "fp32", 40, 5, 24, 256),
    (80, "fp16", 64, 8, 24, 256),
    (86, "fp32", 32, 1, 24, 256),
    (90, "fp32", 128, 1, 0, 1024),
    (86, "bf16", 96, 4, 24, 256),
    (80, "fp32", 256, 8, 24, 256),
    (80, "bf16", 128, 8, 24, 1024),
    (90, "bf16", 256, 8, 24, 256),
)
# The same where keys and values are stored in 8 bits; the types are those of q, k and v.
IN_INT8: tuple[tuple[int, str, int, int, int, int], ...] = (
    *((architecture, "bf16", 128, 1, 24, 256) for architecture in (80, 86, 90)),
    (90, "bf16", 128, 1, 0, 256),
    (90, "bf16", 128, 1, 24, 1024),
    (80, "bf16", 64, 1, 24, 256),
    (90, "bf16", 64, 1, 24, 256),
    (90, "fp16", 128, 4, 24, 256),
    (80, "bf16", 32, 5, 24, 64),
    (80, "fp16", 256, 8, 24, 256),
    (80, "fp32", 128, 1, 24, 256),
    (80, "fp32", 40, 5, 24, 256),
)
Shape = tuple[int, str, int, int, int, int, bool]
SHAPES: tuple[Shape, ...] = (*((*shape, False) for shape in IN_THEIR_TYPE), *((*shape, True) for shape in IN_INT8))
# architecture, dtype, head_dim, longest prompt, whether it is kept, whether scores are given, whether stored in 8 bits.
PREFILLS = ((80, "bf16", 128, 40, True, False, False), (90, "bf16", 128, 600, True, True, False),
            (80, "fp32", 40, 7, False, False, False), (90, "fp16", 64, 300, False, True, False),
            (80, "bf16", 128, 40, True, False, True), (90, "fp32", 256, 300, False, True, True))
# Of these the release of the record runs more, and another one not.
FEWEST = {"sm_90 bf16 D64 G1 R24 M256 int8": 7}
MOST = 40  # instructions of all warps in the loop over kept slots, by slot, of half precision at head_dim 64 and 128
# architecture: threads, KB of shared memory, both of a multiprocessor; each has 64 K registers.
MULTIPROCESSORS = {80: (2048, 164), 86: (1536, 100), 89: (1536, 100), 90: (2048, 228)}


def name(shape: Shape) -> str:
    architecture, dtype, head_dim, group, row_buffer, largest, int8 = shape
    return f"sm_{architecture} {dtype} D{head_dim} G{group} R{row_buffer} M{largest}{' int8' if int8 else ''}"


def compiled_for(shape: Shape) -> Any:
    from ssd_kernels.triton import compiled

    return compiled.compile_decode(*shape[:6], int8=shape[6])


def measured(kernel: Any) -> Any:
    from ssd_kernels.triton import compiled

    return compiled.resources(kernel)


def programs(architecture: int, threads: int, registers: int, shared: int) -> int:
    """How many programs run on a multiprocessor at once; hardware hands out registers by 8 a thread, and keeps 1 KB."""
    all_threads, kilobytes = MULTIPROCESSORS[architecture]
    return min(all_threads // threads, 65536 // (threads * -(-registers // 8) * 8), kilobytes * 1024 // (shared + 1024))


def running(shape: Shape, taken: Any) -> int:
    return programs(shape[0], 32 * taken.warps, taken.registers, taken.shared)


def test_programs() -> None:
    """Each limit alone, worked out by hand for compute capability 8.0."""
    assert programs(80, 128, 96, 0) == 5 and programs(80, 128, 97, 0) == 4
    assert programs(80, 128, 16, 31 * 1024) == 5 and programs(80, 128, 16, 163 * 1024) == 1
    assert programs(80, 1024, 16, 0) == 2


def slot_loop(code: str) -> list[str]:
    """The instructions of the loop that copies slots ahead, from a listing: the shortest one with such a copy."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", code)]
    loops = []
    for end, text in lines:
        back = re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text)
        if back and int(back[1], 16) < end:
            loops.append([inside for at, inside in lines if int(back[1], 16) <= at <= end])
    return min((loop for loop in loops if any("LDGSTS" in text for text in loop)), key=len)


def instructions_per_slot(shape: Shape, kernel: Any) -> float:
    """Instructions of machine code that all warps execute in that loop, by slot."""
    from ssd_kernels.triton.launch import MIN_EVICT_BLOCK, decode_config, power_of_two

    architecture, dtype, head_dim, group, _, largest, int8 = shape
    config = decode_config(head_dim, 4 if dtype == "fp32" else 2, group, max(power_of_two(largest), MIN_EVICT_BLOCK),
                           architecture, int8)
    return len(slot_loop(kernel_code(kernel))) * config.warps / config.block


def kernel_code(kernel: Any) -> str:
    from ssd_kernels.triton import compiled

    return compiled.disassembled(kernel, "-sass")


def test_the_slot_loop_is_found() -> None:
    """The inner of two loops, and not one that copies nothing ahead."""
    code = "\n".join(f"        /*{16 * at:04x}*/    {text} ;" for at, text in enumerate((
        "MOV R1, R2", "LDGSTS.E [R1], [R2.64]", "FADD R3, R3, R4", "@P0 BRA 0x10", "LDG.E R5, [R6.64]", "BRA 0x40",
        "@!P1 BRA 0x0", "BRA 0x70")))
    assert slot_loop(code) == ["LDGSTS.E [R1], [R2.64] ", "FADD R3, R3, R4 ", "@P0 BRA 0x10 "]


@pytest.mark.parametrize("shape", SHAPES, ids=map(name, SHAPES))
def test_resources(shape: Shape) -> None:
    """What decides speed, by any release: nothing spills, copies stay asynchronous, multiprocessors stay full, and a
    kept slot takes few instructions, none of them a load of 2 bytes."""
    import triton

    kernel = compiled_for(shape)
    now, file, slot = measured(kernel), json.loads(RECORD.read_text()), instructions_per_slot(shape, kernel)
    record = file["kernels"][name(shape)]
    assert now.local_accesses == 0 and now.stack == 0, f"spills: {now}"
    assert now.async_copies >= record["async_copies"] > 0, now
    assert running(shape, now) >= record["programs"], (now, record)
    assert (now.products > 0) == (shape[1] != "fp32"), "half precision, and only that, has matrix instructions"
    if shape[1] != "fp32":
        assert not re.search(r"\bLDS\.[US](8|16)\b", "\n".join(slot_loop(kernel_code(kernel))))
        assert slot <= MOST or shape[2] > 128
    if triton.__version__ == file["triton"]:
        assert now.registers <= record["registers"], (now, record)
        assert now.shared <= record["shared"], (now, record)
        assert slot <= record["instructions_per_slot"], (slot, record)


@pytest.mark.parametrize("shape", PREFILLS, ids=str)
def test_prefill_does_not_spill(shape: tuple[int, str, int, int, bool, bool, bool]) -> None:
    from ssd_kernels.triton import compiled

    taken = compiled.resources(compiled.compile_prefill(*shape))
    assert taken.local_accesses == 0 and taken.stack == 0 and taken.registers <= 128, taken


def test_multiply_adds_are_fused_whatever_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.10 fuses only where told to; TRITON_DEFAULT_FP_FUSION=0 asks older releases for the same."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    from ssd_kernels.triton import compiled

    assert "fma.rn.f32" in compiled.compile_decode(80, "bf16", 64).asm["ptx"]


def write() -> None:
    import triton

    kernels = {}
    for shape in SHAPES:
        kernel = compiled_for(shape)
        taken = measured(kernel)
        at_once = min(running(shape, taken), FEWEST.get(name(shape), 99))
        kernels[name(shape)] = {**taken.as_json(), "programs": at_once,
                                "instructions_per_slot": instructions_per_slot(shape, kernel)}
    RECORD.write_text(json.dumps({"triton": triton.__version__, "kernels": kernels}, indent=1) + "\n")


if __name__ == "__main__":
    write()
