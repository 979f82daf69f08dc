"""Whole decoder steps, timed one by one: transformers' own picture loop, and our engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.nn import functional

from ssd_janus.engine import Engine, Sampling, StepTiming

from .contender import fill
from .ours import steady_state
from .timing import nothing

TOP_K = 50  # transformers' default; 0 draws from all codes
GUIDANCE = 5.0
Mark = tuple[float, float]  # when a step ended and when the next began: in between others may run
CACHES = ("dynamic", "static", "static, torch.compile")


@dataclass(frozen=True)
class Drawn:
    """Tokens [pictures, steps], seconds of every step after the first, and bytes that the cache holds at the end."""

    tokens: torch.Tensor
    seconds: list[float]
    cache_bytes: int


def transformers_loop(model: Any, prompts: Sequence[Sequence[int]], steps: int, kind: str, held: int = 0,
                      timing: StepTiming | None = None, sample: bool = True, top_k: int = TOP_K,
                      pause: Callable[[], None] = nothing,
                      clock: Callable[[], float] = time.perf_counter) -> Drawn:
    """``model.generate(...)`` of transformers with a cache of ``kind``.

    Args:
        prompts: token numbers of each picture, all of one length.
        steps: tokens drawn per picture.
        kind: one of `CACHES`.
        held: random tokens that are in the cache before the prompt.
        timing: takes the parts of every step.
        sample: with ``top_k`` and torch's own generator; else greedy.
        pause: called after the prompt and after every step, outside the clock.
    """
    from transformers import DynamicCache, StaticCache

    from ssd_attach.internals import CACHE_NAME, compiled
    from ssd_janus.shape import placement

    device, dtype = placement(model)
    language, config = model.model.language_model, model.model.language_model.config
    ids = torch.tensor(prompts, device=device)
    total = held + ids.shape[1] + steps
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=config, max_cache_len=total)
    if held:
        shape = (2 * len(prompts), config.num_key_value_heads, held, config.head_dim)
        for layer in range(config.num_hidden_layers):
            slabs = [torch.empty(shape, dtype=dtype, device=device) for _ in range(2)]
            for slab in slabs:
                fill(slab)
            cache.update(*slabs, layer)
    marks: list[Mark] = []
    hooks: list[Any] = []

    def watch() -> None:
        # torch.compile runs hooks, too, and cannot trace a clock.
        hooks.append(language.register_forward_pre_hook(torch.compiler.disable(mark) if "compile" in kind else mark))

    def mark(*given: Any) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        ended = clock()
        # Others find the model as it was: no hook, and its own number of tokens, which has been read by now.
        visual_tokens.close()
        hooks.pop().remove()
        if timing is not None and len(marks) > 1:
            timing.end()
        pause()
        if timing is not None and marks:  # the first forward is the prompt's
            timing.begin(device)
        if given:
            watch()
        marks.append((ended, clock()))

    with ExitStack() as stack, ExitStack() as visual_tokens:
        visual_tokens.enter_context(_visual_tokens(model, steps))
        watch()
        stack.callback(lambda: [hook.remove() for hook in hooks])
        if kind == "static, torch.compile":
            stack.enter_context(compiled(language))
        if timing is not None:
            for target, name, part in ((functional, "linear", "linear"), (cache, "update", "attention"),
                                       (functional, "scaled_dot_product_attention", "attention")):
                stack.enter_context(mock.patch.object(target, name, timing.timed(part, getattr(target, name))))
        tokens = model.generate(input_ids=ids, attention_mask=torch.ones(len(ids), held + ids.shape[1],
                                                                         dtype=torch.long, device=device),
                                **{CACHE_NAME: cache}, generation_mode="image", do_sample=sample, top_k=top_k,
                                guidance_scale=GUIDANCE)
        mark()
    size = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    return Drawn(tokens.cpu(), _seconds(marks[1:]), size)


def engine_loop(engine: Engine, prompts: Sequence[Sequence[int]], steps: int, start: int | None = None,
                timing: StepTiming | None = None, sample: bool = True, seeds: int | None = None, top_k: int = TOP_K,
                pause: Callable[[], None] = nothing, clock: Callable[[], float] = time.perf_counter) -> Drawn:
    """Our engine's steps.

    Args:
        start: visual tokens that are in the cache before the first step, random ones; None begins with the prompt.
        prompts, steps, timing, sample, top_k, pause: as in `transformers_loop`, which draws from the same random
            numbers.
        seeds: of the first picture, the others counting on: numbers of their own instead.
    """
    from ssd_janus.engine.capture import CapturedStep, can_capture

    sampling = Sampling.make(1.0, top_k=top_k) if sample else Sampling(greedy=True)
    batch = engine.batch(prompts, guidance=GUIDANCE, seeds=seeds, sampling=sampling, steps=steps, timing=timing)
    if start is not None:
        steady_state(batch.cache, len(prompts[0]), start)
    step = CapturedStep(batch) if can_capture(batch) else batch.step
    marks: list[Mark] = []

    def mark() -> None:
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
        ended = clock()
        pause()
        marks.append((ended, clock()))

    mark()
    while batch.done < steps:
        step()
        mark()
    return Drawn(batch.tokens.cpu(), _seconds(marks), batch.cache.nbytes)


def _seconds(marks: Sequence[Mark]) -> list[float]:
    return [ended - began for (_, began), (ended, _) in zip(marks, marks[1:], strict=False)]


@contextmanager
def _visual_tokens(model: Any, count: int) -> Iterator[None]:
    """Make transformers' loop, which has no such option, draw ``count`` tokens."""
    config = model.model.vision_model.config
    before, config.num_image_tokens = config.num_image_tokens, count
    try:
        yield
    finally:
        config.num_image_tokens = before
