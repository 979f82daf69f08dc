"""`ssd_bench.products`: contenders take turns on copies that are cold, best with best."""

from __future__ import annotations

import pytest
import torch

from ssd_bench import products


def test_contenders_take_turns_and_the_fastest_call_counts() -> None:
    times = iter([0.0, 3.0, 3.0, 5.0, 5.0, 6.0, 6.0, 13.0])
    seen: list[tuple[str, int]] = []
    calls = {name: (lambda x, copy, name=name: seen.append((name, copy))) for name in ("one", "other")}
    best = products.best_in_turn(calls, torch.zeros(1), 3, 2, clock=lambda: next(times))
    assert best == {"one": 1.0, "other": 2.0}
    assert seen == [("one", 0), ("other", 1), ("one", 2), ("other", 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_contenders_compute_the_same(dtype: torch.dtype) -> None:
    weights, x = [torch.randn(96, 64).to(dtype) for _ in range(3)], torch.randn(2, 64).to(dtype)
    calls = products.contenders(weights, 2)
    multiplying = {name: call for name, call in calls.items() if "read" not in name}
    assert list(multiplying)[:2] == ["ssd_kernels", "torch linear"] and len(calls) > len(multiplying)
    for call in multiplying.values():
        torch.testing.assert_close(call(x, 1), x @ weights[1].T, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_contenders_with_bytes_compute_the_same(dtype: torch.dtype) -> None:
    weights, x = [torch.randn(96, 64).to(dtype) for _ in range(3)], torch.randn(2, 64).to(dtype)
    multiplying = {name: call for name, call in products.int8_contenders(weights).items() if "read" not in name}
    assert list(multiplying)[:2] == ["ssd_kernels, int8", "ssd_kernels"]
    for call in multiplying.values():
        torch.testing.assert_close(call(x, 1), x @ weights[1].T, atol=0.3, rtol=0.05)


def test_the_command_prints_shares(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(products, "COLD", 2**14)
    products.main(["--rows", "1", "3", "--shape", "64", "32", "--rounds", "2", "--threads",
                   str(torch.get_num_threads())])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[1].startswith("  1 rows: reading") and "ssd_kernels" in lines[2]
