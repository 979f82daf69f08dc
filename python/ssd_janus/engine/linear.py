"""Products with weights, and what comes before and after them: by torch, or by `ssd_kernels.linear` on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional

from ssd_attach.internals import ACT2FN
from ssd_kernels.linear import Product
from ssd_kernels.pages import in_huge_pages

Activation = Callable[[torch.Tensor], torch.Tensor]
SILU = (type(ACT2FN["silu"]), nn.SiLU)
# With AMX, rows up to which the kernel is the faster one in half precision. It multiplies at the rate of AVX-512, torch
# many times as fast, but reads weights at half the speed of memory. By arithmetic (docs/benchmarks.md).
AMX_ROWS = 32


@dataclass(frozen=True)
class Norm:
    """RMSNorm (arXiv 1910.07467) with weights ``[in]``."""

    weight: torch.Tensor
    epsilon: float


@dataclass(frozen=True)
class Linear:
    """Rows times a matrix of weights, by torch.

    Attributes:
        weight: ``[out, in]``; gated ``[2 out, in]``, the gates first.
        bias: a number for each row of ``weight``, or None.
        norm: of the rows, before the product, or None.
        activation: after it, or None.
        gated: the activation is of the gates, and times the rest (SwiGLU, arXiv 2002.05202).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    norm: Norm | None = None
    activation: Activation | None = None
    gated: bool = False

    def __call__(self, inputs: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            inputs: ``[rows, in]``.
            plus: ``[rows, out]``, added to the result, or None.

        Returns:
            ``[rows, out]``.
        """
        if self.norm is not None:
            inputs = functional.rms_norm(inputs, self.norm.weight.shape, self.norm.weight, self.norm.epsilon)
        return self.finished(self.product(inputs), plus)

    def product(self, inputs: torch.Tensor) -> torch.Tensor:
        """The product alone, of rows after their norm."""
        return functional.linear(inputs, self.weight, self.bias)

    def finished(self, out: torch.Tensor, plus: torch.Tensor | None) -> torch.Tensor:
        """What follows the product ``out``."""
        if self.activation is not None:
            if self.gated:
                gate, rest = out.chunk(2, -1)
                out = self.activation(gate) * rest
            else:
                out = self.activation(out)
        return out if plus is None else plus + out


@dataclass(frozen=True)
class QuantizedLinear(Linear):
    """A `Linear` of matrices above one another of which torchao makes the products.

    Attributes:
        matrices: weight and bias of each; ``weight`` and ``bias`` are those of the first.
        digits, scale: what the matrices hold where that is bytes (`quantization.in_bytes`), as one matrix; or None.
        biases: of all matrices, or None.
    """

    matrices: Sequence[tuple[torch.Tensor, torch.Tensor | None]] = ()
    digits: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    biases: torch.Tensor | None = None

    def product(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.cat([functional.linear(inputs, *matrix) for matrix in self.matrices], -1)


class KernelLinear:
    """A `Linear` by `ssd_kernels.linear`, all but rare activations in one call. It reads the same weights.

    Attributes:
        stored: the matrix as it lies in memory.
        most_rows: rows up to which the kernel multiplies; None: any number.
    """

    def __init__(self, linear: Linear, most_rows: int | None) -> None:
        """
        Args:
            linear: with weights that `ssd_kernels.linear.unsupported` has nothing against; quantized ones in bytes.
            most_rows: multiply more rows by torch; None: never, nor by torchao, which makes floats of bytes first.
        """
        scale, bias = None, linear.bias
        self.stored = linear.weight
        if isinstance(linear, QuantizedLinear):
            if linear.digits is None or linear.scale is None:
                raise ValueError("linear must hold plain weights or bytes, got others of torchao's")
            self.stored, scale, bias, most_rows = linear.digits, linear.scale.view(-1), linear.biases, None
        in_huge_pages(self.stored)
        self._linear, self.most_rows = linear, most_rows
        self._fused = linear.activation is None or isinstance(linear.activation, SILU)
        activation = "none" if linear.activation is None or not self._fused else "swiglu" if linear.gated else "silu"
        norm = {} if linear.norm is None else {"norm": linear.norm.weight, "epsilon": linear.norm.epsilon}
        self._product = Product(self.stored, bias, activation=activation, scale=scale, dtype=linear.weight.dtype,
                                **norm)

    @property
    def fused(self) -> Product | None:
        """The one call that is all of it, or None where something follows that the kernel does not know."""
        return self._product if self._fused else None

    def __call__(self, inputs: torch.Tensor, plus: torch.Tensor | None = None) -> torch.Tensor:
        """As `Linear`."""
        if self.most_rows is not None and len(inputs) > self.most_rows:
            return self._linear(inputs, plus)
        if self._fused:
            return self._product(inputs, plus)
        return self._linear.finished(self._product(inputs), plus)


@dataclass(frozen=True)
class Chain:
    """Products one after another, as in the generation head and the aligner."""

    linears: Sequence[Linear | KernelLinear]

    @classmethod
    def of(cls, linears: Sequence[Linear], activation: Activation, norm: Norm | None = None) -> Chain:
        """Products with an activation between them, and a norm before the first."""
        chain = [replace(linear, activation=activation) for linear in linears]
        chain[0], chain[-1] = replace(chain[0], norm=norm), replace(chain[-1], activation=None)
        return cls(chain)

    def by_kernel(self, most_rows: int | None) -> Chain:
        return Chain([KernelLinear(linear, most_rows) if isinstance(linear, Linear) else linear
                      for linear in self.linears])

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        for linear in self.linears:
            inputs = linear(inputs)
        return inputs


def most_rows(dtype: torch.dtype, exact: bool, amx: bool) -> int | None:
    """Rows up to which the kernel multiplies; None: any number.

    Args:
        dtype: of the weights. exact: a row's bits must not depend on how many there are. amx: the processor has AMX.
    """
    return AMX_ROWS if amx and dtype != torch.float32 and not exact else None


def has_amx() -> bool:
    """Whether torch finds AMX, which multiplies half precision many times as fast as AVX-512."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())
