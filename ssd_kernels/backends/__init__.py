"""Backends: who computes a decode step. A new one is a module with a `Backend` subclass, registered here."""

from __future__ import annotations

import warnings
from functools import cache

import torch

from .base import Backend
from .cpu import CPUBackend
from .cuda import CUDABackend
from .reference import ReferenceBackend
from .triton import TritonBackend

__all__ = ["Backend", "available", "backend_names", "get", "register", "resolve"]

_REGISTRY: dict[str, Backend] = {}


def register(backend: Backend) -> None:
    """Make ``backend`` known under its name; ``"auto"`` tries backends in the order of registration."""
    _REGISTRY[backend.name] = backend


register(CPUBackend())
register(CUDABackend())
register(TritonBackend())
register(ReferenceBackend())


def backend_names() -> list[str]:
    """Names of all registered backends, in the order ``"auto"`` tries them."""
    return list(_REGISTRY)


def get(name: str) -> Backend:
    """The backend of that name.

    Raises:
        ValueError: no such backend; the message lists those there are.
    """
    if name not in _REGISTRY:
        raise ValueError(f"backend must be one of {', '.join(['auto', *_REGISTRY])}, got {name!r}")
    return _REGISTRY[name]


def available() -> dict[str, str | None]:
    """For every backend why it cannot run here, or None when it can."""
    return {name: backend.unavailable() for name, backend in _REGISTRY.items()}


def resolve(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, kv_format: str = "auto") -> Backend:
    """The backend a cache will use.

    Args:
        name: a backend's name, or ``"auto"``: the first that can serve the request.
        device, dtype, head_dim, kv_format: what the cache asks for.

    Raises:
        ValueError: unknown name, or the named backend cannot serve the request; the message says why.
    """
    if name != "auto":
        backend = get(name)
        reason = backend.unavailable() or backend.unsupported(device, dtype, head_dim, kv_format)
        if reason:
            raise ValueError(f"backend={name!r} cannot be used: {reason}")
        return backend
    reasons: list[str] = []
    for backend in _REGISTRY.values():
        reason = backend.unavailable() or backend.unsupported(device, dtype, head_dim, kv_format)
        if reason is None:
            if isinstance(backend, ReferenceBackend):
                _warn_slow("; ".join(reasons))
            elif isinstance(backend, TritonBackend) and device.type == "cuda":
                _warn_without_cuda("; ".join(reasons))
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise ValueError(f"backend='auto' found no backend for device={device}, dtype={dtype}, head_dim={head_dim}, "
                     f"kv_format={kv_format!r}: "
                     + "; ".join(reasons))


@cache
def _warn_without_cuda(reasons: str) -> None:
    warnings.warn(f"ssd_kernels uses its Triton backend on the GPU ({reasons})", stacklevel=4)


@cache
def _warn_slow(reasons: str) -> None:
    warnings.warn(f"ssd_kernels falls back to its slow reference backend ({reasons})", stacklevel=4)
