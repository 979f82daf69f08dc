"""Triton's interpreter takes some 20 ms for one program, so `make test` lets it run a part of the contract tests only.

The part holds every rule and kind of head once; `make triton` runs them all.
"""

from __future__ import annotations

import re

import pytest

from .cases import INTERPRETED

QUICK = re.compile("|".join((
    r"test_every_kind_of_head\[R4-(keep_prompt-triton-bf16|evict_prompt-triton-f32)",
    r"test_smallest_sizes\[M\d.*R3-keep_prompt",
    r"test_(operator_takes|warmup)",
)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if INTERPRETED and "triton" in item.name and not QUICK.search(item.name):
            item.add_marker(pytest.mark.slow)
