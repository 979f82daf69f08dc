"""Faults that the executor must notice: kernels that ask for less order than theirs do, and otherwise changed ones."""

from __future__ import annotations

import importlib
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch

import ssd_kernels
from ssd_kernels import CachePlan, HeadSpec

from ..cases import BF16, F32, PART, Case, mixed
from ..pair import Pair
from ..split import LONG, long_pair
from . import build, schedules, triton

TRITON = Path(ssd_kernels.__file__).parent / "triton"
WITHOUT = Path(__file__).with_name("without.cuh")


@dataclass(frozen=True)
class Kernel:
    """An instance of `decode_kernel`, by its arguments, in a module; and what its runs are made with."""

    module: str
    arguments: str
    dtype: torch.dtype
    head_dim: int
    group: int
    kv_format: str = "auto"

    @property
    def case(self) -> Case:
        return Case("ptx", kv_format=self.kv_format)


KERNELS = {"f32-D40-G1": Kernel("decode_f32", "float, 0, 1", F32, 40, 1),
           "f32-D40-G5": Kernel("decode_f32", "float, 0, kGroupBlock", F32, 40, 5),
           "bf16-D128-G1": Kernel("decode_bf16", "BFloat16, 128, 1", BF16, 128, 1),
           "i8-D40-G1": Kernel("decode_i8", "Int8, 0, 1", F32, 40, 1, "int8")}


def runs(kernel: Kernel) -> list[Callable[[], object]]:
    """Short ones that together reach every instruction that orders something, and the others."""
    def pair(plan: CachePlan, steps: int, lengths: tuple[int, int]) -> object:
        both = Pair(plan, kernel.case, group=kernel.group, head_dim=kernel.head_dim, max_prompt=max(lengths),
                    steps=steps, dtype=kernel.dtype)
        both.prefill(lengths)
        return both.run(steps)

    refreshed = (HeadSpec.heavy(40), HeadSpec.heavy(4, recent=1), HeadSpec.window(5), HeadSpec.full())
    return [lambda: pair(CachePlan([refreshed], row_buffer=3, keep_prompt=False), 4, (70, 3)),
            lambda: long_pair(kernel.dtype, case=kernel.case, row_buffer=2, keep_prompt=False, heads=LONG[:2],
                              group=kernel.group, head_dim=kernel.head_dim, lengths=(PART + 3, 2)).run(2),
            lambda: pair(CachePlan([[HeadSpec.heavy(4, recent=1), HeadSpec.heavy(40)]]), 6, (2, 70))]


def ties(kernel: Kernel) -> object:
    """Windows that wrap, and heavy heads in which all tokens but one have a score of exactly 0."""
    plan = CachePlan([[HeadSpec.window(5), HeadSpec.heavy(4)]])
    pair = Pair(plan, kernel.case, group=kernel.group, head_dim=32, max_prompt=1, steps=9, scale=1.0,
                dtype=kernel.dtype)
    loud = torch.zeros(2, 2, 1, 32)
    loud[..., 0] = 100.0  # quiet keys' logits are 2e4 below, and their probability 0
    pair.prefill((1, 1), k=loud)
    queries = loud[:, :, 0].repeat_interleave(kernel.group, 1)
    return [pair.step(q=queries, k=-loud[:, :, 0]) for _ in range(9)]


def halves(kernel: Kernel) -> object:
    """A key that lies between bytes, where bytes are what is stored."""
    pair = Pair(CachePlan([[HeadSpec.full()] * 2]), kernel.case, group=kernel.group, head_dim=32, max_prompt=1, steps=1,
                dtype=kernel.dtype)
    keys = (torch.arange(32) - 15.5).expand(2, 2, 32).clone()
    keys[..., 0] = 127.0  # 1 a byte
    return pair.step(k=keys)


def triton_runs() -> list[Callable[[], object]]:
    """The same for Triton's kernels."""
    def pair(row_buffer: int, keep_prompt: bool) -> object:
        both = Pair(mixed(4, row_buffer, keep_prompt), Case("ptx_triton"), head_dim=64, max_prompt=40, steps=6,
                    dtype=BF16)
        both.prefill((40, 3))
        return both.run(6)

    return [lambda: pair(3, True), lambda: pair(0, False)]


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


# Of a source file: its name, what it says, and what it says instead.
Change = tuple[str, str, str]


@dataclass(frozen=True)
class Order:
    """A place in the sources that asks for order: "file:line:column", its line, and how to do without."""

    place: str
    line: str
    without: Change


def _orders(files: Iterable[Path], words: str, without: Callable[[re.Match[str]], str]) -> list[Order]:
    found = []
    for file in sorted(files):
        text = file.read_text()
        for match in re.finditer(words, text):
            before, start, end = text[:match.start()], match.start(), match.end()
            line = before.count("\n")
            found.append(Order(f"{file.name}:{line + 1}:{start - before.rfind(chr(10))}",
                               text.splitlines()[line].strip(),
                               (file.name, text, text[:start] + without(match) + text[end:])))
    return found


def twins() -> list[str]:
    """The functions of without.cuh."""
    return re.findall(r"^SSD_DEVICE \w+ (\w+)\(", WITHOUT.read_text(), re.MULTILINE)


def cuda_orders() -> list[Order]:
    """Every call of what port.cuh has for order, in the kernels of csrc/cuda; without: of its twin."""
    files = [path for path in (build.SOURCES / "cuda").glob("*.cu*") if path.name != "port.cuh"]
    return _orders(files, rf"\bport::(?:{'|'.join(twins())})\b",
                   lambda match: match[0].replace("port::", "port::without::"))


def asking_functions() -> list[str]:
    """The functions of port.cuh that ask the hardware for order."""
    asks = re.compile(r"__sync|\bbar|fence|atomic|relaxed|acquire|release|\.volatile|commit|wait")
    text = re.sub("//.*", "", (build.SOURCES / "cuda" / "port.cuh").read_text())
    functions = re.findall(r"^SSD_DEVICE [^(\n]*\b(\w+)(\((?:.*\}|.*[^}\n]\n(?:.*\n)*?\})$)", text, re.MULTILINE)
    return sorted({name for name, rest in functions if asks.search(rest)})


def triton_orders() -> list[Order]:
    """Every barrier, volatile load and atomic of ssd_kernels/triton; without: none, a plain one, a relaxed one."""
    def without(match: re.Match[str]) -> str:
        if match[0] == "tl.debug_barrier()":
            return "pass"
        if match[0] == ", volatile=True":
            return ""
        if match["exchanged"]:
            return f"tl.store({match['exchanged']})"
        return 'sem="relaxed"'

    return _orders(TRITON.glob("*.py"), r'tl\.debug_barrier\(\)|, volatile=True|sem="(?:acq_rel|acquire|release)"|'
                   r'tl\.atomic_xchg\((?P<exchanged>[^()]*), sem="relaxed"\)', without)


CHANGES: dict[str, tuple[Change, ...]] = {
    "a fence of the block only": (("port.cuh", "__threadfence();", "__threadfence_block();"),),
    "waits for a stage too few": (("attend.cuh", "port::wait_copies<kStages - 2>();\n      fetch(tile +",
                                   "port::wait_copies<kStages - 1>();\n      fetch(tile +"),),
    "a shuffle of some lanes": (("attend.cuh", "float logit = reduce(dot[g]);",
                                 "float logit = j < count ? reduce(dot[g]) : 0.0f;"),),
    "a barrier of some threads": (("evict.cuh", "if (warp == 0 && lane == 0) *moves = length;",
                                   "if (warp == 0 && lane == 0) { *moves = length; port::sync_block(); }"),),
    "copies from odd addresses": (("attend.cuh", "lane() * Shape::kBytes;", "lane() * Shape::kBytes + 2;"),),
    "absent tokens are copied": (("attend.cuh", f"further(j),\n{'':42}j < count);", "further(j), true);"),),
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

# The same to what only serves bytes.
CHANGES_TO_BYTES: dict[str, tuple[Change, ...]] = {
    "scales that stay behind": (("evict.cuh", "head.value_scales[to] = value_scale;", ""),),
    "scales of absent tokens": (("attend.cuh", "layer.value_scales) + slot,\n                          j < count);",
                                 "layer.value_scales) + slot, true);"),),
    "a digit too few": (("attend.cuh", "256 * sums[2] + sums[1]", "sums[1]"),),
    "halves rounded up": (("port.cuh", "__float2int_rn(x)", "__float2int_rd(x + 0.5f)"),),
}


def changed_sources(kernel: Kernel, changes: Iterable[Change], folder: Path) -> Path:
    """A copy of csrc with changes, of whose decode kernels there is only one: quick to compile.

    Raises:
        ValueError: the sources no longer say what would be changed.
    """
    sources = folder / "csrc"
    shutil.copytree(build.SOURCES, sources)
    for file, right, wrong in changes:
        path = sources / "cuda" / file
        text = path.read_text()
        if text.count(right) != 1:
            raise ValueError(f"{file} says {right!r} {text.count(right)} times")
        path.write_text(text.replace(right, wrong))
    port = sources / "cuda" / "port.cuh"
    port.write_text(port.read_text() + WITHOUT.read_text())
    (sources / "cuda" / f"{kernel.module}.cu").write_text(
        '#include "cuda/decode.cuh"\nusing namespace ssd::cuda;\n'
        f"auto* start = port::launch<decode_kernel<{kernel.arguments}>, DecodeParams>;\n")
    return sources


@contextmanager
def changed(kernel: Kernel, changes: Iterable[Change], folder: Path) -> Iterator[None]:
    """Runs the CUDA kernels of changed sources: prefill if that is what changes, or one for decoding."""
    changes = list(changes)
    module = "prefill" if any(file == "prefill.cu" for file, *_ in changes) else kernel.module
    executor = build.module()
    executor.load(module, build.compile_cuda(module, changed_sources(kernel, changes, folder)))
    try:
        yield
    finally:
        executor.load(module, build.cuda_ptx(module))


@contextmanager
def changed_triton(change: Change | None, folder: Path) -> Iterator[None]:
    """Runs Triton's kernels from changed sources."""
    package = folder / f"planted_{folder.name}".replace("-", "_")
    shutil.copytree(TRITON, package)
    for path in package.glob("*.py"):
        text = path.read_text()
        if change and path.name == change[0]:
            text = text.replace(*change[1:])
        path.write_text(text.replace("from ..", "from ssd_kernels."))
    sys.path.insert(0, str(folder))
    try:
        decode, prefill = (importlib.import_module(f"{package.name}.{name}") for name in ("decode", "prefill"))
        triton.PTXTritonBackend.planted = SimpleNamespace(decode_kernel=decode.decode_kernel,
                                                          prefill_kernel=prefill.prefill_kernel)
        yield
    finally:
        triton.PTXTritonBackend.planted = None
        sys.path.remove(str(folder))
