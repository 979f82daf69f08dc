"""`enable`: transformers' own tokens with a full plan, the oracle's tokens with every other."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from tiny import draw
from transformers import LogitsProcessor, LogitsProcessorList

from ssd_janus import disable, enable
from ssd_kernels import CachePlan, HeadSpec

LOOPS = [("reference", True), ("auto", False)]  # backend, and whether the engine draws
FULL, WINDOW, HEAVY = HeadSpec.full(), HeadSpec.window, HeadSpec.heavy
RAGGED = {
    "window": lambda heads: tiny.plan_of(*[WINDOW(3), WINDOW(7), WINDOW(1), WINDOW(40)][:heads]),
    "buffered window": lambda heads: tiny.plan_of(*[WINDOW(3), FULL, WINDOW(8), WINDOW(0)][:heads], row_buffer=6),
    "heavy": lambda heads: tiny.plan_of(*[HEAVY(5), HEAVY(9, 4, "mean"), HEAVY(1), HEAVY(6, 6)][:heads]),
    "mixed": lambda heads: tiny.plan_of(*[HEAVY(6, 3, "mean"), WINDOW(4), FULL, HEAVY(4)][:heads], row_buffer=6),
    "prompt evicted": lambda heads: tiny.plan_of(*[WINDOW(5), HEAVY(8, 2), WINDOW(2), FULL][:heads], row_buffer=4,
                                                 keep_prompt=False),
}


def kv_heads(model: Any) -> int:
    return model.config.text_config.num_key_value_heads


def full_plan(model: Any, spec: HeadSpec = FULL, row_buffer: int = 0) -> CachePlan:
    return CachePlan.uniform(spec, tiny.LAYERS, kv_heads(model), row_buffer)


@pytest.mark.parametrize("backend, engine", LOOPS)
@pytest.mark.parametrize("options", [
    {}, {"do_sample": True}, {"do_sample": True, "top_k": 0, "temperature": 0.7, "num_return_sequences": 2},
    {"guidance_scale": 7.5},
], ids=str)
def test_full_plan_gives_transformers_tokens(model: Any, backend: str, engine: bool, options: dict[str, Any]) -> None:
    expected = draw(model, **options)
    enable(model, full_plan(model), backend, engine=engine)
    assert torch.equal(draw(model, **options), expected)
    assert expected.unique().numel() > 8


@pytest.mark.parametrize("spec, row_buffer", [(WINDOW(tiny.TOKENS), 0), (HEAVY(tiny.TOKENS), 0),
                                              (WINDOW(1), tiny.TOKENS), (HEAVY(tiny.TOKENS, 3, "mean"), 6)], ids=str)
def test_plans_that_never_evict_are_full(model: Any, spec: HeadSpec, row_buffer: int) -> None:
    expected = draw(model)
    enable(model, full_plan(model, spec, row_buffer))
    assert torch.equal(draw(model), expected)


@pytest.mark.parametrize("prompts", [tiny.PROMPTS[:1], (tiny.PROMPTS[0],) * 2, tiny.PROMPTS[2:]], ids=len)
def test_batches_without_padding_and_of_one(model: Any, prompts: tuple[str, ...]) -> None:
    inputs = tiny.image_inputs(prompts)
    expected = draw(model, **inputs)
    enable(model, full_plan(model))
    assert torch.equal(draw(model, **inputs), expected)


def test_one_token_prompts_and_holes_in_the_mask(model: Any) -> None:
    single = {"input_ids": torch.tensor([[3], [3]]), "attention_mask": torch.ones(2, 1, dtype=torch.long)}
    holes = tiny.image_inputs()
    holes["attention_mask"][1, 3:5] = 0
    for inputs in (single, holes):
        expected = draw(model, **inputs)
        enable(model, full_plan(model))
        assert torch.equal(draw(model, **inputs), expected)
        disable(model)


@pytest.mark.parametrize("backend, engine", LOOPS)
@pytest.mark.parametrize("name", RAGGED)
def test_ragged_plans_agree_with_dense_masked_attention(model: Any, name: str, backend: str, engine: bool) -> None:
    plan = RAGGED[name](kv_heads(model))
    expected = tiny.Oracle(plan).generate(model, **tiny.image_inputs())
    assert not torch.equal(expected, draw(model)), "the plan must matter, or this test shows nothing"
    enable(model, plan, backend, engine=engine)
    assert torch.equal(draw(model), expected)


class Record(LogitsProcessor):
    """Keeps the raw logits [rows, codes] of every step, unconditional rows included."""

    def __init__(self) -> None:
        self.logits: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.logits.append(scores)
        return scores


@pytest.mark.parametrize("row_buffer", [0, 6])
def test_window_logits_equal_a_banded_forward_pass(model: Any, row_buffer: int) -> None:
    """One stock forward over prompt and drawn tokens with a 4-D mask per head, no attention code of ours."""
    heads, group = kv_heads(model), 4 // kv_heads(model)
    windows = [2, 9, 4, 40][:heads]
    inputs, record = tiny.image_inputs(), Record()
    enable(model, CachePlan([[WINDOW(size) for size in windows]] * tiny.LAYERS, row_buffer))
    tokens = draw(model, logits_processor=LogitsProcessorList([record]))
    disable(model)

    prompt, slots = inputs["attention_mask"].bool().repeat(2, 1), inputs["input_ids"].shape[1]
    seen, total = tiny.TOKENS - 1, inputs["input_ids"].shape[1] + tiny.TOKENS - 1
    mask = torch.zeros(len(prompt), 4, total, total, dtype=torch.bool)
    mask[..., :slots] = prompt[:, None, None]
    for head in range(4):
        for step in range(seen):
            refreshed = step // row_buffer * row_buffer if row_buffer else step
            oldest = max(refreshed - windows[head // group], 0) if refreshed else 0
            mask[:, head, slots + step, slots + oldest:slots + step + 1] = True
    mask &= torch.ones(total, total, dtype=torch.bool).tril()
    unconditional = inputs["input_ids"].clone()
    unconditional[(unconditional != 0) & (unconditional != 3)] = 2
    drawn = tokens[:, :-1].repeat(2, 1)
    with torch.no_grad():
        embedded = torch.cat([model.get_input_embeddings()(torch.cat([inputs["input_ids"], unconditional])),
                              model.prepare_embeddings_for_image_generation(drawn)], 1)
        hidden = model.model.language_model(inputs_embeds=embedded, attention_mask=mask, use_cache=False)[0]
        expected = model.model.generation_head(hidden[:, slots - 1:])
    torch.testing.assert_close(torch.stack(record.logits, 1), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("scale", [1, 1.0, 0.5, 0])
@pytest.mark.parametrize("through_config", [False, True])
def test_without_guidance_a_picture_takes_one_row(model: Any, scale: float, through_config: bool) -> None:
    inputs = tiny.image_inputs()
    expected = conditional_tokens(model, inputs)
    options: dict[str, Any] = {"guidance_scale": scale}
    if through_config:
        options = {"generation_config": type(model.generation_config)(**options)}
    enable(model, full_plan(model))
    result = draw(model, return_dict_in_generate=True, **options)
    assert torch.equal(result.sequences, expected)
    assert result.past_key_values.compressed.batch_size == len(expected)
    if through_config:
        assert options["generation_config"].guidance_scale == scale


def test_guidance_none_is_the_models_default(model: Any) -> None:
    expected = draw(model)
    enable(model, full_plan(model))
    assert torch.equal(draw(model, guidance_scale=None), expected)
    assert torch.equal(draw(model, guidance_scale=2.0), expected)
    assert not torch.equal(draw(model, guidance_scale=5.0), expected)


@torch.no_grad()
def conditional_tokens(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Greedy tokens without guidance, by a stock forward over the whole sequence at every step."""
    embedded, mask = model.get_input_embeddings()(inputs["input_ids"]), inputs["attention_mask"]
    tokens: list[torch.Tensor] = []
    for _ in range(tiny.TOKENS):
        hidden = model.model.language_model(inputs_embeds=embedded, attention_mask=mask, use_cache=False)[0]
        tokens.append(model.model.generation_head(hidden[:, -1]).argmax(-1))
        embedded = torch.cat([embedded, model.prepare_embeddings_for_image_generation(tokens[-1][:, None])], 1)
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], 1)
    return torch.stack(tokens, 1)


def test_prompts_lose_their_padding(model: Any) -> None:
    enable(model, full_plan(model))
    result = draw(model, return_dict_in_generate=True)
    lengths = tiny.image_inputs()["attention_mask"].sum(1).tolist() * 2
    compressed = result.past_key_values.compressed
    for row, kept in enumerate(compressed.positions(0, 0)):
        assert kept.tolist() == list(range(lengths[row] + tiny.TOKENS - 1))
    assert compressed.max_prompt == max(lengths)
    assert int(result.past_key_values.get_seq_length()) == tiny.image_inputs()["input_ids"].shape[1] + tiny.TOKENS - 1


def test_bfloat16_and_autocast_run(fresh: Any) -> None:
    enable(fresh, full_plan(fresh))
    with torch.autocast("cpu", torch.bfloat16):
        assert draw(fresh).shape == (4, tiny.TOKENS)
    fresh.to(torch.bfloat16)
    result = draw(fresh, return_dict_in_generate=True)
    assert result.past_key_values.compressed.dtype == torch.bfloat16
