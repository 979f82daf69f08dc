"""Products with weights: each instruction set this machine has, against float64 and by batch invariance."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from instruction_sets import using
from torch.nn import functional

from ssd_kernels import info, native
from ssd_kernels.linear import Product, reference, unsupported

from .cases import BF16, F16, F32, short

SETS = info()["extension"].get("instruction_sets", [])
pytestmark = pytest.mark.skipif(not SETS, reason="the extension is not built")
# Odd sizes first: rows, inputs, outputs. The last one is worth several threads.
SHAPES = [(1, 1, 1), (3, 7, 2), (5, 33, 35), (13, 100, 37), (65, 40, 70), (2, 96, 64), (16, 256, 100), (7, 2048, 9),
          (1, 300, 37), (2, 777, 133), (2, 1024, 1500)]
every_dtype = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=short)
plain_and_int8 = pytest.mark.parametrize("int8", [False, True], ids=["plain", "int8"])


@pytest.fixture(params=SETS or ["none"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn."""
    with using(request.param) as name:
        yield name


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with NaN before and behind them in memory, and behind every row of two dimensions."""
    rows = tensor if tensor.dim() == 2 else tensor[None]
    memory = torch.full((rows.shape[0] + 2, rows.shape[1] + 5), torch.nan, dtype=tensor.dtype)
    view = memory[1:-1, :rows.shape[1]]
    view.copy_(rows)
    return view if tensor.dim() == 2 else view[0]


def in_nan(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous, with NaN right before and behind them, or -128 where there is no NaN."""
    poison = torch.nan if tensor.is_floating_point() else -128
    memory = torch.full((tensor.numel() + 64,), poison, dtype=tensor.dtype)
    view = memory[32:32 + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return view


def arguments(rows: int, inputs: int, outputs: int, dtype: torch.dtype, activation: str, everything: bool,
              int8: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(rows + inputs + outputs)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    height = outputs * (1 + (activation == "swiglu"))
    given = {"x": poisoned(randn(rows, inputs)), "weight": in_nan(randn(height, inputs) * inputs ** -0.5),
             "activation": activation}
    if int8:
        digits = torch.randint(-128, 128, (height, inputs), generator=generator, dtype=torch.int8)
        scale = inputs ** -0.5 / 64 * (0.5 + torch.rand(height, generator=generator))
        given |= {"weight": in_nan(digits), "scale": in_nan(scale)}
    if everything:
        given |= {"bias": in_nan(randn(height)), "norm": in_nan(1 + 0.1 * randn(inputs)),
                  "plus": poisoned(randn(rows, outputs)), "epsilon": 1e-5}
    return given


def computed(x: torch.Tensor, weight: torch.Tensor, activation: str, bias: torch.Tensor | None = None,
             norm: torch.Tensor | None = None, epsilon: float = 1e-6, plus: torch.Tensor | None = None,
             scale: torch.Tensor | None = None) -> torch.Tensor:
    return Product(weight, bias, norm=norm, epsilon=epsilon, activation=activation, scale=scale, dtype=x.dtype)(x, plus)


@every_dtype
@plain_and_int8
@pytest.mark.parametrize("activation", ["none", "silu", "swiglu"])
@pytest.mark.parametrize("everything", [False, True], ids=["alone", "everything"])
def test_against_float64(instruction_set: str, threads: int, dtype: torch.dtype, int8: bool, activation: str,
                         everything: bool) -> None:
    for shape in SHAPES:
        given = arguments(*shape, dtype, activation, everything, int8)
        exact = reference(**{name: value.double() if isinstance(value, torch.Tensor) else value
                             for name, value in given.items()})
        same_dtype = reference(**given)
        got = computed(**given)
        assert got.shape == exact.shape and got.dtype == dtype and got.is_contiguous()
        assert (got - exact).abs().max() <= 2 * (same_dtype - exact).abs().max() + 1e-5, shape


@every_dtype
@plain_and_int8
def test_a_row_has_the_same_bits_in_any_company(instruction_set: str, dtype: torch.dtype, int8: bool) -> None:
    for inputs, outputs in ((100, 37), (256, 96), (2048, 40)):
        given = arguments(131, inputs, outputs, dtype, "swiglu", True, int8)
        together = computed(**given)
        for first, count in ((0, 1), (5, 2), (1, 3), (7, 8), (64, 17), (2, 64), (3, 70)):
            some = slice(first, first + count)
            few = computed(**given | {"x": given["x"][some], "plus": given["plus"][some]})
            assert torch.equal(few, together[some]), (inputs, outputs, first, count)


@every_dtype
@plain_and_int8
def test_a_row_has_the_same_bits_by_any_number_of_threads(instruction_set: str, dtype: torch.dtype,
                                                          int8: bool) -> None:
    before, given = torch.get_num_threads(), arguments(9, 2040, 1100, dtype, "none", True, int8)
    together = computed(**given)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for rows in (1, 2, 7, 9):
                few = computed(**given | {"x": given["x"][:rows], "plus": given["plus"][:rows]})
                assert torch.equal(few, together[:rows]), (threads, rows)
    finally:
        torch.set_num_threads(before)


@every_dtype
@plain_and_int8
def test_what_is_not_finite_stays_in_its_row_and_its_output(instruction_set: str, dtype: torch.dtype,
                                                            int8: bool) -> None:
    given = arguments(9, 70, 50, dtype, "none", False, int8)
    clean = computed(**given)
    given["x"][4, 69] = torch.inf
    given["scale" if int8 else "weight"].view(50, -1)[31, 0] = torch.nan
    got = computed(**given)
    assert got[:, 31].isnan().all() and not got[4].isfinite().any()
    clean[4], clean[:, 31], got[4], got[:, 31] = 0, 0, 0, 0
    assert torch.equal(got, clean)


@every_dtype
def test_every_byte_is_multiplied_as_it_is(instruction_set: str, dtype: torch.dtype) -> None:
    weight = torch.stack([torch.arange(-128, 128, dtype=torch.int8).roll(37 * row) for row in range(5)])
    for size in (256, 100):  # whole steps, and a rest
        given = {"weight": weight[:, :size].contiguous(), "scale": torch.ones(5), "activation": "none"}
        x = torch.eye(size, dtype=dtype)
        assert torch.equal(computed(x, **given), weight[:, :size].T.to(dtype))
        few = torch.cat([computed(x[first:first + 2], **given) for first in range(0, size, 2)])
        assert torch.equal(few, weight[:, :size].T.to(dtype))


AT_THE_END_OF_MEMORY = """
import ctypes, mmap, sys, torch
from ssd_kernels import native
from ssd_kernels.linear import Product

extension, page = native.extension(), mmap.PAGESIZE
memory = mmap.mmap(-1, 5 * page)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + 4 * page), page, 0) == 0
whole = torch.frombuffer(memory, dtype=torch.int8)[:4 * page]
for name in sys.argv[1:]:
    try:
        extension.set_instruction_set(name)
    except ValueError:
        continue  # this machine lacks it
    for inputs, outputs in ((1, 1), (7, 5), (33, 35), (100, 64), (4 * page // 64 - 1, 64)):
        for kind in (torch.int8, torch.float32, torch.bfloat16, torch.float16):
            for dtype in (torch.float32, torch.bfloat16, torch.float16) if kind == torch.int8 else (kind,):
                size = inputs * outputs * kind.itemsize
                if size > len(whole):
                    continue
                weight = whole[len(whole) - size:].view(kind).view(outputs, inputs).fill_(1)
                scale = torch.ones(outputs) if kind == torch.int8 else None
                for rows in (1, 9):
                    got = Product(weight, scale=scale, dtype=dtype)(torch.ones(rows, inputs, dtype=dtype))
                    assert torch.equal(got, torch.full((rows, outputs), inputs, dtype=dtype)), (name, kind, inputs)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect of Linux")
def test_nothing_behind_the_matrix_is_read() -> None:
    """Where memory ends: reading on would end the process, so it is one of its own."""
    run = subprocess.run([sys.executable, "-c", AT_THE_END_OF_MEMORY, *SETS], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr or run.returncode


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-3, -30.0, 30.0, -80.0, -100.0, 100.0, 3e4])
def test_silu_of_every_magnitude(instruction_set: str, value: float) -> None:
    x, weight = torch.tensor([[value, 0.0]]), torch.tensor([[1.0, 0.0]])
    expected = functional.silu(torch.tensor(value).double())
    assert (computed(x, weight, "silu").double() - expected).abs() <= 3e-7 * expected.abs() + 1e-35


def test_changes_in_place_are_seen() -> None:
    weight = torch.randn(8, 16)
    product, x = Product(weight), torch.randn(2, 16)
    weight.mul_(2)
    torch.testing.assert_close(product(x), functional.linear(x, weight))
    assert product(x[:0]).shape == (0, 8)


@pytest.mark.parametrize("change, message", [
    ({"weight": torch.zeros(6, 4).T}, "weight must be contiguous"),
    ({"weight": torch.zeros(0, 6)}, "weight must be contiguous"),
    ({"weight": torch.zeros(4, 6, dtype=torch.float64)}, "weight cannot be multiplied with: it needs dtype"),
    ({"weight": torch.zeros(4, 6, dtype=torch.int8)}, "weight of torch.int8 needs a scale and a dtype"),
    ({"scale": torch.ones(4)}, "weight must be of torch.int8 with a scale, got torch.float32"),
    ({"weight": torch.zeros(4, 6, dtype=torch.int8), "scale": torch.ones(4, 1)}, r"scale must be contiguous \[4\] of"),
    ({"weight": torch.zeros(4, 6, dtype=torch.int8), "scale": torch.ones(4, dtype=BF16)}, "of torch.float32 on cpu"),
    ({"weight": torch.zeros(4, 6, dtype=torch.int8), "scale": torch.ones(4), "bias": torch.zeros(4, dtype=BF16)},
     r"bias must be contiguous \[4\] of torch.float32"),
    ({"activation": "relu"}, "activation must be one of none, silu, swiglu, got 'relu'"),
    ({"weight": torch.zeros(3, 6), "activation": "swiglu"}, "an even number of rows for swiglu, got 3"),
    ({"bias": torch.zeros(3)}, r"bias must be contiguous \[4\]"),
    ({"bias": torch.zeros(4, dtype=BF16)}, r"bias must be contiguous \[4\] of torch.float32"),
    ({"norm": torch.zeros(12)[::2]}, r"norm must be contiguous \[6\]"),
    ({"x": torch.zeros(2, 5)}, r"x must be \[rows, 6\]"),
    ({"x": torch.zeros(2, 6, dtype=BF16)}, r"x must be \[rows, 6\] of torch.float32"),
    ({"x": torch.zeros(6, 2).T}, "unit last stride"),
    ({"plus": torch.zeros(3, 4)}, "plus must have as many rows as x, 2, got 3"),
    ({"plus": torch.zeros(2, 3)}, r"plus must be \[rows, 4\]"),
])
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torch.ops.ssd_kernels.linear(**{"x": torch.zeros(2, 6), "weight": torch.zeros(4, 6)} | change)


def test_unsupported_says_why() -> None:
    assert unsupported(torch.device("cpu"), F32) is None
    assert "it needs device cpu" in str(unsupported(torch.device("meta"), F32))
    assert "it needs dtype" in str(unsupported(torch.device("cpu"), torch.float64))


@plain_and_int8
@pytest.mark.parametrize("activation", ["none", "swiglu"])
def test_opcheck(activation: str, int8: bool) -> None:
    given = arguments(3, 20, 6, F32, activation, True, int8)
    result = torch.library.opcheck(torch.ops.ssd_kernels.linear.default, (given.pop("x"), given.pop("weight")), given)
    assert set(result.values()) == {"SUCCESS"}


def test_threads_are_woken_for_work_that_pays() -> None:
    threads = native.extension().worthwhile_threads
    assert threads(10**5, 10**6, 8) == 1
    assert threads(10**7, 10**6, 2) == 2  # reading takes long
    assert threads(10**6, 6 * 10**7, 64) == 24  # multiplying does
    assert threads(0, 0, 1) == threads(10**9, 10**9, 1) == 1
    worth = [threads(size, 3 * size, 16) for size in range(0, 10**8, 10**6)]
    assert worth == sorted(worth) and worth[-1] == 16
