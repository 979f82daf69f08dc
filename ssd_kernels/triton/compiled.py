"""Ahead-of-time compilation of the kernels, with no GPU at hand: what a launch would compile, and what it needs."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .launch import decode_constants, prefill_constants

ARCHITECTURES = (80, 86, 89, 90)
POINTERS = {"keys": "", "values": "", "q": "", "k": "", "v": "", "out": "", "scores": "fp32", "logits": "fp32",
            "cos": "fp32", "sin": "fp32", "prompt_keys": "", "prompt_values": "", "prompt_of": "i32",
            "positions": "i32", "cursors": "i32", "table": "i32", "pinned": "i32", "lists": "i32",
            "key_scales": "fp32", "value_scales": "fp32", "prompt_key_scales": "fp32", "prompt_value_scales": "fp32",
            "given": "fp32", "prompt_lens": "i32", "rows": "i32", "slot_list": "i32"}
STORED = {"keys", "values", "prompt_keys", "prompt_values"}
ITEM_SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes.

    Attributes:
        registers: per thread. shared: bytes of shared memory per program, static and dynamic.
        stack: bytes of local memory per thread. warps: per program.
        async_copies: instructions that copy from global to shared memory (LDGSTS).
        local_accesses: loads and stores of local memory (LDL, STL): spills.
        products: matrix instructions (HMMA, HGMMA, ...).
    """

    registers: int
    shared: int
    stack: int
    warps: int
    async_copies: int
    local_accesses: int
    products: int

    def as_json(self) -> dict[str, int]:
        return asdict(self)


def compile_decode(architecture: int, dtype: str, head_dim: int, group: int = 1, row_buffer: int = 24,
                   largest: int = 256, keep_prompt: bool = True, scored: bool = True,
                   rotary: bool = True, int8: bool = False) -> Any:
    """Triton's compiled `decode_kernel` for a compute capability such as 80.

    ``dtype``: "fp32", "bf16" or "fp16". ``largest``: evictable tokens of the largest heavy head.
    """
    from .decode import decode_kernel

    constants, options = decode_constants(head_dim, ITEM_SIZES[dtype], group, row_buffer, largest, scored, keep_prompt,
                                          rotary, architecture, int8=int8)
    return _compile(decode_kernel, architecture, dtype, constants, options)


def compile_prefill(architecture: int, dtype: str, head_dim: int, longest: int, keep_prompt: bool = True,
                    given: bool = False, int8: bool = False) -> Any:
    """Triton's compiled `prefill_kernel`, for prompts of up to ``longest`` tokens; other arguments as above."""
    from .prefill import prefill_kernel

    constants, options = prefill_constants(head_dim, ITEM_SIZES[dtype], longest, keep_prompt, given, int8)
    return _compile(prefill_kernel, architecture, dtype, constants, options)


def _compile(kernel: Any, architecture: int, dtype: str, constants: dict[str, int], options: dict[str, int]) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else "fp32" if name == "scale" else
                 "*" + ("i8" if name in STORED and constants["INT8"] else POINTERS[name] or dtype)
                 if name in POINTERS else "i32" for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if name in POINTERS}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def disassembled(kernel: Any, option: str) -> str:
    """What cuobjdump says of a compiled kernel: ``-sass``, its machine code, or ``-res-usage``."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(kernel.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        return subprocess.run([tool, option, str(file)], capture_output=True, text=True, check=True).stdout


def resources(kernel: Any) -> Resources:
    """Read registers, memory and instruction counts from a compiled kernel's machine code."""
    usage, code = disassembled(kernel, "-res-usage"), disassembled(kernel, "-sass")
    numbers = dict(re.findall(r"\b(REG|STACK|SHARED):(\d+)", usage))
    counts = Counter(re.findall(r"\b(LDGSTS|LDL|STL|HMMA|HGMMA|IMMA)\b", code))
    return Resources(int(numbers["REG"]), kernel.metadata.shared, int(numbers["STACK"]), kernel.metadata.num_warps,
                     counts["LDGSTS"], counts["LDL"] + counts["STL"], counts["HMMA"] + counts["HGMMA"])
