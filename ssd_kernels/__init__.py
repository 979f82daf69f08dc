"""Fast, exact attention over per-head compressed KV caches for autoregressive image generation."""

# torch goes first: the compiled extension must find torch's OpenMP runtime already loaded and share it.
import torch  # noqa: F401  # isort: skip

from . import linear, ops  # noqa: F401  # registers torch.ops.ssd_kernels
from .cache import CompressedCache
from .heads import HeadSpec
from .info import info
from .plan import CachePlan
from .version import __version__

__all__ = ["CachePlan", "CompressedCache", "HeadSpec", "__version__", "info"]
