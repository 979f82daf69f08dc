"""What has to work with every supported release of transformers, torch and NumPy: `make compat` runs these on many.

Everything goes through the public interface and the included model, with pictures that end early.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import (
    JanusForConditionalGeneration,
    JanusProcessor,
    LogitsProcessor,
    LogitsProcessorList,
)

from ssd_attach import attached, caches
from ssd_janus import ModelShape, Pipeline, disable, enable
from ssd_janus.checkpoints import included_model
from ssd_kernels import CachePlan, HeadSpec
from ssd_kernels.policies import Raster

STEPS = 24
CALLS = {
    "greedy": {"do_sample": False, "guidance_scale": 5.0},
    "sampled": {"do_sample": True, "guidance_scale": 5.0, "num_return_sequences": 2},
    "min_p": {"do_sample": True, "guidance_scale": 5.0, "min_p": 0.05, "top_k": 50},
}


class Unchanged(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    """The included model in float32, as a whole; its pictures end after `STEPS` tokens."""
    source = included_model()
    model = JanusForConditionalGeneration.from_pretrained(source, dtype=torch.float32, local_files_only=True).eval()
    model.model.vision_model.config.num_image_tokens = STEPS
    return Pipeline(model, JanusProcessor.from_pretrained(source, local_files_only=True))


@pytest.fixture
def model(pipe: Pipeline) -> Iterator[Any]:
    yield pipe.model
    disable(pipe.model)


@pytest.fixture(scope="module")
def inputs(pipe: Pipeline) -> dict[str, torch.Tensor]:
    """Two prompts of different lengths, left-padded."""
    chats = [[{"role": "user", "content": [{"type": "text", "text": text}]}]
             for text in ("a red circle", "two blue squares above a green star")]
    texts = [pipe.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    batch = pipe.processor(text=texts, generation_mode="image", padding=True, padding_side="left", return_tensors="pt")
    assert batch["attention_mask"][0, 0] == 0
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def draw(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    torch.manual_seed(3)
    return model.generate(**inputs, generation_mode="image", **options)


@pytest.fixture(scope="module")
def stock(pipe: Pipeline, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What transformers draws on its own."""
    return {name: draw(pipe.model, inputs, **options) for name, options in CALLS.items()}


def full(model: Any) -> CachePlan:
    return ModelShape.of(model).full_plan()


@pytest.mark.parametrize("engine", [True, False], ids=["engine", "loop"])
@pytest.mark.parametrize("name", CALLS)
def test_a_full_plan_draws_what_transformers_draws(model: Any, inputs: Any, stock: Any, name: str,
                                                   engine: bool) -> None:
    enable(model, full(model), engine=engine)
    assert torch.equal(draw(model, inputs, **CALLS[name]), stock[name])


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_engine_and_loop_agree_on_a_compressed_cache(model: Any, inputs: Any, guidance: float) -> None:
    """Without guidance, too, for which transformers' own loop has no room for two prompts."""
    shape = ModelShape.of(model)
    plan = CachePlan.uniform(HeadSpec.heavy(8, recent=4, score="mean"), shape.num_layers, shape.num_heads,
                             row_buffer=4)
    drawn = []
    for engine in (True, False):
        enable(model, plan, engine=engine)
        drawn.append(draw(model, inputs, do_sample=True, guidance_scale=guidance))
    assert torch.equal(*drawn)


def test_own_logits_processors(model: Any, inputs: Any, stock: Any) -> None:
    enable(model, full(model))
    got = draw(model, inputs, **CALLS["greedy"], logits_processor=LogitsProcessorList([Unchanged()]))
    assert torch.equal(got, stock["greedy"])


@pytest.mark.parametrize("engine", [True, False], ids=["engine", "loop"])
def test_return_dict(model: Any, inputs: Any, stock: Any, engine: bool) -> None:
    enable(model, full(model), engine=engine)
    got = draw(model, inputs, **CALLS["greedy"], return_dict_in_generate=True)
    assert torch.equal(got.sequences, stock["greedy"])


def test_positional_input(model: Any, inputs: Any, stock: Any) -> None:
    enable(model, full(model))
    torch.manual_seed(3)
    got = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_mode="image",
                         **CALLS["greedy"])
    assert torch.equal(got, stock["greedy"])


def test_text_stays_stock(model: Any, inputs: Any) -> None:
    options = {**inputs, "max_new_tokens": 3, "do_sample": False, "generation_mode": "text"}
    before = model.generate(**options)
    enable(model, full(model))
    assert torch.equal(model.generate(**options), before)


def test_an_attached_decoder(model: Any, inputs: Any) -> None:
    """Text of the same model, its decoder attached as any other: equal with a full plan."""
    options = {**inputs, "max_new_tokens": 6, "do_sample": False, "generation_mode": "text"}
    before = model.generate(**options)
    with attached(model, "full", pictures=Raster(1, 6)) as choice:
        assert torch.equal(model.generate(**options), before)
        output = model.generate(**options, return_dict_in_generate=True)
        assert {cache.nbytes for cache in caches(model)} and torch.equal(output.sequences, before)
        assert choice.nbytes() == choice.full_nbytes()
    assert torch.equal(model.generate(**options), before)


def test_pipeline(pipe: Pipeline, model: Any, inputs: Any, stock: Any) -> None:
    prompts = ["a red circle", "two blue squares above a green star"]
    assert torch.equal(pipe.generate_tokens(prompts, guidance_scale=5.0, temperature=0), stock["greedy"])
