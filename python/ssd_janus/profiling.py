"""Measure the heads of a model while it draws: what they look at, and what evicting costs them."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from ssd_kernels import CachePlan, CompressedCache, HeadSpec
from ssd_kernels.policies import HeadProfile

from .pipeline import Pipeline
from .progress import ProgressCallback

KINDS = {"window": HeadSpec.window, "heavy": lambda size: HeadSpec.heavy(size, recent=size // 2, score="mean"),
         "sum": HeadSpec.heavy}
SIZE_SHARES = (1 / 144, 1 / 72, 1 / 36, 1 / 24, 1 / 16, 1 / 12, 1 / 8, 1 / 6, 1 / 4, 3 / 8, 1 / 2)  # of all tokens


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
        self.plan = CachePlan(
            [[make(size) for make in KINDS.values() for size in sizes for _ in range(shape.num_heads)]]
            * shape.num_layers, shape.columns)
        self.backend = pipe.backend
        self.projections = [layer.self_attn.o_proj.weight.detach().float()
                            for layer in pipe.model.model.language_model.layers]  # [C, Hq D]
        # |W x|^2 = x (W' W) x for the channels of each KV head's group: [H, G D, G D].
        split = [weight.unflatten(1, (shape.num_heads, -1)) for weight in self.projections]
        self.grams = [torch.einsum("chi,chj->hij", weight, weight) for weight in split]
        head = (shape.num_layers, shape.num_heads)
        columns, tokens = shape.columns, shape.num_visual_tokens

        def zeros(*size: int) -> torch.Tensor:
            return torch.zeros(size, device=pipe.model.device)

        self.prompt, self.age, self.column = zeros(*head), zeros(*head, tokens), zeros(*head, columns)
        self.first = zeros(*head, columns)
        self.offset = zeros(*head, tokens // columns * (2 * columns - 1))
        self.guidance = zeros(shape.num_layers, tokens)
        self.error = zeros(*head, len(KINDS) * len(self.sizes))
        self.norm = zeros(shape.num_layers)
        self.steps = torch.zeros(shape.num_layers, dtype=torch.long)
        token = torch.arange(tokens, device=pipe.model.device)
        self.row_of, self.column_of = token // columns, token % columns

    def begin(self, guided: bool) -> None:
        """Before every batch of pictures."""
        self.guided = guided
        self.keys: list[torch.Tensor] = []
        self.masks: list[torch.Tensor] = []
        self.step = [0] * self.shape.num_layers
        self.shadow: CompressedCache | None = None

    def prefill(self, cache: CompressedCache, layer: int, keys: torch.Tensor, values: torch.Tensor,
                prompt_lens: list[int]) -> None:
        kinds = len(KINDS) * len(self.sizes)
        if self.shadow is None:
            # Every kind and size is a head of its own in one cache, so that all take one call per step.
            self.shadow = CompressedCache(
                self.plan, cache.batch_size, cache.num_query_heads * kinds, cache.head_dim, cache.max_prompt,
                cache.num_visual_tokens, cache.dtype, cache.device, self.backend)
        self.shadow.prefill(layer, keys.repeat(1, kinds, 1, 1), values.repeat(1, kinds, 1, 1), prompt_lens)
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
                self.guidance[layer, step] += (conditional - blank).square().mean((1, 2)).sum()
        self._costs(layer, query, keys, values, scale, out)
        if step < self.shape.columns:
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
        self.first[layer] += visual[:, :self.shape.columns]
        self.column[layer].index_add_(1, self.column_of[:step + 1], visual)
        width = 2 * self.shape.columns - 1
        up = self.row_of[step] - self.row_of[:step + 1]
        aside = self.column_of[:step + 1] - self.column_of[step] + self.shape.columns - 1
        self.offset[layer].index_add_(1, up * width + aside, visual)
        self.steps[layer] += rows

    def _costs(self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None,
               out: torch.Tensor) -> None:
        """What every kind and size of every head would have added to the residual stream."""
        assert self.shadow is not None
        kinds, (rows, heads) = len(KINDS) * len(self.sizes), keys.shape[:2]
        got = self.shadow.decode(layer, query.repeat(1, kinds, 1), keys.repeat(1, kinds, 1),
                                 values.repeat(1, kinds, 1), scale)
        difference = got.view(rows, kinds, heads, -1).float() - out.view(rows, 1, heads, -1).float()  # [B, KS, H, G D]
        added = torch.einsum("bkhi,hij->bkhj", difference, self.grams[layer]) * difference
        self.error[layer] += added.sum((0, 3)).T
        self.norm[layer] += (out.flatten(1).float() @ self.projections[layer].T).square().sum()

    def profile(self, radius: int, pictures: int, meta: dict) -> HeadProfile:
        """Sum up.

        Args:
            radius: of the neighbourhood, tokens.
            pictures: drawn in all.
            meta: to keep with the figures.
        """
        shape = self.shape
        count = self.steps.to(self.age.device).view(-1, 1).clamp_min(1)
        offset = (self.offset / count[..., None]).view(shape.num_layers, shape.num_heads, -1, 2 * shape.columns - 1)
        near = offset[..., :radius + 1, max(0, shape.columns - 1 - radius):shape.columns + radius].sum((2, 3))
        error = self.error / self.norm.clamp_min(1e-30)[:, None, None]
        profile = HeadProfile(
            sparsity=1 - near, prompt_mass=self.prompt / count, age_mass=self.age / count[..., None],
            offset_mass=offset, column_mass=self.column / count[..., None], first_mass=self.first / count[..., None],
            guidance_difference=self.guidance / pictures,
            error=error.view(*error.shape[:2], len(KINDS), len(self.sizes)), sizes=self.sizes, kinds=tuple(KINDS),
            columns=shape.columns, radius=radius, row_buffer=shape.columns, meta=meta)
        for name, value in vars(profile).items():
            if isinstance(value, torch.Tensor):
                object.__setattr__(profile, name, value.float().cpu())
        return profile


def measure(pipe: Pipeline, prompts: Sequence[str], *, guidance_scale: float | None = None, seed: int = 0,
            radius: int = 1, batch_size: int = 4,
            progress: ProgressCallback = lambda done, total: None) -> HeadProfile:
    """Draw one picture per prompt with the full cache and profile the heads.

    Args:
        pipe: any Janus.
        prompts: for calibration; they should not be those that a policy is later judged on. The profile records them.
        guidance_scale: None for the model's default.
        seed: of the sampling.
        radius: of the neighbourhood that the sparsity score leaves out, tokens; at least 0.
        batch_size: pictures drawn at once.
        progress: ``progress(done_steps, all_steps)``.

    Raises:
        ValueError: no prompts, or a negative radius.
    """
    if not prompts:
        raise ValueError("prompts must hold at least one text, got none")
    if radius < 0:
        raise ValueError(f"radius must be at least 0, got {radius}")
    shape = pipe.shape
    scale = pipe.model.generation_config.guidance_scale if guidance_scale is None else guidance_scale
    sizes = sorted({max(2, round(share * shape.num_visual_tokens)) for share in SIZE_SHARES})
    statistics = HeadStatistics(pipe, sizes)
    began = time.perf_counter()
    for first in range(0, len(prompts), batch_size):
        texts = list(prompts[first:first + batch_size])
        statistics.begin(guided=scale > 1)
        pipe.generate_tokens(texts, guidance_scale=scale, seed=seed + first, plan=shape.full_plan(),
                             observer=statistics, progress=lambda done, total: progress(  # noqa: B023
                                 first // batch_size * total + done, -(-len(prompts) // batch_size) * total))  # noqa: B023
    meta = {"prompts": list(prompts), "guidance_scale": scale, "seed": seed,
            "seconds": round(time.perf_counter() - began, 1), "device": pipe.model.device.type,
            "dtype": str(pipe.model.dtype).removeprefix("torch."), "model": pipe.model.name_or_path.rsplit("/", 1)[-1]}
    return statistics.profile(radius, len(prompts), meta)
