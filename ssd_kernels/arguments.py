"""Checks of what callers pass: errors name the argument, what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .reading import shown

__all__ = ["SUSPECT", "check_int", "check_memory", "integers", "plain"]

# What has no memory has its offset for an address. Above this one, in bytes, no such offset is to be expected; tensors
# of machines that use addresses below it are looked at more closely.
SUSPECT = 2**36
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)


def check_int(name: str, value: object, minimum: int) -> int:
    """``value`` as an int that is at least ``minimum``.

    Raises:
        TypeError: ``value`` is not an integer (bool does not count as one).
        ValueError: ``value`` is below ``minimum``.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {shown(value)} of type {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {shown(value)}")
    return value


def plain(name: str, tensor: object) -> torch.Tensor:
    """``tensor`` as kernels read it, by address and strides: itself, or a copy with what it stands for.

    Copied are lazily negated views, zero tensors (which have no memory) and tensors whose elements are not aligned;
    subclasses that only add to tensors are taken for what they hold.

    Raises:
        TypeError: not a tensor, or one that is no strided memory: a fake tensor or another subclass that computes for
            itself, one inside torch.func's transforms, sparse, nested, of MKL-DNN. Quantized ones differ in dtype.
        ValueError: a meta tensor, or one whose storage was resized to nothing, as sharded training does.
    """
    try:  # the usual case, in a fraction of a microsecond
        if type(tensor) is torch.Tensor and not (tensor.is_neg() or tensor.is_nested) and (
                address := tensor.data_ptr()) > SUSPECT and not address % tensor.itemsize:
            return tensor
    except RuntimeError:  # torch's answer for what has no storage
        pass
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise TypeError(f"{name} must be a plain tensor, got a {type(tensor).__name__}")
    if type(tensor) is not torch.Tensor:
        tensor = tensor.as_subclass(torch.Tensor)
    if tensor.is_meta:
        raise ValueError(f"{name} must be a tensor with values, got one on meta")
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(f"{name} must be a plain tensor, got {'a nested' if tensor.is_nested else tensor.layout} one")
    tensor = tensor.resolve_neg()
    if not _has_memory(tensor):
        if _is_freed(tensor):
            raise ValueError(f"{name} must be a tensor with values, got one whose storage was freed")
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        if not _has_memory(tensor):
            raise TypeError(f"{name} must be a plain tensor, got one without memory of its own, as inside torch.func's "
                            "transforms (vmap, grad)")
    return tensor


def _has_memory(tensor: torch.Tensor) -> bool:
    """Whether the elements of a strided tensor, if there are any, lie aligned at an address."""
    try:
        address, offset = tensor.data_ptr(), tensor.storage_offset() * tensor.itemsize
    except RuntimeError:
        return False
    return address % tensor.itemsize == 0 if address > offset else tensor.numel() == 0


def _is_freed(tensor: torch.Tensor) -> bool:
    """Whether a strided tensor has elements and a storage without bytes; zero tensors have none by design."""
    try:
        return tensor.numel() > 0 and not tensor._is_zerotensor() and tensor.untyped_storage().nbytes() == 0
    except RuntimeError:
        return False


def check_memory(name: str, tensor: torch.Tensor) -> None:
    """Raise TypeError or ValueError unless ``tensor`` is `plain` as it is, so that its owner sees what is written."""
    if plain(name, tensor).data_ptr() != tensor.data_ptr():
        raise TypeError(f"{name} must be a plain tensor that can be changed in place, got a view to be copied first")


def integers(name: str, values: Sequence[int] | torch.Tensor) -> list[int]:
    """``values`` as a list of ints; raises TypeError or ValueError unless a tensor is 1-D and of an integer dtype."""
    if isinstance(values, torch.Tensor):
        values = plain(name, values)
        if values.dim() != 1:
            raise ValueError(f"{name} must be 1-D, got shape {list(values.shape)}")
        if values.dtype not in INTEGERS:
            raise TypeError(f"{name} must hold integers, got {values.dtype}")
        return [int(value) for value in values.tolist()]
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a sequence of integers or a 1-D integer tensor, got {type(values).__name__}")
    return [check_int(f"{name}[{entry}]", value, -2**31) for entry, value in enumerate(values)]
