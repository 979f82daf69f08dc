"""``python -m ssd_bench.products``: products of few rows with weights, ours and torch's, beside reading these weights.

With ``--int8`` the weights are signed bytes, and beside them is our product with the plain ones.

Contenders take turns call by call, on weights that are cold, and are compared best with best: a machine that others use
is as slow for one as for the next.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from ssd_kernels import info, native
from ssd_kernels.linear import Product
from ssd_kernels.pages import in_huge_pages

from . import ceiling, machine
from .contender import fill

COLD = 2**28  # bytes of all copies of the weights
Call = Callable[[torch.Tensor, int], Any]


def contenders(weights: Sequence[torch.Tensor], rows: int) -> dict[str, Call]:
    """Calls of (x, number of the copy of the weights), by name."""
    products = [Product(weight) for weight in weights]
    found = reads(weights)
    found |= {"ssd_kernels": lambda x, copy: products[copy](x),
              "torch linear": lambda x, copy: functional.linear(x, weights[copy])}
    operations = torch.ops.mkldnn
    if torch.backends.mkldnn.is_available() and hasattr(operations, "_reorder_linear_weight"):
        try:
            packed = [operations._reorder_linear_weight(weight, rows) for weight in weights]
        except RuntimeError:  # no instructions for the dtype
            return found
        found["oneDNN, packed for the rows"] = lambda x, copy: operations._linear_pointwise.default(
            x, packed[copy], None, "none", [], "none")
    return found


def int8_contenders(weights: Sequence[torch.Tensor]) -> dict[str, Call]:
    """As `contenders`, with the weights in signed bytes."""
    dtype, scales = weights[0].dtype, [weight.abs().amax(1).float() / 127 for weight in weights]
    stored = [(weight / scale[:, None]).round().to(torch.int8) for weight, scale in zip(weights, scales, strict=True)]
    for one in stored:
        in_huge_pages(one)
    plain = [Product(weight) for weight in weights]
    products = [Product(one, scale=scale, dtype=dtype) for one, scale in zip(stored, scales, strict=True)]
    found = reads(stored)
    found |= {"ssd_kernels, int8": lambda x, copy: products[copy](x), "ssd_kernels": lambda x, copy: plain[copy](x)}
    if hasattr(torch, "_weight_int8pack_mm"):
        rounded = [scale.to(dtype) for scale in scales]
        found["torch, int8"] = lambda x, copy: torch._weight_int8pack_mm(x, stored[copy], rounded[copy])
    return found


def reads(weights: Sequence[torch.Tensor]) -> dict[str, Call]:
    """The reading loops, and torch's sum, over weights of any dtype."""
    flat = [weight.view(torch.float32).flatten() for weight in weights]
    calls = {name: work.calls for name, work in ceiling.loops(flat).items()} | {ceiling.READ: [one.sum for one in flat]}
    return {name: lambda x, copy, each=each: each[copy]() for name, each in calls.items()}


def best_in_turn(calls: dict[str, Call], x: torch.Tensor, copies: int, rounds: int,
                 clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Seconds of the fastest call of each, all called in turn ``rounds`` times, each time on the next copy."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    turns = itertools.cycle(range(copies))
    for _ in range(rounds):
        for name, call in calls.items():
            copy = next(turns)
            began = clock()
            call(x, copy)
            seconds[name].append(clock() - began)
    return {name: min(found) for name, found in seconds.items()}


def measure(rows: int, shape: tuple[int, int], dtype: torch.dtype, rounds: int, huge: bool,
            int8: bool = False) -> dict[str, float]:
    """Best seconds by contender, of ``rows`` times a matrix of ``shape`` [out, in]."""
    copies = 2 + COLD // (shape[0] * shape[1] * (1 if int8 else dtype.itemsize))
    while math.gcd(copies, 6 * 7) > 1:  # of six or seven contenders each comes to every copy
        copies += 1
    weights = [torch.empty(shape, dtype=dtype) for _ in range(copies)]
    for weight in weights:
        fill(weight)
        if huge:
            in_huge_pages(weight)
    x = torch.randn(rows, shape[1]).to(dtype)
    calls = int8_contenders(weights) if int8 else contenders(weights, rows)
    # The clock of the only thread stands still while other jobs have its core.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    return best_in_turn(calls, x, copies, rounds, clock)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="ssd_bench.products", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--shape", type=int, nargs=2, default=[11264, 2048],
                        help="outputs and inputs; default: gate and up of Janus-Pro-1B")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--int8", action="store_true", help="weights in signed bytes, x in the dtype")
    parser.add_argument("--instruction-set", help="default: the best of this machine")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--small-pages", action="store_true", help="leave the weights out of huge pages")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    dtype, shape = getattr(torch, given.dtype), tuple(given.shape)
    if given.instruction_set:
        native.extension().set_instruction_set(given.instruction_set)
    size = shape[0] * shape[1] * (1 if given.int8 else dtype.itemsize)
    print(f"{machine.processor()}, {info()['extension'].get('instruction_set')}, {given.threads} threads, load "
          f"{machine.load()}, {given.dtype}{' x int8' if given.int8 else ''} {list(shape)}")
    for rows in given.rows:
        best = measure(rows, shape, dtype, given.rounds, not given.small_pages, given.int8)
        read = min(best.pop(name) for name in list(best) if name == ceiling.READ or name.startswith(ceiling.LOOP))
        print(f"{rows:3d} rows: reading {size / read / 1e9:.1f} GB/s; " + "; ".join(
            f"{name} {1e3 * seconds:.2f} ms, {read / seconds:.0%}" for name, seconds in best.items()))


if __name__ == "__main__":
    main()
