"""The step as a CUDA graph: one launch from Python instead of hundreds."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from .batch import Batch
from .saying import warn_once
from .weights import Weights

# Steps of the picture that run one operation at a time first, on the stream of the capture: libraries set up their
# workspaces of that stream in them. They are real steps, so nothing has to be put back before the capture.
WARM_STEPS = 2
CAPTURABLE = frozenset({"triton", "cuda"})
_capturing = threading.Lock()


class Capturable(Protocol):
    """A step, as `CapturedStep` takes it.

    Attributes:
        weights: that it reads.
        done: steps taken.
    """

    weights: Weights
    done: int

    def prepare(self) -> None:
        """What comes before the step and is no part of the graph."""

    def advance(self) -> None:
        """What becomes the graph."""

    def step(self) -> None:
        """Both, one operation at a time; counts."""


def can_capture(batch: Batch) -> bool:
    """Whether the batch's step launches everything on the device and reads nothing back."""
    return (batch.weights.device.type == "cuda" and batch.cache.backend in CAPTURABLE and batch.observer is None
            and not batch.logits_processor and batch.timing is None)


class CapturedStep:
    """Does what a batch's `step` does, after `WARM_STEPS` calls from a graph of its `advance`.

    Where capturing fails, a warning says why, once, and the steps go on one operation at a time.
    """

    def __init__(self, batch: Capturable) -> None:
        self.batch = batch
        self._to_warm = WARM_STEPS
        self._graph: torch.cuda.CUDAGraph | None = None
        self._failed = False

    def __call__(self) -> None:
        """One step."""
        if self._to_warm:
            self._to_warm -= 1
            with _capture_stream(self.batch.weights.device):
                self.batch.step()
            return
        if self._graph is None and not self._failed:
            self._graph = _captured(self.batch)
            self._failed = self._graph is None
        if self._graph is None:
            self.batch.step()
            return
        self.batch.prepare()
        self._graph.replay()
        self.batch.done += 1


def _captured(batch: Capturable) -> torch.cuda.CUDAGraph | None:
    """A graph of `advance`, which draws nothing while it is recorded; None, with a warning, when that fails."""
    device = batch.weights.device
    graph = torch.cuda.CUDAGraph()
    try:
        with _capture_stream(device), torch.cuda.graph(graph, stream=_stream(device),
                                                       capture_error_mode="thread_local"):
            batch.advance()
    except RuntimeError as error:
        # Ending a capture in which something failed is an error of its own.
        reason = str(error.__context__ or error).splitlines()[0]
        warn_once(f"the step cannot be captured as a CUDA graph, and runs one operation at a time: {reason}")
        _release_generator(device)
        return None
    return graph


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a device's captures, always the same: for every other, libraries would make another workspace.

    torch's own is of the device that captures first, and records nothing of another.
    """
    return torch.cuda.Stream(device)


@contextmanager
def _capture_stream(device: torch.device) -> Iterator[None]:
    """The calling thread launches on the stream of captures, in order with its own stream.

    One thread at a time: what others launched there would become part of the graph. What they launch on their own
    streams is theirs.
    """
    stream, own = _stream(device), torch.cuda.current_stream(device)
    with _capturing:
        stream.wait_stream(own)
        try:
            with torch.cuda.device(device), torch.cuda.stream(stream):
                yield
        finally:
            own.wait_stream(stream)


def _release_generator(device: torch.device) -> None:
    """torch's own generator of the device can draw again: a capture that failed leaves it waiting for the end of it."""
    generator = torch.cuda.default_generators[device.index]
    generator.graphsafe_set_state(generator.clone_state())
