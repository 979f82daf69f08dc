"""The backends under test. A new backend joins every test by one line in `CASES`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from ssd_kernels import CachePlan, HeadSpec, backends

from .ptx.cuda import PTXBackend
from .ptx.triton import PTXTritonBackend

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
PART = 256  # kept tokens that a block attends to, csrc/cuda/decode.h kPartSlots: longer heads are split


@dataclass(frozen=True)
class Case:
    """One backend and what it is tested with.

    Attributes:
        name: its name in `ssd_kernels.backends`.
        device: where its caches live.
        dtypes: storage types it serves.
        compiled: bitwise promises (docs/specification.md, section 3.9) hold for compiled backends only.
        kv_format: how its caches store keys and values, whatever a test's plan says.
    """

    name: str
    device: str = "cpu"
    dtypes: tuple[torch.dtype, ...] = (F32, BF16, F16)
    compiled: bool = True
    kv_format: str = "auto"

    def stored(self, plan: CachePlan) -> CachePlan:
        """The plan with this case's ``kv_format``."""
        return replace(plan, kv_format=self.kv_format)


backends.register(PTXBackend())
backends.register(PTXTritonBackend())
CASES = (
    Case("reference", dtypes=(F32, BF16, F16, F64), compiled=False),
    Case("cpu"),
    *([Case("triton", device="cuda")] if backends.available()["triton"] is None else []),
    Case("ptx"),
    Case("ptx_triton"),
    *([Case("cuda", device="cuda")] if backends.available()["cuda"] is None else []),
)


def short(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``bf16``, for test ids."""
    return {F32: "f32", BF16: "bf16", F16: "f16", F64: "f64"}[dtype]


def _param(case: Case, *more: object, id: str) -> object:
    reason = backends.available().get(case.name, "not registered")
    if not reason and case.kv_format != "auto":  # a backend that learns it is tested with it
        reason = backends.get(case.name).unsupported(torch.device(case.device), F32, 64, case.kv_format)
    marks = [pytest.mark.skip(reason=f"{case.name}: {reason}")] if reason else []
    return pytest.param(case, *more, id=id, marks=[*marks, *([pytest.mark.gpu] if case.device == "cuda" else [])])


each_backend = pytest.mark.parametrize("case", [_param(case, id=case.name) for case in CASES])
each_compiled = pytest.mark.parametrize("case", [_param(case, id=case.name) for case in CASES if case.compiled])
each_triton = pytest.mark.parametrize("case", [_param(case, id=case.name) for case in CASES
                                               if case.name in ("ptx_triton", "triton")])
each_on_the_host = pytest.mark.parametrize("case", [
    _param(case, id=case.name) for case in CASES if case.device == "cpu"])
each_without_table = pytest.mark.parametrize("case", [  # that can do without reading the table on the host
    _param(case, id=case.name) for case in CASES if not backends.get(case.name).reads_table])
each_dtype = pytest.mark.parametrize(("case", "dtype"), [
    _param(case, dtype, id=f"{case.name}-{short(dtype)}") for case in CASES for dtype in case.dtypes])
IN_INT8 = tuple(replace(case, kv_format="int8", dtypes=case.dtypes[:3]) for case in CASES)
each_in_int8 = pytest.mark.parametrize("case", [_param(case, id=f"{case.name}-int8") for case in IN_INT8])


def each_format_of(*names: str) -> pytest.MarkDecorator:
    """These backends in both formats."""
    return pytest.mark.parametrize("case", [
        *(_param(case, id=case.name) for case in CASES if case.name in names),
        *(_param(case, id=f"{case.name}-int8") for case in IN_INT8 if case.name in names)])


each_cuda = each_format_of("ptx", "cuda")
each_format = each_format_of(*(case.name for case in CASES))
each_compiled_format = each_format_of(*(case.name for case in CASES if case.compiled))
each_storage = pytest.mark.parametrize(("case", "dtype"), [
    *(_param(case, dtype, id=f"{case.name}-{short(dtype)}") for case in CASES for dtype in case.dtypes),
    *(_param(case, dtype, id=f"{case.name}-{short(dtype)}-int8") for case in IN_INT8 for dtype in case.dtypes)])

MIX = (HeadSpec.heavy(4, recent=1), HeadSpec.window(5), HeadSpec.full(),
       HeadSpec.heavy(3, score="mean", pinned=(1, 5, 33, 70, 1000)), HeadSpec.window(0),
       HeadSpec.heavy(7, recent=7), HeadSpec.heavy(4, 1, "position", pinned=(0, 3, 9)), HeadSpec.heavy(1, 0, "decayed"))


def mixed(num_heads: int = 4, row_buffer: int = 0, keep_prompt: bool = True, num_layers: int = 1) -> CachePlan:
    """A plan whose heads differ: every kind, size and rule within the first eight heads."""
    return CachePlan([[MIX[(layer + head) % len(MIX)] for head in range(num_heads)] for layer in range(num_layers)],
                     row_buffer=row_buffer, keep_prompt=keep_prompt)


def uniform(spec: HeadSpec, num_heads: int = 2, row_buffer: int = 0, keep_prompt: bool = True) -> CachePlan:
    """One layer of equal heads."""
    return CachePlan.uniform(spec, num_layers=1, num_heads=num_heads, row_buffer=row_buffer, keep_prompt=keep_prompt)
