"""How much it costs a picture when one layer evicts: the sensitivities of a profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ssd_kernels import CachePlan, HeadSpec
from ssd_kernels.layout import peak_tokens
from ssd_kernels.policies import HeadProfile, adaptive, predicted_cost

from .evaluation.fidelity import Recorder, compare
from .pipeline import Pipeline
from .profile_parts import Parts
from .progress import ProgressCallback
from .ranks import ALONE, Ranks, StillMissing

PROBED_BUDGET = 0.1


@dataclass(frozen=True)
class Probes:
    """Sensitivities of layers, measured in units of work: one layer compressed while one batch is drawn.

    A layer keeps what `adaptive` would give it at ``PROBED_BUDGET`` were all layers equally sensitive, without a row
    buffer, so that the errors are of the kind that plans will make; the tokens of full-cache pictures are forced. All
    prompts are used, because most of the KL comes from few tokens of few pictures: four prompts gave figures more than
    ten times off.

    Attributes:
        pipe: the model.
        prompts: one picture each.
        guidance_scale, seed: of the pictures.
        batch_size: pictures drawn at once.
        parts: mean over the steps of the KL, summed over a batch's pictures, of every unit.
    """

    pipe: Pipeline
    prompts: Sequence[str]
    guidance_scale: float
    seed: int
    batch_size: int
    parts: Parts

    @property
    def units(self) -> list[tuple[int, int]]:
        """Layer, and first prompt of the batch; layer by layer, as `fidelity.draw` has plan by plan."""
        return [(layer, first) for layer in range(self.pipe.shape.num_layers)
                for first in range(0, len(self.prompts), self.batch_size)]

    def to_do(self, ranks: Ranks = ALONE) -> dict[int, list[int]]:
        """Layers by the batches in which they are still to be measured."""
        todo: dict[int, list[int]] = {}
        for layer, first in ranks.own(self.units):
            if self._kl(layer, first) is None:
                todo.setdefault(first, []).append(layer)
        return todo

    def steps(self, todo: dict[int, list[int]]) -> int:
        """Steps that measuring takes."""
        return sum(1 + len(layers) for layers in todo.values()) * self.pipe.shape.num_visual_tokens

    def plans(self, profile: HeadProfile) -> list[CachePlan]:
        """What every layer is probed with; ``profile`` as of `sensitivity`."""
        shape, layers = self.pipe.shape, range(self.pipe.shape.num_layers)
        tokens, full = shape.num_visual_tokens, [HeadSpec.full()] * shape.num_heads
        least = peak_tokens(profile.sizes[0], 0, tokens, 0) / tokens
        whole = adaptive(shape, max(PROBED_BUDGET, least), 0, profile=profile)
        return [CachePlan([whole.layers[layer] if layer == other else full for other in layers], 0) for layer in layers]

    def measure(self, profile: HeadProfile, todo: dict[int, list[int]], progress: ProgressCallback) -> None:
        """Measure what is to do; ``progress(done_steps, all_steps)``."""
        probes, every, done = self.plans(profile), self.steps(todo), 0

        def draw(first: int, plan: CachePlan, recorder: Recorder) -> torch.Tensor:
            nonlocal done
            drawn = self.pipe.generate_tokens(
                list(self.prompts[first:first + self.batch_size]), guidance_scale=self.guidance_scale,
                seed=self.seed + first, plan=plan, logits_processor=[recorder],
                progress=lambda step, _: progress(done + step, every))
            done += self.pipe.shape.num_visual_tokens
            return drawn

        for first, layers in todo.items():
            intact = Recorder(self.guidance_scale)
            drawn = draw(first, self.pipe.shape.full_plan(), intact)
            for layer in layers:
                forced = Recorder(self.guidance_scale, drawn)
                draw(first, probes[layer], forced)
                found = [compare(p, q)[0].double().sum() for p, q in zip(intact.steps, forced.steps, strict=True)]
                self.parts.put(self._name(layer, first), {"kl": torch.stack(found).mean().cpu().view(1)})

    def sensitivity(self, profile: HeadProfile) -> torch.Tensor:
        """[L] nats per token of KL(full || compressed) per unit of relative error, one layer compressed at a time. A
        layer in which that costs nothing gets the mean of the others.

        Args:
            profile: of the same model, sensitivities one; its errors are what the KL is divided by.

        Raises:
            StillMissing: units are not done.
        """
        units = self.units
        if missing := [unit for unit in units if self._kl(*unit) is None]:
            raise StillMissing([self.parts.file(self._name(*unit)) for unit in missing], len(units))
        error = torch.tensor([predicted_cost(probe, profile) for probe in self.plans(profile)], dtype=torch.float64)
        cost = torch.zeros(len(error), dtype=torch.float64)
        for layer, first in units:
            kl = self._kl(layer, first)
            assert kl is not None
            cost[layer] += kl / len(self.prompts)
        known = (error > 1e-12) & (cost > 0)
        if not known.any():
            return torch.ones(len(error))
        sensitivity = cost / error.clamp_min(1e-12)
        return torch.where(known, sensitivity, sensitivity[known].mean())

    def _name(self, layer: int, first: int) -> str:
        return f"layer-{layer:03d}-{first:05d}"

    def _kl(self, layer: int, first: int) -> float | None:
        found = self.parts.get(self._name(layer, first), {"kl": torch.zeros(1, dtype=torch.float64)})
        return None if found is None else float(found["kl"])
