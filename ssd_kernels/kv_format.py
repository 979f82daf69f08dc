"""Storage formats of keys and values (docs/specification.md, section 3.13), and the 8-bit one in plain torch."""

from __future__ import annotations

import torch

__all__ = ["KV_FORMATS", "SMALLEST_AMAX", "decoded", "dequantise", "encoded", "quantise", "vector_bytes"]

KV_FORMATS = ("auto", "int8")  # in the cache's dtype; as signed bytes with a scale per vector
LARGEST = 127
# A vector whose largest element is below has no scale that is a normal float32, and is stored as zeros.
SMALLEST_AMAX = LARGEST * torch.finfo(torch.float32).smallest_normal


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors as signed bytes, each with the scale that its largest element gives it.

    scale = amax / 127 and byte = round half to even(x * (127 / amax)) within -127 .. 127, in IEEE float32, so that
    every backend stores the same bits. A vector whose amax is below `SMALLEST_AMAX` has scale 0, one with an element
    that is not finite has scale NaN; the bytes of both are 0.

    Args:
        x: ``[..., D]``, any floating dtype, rounded to the cache's.

    Returns:
        bytes int8 ``[..., D]`` and scales float32 ``[...]``.
    """
    x = x.to(torch.float32)
    amax = x.abs().amax(-1)
    largest = torch.full_like(amax, LARGEST)  # a tensor: by a number, torch multiplies with its reciprocal on GPUs
    usable = torch.isfinite(amax) & (amax >= SMALLEST_AMAX)
    scales = torch.where(usable, amax / largest, torch.where(torch.isfinite(amax), 0.0, torch.nan))
    scaled = (x * (largest / amax)[..., None]).round().clamp(-LARGEST, LARGEST)
    return torch.where(usable[..., None], scaled, 0.0).to(torch.int8), scales


def dequantise(data: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What `quantise` stored, as it is read: ``data`` int8 ``[..., D]`` times ``scales`` ``[...]``, in ``dtype``."""
    return data.to(dtype) * scales[..., None].to(dtype)


def encoded(kv_format: str, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Keys and values ``[..., D]`` as slots hold them, in the order of `ssd_kernels.state.LayerState.slabs`."""
    if kv_format == "auto":
        return k, v
    (key_bytes, key_scales), (value_bytes, value_scales) = quantise(k), quantise(v)
    return key_bytes, value_bytes, key_scales, value_scales


def decoded(held: tuple[torch.Tensor, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[..., D]`` in ``dtype`` of what `encoded` gave."""
    if len(held) == 2:
        return held[0].to(dtype), held[1].to(dtype)
    return dequantise(held[0], held[2], dtype), dequantise(held[1], held[3], dtype)


def vector_bytes(kv_format: str, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one stored key or value of ``head_dim`` elements in a cache of ``dtype``."""
    return head_dim * dtype.itemsize if kv_format == "auto" else head_dim + torch.float32.itemsize
