"""Products with weights, and what follows them: plainly with torch, or from weights packed for oneDNN."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ssd_attach.internals import ACT2FN

Activation = Callable[[torch.Tensor], torch.Tensor]
# oneDNN's names of activations that it applies while a product is still in registers.
FUSED = {type(ACT2FN["silu"]): "swish", nn.SiLU: "swish", type(ACT2FN["gelu"]): "gelu"}


@dataclass(frozen=True)
class Linear:
    """``inputs @ weight.T + bias``, through an activation if there is one.

    Attributes:
        weight: ``[out, in]``.
        bias: ``[out]``, or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    activation: Activation | None = None

    def __call__(self, inputs: torch.Tensor, *, plus: torch.Tensor | None = None,
                 times: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            inputs: ``[rows, in]``.
            plus, times: ``[rows, out]``, added to or multiplied with the result; at most one of them.

        Returns:
            ``[rows, out]``.
        """
        out = functional.linear(inputs, self.weight, self.bias)
        if self.activation is not None:
            out = self.activation(out)
        if plus is not None:
            return plus + out
        return out if times is None else out * times


class PackedLinear:
    """A `Linear` whose weight is copied once, as float32, into the order in which oneDNN reads it.

    What follows the product is done in the same pass. Changes of the model's weights are not seen afterwards.
    """

    def __init__(self, linear: Linear) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.float().contiguous(), None)
        self._bias = None if linear.bias is None else linear.bias.float()
        self._fused = FUSED.get(type(linear.activation), "none")
        self._activation = linear.activation if self._fused == "none" else None

    def __call__(self, inputs: torch.Tensor, *, plus: torch.Tensor | None = None,
                 times: torch.Tensor | None = None) -> torch.Tensor:
        """As `Linear`, in float32."""
        other = plus if times is None else times
        if other is not None:
            assert self._activation is None and self._fused == "none"
            return _fused_binary(inputs, other, self._weight, self._bias, "mul" if plus is None else "add")
        out = _fused_unary(inputs, self._weight, self._bias, self._fused, [], "none")
        return out if self._activation is None else self._activation(out)


def _fused_unary(*arguments: Any) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(*arguments)
    return out


def _fused_binary(*arguments: Any) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(*arguments)
    return out


@dataclass(frozen=True)
class Gated:
    """The first half of SwiGLU (arXiv 2002.05202): ``activation(gate(x)) * up(x)``, one product for both."""

    gate_up: Linear
    activation: Activation

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(inputs).chunk(2, -1)
        return self.activation(gate) * up


class PackedGated:
    """`Gated` from packed weights: two products, so that activation and product are part of them."""

    def __init__(self, gated: Gated) -> None:
        weights, bias = gated.gate_up.weight.chunk(2), gated.gate_up.bias
        biases = (None, None) if bias is None else bias.chunk(2)
        self.gate = PackedLinear(Linear(weights[0], biases[0], gated.activation))
        self.up = PackedLinear(Linear(weights[1], biases[1]))

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.up(inputs, times=self.gate(inputs))


@dataclass(frozen=True)
class Chain:
    """Products one after another, as in the generation head and the aligner."""

    linears: Sequence[Linear | PackedLinear]

    @classmethod
    def of(cls, modules: Sequence[nn.Linear], activation: Activation) -> Chain:
        """Linear modules with an activation between them."""
        last = len(modules) - 1
        return cls([Linear(module.weight.detach(), None if module.bias is None else module.bias.detach(),
                           activation if index < last else None) for index, module in enumerate(modules)])

    def packed(self) -> Chain:
        return Chain([PackedLinear(linear) if isinstance(linear, Linear) else linear for linear in self.linears])

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        for linear in self.linears:
            inputs = linear(inputs)
        return inputs


def can_pack(dtype: torch.dtype) -> bool:
    """Whether packing weights of a dtype on this CPU gains anything.

    It does for float32, and for half precision without instructions for it, where products are otherwise slower than
    in float32.
    """
    operations = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and hasattr(operations, "_reorder_linear_weight")
            and hasattr(operations, "_linear_pointwise")):
        return False
    if dtype == torch.bfloat16:
        return not operations._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return not operations._is_mkldnn_fp16_supported()
    return dtype == torch.float32
