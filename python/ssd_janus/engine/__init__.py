"""The engine: Janus' picture loop without transformers' overhead, with the same tokens (docs/engine.md)."""

from __future__ import annotations

from .decoding import decode
from .engine import Engine, unconditional_prompt
from .memory import MemoryReport, available_memory, decode_bytes, max_batch
from .rollout import Rollout
from .sampling import Sampling, sampling_settings
from .timing import StepTiming
from .weights import fuse, unfuse, unsupported

__all__ = ["Engine", "MemoryReport", "Rollout", "Sampling", "StepTiming", "available_memory", "decode", "decode_bytes",
           "fuse", "max_batch", "sampling_settings", "unconditional_prompt", "unfuse", "unsupported"]
