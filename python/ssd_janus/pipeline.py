"""`Pipeline`: prompts in, pictures out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from safetensors import SafetensorError
from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    LogitsProcessor,
    LogitsProcessorList,
)

from ssd_attach.cache import DecoderCache, Observer
from ssd_attach.coupling import Coupling
from ssd_attach.internals import CACHE_NAME
from ssd_attach.online import check_observer
from ssd_kernels import CachePlan
from ssd_kernels.reading import shown

from . import hooks, official
from .checkpoints import included_model
from .checks import check_number, check_prompts, sampling_options
from .engine import Engine, MemoryReport, Sampling, call, decode, unsupported
from .engine.sampling import SampledByPicture
from .images import to_pictures
from .loading import PictureJanus
from .progress import ProgressCallback, progress_bar
from .shape import ModelShape, placement
from .waiting import StepWatch

Preview = Callable[[Sequence[int], list[Image]], Any]


@dataclass(frozen=True)
class RunStats:
    """What a run of a `Pipeline` took.

    Attributes:
        pictures: drawn in all.
        steps: visual tokens per picture.
        rows: batch rows of the largest batch; with guidance two per picture.
        seconds: drawing the tokens; ``decode_seconds``: turning them into pixels (0 when not asked for).
        budget: of the plan, as `CachePlan.budget` counts it.
        cache_bytes: allocated by the largest batch, and ``full_cache_bytes``: what keeping every token would take.
        backend: that computed the steps.
    """

    pictures: int
    steps: int
    rows: int
    seconds: float
    decode_seconds: float
    budget: float
    cache_bytes: int
    full_cache_bytes: int
    backend: str

    @property
    def pictures_per_second(self) -> float:
        return self.pictures / (self.seconds + self.decode_seconds)


class Pipeline:
    """A Janus model with its processor. Several threads may draw with one pipeline at a time.

    Attributes:
        model, processor: transformers' own, in evaluation mode.
        shape: the sizes that plans for this model need.
        backend: ``"auto"`` or a backend of `ssd_kernels`.
        last_run: statistics of the call that ended last, None before the first.
    """

    def __init__(self, model: JanusForConditionalGeneration, processor: JanusProcessor,
                 backend: str = "auto") -> None:
        self.model = model
        self.processor = processor
        self.backend = backend
        self.shape = ModelShape.of(model)
        self.last_run: RunStats | None = None
        self._engine: Engine | None = None  # of the last run

    @property
    def device(self) -> torch.device:
        """Where tokens are drawn: the language model's."""
        return placement(self.model)[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the language model and the caches."""
        return placement(self.model)[1]

    @classmethod
    def from_pretrained(cls, source: str | PathLike[str] | None = None, *, device: torch.device | str = "cpu",
                        dtype: torch.dtype | str | None = None, backend: str = "auto") -> Pipeline:
        """Load a checkpoint.

        Args:
            source: a folder, or a hub id such as ``"deepseek-community/Janus-Pro-1B"``, in the layout of transformers
                or of DeepSeek (``"deepseek-ai/Janus-Pro-1B"``); None for the small model that ships with the package.
                Folders are read without touching the network.
            device: where to run.
            dtype: of weights and caches; None for float32 on a CPU and the checkpoint's own elsewhere.
            backend: as in `enable`.

        What drawing does not use, the vision tower and the text head, is not loaded (`PictureJanus`); a model that was
        loaded as a whole goes to the constructor.

        Raises:
            FileNotFoundError: no such folder, or the package came without its model.
            OSError: the hub id cannot be loaded.
            ValueError: the device is not there, or the checkpoint is no Janus, or incomplete or damaged.
        """
        source = included_model() if source is None else fspath(source)
        local = Path(source).is_dir()
        if not local and (source.startswith((".", "/", "~")) or source.count("/") > 1):
            raise FileNotFoundError(f"model must be a folder or a hub id, got {source!r}, which is no folder")
        try:
            target = torch.device(device)
        except RuntimeError:
            raise ValueError(f"device must be cpu, cuda or cuda:N, got {shown(device)}") from None
        if target.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device must be cpu on this machine, where torch sees no GPU, got {device}")
        if dtype is None:
            dtype = torch.float32 if target.type == "cpu" else "auto"
        config = JanusConfig.get_config_dict(source, local_files_only=local)[0]
        if official.is_official_config(config):
            model, processor = official.load(source if local else official.download(source), dtype,
                                             None if local else source)
            return cls(model.to(target), processor, backend)
        _check_kind(source, config.get("model_type"))
        processor = JanusProcessor.from_pretrained(source, local_files_only=local)
        try:
            model = PictureJanus.from_pretrained(source, local_files_only=local, dtype=dtype)
        except SafetensorError as error:
            raise ValueError(f"the weights of model {source} are damaged ({error}); download them again") from None
        return cls(model.to(target).eval(), processor, backend)

    def __call__(self, prompts: Sequence[str] | str, num_images_per_prompt: int = 1,
                 guidance_scale: float | None = None, seed: int = 0, plan: CachePlan | None = None, *,
                 temperature: float | None = None, top_k: int | None = None, top_p: float | None = None,
                 batch_size: int | None = None, progress: bool | ProgressCallback = False,
                 preview: Preview | None = None) -> list[Image]:
        """Draw pictures, ``num_images_per_prompt`` for the first prompt, then for the second, and so on.

        Args: as `generate_tokens`.
        """
        tokens, run = self._draw(prompts, num_images_per_prompt, guidance_scale, seed, plan, temperature, top_k, top_p,
                                 batch_size, progress, preview)
        began = time.perf_counter()
        pictures = self.decode(tokens)
        self.last_run = replace(run, decode_seconds=time.perf_counter() - began)
        return pictures

    def generate_tokens(self, prompts: Sequence[str] | str, num_images_per_prompt: int = 1,
                        guidance_scale: float | None = None, seed: int = 0, plan: CachePlan | None = None, *,
                        temperature: float | None = None, top_k: int | None = None, top_p: float | None = None,
                        batch_size: int | None = None, progress: bool | ProgressCallback = False,
                        preview: Preview | None = None, logits_processor: Sequence[LogitsProcessor] = (),
                        observer: Observer | None = None) -> torch.Tensor:
        """The visual tokens of the pictures that a call with the same arguments draws.

        Args:
            prompts: one or more texts.
            num_images_per_prompt: pictures of each.
            guidance_scale: strength of classifier-free guidance; up to 1 it is off and a picture takes one batch row
                instead of two. None for the model's default.
            seed: of the first picture; the following ones have ``seed + 1`` and so on. The same prompt, seed and plan
                give the same picture in every batch (docs/engine.md, "Seeds", says where rounding interferes).
            plan: what the caches keep. None keeps everything, or follows `enable` if the model is enabled.
            temperature: 0 takes the likeliest token each time; None for the model's default.
            top_k, top_p: restrict sampling; 0 and 1 do not. None for the model's defaults (transformers' top_k is 50).
            batch_size: most pictures drawn at once; None for all. Fewer are drawn at once where more do not fit.
            progress: True for a progress bar on stderr, or ``progress(done_steps, all_steps)``.
            preview: called as ``preview(numbers, pictures)`` when a grid row is complete, with the finished rows of the
                pictures that are being drawn. Decoding them takes time.
            logits_processor: called at every step with the logits before guidance, [2 * pictures, codes], the
                conditional rows first (without guidance [pictures, codes]).
            observer: watches the attention; needs a plan.

        Returns:
            Long tensor [pictures, visual tokens] on the CPU.

        Raises:
            TypeError, ValueError: an argument is wrong.
        """
        tokens, self.last_run = self._draw(
            prompts, num_images_per_prompt, guidance_scale, seed, plan, temperature, top_k, top_p, batch_size, progress,
            preview, logits_processor, observer)
        return tokens

    def _draw(self, prompts: Sequence[str] | str, num_images_per_prompt: int, guidance_scale: float | None, seed: int,
              plan: CachePlan | None, temperature: float | None, top_k: int | None, top_p: float | None,
              batch_size: int | None, progress: bool | ProgressCallback, preview: Preview | None,
              logits_processor: Sequence[LogitsProcessor] = (), observer: Observer | None = None
              ) -> tuple[torch.Tensor, RunStats]:
        """As `generate_tokens`."""
        if observer is not None and plan is None:
            raise ValueError("observer needs a plan, got plan=None")
        prompts = check_prompts(prompts)
        check_number("num_images_per_prompt", num_images_per_prompt, int, 1)
        check_number("seed", seed, int, 0)
        guidance = self.guidance(guidance_scale)
        options = sampling_options(temperature, top_k, top_p)
        texts = [text for text in self._texts(prompts) for _ in range(num_images_per_prompt)]
        if batch_size is not None:
            check_number("batch_size", batch_size, int, 1)
        plan, backend = self._plan(plan)
        check_observer(plan, observer)
        reason = unsupported(self.model)
        try:
            sampling = Sampling.of(self.model, **options)
        except ValueError as error:
            reason = str(error)
        with _step_reports(progress) as report:
            if reason is not None:
                call.say_once(reason)
                return self._with_transformers(texts, guidance, seed, plan, backend, options,
                                               batch_size, report, logits_processor, observer)
            engine = Engine(self.model, plan, backend=backend)
            tokens = engine.generate(
                self._token_lists(texts), guidance=guidance, seeds=seed, sampling=sampling,
                batch_size=batch_size, progress=report, observer=observer, logits_processor=logits_processor,
                on_row=None if preview is None else lambda numbers, part: preview(numbers, self.decode(part)))
        run, self._engine = engine.last_run, engine
        assert run is not None
        return tokens, self._stats(plan, engine.dtype, backend=run.backend, pictures=run.pictures, rows=run.rows,
                                   seconds=run.seconds, cache_bytes=run.cache_bytes, max_prompt=run.max_prompt)

    def guidance(self, guidance_scale: float | None = None) -> float:
        """The guidance scale that a call with this argument draws with: None is the model's default.

        Raises:
            TypeError, ValueError: no number of at least 0.
        """
        if guidance_scale is not None:
            check_number("guidance_scale", guidance_scale, float, 0)
        if guidance_scale is None:
            guidance_scale = self.model.generation_config.guidance_scale
        return 5.0 if guidance_scale is None else float(guidance_scale)  # transformers' own default

    def prompt_tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token numbers of every prompt as the model reads it, begin-of-image included, without padding."""
        return self._token_lists(self._texts(prompts))

    def decode(self, tokens: torch.Tensor) -> list[Image]:
        """Pictures of visual tokens [N, visual tokens], or of their first grid rows; as many at once as fit."""
        pixels = decode(self.model, tokens)
        return [picture for part in pixels for picture in to_pictures(part)]

    def memory_report(self) -> MemoryReport:
        """What the last run took: weights, cache, decoding.

        Raises:
            RuntimeError: nothing has been drawn, or the last run was not the engine's.
        """
        if self._engine is None:
            raise RuntimeError("the pipeline has drawn nothing, or not with the engine, the last time")
        return self._engine.memory_report()

    def _plan(self, plan: CachePlan | None) -> tuple[CachePlan, str]:
        """The plan and backend in force."""
        if plan is not None:
            return self.shape.check(plan), self.backend
        return hooks.in_force(self.model) or (self.shape.full_plan(), self.backend)

    def _with_transformers(self, texts: list[str], guidance: float, seed: int, plan: CachePlan, backend: str,
                           options: dict[str, Any], batch_size: int | None, report: ProgressCallback,
                           logits_processor: Sequence[LogitsProcessor], observer: Observer | None
                           ) -> tuple[torch.Tensor, RunStats]:
        """As `_draw`, for models and sampling that the engine does not know."""
        self._engine = None
        size = batch_size or len(texts)
        batches = [texts[first:first + size] for first in range(0, len(texts), size)]
        step = _Step(report, self.shape.num_visual_tokens * len(batches))
        tokens, runs = [], []
        for number, batch in enumerate(batches):
            began, first = time.perf_counter(), seed + number * size
            coupling = Coupling(plan, self.shape.num_visual_tokens, backend)
            cache = DecoderCache(coupling.generation(observer, guided=guidance > 1, watch=StepWatch()))
            sampled = SampledByPicture(self.model, guidance, range(first, first + len(batch)), **options)
            inputs = self._tokenise(batch)
            with hooks.drawing(self.model, coupling, cache):
                tokens.append(type(self.model).generate(
                    self.model, **inputs, **{CACHE_NAME: cache}, generation_mode="image", do_sample=False,
                    guidance_scale=1.0, num_return_sequences=1, return_dict_in_generate=False,
                    logits_processor=LogitsProcessorList([step, *logits_processor, sampled])).cpu())
            held = cache.compressed
            assert held is not None
            runs.append(self._stats(plan, held.dtype, backend=held.backend, pictures=len(batch), rows=held.batch_size,
                                    seconds=time.perf_counter() - began, cache_bytes=held.nbytes,
                                    max_prompt=held.max_prompt))
            # Otherwise the next batch's cache would be made while this one still holds its memory.
            cache.release()
            del held
        largest = max(runs, key=lambda run: run.cache_bytes)
        return torch.cat(tokens), replace(largest, pictures=len(texts), seconds=sum(run.seconds for run in runs))

    def _texts(self, prompts: Sequence[str]) -> Any:
        """The prompts in the checkpoint's chat format, where it has one."""
        if not self.processor.chat_template:
            return list(prompts)
        chats = [[{"role": "user", "content": [{"type": "text", "text": prompt}]}] for prompt in prompts]
        return self.processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)

    def _tokenise(self, texts: list[str]) -> dict[str, torch.Tensor]:
        inputs = self.processor(text=texts, generation_mode="image", padding=True, padding_side="left",
                                return_tensors="pt")
        longest = int(inputs["attention_mask"].sum(1).argmax())
        limit = self.model.model.language_model.config.max_position_embeddings - self.shape.num_visual_tokens
        if inputs["input_ids"].shape[1] > limit:
            raise ValueError(f"prompts must be at most {limit} tokens long for this model, got one of "
                             f"{inputs['input_ids'].shape[1]}: {texts[longest][:60]!r}")
        return {name: inputs[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def _token_lists(self, texts: list[str]) -> list[list[int]]:
        inputs = self._tokenise(texts)
        return [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"],
                                                               strict=True)]

    def _stats(self, plan: CachePlan, dtype: torch.dtype, max_prompt: int, **facts: Any) -> RunStats:
        steps = self.shape.num_visual_tokens
        full = self.shape.full_plan().nbytes(
            batch_size=facts["rows"], head_dim=self.shape.head_dim, max_prompt=max_prompt, dtype=dtype,
            num_visual_tokens=steps)
        return RunStats(steps=steps, decode_seconds=0.0, budget=plan.budget(steps), full_cache_bytes=full, **facts)


class _Step(LogitsProcessor):
    """Leaves the logits alone and says that a step has been taken."""

    def __init__(self, callback: ProgressCallback, total: int) -> None:
        self.callback, self.total, self.done = callback, total, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.done += 1
        self.callback(self.done, self.total)
        return scores


@contextmanager
def _step_reports(progress: bool | ProgressCallback) -> Iterator[ProgressCallback]:
    """What reports the steps of a run, whatever ``progress`` asks for."""
    if not isinstance(progress, bool) and not callable(progress):
        raise TypeError(f"progress must be a bool or a function of (done, total), got {progress!r}")
    if progress is True:
        with progress_bar("drawing") as callback:
            yield callback
    else:
        yield progress or (lambda done, total: None)


def _check_kind(source: str, kind: object) -> None:
    if kind != JanusConfig.model_type:
        raise ValueError(f"model must be a Janus (model_type {JanusConfig.model_type!r} or {official.MODEL_TYPE!r} in "
                         f"config.json), got {source} with model_type {kind!r}")
