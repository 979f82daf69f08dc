"""`HeadProfile`: what was measured about the heads of a model."""

from __future__ import annotations

import bisect
import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ..files import write_atomically

__all__ = ["HeadProfile"]

FORMAT, VERSION = "ssd_kernels.profile", 3


@dataclass(frozen=True)
class HeadProfile:
    """Attention statistics and error curves of every KV head; L layers, H KV heads, T visual tokens, C columns.

    Shares are of the attention mass, averaged over steps, rows (with guidance both branches) and the query heads of a
    group. All float32 on the CPU, but ``place_mass`` in float16.

    Attributes:
        sparsity: [L, H] share of the visual mass outside the immediate 2-D neighbourhood (SSD, section 3: the sparsity
            score that types heads): more than ``radius`` rows or columns away.
        prompt_mass: [L, H] share of all mass on the prompt.
        age_mass: [L, H, T] share of the visual mass by age in tokens, 0 for the token itself.
        offset_mass: [L, H, T / C, 2 C - 1] share of the visual mass by how many rows up (0 ..) and columns aside
            (-(C - 1) .. C - 1) a token is.
        column_mass: [L, H, C] share of the visual mass by the column a token is in.
        first_mass: [L, H, C] share of the visual mass on each token of the first row.
        place_mass: [L, H, P, T] share of the visual mass that the tokens ``places`` give to each token.
        guidance_difference: [L, H, T] mean squared difference of the guided and the blank branch's keys plus that of
            their values, per channel (SSD's evidence for margin columns); zeros without guidance.
        error: [L, H, R, K, S] squared error that a head adds to the residual stream, relative to the squared length of
            the attention block's output, when it keeps ``sizes[s]`` tokens as ``kinds[k]`` with a row buffer of
            ``row_buffers[r]``. Steps count by how much their next-token distribution can change (1 - sum of p^2).
        sensitivity: [L] nats per token of KL(full || compressed), of the guided next-token distribution, for each unit
            of ``error`` in a layer, measured with that layer alone compressed as by `adaptive`; ones if it was not
            measured.
        sizes: S numbers of slots, ascending, without the row buffer.
        kinds: K of `policies.KINDS`.
        row_buffers: R row buffers, steps, ascending.
        places: P visual tokens, ascending.
        columns: C.
        radius: of the neighbourhood, tokens.
        meta: how it was measured: model, fingerprint of its weights, prompts, seconds; JSON values.
    """

    sparsity: torch.Tensor
    prompt_mass: torch.Tensor
    age_mass: torch.Tensor
    offset_mass: torch.Tensor
    column_mass: torch.Tensor
    first_mass: torch.Tensor
    place_mass: torch.Tensor
    guidance_difference: torch.Tensor
    error: torch.Tensor
    sensitivity: torch.Tensor
    sizes: tuple[int, ...]
    kinds: tuple[str, ...]
    row_buffers: tuple[int, ...]
    places: tuple[int, ...]
    columns: int
    radius: int
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        return self.age_mass.shape[0]

    @property
    def num_heads(self) -> int:
        return self.age_mass.shape[1]

    @property
    def num_visual_tokens(self) -> int:
        return self.age_mass.shape[2]

    def window_loss(self, size: int) -> torch.Tensor:
        """[L, H] share of the visual mass that a window of the newest ``size`` tokens misses."""
        return 1 - self.age_mass[..., :size].sum(-1)

    def cost(self, row_buffer: int) -> torch.Tensor:
        """[L, H, K, S] predicted cost of a head's kind and size, nats per token: ``sensitivity`` times ``error``.

        Between measured row buffers linear in the steps, outside of them as at the nearest.
        """
        measured, errors = self.row_buffers, self.error.double().unbind(2)
        upper = min(bisect.bisect_left(measured, row_buffer), len(measured) - 1)
        lower = max(upper - 1, 0) if measured[upper] > row_buffer else upper
        share = (row_buffer - measured[lower]) / (measured[upper] - measured[lower]) if lower < upper else 0.0
        error = errors[lower].lerp(errors[upper], share)
        return error * self.sensitivity.double()[:, None, None, None]

    def check(self, shape: Any) -> HeadProfile:
        """The profile itself when it is of a model of this shape.

        Nothing here can tell whether it was measured on the same weights; `ssd-janus` compares ``meta["weights"]``.

        Raises:
            ValueError: other layers, heads or grid.
        """
        own = (self.num_layers, self.num_heads, self.num_visual_tokens, self.columns)
        wanted = (shape.num_layers, shape.num_heads, shape.num_visual_tokens, shape.columns)
        if own != wanted:
            raise ValueError("profile must be of a model with (layers, KV heads, visual tokens, columns) = "
                             f"{wanted}, got one with {own}")
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file. It appears whole or not at all."""
        from safetensors.torch import save

        tensors = {f.name: value.contiguous() for f in fields(self)
                   if isinstance(value := getattr(self, f.name), torch.Tensor)}
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in tensors}
        data = save(tensors, {"format": FORMAT, "version": str(VERSION), "profile": json.dumps(rest)})
        write_atomically(Path(path), lambda file: file.write(data))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HeadProfile:
        """Read a profile that `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not such a file, another version, or parts missing or of the wrong shape.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"no profile {os.fspath(path)}")
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                head = file.metadata() or {}
                if head.get("format") != FORMAT or head.get("version") != str(VERSION):
                    found = f"{head.get('format')}, version {head.get('version')}"
                    raise ValueError(f"must be of format {FORMAT}, version {VERSION}, got {found}")
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            rest = json.loads(head["profile"])
            rest.update({name: tuple(rest[name]) for name in ("sizes", "kinds", "row_buffers", "places")})
            return cls(**tensors, **rest)._checked()
        except (SafetensorError, TypeError, ValueError, KeyError) as error:
            raise ValueError(f"profile {os.fspath(path)}: {error}") from error

    def _checked(self) -> HeadProfile:
        layers, heads, tokens = self.age_mass.shape
        columns = self.columns
        shapes = {"age_mass": (layers, heads, tokens), "sparsity": (layers, heads), "prompt_mass": (layers, heads),
                  "column_mass": (layers, heads, columns), "first_mass": (layers, heads, columns),
                  "place_mass": (layers, heads, len(self.places), tokens),
                  "guidance_difference": (layers, heads, tokens),
                  "offset_mass": (layers, heads, tokens // columns, 2 * columns - 1),
                  "error": (layers, heads, len(self.row_buffers), len(self.kinds), len(self.sizes)),
                  "sensitivity": (layers,)}
        for name, shape in shapes.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"{name} must be {list(shape)}, got {list(getattr(self, name).shape)}")
            if not getattr(self, name).isfinite().all():
                raise ValueError(f"{name} must be finite")
        for name in ("sizes", "row_buffers", "places"):
            values = getattr(self, name)
            if not values or list(values) != sorted(set(values)):
                raise ValueError(f"{name} must ascend, got {values}")
        return self
