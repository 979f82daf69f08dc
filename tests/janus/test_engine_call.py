"""`enable`: the engine draws what it can, and transformers' loop the rest, saying why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from transformers import GenerationConfig, LogitsProcessorList

from ssd_janus import enable
from ssd_janus.engine import call, saying
from ssd_kernels import CachePlan, HeadSpec

FULL = CachePlan.uniform(HeadSpec.full(), tiny.LAYERS, 4)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Filled with "engine" at every call that it draws, and with the reason where it does not."""
    seen: list[str] = []
    draw = call.Engine.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        seen.append("engine")
        return draw(*args, **kwargs)

    monkeypatch.setattr(call.Engine, "generate", generate)
    monkeypatch.setattr(call, "say_once", seen.append)
    return seen


@pytest.mark.parametrize("options", [
    {"num_return_sequences": 2, "do_sample": True, "top_k": 0},
    {"generation_config": GenerationConfig(do_sample=True, guidance_scale=3.0, top_p=0.9)},
    {"guidance_scale": 5.0},
], ids=str)
def test_what_the_engine_draws(fresh: Any, drawn: list[str], options: dict[str, Any]) -> None:
    expected = tiny.draw(fresh, **options)
    enable(fresh, FULL)
    result = tiny.draw(fresh, **options)
    assert torch.equal(result, expected) and result.dtype == expected.dtype
    assert drawn == ["engine"]


@pytest.mark.parametrize("options", [
    {"pad_token_id": 9}, {"bos_token_id": 9}, {"generation_kwargs": {"boi_token_id": 9}},
    {"generation_config": GenerationConfig(guidance_scale=2.0, bos_token_id=0, pad_token_id=9,
                                           generation_kwargs={"boi_token_id": 7})},
], ids=lambda options: next(iter(options)))
def test_tokens_of_the_unconditional_prompt_are_the_calls(fresh: Any, drawn: list[str],
                                                          options: dict[str, Any]) -> None:
    usual, expected = tiny.draw(fresh), tiny.draw(fresh, **copy.deepcopy(options))
    assert not torch.equal(usual, expected)
    enable(fresh, FULL)
    assert torch.equal(tiny.draw(fresh, **copy.deepcopy(options)), expected)
    assert drawn == ["engine"]


def test_a_model_that_names_no_tokens_takes_the_calls(fresh: Any, drawn: list[str]) -> None:
    expected = tiny.draw(fresh)
    fresh.generation_config = GenerationConfig(guidance_scale=2.0)
    enable(fresh, FULL)
    tokens = GenerationConfig(bos_token_id=0, pad_token_id=2, generation_kwargs={"boi_token_id": 3})
    assert torch.equal(tiny.draw(fresh, generation_config=tokens), expected) and drawn == ["engine"]
    with pytest.raises(AttributeError, match="generation_kwargs"):  # transformers' own error
        tiny.draw(fresh, bos_token_id=0, pad_token_id=2)
    assert drawn[1] == "generation_config must name a boi_token_id for guidance, got None"


@pytest.mark.parametrize("options, reason", [
    (lambda: {"logits_processor": LogitsProcessorList([lambda ids, scores: scores.flip(-1)])},
     "logits_processor is given"),
    (lambda: {"return_dict_in_generate": True}, "return_dict_in_generate is set"),
    (lambda: {"do_sample": True, "min_p": 0.1}, "MinPLogitsWarper is in force"),
    (lambda: {"attention_mask": torch.ones(4, 9).index_fill(1, torch.tensor([3]), 0)}, "zeros after the first token"),
], ids=["processor", "dict", "min_p", "hole"])
def test_what_it_does_not(fresh: Any, drawn: list[str], options: Callable[[], dict[str, Any]], reason: str) -> None:
    expected = tiny.draw(fresh, **options())
    enable(fresh, FULL)
    result = tiny.draw(fresh, **options())
    assert torch.equal(getattr(result, "sequences", result), getattr(expected, "sequences", expected))
    assert len(drawn) == 1 and reason in drawn[0]


def test_engine_off(fresh: Any, drawn: list[str]) -> None:
    enable(fresh, FULL, engine=False)
    tiny.draw(fresh)
    assert drawn == []


def test_a_reason_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saying, "_said", set())
    for reason in ("first", "second", "first"):
        call.say_once(reason)
    assert [record.message.split(": ")[1] for record in caplog.records] == ["first", "second"]
