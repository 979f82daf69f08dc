"""One decode step of one layer against torch's dense attention, on cold caches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from ssd_kernels import CachePlan, CompressedCache, HeadSpec

from .timing import Timing, time_interleaved

# Far more than any last-level cache, so that a slab has been evicted by the time its turn comes again.
COLD_BYTES = 256 * 2**20
OURS = ("ssd_kernels window", "ssd_kernels heavy", "ssd_kernels heavy, row buffer")


@dataclass(frozen=True)
class Shape:
    """One benchmark point. Lengths are tokens per head: ``mean`` kept on average out of ``full``."""

    batch: int = 16
    heads: int = 16
    head_dim: int = 128
    mean: int = 120
    full: int = 600
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        for name in ("batch", "heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 2 <= self.mean <= self.full:
            raise ValueError(f"mean must be within 2 .. full = {self.full}, got {self.mean}")

    def lengths(self) -> list[int]:
        """Exponentially spread head lengths with the asked mean, none above ``full``: some heads need far more."""
        quantiles = [-math.log(1 - (head + 0.5) / self.heads) for head in range(self.heads)]
        low, high = 0.0, self.full / quantiles[0]  # at which every head is full
        for _ in range(60):
            scale = (low + high) / 2
            total = sum(min(max(2, round(scale * quantile)), self.full) for quantile in quantiles)
            low, high = (scale, high) if total < self.mean * self.heads else (low, scale)
        return [min(max(2, round(high * quantile)), self.full) for quantile in quantiles]

    @property
    def useful_bytes(self) -> int:
        """K and V bytes of the slots one step has to read."""
        return 2 * self.batch * sum(self.lengths()) * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class Row:
    """One line of the result table. ``bytes`` are the K and V bytes the contender reads in one step."""

    name: str
    does: str
    microseconds: float
    median_microseconds: float
    bytes: int
    ratio: float


def measure(shape: Shape, repetitions: int = 50, trials: int = 3,
            progress: Callable[[str], None] = lambda name: None) -> list[Row]:
    """Time every contender on the same shape in one run.

    Every contender owns enough separate copies of its cache to fill `COLD_BYTES` and takes them in turn. The first
    contender is a plain read of the bytes our step has to read, by ``torch.sum``.

    Raises:
        RuntimeError: our output differs from float64 attention over the same tokens; no time is reported then.
    """
    check(shape)
    contenders: dict[str, tuple[str, int, Callable[[], Callable[[], object]]]] = {
        "read": ("reads the kept bytes once (torch.sum)", shape.useful_bytes, lambda: _read(shape)),
        OURS[0]: ("append, attend, evict", shape.useful_bytes, lambda: _ours(shape, HeadSpec.window, 0)),
        OURS[1]: ("append, attend, score, evict", shape.useful_bytes, lambda: _ours(shape, HeadSpec.heavy, 0)),
        OURS[2]: ("append, attend, score, refresh every 24", shape.useful_bytes,
                  lambda: _ours(shape, HeadSpec.heavy, 24)),
        "SDPA uniform": ("attend only; every head the mean length", _dense_bytes(shape, shape.mean),
                         lambda: _sdpa(shape, shape.mean, masked=False)),
        "SDPA padded + mask": ("attend only; padded to the longest head", _dense_bytes(shape, max(shape.lengths())),
                               lambda: _sdpa(shape, max(shape.lengths()), masked=True)),
        "SDPA full cache": ("attend only; nothing compressed", _dense_bytes(shape, shape.full),
                            lambda: _sdpa(shape, shape.full, masked=False)),
        "two bmm, uniform": ("attend only; every head the mean length", _dense_bytes(shape, shape.mean),
                             lambda: _bmm(shape, shape.mean)),
    }
    # One contender's caches at a time: together they would not fit a small machine.
    timings: dict[str, Timing] = {}
    rounds: dict[str, list[Timing]] = {name: [] for name in contenders}
    for _ in range(trials):
        for name, (_, _, build) in contenders.items():
            progress(name)
            rounds[name].append(time_interleaved({name: build()}, repetitions, 1)[name])
    for name, values in rounds.items():
        timings[name] = Timing(min(value.best for value in values), sorted(v.median for v in values)[len(values) // 2])
    ours = timings[OURS[1]].best
    return [Row(name, does, 1e6 * timings[name].best, 1e6 * timings[name].median, read, timings[name].best / ours)
            for name, (does, read, _) in contenders.items()]


def check(shape: Shape) -> None:
    """Compare our step with float64 attention over the same tokens. Raises RuntimeError when it is wrong."""
    cache, prompt_k, prompt_v = _cache(shape, HeadSpec.heavy, 0, seed=1)
    q, k, v = _token(shape)
    kept = [cache.positions(0, head) for head in range(shape.heads)]
    out = cache.decode(0, q, k, v).double()
    for row in range(shape.batch):
        for head in range(shape.heads):
            index = kept[head][row]
            keys = torch.cat([prompt_k[row, head, index], k[row, head, None]]).double()
            values = torch.cat([prompt_v[row, head, index], v[row, head, None]]).double()
            exact = torch.softmax(keys @ q[row, head].double() / math.sqrt(shape.head_dim), 0) @ values
            tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[shape.dtype]
            error = (out[row, head] - exact).abs().max().item()
            if not error <= tolerance:
                raise RuntimeError(f"wrong output at row {row}, head {head}: error {error:.2e} above {tolerance:.0e}")


def to_json(shape: Shape, rows: list[Row]) -> dict[str, object]:
    """The result as plain values."""
    return {"shape": {**asdict(shape), "dtype": str(shape.dtype).removeprefix("torch.")},
            "lengths": shape.lengths(), "rows": [asdict(row) for row in rows]}


def _copies(bytes_each: int) -> int:
    return max(2, -(-COLD_BYTES // bytes_each))


def _rotate(calls: list[Callable[[], object]]) -> Callable[[], object]:
    turn = 0

    def call() -> object:
        nonlocal turn
        turn = (turn + 1) % len(calls)
        return calls[turn]()

    return call


def _token(shape: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(3, shape.batch, shape.heads, shape.head_dim).to(shape.dtype).unbind(0))  # type: ignore[return-value]


def _cache(shape: Shape, kind: Callable[[int], HeadSpec], row_buffer: int,
           seed: int) -> tuple[CompressedCache, torch.Tensor, torch.Tensor]:
    """A cache in its steady state: a competing prompt fills every head up to its length at once.

    A head of length n keeps n - 1 tokens and appends one; with a row buffer it keeps fewer and holds n on average.
    """
    torch.manual_seed(seed)
    held = row_buffer // 2 if row_buffer else 1
    plan = CachePlan([[kind(max(1, length - held)) for length in shape.lengths()]], row_buffer, keep_prompt=False)
    cache = CompressedCache(plan, batch_size=shape.batch, num_query_heads=shape.heads, head_dim=shape.head_dim,
                            max_prompt=shape.full, num_visual_tokens=2**20, dtype=shape.dtype)
    k, v = torch.randn(2, shape.batch, shape.heads, shape.full, shape.head_dim).to(shape.dtype).unbind(0)
    cache.prefill(0, k, v, [shape.full] * shape.batch, scores=torch.rand(shape.batch, shape.heads, shape.full))
    return cache, k, v


def _ours(shape: Shape, kind: Callable[[int], HeadSpec], row_buffer: int) -> Callable[[], object]:
    q, k, v = _token(shape)
    caches = [_cache(shape, kind, row_buffer, seed)[0] for seed in range(_copies(shape.useful_bytes))]
    return _rotate([lambda cache=cache: cache.decode(0, q, k, v) for cache in caches])  # type: ignore[misc]


def _read(shape: Shape) -> Callable[[], object]:
    count = shape.useful_bytes // 4
    copies = [torch.rand(count) for _ in range(_copies(shape.useful_bytes))]
    return _rotate([copy.sum for copy in copies])


def _dense_bytes(shape: Shape, length: int) -> int:
    return 2 * shape.batch * shape.heads * length * shape.head_dim * shape.dtype.itemsize


def _slabs(shape: Shape, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    size = (shape.batch, shape.heads, length, shape.head_dim)
    return [(torch.randn(size).to(shape.dtype), torch.randn(size).to(shape.dtype))
            for _ in range(_copies(_dense_bytes(shape, length)))]


def _sdpa(shape: Shape, length: int, masked: bool) -> Callable[[], object]:
    q = _token(shape)[0].unsqueeze(2)
    mask = None
    if masked:
        kept = torch.arange(length) < torch.tensor(shape.lengths())[:, None]
        mask = kept[None, :, None, :].expand(shape.batch, -1, -1, -1).contiguous()
    return _rotate([lambda k=k, v=v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # type: ignore[misc]
                    for k, v in _slabs(shape, length)])


def _bmm(shape: Shape, length: int) -> Callable[[], object]:
    q = _token(shape)[0].unsqueeze(2)
    scale = 1 / math.sqrt(shape.head_dim)
    return _rotate([lambda k=k, v=v: torch.softmax(q @ k.mT * scale, -1) @ v  # type: ignore[misc]
                    for k, v in _slabs(shape, length)])
