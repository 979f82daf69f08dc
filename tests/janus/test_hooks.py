"""`enable` / `disable`: nothing else changes, and misuse is refused in words."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import draw
from transformers import DynamicCache, JanusForConditionalGeneration, LlamaForCausalLM

import ssd_janus
from ssd_attach.cache import DecoderCache, Generation
from ssd_attach.internals import CACHE_NAME
from ssd_janus import ModelShape, disable, enable, enabled, hooks
from ssd_janus.hooks import is_enabled
from ssd_kernels import CachePlan, HeadSpec
from ssd_kernels.policies import NEED_PROFILE, POLICIES, HeadProfile, Raster, build

FULL = CachePlan.uniform(HeadSpec.full(), tiny.LAYERS, 4)
NARROW = CachePlan.uniform(HeadSpec.window(2), tiny.LAYERS, 4)


def state(model: Any) -> dict[str, Any]:
    """All that enabling could leave behind."""
    language_model = model.model.language_model
    return {"model": dict(vars(model)), "language_model": dict(vars(language_model)),
            "hooks": len(language_model._forward_pre_hooks), "config": model.config.to_dict(),
            "attention": [module.config._attn_implementation for module in model.modules()
                          if hasattr(module, "config")]}


def test_disable_restores_everything(fresh: Any) -> None:
    expected, before = draw(fresh), state(fresh)
    enable(fresh, NARROW)
    assert not torch.equal(draw(fresh), expected)
    draw(fresh, guidance_scale=1)
    disable(fresh)
    disable(fresh)
    assert state(fresh) == before
    assert torch.equal(draw(fresh), expected)


def test_disable_restores_a_wrapped_generate(fresh: Any) -> None:
    calls = []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return JanusForConditionalGeneration.generate(fresh, *args, **kwargs)

    fresh.generate = wrapped
    enable(fresh, FULL)
    draw(fresh)
    assert len(calls) == 1
    disable(fresh)
    assert fresh.generate is wrapped


def test_an_error_inside_generate_leaves_no_trace(fresh: Any) -> None:
    enable(fresh, FULL)
    before = state(fresh)

    def fail(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(fresh, logits_processor=[fail], guidance_scale=1)
    assert state(fresh) == before


def test_enabling_again_replaces_the_plan(fresh: Any) -> None:
    expected = draw(fresh)
    enable(fresh, NARROW)
    enable(fresh, FULL)
    assert torch.equal(draw(fresh), expected)
    disable(fresh)
    assert "generate" not in vars(fresh)


def test_text_generation_and_forward_stay_stock(fresh: Any) -> None:
    text = tiny.build_processor()(text=list(tiny.PROMPTS), padding=True, return_tensors="pt")
    options = {"input_ids": text["input_ids"], "attention_mask": text["attention_mask"], "max_new_tokens": 12}
    for implementation in ("sdpa", "eager"):
        fresh.set_attn_implementation(implementation)
        expected, logits = fresh.generate(**options), fresh(input_ids=text["input_ids"]).logits
        enable(fresh, NARROW)
        draw(fresh)
        assert torch.equal(fresh.generate(**options), expected)
        assert torch.equal(fresh.generate(**options, generation_mode="text"), expected)
        assert torch.equal(fresh(input_ids=text["input_ids"]).logits, logits)
        disable(fresh)
        assert fresh.model.language_model.config._attn_implementation == implementation


def test_copies_are_independent_and_saving_is_clean(fresh: Any, tmp_path: Path) -> None:
    expected = draw(fresh)
    enable(fresh, NARROW)
    other = copy.deepcopy(fresh)
    disable(fresh)
    with torch.no_grad():
        fresh.model.generation_head.vision_head.weight.zero_()
    narrow = draw(other)
    assert narrow.unique().numel() > 8 and not torch.equal(narrow, expected)
    other.save_pretrained(tmp_path)
    loaded = JanusForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.model.language_model.config._attn_implementation == "sdpa"
    assert torch.equal(draw(loaded), expected)


def test_disable_gives_weights_back_their_storage(fresh: Any) -> None:
    enable(fresh, FULL)
    draw(fresh)
    assert len({parameter.untyped_storage().data_ptr() for parameter in fresh.parameters()}) < len(
        list(fresh.parameters()))
    disable(fresh)
    assert len({parameter.untyped_storage().data_ptr() for parameter in fresh.parameters()}) == len(
        list(fresh.parameters()))


@pytest.mark.parametrize("torch_save", [False, True])
def test_an_enabled_model_survives_pickling(fresh: Any, torch_save: bool) -> None:
    usual = draw(fresh)
    enable(fresh, NARROW)
    expected = draw(fresh)
    file = io.BytesIO()
    (torch.save if torch_save else pickle.dump)(fresh, file)
    file.seek(0)
    other = torch.load(file, weights_only=False) if torch_save else pickle.load(file)
    assert is_enabled(other) and torch.equal(draw(other), expected) and not torch.equal(usual, expected)
    disable(other)
    assert torch.equal(draw(other), usual) and torch.equal(draw(fresh), expected)


def test_generate_keeps_its_signature(fresh: Any) -> None:
    before, text = inspect.signature(fresh.generate), fresh.generate.__doc__
    enable(fresh, FULL)
    assert inspect.signature(fresh.generate) == before and hooks._generate.__doc__ == text


def test_caches_are_freed_when_a_call_is_over(fresh: Any) -> None:
    """Also where somebody keeps transformers' cache, as the records of torch.compile do; not if the caller gets it."""
    kept, alive = [], weakref.WeakSet()

    def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        cache = kwargs[CACHE_NAME]
        kept.append(cache)
        if cache.compressed is not None:
            alive.add(cache.compressed)

    enable(fresh, FULL, engine=False)
    fresh.model.language_model.layers[0].register_forward_pre_hook(keep, with_kwargs=True)
    draw(fresh)
    assert kept[0].compressed is None and not alive
    pipe = ssd_janus.Pipeline(fresh, tiny.build_processor())
    pipe.generate_tokens(list(tiny.PROMPTS), batch_size=2)
    assert pipe.last_run.backend and len({id(cache) for cache in kept}) == 3 and not alive
    with pytest.raises(ValueError, match=f"{CACHE_NAME} must be a fresh cache"):
        fresh.model.language_model(input_ids=torch.tensor([[1]]), **{CACHE_NAME: kept[0]})
    output = draw(fresh, return_dict_in_generate=True)
    assert list(alive) == [output[CACHE_NAME].compressed]


def test_used_caches_are_refused(fresh: Any) -> None:
    enable(fresh, FULL)
    used = draw(fresh, return_dict_in_generate=True)[CACHE_NAME]
    for name in {CACHE_NAME, "past_key_values"}:
        with pytest.raises(ValueError, match=f"{CACHE_NAME} must be left out"):
            draw(fresh, **{name: used})
        with pytest.raises(ValueError, match=f"{CACHE_NAME} must be left out.*DynamicCache"):
            draw(fresh, **{name: DynamicCache()})
        with pytest.raises(ValueError, match=f"{CACHE_NAME} must be left out.*DecoderCache"):
            fresh.generate(**tiny.image_inputs(), **{name: used}, max_new_tokens=2)
    with pytest.raises(ValueError, match=f"{CACHE_NAME} must be a fresh cache"):
        fresh.model.language_model(input_ids=torch.tensor([[1]]), **{CACHE_NAME: used})
    disable(fresh)
    with pytest.raises(ValueError, match=f"{CACHE_NAME} must be a fresh cache"):
        draw(fresh, **{CACHE_NAME: used})
    unused = DecoderCache(Generation(FULL, tiny.TOKENS))
    for implementation in ("sdpa", "eager"):
        fresh.set_attn_implementation(implementation)
        with pytest.raises(ValueError, match="a compressed cache works on the model that made it"):
            fresh.model.language_model(input_ids=torch.tensor([[1]]), **{CACHE_NAME: unused})


@pytest.mark.parametrize("name, argument", [("crop", 1), ("reorder_cache", torch.tensor([0])), ("reset", None),
                                            ("batch_repeat_interleave", 2), ("batch_select_indices", [0])])
def test_what_a_compressed_cache_cannot_do(fresh: Any, name: str, argument: Any) -> None:
    enable(fresh, FULL)
    used = draw(fresh, return_dict_in_generate=True)[CACHE_NAME]
    with pytest.raises(NotImplementedError, match=f"{name} is not possible on a compressed KV cache"):
        getattr(used, name)(*([] if argument is None else [argument]))


def test_beams_and_attention_weights_are_refused(fresh: Any) -> None:
    enable(fresh, FULL)
    with pytest.raises(ValueError, match="num_beams"):
        draw(fresh, num_beams=2)
    with pytest.raises(ValueError, match="output_attentions must be False"):
        draw(fresh, output_attentions=True)


@pytest.mark.parametrize("scale, error", [(float("nan"), ValueError), (float("inf"), ValueError), ("2", TypeError),
                                          (True, TypeError)])
def test_guidance_is_checked(fresh: Any, scale: Any, error: type[Exception]) -> None:
    enable(fresh, FULL)
    with pytest.raises(error, match="guidance_scale must be"):
        draw(fresh, guidance_scale=scale)


@pytest.mark.parametrize("extra", [{"softcap": 30.0}, {"sliding_window": 8}, {"s_aux": torch.zeros(4)},
                                   {"position_bias": torch.zeros(1)}, {"something_new": 1}])
def test_unknown_attention_arguments_are_refused(fresh: Any, extra: dict[str, Any]) -> None:
    enable(fresh, FULL, engine=False)
    for layer in fresh.model.language_model.layers:
        layer.register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs | extra), with_kwargs=True)
    with pytest.raises(ValueError, match=f"attention argument '{next(iter(extra))}' is not supported"):
        draw(fresh)


def test_dropout_is_refused(fresh: Any) -> None:
    enable(fresh, FULL)
    for layer in fresh.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.1
    fresh.train()
    with pytest.raises(ValueError, match="dropout must be 0"):
        draw(fresh)


def test_rows_of_padding_are_refused(fresh: Any) -> None:
    enable(fresh, FULL)
    inputs = tiny.image_inputs()
    inputs["attention_mask"][1] = 0
    with pytest.raises(ValueError, match="attention_mask must leave at least one prompt token"):
        fresh.generate(**inputs, generation_mode="image")


@pytest.mark.parametrize("policy", [*POLICIES, "online"])
def test_a_policys_name_does(fresh: Any, policy: str) -> None:
    """In the place of a plan, with a profile where it needs one; says in one line what was chosen and what it takes."""
    options = {"profile": some_profile(ModelShape.of(fresh))} if policy in NEED_PROFILE else {}
    if policy != "full":
        options |= {"budget": 0.7, "row_buffer": 2}
    choice = enable(fresh, policy, **options)
    in_force, _ = hooks.in_force(fresh)
    assert choice.plan is in_force and choice.policy == policy
    if policy not in ("full", "online"):
        assert choice.plan == build(policy, ModelShape.of(fresh), **options)
    assert str(choice).startswith(f"{policy}: budget {1 if policy == 'full' else 0.7:.1%} asked, ")
    assert str(choice).endswith(f"of the full cache's {choice.full_nbytes() / 1e6:.1f} MB") and "\n" not in str(choice)
    assert draw(fresh).shape == (len(tiny.PROMPTS), tiny.TOKENS)


def some_profile(shape: ModelShape) -> HeadProfile:
    """Of a model with these sizes."""
    generator, head, tokens, columns = torch.Generator(), (tiny.LAYERS, 4), tiny.TOKENS, tiny.GRID
    shares = {name: torch.full((*head, *size), 0.01) for name, size in (
        ("age_mass", [tokens]), ("offset_mass", [columns, 2 * columns - 1]), ("column_mass", [columns]),
        ("first_mass", [columns]), ("place_mass", [1, tokens]), ("guidance_difference", [tokens]),
        ("prompt_mass", []))}
    return HeadProfile(
        sparsity=torch.rand(head, generator=generator), error=torch.rand(*head, 1, 2, 3, generator=generator),
        sensitivity=torch.ones(tiny.LAYERS), sizes=(4, 9, 20), kinds=("window", "heavy"), row_buffers=(0,), places=(8,),
        columns=columns, radius=1, **shares)


def test_the_default_and_a_profile_in_a_file(fresh: Any, tmp_path: Path) -> None:
    assert enable(fresh, budget=0.7).policy == "decayed"
    file = tmp_path / "profile.safetensors"
    some_profile(ModelShape.of(fresh)).save(file)
    for given in (file, str(file)):
        assert enable(fresh, budget=0.7, profile=given).policy == "adaptive"
    assert enable(fresh, "full").plan == FULL
    assert enable(fresh, "heavy", budget=0.7, recent=0.25).plan.layers[0][0].recent * 4 <= tiny.TOKENS
    with pytest.raises(ValueError, match="budget must be at least .* got 0.1"):
        enable(fresh, budget=0.1)
    with pytest.raises(ValueError, match="policy adaptive needs a profile"):
        enable(fresh, "adaptive")
    assert hooks.in_force(fresh)[0].layers[0][0].kind == "heavy", "what was refused changes nothing"
    assert enable(fresh).asked == 0.2


def test_attach_says_that_enable_draws_pictures(fresh: Any) -> None:
    """`attach` takes a Janus for its text; its pictures it cannot know."""
    words = {**tiny.image_inputs(), "max_new_tokens": 8, "do_sample": False}
    text, usual = fresh.generate(**words), draw(fresh)
    with ssd_janus.attached(fresh, "full", pictures=Raster(tiny.GRID, tiny.GRID)):
        assert torch.equal(fresh.generate(**words), text)
        with pytest.raises(ValueError, match=r"got StaticCache; .*ssd_janus.enable\(model, ...\) draws them with"):
            draw(fresh)
    assert torch.equal(draw(fresh), usual)


def test_a_block(fresh: Any) -> None:
    """What was in force before is so again, whatever ends the block."""
    usual, before = draw(fresh), state(fresh)
    with enabled(fresh, NARROW) as choice:
        narrow = draw(fresh)
        assert choice.plan is NARROW and not torch.equal(narrow, usual)
        with pytest.raises(KeyboardInterrupt), enabled(fresh, "full", engine=False):
            assert torch.equal(draw(fresh), usual)
            raise KeyboardInterrupt
        assert torch.equal(draw(fresh), narrow)
    assert state(fresh) == before and torch.equal(draw(fresh), usual)


def test_another_process_can_load_an_enabled_model(fresh: Any, tmp_path: Path) -> None:
    """Its language model has the name of an attention function that the other process has to learn."""
    text = {"input_ids": torch.tensor([[5, 6, 7]])}
    enable(fresh, NARROW)
    torch.save((fresh, fresh(**text).logits), tmp_path / "model")
    code = ("import sys, torch; model, logits = torch.load(sys.argv[1], weights_only=False)\n"
            "assert torch.allclose(model(input_ids=torch.tensor([[5, 6, 7]])).logits, logits, atol=1e-4)")
    subprocess.run([sys.executable, "-c", code, tmp_path / "model"], check=True)


def test_enable_checks_its_arguments(fresh: Any) -> None:
    with pytest.raises(ValueError, match="3 layers x 4 KV heads, got 2 layers x 4"):
        enable(fresh, CachePlan.uniform(HeadSpec.full(), 2, 4))
    with pytest.raises(ValueError, match="3 layers x 4 KV heads, got 3 layers x 8"):
        enable(fresh, CachePlan.uniform(HeadSpec.full(), 3, 8))
    with pytest.raises(TypeError, match="plan must be a CachePlan or the name of a policy, one of .*online, got dict"):
        enable(fresh, {})
    with pytest.raises(ValueError, match="backend must be one of auto, .*got 'cudnn'"):
        enable(fresh, FULL, backend="cudnn")
    llama = LlamaForCausalLM(fresh.config.text_config)
    for call in (lambda: enable(llama, FULL), lambda: disable(llama)):
        with pytest.raises(TypeError, match="JanusForConditionalGeneration, got LlamaForCausalLM; ssd_janus.attach"):
            call()
    assert "generate" not in vars(fresh)
