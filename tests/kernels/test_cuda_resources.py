"""The CUDA kernels' machine code, read without a GPU: no spills, asynchronous copies, and nothing worse than recorded.

`python -m tests.kernels.test_cuda_resources` writes the record anew, from what was built last.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from ssd_kernels import native
from ssd_kernels.files import write_atomically

from .ptx import build

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).with_name("cuda_resources.json")
COMMAND = "python -m tests.kernels.test_cuda_resources"
BUILD = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
SOURCES = [path for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if path.name != "device.cu"]
ARCHITECTURES = (80, 90)  # A100, H100
DEVICES = {80: (80, 86), 90: (90,)}  # of tests/kernels/occupancy.cpp, by the code they run: an A10 runs that of 8.0
DTYPES = {"f": "f32", "NS0_8BFloat16E": "bf16", "NS0_7Float16E": "f16", "NS0_4Int8E": "i8"}  # as names are mangled
EVICTABLE = 120  # tokens that the largest heavy head has room for: 96 and a row buffer of 24
PROMPT = 64  # tokens
COPY = r"^LDGSTS.*\.(64|128)"  # of slots: 8 bytes where vectors of bytes may have any length, else 16
FIELDS = {
    "registers": "registers per thread",
    "shared": "bytes of shared memory per block",
    "local": "bytes of local memory per thread",
    "local_accesses": "loads and stores of local memory (LDL, STL)",
    "async_copies": "asynchronous copies (LDGSTS)",
    "async_copies_16": "asynchronous copies of 16 bytes (LDGSTS.128)",
    "before_copy": "instructions on the shortest way to one of those",
    "keys_tile": "instructions of a warp for a whole tile of keys, of which it copies a later one",
    "values_tile": "instructions of a warp for a whole tile of values",
    **{f"blocks_{device}": f"blocks per multiprocessor of a device of {device / 10}"
       for devices in DEVICES.values() for device in devices},
}
MORE_IS_BETTER = ("async_copies", "async_copies_16", "blocks_80", "blocks_86", "blocks_90")


@dataclass(frozen=True)
class Kernel:
    """What the object file says of one kernel for one architecture.

    Attributes:
        name: "decode bf16 D128 G1", or "prefill". symbol: its mangled name. architecture: such as 80.
        registers: per thread. local: bytes of local memory per thread, the stack included.
        static_shared, dynamic_shared: bytes of shared memory per block. threads: per block.
        variant: head_dim (0: any) and query heads per KV head of a decode kernel.
    """

    name: str
    symbol: str
    architecture: int
    registers: int
    local: int
    static_shared: int
    dynamic_shared: int
    threads: int
    variant: tuple[int, int] | None = None

    @property
    def key(self) -> str:
        return f"{self.name} sm_{self.architecture}"


def object_of(source: Path) -> Path:
    return BUILD / "CMakeFiles" / "_cuda.dir" / "csrc" / "cuda" / f"{source.name}.o"


def tool_path() -> str:
    """A PATH on which Triton's cuobjdump and nvdisasm come first."""
    triton = importlib.util.find_spec("triton")
    folders = [Path(folder) / "backends" / "nvidia" / "bin" for folder in
               (triton and triton.submodule_search_locations) or ()]
    return os.pathsep.join([*map(str, folders), os.environ.get("PATH", os.defpath)])


def cuobjdump(*arguments: str | Path) -> str:
    # It starts nvdisasm by name.
    path = tool_path()
    return subprocess.run([str(shutil.which("cuobjdump", path=path)), *map(str, arguments)], capture_output=True,
                          text=True, check=True, env={**os.environ, "PATH": path}).stdout


def compiler_setting(name: str) -> list[str]:
    """What CMake found out about nvcc."""
    found = sorted(BUILD.glob("CMakeFiles/*/CMakeCUDACompiler.cmake"), key=lambda path: path.stat().st_mtime)
    match = re.search(rf'set\({name} "(.*)"\)', found[-1].read_text()) if found else None
    return match[1].split(";") if match else []


def occupancy_header() -> Path | None:
    """The folder of CUDA's cuda_occupancy.h, or None."""
    folders = map(Path, compiler_setting("CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES"))
    return next((folder for folder in folders if (folder / "cuda_occupancy.h").is_file()), None)


def unmeasurable() -> str | None:
    """Why the kernels cannot be measured, or None."""
    if reason := native.missing():
        return reason
    if not hasattr(native.extension(), "cuda_decode_launch"):
        return "the extension was built without CUDA (nvcc was not found, or SSD_KERNELS_CUDA=0)"
    if missing := [source.name for source in SOURCES if not object_of(source).exists()]:
        return f"needs the build folder of this checkout, with objects of {', '.join(missing)}"
    if missing := [tool for tool in ("cuobjdump", "nvdisasm") if not shutil.which(tool, path=tool_path())]:
        return f"needs {' and '.join(missing)}, which come with Triton (pip install triton) and with CUDA"
    return None


def unknown_occupancy() -> str | None:
    """Why blocks per multiprocessor cannot be computed, or None."""
    if not build.compiler():
        return "needs a C++ compiler"
    return None if occupancy_header() else "needs cuda_occupancy.h, which comes with CUDA's runtime headers"


def kernel_name(symbol: str) -> tuple[str, tuple[int, int] | None]:
    """(`Kernel.name`, `Kernel.variant`) of a mangled name."""
    if "14prefill_kernel" in symbol:
        return "prefill", None
    match = re.search(r"13decode_kernelI(f|NS0_\w+?E)Li(\d+)ELi(\d+)E", symbol)
    if not match or match[1] not in DTYPES:
        raise ValueError(f"unknown kernel {symbol}: {Path(__file__).name} takes decode_kernel<dtype, head_dim, group> "
                         f"and prefill_kernel")
    dtype, head_dim, group = DTYPES[match[1]], int(match[2]), int(match[3])
    return f"decode {dtype} D{head_dim or 'any'} G{group}", (head_dim, group)


@cache
def kernels_of(source: Path) -> list[Kernel]:
    """The kernels in the object file of a source, for every architecture."""
    launch = native.extension().cuda_decode_launch
    found = []
    for section in re.split(r"^arch = sm_", cuobjdump("-res-usage", object_of(source)), flags=re.MULTILINE)[1:]:
        architecture = int(section.split(maxsplit=1)[0])
        for symbol, text in re.findall(r"Function (\S+):\n(.*)", section):
            usage = {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", text)}
            name, variant = kernel_name(symbol)
            head_dim, group = variant or (0, 1)
            _, threads, dynamic = launch(1, 1, group, head_dim or 256, 1, EVICTABLE, "decode i8" in name)
            if not variant:
                dynamic = 12 * PROMPT + 1024  # csrc/cuda/launch.cpp prefill_launch
            # The system takes 1024 bytes of every block, which are counted here from 9.0 on.
            static = usage["SHARED"] - (1024 if architecture >= 90 else 0)
            found.append(Kernel(name, symbol, architecture, usage["REG"], usage["STACK"] + usage["LOCAL"], static,
                                dynamic, threads, variant))
    assert {kernel.architecture for kernel in found} == set(ARCHITECTURES), f"{object_of(source)}: {found}"
    return found


@dataclass(frozen=True)
class Instruction:
    """One of a listing: its opcode, such as LDGSTS.E.BYPASS.128, and the indices of those that may come next."""

    opcode: str
    successors: tuple[int, ...]


def listing(code: str) -> list[Instruction]:
    """The instructions of a kernel as cuobjdump lists them. Calls are taken to return."""
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/ +(@!?U?P\w+ +)?([A-Z][.\w]*)([^;]*);", code)
    at = {int(address, 16): index for index, (address, *_) in enumerate(lines)}
    found = []
    for index, (_, guard, opcode, operands) in enumerate(lines):
        branch = re.search(r"(U?P\w+, )?0x([0-9a-f]+) *$", operands) if opcode.startswith("BRA") else None
        goes_on = bool(guard or (branch and branch[1])) or not opcode.startswith(("BRA", "EXIT")) or ".DIV" in opcode
        targets = [at[int(branch[2], 16)]] if branch else []
        found.append(Instruction(opcode, tuple(targets + [index + 1] * (goes_on and index + 1 < len(lines)))))
    return found


def shortest_way(code: Sequence[Instruction], opcode: str) -> int:
    """Instructions on the shortest way from the first one to one whose opcode this regular expression finds, or 0."""
    ways, ends = {0: 0}, [0]
    for index in ends:
        if re.search(opcode, code[index].opcode):
            return ways[index]
        for successor in code[index].successors:
            if successor not in ways:
                ways[successor] = ways[index] + 1
                ends.append(successor)
    return 0


def ways(code: Sequence[Instruction], start: int, first: int, last: int) -> dict[int, int]:
    """Instructions on the shortest way from ``start`` to each that it leads to within ``first`` .. ``last``."""
    found, ends = {start: 0}, [start]
    for index in ends:
        for successor in code[index].successors:
            if first <= successor <= last and successor not in found:
                found[successor] = found[index] + 1
                ends.append(successor)
    return found


def tiles(code: Sequence[Instruction]) -> list[int]:
    """Of each loop that copies while it multiplies, the instructions on the shortest way round that does both."""
    found = []
    for last, branch in enumerate(code):
        for first in branch.successors:
            inner = range(first, last + 1)
            products = [index for index in inner if code[index].opcode.startswith(("FFMA", "IDP"))]
            copies = [index for index in inner if code[index].opcode.startswith("LDGSTS")]
            if len(products) < 16 or not copies:
                continue
            middle = products[len(products) // 2]
            before, after = ways(code, first, first, last), ways(code, middle, first, last)
            rounds = [before[copy] + way[middle] + after[last] + 1 for copy in copies
                      if copy in before and middle in (way := ways(code, copy, first, last)) and last in after]
            found += [min(rounds)] if rounds else []
    return found


@cache
def instructions(source: Path) -> dict[tuple[str, int], list[Instruction]]:
    """The listings of a source's kernels, by (symbol, architecture)."""
    def listed(architecture: int) -> dict[tuple[str, int], list[Instruction]]:
        parts = re.split(r"Function : (\S+)", cuobjdump("-sass", "-arch", f"sm_{architecture}", object_of(source)))
        return {(symbol, architecture): listing(code)
                for symbol, code in zip(parts[1::2], parts[2::2], strict=True)}

    with ThreadPoolExecutor(len(ARCHITECTURES)) as pool:
        return {key: value for listings in pool.map(listed, ARCHITECTURES) for key, value in listings.items()}


def measured(source: Path) -> dict[str, dict[str, int]]:
    """All that is recorded of a source's kernels, but for the blocks per multiprocessor."""
    numbers = {}
    for kernel in kernels_of(source):
        code = instructions(source)[kernel.symbol, kernel.architecture]
        opcodes = [instruction.opcode for instruction in code]
        assert "EXIT" in opcodes, f"no machine code of {kernel.key}"
        local = [opcode for opcode in opcodes if opcode.startswith(("LDL", "STL"))]
        copies = [opcode for opcode in opcodes if opcode.startswith("LDGSTS")]
        numbers[kernel.key] = {
            "registers": kernel.registers, "shared": kernel.static_shared + kernel.dynamic_shared,
            "local": kernel.local, "local_accesses": len(local),
            "async_copies": len(copies), "async_copies_16": sum(".128" in copy for copy in copies),
            "before_copy": shortest_way(code, COPY)}
        if kernel.variant:
            numbers[kernel.key]["keys_tile"], numbers[kernel.key]["values_tile"] = tiles(code)[:2]
    return numbers


def occupancy(kernels: Sequence[Kernel]) -> dict[str, dict[str, int]]:
    """Blocks per multiprocessor by kernel and device, as CUDA's header computes them for those of occupancy.cpp."""
    asked = [(kernel, device) for kernel in kernels for device in DEVICES[kernel.architecture]]
    lines = [f"{device} {kernel.registers} {kernel.static_shared} {kernel.dynamic_shared} {kernel.threads}"
             for kernel, device in asked]
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "occupancy"
        subprocess.run([str(build.compiler()), "-std=c++17", "-isystem", str(occupancy_header()),
                        str(Path(__file__).with_name("occupancy.cpp")), "-o", str(program)], check=True)
        answer = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True).stdout
    blocks: dict[str, dict[str, int]] = {kernel.key: {} for kernel in kernels}
    for (kernel, device), number in zip(asked, map(int, answer.split()), strict=True):
        blocks[kernel.key][f"blocks_{device}"] = number
    return blocks


def built() -> list[Kernel]:
    return [kernel for source in SOURCES for kernel in kernels_of(source)]


def recorded() -> dict[str, dict[str, int]]:
    """The record. The test that asks is skipped if another compiler wrote it, whose numbers do not compare."""
    if not RECORD.exists():
        pytest.fail(f"no {RECORD.name}; `{COMMAND}` writes it")
    record = json.loads(RECORD.read_text())
    if [record["nvcc"]] != (version := compiler_setting("CMAKE_CUDA_COMPILER_VERSION")):
        pytest.skip(f"built by nvcc {' '.join(version)}, recorded for {record['nvcc']}; `{COMMAND}` writes it anew")
    kernels: dict[str, dict[str, int]] = record["kernels"]
    return kernels


def worse(now: dict[str, dict[str, int]], record: dict[str, dict[str, int]]) -> list[str]:
    """What of ``now`` is worse than in the record, as sentences."""
    return [f"{key}: {number} {FIELDS[field]}, recorded {record[key][field]}"
            for key, numbers in now.items() if key in record  # test_every_kernel_is_recorded sees to the others
            for field, number in numbers.items()
            if (number < record[key][field] if field in MORE_IS_BETTER else number > record[key][field])]


needs_objects = pytest.mark.skipif(unmeasurable() is not None, reason=str(unmeasurable()))
needs_occupancy = pytest.mark.skipif(unknown_occupancy() is not None, reason=str(unknown_occupancy()))


def test_shortest_way() -> None:
    """Jumps are followed, ends end, and what is skipped does not count."""
    code = """
        /*0000*/                   S2R R1, SR_TID.X ;
        /*0010*/               @P0 BRA 0x50 ;
        /*0020*/              @!P1 EXIT ;
        /*0030*/                   LDGSTS.E.LTC128B [R1], desc[UR8][R2.64] ;
        /*0040*/                   EXIT ;
        /*0050*/                   BRA P2, 0x70 ;
        /*0060*/                   BRA 0x90 ;
        /*0070*/                   NOP ;
        /*0080*/                   NOP ;
        /*0090*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR8][R2.64] ;
        /*00a0*/                   BRA 0xa0;"""
    found = listing(code)
    assert [instruction.successors for instruction in found] == [
        (1,), (5, 2), (3,), (4,), (), (7, 6), (9,), (8,), (9,), (10,), (10,)]
    assert shortest_way(found, r"^LDGSTS.*\.128") == 4 and shortest_way(found, "^LDL") == 0


def test_tiles() -> None:
    """Ways round loops that copy and multiply, past what one round or another leaves out; other loops don't count."""
    products = "".join(f"/*{16 * (index + 6):04x}*/ FFMA R1, R2, R3, R1 ;" for index in range(16))
    found = listing(f"""
        /*0000*/                   NOP ;
        /*0010*/               @P0 BRA 0x50 ;
        /*0020*/                   NOP ;
        /*0030*/                   NOP ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR8][R2.64] ;
        /*0050*/               @P1 BRA 0x160 ;{products}
        /*0160*/               @P2 BRA 0x10 ;
        /*0170*/               @P2 BRA 0x50 ;
        /*0180*/                   EXIT ;""")
    assert tiles(found) == [5 + 16 + 1]


@needs_objects
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_resources(source: Path) -> None:
    """Nothing in local memory, whatever the compiler, slots copied asynchronously; and the record stands."""
    now = measured(source)
    problems = [f"{key}: {numbers[field]} {FIELDS[field]}, must be 0"
                for key, numbers in now.items() for field in ("local", "local_accesses") if numbers[field]]
    problems += [f"{key}: no asynchronous copies of 16 bytes" for key, numbers in now.items()
                 if key.startswith("decode") and "i8 Dany" not in key and not numbers["async_copies_16"]]
    assert not problems, "\n".join(problems)
    problems = worse(now, recorded())
    assert not problems, "\n".join(problems)


@needs_objects
@needs_occupancy
def test_blocks_per_multiprocessor() -> None:
    """As many as the host function says that the kernels are compiled for, and as recorded."""
    now = occupancy(built())
    wanted = {kernel: native.extension().cuda_blocks_per_multiprocessor(
                  kernel.architecture, *kernel.variant, kernel.name.startswith("decode i8"))
              for kernel in built() if kernel.variant}
    problems = [f"{kernel.key}: {number} blocks, compiled for {wanted[kernel]}" for kernel in wanted
                if (number := now[kernel.key][f"blocks_{kernel.architecture}"]) < wanted[kernel]]
    problems += worse(now, recorded())
    assert not problems, "\n".join(problems)


@needs_objects
def test_every_kernel_is_recorded() -> None:
    names, record = {kernel.key for kernel in built()}, set(recorded())
    assert names == record, (f"not recorded: {sorted(names - record)}, not built: {sorted(record - names)}; "
                             f"`{COMMAND}` writes the record anew")


@needs_occupancy
def test_occupancy() -> None:
    """What bounds blocks of 128 threads, worked out by hand: (architecture, registers, shared memory) -> blocks."""
    expected = {
        (80, 32, 0): {"blocks_80": 16, "blocks_86": 12},  # threads
        (80, 128, 0): {"blocks_80": 4, "blocks_86": 4}, (90, 168, 0): {"blocks_90": 3},  # registers
        (80, 129, 0): {"blocks_80": 3, "blocks_86": 3},
        (80, 32, 40 << 10): {"blocks_80": 4, "blocks_86": 2}, (90, 32, 56 << 10): {"blocks_90": 4},  # shared memory
        (80, 32, 41 << 10): {"blocks_80": 3, "blocks_86": 2},
    }
    kernels = [Kernel(f"{registers} {shared}", "", architecture, registers, 0, 0, shared, 128)
               for architecture, registers, shared in expected]
    assert list(occupancy(kernels).values()) == list(expected.values())


def write() -> None:
    if reason := unmeasurable() or unknown_occupancy():
        raise SystemExit(reason)
    blocks = occupancy(built())
    kernels = {key: {**numbers, **blocks[key]}
               for source in SOURCES for key, numbers in measured(source).items()}
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(kernels[key])}" for key in sorted(kernels))
    version = json.dumps(compiler_setting("CMAKE_CUDA_COMPILER_VERSION")[0])
    text = f'{{\n "nvcc": {version},\n "kernels": {{\n{lines}\n }}\n}}\n'
    write_atomically(RECORD, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    write()
