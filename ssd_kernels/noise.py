"""Exponential noise for sampling: a number depends on its picture's seed, its step and its code only (philox.py).

So a picture's numbers do not depend on its batch, nothing is remembered between steps, and a captured graph goes on
with the step that it reads on the device.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch

from .philox import exponential
from .triton import launch

__all__ = ["exponential_", "in_one_launch"]

GROUPS = 256  # of four codes in a program


def exponential_(out: torch.Tensor, seeds: torch.Tensor, steps: torch.Tensor) -> None:
    """Fill ``out`` with `exponential`, in one launch where `in_one_launch` says so.

    Args:
        out: float32 ``[pictures, codes]``, contiguous.
        seeds, steps: int64 ``[pictures]`` on the same device; ``steps`` may be one number, expanded.

    Raises:
        TypeError, ValueError: another dtype, shape or device.
    """
    for name, tensor, dtype, shape in (("out", out, torch.float32, None), ("seeds", seeds, torch.int64, out.shape[:1]),
                                       ("steps", steps, torch.int64, out.shape[:1])):
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
        if tensor.device != out.device or (shape is None and tensor.dim() != 2) or (shape and tensor.shape != shape):
            raise ValueError(f"{name} must be {'[pictures, codes]' if shape is None else list(shape)} on {out.device}, "
                             f"got {list(tensor.shape)} on {tensor.device}")
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {out.stride()}")
    if in_one_launch(out.device):
        with torch.cuda.device(out.device):
            launch_kernel(_kernel(), out, seeds, steps)
    else:
        out.copy_(exponential(seeds, steps, out.shape[1]))


def in_one_launch(device: torch.device) -> bool:
    """Whether a kernel draws the noise on a device: Triton is installed, and the device is a GPU."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def launch_kernel(kernel: Any, out: torch.Tensor, seeds: torch.Tensor, steps: torch.Tensor) -> None:
    """`exponential_` by `triton.noise.noise_kernel`, or what stands for it; arguments are checked."""
    pictures, codes = out.shape
    if pictures:
        kernel[(pictures, -(-codes // (4 * GROUPS)))](out, seeds, seeds.stride(0), steps, steps.stride(0), codes,
                                                      GROUPS=GROUPS, **launch.compile_options(enable_fp_fusion=False))


@cache
def _kernel() -> Any:
    """The kernel: importing it imports Triton, which `import ssd_kernels` must not."""
    from .triton.noise import noise_kernel

    return noise_kernel
