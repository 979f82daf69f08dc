"""`CachePlan`: what every head of a model keeps, as plain data.

Plan files (`CachePlan.save`) carry a version. Fields and values that came later, ``pinned``, ``score="position"``,
``score="decayed"`` and ``kv_format``, are written only where a plan uses them, and readers refuse what they do not
know. So a file of the same version either means the same to an older reader or is refused by it, and the version stays.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .arguments import check_int
from .files import write_atomically
from .heads import MAX_PINNED_OF_ALL, HeadSpec
from .kv_format import KV_FORMATS, vector_bytes
from .layout import LayerLayout, peak_tokens
from .reading import Field, naming, read_json, shown

__all__ = ["CachePlan"]

PLAN_FORMAT = "ssd_kernels.plan"
PLAN_VERSION = 1
MAX_BYTES = 2**25  # of a file; one of Janus-Pro-7B with random pins in every head takes 2**23
MAX_HEADS = 2**16  # of all layers


@dataclass(frozen=True, init=False)
class CachePlan:
    """Head specs for every layer and KV head, when to evict, whether the prompt is protected, and how all is stored.

    Attributes:
        layers: ``[num_layers][num_heads]`` head specs; every layer has the same number of KV heads.
        row_buffer: R in steps; 0 evicts at every step, 24 is the paper's row buffer for a 24 x 24 picture.
        keep_prompt: prompt tokens are never evicted and not counted in W or M.
        kv_format: how keys and values are stored: ``"auto"``, in the cache's dtype, or ``"int8"``, as signed bytes with
            a scale per token and head (docs/specification.md, section 3.13).
    """

    layers: tuple[tuple[HeadSpec, ...], ...]
    row_buffer: int
    keep_prompt: bool
    kv_format: str

    def __init__(self, layers: Sequence[Sequence[HeadSpec]], row_buffer: int = 0, keep_prompt: bool = True,
                 kv_format: str = "auto") -> None:
        """
        Raises:
            TypeError: an entry is not a `HeadSpec`, or ``row_buffer`` / ``keep_prompt`` has another type.
            ValueError: no layer, no head, layers of different lengths, a negative ``row_buffer``, an unknown
                ``kv_format``, more than 65,536 heads or more than 4,194,304 pinned tokens in all.
        """
        try:
            frozen = tuple(tuple(heads) for heads in layers)
        except TypeError:
            raise TypeError(f"layers must be a sequence of sequences of HeadSpec, got {shown(layers)}") from None
        if not frozen or not frozen[0]:
            raise ValueError("layers must hold at least one layer with at least one head, got none")
        _check_heads(sum(map(len, frozen)))
        for index, heads in enumerate(frozen):
            if len(heads) != len(frozen[0]):
                raise ValueError(f"layers must all have the same number of heads: layer 0 has {len(frozen[0])}, "
                                 f"layer {index} has {len(heads)}")
            for head, spec in enumerate(heads):
                if not isinstance(spec, HeadSpec):
                    raise TypeError(f"layers[{index}][{head}] must be a HeadSpec, got {shown(spec)}")
        pinned = sum(len(spec.pinned) for heads in frozen for spec in heads)
        if pinned > MAX_PINNED_OF_ALL:
            raise ValueError(f"layers must pin at most {MAX_PINNED_OF_ALL} tokens in all, got {pinned}")
        check_int("row_buffer", row_buffer, 0)
        if not isinstance(keep_prompt, bool):
            raise TypeError(f"keep_prompt must be a bool, got {shown(keep_prompt)}")
        if not isinstance(kv_format, str) or kv_format not in KV_FORMATS:
            raise ValueError(f"kv_format must be one of {', '.join(map(repr, KV_FORMATS))}, got {shown(kv_format)}")
        object.__setattr__(self, "layers", frozen)
        object.__setattr__(self, "row_buffer", row_buffer)
        object.__setattr__(self, "keep_prompt", keep_prompt)
        object.__setattr__(self, "kv_format", kv_format)

    @classmethod
    def uniform(cls, spec: HeadSpec, num_layers: int, num_heads: int, row_buffer: int = 0,
                keep_prompt: bool = True, kv_format: str = "auto") -> CachePlan:
        """The same head spec for every one of ``num_layers`` x ``num_heads`` KV heads."""
        check_int("num_layers", num_layers, 1)
        check_int("num_heads", num_heads, 1)
        _check_heads(num_layers * num_heads)
        return cls([[spec] * num_heads] * num_layers, row_buffer, keep_prompt, kv_format)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_heads(self) -> int:
        """KV heads per layer."""
        return len(self.layers[0])

    def budget(self, num_visual_tokens: int = 576) -> float:
        """Mean over heads of the largest number of visual slots a head ever holds, over ``num_visual_tokens``.

        The row buffer is counted, and so is the slot of the new token that a step appends before it evicts
        (docs/specification.md).
        """
        check_int("num_visual_tokens", num_visual_tokens, 1)
        peaks = [peak_tokens(spec.size, 0, num_visual_tokens, self.row_buffer)
                 for heads in self.layers for spec in heads]
        return sum(peaks) / len(peaks) / num_visual_tokens

    def byte_budget(self, num_visual_tokens: int = 576, *, head_dim: int, dtype: torch.dtype) -> float:
        """`budget` in bytes: of keys, values and their scales, over those of a full plan that stores them in ``dtype``.

        Args:
            num_visual_tokens, head_dim, dtype: as of `CompressedCache`.
        """
        check_int("head_dim", head_dim, 1)
        return (self.budget(num_visual_tokens) * vector_bytes(self.kv_format, head_dim, dtype)
                / vector_bytes("auto", head_dim, dtype))

    def nbytes(self, *, batch_size: int, head_dim: int, max_prompt: int, dtype: torch.dtype,
               num_visual_tokens: int = 576, shared_prompts: int | None = None) -> int:
        """Bytes a `CompressedCache` of this plan allocates: slabs, their scales, scores, positions, cursors, tables and
        masks.

        Args: as of `CompressedCache`.
        """
        check_int("batch_size", batch_size, 1)
        check_int("head_dim", head_dim, 1)
        return sum(LayerLayout.build(heads, self, max_prompt, num_visual_tokens, shared_prompts=shared_prompts)
                   .nbytes(batch_size, head_dim, dtype) for heads in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values, as `save` writes them."""
        stored = {} if self.kv_format == "auto" else {"kv_format": self.kv_format}
        return {"format": PLAN_FORMAT, "version": PLAN_VERSION, "row_buffer": self.row_buffer,
                "keep_prompt": self.keep_prompt, **stored,
                "layers": [[spec.to_dict() for spec in heads] for heads in self.layers]}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON. The file appears whole or not at all."""
        text = json.dumps(self.to_dict(), indent=1) + "\n"
        write_atomically(Path(path), lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CachePlan:
        """Read a plan that `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a regular file of at most 32 MiB, not JSON, another format or version, unknown or missing
                fields, ragged layers, a head spec out of range. The message names the file and the field.
        """
        data = read_json(path, MAX_BYTES)
        with naming(path):
            return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: object) -> CachePlan:
        """The plan that `to_dict` described.

        Raises:
            ValueError: as `load`, without the file's name.
        """
        fields = Field(data).members(["format", "version", "row_buffer", "keep_prompt", "layers"], ["kv_format"])
        fields["format"].choice([PLAN_FORMAT])
        fields["version"].choice([PLAN_VERSION])
        row_buffer, keep_prompt = fields["row_buffer"].integer(0), fields["keep_prompt"].boolean()
        kv_format = fields["kv_format"].choice(KV_FORMATS) if "kv_format" in fields else "auto"
        layers = [heads.items(1) for heads in fields["layers"].items(1, MAX_HEADS)]
        _check_heads(sum(map(len, layers)))
        left = MAX_PINNED_OF_ALL
        specs: list[list[HeadSpec]] = [[] for _ in layers]
        for row, heads in zip(specs, layers, strict=True):
            for head in heads:
                row.append(HeadSpec.from_field(head, left))
                left -= len(row[-1].pinned)
        return cls(specs, row_buffer, keep_prompt, kv_format)


def _check_heads(count: int) -> None:
    if count > MAX_HEADS:
        raise ValueError(f"layers must have at most {MAX_HEADS} heads in all, got {shown(count)}")
