"""The step as a CUDA graph: one launch from Python instead of hundreds."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from .batch import Batch

# Steps of the picture that run one operation at a time first: libraries set up their workspaces in them. They are
# real steps, so nothing has to be put back before the capture.
WARM_STEPS = 2
_capturing = threading.Lock()
CAPTURABLE = frozenset({"triton", "cuda"})


def can_capture(batch: Batch) -> bool:
    """Whether the batch's step launches everything on the device and reads nothing back."""
    return (batch.weights.device.type == "cuda" and batch.cache.backend in CAPTURABLE and batch.observer is None
            and not batch.logits_processor and batch.timing is None)


def capture(batch: Batch) -> Callable[[], None]:
    """Record `Batch.advance`, which draws nothing while it is recorded.

    Returns:
        a function that does what `Batch.step` does.
    """
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize(batch.weights.device)
    # Captures share a stream, so one at a time; what other threads launch meanwhile is theirs.
    with (_capturing, torch.cuda.device(batch.weights.device),
          torch.cuda.graph(graph, capture_error_mode="thread_local")):
        batch.advance()

    def step() -> None:
        batch.prepare()
        graph.replay()
        batch.done += 1

    return step
