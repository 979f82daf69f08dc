"""Every option of ``generate`` on an enabled model: as with transformers, or refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from transformers import CompileConfig, GenerationConfig, JanusForConditionalGeneration, LogitsProcessorList

from ssd_janus import Pipeline, disable, enable
from ssd_kernels import CachePlan, HeadSpec

FULL = CachePlan.uniform(HeadSpec.full(), tiny.LAYERS, 4)
REFUSED = {"use_cache": False, "cache_implementation": "static", "output_attentions": True}
SAMPLING = {
    "temperature": 0.7, "top_k": 5, "top_p": 0.8, "typical_p": 0.8, "epsilon_cutoff": 0.01, "eta_cutoff": 0.01,
    "min_p": 0.1, "guidance_scale": 3.0, "num_return_sequences": 2, "renormalize_logits": True,
    "remove_invalid_values": True}
OPTIONS: dict[str, Any] = SAMPLING | {
    "max_new_tokens": 3, "max_length": 99, "min_length": 20, "min_new_tokens": 4, "max_time": 1e-3,
    "stop_strings": ["a"],
    "output_scores": True, "output_logits": True, "output_hidden_states": True, "return_dict_in_generate": True,
    "stopping_criteria": [], "streamer": object(), "prefix_allowed_tokens_fn": min, "num_beams": 2,
    "prompt_lookup_num_tokens": 3, "penalty_alpha": 0.5, "compile_config": CompileConfig(), "disable_compile": True,
    "prefill_chunk_size": 2, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "bad_words_ids": [[5]],
    "sequence_bias": [[[5], -3.0]], "suppress_tokens": [5, 6], "begin_suppress_tokens": [5], "forced_bos_token_id": 3,
    "forced_eos_token_id": 4, "exponential_decay_length_penalty": (2, 1.1), "eos_token_id": 1, "pad_token_id": 5,
    "bos_token_id": 4, "generation_kwargs": {"boi_token_id": 9}, "token_healing": True, "low_memory": True,
    "negative_prompt_ids": torch.tensor([[1]]), "tokenizer": object(), "use_model_defaults": True, "nonsense": 1,
    "pixel_values": torch.zeros(2, 3, 24, 24), "labels": torch.zeros(2, 9), "logits_to_keep": 1,
    "position_ids": torch.arange(5)[None], "num_image_tokens": 3, "past_key_values": None, "cache": None,
    "logits_processor": [lambda ids, scores: scores.flip(-1)]}


@pytest.fixture(scope="module")
def short() -> JanusForConditionalGeneration:
    model = tiny.build_model()
    model.model.vision_model.config.num_image_tokens = tiny.GRID
    return model


def outcome(model: JanusForConditionalGeneration, **options: Any) -> Any:
    """The tokens, or the error."""
    torch.manual_seed(0)
    try:
        result = model.generate(**{**tiny.image_inputs(tiny.PROMPTS[:2]), **options}, generation_mode="image")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return getattr(result, "sequences", result).tolist()


@pytest.mark.parametrize("name", OPTIONS)
def test_as_with_transformers(short: JanusForConditionalGeneration, name: str) -> None:
    options = {name: OPTIONS[name], "do_sample": name in SAMPLING}
    expected = outcome(short, **options | {name: copy.copy(OPTIONS[name])})  # transformers appends to the caller's list
    for engine in (True, False):
        enable(short, FULL, engine=engine)
        assert outcome(short, **options) == expected
        disable(short)


@pytest.mark.parametrize("where", ["argument", "config", "default"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_an_enabled_model_would_ignore_is_refused(fresh: Any, name: str, where: str) -> None:
    options: dict[str, Any] = {name: REFUSED[name]} if where == "argument" else {}
    if where == "config":
        options["generation_config"] = GenerationConfig(**{name: REFUSED[name]})
    if where == "default":
        setattr(fresh.generation_config, name, REFUSED[name])
    for engine in (True, False):
        enable(fresh, FULL, engine=engine)
        assert outcome(fresh, **options).startswith(f"ValueError: {name} must be")


def test_every_field_of_a_configuration_has_been_thought_of() -> None:
    """Those that are in neither list have nothing to do with pictures; a new one must be looked at."""
    beside = {"assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight",
              "assistant_lookbehind", "cache_config", "constraints", "continuous_batching_config",
              "decoder_start_token_id", "diversity_penalty", "do_sample", "dola_layers", "early_stopping",
              "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "force_words_ids", "is_assistant",
              "length_penalty", "max_cache_len", "max_matching_ngram_size", "num_assistant_tokens",
              "num_assistant_tokens_schedule", "num_beam_groups", "speculation_type", "target_lookbehind", "top_h",
              "transformers_version", "use_mtp", "watermarking_config"}
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert not fields - beside - OPTIONS.keys() - REFUSED.keys()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_arguments_by_position(short: JanusForConditionalGeneration, count: int) -> None:
    inputs = tiny.image_inputs(tiny.PROMPTS[:2])
    arguments = (inputs["input_ids"], inputs["attention_mask"], None)
    named = {} if count > 1 else {"attention_mask": inputs["attention_mask"]}
    expected = short.generate(*arguments[:count], **named, generation_mode="image")
    for engine in (True, False):
        enable(short, FULL, engine=engine)
        assert torch.equal(short.generate(*arguments[:count], **named, generation_mode="image"), expected)
        with pytest.raises(TypeError):
            short.generate(*arguments, None, generation_mode="image")
        with pytest.raises(TypeError, match="multiple values for argument 'attention_mask'"):
            short.generate(*arguments, attention_mask=None, generation_mode="image")
        disable(short)


def test_the_callers_own_objects_stay_as_they_are(short: JanusForConditionalGeneration) -> None:
    given = LogitsProcessorList([lambda ids, scores: scores])
    config = GenerationConfig(guidance_scale=3.0, generation_kwargs={"boi_token_id": 3})
    for engine in (True, False):
        enable(short, FULL, engine=engine)
        results = [outcome(short, logits_processor=given, generation_config=config, do_sample=False) for _ in range(2)]
        disable(short)
        assert isinstance(results[0], list) and results[0] == results[1]
        assert len(given) == 1 and config.guidance_scale == 3.0


@pytest.mark.parametrize("draw", ["enable", "pipeline"])
def test_gradient_checkpointing_is_named(fresh: Any, draw: str) -> None:
    fresh.gradient_checkpointing_enable()
    fresh.train()
    enable(fresh, FULL, engine=False)
    pipe = Pipeline(fresh, tiny.build_processor())
    fresh.model.language_model.layers[0].mlp.register_forward_hook(lambda module, args, output: output)

    def attempt() -> Any:
        return tiny.draw(fresh) if draw == "enable" else pipe.generate_tokens("a heart")

    with pytest.raises(ValueError, match="gradient checkpointing must be off.*call model.eval()"):
        attempt()
    fresh.eval()
    attempt()
    fresh.train()
    fresh.gradient_checkpointing_disable()
    attempt()


def test_attention_that_goes_without_the_cache_is_noticed(fresh: Any) -> None:
    """As layers of others may do: nothing would be cached, and every token drawn from the last alone."""
    for layer in fresh.model.language_model.layers:
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {name: value for name, value in kwargs.items()
                                                 if name not in ("cache", "past_key_values")}), with_kwargs=True)
    enable(fresh, FULL)
    with pytest.raises(RuntimeError, match="the prompt never came to the compressed cache"):
        tiny.draw(fresh)
