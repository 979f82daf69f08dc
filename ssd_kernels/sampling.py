"""Tokens of all pictures in one launch: guidance, filters, noise and choice (filters.py)."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from .filters import PerPicture, tail_share
from .triton import launch

__all__ = ["MAX_CODES", "sample_in_one_launch"]

MAX_CODES = 2**14  # a program holds them in registers


def sample_in_one_launch(logits: torch.Tensor, scale: torch.Tensor, seeds: torch.Tensor, steps: torch.Tensor,
                         temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
                         each: PerPicture | None = None) -> torch.Tensor:
    """As `filters.sample`, on a GPU where `noise.in_one_launch`, from up to `MAX_CODES` codes.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    check(logits, scale, seeds, steps, temperature, top_k, top_p, each)
    tokens = torch.empty(len(seeds), dtype=torch.long, device=logits.device)
    with torch.cuda.device(logits.device):
        launch_kernel(_kernel(), tokens, logits, scale, seeds, steps, temperature, top_k, top_p, each)
    return tokens


def check(logits: torch.Tensor, scale: torch.Tensor, seeds: torch.Tensor, steps: torch.Tensor, temperature: float,
          top_k: int, top_p: float, each: PerPicture | None) -> None:
    """Raise TypeError or ValueError unless the arguments are what `sample_in_one_launch` takes."""
    pictures, count = seeds.shape[0], scale.shape[0]
    for name, tensor, dtype, shape in (
            ("logits", logits, torch.float32, (pictures + count, logits.shape[-1])),
            ("scale", scale, torch.float32, (min(count, pictures),)), ("seeds", seeds, torch.int64, (pictures,)),
            ("steps", steps, torch.int64, (pictures,)),
            *((f"each.{name}", tensor, torch.float32 if name == "temperature" else torch.int32, (pictures,))
              for name, tensor in (each._asdict() if each is not None else {}).items())):
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
        if tensor.shape != shape or tensor.device != logits.device:
            raise ValueError(f"{name} must be {list(shape)} on {logits.device}, got {list(tensor.shape)} on "
                             f"{tensor.device}")
    for name, tensor in (("scale", scale), *(each._asdict() if each is not None else {}).items()):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    if not logits.is_contiguous() or not 0 < logits.shape[1] <= MAX_CODES:
        raise ValueError(f"logits must be contiguous with at most {MAX_CODES} codes, got {list(logits.shape)} with "
                         f"strides {logits.stride()}")
    for name, value, fits, allowed in (("temperature", temperature, temperature > 0, "above 0"),
                                       ("top_k", top_k, top_k >= 0, "at least 0"),
                                       ("top_p", top_p, 0 <= top_p <= 1, "within 0 .. 1")):
        if not fits:
            raise ValueError(f"{name} must be {allowed}, got {value}")


def launch_kernel(kernel: Any, tokens: torch.Tensor, logits: torch.Tensor, scale: torch.Tensor, seeds: torch.Tensor,
                  steps: torch.Tensor, temperature: float, top_k: int, top_p: float,
                  each: PerPicture | None = None) -> None:
    """`filters.sample` by `triton.sample.sample_kernel`, or what stands for it; ``tokens``: int64 ``[pictures]``."""
    codes = logits.shape[1]
    block = max(launch.power_of_two(codes), 64)
    warps = max(4, min(32, block // 512))
    options = launch.compile_options(enable_fp_fusion=False, num_warps=warps)
    numbers = (float(temperature), top_k, tail_share(top_p)) if each is None else each
    if len(tokens):
        kernel[(len(tokens),)](tokens, logits, scale, seeds, seeds.stride(0), steps, steps.stride(0), len(tokens),
                               len(scale), codes, *numbers, EACH=each is not None,
                               TOP_K=each is not None or 0 < top_k < codes, TOP_P=each is not None or top_p < 1,
                               BLOCK=block, CHUNK=min(block, 128 * warps), **options)


@cache
def _kernel() -> Any:
    """The kernel: importing it imports Triton, which `import ssd_kernels` must not."""
    from .triton.sample import sample_kernel

    return sample_kernel
