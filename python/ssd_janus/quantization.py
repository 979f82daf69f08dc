"""Weights in fewer bits by torchao, the extra ``[quantize]``.

A quantized weight is a tensor of torchao's own, in an ordinary ``nn.Linear``. With signed bytes, a scale for each row,
the engine multiplies by `ssd_kernels.linear` on a CPU; all other products are torchao's.
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


# Attributes of torchao's tensor of bytes, with a row for each of the matrix.
BYTES, SCALE = "qdata", "scale"


def in_bytes(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What a matrix ``[out, in]`` holds that is signed bytes, each row times a scale: as Int8WeightOnlyConfig makes it.

    Returns:
        (int8 ``[out, in]``, float32 ``[out, 1]``), both contiguous; None of all other tensors.
    """
    if not is_quantized(tensor):
        return None
    names, how = tensor.__tensor_flatten__()
    held = {name: getattr(tensor, name) for name in names}
    zero_point = held.pop("zero_point", None)
    # Whatever else is said of a tensor may change what it stands for, or how rows are multiplied with it.
    said = {name for name, value in how.items() if value} if isinstance(how, dict) else {None}
    if held.keys() != {BYTES, SCALE} or said - {"block_size", "dtype", "reduce_range"}:
        return None
    digits, scale = held[BYTES], held[SCALE]
    if (digits.dtype != torch.int8 or digits.shape != tensor.shape or scale.dtype != torch.float32
            or scale.shape != (len(digits), 1) or not (digits.is_contiguous() and scale.is_contiguous())
            or zero_point is not None and bool(zero_point.any())):
        return None
    return digits, scale


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """The values that a tensor stands for, as a plain one."""
    return tensor.dequantize() if is_quantized(tensor) else tensor


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes that a tensor takes in memory: of a quantized one those of what it holds."""
    if not is_quantized(tensor):
        return tensor.nbytes
    return sum(stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
