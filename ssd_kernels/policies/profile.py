"""`HeadProfile`: what was measured about the heads of a model, and its files."""

from __future__ import annotations

import bisect
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ..files import write_atomically
from ..heads import HeadSpec
from ..reading import Field, naming, parse_json, read_bytes, shown
from .raster import raster_of
from .uniform import first_and_newest

__all__ = ["KINDS", "HeadProfile"]

FORMAT, VERSION = "ssd_kernels.profile", 3
MAX_BYTES = 2**30  # of a file; one of Janus-Pro-7B takes 2**25
MAX_HEADER = 2**22  # bytes of its header, which holds the prompts
OPTIONAL = ("int8_error",)  # tensors that profiles made earlier lack
SLACK = 0.01  # of sums of shares: measured in float32, stored in float16
# Parts that are shares of the attention mass, and the dimensions over which they sum to 1 or less.
SHARES: dict[str, tuple[int, ...]] = {"sparsity": (), "prompt_mass": (), "age_mass": (-1,), "offset_mass": (-2, -1),
                                      "column_mass": (-1,), "first_mass": (-1,), "place_mass": (-1,)}

KINDS: dict[str, Callable[[int], HeadSpec]] = {
    "window": HeadSpec.window,
    "first": first_and_newest,
    "heavy": lambda size: HeadSpec.heavy(size, recent=size // 2, score="mean"),
    "sum": HeadSpec.heavy,
    "decayed": lambda size: HeadSpec.heavy(size, recent=size // 2, score="decayed"),
}
"""What a head may keep in a number of slots, as `HeadProfile` measures it and `adaptive` chooses: a window, the first
tokens and a window, half recent and half by mean attention, the largest attention sums, and half recent and half by
sums that forget. A profile made before a kind was known lacks it."""


@dataclass(frozen=True)
class HeadProfile:
    """Attention statistics and error curves of every KV head; L layers, H KV heads, T visual tokens, C columns,
    which are the tokens from one grid row's beginning to the next one's (`Raster.stride`), and N rows of C, the last of
    which may be short.

    Shares are of the attention mass, averaged over steps, rows (with guidance both branches) and the query heads of a
    group. All float32 on the CPU, but ``place_mass`` in float16 (or float32).

    Attributes:
        sparsity: [L, H] share of the visual mass outside the immediate 2-D neighbourhood (SSD, section 3: the sparsity
            score that types heads): more than ``radius`` rows or columns away.
        prompt_mass: [L, H] share of all mass on the prompt.
        age_mass: [L, H, T] share of the visual mass by age in tokens, 0 for the token itself.
        offset_mass: [L, H, N, 2 C - 1] share of the visual mass by how many rows up (0 ..) and columns aside
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
        meta: how it was measured: model, fingerprint of its weights, prompts; JSON values.
        int8_error: [L, H] as ``error``, of a head that keeps every token, prompt and picture, in 8 bits; None in a
            profile made before it was measured.
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
    int8_error: torch.Tensor | None = None

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

    @property
    def int8_cost(self) -> torch.Tensor:
        """[L, H] predicted cost of storing a head in 8 bits, nats per token; zeros if it was not measured."""
        error = torch.zeros(self.num_layers, self.num_heads) if self.int8_error is None else self.int8_error
        return error.double() * self.sensitivity.double()[:, None]

    def check(self, shape: Any) -> HeadProfile:
        """The profile itself when it is of a model of this shape.

        Nothing here can tell whether it was measured on the same weights; `ssd-janus` compares ``meta["weights"]``.

        Raises:
            ValueError: other layers, heads or grid.
        """
        own = (self.num_layers, self.num_heads, self.num_visual_tokens, self.columns)
        wanted = (shape.num_layers, shape.num_heads, shape.num_visual_tokens, raster_of(shape).stride)
        if own != wanted:
            raise ValueError("profile must be of a model with (layers, KV heads, visual tokens, columns) = "
                             f"{wanted}, got one with {own}")
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file. It appears whole or not at all."""
        from safetensors.torch import save

        tensors = {f.name: value.contiguous() for f in fields(self)
                   if isinstance(value := getattr(self, f.name), torch.Tensor)}
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in (*tensors, *OPTIONAL)}
        data = _in_order(save(tensors, {"format": FORMAT, "version": str(VERSION), "profile": json.dumps(rest)}))
        write_atomically(Path(path), lambda file: file.write(data))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HeadProfile:
        """Read a profile that `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not such a file, another version, or parts unknown, missing, of another type or shape, or with
                values that nothing measures. The message names the file and the part.
        """
        data = read_bytes(path, MAX_BYTES)
        with naming(path):
            metadata = Field(_header(data).get("__metadata__", {}), "__metadata__")
            metadata.members(optional=None)
            form, version = metadata.value.get("format"), metadata.value.get("version")
            if (form, version) != (FORMAT, str(VERSION)):
                raise ValueError(f"must be of format {FORMAT}, version {VERSION}, got {shown(form)}, version "
                                 f"{shown(version)}")
            tensors: dict[str, Any] = _tensors(data)
            names = [f.name for f in fields(cls) if f.type == "torch.Tensor"]
            Field(tensors).members(names, OPTIONAL)
            rest = Field(parse_json(metadata.members(["profile"], None)["profile"].string()))
            parts = rest.members([f.name for f in fields(cls) if f.name not in (*names, *OPTIONAL)])
            parts["meta"].members(optional=None)
            values: dict[str, Any] = {name: tuple(part.value) if isinstance(part.value, list) else part.value
                                      for name, part in parts.items()}
            return cls(**tensors, **values)._checked(parts)

    def _checked(self, rest: dict[str, Field]) -> HeadProfile:
        """The profile itself when all of it may have been measured; ``rest`` is what is not a tensor."""
        if self.age_mass.dim() != 3 or not all(self.age_mass.shape):
            raise ValueError(f"age_mass must be [layers, heads, tokens] of at least 1, got {list(self.age_mass.shape)}")
        layers, heads, tokens = self.age_mass.shape
        columns = rest["columns"].integer(1, tokens)
        rest["radius"].integer(0, tokens)
        for name, least, most in (("sizes", 1, tokens), ("row_buffers", 0, tokens), ("places", 0, tokens - 1)):
            values = [part.integer(least, most) for part in rest[name].items(1)]
            if values != sorted(set(values)):
                rest[name].refuse("ascending")
        kinds = [part.choice(tuple(KINDS)) for part in rest["kinds"].items(1)]
        if len(set(kinds)) < len(kinds) or not {"window", "heavy"} <= set(kinds):
            rest["kinds"].refuse("different, and with window and heavy")
        shapes = {"age_mass": (layers, heads, tokens), "sparsity": (layers, heads), "prompt_mass": (layers, heads),
                  "column_mass": (layers, heads, columns), "first_mass": (layers, heads, columns),
                  "place_mass": (layers, heads, len(self.places), tokens),
                  "guidance_difference": (layers, heads, tokens),
                  "offset_mass": (layers, heads, -(-tokens // columns), 2 * columns - 1),
                  "error": (layers, heads, len(self.row_buffers), len(self.kinds), len(self.sizes)),
                  "sensitivity": (layers,)}
        if self.int8_error is not None:
            shapes["int8_error"] = (layers, heads)
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
            if tensor.dtype != torch.float32 and not (name == "place_mass" and tensor.dtype == torch.float16):
                raise ValueError(f"{name} must be float32, got {tensor.dtype}")
            if not tensor.isfinite().all():
                raise ValueError(f"{name} must be finite")
            # Sparsity is one minus a sum, so that rounding may take it below 0.
            if tensor.min() < (-SLACK if name == "sparsity" else 0):
                raise ValueError(f"{name} must not be negative, got {tensor.min():.6g}")
        for name, dims in SHARES.items():
            tensor = getattr(self, name).float()
            largest = (tensor.sum(dims) if dims else tensor).max()
            if largest > 1 + SLACK:
                raise ValueError(f"{name} must be shares{' that sum to at most 1' if dims else ''}, got {largest:.6g}")
        return self


def _header(data: bytes) -> dict[str, Any]:
    """The header of a safetensors file, which says what follows: its length in 8 bytes, then JSON."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, MAX_HEADER):
        raise ValueError(f"must be a safetensors file with a header of at most {MAX_HEADER} bytes, got "
                         f"{length if len(data) >= 8 else 'none'} in a file of {len(data)}")
    try:
        header = parse_json(data[8:8 + length].decode())
    except ValueError as error:
        raise ValueError(f"must be a safetensors file, got another header: {error}") from None
    Field(header, "the header").members(optional=None)
    return dict(header)


def _tensors(data: bytes) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data)
    except (SafetensorError, KeyError, RuntimeError, OverflowError) as error:
        raise ValueError(f"must be a safetensors file: {error}") from None


def _in_order(data: bytes) -> bytes:
    """A safetensors file with its metadata sorted, which safetensors leaves in a random order: equal profiles have
    equal files."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]
