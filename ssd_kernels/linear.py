"""Products of a few rows with a matrix of weights on a CPU: what decoding one token at a time waits for.

The kernel (csrc/cpu/linear_kernels.h) reads the matrix where it lies, once for up to 64 rows, at about the speed of
memory for the fewest. It may hold signed bytes with a scale for each row, which every dtype multiplies without rounding
them. Sums are float32, and a row's results have the same bits whatever other rows there are, for any number of threads.
``torch.ops.ssd_kernels.linear`` is the operator as torch.compile sees it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from . import native
from .arguments import plain
from .backends.cpu import DTYPE_CODES

__all__ = ["ACTIVATIONS", "Product", "linear", "reference", "unsupported"]

ACTIVATIONS = ("none", "silu", "swiglu")

_library = torch.library.Library("ssd_kernels", "FRAGMENT")
_library.define("linear(Tensor x, Tensor weight, Tensor? bias=None, Tensor? norm=None, float epsilon=1e-6, "
                "str activation='none', Tensor? plus=None, Tensor? scale=None) -> Tensor",
                tags=(torch.Tag.pt2_compliant_tag,))


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot multiply rows of a dtype with weights, or None when it can."""
    if device.type != "cpu":
        return f"it needs device cpu, got {device}"
    if dtype not in DTYPE_CODES:
        return f"it needs dtype float32, bfloat16 or float16, got {dtype}"
    return native.missing()


class Product:
    """A matrix of weights to multiply rows with, and what comes before and after that.

    Weights, scale, bias and norm are read where they are at every call: changes in place are seen.

    Attributes:
        dtype: of rows and results; ``inputs``, ``outputs``: of a row.
        native: the extension's view of it.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, norm: torch.Tensor | None = None,
                 epsilon: float = 1e-6, activation: str = "none", scale: torch.Tensor | None = None,
                 dtype: torch.dtype | None = None) -> None:
        """
        Args:
            weight: ``[out, in]`` of ``dtype``, or of int8 with a scale, on a CPU, contiguous; with ``swiglu``
                ``[2 out, in]``, the gates first.
            bias: a number for each row of ``weight``, or None.
            norm: weights ``[in]`` of the RMSNorm (arXiv 1910.07467) that comes before the product, or None.
            epsilon: of the norm.
            activation: ``"none"``; ``"silu"``; or ``"swiglu"`` (arXiv 2002.05202), SiLU of the gates times the rest.
            scale: float32, what each row of an int8 ``weight`` is to be multiplied with; None with other weights.
            dtype: float32, bfloat16 or float16, of rows, results, bias and norm; None: that of ``weight``.

        Raises:
            TypeError: a tensor is not plain (`ssd_kernels.arguments.plain`).
            ValueError: shapes, dtypes or devices do not fit together, or `unsupported`.
        """
        self.weight = plain("weight", weight)
        if weight.dim() != 2 or 0 in weight.shape or not weight.is_contiguous():
            raise ValueError(f"weight must be contiguous [out, in], got {list(weight.shape)} with strides "
                             f"{weight.stride()}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if weight.dtype == torch.int8 and (scale is None or dtype is None):
            raise ValueError("weight of torch.int8 needs a scale and a dtype")
        self.dtype = weight.dtype if dtype is None else dtype
        if reason := unsupported(weight.device, self.dtype):
            raise ValueError(f"weight cannot be multiplied with: {reason}")
        stored = self.dtype if scale is None else torch.int8
        if weight.dtype != stored:
            raise ValueError(f"weight must be of {stored} {'without' if scale is None else 'with'} a scale, got "
                             f"{weight.dtype}")
        gated = activation == "swiglu"
        rows, self.inputs = weight.shape
        if gated and rows % 2:
            raise ValueError(f"weight must have an even number of rows for swiglu, got {rows}")
        self.outputs = rows // 2 if gated else rows
        self.scale, self.bias, self.norm = (
            None if tensor is None else _vector(name, tensor, size, kind) for name, tensor, size, kind in
            (("scale", scale, rows, torch.float32), ("bias", bias, rows, self.dtype),
             ("norm", norm, self.inputs, self.dtype)))
        self.native = native.extension().Linear(
            DTYPE_CODES[self.dtype], self.weight.data_ptr(),
            *(0 if tensor is None else tensor.data_ptr() for tensor in (self.scale, self.bias, self.norm)),
            epsilon, activation != "none", gated, self.inputs, self.outputs)
        self._run: Callable[..., None] = self.native.run

    def __call__(self, x: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            x: ``[rows, in]`` of ``dtype``, unit stride in the last dimension.
            plus: ``[rows, out]``, added to the result, or None.

        Returns:
            ``[rows, out]``, contiguous.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        x = self._rows("x", x, self.inputs)
        rows = len(x)
        out = torch.empty((rows, self.outputs), dtype=x.dtype)
        if plus is None:
            address = stride = 0
        else:
            plus = self._rows("plus", plus, self.outputs)
            if len(plus) != rows:
                raise ValueError(f"plus must have as many rows as x, {rows}, got {len(plus)}")
            address, stride = plus.data_ptr(), plus.stride(0)
        self._run(x.data_ptr(), x.stride(0), rows, address, stride, out.data_ptr(), torch.get_num_threads())
        return out

    def _rows(self, name: str, tensor: torch.Tensor, size: int) -> torch.Tensor:
        tensor = plain(name, tensor)
        if (tensor.dim() != 2 or tensor.shape[1] != size or tensor.dtype != self.dtype or not tensor.is_cpu
                or tensor.stride(1) != 1 and size > 1):
            raise ValueError(f"{name} must be [rows, {size}] of {self.dtype} on cpu with unit last stride, got "
                             f"{list(tensor.shape)} of {tensor.dtype} on {tensor.device} with strides "
                             f"{tensor.stride()}")
        return tensor


def _vector(name: str, tensor: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    tensor = plain(name, tensor)
    if tensor.shape != (size,) or tensor.dtype != dtype or not tensor.is_cpu or tensor.stride(0) != 1:
        raise ValueError(f"{name} must be contiguous [{size}] of {dtype} on cpu, got {list(tensor.shape)} of "
                         f"{tensor.dtype} on {tensor.device}")
    return tensor


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None,
           norm: torch.Tensor | None = None, epsilon: float = 1e-6, activation: str = "none",
           plus: torch.Tensor | None = None, scale: torch.Tensor | None = None) -> torch.Tensor:
    """One `Product`; arguments, result and errors are those of its constructor and call.

    With a scale, ``dtype`` is that of ``x``.
    """
    product = Product(weight, bias, norm=norm, epsilon=epsilon, activation=activation, scale=scale,
                      dtype=None if scale is None else x.dtype)
    return product(x, plus)


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None,
              norm: torch.Tensor | None = None, epsilon: float = 1e-6, activation: str = "none",
              plus: torch.Tensor | None = None, scale: torch.Tensor | None = None) -> torch.Tensor:
    """The twin of `linear` in torch's own operations, for any device and floating dtype."""
    if norm is not None:
        x = functional.rms_norm(x, norm.shape, norm, epsilon)
    out = functional.linear(x, weight.to(x.dtype), bias if scale is None else None)
    if scale is not None:
        out = out * scale.to(out.dtype)
        out = out if bias is None else out + bias
    if activation == "swiglu":
        gate, rest = out.chunk(2, -1)
        out = functional.silu(gate) * rest
    elif activation == "silu":
        out = functional.silu(out)
    return out if plus is None else plus + out


def _fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, norm: torch.Tensor | None = None,
          epsilon: float = 1e-6, activation: str = "none", plus: torch.Tensor | None = None,
          scale: torch.Tensor | None = None) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0] // (1 + (activation == "swiglu"))))


_library.impl("linear", linear, "CPU")
torch.library.register_fake("ssd_kernels::linear", _fake, lib=_library)
