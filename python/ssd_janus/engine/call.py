"""A ``model.generate`` call as a request to the engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ssd_attach.internals import GenerationMode, prepared_config
from ssd_kernels import CachePlan

from .engine import Engine
from .sampling import Sampling
from .saying import warn_once
from .unconditional import unconditional_prompt
from .weights import unsupported


class NotForTheEngine(Exception):
    """The call asks for something that only transformers' loop does; the message says what."""


def draw(model: Any, plan: CachePlan, backend: str, arguments: Mapping[str, Any]) -> torch.Tensor:
    """The visual tokens that ``model.generate(**arguments)`` returns, in the dtype and on the device of the input.

    Random numbers are drawn from torch's own generator in transformers' order.

    Raises:
        NotForTheEngine: before anything was drawn.
    """
    options = dict(arguments)
    options.pop("generation_mode", None)
    ids, mask = options.pop("input_ids", None), options.pop("attention_mask", None)
    if ids is None:
        ids = options.pop("inputs", None)
    if options.pop("logits_processor", None):
        raise NotForTheEngine("logits_processor is given")
    if ids is None or mask is None or ids.dim() != 2 or mask.shape != ids.shape:
        raise NotForTheEngine("input_ids and attention_mask are not two matrices of one shape")
    reason = unsupported(model)
    if reason is not None:
        raise NotForTheEngine(reason)
    options.pop("pixel_values", None)  # of which drawing makes no use
    config, others = prepared_config(model, options.pop("generation_config", None),
                                     **{name: value for name, value in options.items() if value is not None})
    if others:
        raise NotForTheEngine(f"{', '.join(sorted(others))} is given")
    if config.get_generation_mode() not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
        raise NotForTheEngine(f"the generation mode is {config.get_generation_mode().value}")
    if config.return_dict_in_generate:
        raise NotForTheEngine("return_dict_in_generate is set")
    config.validate()
    scale = 5.0 if config.guidance_scale is None else config.guidance_scale
    try:
        sampling = Sampling.of_config(model, config)
        if scale > 1:
            unconditional_prompt(config, ())
    except ValueError as error:
        raise NotForTheEngine(str(error)) from None
    real = mask.bool()
    if not bool(real[:, -1].all()) or bool((real.int().diff(dim=1) < 0).any()):
        raise NotForTheEngine("attention_mask has zeros after the first token of a prompt")
    engine = Engine(model, plan, backend=backend)
    limit = model.model.language_model.config.max_position_embeddings - engine.shape.num_visual_tokens
    if int(real.sum(1).max()) > limit:
        raise NotForTheEngine(f"a prompt is longer than {limit} tokens")
    prompts = [row[kept].tolist() for row, kept in zip(ids, real, strict=True)
               for _ in range(config.num_return_sequences or 1)]
    return engine.generate(prompts, guidance=scale, seeds=None, sampling=sampling, generation_config=config).to(ids)


def say_once(reason: str) -> None:
    """Tell why transformers' loop runs instead of the engine, the first time for every reason."""
    warn_once(f"transformers' own loop draws, not the engine: {reason}")
