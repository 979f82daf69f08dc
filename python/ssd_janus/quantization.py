"""Weights in fewer bits by torchao, the extra ``[quantize]``.

A quantized weight is a tensor of torchao's own, in an ordinary ``nn.Linear``. Its products are torchao's, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .extras import needs

FORMATS = ("int8",)


def quantize(model: Any, weights: str = "int8") -> None:
    """Quantize the linear weights of the language model's layers in place: nearly all that a step reads.

    Args:
        model: transformers' Janus, before it is drawn with.
        weights: ``"int8"``, signed bytes with a scale for each row of a matrix. What else torchao offers is had by its
            own ``quantize_(model.model.language_model, ...)``.

    Raises:
        ImportError: torchao is not installed; the message names the extra.
        ValueError: an unknown format.
    """
    if weights not in FORMATS:
        raise ValueError(f"weights must be one of {', '.join(FORMATS)}, got {weights!r}")
    with needs("quantize", "torchao"):
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    quantize_(model.model.language_model, Int8WeightOnlyConfig())


def is_quantized(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one of torchao's."""
    return type(tensor).__module__.split(".")[0] == "torchao"


def has_quantized_weights(module: nn.Module) -> bool:
    return any(map(is_quantized, module.parameters()))


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """The values that a tensor stands for, as a plain one."""
    return tensor.dequantize() if is_quantized(tensor) else tensor


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes that a tensor takes in memory: of a quantized one those of what it holds."""
    if not is_quantized(tensor):
        return tensor.nbytes
    return sum(stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
