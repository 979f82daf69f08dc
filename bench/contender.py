"""What every contender of a benchmark brings, and the gate it passes before it gets a number."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch.overrides import TorchFunctionMode

from .point import Point
from .timing import Work

# Far more than any last-level cache holds, so that a slab has been evicted by the time its turn comes again.
COLD_BYTES = 256 * 2**20
BYTE_SCALE = 4 / 127  # of random vectors in 8 bits
PART_BYTES = 16 * 2**20  # in one timed repetition on a CPU, so that reading the clock counts for nothing
NO_WORK = {"empty", "empty_like", "__get__", "__getitem__", "view", "reshape", "expand", "unsqueeze", "squeeze",
           "transpose", "dim", "size", "stride", "data_ptr", "numel", "is_contiguous", "contiguous", "get_num_threads"}


class WrongResult(Exception):
    """A contender's output, or what it kept, differs from the oracle's."""


class NotInstalled(Exception):
    """The library of a contender is missing."""


@dataclass(frozen=True)
class Built:
    """A contender made ready at one point.

    Attributes:
        work: what is timed, one call per layer.
        check: raises `WrongResult`.
        useful: bytes that a call has to move for what it does, kept tokens only.
        read: bytes of keys and values a call touches.
        allocated: bytes held for one layer, and taken during a call.
        launches: on a CPU, for work that `count_launches` cannot look into: our extension and compiled code.
        setup_seconds: what came before the first step and belongs to the method, such as building a mask.
    """

    work: Work
    check: Callable[[], None]
    useful: int
    read: int
    allocated: int
    launches: int | None = None
    setup_seconds: float | None = None


@dataclass(frozen=True)
class Contender:
    """A way to do the step.

    Attributes:
        name: for tables. does, omits: what of the step it does, and leaves out.
        build: make it ready; may raise `NotInstalled`.
        needs: bytes it will allocate, to be refused when there is not enough memory.
        backend: of ours, else None.
        features: further facts for the record.
    """

    name: str
    does: str
    omits: str
    build: Callable[[], Built]
    needs: int
    backend: str | None = None
    features: dict[str, object] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        return {"name": self.name, "does": self.does, "omits": self.omits, "backend": self.backend, **self.features}


def copies_of(nbytes: int) -> int:
    """How many copies of ``nbytes`` are cold when taken in turn, at least 2."""
    return max(2, -(-COLD_BYTES // nbytes))


def part_of(nbytes: int) -> int:
    """Calls that read ``nbytes`` each and make up one repetition on a CPU."""
    return min(-(-PART_BYTES // nbytes), copies_of(nbytes))


def sample_rows(batch: int) -> list[int]:
    """Rows that the gate looks at: first, middle and last."""
    return sorted({0, batch // 2, batch - 1})


def attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attention of one query ``q [D]`` over ``keys, values [n, D]`` in their own dtype."""
    return torch.softmax(keys @ q / math.sqrt(q.shape[0]), 0) @ values


def check_output(out: torch.Tensor, q: torch.Tensor, kept: Callable[[int, int], tuple[torch.Tensor, torch.Tensor]],
                 rows: Sequence[int]) -> None:
    """Compare ``out [B, H, D]`` with float64 attention of ``q [B, H, D]`` over ``kept(row, head)``, as they are read.

    Allowed is twice the largest error of the same computation done by torch in the same dtype, plus 1e-5
    (docs/specification.md, section 3.10).

    Raises:
        WrongResult: it differs, or is not a number.
    """
    errors, allowed = {}, 1e-5
    for row, head in itertools.product(rows, range(q.shape[1])):
        keys, values = kept(row, head)
        exact = attention(q[row, head].double(), keys.double(), values.double())
        native = attention(q[row, head], keys.to(q.dtype), values.to(q.dtype))
        torchs = (native.double() - exact).abs().max().item()
        allowed = max(allowed, 2 * torchs + 1e-5)
        errors[row, head] = (out[row, head].double() - exact).abs().max().item()
    for (row, head), error in errors.items():
        if not error <= allowed:
            raise WrongResult(f"output of row {row}, head {head} is off by {error:.1e}, allowed {allowed:.1e}")


class _Counter(TorchFunctionMode):
    """Counts torch functions as Python calls them: far lighter than a profiler or a dispatch mode."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func.__name__ not in NO_WORK
        return func(*args, **(kwargs or {}))


def count_launches(call: Callable[[], object], device: torch.device) -> int:
    """Kernels that one call launches on a GPU; on a CPU the torch functions it calls, without views and allocations."""
    if device.type == "cuda":
        from torch.profiler import ProfilerActivity, profile

        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as record:
            call()
            torch.cuda.synchronize()
        return sum(event.device_type == torch._C._autograd.DeviceType.CUDA for event in record.events())
    with _Counter() as counter:
        call()
    return int(counter.count)


class Arena:
    """Random numbers that all rivals read their keys and values from: the same bytes for everybody.

    A block of an odd number of elements is repeated, so that no two rows or heads begin alike.
    """

    BLOCK = 2**20 + 7

    def __init__(self, point: Point, device: torch.device) -> None:
        self._point, self._device = point, device
        self._data = torch.empty(0, dtype=point.torch_dtype, device=device)
        self._reserved = 0

    def reserve(self, nbytes: int) -> None:
        """Make the first tensors taken come from a block this large, so that it need not grow."""
        self._reserved = nbytes // self._point.torch_dtype.itemsize

    def take(self, *shapes: tuple[int, ...], copies: int) -> list[list[torch.Tensor]]:
        """``copies`` times a tensor of each of ``shapes``, no two of which overlap."""
        sizes = [math.prod(shape) for shape in shapes]
        if self._data.numel() < copies * sum(sizes):
            # Works made ready earlier keep what they took from the smaller one.
            count = max(copies * sum(sizes), self._reserved)
            self._data = torch.empty(count, dtype=self._point.torch_dtype, device=self._device)
            fill(self._data)
        taken, offset = [], 0
        for _ in range(copies):
            one = []
            for shape, size in zip(shapes, sizes, strict=True):
                one.append(self._data[offset:offset + size].view(shape))
                offset += size
            taken.append(one)
        return taken


def fill(tensor: torch.Tensor) -> None:
    """Random numbers of the normal distribution, a repeated block of them, into a contiguous tensor.

    Bytes are what a scale of `BYTE_SCALE` makes of them.
    """
    block = torch.randn(min(Arena.BLOCK, tensor.numel()), device=tensor.device)
    if tensor.dtype == torch.int8:
        block = (block / BYTE_SCALE).round_().clamp_(-127, 127)
    block = block.to(tensor.dtype)
    flat = tensor.view(-1)
    whole = flat.numel() // block.numel()
    flat[:whole * block.numel()].view(whole, -1).copy_(block.expand(whole, -1))
    flat[whole * block.numel():].copy_(block[:flat.numel() - whole * block.numel()])
