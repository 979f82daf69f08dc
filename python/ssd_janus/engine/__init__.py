"""The engine: Janus' picture loop without transformers' overhead, with the same tokens (docs/engine.md)."""

from __future__ import annotations

from .decoding import decode
from .engine import Engine
from .memory import MemoryReport, available_memory, decode_bytes, max_batch
from .rollout import Rollout
from .sampling import Sampling, sampling_settings, set_sampling
from .scheduler import Closed, Load, QueueFull, Scheduler, Ticket
from .slots import PictureRequest, Slots
from .timing import StepTiming
from .unconditional import unconditional_prompt
from .weights import fuse, unfuse, unsupported

__all__ = ["Closed", "Engine", "Load", "MemoryReport", "PictureRequest", "QueueFull", "Rollout", "Sampling",
           "Scheduler", "Slots", "StepTiming", "Ticket", "available_memory", "decode", "decode_bytes", "fuse",
           "max_batch", "sampling_settings", "set_sampling", "unconditional_prompt", "unfuse", "unsupported"]
