"""Loops over DeepSeek's models, its script's and those of training code, stay as they are on an enabled model."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import tiny
import tiny_official
import torch
from torch.nn import functional

import ssd_attach
from ssd_janus import disable, enable, enabled, official
from ssd_janus.engine import Engine, Sampling
from ssd_kernels import CachePlan, CompressedCache, HeadSpec

PROMPT = tiny_official.prompt_ids("two blue squares and a green star")
# Lengths differ; training code appends begin-of-image after padding.
PROMPTS = [tiny_official.prompt_ids(text)[:-1] for text in tiny.PROMPTS[:3]]
PAD, BEGIN = tiny_official.SPECIALS.index(tiny_official.PAD), tiny_official.SPECIALS.index("<begin_of_image>")


@pytest.fixture(params=[4, 2], ids=["mha", "gqa"])
def model(request: pytest.FixtureRequest) -> Iterator[tiny_official.Official]:
    made = tiny_official.build(kv_heads=request.param)
    yield made
    disable(made)


@pytest.fixture
def gqa() -> tiny_official.Official:
    return tiny_official.build(kv_heads=2)


def heads_of(model: tiny_official.Official) -> int:
    return model.language_model.config.num_key_value_heads


def full(model: tiny_official.Official) -> CachePlan:
    return CachePlan.uniform(HeadSpec.full(), tiny.LAYERS, heads_of(model))


def ragged(model: tiny_official.Official) -> CachePlan:
    kinds = [HeadSpec.heavy(6, 2), HeadSpec.window(5), HeadSpec.heavy(4), HeadSpec.full()]
    return tiny.plan_of(*kinds[:heads_of(model)], row_buffer=3)


@torch.no_grad()
def rollout(model: tiny_official.Official, prompts: list[list[int]], seed: int = 0, padding: int = PAD,
            greedy: bool = False) -> torch.Tensor:
    """Tokens by a loop of the shape of public training code: prompts padded on the right, begin-of-image after the
    padding, a mask that grows, conditional rows that have the prompt's, unconditional ones that attend to all."""
    torch.manual_seed(seed)
    longest = max(map(len, prompts))
    ids = torch.tensor([prompt + [padding] * (longest - len(prompt)) + [BEGIN] for prompt in prompts])
    real = torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) + [1] for prompt in prompts])
    embed = model.language_model.get_input_embeddings()
    inputs = embed(ids).repeat_interleave(2, 0)
    inputs[1::2, 1:-1] = embed(torch.tensor(PAD))
    mask = real.repeat_interleave(2, 0)
    mask[1::2] = 1
    found, outputs = [], None
    for step in range(tiny.TOKENS):
        outputs = model.language_model.model(inputs_embeds=inputs, use_cache=True, attention_mask=mask,
                                             past_key_values=outputs.past_key_values if step else None)
        logits = model.gen_head(outputs.last_hidden_state[:, -1])
        logits = logits[1::2] + 5.0 * (logits[0::2] - logits[1::2])
        codes = logits.argmax(-1, True) if greedy else torch.multinomial(torch.softmax(logits, -1), 1)
        found.append(codes)
        inputs = model.prepare_gen_img_embeds(torch.cat([codes, codes], 1).view(-1)).unsqueeze(1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return torch.cat(found, 1)


@torch.no_grad()
def text(model: tiny_official.Official, steps: int = 12) -> tuple[torch.Tensor, Any]:
    """Greedy text through the model that has the text head, from no cache, and the cache it made."""
    inputs, outputs, found = torch.tensor([[0, 6, 9, 30], [0, 6, 8, 40]]), None, []
    for step in range(steps):
        embeds = model.language_model.get_input_embeddings()(inputs)
        outputs = model.language_model(inputs_embeds=embeds, use_cache=True,
                                       past_key_values=outputs.past_key_values if step else None)
        inputs = outputs.logits[:, -1].argmax(-1, keepdim=True)
        found.append(inputs)
    return torch.cat(found, 1), outputs.past_key_values


@pytest.mark.parametrize("greedy", [True, False])
def test_the_script_draws_its_tokens_with_a_full_plan(model: Any, greedy: bool) -> None:
    expected = tiny_official.draw(model, PROMPT, 3, seed=2, greedy=greedy)
    enable(model, full(model))
    assert torch.equal(tiny_official.draw(model, PROMPT, 3, seed=2, greedy=greedy), expected)


def test_the_script_draws_the_engines_tokens_with_other_plans(model: Any) -> None:
    """The engine has rows in another order; a picture's are the same."""
    stock, plan = tiny_official.draw(model, PROMPT, 3), ragged(model)
    janus = official.as_transformers(model, tiny_official.wrapped_tokenizer())
    torch.manual_seed(0)
    expected = Engine(janus, plan).generate([PROMPT] * 3, guidance=5.0, seeds=None, sampling=Sampling())
    assert not torch.equal(expected, stock)
    enable(model, plan)
    assert torch.equal(tiny_official.draw(model, PROMPT, 3), expected)


def test_training_code_draws_its_tokens_with_a_full_plan(model: Any) -> None:
    expected = rollout(model, PROMPTS, seed=3)
    enable(model, full(model))
    assert torch.equal(rollout(model, PROMPTS, seed=3), expected)


def padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask as training code hands them to its generation."""
    longest = max(map(len, prompts))
    ids = [prompt + [PAD] * (longest - len(prompt)) + [BEGIN] for prompt in prompts]
    return torch.tensor(ids), torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) + [1]
                                            for prompt in prompts])


@pytest.mark.parametrize("plan", [None, full, ragged])
def test_the_rollout_for_training_code_is_its_loop(model: Any, plan: Any) -> None:
    """Tokens of the loop, and log-probabilities of one pass over the same ids and mask where caches keep everything."""
    ids, mask = padded(PROMPTS)
    if plan is not None:
        enable(model, plan(model))
    expected = rollout(model, PROMPTS, seed=3)
    torch.manual_seed(3)
    found = official.rollout(model, ids, mask, pad_token_id=PAD)
    assert torch.equal(found.tokens, expected) and (found.cache_bytes > 0) == (plan is not None)
    assert found.plain is not None and torch.equal(found.plain, found.drawn)
    disable(model)
    dense, exact = (in_one_pass(each, ids, mask, found.tokens) for each in (model, copy.deepcopy(model).double()))
    rounding = (dense - exact).abs().max()
    assert ((found.plain - exact).abs().max() <= 2 * rounding + 1e-5) == (plan is not ragged)


@torch.no_grad()
def in_one_pass(model: Any, ids: torch.Tensor, mask: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [N, steps] of tokens by a pass over whole sequences, as training code makes it."""
    rows = []
    for guide in (False, True):
        own = ids.clone()
        own[:, 1:-1] = PAD if guide else own[:, 1:-1]
        text = model.language_model.get_input_embeddings()(own)
        states = model.language_model.model(
            inputs_embeds=torch.cat([text, model.prepare_gen_img_embeds(tokens[:, :-1])], 1), use_cache=False,
            attention_mask=functional.pad(torch.ones_like(mask) if guide else mask, (0, tiny.TOKENS - 1), value=1))
        rows.append(model.gen_head(states.last_hidden_state[:, ids.shape[1] - 1:]))
    logits = rows[1] + 5.0 * (rows[0] - rows[1])
    return logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0]


def test_samples_and_sampling_of_the_rollout(gqa: Any) -> None:
    ids, mask = padded(PROMPTS[:2])
    enable(gqa, ragged(gqa))
    greedy = official.rollout(gqa, ids, mask, 2, pad_token_id=PAD, sampling=Sampling(greedy=True))
    assert torch.equal(greedy.tokens[0::2], greedy.tokens[1::2])
    assert torch.equal(greedy.tokens[0::2], rollout(gqa, PROMPTS[:2], greedy=True))
    restricted = official.rollout(gqa, ids, mask, 2, pad_token_id=PAD, sampling=Sampling.make(0.5, top_k=3), steps=9)
    assert restricted.tokens.shape == (4, 9) and restricted.drawn is not None and restricted.plain is not None
    assert restricted.drawn.isfinite().all() and (restricted.drawn != restricted.plain).any()
    plain = official.rollout(gqa, ids, mask, pad_token_id=PAD, guidance=1.0, sampling=Sampling(greedy=True), steps=4)
    assert plain.cache_bytes < greedy.cache_bytes


@pytest.mark.parametrize("plan", [full, ragged])
def test_samples_of_the_rollout_share_their_prompts(gqa: Any, plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens and log-probabilities are those of rows that have their prompts to themselves. A prompt that the plan does
    not keep cannot be shared, but runs once all the same."""
    ids, mask = padded(PROMPTS[:2])
    for keep_prompt in (True, False):
        chosen = replace(plan(gqa), keep_prompt=keep_prompt)
        enable(gqa, chosen)
        widths = []
        hook = gqa.language_model.model.register_forward_pre_hook(
            lambda module, args, kwargs: widths.append(len(kwargs["inputs_embeds"])), with_kwargs=True)  # noqa: B023
        torch.manual_seed(5)
        found = official.rollout(gqa, ids, mask.bool(), 3, pad_token_id=PAD)
        with monkeypatch.context() as patch:
            patch.setattr(official.loops, "cache_for", lambda model, share: None)
            torch.manual_seed(5)
            expected = official.rollout(gqa, ids, mask, 3, pad_token_id=PAD)
        hook.remove()
        # Two prompts and what both have without guidance; then two rows of each of six pictures.
        assert widths[:2] == [3, 12] and widths[tiny.TOKENS] == 12
        assert torch.equal(found.tokens, expected.tokens)
        assert found.plain is not None and expected.plain is not None
        assert torch.allclose(found.plain, expected.plain, rtol=0, atol=1e-5)
        sizes = [CompressedCache(chosen, 12, 4, gqa.language_model.config.head_dim, ids.shape[1], tiny.TOKENS,
                                 shared_prompts=prompts).nbytes for prompts in (3 if keep_prompt else None, None)]
        assert [found.cache_bytes, expected.cache_bytes] == sizes


@pytest.mark.parametrize("arguments, error, message", [
    ({"attention_mask": torch.ones(2, 3)}, ValueError, "must both be"),
    ({"attention_mask": None}, ValueError, "must both be"),
    ({"input_ids": torch.empty(0, 4, dtype=torch.long)}, ValueError, "not empty"),
    ({"input_ids": torch.ones(3, 4)}, TypeError, "input_ids must be a tensor of int64, got torch.float32"),
    ({"input_ids": [[1, 2]]}, TypeError, "input_ids must be a tensor"),
    ({"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.zeros(1, 4)}, ValueError,
     "attention_mask must leave at least one token in every row"),
    ({"samples": 0}, ValueError, "samples must be an int within 1"),
    ({"steps": tiny.TOKENS + 1}, ValueError, f"steps must be an int within 1 .. {tiny.TOKENS}"),
    ({"steps": 2.0}, ValueError, "steps must be"),
    *(({"pad_token_id": wrong}, ValueError, "pad_token_id must be an int within 0 .. 319")
      for wrong in (-1, 320, True)),
    *(({"guidance": wrong}, ValueError, "guidance must be finite") for wrong in (float("nan"), float("inf"))),
    *(({"guidance": wrong}, TypeError, "guidance must be a number") for wrong in (None, "5", [5.0], True)),
    ({"sampling": 1.0}, TypeError, "sampling must be a Sampling or None, got float")])
def test_bad_arguments_of_the_rollout(gqa: Any, arguments: dict[str, Any], error: type[Exception], message: str
                                      ) -> None:
    ids, mask = padded(PROMPTS)
    with pytest.raises(error, match=message):
        official.rollout(gqa, **{"input_ids": ids, "attention_mask": mask, "pad_token_id": PAD, **arguments})


def test_padding_is_not_stored(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands there changes nothing, and caches hold real tokens alone; unconditional rows see all of them."""
    lengths: list[list[int]] = []
    prefill = CompressedCache.prefill

    def watched(self: CompressedCache, layer: int, keys: torch.Tensor, values: torch.Tensor, lens: list[int]) -> None:
        lengths.append(list(lens))
        prefill(self, layer, keys, values, lens)

    monkeypatch.setattr(CompressedCache, "prefill", watched)
    enable(model, ragged(model))
    expected = rollout(model, PROMPTS)
    assert torch.equal(rollout(model, PROMPTS, padding=77), expected)
    longest = max(map(len, PROMPTS)) + 1
    assert len(set(map(len, PROMPTS))) == 3
    assert lengths == [[length for prompt in PROMPTS for length in (len(prompt) + 1, longest)]] * 2 * tiny.LAYERS


def test_a_pair_of_rows_is_the_same_in_any_company(model: Any) -> None:
    """Of as much padding."""
    enable(model, ragged(model))
    long = max(PROMPTS, key=len)
    others = [prompt for prompt in PROMPTS if prompt is not long]
    together = rollout(model, [*others, long], greedy=True)
    for index, prompt in enumerate(others):
        assert torch.equal(rollout(model, [long, prompt], greedy=True), together[[2, index]])
    assert len({tuple(row) for row in together.tolist()}) == 3


def test_text_is_left_alone(model: Any) -> None:
    expected, _ = text(model)
    enable(model, CachePlan.uniform(HeadSpec.window(1), tiny.LAYERS, heads_of(model)))
    got, cache = text(model)
    assert torch.equal(got, expected)
    assert cache.get_seq_length() == 15 and not ssd_attach.caches(model.language_model)
    assert model.language_model.model(inputs_embeds=torch.randn(1, 3, 128), use_cache=True) is not None
    assert torch.equal(text(model)[0], expected)


def test_text_beside_pictures_and_two_models_in_threads(gqa: Any) -> None:
    other = tiny_official.build(5, kv_heads=2)
    expected_text = text(gqa)[0]
    narrow = CachePlan.uniform(HeadSpec.window(2), tiny.LAYERS, 2)
    enable(gqa, ragged(gqa))
    enable(other, narrow)
    expected = [tiny_official.draw(each, PROMPT, 2, greedy=True) for each in (gqa, other)]
    found: dict[int, Any] = {}
    jobs = [lambda: tiny_official.draw(gqa, PROMPT, 2, greedy=True), lambda: text(gqa)[0],
            lambda: tiny_official.draw(other, PROMPT, 2, greedy=True), lambda: text(gqa)[0]]
    threads = [threading.Thread(target=lambda n=n, job=job: found.update({n: job()})) for n, job in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(found[0], expected[0]) and torch.equal(found[2], expected[1])
    assert torch.equal(found[1], expected_text) and torch.equal(found[3], expected_text)


def test_training_is_left_alone(gqa: Any) -> None:
    """Gradients of a pass over whole sequences, which asks for no cache, in training mode."""
    gqa.train()
    codes = torch.randint(tiny_official.CODES, (2, 9), generator=torch.Generator().manual_seed(0))

    def gradients() -> list[torch.Tensor]:
        gqa.zero_grad()
        output = gqa.language_model.model(inputs_embeds=gqa.prepare_gen_img_embeds(codes))
        assert not ssd_attach.caches(gqa.language_model)
        logits = gqa.gen_head(output.last_hidden_state[:, :-1])
        functional.cross_entropy(logits.flatten(0, 1), codes[:, 1:].flatten()).backward()
        return [parameter.grad.clone() for parameter in gqa.language_model.model.layers.parameters()]

    expected = gradients()
    enable(gqa, CachePlan.uniform(HeadSpec.window(1), tiny.LAYERS, 2))
    assert all(torch.equal(*pair) for pair in zip(gradients(), expected, strict=True))
    before = tiny_official.draw(gqa, PROMPT, 1)
    torch.optim.SGD(gqa.parameters(), lr=0.5).step()
    assert not torch.equal(tiny_official.draw(gqa, PROMPT, 1), before)


def test_memory_and_the_choice_are_told(gqa: Any) -> None:
    seen: list[int] = []
    choices = [enable(gqa, full(gqa)), enable(gqa, "decayed", budget=0.3, row_buffer=0)]
    assert choices[1].shape.columns == tiny.GRID and choices[1].shape.num_visual_tokens == tiny.TOKENS
    for choice in choices:
        enable(gqa, choice.plan)
        inputs = gqa.language_model.get_input_embeddings()(torch.tensor([PROMPT] * 2))
        outputs = gqa.language_model.model(inputs_embeds=inputs, use_cache=True)
        (cache,) = ssd_attach.caches(gqa.language_model)
        assert cache.nbytes == choice.nbytes(rows=2, max_prompt=len(PROMPT))
        seen.append(cache.nbytes)
        del outputs, cache
        assert not ssd_attach.caches(gqa.language_model)
    assert seen[1] < seen[0] and "decayed: budget 30.0% asked" in str(choices[1])


def test_disable_leaves_nothing(gqa: Any) -> None:
    stock = tiny_official.draw(gqa, PROMPT, 1)
    modules = {name: (set(vars(module)), len(module._forward_pre_hooks), len(module._forward_hooks))
               for name, module in gqa.named_modules()}
    implementation = gqa.language_model.config._attn_implementation
    with enabled(gqa, ragged(gqa)):
        assert not torch.equal(tiny_official.draw(gqa, PROMPT, 1), stock)
    enable(gqa, ragged(gqa))
    enable(gqa, full(gqa))
    disable(gqa)
    assert modules == {name: (set(vars(module)), len(module._forward_pre_hooks), len(module._forward_hooks))
                       for name, module in gqa.named_modules()}
    assert gqa.language_model.config._attn_implementation == implementation
    assert torch.equal(tiny_official.draw(gqa, PROMPT, 1), stock)
    disable(gqa)


def test_copies_are_enabled_by_themselves(gqa: Any) -> None:
    stock = tiny_official.draw(gqa, PROMPT, 1)
    enable(gqa, ragged(gqa))
    expected = tiny_official.draw(gqa, PROMPT, 1)
    other = copy.deepcopy(gqa)
    assert torch.equal(tiny_official.draw(other, PROMPT, 1), expected)
    disable(gqa)
    assert torch.equal(tiny_official.draw(other, PROMPT, 1), expected)
    assert torch.equal(tiny_official.draw(gqa, PROMPT, 1), stock)
    enable(gqa, ragged(gqa))
    disable(other)
    assert torch.equal(tiny_official.draw(other, PROMPT, 1), stock)
    assert torch.equal(tiny_official.draw(gqa, PROMPT, 1), expected)


def test_too_many_steps_are_refused_and_leave_no_trace(gqa: Any) -> None:
    enable(gqa, ragged(gqa))
    expected = tiny_official.draw(gqa, PROMPT, 1)
    with pytest.raises(ValueError, match=f"{tiny.TOKENS}"):
        tiny_official.draw(gqa, PROMPT, 1, steps=tiny.TOKENS + 3)
    assert torch.equal(tiny_official.draw(gqa, PROMPT, 1), expected)
    assert torch.equal(text(gqa)[0], text(tiny_official.build(kv_heads=2))[0])


@pytest.mark.parametrize("arguments, error, message", [
    ({"plan": CachePlan.uniform(HeadSpec.full(), 1, 1)}, ValueError, "plan must have the model's 3 layers x 2 KV"),
    ({"plan": "best"}, ValueError, "plan must be a CachePlan or the name of a policy"),
    ({"plan": "decayed", "budget": 7.0}, ValueError, "budget"), ({"plan": "decayed", "tau": 3}, TypeError, "tau"),
    ({"plan": "decayed", "backend": "tpu"}, ValueError, "backend must be one of")])
def test_bad_arguments_change_nothing(gqa: Any, arguments: dict[str, Any], error: type[Exception],
                                      message: str) -> None:
    with pytest.raises(error, match=message):
        enable(gqa, **arguments)
    assert not any(module._forward_pre_hooks for module in gqa.modules())


def test_other_models_are_named() -> None:
    with pytest.raises(TypeError, match="a MultiModalityCausalLM of deepseek-ai/Janus or a .*, got Linear"):
        enable(torch.nn.Linear(1, 1), "decayed")  # type: ignore[arg-type]
    for wrong in ("x", None):
        with pytest.raises(TypeError, match=f"got {type(wrong).__name__}"), enabled(wrong, "decayed"):
            pass
