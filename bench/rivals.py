"""Torch's own attention as rivals, on the CPU and on a GPU. Each does the attention only."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from .contender import Arena, Built, Contender, WrongResult, check_output, copies_of, part_of, sample_rows
from .point import Point
from .timing import Work

ATTEND = "attend"
OMITS = "append, scores, eviction"
Kept = Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]
Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # q [B, H, 1, D], k, v [B, H, L, D]


def contenders(point: Point, arena: Arena, device: torch.device) -> list[Contender]:
    """Every rival of torch's, weakest idea last."""
    one = point.attend_bytes()
    full = point.attend_bytes(point.heads * point.full)
    padded = point.attend_bytes(point.heads * point.longest)

    def make(name: str, does: str, build: Callable[[], Built], nbytes: int, omits: str = OMITS) -> Contender:
        return Contender(name, does, omits, build, int(1.1 * nbytes * copies_of(nbytes)))

    def dense(length: int, step: Step, lengths: Sequence[int] | None = None, extra: int = 0) -> Callable[[], Built]:
        return lambda: build_dense(point, arena, device, length, step, lengths, extra)

    mask = _mask(point, point.longest, device)
    alike = f"{ATTEND}; same bytes, all heads alike"
    return [
        make("SDPA, every head the mean length", alike, dense(point.mean, _sdpa), one, f"{OMITS}, own lengths"),
        make("two bmm, every head the mean length", alike, dense(point.mean, _bmm), one, f"{OMITS}, own lengths"),
        make(f"SDPA, a call per head ({point.heads})", f"{ATTEND}; the kept tokens",
             lambda: _per_head(point, arena, device, _sdpa), one),
        make(f"two bmm, a call per head ({point.heads})", f"{ATTEND}; the kept tokens",
             lambda: _per_head(point, arena, device, _bmm), one),
        make("SDPA padded + mask", f"{ATTEND}; padded to the longest head",
             dense(point.longest, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
                   point.lengths, mask.nbytes), padded),
        make("gather + SDPA", "gather from the full cache, attend; padded to the longest head",
             lambda: _gather(point, arena, device, mask), full + padded),
        make("FlexAttention, per-head blocks", f"{ATTEND}; full cache, block mask, kept tokens side by side",
             lambda: _flex(point, arena, device), full),
        make("SDPA full cache", f"{ATTEND}; nothing compressed", dense(point.full, _sdpa), full, "append, compression"),
    ]


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _bmm(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.mT * (1 / math.sqrt(q.shape[-1])), -1) @ v


def query(point: Point, device: torch.device) -> torch.Tensor:
    """``[B, H, 1, D]``"""
    return torch.randn(point.batch, point.heads, 1, point.head_dim, device=device).to(point.torch_dtype)


def _mask(point: Point, length: int, device: torch.device) -> torch.Tensor:
    """bool ``[B, H, 1, length]``, True for kept tokens. One row per picture, as a real cache would have."""
    kept = torch.arange(length, device=device) < torch.tensor(point.lengths, device=device)[:, None]
    return kept[None, :, None].expand(point.batch, -1, -1, -1).contiguous()


def checker(point: Point, call: Callable[[], torch.Tensor], q: torch.Tensor, kept: Kept) -> Callable[[], None]:
    """The gate of a rival: ``call`` against float64 attention over ``kept(row, head)``."""
    def check() -> None:
        out = call()
        if out.numel() != q.numel():
            raise WrongResult(f"output has shape {list(out.shape)}")
        check_output(out.reshape(point.batch, point.heads, point.head_dim), q[:, :, 0], kept, sample_rows(point.batch))

    return check


def build_dense(point: Point, arena: Arena, device: torch.device, length: int, step: Step,
                lengths: Sequence[int] | None = None, extra: int = 0, launches: int | None = None,
                setup_seconds: float | None = None, read_slots: int | None = None) -> Built:
    """A rival over slabs ``[B, H, length, D]`` of which head h uses the first ``lengths[h]`` (None: all).

    Args:
        extra: bytes held beside the slabs. launches, setup_seconds: as in `Built`.
        read_slots: that a row's heads read, where they do not read all.
    """
    shape = (point.batch, point.heads, length, point.head_dim)
    read = point.attend_bytes(point.heads * length)
    layers = arena.take(shape, shape, copies=copies_of(read))
    q = query(point, device)
    calls = [lambda k=k, v=v: step(q, k, v) for k, v in layers]
    k, v = layers[0]

    def kept(row: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        count = length if lengths is None else lengths[head]
        return k[row, head, :count], v[row, head, :count]

    work = Work(calls, part=part_of(read))
    touched = read if read_slots is None else point.attend_bytes(read_slots)
    return Built(work, checker(point, calls[0], q, kept), point.attend_bytes(), touched, k.nbytes + v.nbytes + extra,
                 launches, setup_seconds)


def _per_head(point: Point, arena: Arena, device: torch.device, step: Step) -> Built:
    """One call for each head, over all rows: exact bytes, many calls."""
    shapes = [(point.batch, 1, length, point.head_dim) for length in point.lengths]
    layers = arena.take(*shapes, *shapes, copies=copies_of(point.attend_bytes()))
    q = query(point, device)
    heads = [q[:, head:head + 1] for head in range(point.heads)]

    def one(slabs: list[torch.Tensor]) -> torch.Tensor:
        pairs = zip(heads, slabs[:point.heads], slabs[point.heads:], strict=True)
        return torch.cat([step(*pair) for pair in pairs], 1)

    calls = [lambda slabs=slabs: one(slabs) for slabs in layers]
    first = layers[0]
    check = checker(point, calls[0], q, lambda row, head: (first[head][row, 0], first[point.heads + head][row, 0]))
    kept = point.attend_bytes()
    return Built(Work(calls, part=part_of(kept)), check, kept, kept, sum(slab.nbytes for slab in first))


def _gather(point: Point, arena: Arena, device: torch.device, mask: torch.Tensor) -> Built:
    """Kept tokens picked from a full cache at every step, into slabs padded to the longest head."""
    shape = (point.batch, point.heads, point.full, point.head_dim)
    full = point.attend_bytes(point.heads * point.full)
    layers = arena.take(shape, shape, copies=copies_of(full))
    q = query(point, device)
    chosen = torch.stack([torch.randperm(point.full)[:point.longest].sort().values for _ in range(point.heads)])
    slabs = torch.arange(point.batch * point.heads).view(point.batch, point.heads, 1) * point.full
    index = (slabs + chosen).flatten().to(device)
    padded_shape = (point.batch, point.heads, point.longest, point.head_dim)

    picked = [torch.empty(len(index), point.head_dim, dtype=point.torch_dtype, device=device) for _ in range(2)]

    def one(*slabs: torch.Tensor) -> torch.Tensor:
        # Whole rows by index_select into memory that stays: torch.gather goes element by element, and a new tensor of
        # this size costs more than filling it.
        for slab, target in zip(slabs, picked, strict=True):
            torch.index_select(slab.view(-1, point.head_dim), 0, index, out=target)
        k, v = (target.view(padded_shape) for target in picked)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    calls = [lambda k=k, v=v: one(k, v) for k, v in layers]
    k, v = layers[0]

    def kept(row: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = chosen[head, :point.lengths[head]].to(device)
        return k[row, head, tokens], v[row, head, tokens]

    padded = point.attend_bytes(point.heads * point.longest)
    return Built(Work(calls, part=part_of(full)), checker(point, calls[0], q, kept), point.attend_bytes(), 2 * padded,
                 k.nbytes + v.nbytes + padded + mask.nbytes + index.nbytes)


def _flex(point: Point, arena: Arena, device: torch.device) -> Built:
    """FlexAttention (PyTorch, arXiv 2412.05496), compiled, with a block mask per head; its mask is built beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    lengths = torch.tensor(point.lengths, device=device)
    began = time.perf_counter()
    blocks = create_block_mask(lambda b, h, query, key: key < lengths[h], None, point.heads, 1, point.full,
                               device=device.type)
    seconds = time.perf_counter() - began
    compiled = torch.compile(flex_attention, dynamic=False)

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            out: torch.Tensor = compiled(q, k, v, block_mask=blocks)
            return out

    size = blocks.BLOCK_SIZE[1]
    return build_dense(point, arena, device, point.full, step, point.lengths, launches=1, setup_seconds=seconds,
                       read_slots=sum(min(-(-length // size) * size, point.full) for length in point.lengths))
