"""Measure the heads of a model while it draws: what they look at, and what evicting costs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ssd_kernels import CachePlan, CompressedCache, HeadSpec
from ssd_kernels.policies import KINDS, HeadProfile, Shape, raster_of

from .checkpoints import fingerprint
from .evaluation.fidelity import Recorder, caches_beside
from .evaluation.folder import settings
from .pipeline import Pipeline
from .probing import Probes
from .profile_parts import Parts, Tensors
from .progress import ProgressCallback
from .ranks import ALONE, Ranks, StillMissing

SIZE_SHARES = (1 / 144, 1 / 72, 1 / 36, 1 / 24, 1 / 16, 1 / 12, 1 / 8, 1 / 6, 1 / 4, 3 / 8, 1 / 2)  # of all tokens
UNWATCHED = 4  # times as many pictures are drawn at once where nothing is watched
# What `HeadStatistics` sums up over pictures.
SUMS = ("prompt", "age", "column", "first", "offset", "guidance", "place", "error", "norm", "steps")


class _Weights(Recorder):
    """Tells the statistics, after every step, how much it counts."""

    def __init__(self, guidance_scale: float, statistics: HeadStatistics) -> None:
        super().__init__(guidance_scale)
        self.statistics = statistics

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = super().__call__(input_ids, scores)
        self.statistics.weigh(self.steps.pop())
        return scores


def places(shape: Shape) -> tuple[int, ...]:
    """Visual tokens whose attention is kept whole: in the middle of the grid, and at both ends of a lower row.

    Not of the first row, which is not watched, nor the last token, which never attends.
    """
    columns = raster_of(shape).stride
    rows = shape.num_visual_tokens // columns
    wanted = {rows // 2 * columns + columns // 2, 3 * rows // 4 * columns, (3 * rows // 4 + 1) * columns - 1}
    return tuple(sorted({min(max(place, columns), shape.num_visual_tokens - 2) for place in wanted}))


def measured_sizes(shape: Shape) -> list[int]:
    """Slots to measure the cost of evicting at, ascending."""
    return sorted({max(2, round(share * shape.num_visual_tokens)) for share in SIZE_SHARES})


def plans_beside(shape: Shape, sizes: Sequence[int]) -> list[CachePlan]:
    """One plan per row buffer in which every kind and size is a head of its own, so that all take one call per step."""
    heads = [make(size) for make in KINDS.values() for size in sizes for _ in range(shape.num_heads)]
    return [CachePlan([heads] * shape.num_layers, row_buffer) for row_buffer in (0, raster_of(shape).stride)]


def everything_in_8_bits(shape: Shape) -> CachePlan:
    """The plan whose only loss is that of storage in 8 bits."""
    return CachePlan.uniform(HeadSpec.full(), shape.num_layers, shape.num_heads, kv_format="int8")


class HeadStatistics:
    """Watches full-cache runs and sums up, per layer and KV head, what `HeadProfile` holds.

    Sums live on the model's device and do not grow with the number of pictures. The first row of a picture is left out
    of the attention shares: nothing is above it.
    """

    def __init__(self, pipe: Pipeline, sizes: Sequence[int]) -> None:
        """
        Args:
            pipe: the model.
            sizes: slots to measure the cost of evicting at, ascending.
        """
        shape = pipe.shape
        self.shape, self.sizes = shape, tuple(sizes)
        evicting = plans_beside(shape, sizes)
        self.row_buffers = tuple(plan.row_buffer for plan in evicting)
        self.plans = [*evicting, everything_in_8_bits(shape)]
        self.backend = pipe.backend
        self.projections = [layer.self_attn.o_proj.weight.detach().float()
                            for layer in pipe.model.model.language_model.layers]  # [C, Hq D]
        # |W x|^2 = x (W' W) x for the channels of each KV head's group: [H, G D, G D].
        split = [weight.unflatten(1, (shape.num_heads, -1)) for weight in self.projections]
        self.grams = [torch.einsum("chi,chj->hij", weight, weight) for weight in split]
        head = (shape.num_layers, shape.num_heads)
        columns, tokens = raster_of(shape).stride, shape.num_visual_tokens
        self.columns = columns

        def zeros(*size: int) -> torch.Tensor:
            return torch.zeros(size, device=pipe.device)

        self.prompt, self.age, self.column = zeros(*head), zeros(*head, tokens), zeros(*head, columns)
        self.first = zeros(*head, columns)
        self.offset = zeros(*head, -(-tokens // columns) * (2 * columns - 1))
        self.guidance = zeros(*head, tokens)
        self.places = places(shape)
        self.place = zeros(*head, len(self.places), tokens)
        # Of every plan in turn; each has so many heads for one of the model's.
        self.heads_each = [plan.num_heads // shape.num_heads for plan in self.plans]
        self.error = zeros(*head, sum(self.heads_each))
        self.norm = zeros(shape.num_layers)
        self.steps = torch.zeros(shape.num_layers, dtype=torch.long)
        token = torch.arange(tokens, device=pipe.device)
        self.row_of, self.column_of = token // columns, token % columns

    def sums(self) -> dict[str, torch.Tensor]:
        """What has been summed up so far, on the CPU."""
        return {name: getattr(self, name).detach().cpu().clone() for name in SUMS}

    def clear(self) -> None:
        """Forget all sums."""
        for name in SUMS:
            getattr(self, name).zero_()

    def add(self, sums: Tensors) -> None:
        """Add the sums of other pictures."""
        for name in SUMS:
            own = getattr(self, name)
            own += sums[name].to(own.device)

    def begin(self, guided: bool) -> None:
        """Before every batch of pictures."""
        self.guided = guided
        self.keys: list[torch.Tensor] = []
        self.masks: list[torch.Tensor] = []
        self.step = [0] * self.shape.num_layers
        self.shadows: list[CompressedCache] = []
        self.pending: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def prefill(self, cache: CompressedCache, layer: int, keys: torch.Tensor, values: torch.Tensor,
                prompt_lens: list[int]) -> None:
        if not self.shadows:
            self.shadows = caches_beside(cache, self.plans, self.backend)
        for shadow, each in zip(self.shadows, self.heads_each, strict=True):
            shadow.prefill(layer, keys.repeat(1, each, 1, 1), values.repeat(1, each, 1, 1), prompt_lens)
        rows, heads, longest, channels = keys.shape
        store = keys.new_empty(rows, heads, longest + self.shape.num_visual_tokens, channels)
        store[:, :, :longest] = keys
        self.keys.append(store)
        lengths = torch.tensor(prompt_lens, device=keys.device)
        self.masks.append(torch.arange(longest, device=keys.device) < lengths[:, None])

    def decode(self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None,
               out: torch.Tensor) -> None:
        step, store, mask = self.step[layer], self.keys[layer], self.masks[layer]
        longest = mask.shape[1]
        store[:, :, longest + step] = keys
        self.step[layer] += 1
        if self.guided:
            for tensor in (keys, values):
                conditional, blank = tensor.float().chunk(2)
                self.guidance[layer, :, step] += (conditional - blank).square().mean(2).sum(0)
        self._costs(layer, query, keys, values, scale, out)
        if step < self.columns:
            return
        rows, heads = keys.shape[:2]
        grouped = query.view(rows, heads, -1, query.shape[-1])  # [B, H, G, D]
        logits = torch.einsum("bhgd,bhnd->bhgn", grouped.float(), store[:, :, :longest + step + 1].float())
        logits *= query.shape[-1] ** -0.5 if scale is None else scale
        logits[..., :longest].masked_fill_(~mask[:, None, None], -torch.inf)
        self.prompt[layer] += logits.softmax(-1)[..., :longest].sum(-1).mean(2).sum(0)
        # Not the visual part of that softmax, which vanishes where all attention is on the prompt.
        visual = logits[..., longest:].softmax(-1).mean(2).sum(0)  # [H, t + 1]
        self.age[layer, :, :step + 1] += visual.flip(-1)
        self.first[layer] += visual[:, :self.columns]
        self.column[layer].index_add_(1, self.column_of[:step + 1], visual)
        width = 2 * self.columns - 1
        up = self.row_of[step] - self.row_of[:step + 1]
        aside = self.column_of[:step + 1] - self.column_of[step] + self.columns - 1
        self.offset[layer].index_add_(1, up * width + aside, visual)
        if step in self.places:
            self.place[layer, :, self.places.index(step), :step + 1] += visual
        self.steps[layer] += rows

    def _costs(self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None,
               out: torch.Tensor) -> None:
        """What every kind and size of every head, and 8 bits, would have added to the residual stream."""
        rows, heads = keys.shape[:2]
        costs = []
        for shadow, each in zip(self.shadows, self.heads_each, strict=True):
            got = shadow.decode(layer, *(tensor.repeat(1, each, 1) for tensor in (query, keys, values)), scale)
            difference = got.view(rows, each, heads, -1).float() - out.view(rows, 1, heads, -1).float()
            # [B, heads of the plan for one of the model's, H, G D]
            added = torch.einsum("bkhi,hij->bkhj", difference, self.grams[layer]) * difference
            costs.append(added.sum(-1).transpose(1, 2))
        self.pending[layer] = torch.cat(costs, 2), (out.flatten(1).float() @ self.projections[layer].T).square().sum(1)

    def weigh(self, logits: torch.Tensor) -> None:
        """Count the last step's errors by how much its distribution can change: 1 - sum of p^2.

        A small change of logits changes a distribution by about as much as their variance under it, and tokens that
        are certain, as background is, do not change at all.

        Args:
            logits: guided log-probabilities [pictures, codes].
        """
        weight = 1 - logits.exp().square().sum(-1)
        for layer, (costs, norm) in self.pending.items():
            rows = weight.repeat(len(norm) // len(weight))
            self.error[layer] += torch.einsum("b,bhk->hk", rows, costs)
            self.norm[layer] += rows @ norm

    def relative_errors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``error`` [L, H, R, K, S] and ``int8_error`` [L, H], as in `HeadProfile`."""
        error = self.error / self.norm.clamp_min(1e-30)[:, None, None]
        return error[..., :-1].unflatten(-1, (len(self.row_buffers), len(KINDS), len(self.sizes))), error[..., -1]

    def profile(self, radius: int, pictures: int) -> HeadProfile:
        """Sum up; all sensitivities are one.

        Args:
            radius: of the neighbourhood, tokens.
            pictures: drawn in all.
        """
        shape = self.shape
        count = self.steps.to(self.age.device).view(-1, 1).clamp_min(1)
        offset = (self.offset / count[..., None]).view(shape.num_layers, shape.num_heads, -1, 2 * self.columns - 1)
        near = offset[..., :radius + 1, max(0, self.columns - 1 - radius):self.columns + radius].sum((2, 3))
        error, int8_error = self.relative_errors()
        profile = HeadProfile(
            sparsity=1 - near, prompt_mass=self.prompt / count, age_mass=self.age / count[..., None],
            offset_mass=offset, column_mass=self.column / count[..., None], first_mass=self.first / count[..., None],
            place_mass=self.place / self.place.sum(-1, keepdim=True).clamp_min(1e-30),
            guidance_difference=self.guidance / pictures,
            error=error, sensitivity=torch.ones(shape.num_layers), sizes=self.sizes,
            kinds=tuple(KINDS), row_buffers=self.row_buffers, places=self.places,
            columns=self.columns, radius=radius, int8_error=int8_error)
        for name, value in vars(profile).items():
            if isinstance(value, torch.Tensor):
                # Large, and only looked at.
                precision = torch.float16 if name == "place_mass" else torch.float32
                object.__setattr__(profile, name, value.to("cpu", precision))
        return profile


def measure(pipe: Pipeline, prompts: Sequence[str], *, guidance_scale: float | None = None, seed: int = 0,
            radius: int = 1, batch_size: int = 4, progress: ProgressCallback = lambda done, total: None,
            folder: Path | None = None, ranks: Ranks = ALONE) -> HeadProfile:
    """Draw one picture per prompt with the full cache and profile the heads.

    Args:
        pipe: any Janus.
        prompts: for calibration; they should not be those that a policy is later judged on. The profile records them.
        guidance_scale: None for the model's default.
        seed: of the sampling.
        radius: of the neighbourhood that the sparsity score leaves out, tokens; at least 0.
        batch_size: pictures drawn at once. The measurement takes 25 times the memory of a full cache besides
            (docs/engine.md, "Memory").
        progress: ``progress(done_steps, all_steps)`` of what is to do here.
        folder: for what is measured of every batch, so that a killed run goes on and several processes share the work;
            None keeps it in memory.
        ranks: which of several processes this is. The heads have to be known before layers can be probed: a process
            that has watched its own batches watches what is still missing, rather than wait for the others.

    Raises:
        ValueError: no prompts, a negative radius, a batch does not fit into memory, or the folder holds parts of
            another profile.
        StillMissing: other processes have not finished; the last one makes the profile.
    """
    if not prompts:
        raise ValueError("prompts must hold at least one text, got none")
    if radius < 0:
        raise ValueError(f"radius must be at least 0, got {radius}")
    shape, scale = pipe.shape, pipe.guidance(guidance_scale)
    steps, firsts = shape.num_visual_tokens, list(range(0, len(prompts), batch_size))
    parts = Parts() if folder is None else Parts(folder, {
        **settings(pipe, "profile", shape.full_plan(), scale, batch_size), "seed": seed, "prompts": list(prompts)})
    probes = Probes(pipe, prompts, scale, seed, batch_size * UNWATCHED, parts)
    statistics = HeadStatistics(pipe, measured_sizes(shape))
    like = statistics.sums()

    def watched(first: int) -> Tensors | None:
        return parts.get(f"heads-{first:05d}", like)

    todo = probes.to_do(ranks)
    own = [first for first in ranks.own(firsts) if watched(first) is None]
    every, done = len(own) * steps + probes.steps(todo), 0
    others = [first for first in firsts if first not in ranks.own(firsts)]
    turned = len(others) * ranks.number // ranks.count  # that not all begin with the same one
    for first in (*own, *others[turned:], *others[:turned]):
        if watched(first) is not None:
            continue
        statistics.clear()
        statistics.begin(guided=scale > 1)
        pipe.generate_tokens(
            list(prompts[first:first + batch_size]), guidance_scale=scale, seed=seed + first, plan=shape.full_plan(),
            observer=statistics, logits_processor=[_Weights(scale, statistics)],
            progress=lambda step, _: progress(min(done + step, len(own) * steps), every))  # noqa: B023
        done += steps
        parts.put(f"heads-{first:05d}", statistics.sums())
    statistics.clear()
    for first in firsts:
        sums = watched(first)
        if sums is None:
            raise StillMissing([parts.file(f"heads-{first:05d}")], len(firsts))
        statistics.add(sums)
    profile = statistics.profile(radius, len(prompts))
    probes.measure(profile, todo, lambda step, _: progress(len(own) * steps + step, every))
    meta = {"prompts": list(prompts), "guidance_scale": scale, "seed": seed, "device": pipe.device.type,
            "dtype": str(pipe.dtype).removeprefix("torch."), "model": pipe.model.name_or_path.rsplit("/", 1)[-1],
            "weights": fingerprint(pipe.model)}
    return replace(profile, sensitivity=probes.sensitivity(profile).float().cpu(), meta=meta)
