"""`attach` / `detach`: nothing else changes, calls share nothing, and misuse is refused in words."""

from __future__ import annotations

import copy
import gc
import io
import logging
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import decoders
import pytest
import torch
from decoders import BEGIN, IDS, plan_of, write
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel

import ssd_janus
from ssd_attach import PictureForm, attach, attached, caches, detach
from ssd_attach.choice import NAMES, parameters_of
from ssd_attach.internals import CACHE_NAME
from ssd_attach.models import EndsWith
from ssd_kernels import CachePlan, HeadSpec
from ssd_kernels.policies import Raster

RASTER = Raster(5, 4, line_tokens=1, tail=3)
TOKENS = RASTER.tokens
NARROW = plan_of("llama", HeadSpec.window(1), HeadSpec.window(2))
HEAVY = plan_of("llama", HeadSpec.heavy(5, 2), HeadSpec.window(3), row_buffer=3)
WAIT = 100.0  # seconds until a meeting is given up; only a failure gets there


def state(model: PreTrainedModel) -> dict[str, Any]:
    """All that attaching could leave behind."""
    decoder = model.get_decoder()
    hooks = [(module, len(module._forward_pre_hooks), len(module._forward_hooks),
              len(module._forward_pre_hooks_with_kwargs), len(module._forward_hooks_always_called))
             for module in (model, decoder)]
    return {"hooks": hooks, "attributes": (set(vars(model)), set(vars(decoder))), "config": model.config.to_dict(),
            "attention": [module.config._attn_implementation for module in model.modules()
                          if hasattr(module, "config")]}


def test_detach_leaves_nothing(named_model: tuple[str, PreTrainedModel]) -> None:
    name, model = named_model
    before, expected = state(model), write(model, TOKENS)
    narrow = CachePlan.uniform(HeadSpec.window(1), decoders.LAYERS, decoders.KV_HEADS[name])
    form = PictureForm(RASTER, EndsWith(BEGIN))
    for pictures in (RASTER, form):
        attach(model, narrow, pictures=pictures)
        attach(model, narrow, pictures=form)
        assert not torch.equal(write(model, TOKENS), expected)
        with pytest.raises(ValueError, match="after the prompt a compressed cache takes 1 token per step"):
            broken(model)
        detach(model)
        detach(model)
        assert state(model) == before
        assert torch.equal(write(model, TOKENS), expected)


@torch.no_grad()
def broken(model: PreTrainedModel) -> None:
    cache = DynamicCache()
    for _ in range(2):
        model(input_ids=IDS, **{CACHE_NAME: cache}, use_cache=True)


def test_text_is_left_alone(llama: PreTrainedModel) -> None:
    """What begins as no picture has an ordinary cache, while pictures are drawn, and in the same threads."""
    words = {"input_ids": IDS[:, :-1], "attention_mask": decoders.MASK[:, :-1], "guided": False}
    usual, text = write(llama, TOKENS), write(llama, TOKENS, **words)
    attach(llama, NARROW, pictures=PictureForm(RASTER, EndsWith(BEGIN)))
    for _ in range(2):
        assert not torch.equal(write(llama, TOKENS), usual)
        output = write(llama, TOKENS, return_dict_in_generate=True, **words)
        assert torch.equal(output.sequences, text) and output[CACHE_NAME].layers[0].keys is not None
    decoder, embeds = llama.get_decoder(), llama.get_input_embeddings()(IDS)
    with torch.no_grad():  # outside of any call of the model: a picture
        assert hasattr(decoder(inputs_embeds=embeds, use_cache=True)[CACHE_NAME].layers[0], "generation")


def test_plain_forwards_and_training_are_untouched(llama: PreTrainedModel) -> None:
    expected = llama(input_ids=IDS).logits
    expected.square().sum().backward()
    gradient = llama.lm_head.weight.grad.clone()
    llama.zero_grad()
    attach(llama, NARROW, pictures=RASTER)
    logits = llama(input_ids=IDS).logits
    logits.square().sum().backward()
    assert torch.equal(logits, expected) and torch.equal(llama.lm_head.weight.grad, gradient)
    assert isinstance(llama(input_ids=IDS)[CACHE_NAME], DynamicCache) and not caches(llama)
    assert llama(input_ids=IDS, use_cache=True).logits.grad_fn is not None  # of the prompt


def test_generations_that_began_before_go_on(llama: PreTrainedModel) -> None:
    with torch.no_grad():
        output = llama(input_ids=IDS, use_cache=True)
        again = copy.deepcopy(output[CACHE_NAME])
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        expected = llama(input_ids=token, **{CACHE_NAME: again}).logits
        attach(llama, NARROW, pictures=RASTER)
        assert torch.equal(llama(input_ids=token, **{CACHE_NAME: output[CACHE_NAME]}).logits, expected)


def test_copies_and_pickles_are_attached_for_themselves(llama: PreTrainedModel) -> None:
    usual = write(llama, TOKENS)
    attach(llama, NARROW, pictures=PictureForm(RASTER, EndsWith(BEGIN)))
    narrow = write(llama, TOKENS)
    file = io.BytesIO()
    torch.save(llama, file)
    file.seek(0)
    others = [copy.deepcopy(llama), pickle.loads(pickle.dumps(llama)), torch.load(file, weights_only=False)]
    detach(llama)
    for other in others:
        assert torch.equal(write(other, TOKENS), narrow)
        attach(other, HEAVY, pictures=RASTER)
        assert not torch.equal(write(other, TOKENS), narrow)
        detach(other)
        assert state(other)["attention"] == state(llama)["attention"]
        assert [each[1:] for each in state(other)["hooks"]] == [(0, 0, 0, 0)] * 2
        assert torch.equal(write(other, TOKENS), usual)
    assert torch.equal(write(llama, TOKENS), usual)


def test_another_process_can_load_it(llama: PreTrainedModel, tmp_path: Path) -> None:
    attach(llama, NARROW, pictures=RASTER)
    torch.save((llama, llama(input_ids=IDS).logits, write(llama, 6, guided=False, do_sample=False)), tmp_path / "model")
    code = ("import sys, torch; sys.path[:0] = sys.argv[2:]; import decoders\n"
            "model, logits, tokens = torch.load(sys.argv[1], weights_only=False)\n"
            "assert torch.allclose(model(input_ids=decoders.IDS).logits, logits, atol=1e-4)\n"
            "assert torch.equal(decoders.write(model, 6, guided=False, do_sample=False), tokens)")
    subprocess.run([sys.executable, "-c", code, tmp_path / "model", Path(__file__).parent], check=True)


def test_models_may_share_a_configuration(llama: PreTrainedModel) -> None:
    other = LlamaForCausalLM(llama.config).eval()
    other.load_state_dict(llama.state_dict())
    assert other.config is llama.config
    usual = write(llama, TOKENS)
    attach(llama, NARROW, pictures=RASTER)
    attach(other, "full", pictures=RASTER)
    narrow = write(llama, TOKENS)
    assert torch.equal(write(other, TOKENS), usual) and not torch.equal(narrow, usual)

    def end(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        detach(other)
        return scores

    assert torch.equal(write(llama, TOKENS, logits_processor=[end]), narrow), "the other's end is no one else's"
    assert torch.equal(write(other, TOKENS), usual) and torch.equal(write(llama, TOKENS), narrow)
    detach(llama)
    assert llama.config._attn_implementation == "sdpa" and torch.equal(write(llama, TOKENS), usual)


class Meeting:
    """A logits processor that waits for the other threads before every step."""

    def __init__(self, barrier: threading.Barrier) -> None:
        self.barrier = barrier

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.barrier.wait(WAIT)
        return scores


def test_threads_two_plans_two_models_and_text(llama: PreTrainedModel) -> None:
    """Side by side, step by step: two pictures and a text on one model, a picture under another plan on another."""
    other, words = decoders.build("llama", seed=1), {"input_ids": IDS[:, :-1], "attention_mask": decoders.MASK[:, :-1]}
    calls = [(llama, {}), (llama, {"input_ids": IDS.flip(0), "attention_mask": decoders.MASK.flip(0)}), (llama, words),
             (other, {})]
    options = {"do_sample": False, "guided": False}  # torch's generator is everyone's
    form = PictureForm(RASTER, EndsWith(BEGIN))
    stock = [write(model, TOKENS, **own, **options) for model, own in calls]
    attach(llama, NARROW, pictures=form)
    attach(other, HEAVY, pictures=form)
    expected = [write(model, TOKENS, **own, **options) for model, own in calls]
    assert [torch.equal(*pair) for pair in zip(expected, stock, strict=True)] == [False, False, True, False]
    barrier, interval = threading.Barrier(len(calls)), sys.getswitchinterval()

    def run(call: tuple[PreTrainedModel, dict[str, Any]]) -> torch.Tensor:
        try:
            return write(call[0], TOKENS, **call[1], **options, logits_processor=[Meeting(barrier)])
        except BaseException:
            barrier.abort()
            raise

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(calls)) as pool:
            results = list(pool.map(run, calls))
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
    gc.collect()
    assert not caches(llama) and not caches(other)


def test_calls_that_are_under_way_at_once_are_told_apart(llama: PreTrainedModel) -> None:
    """Both threads are in the model before either comes to the decoder."""
    attach(llama, NARROW, pictures=PictureForm(RASTER, EndsWith(BEGIN)))
    barrier = threading.Barrier(2)
    llama.register_forward_pre_hook(lambda module, args: (barrier.wait(WAIT), None)[1])

    def compressed(ids: torch.Tensor) -> bool:
        with torch.no_grad():
            return hasattr(llama(input_ids=ids, use_cache=True)[CACHE_NAME].layers[0], "generation")

    with ThreadPoolExecutor(2) as pool:
        for calls in ([IDS, IDS[:, :-1]], [IDS[:, :-1], IDS]):
            assert list(pool.map(compressed, calls)) == [ids is IDS for ids in calls]


def test_one_call_may_fail_or_be_detached_alone(llama: PreTrainedModel) -> None:
    attach(llama, NARROW, pictures=RASTER)
    expected, before = write(llama, TOKENS), state(llama)

    def fail(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    def end(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        detach(llama)
        return scores

    with pytest.raises(KeyboardInterrupt):
        write(llama, TOKENS, logits_processor=[fail])
    assert state(llama) == before and torch.equal(write(llama, TOKENS), expected)
    with pytest.raises(ValueError, match="while it is attached or enabled"):
        write(llama, TOKENS, logits_processor=[end])


def test_names_of_ssd_janus() -> None:
    assert (ssd_janus.attach, ssd_janus.attached, ssd_janus.detach) == (attach, attached, detach)


def test_a_block(llama: PreTrainedModel) -> None:
    usual = write(llama, TOKENS)
    with pytest.raises(KeyboardInterrupt), attached(llama, NARROW, pictures=RASTER) as choice:
        assert choice.plan == NARROW and not torch.equal(write(llama, TOKENS), usual)
        raise KeyboardInterrupt
    assert torch.equal(write(llama, TOKENS), usual)


def test_misuse_is_refused(llama: PreTrainedModel) -> None:
    decoder, form = llama.get_decoder(), PictureForm(RASTER, EndsWith(BEGIN))
    before = state(llama)
    for error, match, arguments in (
            (TypeError, "model must be a model or decoder of transformers, got Flatten", (torch.nn.Flatten(), NARROW)),
            (TypeError, "plan must be a CachePlan or the name of a policy, one of .*online, got dict", (llama, {})),
            (TypeError, "plan must be a CachePlan or the name of a policy, one of .*online, got int", (llama, 5)),
            (ValueError, "plan must have the model's 3 layers x 2 KV heads, got 2 layers x 2",
             (llama, CachePlan.uniform(HeadSpec.full(), 2, 2))),
            (ValueError, "one of full, .*online, got 'ssd2'", (llama, "ssd2")),
            (ValueError, "policy adaptive needs a profile", (llama, "adaptive")),
            (ValueError, "backend must be one of auto, .*got 'cudnn'", (llama, NARROW, "cudnn")),
            (ValueError, r"backend must be one of auto, .*got \['cpu'\]", (llama, NARROW, ["cpu"]))):
        with pytest.raises(error, match=match):
            attach(*arguments, pictures=RASTER)
    with pytest.raises(TypeError, match="pictures must be a Raster or a PictureForm, got int"):
        attach(llama, NARROW, pictures=24)
    with pytest.raises(ValueError, match="got the decoder itself, LlamaModel"):
        attach(decoder, NARROW, pictures=form)
    for beside in ({"budget": 0.2}, {"row_buffer": 0}, {"recent": 0.1}):
        with pytest.raises(ValueError, match=f"{next(iter(beside))} must be left out beside a plan"):
            attach(llama, NARROW, pictures=RASTER, **beside)
    with pytest.raises(TypeError, match="profile must be a HeadProfile or the path of one, got int"):
        attach(llama, "decayed", pictures=RASTER, profile=5)
    for wrong in ("x", None, torch.nn.Linear(1, 1)):
        with pytest.raises(TypeError, match=f"model must be a model or decoder of .*, got {type(wrong).__name__}"):
            detach(wrong)
    with pytest.raises(TypeError, match="model must be a model or decoder, got str"):
        caches("x")
    for policy in NAMES:
        known = ", ".join(parameters_of(policy)) or "must be none, it has none"
        with pytest.raises(TypeError, match=f"parameters of policy {policy} .*{known}, besides budget.*got 'colour'"):
            attach(llama, policy, budget=0.5, pictures=RASTER, colour=1)
    assert state(llama) == before
    attach(llama, NARROW, pictures=RASTER)
    for call in (lambda: attach(decoder, NARROW, pictures=RASTER), lambda: detach(decoder)):
        with pytest.raises(ValueError, match="the decoder of this LlamaModel is attached as part of another model"):
            call()
    detach(llama)
    attach(decoder, NARROW, pictures=RASTER)
    with pytest.raises(ValueError, match="the decoder of this LlamaForCausalLM is attached as part of another"):
        attach(llama, NARROW, pictures=RASTER)
    detach(decoder)
    assert state(llama) == before


def test_calls_that_cannot_be_are_refused(llama: PreTrainedModel) -> None:
    attach(llama, NARROW, pictures=RASTER)
    with pytest.raises(ValueError, match="empty DynamicCache on an attached decoder.*got StaticCache"):
        write(llama, 4, cache_implementation="static")
    with pytest.raises(NotImplementedError, match="reorder_cache is not possible on a compressed KV cache"):
        write(llama, 4, guided=False, num_beams=2, do_sample=False)
    with pytest.raises(ValueError, match="attention_mask must leave at least one prompt token in every row"):
        write(llama, 4, guided=False, attention_mask=torch.zeros_like(IDS))
    with pytest.raises(ValueError, match=str(TOKENS)):
        write(llama, TOKENS + 2, guided=False)
    llama.train()
    llama.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing must be off"):
        llama(input_ids=IDS, use_cache=True)
    assert llama(input_ids=IDS, use_cache=False).logits.grad_fn is not None


def test_what_was_chosen_is_said_in_one_line(llama: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ssd_attach"):
        choice = attach(llama, budget=0.4, row_buffer=0, pictures=RASTER)
    assert caplog.messages == [str(choice)] and "\n" not in str(choice) and repr(choice) == str(choice)
    assert str(choice).startswith("decayed: budget 40.0% asked, 39.3% reached, row buffer 0; ")
    assert f"{choice.nbytes() / choice.full_nbytes():.1%} of the full cache's" in str(choice)
    output = write(llama, 4, guided=False, return_dict_in_generate=True)
    (cache,) = caches(llama)
    assert cache.nbytes == choice.nbytes(rows=3, max_prompt=6) < choice.full_nbytes(rows=3, max_prompt=6)
    del output
    assert str(attach(llama, "full", pictures=RASTER)).startswith("full: budget 100.0% asked, 100.0% reached")
    assert str(attach(llama, NARROW, pictures=RASTER)).startswith("the given plan: budget ")
    assert attach(llama, "online", budget=0.8, pictures=Raster(8, 4, 1)).policy == "online"
    assert write(llama, 30).shape[1] == IDS.shape[1] + 30
