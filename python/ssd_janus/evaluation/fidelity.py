"""How close a model with a compressed cache stays to itself with the full cache; works with any weights.

Tokens are drawn with the full cache. The same tokens are then forced on the model with the compressed cache, so that
every step compares two next-token distributions after the same past, and not two pictures that went apart long ago.
"""

from __future__ import annotations

import io
import math
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from transformers import LogitsProcessor

from ssd_kernels import CachePlan, CompressedCache
from ssd_kernels.reading import naming, read_bytes

from ..engine import available_memory
from ..extras import needs
from ..files import write_atomically
from ..images import file_names, save_picture
from ..pipeline import Pipeline
from ..progress import ProgressCallback
from ..ranks import ALONE, Ranks
from .folder import Batch, RunFolder, check_pictures, settings
from .statistics import Interval, mean_interval

FORBIDDEN = -1e4  # a logit; finite, because guidance subtracts logits
ROOM = 1024  # bytes that a file of figures takes for each of them besides the values, at most
# What zipfile and numpy raise, besides ValueError, for files that are none of theirs.
DAMAGED = (zipfile.BadZipFile, KeyError, EOFError, OSError, NotImplementedError, RuntimeError, SyntaxError, MemoryError,
           OverflowError, tokenize.TokenError, zlib.error)


@dataclass(frozen=True)
class Fidelity:
    """What a plan changes, over all pictures.

    Attributes:
        kl_mean, kl_p99: KL(full || compressed) of the guided next-token distribution at temperature 1, nats per token.
        kl_interval: 95% interval of kl_mean over prompts; None for fewer than `statistics.FEWEST`.
        kl_by_picture: mean KL of each picture, in the prompts' order.
        kl_by_row: mean KL of each row of the picture, top first.
        agreement: share of tokens where both distributions have the same most probable token.
        head_error: per layer and KV head, |out - out_full| / |out_full| of the attention output (root of summed
            squares over all steps), for the same queries: each head's own loss, nothing inherited from layers below.
        psnr_db: of freely drawn pictures against the full cache's of the same seed; None if all are equal or none were
            drawn.
        ssim: likewise, mean over pictures; 1 is equal, None if none were drawn.
        pictures: measured.
        budget: of the plan.
    """

    kl_mean: float
    kl_p99: float
    kl_interval: Interval | None
    kl_by_picture: list[float]
    kl_by_row: list[float]
    agreement: float
    head_error: list[list[float]]
    psnr_db: float | None
    ssim: float | None
    pictures: int
    budget: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Recorder(LogitsProcessor):
    """Keeps the guided log-probabilities of every step, and may force the tokens of a given picture.

    Attributes:
        steps: per step, log-probabilities [pictures, codes], float32.
    """

    def __init__(self, guidance_scale: float, forced: torch.Tensor | None = None) -> None:
        """
        Args:
            guidance_scale: the run's; above 1 the logits have conditional rows first, then as many unconditional ones.
            forced: tokens [pictures, steps] that the run must take; None leaves the choice to it.
        """
        self.guidance_scale, self.forced = guidance_scale, forced
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logits = scores.float().log_softmax(-1)
        if self.guidance_scale > 1:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + self.guidance_scale * (conditional - unconditional)
        step = len(self.steps)
        self.steps.append(logits.log_softmax(-1))
        if self.forced is None:
            return scores
        tokens = self.forced[:, step].to(scores.device).repeat(len(scores) // len(self.forced))
        return torch.full_like(scores, FORBIDDEN).scatter_(1, tokens[:, None], 0.0)


def caches_beside(cache: CompressedCache, plans: Sequence[CachePlan], backend: str) -> list[CompressedCache]:
    """Caches under other plans for the rows of ``cache``, as many query heads for each KV head as there.

    Raises:
        ValueError: they do not fit into what memory there is.
    """
    sizes = {"batch_size": cache.batch_size, "head_dim": cache.head_dim, "max_prompt": cache.max_prompt,
             "num_visual_tokens": cache.num_visual_tokens, "dtype": cache.dtype}
    needed, free = sum(plan.nbytes(**sizes) for plan in plans), available_memory(cache.device)
    if needed > free:
        raise ValueError(f"batch_size must be smaller: measuring takes {needed / 1e9:.3g} GB of caches besides for "
                         f"{cache.batch_size} rows, and {free / 1e9:.3g} GB are free, enough for "
                         f"{cache.batch_size * free // needed} rows")
    group = cache.num_query_heads // cache.plan.num_heads
    return [CompressedCache(plan, num_query_heads=group * plan.num_heads, device=cache.device, backend=backend, **sizes)
            for plan in plans]


class AttentionError:
    """Runs a second cache under ``plan`` beside a full one and sums the squared differences of their outputs.

    Attributes:
        error, norm: sums over rows, steps and channels of (out - out_full)^2 and out_full^2, float64 [layers, heads].
    """

    def __init__(self, plan: CachePlan, backend: str = "auto") -> None:
        self.plan, self.backend = plan, backend
        self.shadow: CompressedCache | None = None
        self.error, self.norm = torch.zeros(2, plan.num_layers, plan.num_heads, dtype=torch.float64)

    def prefill(self, cache: CompressedCache, layer: int, keys: torch.Tensor, values: torch.Tensor,
                prompt_lens: list[int]) -> None:
        if self.shadow is None:
            (self.shadow,) = caches_beside(cache, [self.plan], self.backend)
        self.shadow.prefill(layer, keys, values, prompt_lens)

    def decode(self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None,
               out: torch.Tensor) -> None:
        if self.shadow is None:
            raise RuntimeError("a step was observed before the prompt")
        difference = self.shadow.decode(layer, query, keys, values, scale).double() - out.double()
        for total, tensor in ((self.error, difference), (self.norm, out.double())):
            # [B, Hq, D] -> [H]: query heads of one group are neighbours.
            total[layer] += tensor.square().sum((0, 2)).view(self.plan.num_heads, -1).sum(1).cpu()


class Observers:
    """Several `AttentionError` at once, in ``all``."""

    def __init__(self, observers: Sequence[AttentionError]) -> None:
        self.all = list(observers)

    def prefill(self, *arguments: Any) -> None:
        for observer in self.all:
            observer.prefill(*arguments)

    def decode(self, *arguments: Any) -> None:
        for observer in self.all:
            observer.decode(*arguments)


def evaluate(pipe: Pipeline, plans: Mapping[str, CachePlan], out: Path, *, prompts: Sequence[str],
             guidance_scale: float | None = None, batch_size: int = 8, pictures: bool = True,
             progress: ProgressCallback = lambda done, total: None) -> dict[str, Fidelity]:
    """Measure plans, one picture per prompt; all are compared with the same full-cache pictures.

    Each plan has a folder of its name in ``out``: figures of finished batches in ``batches``, and pictures in
    ``pictures/full`` and ``pictures/plan``. A killed run goes on with the batches that are missing. Memory: 4 bytes x
    codes x visual tokens per picture of a batch for the distributions (38 MB for Janus-Pro), twice, besides a full
    cache and one cache per plan (docs/engine.md, "Memory").

    Args:
        pipe: any Janus.
        plans: by name, what the caches keep.
        out: folder.
        prompts: texts.
        guidance_scale: None for the model's default.
        batch_size: pictures drawn at once.
        pictures: also draw freely under every plan, for PSNR and SSIM; costs as much again as forcing tokens.
        progress: ``progress(done_steps, all_steps)``.

    Raises:
        ValueError: no prompts, a batch does not fit into memory, or a folder holds results made with other settings.
        ImportError: scikit-image is missing; the message names the extra.
    """
    if not prompts:
        raise ValueError("prompts must hold at least one text, got none")
    folders = open_folders(pipe, plans, out, prompts=prompts, guidance_scale=guidance_scale, batch_size=batch_size,
                           pictures=pictures)
    draw(pipe, plans, folders, prompts=prompts, guidance_scale=guidance_scale, pictures=pictures, progress=progress)
    return results(pipe, plans, folders)


Folders = Mapping[str, RunFolder[dict[str, np.ndarray]]]


def draw(pipe: Pipeline, plans: Mapping[str, CachePlan], folders: Folders, *, prompts: Sequence[str],
         guidance_scale: float | None, pictures: bool, progress: ProgressCallback = lambda done, total: None,
         ranks: Ranks = ALONE, before: int = 0) -> None:
    """Measure the batches of all plans that are still to do. Args: as of `evaluate`, and

        folders: of `open_folders` with the same arguments.
        ranks: which of several processes this is; each measures batches of plans of its own.
        before: batches of plans of the same work that were dealt out before, see `Ranks.own`.

    Raises:
        ValueError: a batch does not fit into memory.
        ImportError: scikit-image is missing; the message names the extra.
    """
    with needs("evaluate", "skimage"):
        import skimage.metrics  # noqa: F401  # before hours of drawing, not after
    steps, texts = pipe.shape.num_visual_tokens, file_names(list(prompts), 1)
    # Plan by plan: where the number of batches divides that of ranks, or is divided by it, no batch's full-cache
    # pictures are drawn by more ranks than must.
    own = ranks.own([(name, batch) for name, folder in folders.items() for batch in folder.batches(1)], before)
    todo: dict[Batch, list[str]] = {}
    for name, folder in folders.items():
        for batch in folder.to_do(batch for other, batch in own if other == name):
            todo.setdefault(batch, []).append(name)
    total = steps * sum(1 + len(names) * (1 + pictures) for names in todo.values())
    done = 0
    for batch, names in todo.items():
        def draw(plan: CachePlan, recorder: Recorder | None = None, observer: Observers | None = None,
                 batch: Batch = batch) -> torch.Tensor:
            nonlocal done
            tokens = pipe.generate_tokens(
                list(batch.prompts), guidance_scale=guidance_scale, seed=folders[names[0]].sampling_seed(batch),  # noqa: B023
                plan=plan, observer=observer, logits_processor=[recorder] if recorder else [],
                progress=lambda step, _: progress(done + step, total))
            done += steps
            return tokens

        scale = folders[names[0]].settings["guidance_scale"]
        attention = Observers([AttentionError(plans[name], pipe.backend) for name in names])
        full = Recorder(scale)
        tokens = draw(pipe.shape.full_plan(), full, attention)
        drawn = {"full": pipe.decode(tokens)} if pictures else {}
        for name, errors in zip(names, attention.all, strict=True):
            forced = Recorder(scale, tokens)
            draw(plans[name], forced)
            if pictures:
                drawn["plan"] = pipe.decode(draw(plans[name]))
            for kind, images in drawn.items():
                target = folders[name].path / "pictures" / kind
                target.mkdir(parents=True, exist_ok=True)
                for index, picture in enumerate(images, batch.first):
                    save_picture(picture, target / texts[index])
            buffer = io.BytesIO()
            np.savez(buffer, allow_pickle=False, **_figures(full, forced, errors, drawn))
            write_atomically(folders[name].file(batch), lambda file: file.write(buffer.getvalue()))  # noqa: B023


def results(pipe: Pipeline, plans: Mapping[str, CachePlan], folders: Folders) -> dict[str, Fidelity]:
    """The figures of folders whose batches are all done, by plan."""
    return {name: _summarise(list(folder.contents(1)), pipe, plans[name]) for name, folder in folders.items()}


def open_folders(pipe: Pipeline, plans: Mapping[str, CachePlan], out: Path, *, prompts: Sequence[str],
                 guidance_scale: float | None, batch_size: int,
                 pictures: bool) -> dict[str, RunFolder[dict[str, np.ndarray]]]:
    """The folders of the plans' figures, by name; args as of `evaluate`.

    Raises:
        ValueError: one holds results made with other settings.
    """
    texts = file_names(list(prompts), 1)

    def folder(name: str, plan: CachePlan) -> RunFolder[dict[str, np.ndarray]]:
        def read(file: Path, batch: Batch) -> dict[str, np.ndarray]:
            if pictures:
                check_pictures(out / name / "pictures" / kind / texts[index] for kind in ("full", "plan")
                               for index in range(batch.first, batch.first + len(batch.prompts)))
            return _read(file, len(batch.prompts), pictures, plan, pipe.shape.num_visual_tokens)

        wanted = settings(pipe, "fidelity", plan, guidance_scale, batch_size) | {"pictures": pictures}
        return RunFolder(out / name, wanted, prompts, ".npz", read)

    return {name: folder(name, plan) for name, plan in plans.items()}


def _read(file: Path, count: int, pictures: bool, plan: CachePlan, steps: int) -> dict[str, np.ndarray]:
    """The figures of a batch of ``count`` pictures.

    Raises:
        ValueError: they are not of such a batch, or damaged; the message names file and field.
    """
    heads = (plan.num_layers, plan.num_heads)
    expected = {"kl": ((count, steps), "float32"), "agreement": ((count, steps), "bool"), "error": (heads, "float64"),
                "norm": (heads, "float64"), "distances": ((count if pictures else 0, 2), "float64")}
    sizes = {name: math.prod(shape) * np.dtype(dtype).itemsize for name, (shape, dtype) in expected.items()}
    found = {}
    with naming(file):
        data = read_bytes(file, sum(sizes.values()) + ROOM * len(sizes))
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                for name, (shape, dtype) in expected.items():
                    # Stored as it is: no more than the file holds can come out, and a checksum is compared.
                    member = archive.getinfo(f"{name}.npy")
                    if member.file_size > sizes[name] + ROOM:
                        raise ValueError(f"{name} must be {sizes[name]} bytes, got {member.file_size}")
                    values = np.lib.format.read_array(io.BytesIO(archive.read(member)), allow_pickle=False)
                    if values.shape != shape or values.dtype != dtype:
                        raise ValueError(f"{name} must be {dtype} {list(shape)}, got {values.dtype} "
                                         f"{list(values.shape)}")
                    if (values < 0).any():
                        raise ValueError(f"{name} must be at least 0, got {values.min()}")
                    found[name] = values
        except DAMAGED as error:
            raise ValueError(f"must be the figures of a batch, got a damaged file ({error})") from None
    return found


def _figures(full: Recorder, forced: Recorder, attention: AttentionError,
             drawn: Mapping[str, list[Image]]) -> dict[str, np.ndarray]:
    """What one batch adds to the results of one plan."""
    kl, agreement = zip(*(compare(p, q) for p, q in zip(full.steps, forced.steps, strict=True)), strict=True)
    distances = [_distance(a, b) for a, b in zip(drawn.get("full", []), drawn.get("plan", []), strict=True)]
    return {"kl": torch.stack(kl, 1).cpu().numpy(), "agreement": torch.stack(agreement, 1).cpu().numpy(),
            "error": attention.error.numpy(), "norm": attention.norm.numpy(),
            "distances": np.array(distances).reshape(-1, 2)}


def compare(full: torch.Tensor, compressed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(full || compressed) in nats, and whether the most probable token is the same, of log-probabilities [N, V].

    A token that one of them forbids (log-probability -inf) adds nothing where ``full`` forbids it.
    """
    terms = full.exp() * (full - compressed)
    kl = torch.where(full.isneginf(), 0.0, terms).sum(-1).clamp_min(0.0)
    return kl, full.argmax(-1) == compressed.argmax(-1)


def _distance(full: Image, drawn: Image) -> tuple[float, float]:
    """Mean squared error (levels 0..255) and SSIM of two pictures."""
    from skimage.metrics import mean_squared_error, structural_similarity

    a, b = np.asarray(full), np.asarray(drawn)
    return float(mean_squared_error(a, b)), float(structural_similarity(a, b, channel_axis=2))


def _summarise(batches: list[dict[str, np.ndarray]], pipe: Pipeline, plan: CachePlan) -> Fidelity:
    kl = np.concatenate([batch["kl"] for batch in batches]).astype(np.float64)  # [pictures, steps]
    errors, norms = (sum(batch[name] for batch in batches) for name in ("error", "norm"))
    distances = np.concatenate([batch["distances"] for batch in batches])  # [pictures, 2], or none
    squares, ssim = distances.mean(0).tolist() if len(distances) else (0.0, None)
    by_picture = kl.mean(1).tolist()
    return Fidelity(
        kl_mean=float(kl.mean()), kl_p99=float(np.quantile(kl, 0.99)),
        kl_interval=mean_interval({"": by_picture}), kl_by_picture=by_picture,
        kl_by_row=kl.reshape(len(kl), -1, pipe.shape.columns).mean((0, 2)).tolist(),
        agreement=float(np.concatenate([batch["agreement"] for batch in batches]).mean()),
        head_error=np.sqrt(errors / np.maximum(norms, np.finfo(np.float64).tiny)).tolist(),
        # From the mean error, because a picture that is equal has none to average in decibels.
        psnr_db=float(10 * np.log10(255**2 / squares)) if squares else None,
        ssim=ssim, pictures=len(kl), budget=plan.budget(pipe.shape.num_visual_tokens))
