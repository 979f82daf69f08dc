"""The `cpu` backend's instruction sets: each one this machine has, against the oracle and by batch invariance."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from instruction_sets import using

from ssd_kernels import CachePlan, CompressedCache, HeadSpec, backends, info, native
from ssd_kernels.kv_format import decoded

from . import test_kv_format
from .cases import BF16, F16, F32, IN_INT8, Case, each_format_of, mixed, short, uniform
from .pair import Pair, bits

each_format = each_format_of("cpu")
# "avx512_bf16" is of products alone (test_linear.py).
SETS = [name for name in info()["extension"].get("instruction_sets", []) if name != "avx512_bf16"]
pytestmark = pytest.mark.skipif(not SETS, reason="the extension is not built")


@pytest.fixture(params=SETS or ["none"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn."""
    with using(request.param) as name:
        yield name


@each_format
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=short)
@pytest.mark.parametrize(("heads", "group", "head_dim", "row_buffer"), [(8, 3, 40, 4), (4, 1, 72, 0), (4, 1, 128, 5)],
                         ids=["H8-G3-D40-R4", "H4-G1-D72-R0", "H4-G1-D128-R5"])
def test_instruction_set(instruction_set: str, case: Case, dtype: torch.dtype, heads: int, group: int, head_dim: int,
                         row_buffer: int) -> None:
    """"AVX-512, AVX2 and portable code chosen at run time": the same contract holds for each."""
    pair = Pair(mixed(heads, row_buffer), case, group=group, head_dim=head_dim, max_prompt=7, steps=20, dtype=dtype)
    pair.prefill([7, 2])
    pair.run(20)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=short)
@pytest.mark.parametrize("head_dim", [40, 72, 128], ids="D{}".format)
def test_bits_of_8(instruction_set: str, dtype: torch.dtype, head_dim: int) -> None:
    """What each stores in 8 bits of vectors that are easily got wrong."""
    case = next(case for case in IN_INT8 if case.name == "cpu")
    test_kv_format.test_steps_store_the_same_bits_everywhere(case, dtype, head_dim)
    test_kv_format.test_prompts_store_the_same_bits_everywhere(case, dtype, head_dim, False)


@each_format
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=short)
@pytest.mark.parametrize(("group", "head_dim"), [(1, 40), (1, 64), (2, 128)], ids=["G1-D40", "G1-D64", "G2-D128"])
def test_shared_prompts(instruction_set: str, case: Case, dtype: torch.dtype, group: int, head_dim: int) -> None:
    """Bits are those of copies wherever a prompt ends within the slots that are summed up together."""
    heads, lengths = 4, list(range(17))
    k, v, new_k, new_v, q = (torch.randn(len(lengths), *shape, head_dim).to(dtype) for shape in (
        (heads, 17), (heads, 17), (heads,), (heads,), (heads * group,)))
    outs = []
    for shared_prompts in (None, len(lengths)):
        cache = CompressedCache(case.stored(mixed(heads, 3)), len(lengths), heads * group, head_dim, 17, 12, dtype,
                                "cpu", "cpu", shared_prompts=shared_prompts)
        cache.prefill(0, k, v, lengths)
        outs.append(torch.stack([cache.decode(0, q.roll(step), new_k.roll(step), new_v.roll(step))
                                 for step in range(9)]))
    assert torch.equal(bits(outs[0]), bits(outs[1])) and outs[0].isfinite().all()


@each_format
def test_every_head_dim(instruction_set: str, case: Case) -> None:
    """head_dim 32 to 256 in multiples of 8: every tail of every vector width."""
    for head_dim in range(32, 257, 8):
        pair = Pair(mixed(2), case, head_dim=head_dim, max_prompt=2, steps=4, dtype=BF16, batch=1)
        pair.prefill([2])
        pair.run(4)


@each_format
@pytest.mark.parametrize("threads", [2, 3], ids=["row-by-row", "head-by-head"])
def test_both_orders_of_items(instruction_set: str, case: Case, threads: int) -> None:
    """From 4 rows per thread on, threads go through the slabs row by row; fewer rows are shared out by heads. Prompts
    are so long that as many threads pay.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        pair = Pair(mixed(8), case, head_dim=256, max_prompt=100, steps=8, dtype=BF16, batch=9)
        pair.prefill([97 + row % 4 for row in range(9)])
        assert pair.cache._layers[0].native.decode_threads(8, threads) == threads
        pair.run(8)
    finally:
        torch.set_num_threads(before)


def test_threads_are_woken_for_steps_that_pay() -> None:
    """By what rows keep: bytes in float32, a fourth of them in 8 bits, and products where many queries share them."""
    def threads(rows: int, prompt: int, queries: int = 8, kv_format: str = "auto") -> int:
        plan = CachePlan([[HeadSpec.full()] * 8], kv_format=kv_format)
        cache = CompressedCache(plan, rows, queries, 128, 200, 4, F32, "cpu", "cpu")
        cache.prefill(0, *torch.zeros(2, rows, 8, prompt, 128), [prompt] * rows)
        return cache._layers[0].native.decode_threads(queries, 16)

    assert threads(1, 0) == threads(1, 199) == 1
    assert threads(3, 199) == 4 and threads(6, 199) == 9  # 8 KB a token
    assert threads(6, 99) == 4
    assert threads(6, 199, kv_format="int8") == 2
    assert threads(6, 199, queries=128, kv_format="int8") == 15  # 32768 products a token


def attention_in_bytes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A step's output ``[D]`` over k and v ``[n, D]`` in 8 bits, and the float64 one over what slots hold."""
    count, head_dim = k.shape
    plan = next(case for case in IN_INT8 if case.name == "cpu").stored(uniform(HeadSpec.full(), 1))
    cache = CompressedCache(plan, 1, 1, head_dim, count - 1, 1, F32, "cpu", "cpu")
    cache.prefill(0, k[None, None, :-1], v[None, None, :-1], [count - 1])
    out = cache.decode(0, q[None, None], k[None, -1:], v[None, -1:])[0, 0]
    state = cache._layers[0]
    keys, values = (decoded((one[0],) * 2 + (scales[0],) * 2, torch.float64)[0]
                    for one, scales in zip(state.slabs[:2], state.scales, strict=True))
    return out, torch.softmax(keys @ q.double() / math.sqrt(head_dim), 0) @ values


@pytest.mark.parametrize("head_dim", [40, 128])
@pytest.mark.parametrize("count", [1, 3, 33, 100])
def test_bytes_of_every_magnitude(instruction_set: str, count: int, head_dim: int) -> None:
    """Queries and values far from 1 lose no more than others, with one element or one token above all others too."""
    random = torch.Generator().manual_seed(count)
    q, *kv = (torch.randn(*shape, head_dim, generator=random) for shape in ((), (count,), (count,)))
    k, v = kv
    for size in (1e-30, 1e-3, 1.0, 1e30):
        for query, keys, values in ((q * size, k / size, v * size), (q.index_fill(0, torch.tensor([3]), 40.0), k, v),
                                    (q, k, v * torch.logspace(-6, 0, count)[:, None] * size)):
            out, exact = attention_in_bytes(query, keys, values)
            assert (out.double() - exact).abs().max() <= 4e-6 * values.abs().max(), size
    for query, values in ((q * 0, v), (q, v * 0), (q * 1e-40, v)):
        out, exact = attention_in_bytes(query, k, values)
        assert (out.double() - exact).abs().max() <= 1e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bytes_hide_nothing_that_is_not_finite(instruction_set: str, bad: float) -> None:
    """A query, key or value that is not finite gives no number."""
    for place in range(3):
        given = [torch.ones(64), torch.ones(5, 64), torch.ones(5, 64)]
        given[place].view(-1)[-1] = bad
        assert attention_in_bytes(*given)[0].isnan().all(), place


def stored_as_float16(halves: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """The products [N] as the kernel stores them: keys that are turned by a "cosine" of any size and a sine of 0."""
    steps, head_dim = len(halves) // 128, 256
    cache = CompressedCache(uniform(HeadSpec.full(), 1), 1, 1, head_dim, 0, steps, F16, "cpu", "cpu")
    k = torch.zeros(steps, 1, 1, head_dim, dtype=F16)
    k[:, 0, 0, :128] = halves.view(steps, 128)
    cos, q = factors.view(steps, 128), torch.zeros(1, 1, head_dim, dtype=F16)
    for step in range(steps):
        cache.decode(0, q, k[step], k[step], rotary=(cos, torch.zeros_like(cos)))
    return cache._layers[0].keys[0, :, :128].flatten()


def assert_same_halves(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit by bit; any NaN equals any other."""
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(bits(got)[~got.isnan()], bits(expected)[~got.isnan()])


def test_every_float16_is_read_as_torch_reads_it(instruction_set: str) -> None:
    """Subnormals, infinities and NaN too."""
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(F16)
    for factors in (torch.ones(2**16), torch.rand(2**16, generator=torch.Generator().manual_seed(0)) + 0.5):
        assert_same_halves(stored_as_float16(halves, factors), (halves.float() * factors).to(F16))


def test_floats_are_rounded_to_float16_as_torch_rounds(instruction_set: str) -> None:
    """Around every tie, at both ends of the range, and any bits at all: the nearest, of two the even one."""
    ends = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(F16).float()[:0x7C01]
    ends[-1] = 2.0**16  # what would follow the largest
    ties = ((ends[1:] + ends[:-1]) / 2).view(torch.int32)
    around = torch.cat([ties - 1, ties, ties + 1, ties | -2**31])
    any_bits = torch.randint(-2**31, 2**31, (2**14,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    floats = torch.cat([around, any_bits]).view(F32)
    assert len(floats) % 128 == 0
    assert_same_halves(stored_as_float16(torch.ones(len(floats), dtype=F16), floats), floats.to(F16))


@pytest.mark.parametrize("head_dim", [8, 36, 264])
def test_the_extension_refuses_other_head_dims(head_dim: int) -> None:
    """Its buffers hold what the backend lets through, and no more."""
    state = CompressedCache(mixed(2), 1, 2, head_dim, 2, 4, F32, "cpu", "reference")._layers[0]
    x = torch.ones(1, 2, head_dim)
    with pytest.raises(ValueError, match=f"head_dim must be a multiple of 8 within 32 .. 256, got {head_dim}"):
        backends.get("cpu").decode(state, x, x, x, 1.0)


def test_unknown_instruction_set_is_refused() -> None:
    """Bad input names the argument."""
    with pytest.raises(ValueError, match="name must be an instruction set.*sse9"):
        native.extension().set_instruction_set("sse9")


@pytest.mark.parametrize(("count", "streams"), [(1, 1), (63, 8), (64 * 8, 8), (64 * 9 + 5, 4), (100_003, 3)])
@pytest.mark.parametrize("threads", [1, 3])
def test_reading_loops_read_everything(instruction_set: str, count: int, streams: int, threads: int) -> None:
    """The largest float is found wherever it lies, so no element is left out."""
    numbers = torch.randn(count)
    largest = native.extension().largest
    places = [0, count // 3, count // threads, count - 1] + list(range(max(count - 70, 0), count))
    for place in places:
        changed = numbers.clone()
        changed[min(place, count - 1)] = 50.0 + place % 7
        assert largest(changed.data_ptr(), count, streams, threads) == changed.max()
    assert largest((-numbers.abs()).data_ptr(), count, streams, threads) == (-numbers.abs()).max()
