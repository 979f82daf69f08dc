"""Triton's interpreter takes some 20 ms for one program, so `make test` lets it run a part of the contract tests only.

The part holds every rule, kind of head and kind of misuse in float32, and bfloat16 once; `make triton` runs them all.
"""

from __future__ import annotations

import re

import pytest

from .cases import INTERPRETED

QUICK = re.compile("|".join((
    r"test_every_kind_of_head\[(R4-keep_prompt-triton-bf16|R\d-evict_prompt-triton-f32)",
    r"test_row_buffer\[R(3|27)-",
    r"test_smallest_sizes\[.*R3-keep_prompt",
    r"test_sizes_off_block_boundaries\[.*13",
    r"test_(prefill_scores|prompts_longer|reset_empties|layers_are|evicted_score|rows_restart|no_prompt)",
    r"test_(a_row_does_not_depend_on_its_batch|output_does_not_depend)",
    r"test_(a_row_writes|damaged|eviction_moves)",
    r"test_guards_stay_whole\[R4-evict_prompt-triton-f32",
    r"test_(more_pinned|pinned|position_is|prompt_tokens|positions_up_to).*(f32|triton\])",
    r"test_(grouped_queries|strided_inputs|shapes).*f32",
    r"test_(opcheck|operators|prefill_operator)",
    r"test_bad_",
    r"test_(decode_keeps|equal_|high_ties|nan_scores|prefill_keeps|mean_lets|zero_scores).*(f32|triton\])",
    r"test_equals_a_plan_that_said_so",
    r"test_(warmup|operator_takes|rotating_inside.*f32)",
)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if INTERPRETED and "triton" in item.name and not QUICK.search(item.name):
            item.add_marker(pytest.mark.slow)
