"""`attach`: transformers' own tokens with a full plan, the oracle's tokens with every other."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import decoders
import pytest
import torch
from decoders import IDS, MASK, NEGATIVE, PAD, plan_of, write
from dense_oracle import DenseOracle
from transformers import DynamicCache, PreTrainedModel

from ssd_attach import attach, attached, caches
from ssd_attach.internals import CACHE_NAME
from ssd_kernels import CachePlan, HeadSpec
from ssd_kernels.policies import Raster

RASTER = Raster(5, 4, line_tokens=1, tail=3)
FULL, WINDOW, HEAVY = HeadSpec.full(), HeadSpec.window, HeadSpec.heavy
TOKENS = RASTER.tokens
Named = tuple[str, PreTrainedModel]
PLANS = {
    "window": lambda name: plan_of(name, WINDOW(3), WINDOW(7), WINDOW(1), FULL),
    "mixed": lambda name: plan_of(name, HEAVY(6, 3, "mean"), WINDOW(4), FULL, HEAVY(4), row_buffer=5),
    "decayed": lambda name: plan_of(name, HEAVY(6, 3, "decayed"), HEAVY(4, 2, "decayed"), WINDOW(2), FULL),
    "pinned": lambda name: plan_of(name, HEAVY(6, score="position", pinned=range(5)), HEAVY(5, 1, pinned=[3, 8]), FULL,
                                   WINDOW(0)),
    "prompt evicted": lambda name: plan_of(name, HEAVY(8, 2), WINDOW(5), WINDOW(2), FULL, row_buffer=4,
                                           keep_prompt=False),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_full_plan_gives_transformers_tokens(named_model: Named, backend: str) -> None:
    """Sampled, left-padded, guided by an unbatched second forward."""
    _, model = named_model
    expected = write(model, TOKENS)
    attach(model, "full", backend, pictures=RASTER)
    assert torch.equal(write(model, TOKENS), expected)
    assert expected[:, IDS.shape[1]:].unique().numel() > 8


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_prompts_are_computed_as_before(llama: PreTrainedModel, implementation: str) -> None:
    """By the function that was selected, whatever it is, and chosen again when it is changed while attached."""
    attach(llama, "full", pictures=RASTER)
    llama.set_attn_implementation(implementation)
    got = write(llama, TOKENS)
    assert len(caches(llama)) == 0
    with attached(llama, plan_of("llama", WINDOW(1), WINDOW(2)), pictures=RASTER):
        assert not torch.equal(write(llama, TOKENS), got)
    assert llama.config._attn_implementation == implementation
    assert torch.equal(write(llama, TOKENS), got)


@pytest.mark.parametrize("plan", PLANS)
def test_plans_that_evict_agree_with_dense_masked_attention(named_model: Named, plan: str) -> None:
    name, model = named_model
    options = {"guided": False, "do_sample": False}
    oracle = DenseOracle(PLANS[plan](name))
    with oracle.on(model.get_decoder()):
        expected = write(model, TOKENS, **options)
    assert not torch.equal(expected, write(model, TOKENS, **options)), "the plan must matter, or this shows nothing"
    attach(model, oracle.plan, pictures=RASTER)
    output = write(model, TOKENS, return_dict_in_generate=True, **options)
    assert torch.equal(output.sequences, expected)
    (cache,) = caches(model)
    for layer in range(decoders.LAYERS):
        for head in range(decoders.KV_HEADS[name]):
            for row, kept in enumerate(cache.positions(layer, head)):
                padding = int((MASK[row] == 0).sum())
                assert kept.tolist() == [slot - padding for slot in oracle.kept[layer][row, head].nonzero().flatten()
                                         .tolist()]


@torch.no_grad()
def by_hand(model: PreTrainedModel, guide: Any, tokens: int, wrap: Any = None) -> torch.Tensor:
    """Greedy tokens of a loop with guidance by a second forward, in transformers' formula; ``wrap``: a context for the
    conditional and one for the other forward."""
    contexts = wrap or [nullcontext] * 2
    state: list[dict[str, Any]] = [{"input_ids": IDS, "attention_mask": MASK},
                                   {"input_ids": NEGATIVE, "attention_mask": torch.ones_like(NEGATIVE)}]
    drawn = []
    for _ in range(tokens):
        scores = []
        for branch, context in zip(state, contexts, strict=True):
            with context():
                output = model(**branch, use_cache=True)
            branch[CACHE_NAME] = output[CACHE_NAME]
            scores.append(output.logits[:, -1].log_softmax(-1))
        token = (scores[1] + guide * (scores[0] - scores[1])).argmax(-1, keepdim=True)
        drawn.append(token)
        for branch in state:
            branch["input_ids"] = token
            branch["attention_mask"] = torch.cat([branch["attention_mask"], torch.ones_like(token)], 1)
    return torch.cat(drawn, 1)


def test_second_forwards_have_caches_of_their_own(named_model: Named) -> None:
    """A plan that evicts, in a loop by hand, against two oracles, one for each forward."""
    name, model = named_model
    plan = PLANS["mixed"](name)
    first, second = DenseOracle(plan), DenseOracle(plan)
    decoder = model.get_decoder()
    expected = by_hand(model, 2.5, TOKENS, [lambda: first.on(decoder), lambda: second.on(decoder)])
    usual = by_hand(model, 2.5, TOKENS)
    assert not torch.equal(usual, expected)
    attach(model, plan, pictures=RASTER)
    assert torch.equal(by_hand(model, 2.5, TOKENS), expected)
    attach(model, "full", pictures=RASTER)
    assert torch.equal(by_hand(model, 2.5, TOKENS), usual)


@pytest.mark.parametrize("kind", ["own cache", "cache by position", "embeddings", "decoder"])
@torch.no_grad()
def test_loops_by_hand(llama: PreTrainedModel, kind: str) -> None:
    """A caller may hold its own DynamicCache from the first step on, and take positions from it."""
    decoder, embed = llama.get_decoder(), llama.get_input_embeddings()

    def loop() -> torch.Tensor:
        cache = DynamicCache()
        ids, drawn = IDS[:, 2:], []
        for _ in range(TOKENS):
            options = {CACHE_NAME: cache, "use_cache": True}
            if kind == "own cache":
                start = int(cache.get_seq_length())
                positions = torch.arange(start, start + ids.shape[1])[None]
                logits = llama(ids, position_ids=positions, **options).logits
            elif kind == "cache by position":
                logits = llama.lm_head(decoder(ids, None, None, cache, use_cache=True).last_hidden_state)
            elif kind == "embeddings":
                output = decoder(inputs_embeds=embed(ids), **options)
                logits = llama.lm_head(output.last_hidden_state)
                assert output[CACHE_NAME] is cache
            else:
                logits = llama.lm_head(decoder(input_ids=ids, **options).last_hidden_state)
            ids = logits[:, -1].argmax(-1, keepdim=True)
            drawn.append(ids)
        return torch.cat(drawn, 1)

    usual = loop()
    with attached(decoder, "full", pictures=RASTER):
        assert torch.equal(loop(), usual)
    with attached(decoder, plan_of("llama", WINDOW(1), WINDOW(3)), pictures=RASTER):
        assert not torch.equal(loop(), usual)
    assert torch.equal(loop(), usual)


@torch.no_grad()
def test_prompts_padded_on_the_right_with_tokens_after_the_padding(llama: PreTrainedModel) -> None:
    """Begin of image comes after the padding, and masks differ between the rows of a pair; 4-D masks, too."""
    ids = torch.tensor([[1, 10, 11, PAD, PAD, 9]] * 2 + [[1, 10, 11, 12, PAD, 9]] * 2)
    mask = torch.tensor([[1, 1, 1, 0, 0, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1], [1, 0, 0, 1, 1, 1]])
    causal = torch.ones(6, 6, dtype=torch.bool).tril() & mask.bool()[:, None, None]
    additive = torch.zeros(4, 1, 6, 6).masked_fill(~causal, torch.finfo(torch.float32).min)

    def loop(prompt_mask: torch.Tensor) -> torch.Tensor:
        inputs, cache, drawn, seen = ids, None, [], mask
        for step in range(TOKENS):
            output = llama(inputs, attention_mask=seen if step else prompt_mask, **{CACHE_NAME: cache}, use_cache=True)
            cache = output[CACHE_NAME]
            inputs = output.logits[:, -1].argmax(-1, keepdim=True)
            seen = torch.cat([seen, torch.ones_like(inputs)], 1)
            drawn.append(inputs)
        return torch.cat(drawn, 1)

    expected = loop(mask)
    attach(llama, "full", pictures=RASTER)
    for prompt_mask in (mask, causal, additive):
        assert torch.equal(loop(prompt_mask), expected)
    attach(llama, plan_of("llama", WINDOW(2), WINDOW(0)), pictures=RASTER)
    assert not torch.equal(loop(mask), expected)


def test_cached_positions_are_the_models_own(llama: PreTrainedModel) -> None:
    """`seen` counts tokens, not what is kept."""
    plan = CachePlan.uniform(WINDOW(2), decoders.LAYERS, 2)
    attach(llama, plan, pictures=RASTER)
    output = write(llama, 9, return_dict_in_generate=True, guided=False)
    assert int(output[CACHE_NAME].get_seq_length()) == IDS.shape[1] + 8
    (cache,) = caches(llama)
    assert [len(kept) for kept in cache.positions(0, 0)] == [length + 2 for length in MASK.sum(1).tolist()]
    del output
    assert caches(llama) == []
