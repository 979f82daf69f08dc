"""What the executor of PTX runs in `make test`: every contract test, with some parameters.

`make simulation` runs all, under several schedules. Of a test that is not listed here, and of one whose parameters
match no more, the first parameters run; with caches in 8 bits only what is listed.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

import pytest

from .ptx import schedules

SELECTED = {
    "test_every_kind_of_head": "R4-keep_prompt.*bf16|R0-evict_prompt.*-f16",
    "test_row_buffer": "R6-evict|R23-keep",
    "test_smallest_sizes": "R3-keep",
    "test_sizes_off_block_boundaries": "M17-R16-keep|M33-R0-evict",
    "test_all_full_is_dense_causal_attention": "R0-keep.*f32|R6-evict.*bf16",
    "test_large_enough_heads_equal_full": "0-R0-keep|1-R5-evict",
    "test_mass_is_conserved_through_evictions": "R0-keep|R4-evict",
    "test_logits_of_minus_infinity": "a-part|the-first",
    "test_no_softmax_gives_nan": "all-minus-infinity-P513-G2|nan-late-P513-G1",
    "test_rows_restart_midway": "R4-evict",
    "test_guards_stay_whole": "R4-evict_prompt.*bf16",
    "test_damaged_cursors": "prompt_len-evict|step-keep",
    "test_damaged_scores_and_positions": "both",
    "test_junk_input_stays_in_its_row_and_head": "nan-k.*-f32",
    "test_eviction_moves_no_data": "R4",
    "test_a_row_does_not_depend_on_its_batch": "f32-R4",
    "test_a_result_does_not_depend_on_threads": "R4",
    "test_output_does_not_depend_on_slot_order": "R4",
    "test_equals_a_plan_that_said_so_from_the_start": "8-4",
    "test_shapes": "G1-D40.*-f32|G3-D72.*bf16|G7-D104.*-f16|G8-D256.*bf16",
    "test_grouped_queries_share_the_kept_set": "D40-G4",
    "test_batch_sizes": r"B[15]-",
    "test_zero_scores_evict_the_oldest": "recent1-R[04]",
    "test_every_bit_of_the_mask": "33",
    "test_position_is_a_window_with_scores": "keep_prompt-R4|evict_prompt-R0",
    "test_kinds_of_heads_behind_shared_prompts": "R4-plain.*bf16",
    "test_bits_are_those_of_copies": "G1-D128-R4.*bf16|G2-D72.*-f16|G1-D40.*-f32",
    "test_prompts_longer_than_a_block": "P513-G1|P256-G2",
    "test_rotating_inside_is_rotating_before": "-f32|bf16",
    **dict.fromkeys(("test_tensors_stand_for_their_values", "test_zeros_without_memory",
                     "test_tensors_without_values_are_refused"), r"[-\[]decode-k|[-\[]prefill-scores|reset"),
    **dict.fromkeys((
        "test_prompt_tokens_are_never_pinned", "test_more_pinned_tokens_than_slots", "test_equal_means_make_a_window",
        "test_pinned_tokens_stay_whatever_their_score", "test_pinned_keys_are_no_scores", "test_nan_scores_never_win",
        "test_equal_sums_evict_the_oldest", "test_high_ties_survive_low_newcomers", "test_prefill_takes_any_strides",
        "test_opcheck_prefill", "test_operators_refuse_what_does_not_fit", "test_operators_refuse_bad_tables",
        "test_operators_that_read_no_table_refuse_the_rest", "test_kernels_survive_bad_tables",
        "test_bad_tables_are_refused",
        "test_prefill_operator_refuses_what_does_not_fit", "test_warmup_changes_nothing",
        "test_a_long_warmup_is_announced", "test_warmup_compiles_what_decode_runs", "test_heads_split_over_blocks"),
        ""),  # all: they are short
}

# Where caches are in 8 bits, of other tests nothing.
SELECTED_IN_INT8 = {
    "test_every_kind_of_head": "R4-keep_prompt.*bf16|R0-evict_prompt.*-f16",
    "test_shapes": "G1-D40.*-f32|G3-D72.*bf16|G8-D256.*-f16",
    "test_bits_are_those_of_copies": "G1-D128-R4.*bf16",
    "test_prompts_longer_than_a_block": "P513-G1",
    "test_rotating_inside_is_rotating_before": "bf16",
    "test_guards_stay_whole": "R4-evict_prompt.*bf16",
    "test_steps_store_the_same_bits_everywhere": r"f32-D40|bf16-D128|\[f16",
    "test_prompts_store_the_same_bits_everywhere": "own-f32-D40|own-f16",
    "test_queries_that_stick_out_where_keys_are_nothing": "f32",
    "test_junk_cannot_hide": "k-nan|v-inf",
    "test_junk_in_prompts": "own-nan",
    "test_heads_split_over_blocks": "keep_prompt",
    "test_split_heads_do_not_depend_on_their_batch": "",
}


@pytest.fixture(autouse=True)
def _races(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leaves races unreported where a test expects some."""
    if "ptx" not in request.node.name or not request.node.get_closest_marker("races_expected"):
        yield
        return
    with schedules.scheduled(replace(schedules.usual(), races=False)):
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as exhaustive what is not selected."""
    tests = defaultdict(list)
    for item in items:
        case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
        if case is not None and case.name in ("ptx", "ptx_triton"):
            tests[item.nodeid.partition("[")[0], case].append(item)
    for (name, case), cases in tests.items():
        in_int8 = case.kv_format == "int8"
        pattern = (SELECTED_IN_INT8 if in_int8 else SELECTED).get(name.rpartition("::")[2])
        selected = [item for item in cases if pattern is not None and re.search(pattern, item.name)]
        selected = selected or cases[:0 if in_int8 and pattern is None else 1]
        for item in cases:
            if item not in selected:
                item.add_marker(pytest.mark.exhaustive)
