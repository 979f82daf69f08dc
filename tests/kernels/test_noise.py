"""Noise of the exponential distribution: known words, exact numbers, one launch, and nothing of the batch."""

from __future__ import annotations

import os

import pytest
import torch
from scipy import stats

from ssd_kernels import backends, noise, philox

from .ptx import schedules
from .ptx.triton import Launcher

ARCHITECTURE = int(os.environ.get("SSD_PTX_ARCHITECTURE", "80"))
on_ptx = pytest.mark.skipif(backends.available().get("ptx_triton") is not None,
                            reason=str(backends.available().get("ptx_triton")))
KNOWN = {  # counter and key of Random123's kat_vectors, philox4x32-10
    ((0, 0, 0, 0), (0, 0)): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)):
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
}
SEEDS, STEPS = torch.tensor([3, -5, 2**40 + 1, 3, 3]), torch.tensor([0, 1, 2**33 + 7, 1, 0])


def test_philox_gives_the_known_words() -> None:
    for (counter, key), words in KNOWN.items():
        made = philox.philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
        assert tuple(map(int, made)) == words


def test_the_logarithm_is_exact_to_a_few_units() -> None:
    """At both ends of the words, around the middle and between: positive, finite, falling with the word."""
    torch.manual_seed(0)
    words = torch.cat([torch.arange(2000), 2**31 + torch.arange(-1000, 1000), 2**32 - 1 - torch.arange(2000),
                       torch.randint(2**32, (200_000,))]).unique()
    made, below = philox.exponential_of(words), (words.double() + 0.5) / 2**32
    exact = torch.where(words < 2**31, -below.log(), -torch.log1p(-((2**32 - 1 - words).double() + 0.5) / 2**32))
    assert made.isfinite().all() and (made > 0).all()
    assert ((made.double() - exact).abs() / exact).max() < 6 * 2.0**-24
    assert (made.diff() <= 0).all()


def test_numbers_are_exponential_and_independent() -> None:
    made = philox.exponential(torch.arange(16), torch.zeros(16, dtype=torch.long), 16384)
    assert abs(made.mean().item() - 1) < 4 / made.numel() ** 0.5
    assert stats.kstest(made.flatten().numpy(), "expon").pvalue > 0.01
    smallest = made.min(1).values * made.shape[1]  # what decides a draw is exponential, too
    assert stats.kstest(smallest.numpy(), "expon").pvalue > 0.01
    for other in (made[1], made[0].roll(1),
                  philox.exponential(torch.tensor([0]), torch.tensor([1]), 16384)[0]):  # seed, code, step
        assert abs(stats.spearmanr(made[0].numpy(), other.numpy()).statistic) < 4 / 16384**0.5


def test_a_number_is_of_its_seed_step_and_code_only() -> None:
    made = philox.exponential(SEEDS, STEPS, 1030)
    assert len({tuple(row) for row in made.tolist()}) == 4 and torch.equal(made[0], made[4])
    for row in range(len(SEEDS)):
        for codes in (1, 6, 1029):
            assert torch.equal(philox.exponential(SEEDS[row:row + 1], STEPS[row:row + 1], codes)[0], made[row, :codes])


@on_ptx
@pytest.mark.parametrize("codes", [1, 5, 64, 1023, 1024, 1030])
def test_the_kernel_computes_the_same_bits(codes: int) -> None:
    """Nothing outside is written, and the step may be one number for all pictures."""
    from ssd_kernels.triton.noise import noise_kernel

    guarded = torch.full((len(SEEDS) + 2, codes), float("nan"))
    for steps in (STEPS, torch.tensor([2**32 - 1]).expand(len(SEEDS))):
        noise.launch_kernel(Launcher(noise_kernel, ARCHITECTURE), guarded[1:-1], SEEDS, steps)
        assert torch.equal(guarded[1:-1], philox.exponential(SEEDS, steps, codes))
    assert guarded[[0, -1]].isnan().all()


@on_ptx
def test_the_kernel_does_not_depend_on_the_schedule() -> None:
    from ssd_kernels.triton.noise import noise_kernel

    out = torch.empty(2, 1030)
    with schedules.scheduled(schedules.SCHEDULES["adversarial"]):
        noise.launch_kernel(Launcher(noise_kernel, ARCHITECTURE), out, SEEDS[:2], STEPS[:2])
    assert torch.equal(out, philox.exponential(SEEDS[:2], STEPS[:2], 1030))


def test_filling_on_a_cpu() -> None:
    out = torch.empty(5, 7)
    noise.exponential_(out, SEEDS, STEPS)
    assert torch.equal(out, philox.exponential(SEEDS, STEPS, 7)) and not noise.in_one_launch(out.device)


@pytest.mark.parametrize(("out", "seeds", "steps", "message"), [
    (torch.empty(2, 3, dtype=torch.float64), SEEDS[:2], STEPS[:2], "out must be torch.float32"),
    (torch.empty(6), SEEDS[:2], STEPS[:2], r"out must be \[pictures, codes\]"),
    (torch.empty(3, 2).T, SEEDS[:2], STEPS[:2], "out must be contiguous"),
    (torch.empty(2, 3), SEEDS[:3], STEPS[:2], r"seeds must be \[2\]"),
    (torch.empty(2, 3), SEEDS[:2].int(), STEPS[:2], "seeds must be torch.int64"),
    (torch.empty(2, 3), SEEDS[:2], STEPS[:2].to("meta"), r"steps must be \[2\] on cpu, got \[2\] on meta"),
])
def test_bad_input_is_refused(out: torch.Tensor, seeds: torch.Tensor, steps: torch.Tensor, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        noise.exponential_(out, seeds, steps)


@pytest.mark.gpu
def test_a_gpu_computes_the_same_bits_and_goes_on_in_a_graph() -> None:
    out, step = torch.empty(5, 1030, device="cuda"), torch.zeros(1, dtype=torch.long, device="cuda")
    seeds = SEEDS.cuda()
    noise.exponential_(out, seeds, step.expand(5))
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        noise.exponential_(out, seeds, step.expand(5))
        step += 1
    for number in range(3):
        graph.replay()
        assert torch.equal(out.cpu(), philox.exponential(SEEDS, torch.full((5,), number), 1030))
