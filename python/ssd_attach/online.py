"""Online typing: no calibration, heads are typed from the first rows of the picture that is being drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ssd_kernels import CachePlan, CompressedCache
from ssd_kernels.policies import Shape, heavy, raster_of
from ssd_kernels.policies.solve import check_share

if TYPE_CHECKING:
    from .cache import Observer


class OnlinePlan(CachePlan):
    """The plan of `ssd_kernels.policies.heavy` until a grid row ends that still fits; from then on heads whose window
    misses little are windows.

    The idea is HeadKV's for images (arXiv 2605.20600): a head shows in the first rows what it is. From the second row
    on, the visual attention that each head gives to tokens further back than one row and one token is summed up; heads
    that give less than ``loss`` protect all their slots for the newest tokens, which makes them windows. Sums, the
    decision and its effect stay on the device, and what watches is gone once heads are typed.

    All pictures of a batch share the decision, made from all of them: a picture may then differ with its company.
    """

    def __init__(self, shape: Shape, budget: float, row_buffer: int | None = None, *, loss: float = 0.4) -> None:
        """
        Args: as policies; ``loss`` as in `ssd_kernels.policies.ssd_guarded`.

        Raises:
            TypeError, ValueError: as policies, or a head holds less than two rows, so that nothing can be typed in
                time.
        """
        check_share("loss", loss)
        base = heavy(shape, budget, row_buffer)
        super().__init__(base.layers, base.row_buffer)
        size = base.layers[0][0].size or 0
        columns = raster_of(shape).stride
        rows = min(size // columns, 4)
        if rows < 2:
            raise ValueError(f"budget must leave at least {2 * columns} slots per head for online typing, got "
                             f"{size} with budget={budget} and row_buffer={base.row_buffer}")
        object.__setattr__(self, "columns", columns)
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "loss", loss)

    def observer(self) -> Observer:
        """What watches one `generate` call and types its heads."""
        return Typing(self)

    def to_dict(self) -> dict:
        """The plan as JSON values, with what makes it an online one; such a plan cannot be read back."""
        return super().to_dict() | {"online": {"rows": self.rows, "loss": self.loss}}

    def save(self, path: object) -> None:
        """Raises ValueError: what heads keep is decided while drawing."""
        raise ValueError("an online plan has no file: what heads keep is decided while a picture is drawn")


def check_observer(plan: CachePlan, observer: Observer | None) -> None:
    """
    Raises:
        ValueError: an observer besides the one that an online plan brings.
    """
    if observer is not None and isinstance(plan, OnlinePlan):
        raise ValueError(f"observer must be None under an online plan, which brings its own, got {observer!r}")


class Typing:
    """Sums up, per layer and head, the attention that a window would miss."""

    def __init__(self, plan: OnlinePlan) -> None:
        self.plan = plan
        self.last = plan.rows * plan.columns
        self.keys: list[torch.Tensor] = []
        self.missed: list[torch.Tensor] = []
        self.steps = [0] * plan.num_layers

    @property
    def finished(self) -> bool:
        """Whether the heads of all layers have been typed, so that there is nothing left to watch."""
        return min(self.steps) >= self.last

    def prefill(self, cache: CompressedCache, layer: int, keys: torch.Tensor, values: torch.Tensor,
                prompt_lens: list[int]) -> None:
        self.cache = cache
        self.keys.append(keys.new_empty(*keys.shape[:2], self.last, keys.shape[3]))
        self.missed.append(torch.zeros(keys.shape[1], device=keys.device))

    def decode(self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None,
               out: torch.Tensor) -> None:
        step, plan = self.steps[layer], self.plan
        self.steps[layer] += 1
        if step >= self.last:
            return
        store = self.keys[layer]
        store[:, :, step] = keys
        far = step - plan.columns  # tokens before this one are out of a window of one row and one token
        if far > 0:
            grouped = query.view(*keys.shape[:2], -1, query.shape[-1]).float()  # [B, H, G, D]
            logits = torch.einsum("bhgd,bhnd->bhgn", grouped, store[:, :, :step + 1].float())
            mass = (logits * (query.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1)
            self.missed[layer] += mass[..., :far].sum(-1).mean((0, 2))
        if step + 1 == self.last:
            share = self.missed[layer] / (self.last - plan.columns - 1)
            size = plan.layers[layer][0].size or 0
            self.cache.set_recent(layer, torch.where(share < plan.loss, size, size // 2))
            self.keys[layer] = store[:, :, :0]
