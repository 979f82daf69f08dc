"""The draw in one launch: transformers' filters, their ties, and the same token from the kernel and the reference."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ssd_kernels import backends, filters, sampling

from .ptx import schedules
from .ptx.triton import Launcher

ARCHITECTURE = int(os.environ.get("SSD_PTX_ARCHITECTURE", "80"))
on_ptx = pytest.mark.skipif(backends.available().get("ptx_triton") is not None,
                            reason=str(backends.available().get("ptx_triton")))
SEEDS, SCALE = torch.tensor([3, -5, 2**40 + 1]), torch.tensor([5.0, 2.0])
FILTERS = [(1.0, 0, 1.0), (0.7, 50, 1.0), (1.3, 0, 0.9), (0.9, 50, 0.8), (1.0, 1, 1.0), (1.0, 0, 1e-6),
           (1.0, 0, 0.0)]


def each_of(pictures: int, temperature: float, top_k: int, top_p: float) -> filters.PerPicture:
    return filters.PerPicture.same(pictures, temperature, top_k, top_p, torch.device("cpu"))


def by_transformers(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """Which codes its warpers leave."""
    warpers: list[Any] = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    for warper in warpers:
        logits = warper(None, logits)
    return logits > -torch.inf


def on_a_border(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """Rows in which rounding decides whether top-p removes a code."""
    warped = (logits / temperature).double()
    if top_k:
        warped = warped.masked_fill(~by_transformers(logits, temperature, top_k, 1.0), -torch.inf)
    masses = warped.softmax(1).sort(dim=1, stable=True).values.cumsum(1)
    return ((masses - (1 - top_p)).abs() < 1e-5).any(1)


@settings(max_examples=200)
@given(st.integers(0, 2**32 - 1), st.integers(2, 80), st.sampled_from([1, 3, 1000]), st.integers(0, 90),
       st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.1]), st.sampled_from([0.3, 1.0, 2.0]))
def test_the_same_codes_stay(seed: int, codes: int, levels: int, top_k: int, top_p: float, temperature: float) -> None:
    """Of few levels, most logits are equal to others. As many of equal ones stay as transformers leaves; which of them
    is up to torch's sort, which is not stable, and here the later ones."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(8, codes, generator=generator) * levels).round() * (3 / levels)
    kept, weights = filters.warped(logits, each_of(8, temperature, top_k, top_p))
    expected = by_transformers(logits, temperature, top_k, top_p)
    clear = ~on_a_border(logits, temperature, top_k, top_p) if top_p < 1 else torch.ones(8, dtype=torch.bool)
    for stays in (kept, expected):
        stays[~clear] = False
    assert torch.equal(logits.masked_fill(~kept, 9e9).sort(1).values, logits.masked_fill(~expected, 9e9).sort(1).values)
    equal = logits[:, :, None] == logits[:, None]
    before = torch.ones(codes, codes, dtype=torch.bool).tril(-1)
    assert not (equal & before & kept[:, None] & ~kept[:, :, None] & clear[:, None, None]).any()
    assert kept[clear].any(1).all() and (weights.amax(1) == 1).all() and not weights[clear][~kept[clear]].any()


def test_exponentials_are_exact_to_a_few_units() -> None:
    x = torch.cat([torch.zeros(1), -torch.logspace(-8, 1.9, 100_000), torch.tensor([-1e30, -torch.inf])])
    made, exact = filters.exp(x), x.double().exp()
    inside = x >= filters.LOWEST
    assert ((made - exact).abs() / exact)[inside].max() < 4 * 2.0**-24
    assert not made[~inside].any() and made[0] == 1


def test_keys_are_in_the_order_of_logits() -> None:
    x = torch.tensor([-torch.inf, -3e38, -1.0, -1e-45, 0.0, 1e-45, 0.5, 2.0, 3e38, torch.inf])
    keys = filters.ordered(x)
    assert (keys.diff() > 0).all() and keys.min() >= 0 and keys.max() < 2**32
    assert filters.ordered(torch.tensor([-0.0])) == filters.ordered(torch.tensor([0.0]))


def test_the_border_of_masses_does_not_overflow() -> None:
    for total in (0, 1, 2**22 - 1, 2**30 * sampling.MAX_CODES):
        for top_p in (1e-9, 0.3, 0.9, 1 - 1e-9):
            share = filters.tail_share(top_p)
            assert int(filters.tail(torch.tensor(total), share)) == total * share >> 30


@pytest.mark.parametrize("top_p", [0.0, 1e-12, 1e-9])
def test_the_likeliest_code_stays_however_small_top_p_is(top_p: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(8, sampling.MAX_CODES) * torch.tensor([0.01, 3.0]).repeat(4)[:, None]
    kept, _ = filters.warped(logits, each_of(8, 1.0, 0, top_p))
    assert torch.equal(kept, by_transformers(logits, 1.0, 0, top_p))
    assert torch.equal(kept.int().argmax(1), logits.argmax(1))


def test_no_number_comes_from_the_host() -> None:
    """By such a one torch divides on a GPU with a product, which rounds otherwise than the kernel's division."""
    divisors = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "div" in str(func):
                divisors.append(args[1])
            return func(*args, **(kwargs or {}))

    with Watching():
        filters.sample(torch.zeros(5, 64, device="meta"), torch.zeros(2, device="meta"),
                       *torch.zeros(2, 3, dtype=torch.long, device="meta"), 0.7, 5, 0.9)
    assert len(divisors) == 3 and {divisor.device.type for divisor in divisors} == {"meta"}


def test_codes_are_drawn_as_often_as_they_are_likely() -> None:
    logits, draws = torch.tensor([[0.0, 1.0, -1.0, 2.0, 0.5]]), 20_000
    tokens = filters.sample(logits.expand(draws, -1), torch.empty(0), torch.arange(draws),
                             torch.zeros(draws, dtype=torch.long))
    expected = logits[0].double().softmax(0).numpy() * draws
    assert stats.chisquare(tokens.bincount(minlength=5).numpy(), expected).pvalue > 0.01


def test_a_token_does_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    logits, steps = torch.randn(5, 300) * 3, torch.full((3,), 7)
    together = filters.sample(logits, SCALE, SEEDS, steps, 0.9, 50, 0.9)
    for picture, rows in enumerate(([0, 3], [1, 4], [2])):
        one = slice(picture, picture + 1)
        alone = filters.sample(logits[rows], SCALE[one], SEEDS[one], steps[:1], 0.9, 50, 0.9)
        assert alone == together[picture]


@pytest.mark.parametrize("codes", [1, 5, 300])
def test_every_picture_has_its_own_numbers(codes: int) -> None:
    """The token that it has where all have its numbers; a temperature of 0 is the first of the likeliest codes, and a
    scale up to 1 no guidance."""
    generator = torch.Generator().manual_seed(codes)
    numbers = [*FILTERS, (0.0, 5, 0.5), (1.0, 1000, 1.0)]
    pictures = len(numbers)
    seeds, steps = torch.arange(pictures) - 3, torch.arange(pictures) * 7
    scale = torch.tensor([5.0, 1.0, 2.0, 0.0, 1.0 + 2**-23, -3.0, 3.0, 2.0, 4.0])
    each = filters.PerPicture.of(numbers, torch.device("cpu"))
    for _ in range(20):
        logits = (torch.randn(2 * pictures, codes, generator=generator) * 6).round() / 2
        drawn = filters.sample(logits, scale, seeds, steps, each=each)
        for index, own in enumerate(numbers):
            rows = [index, pictures + index][:1 + (scale[index] > 1)]
            one, guidance = slice(index, index + 1), scale[index:index + len(rows) - 1]
            expected = filters.sample(logits[rows], guidance, seeds[one], steps[one], *own) if own[0] else (
                filters.guided(logits[rows], guidance).argmax(1))
            assert drawn[one] == expected


def _by_kernel(logits: torch.Tensor, steps: torch.Tensor, numbers: tuple[float, int, float],
               scale: torch.Tensor = SCALE, each: filters.PerPicture | None = None) -> torch.Tensor:
    from ssd_kernels.triton.sample import sample_kernel

    tokens = torch.full((len(SEEDS),), -1)
    sampling.launch_kernel(Launcher(sample_kernel, ARCHITECTURE), tokens, logits, scale, SEEDS, steps, *numbers, each)
    return tokens


@on_ptx
@pytest.mark.parametrize("numbers", FILTERS, ids=str)
@pytest.mark.parametrize("codes", [5, 64, 1000])
def test_the_kernel_draws_the_same(codes: int, numbers: tuple[float, int, float]) -> None:
    """Two guided pictures and a plain one, many equal logits among them, at several steps."""
    torch.manual_seed(codes)
    for step in (0, 1, 2**33 + 7):
        logits = (torch.randn(5, codes) * 6).round() / 2
        logits[0, codes // 2:] = -torch.inf if step == 1 else logits[0, 0]
        steps = torch.tensor([step]).expand(len(SEEDS))
        assert torch.equal(_by_kernel(logits, steps, numbers), filters.sample(logits, SCALE, SEEDS, steps, *numbers))


MIXED = [[(0.7, 50, 1.0), (0.0, 0, 1.0), (1.0, 0, 1.0)], [(1.3, 0, 0.9), (0.9, 2, 0.8), (0.0, 3, 0.1)],
         [(1.0, 0, 0.0), (1.0, 2000, 1 - 1e-9), (1.0, 1, 1.0)]]


@on_ptx
@pytest.mark.parametrize("numbers", MIXED, ids=str)
@pytest.mark.parametrize("codes", [5, 200])
def test_the_kernel_draws_by_the_numbers_of_every_picture(codes: int, numbers: list[tuple[float, int, float]]) -> None:
    """Guided pictures, one with a scale that guides nothing, whose unconditional logits may be anything."""
    torch.manual_seed(codes)
    scale, each = torch.tensor([5.0, 1.0]), filters.PerPicture.of(numbers, torch.device("cpu"))
    for step in (0, 1, 2**33 + 7):
        logits = (torch.randn(5, codes) * 6).round() / 2
        logits[4] = torch.nan
        steps = torch.tensor([step]).expand(len(SEEDS))
        expected = filters.sample(logits, scale, SEEDS, steps, each=each)
        assert torch.equal(_by_kernel(logits, steps, (1.0, 0, 1.0), scale, each), expected)


@on_ptx
def test_the_kernel_draws_the_same_from_the_codes_of_janus() -> None:
    torch.manual_seed(0)
    logits, steps, numbers = torch.randn(5, 16384) * 3, torch.full((3,), 7), (0.9, 500, 0.95)
    assert torch.equal(_by_kernel(logits, steps, numbers), filters.sample(logits, SCALE, SEEDS, steps, *numbers))


@on_ptx
def test_the_kernel_does_not_depend_on_the_schedule() -> None:
    torch.manual_seed(0)
    logits, steps, numbers = torch.randn(5, 200) * 3, torch.full((3,), 7), (0.9, 50, 0.9)
    with schedules.scheduled(schedules.SCHEDULES["adversarial"]):
        assert torch.equal(_by_kernel(logits, steps, numbers), filters.sample(logits, SCALE, SEEDS, steps, *numbers))


@on_ptx
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_no_token_is_out_of_range(value: float) -> None:
    """Whatever comes out of a model that has gone wrong: the next step looks the token up."""
    for logits in (torch.full((5, 70), value), torch.randn(5, 70).index_fill(1, torch.tensor([3]), value)):
        for numbers in FILTERS:
            assert 0 <= int(_by_kernel(logits, torch.zeros(3, dtype=torch.long), numbers).min())
            assert int(_by_kernel(logits, torch.zeros(3, dtype=torch.long), numbers).max()) < 70


@on_ptx
@pytest.mark.parametrize(("architecture", "each"), [(80, False), (90, False), (90, True)])
def test_nothing_spills_with_the_codes_of_janus(architecture: int, each: bool) -> None:
    """Two programs' worth of threads in one: 64 registers each."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from ssd_kernels.triton.compiled import resources

    launched: dict[str, Any] = {}

    class Seen:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *arguments, **named: launched.update(named, arguments=arguments)

    sampling.launch_kernel(Seen(), torch.empty(3, dtype=torch.long), torch.zeros(5, sampling.MAX_CODES), SCALE, SEEDS,
                           SEEDS, 0.9, 50, 0.9, each_of(3, 0.9, 50, 0.9) if each else None)
    from ssd_kernels.triton.sample import sample_kernel

    names, types = sample_kernel.arg_names, {torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32"}
    constants = {name: launched.pop(name) for name in names if name in launched}
    given = dict(zip(names, launched.pop("arguments"), strict=False))
    signature = {name: "constexpr" if name in constants else types[given[name].dtype]
                 if isinstance(given[name], torch.Tensor) else "fp32" if isinstance(given[name], float) else "i32"
                 for name in names}
    kernel = compile(ASTSource(fn=sample_kernel, signature=signature, constexprs=constants),
                     target=GPUTarget("cuda", architecture, 32), options=launched)
    found = resources(kernel)
    assert (found.local_accesses, found.stack, found.warps) == (0, 0, 32) and found.registers <= 64


@pytest.mark.parametrize(("changes", "message"), [
    ({"logits": torch.zeros(4, 7)}, r"logits must be \[5, 7\]"),
    ({"logits": torch.zeros(5, 7, dtype=torch.float64)}, "logits must be torch.float32"),
    ({"logits": torch.zeros(7, 5).T}, "logits must be contiguous"),
    ({"scale": torch.zeros(2).double()}, "scale must be torch.float32"),
    ({"seeds": SEEDS.int()}, "seeds must be torch.int64"),
    ({"steps": torch.zeros(2, dtype=torch.long)}, r"steps must be \[3\]"),
    ({"temperature": 0.0}, "temperature must be above 0"), ({"top_k": -1}, "top_k must be at least 0"),
    ({"each": each_of(2, 0.7, 5, 0.9)}, r"each.temperature must be \[3\]"),
    ({"each": each_of(3, 0.7, 5, 0.9)._replace(top_k=SEEDS)}, "each.top_k must be torch.int32"),
    ({"each": each_of(3, 0.7, 5, 0.9)._replace(tail=torch.zeros(6, dtype=torch.int32)[::2])}, "tail must be contig"),
    ({"top_p": -0.1}, "top_p must be within 0 .. 1"), ({"top_p": 1.5}, "top_p must be within 0 .. 1"),
])
def test_bad_input_is_refused(changes: dict[str, Any], message: str) -> None:
    arguments = {"logits": torch.zeros(5, 7), "scale": SCALE, "seeds": SEEDS,
                 "steps": torch.zeros(3, dtype=torch.long), **changes}
    with pytest.raises((TypeError, ValueError), match=message):
        sampling.sample_in_one_launch(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("numbers", MIXED, ids=str)
def test_a_gpu_draws_by_the_numbers_of_every_picture(numbers: list[tuple[float, int, float]]) -> None:
    torch.manual_seed(0)
    logits, steps, scale = torch.randn(5, 16384) * 3, torch.full((3,), 7), torch.tensor([5.0, 1.0])
    each = filters.PerPicture.of(numbers, torch.device("cpu"))
    drawn = sampling.sample_in_one_launch(*(tensor.cuda() for tensor in (logits, scale, SEEDS, steps)),
                                          each=filters.PerPicture(*(tensor.cuda() for tensor in each)))
    assert torch.equal(drawn.cpu(), filters.sample(logits, scale, SEEDS, steps, each=each))


@pytest.mark.gpu
@pytest.mark.parametrize("numbers", FILTERS, ids=str)
def test_a_gpu_draws_the_same(numbers: tuple[float, int, float]) -> None:
    torch.manual_seed(0)
    logits, steps = torch.randn(5, 16384) * 3, torch.full((3,), 7)
    drawn = sampling.sample_in_one_launch(logits.cuda(), SCALE.cuda(), SEEDS.cuda(), steps.cuda(), *numbers)
    assert torch.equal(drawn.cpu(), filters.sample(logits, SCALE, SEEDS, steps, *numbers))
