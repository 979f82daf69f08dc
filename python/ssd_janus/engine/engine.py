"""`Engine`: prompts in, visual tokens out, in batches that fit."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig

from ssd_attach.cache import Observer
from ssd_attach.online import OnlinePlan, check_observer
from ssd_kernels import CachePlan, CompressedCache
from ssd_kernels.linear import unsupported

from .. import waiting
from ..progress import ProgressCallback
from ..quantization import has_quantized_weights
from ..shape import ModelShape, placement
from . import continuous, memory
from .batch import Batch, LogitsProcessor
from .capture import CapturedStep, can_capture
from .decoding import DECODE_CHUNK, decode
from .layers import ROW_MULTIPLE
from .linear import has_amx, most_rows
from .memory import MemoryReport
from .rollout import Rollout, rollout
from .sampling import Sampling, noise_for
from .slots import Slots
from .timing import StepTiming
from .unconditional import unconditional_prompt
from .weights import Weights

_logger = logging.getLogger("ssd_janus")
RowCallback = Callable[[Sequence[int], torch.Tensor], Any]


@dataclass(frozen=True)
class EngineRun:
    """What the last `Engine.generate` took.

    Attributes:
        pictures: drawn in all; ``steps``: tokens of each.
        rows: of the largest batch.
        batches: pictures of each batch.
        seconds: in all.
        max_prompt: tokens of the longest prompt in the largest batch.
        cache_bytes: of the largest batch.
        backend: that computed the attention.
        device_peak: most bytes allocated on a CUDA device, weights included; None on a CPU.
    """

    pictures: int
    steps: int
    rows: int
    batches: tuple[int, ...]
    seconds: float
    max_prompt: int
    cache_bytes: int
    backend: str
    device_peak: int | None


@dataclass
class _Request:
    """The pictures of one `Engine.generate` and how to draw them."""

    prompts: list[list[int]]
    guidance: list[float]
    seeds: list[int] | None
    steps: int
    sampling: Sampling
    config: GenerationConfig
    observer: Observer | None
    logits_processor: Sequence[LogitsProcessor]
    timing: StepTiming | None
    on_row: RowCallback | None
    step_done: Callable[[], None] = field(default=lambda: None)

    def different(self, size: int) -> int:
        """Most prompts that differ among the rows of a batch, of batches of ``size`` pictures in their order."""
        rows = [(tuple(prompt), tuple(unconditional_prompt(self.config, prompt)) if scale > 1 else None)
                for prompt, scale in zip(self.prompts, self.guidance, strict=True)]
        return max(len({prompt for both in rows[first:first + size] for prompt in both if prompt is not None})
                   for first in range(0, len(rows), size))

    @property
    def watched(self) -> bool:
        """By something that may remember earlier steps, and so must see one batch, once."""
        return self.observer is not None or bool(self.logits_processor)


class Engine:
    """Draws pictures with the weights of a transformers Janus.

    Attributes:
        model, plan, backend, shape: as given, and the model's sizes.
        device, dtype: of the language model and the cache.
        exact, products: as decided.
        last_run: statistics of the last call, None before the first.
    """

    def __init__(self, model: Any, plan: CachePlan | None = None, *, backend: str = "auto", exact: bool | None = None,
                 products: str = "auto", compile: bool = False, capture: bool = True) -> None:
        """
        Args:
            model: transformers' ``JanusForConditionalGeneration``, which stays usable as it is: see `Weights`.
            plan: what the caches keep; None keeps everything.
            backend: ``"auto"`` or a backend of `ssd_kernels`.
            exact: give a picture the same tokens in every batch, bit for bit; None does so on a CPU in float32, and in
                half precision with our kernel's products, but not where the processor has AMX, which many rows gain by;
                nor where torchao multiplies with its weights.
            products: with weights, by ``"torch"`` (of quantized ones by torchao) or by our ``"kernel"``
                (`ssd_kernels.linear`); ``"auto"`` takes the kernel wherever it can: on a CPU, not with ``compile``, and
                of quantized weights with int8 only.
            compile: run what lies between two attentions through torch.compile (a minute of compilation, once).
            capture: on CUDA, replay the step as a graph.

        Raises:
            TypeError, ValueError: the plan does not fit, or the engine cannot run this model; the message says why.
        """
        self.model = model
        self.shape = ModelShape.of(model)
        self.plan = self.shape.full_plan() if plan is None else self.shape.check(plan)
        self.backend, self.compile, self.capture = backend, compile, capture
        weights = Weights.of(model, 1)
        self.device, self.dtype = placement(model)
        reason = ("torchao multiplies with weights in its other formats than int8" if weights.torchao_multiplies else
                  "torch.compile compiles torch's products only" if compile else unsupported(self.device, self.dtype))
        self.products = _products(products, reason)
        if self.products == "kernel":
            certain = self.dtype == torch.float32 or not has_amx()
        else:
            certain = self.dtype == torch.float32 and not has_quantized_weights(model.model)
        self.exact = self.device.type == "cpu" and certain if exact is None else exact
        self.last_run: EngineRun | None = None

    def generate(self, prompts: Sequence[Sequence[int] | torch.Tensor], *, guidance: float | Sequence[float] = 5.0,
                 seeds: int | Sequence[int] | None = 0, sampling: Sampling | None = None,
                 batch_size: int | None = None, steps: int | None = None, observer: Observer | None = None,
                 logits_processor: Sequence[LogitsProcessor] = (), timing: StepTiming | None = None,
                 progress: ProgressCallback | None = None, on_row: RowCallback | None = None,
                 generation_config: GenerationConfig | None = None) -> torch.Tensor:
        """Draw one picture per prompt.

        Args:
            prompts: token numbers of each, begin-of-image included, without padding; lengths may differ.
            guidance: scale of classifier-free guidance, one for all or one per picture; up to 1 a picture is drawn
                without, from one row instead of two.
            seeds: one per picture, or the first picture's, the others counting on; None draws from torch's own
                generator, in transformers' order.
            sampling: None for the full distribution (`Sampling.make`).
            batch_size: most pictures drawn at once; None for all. Where more do not fit into memory, fewer are, but
                never with an observer or logits processors, which would mistake a second batch for more steps.
            steps: tokens per picture; None for whole pictures.
            observer: watches the attention; None under an online plan, which brings its own.
            logits_processor: called at every step with (tokens, logits before guidance [rows, codes]), the conditional
                rows first; returns logits.
            timing: takes the time of every step.
            progress: ``progress(done_steps, all_steps)``.
            on_row: called when a row of the grid is complete, with the numbers of the batch's pictures and their tokens
                so far [pictures, tokens] on the CPU.
            generation_config: names the tokens of `unconditional_prompt`; None for the model's.

        Returns:
            long [pictures, steps] on the CPU.

        Raises:
            TypeError, ValueError: an argument is wrong; nothing has been drawn then.
            MemoryError: with an observer or logits processors; without, the batch is halved once.
        """
        request = self._request(prompts, guidance, seeds, steps, sampling, generation_config)
        check_observer(self.plan, observer)
        request.observer, request.logits_processor = observer, logits_processor
        request.timing, request.on_row = timing, on_row
        count = len(request.prompts)
        size = count if batch_size is None else min(count, _positive("batch_size", batch_size))
        size = self._fitting(request, size)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        began, done, first, halved = time.perf_counter(), 0, 0, False
        tokens: list[torch.Tensor] = []
        runs: list[EngineRun] = []
        while first < count:
            numbers = range(first, min(first + size, count))
            base, total = done, done + request.steps * math.ceil((count - first) / size)

            def report(base: int = base, total: int = total) -> None:
                nonlocal done
                done += 1
                if progress is not None:
                    progress(done, total)

            request.step_done = report
            drawn = self._draw_or_none(request, numbers, last_try=halved or len(numbers) == 1)
            if drawn is None:
                halved, done, size = True, base, (len(numbers) + 1) // 2
                _logger.warning("out of memory with %d pictures at once; going on with %d", len(numbers), size)
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            tokens.append(drawn[0])
            runs.append(drawn[1])
            first = numbers.stop
        largest = max(runs, key=lambda run: run.cache_bytes)
        self.last_run = EngineRun(
            pictures=count, steps=request.steps, rows=largest.rows, batches=tuple(run.pictures for run in runs),
            seconds=time.perf_counter() - began, max_prompt=largest.max_prompt, cache_bytes=largest.cache_bytes,
            backend=largest.backend, device_peak=None if self.device.type != "cuda"
            else torch.cuda.max_memory_allocated(self.device))
        return torch.cat(tokens)

    @property
    def row_multiple(self) -> int:
        """To a multiple of which the rows of every product are padded."""
        return ROW_MULTIPLE if self.exact and self.products == "torch" else 1

    def weights(self, positions: int) -> Weights:
        """The model's, as they are now, for drawing rows of up to so many tokens, prompt included."""
        return Weights.of(self.model, positions).prepared(self.products == "kernel",
                                                          most_rows(self.dtype, self.exact, has_amx()))

    def slots(self, capacity: int, *, max_prompt: int | None = None, steps: int | None = None,
              any_plan: bool = False) -> Slots:
        """Room for ``capacity`` pictures that join and leave while others are drawn; see `continuous.slots`."""
        return continuous.slots(self, capacity, max_prompt, steps, any_plan)

    def rollout(self, prompts: Sequence[Sequence[int] | torch.Tensor], samples: int = 1,
                seeds: int | Sequence[int] | None = 0, **options: Any) -> Rollout:
        """Samples of prompts with the log-probabilities of their tokens, for training; see `rollout.rollout`."""
        return rollout(self, prompts, samples, seeds, **options)

    def decode(self, tokens: torch.Tensor, chunk: int | None = None) -> Iterator[torch.Tensor]:
        """Pixels of visual tokens, chunk by chunk; see `decoding.decode`."""
        return decode(self.model, tokens, chunk)

    def memory_report(self) -> MemoryReport:
        """Of the last `generate`, and of decoding its pictures.

        Raises:
            RuntimeError: nothing has been drawn.
        """
        run = self.last_run
        if run is None:
            raise RuntimeError("the engine has drawn nothing")
        pictures = max(run.batches)
        return MemoryReport(
            weights=memory.weight_bytes(self.model), cache=run.cache_bytes,
            step=memory.step_bytes(self.model, pictures, run.rows, run.max_prompt),
            decode=memory.decode_bytes(self.model, min(pictures, DECODE_CHUNK)), device_peak=run.device_peak)

    def max_batch(self, memory_bytes: int | None = None, *, guided: bool = True, max_prompt: int = 64,
                  samples: int = 1) -> int:
        """Most pictures at once (`memory.max_batch`) in ``memory_bytes``; None for what is available.

        ``samples``: pictures of each prompt, which hold it once.
        """
        _positive("samples", samples)
        return self._room(memory_bytes, guided, max_prompt, lambda size: -(-size // samples) * (1 + guided))

    def _room(self, memory_bytes: int | None, guided: bool, max_prompt: int, different: Callable[[int], int]) -> int:
        if memory_bytes is None:
            free = memory.available_memory(self.device)
            memory_bytes = int(free * memory.USABLE_SHARE) + memory.weight_bytes(self.model)
        return memory.max_batch(self.plan, self.model, memory_bytes, guided=guided, max_prompt=max_prompt,
                                different=different)

    def batch(self, prompts: Sequence[Sequence[int] | torch.Tensor], *, guidance: float | Sequence[float] = 5.0,
              seeds: int | Sequence[int] | None = 0, sampling: Sampling | None = None, steps: int | None = None,
              timing: StepTiming | None = None) -> Batch:
        """A batch with its prompts done and its first tokens drawn, for who wants to call `Batch.step` on his own.

        Args: as `generate`. Pictures with guidance come first.
        """
        request = self._request(prompts, guidance, seeds, steps, sampling, None)
        request.timing = timing
        return self._started(request, sorted(range(len(request.prompts)), key=lambda i: request.guidance[i] <= 1))

    def _request(self, prompts: Sequence[Sequence[int] | torch.Tensor], guidance: float | Sequence[float],
                 seeds: int | Sequence[int] | None, steps: int | None, sampling: Sampling | None,
                 generation_config: GenerationConfig | None) -> _Request:
        texts = [prompt.tolist() if isinstance(prompt, torch.Tensor) else [int(token) for token in prompt]
                 for prompt in prompts]
        if not texts:
            raise ValueError("prompts must hold at least one prompt, got none")
        config = self.model.model.language_model.config
        limit = config.max_position_embeddings - self.shape.num_visual_tokens
        for index, text in enumerate(texts):
            if not 1 <= len(text) <= limit:
                raise ValueError(f"prompts[{index}] must be 1 .. {limit} tokens long, got {len(text)}")
            if not all(0 <= token < config.vocab_size for token in text):
                raise ValueError(f"prompts[{index}] must hold tokens within 0 .. {config.vocab_size - 1}")
        scales = [guidance] * len(texts) if isinstance(guidance, (int, float)) else list(guidance)
        if len(scales) != len(texts):
            raise ValueError(f"guidance must be one number or {len(texts)}, got {len(scales)}")
        for scale in scales:
            if not math.isfinite(scale):
                raise ValueError(f"guidance must be finite, got {scale}")
        tokens = self.model.generation_config if generation_config is None else generation_config
        if any(scale > 1 for scale in scales):
            unconditional_prompt(tokens, ())
        numbers = [seeds + index for index in range(len(texts))] if isinstance(seeds, int) else seeds
        if numbers is not None and len(numbers) != len(texts):
            raise ValueError(f"seeds must be one number or {len(texts)}, got {len(numbers)}")
        for seed in () if numbers is None else numbers:
            if not -2**63 <= seed < 2**64:  # as torch's generators take them
                raise ValueError(f"seeds must be within -2^63 .. 2^64 - 1, got {seed}")
        whole = self.shape.num_visual_tokens
        if steps is not None and not 1 <= steps <= whole:
            raise ValueError(f"steps must be within 1 .. {whole}, got {steps}")
        return _Request(texts, [float(scale) for scale in scales], None if numbers is None else list(numbers),
                        whole if steps is None else steps, sampling or Sampling(), tokens, None, (), None, None)

    def _fitting(self, request: _Request, size: int) -> int:
        """Pictures at once, up to ``size``, that fit into what memory there is, at least 1."""
        guided = any(scale > 1 for scale in request.guidance)
        room = max(1, self._room(None, guided, max(map(len, request.prompts)), request.different))
        if room >= size:
            return size
        if request.watched:
            raise ValueError(f"batch_size must be at most {room} with an observer or logits processors, got {size} "
                             f"pictures at once: {room} fit into memory, and watched pictures are not split")
        _logger.warning("%d pictures do not fit into memory at once; drawing %d at once", size, room)
        return room

    def _draw_or_none(self, request: _Request, numbers: range, last_try: bool) -> tuple[torch.Tensor, EngineRun] | None:
        """The tokens of some pictures; None when memory ran out. By then, all that the attempt held is free."""
        try:
            return self._draw(request, numbers)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            if request.watched:
                raise MemoryError(f"out of memory with {len(numbers)} pictures at once, which an observer or logits "
                                  f"processors watch and which are not split; choose a smaller batch_size") from error
            if last_try:
                raise
            return None

    def _draw(self, request: _Request, numbers: range) -> tuple[torch.Tensor, EngineRun]:
        order = sorted(numbers, key=lambda index: request.guidance[index] <= 1)
        back = torch.tensor(order).argsort()
        batch = self._started(request, order)
        for _ in self._steps(batch, request.steps):
            request.step_done()
            self._report_row(request, batch, numbers, back)
        run = EngineRun(len(numbers), request.steps, batch.rows, (len(numbers),), 0.0, batch.cache.max_prompt,
                        batch.cache.nbytes, batch.cache.backend, None)
        return batch.tokens.cpu()[back], run

    def _steps(self, batch: Batch, count: int) -> Iterator[None]:
        """Draw a started batch, whose first tokens are there, up to ``count`` tokens a picture."""
        yield
        step: Callable[[], None] = batch.step
        if self.device.type == "cpu":
            step = waiting.watched(step)
        while batch.done < count:
            if self.capture and not isinstance(step, CapturedStep) and can_capture(batch):
                step = CapturedStep(batch)
            step()
            yield

    def _started(self, request: _Request, order: Sequence[int]) -> Batch:
        """A batch of the pictures ``order``, guided ones first, after its prompts."""
        prompts, guidance = [request.prompts[i] for i in order], [request.guidance[i] for i in order]
        guided = sum(scale > 1 for scale in guidance)
        prompts += [unconditional_prompt(request.config, prompt) for prompt in prompts[:guided]]
        longest = max(map(len, prompts))
        weights = self.weights(longest + self.shape.num_visual_tokens)
        different = len({tuple(prompt) for prompt in prompts})
        cache = CompressedCache(self.plan, len(prompts), self.shape.num_query_heads, self.shape.head_dim, longest,
                                self.shape.num_visual_tokens, self.dtype, weights.device, self.backend,
                                shared_prompts=memory.shared_prompts(self.plan, len(prompts), different))
        cache.warmup(rotary=True)
        seeds = None if request.seeds is None else [request.seeds[i] for i in order]
        noise = None if request.sampling.greedy else noise_for(len(order), weights.codes, seeds, weights.device)
        observer = self.plan.observer() if isinstance(self.plan, OnlinePlan) else request.observer
        batch = Batch(weights, cache, guidance, request.steps, request.sampling, noise, row_multiple=self.row_multiple,
                      compiled=self.compile, observer=observer, logits_processor=request.logits_processor,
                      timing=request.timing)
        batch.start(prompts)
        return batch

    def _report_row(self, request: _Request, batch: Batch, numbers: range, back: torch.Tensor) -> None:
        if request.on_row is not None and batch.done % self.shape.columns == 0:
            request.on_row(numbers, batch.tokens[:, :batch.done].cpu()[back])


def _products(wanted: str, reason: str | None) -> str:
    """Who multiplies with weights, "kernel" or "torch", as `Engine` describes it; ``reason``: against the kernel."""
    if wanted not in ("auto", "kernel", "torch"):
        raise ValueError(f"products must be 'auto', 'kernel' or 'torch', got {wanted!r}")
    if wanted == "kernel" and reason:
        raise ValueError(f"products must be 'auto' or 'torch' here, got 'kernel': {reason}")
    return "torch" if reason or wanted == "torch" else "kernel"


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def _out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had too little memory; torch raises a plain RuntimeError on a CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
