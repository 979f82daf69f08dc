"""`Engine.rollout`: samples and the log-probabilities of their tokens, equal to transformers' on the same tokens."""

from __future__ import annotations

import copy
from typing import Any

import pretend
import pytest
import tiny
import tiny_official
import torch
from pretend import guard
from test_engine import prompts_of
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ssd_janus import disable, enable, official
from ssd_janus.engine import Engine, Rollout, Sampling, unconditional_prompt
from ssd_kernels import CachePlan, HeadSpec

PROMPTS = prompts_of(tiny.image_inputs(tiny.PROMPTS[:3]))
RESTRICTED = Sampling.make(0.7, top_k=20, top_p=0.9)


@torch.no_grad()
def guided_logits(model: Any, prompt: list[int], tokens: torch.Tensor, guidance: float) -> torch.Tensor:
    """[steps, codes] of one picture by one pass of transformers' modules over the whole sequence."""
    inner, rows = model.model, []
    for ids in (prompt, unconditional_prompt(model.generation_config, prompt))[:2 if guidance > 1 else 1]:
        text = inner.language_model.get_input_embeddings()(torch.tensor([ids]))
        codes = inner.generation_aligner(inner.generation_embeddings(tokens[None, :-1]))
        states = inner.language_model(inputs_embeds=torch.cat([text, codes], 1)).last_hidden_state
        rows.append(inner.generation_head(states[0, len(ids) - 1:]))
    return rows[0] if len(rows) == 1 else rows[1] + guidance * (rows[0] - rows[1])


def log_probability(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


def check(model: Any, found: Rollout, samples: int, guidance: float, restricted: bool = False,
          prompts: list[list[int]] = PROMPTS) -> None:
    """Against one pass in float64 without a cache: at most twice as far away as the same pass in float32, plus 1e-5."""
    assert found.tokens.shape == (len(prompts) * samples, found.tokens.shape[1])
    assert found.drawn is not None and found.plain is not None
    exact_model = copy.deepcopy(model).double()
    for index, tokens in enumerate(found.tokens):
        rows = [guided_logits(each, prompts[index // samples], tokens, guidance) for each in (exact_model, model)]
        exact, same_dtype = (log_probability(logits, tokens) for logits in rows)
        assert (found.plain[index] - exact).abs().max() <= 2 * (same_dtype - exact).abs().max() + 1e-5
        for warper in (TemperatureLogitsWarper(0.7), TopKLogitsWarper(20), TopPLogitsWarper(0.9)) if restricted else ():
            rows = [warper(None, logits) for logits in rows]
        exact, same_dtype = (log_probability(logits, tokens) for logits in rows)
        assert (found.drawn[index] - exact).abs().max() <= 2 * (same_dtype - exact).abs().max() + 1e-5


@pytest.mark.parametrize("guidance", [2.0, 1.0])
@pytest.mark.parametrize("restricted", [False, True])
def test_log_probabilities_are_transformers(model: Any, guidance: float, restricted: bool) -> None:
    engine = Engine(model)
    sampling = RESTRICTED if restricted else Sampling()
    found = engine.rollout(PROMPTS, samples=2, seeds=5, guidance=guidance, sampling=sampling)
    check(model, found, 2, guidance, restricted)
    assert found.plain is not None and found.drawn is not None
    assert torch.equal(found.plain, found.drawn) != restricted
    # The pictures are those of generate.
    repeated = [prompt for prompt in PROMPTS for _ in range(2)]
    assert torch.equal(found.tokens, engine.generate(repeated, guidance=guidance, seeds=5, sampling=sampling))


def test_greedy_tokens_are_certain(fresh: Any) -> None:
    found = Engine(fresh).rollout(PROMPTS[:1], guidance=2.0, sampling=Sampling(greedy=True))
    assert found.drawn is not None and found.plain is not None
    assert not found.drawn.any() and (found.plain < 0).all()


def test_batches_change_nothing(fresh: Any) -> None:
    engine, seen = Engine(fresh), []
    whole = engine.rollout(PROMPTS, samples=3, seeds=1, guidance=2.0)
    parts = engine.rollout(PROMPTS, samples=3, seeds=1, guidance=2.0, batch_size=4,
                           progress=lambda done, total: seen.append((done, total)))
    assert (whole.batches, parts.batches) == ((9,), (4, 4, 1)) and parts.cache_bytes < whole.cache_bytes
    assert seen == [(step, 3 * tiny.TOKENS) for step in range(1, 3 * tiny.TOKENS + 1)]
    for name in ("tokens", "drawn", "plain"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))
    short = engine.rollout(PROMPTS, samples=3, seeds=1, guidance=2.0, steps=5, logprobs=False)
    assert torch.equal(short.tokens, whole.tokens[:, :5]) and short.drawn is None and short.plain is None
    seeds = [30, 10, 20]
    assert torch.equal(engine.rollout(PROMPTS[:1], samples=3, seeds=seeds, guidance=2.0).tokens,
                       engine.generate(PROMPTS[:1] * 3, seeds=seeds, guidance=2.0))


@torch.no_grad()
def decoded(model: tiny_official.Official, prompt: list[int], tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [steps] of given tokens by a loop of transformers' modules with the model's own cache."""
    ids = torch.tensor([prompt, [prompt[0], *[2] * (len(prompt) - 2), prompt[-1]]])
    inputs, cache, found = model.language_model.get_input_embeddings()(ids), None, []
    for token in tokens:
        outputs = model.language_model.model(inputs_embeds=inputs, use_cache=True, past_key_values=cache)
        cache, logits = outputs.past_key_values, model.gen_head(outputs.last_hidden_state[:, -1])
        found.append((logits[1] + 5.0 * (logits[0] - logits[1])).log_softmax(-1)[token])
        inputs = model.prepare_gen_img_embeds(token.repeat(2)).unsqueeze(1)
    return torch.stack(found)


def test_log_probabilities_are_those_of_the_compressed_cache() -> None:
    """As a loop over the official model with caches under the same plan finds them; the full cache has others."""
    model, prompt = tiny_official.build(), tiny_official.prompt_ids("a heart")
    plan = tiny.plan_of(HeadSpec.heavy(5, 2), HeadSpec.window(3), HeadSpec.heavy(4), HeadSpec.full(), row_buffer=3)
    janus = official.as_transformers(model, tiny_official.wrapped_tokenizer())
    found = Engine(janus, plan).rollout([prompt], samples=2, seeds=3, guidance=5.0)
    assert found.plain is not None
    dense, exact = (decoded(each, prompt, found.tokens[0]) for each in (model, copy.deepcopy(model).double()))
    rounding = (dense - exact).abs().max()
    enable(model, plan)
    for tokens, plain in zip(found.tokens, found.plain, strict=True):
        assert (plain - decoded(model, prompt, tokens)).abs().max() <= 2 * rounding + 1e-5
    disable(model)
    assert (dense - found.plain[0]).abs().max() > 0.1 > 100 * rounding


def test_weights_may_change_in_place_between_rollouts() -> None:
    """With one engine, of the model and of an official one around whose parts the engine draws."""
    for janus, trained in ((tiny.build_model(), None), (None, tiny_official.build(3))):
        prompts = PROMPTS
        if trained is not None:
            janus = official.as_transformers(trained, tiny_official.wrapped_tokenizer())
            prompts = [tiny_official.prompt_ids("a heart")]
        engine = Engine(janus)
        seen = [engine.rollout(prompts, seeds=1, guidance=2.0).tokens]
        optimizer = torch.optim.SGD((trained or janus).parameters(), lr=0.02)
        parts = trained.language_model.model if trained is not None else janus.model.language_model
        for parameter in parts.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
        optimizer.step()
        found = engine.rollout(prompts, seeds=1, guidance=2.0)
        check(janus, found, 1, 2.0, prompts=prompts)
        assert not torch.equal(found.tokens, seen[0])


def test_the_longest_prompts(fresh: Any) -> None:
    limit = fresh.config.text_config.max_position_embeddings - tiny.TOKENS
    prompts = [[0, *[7 + index % 200 for index in range(limit - 2)], 3], PROMPTS[0]]
    check(fresh, Engine(fresh).rollout(prompts, samples=2, guidance=2.0), 2, 2.0, prompts=prompts)


@pytest.mark.skipif(guard.unsupported() is not None, reason="no machine to pretend")
def test_captured_rollouts_are_recorded_and_no_step_waits(fresh: Any) -> None:
    """On the pretended machine; also where a choice could be made in one launch, which keeps no logits."""
    greedy, expected = Sampling(greedy=True), Engine(fresh, products="torch", exact=False).rollout(
        PROMPTS, 2, guidance=2.0, sampling=Sampling(greedy=True))
    with pretend.pretended(devices=1) as machine:
        engine, marks = Engine(fresh.to("cuda")), []
        for sampling in (greedy, Sampling.make(0.8, top_k=20)):
            machine.graphs.clear()
            marks.clear()
            found = engine.rollout(PROMPTS, 2, guidance=2.0, sampling=sampling,
                                   progress=lambda done, total: marks.append(len(machine.log)))
            assert found.drawn is not None and found.plain is not None and len(machine.graphs) == 1
            assert found.drawn.isfinite().all() and (found.plain < 0).all()
            last = [event.kind for event in machine.log[marks[-2]:marks[-1]]]
            assert "replay" in last and not {"to_host", "to_device", "wait"} & set(last)
            drawn = engine.generate([prompt for prompt in PROMPTS for _ in range(2)], guidance=2.0, sampling=sampling)
            assert torch.equal(found.tokens.cpu(), drawn)
            if sampling.greedy:
                assert expected.plain is not None and torch.equal(found.tokens.cpu(), expected.tokens)
                assert torch.allclose(found.plain.cpu(), expected.plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("arguments, error, message", [
    ({"prompts": []}, ValueError, "prompts must hold at least one"), ({"samples": 0}, ValueError, "samples must be at"),
    ({"samples": 1.5}, TypeError, "samples must be an int"), ({"seeds": [1, 2]}, ValueError, "seeds must be one"),
    ({"guidance": [1.0, 2.0, 3.0]}, TypeError, "guidance must be one number"),
    ({"guidance": float("nan")}, ValueError, "guidance must be finite"), ({"steps": 99}, ValueError, "steps must be"),
    ({"batch_size": 0}, ValueError, "batch_size must be"), ({"batch_size": "all"}, ValueError, "batch_size must be")])
def test_bad_arguments(fresh: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Engine(fresh, CachePlan.uniform(HeadSpec.full(), tiny.LAYERS, 4)).rollout(**{"prompts": PROMPTS, **arguments})
