"""Where the time of a step goes."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch


class StepTiming:
    """Seconds of every step, in three parts. Steps are then run one operation at a time, without a CUDA graph.

    Attributes:
        steps: one dict per step: ``total``, ``linear`` (all matrix products of the layers, the head and the input of
            the next step, with the norms before them and the activations and sums after them), ``attention`` (the
            cache's decode) and ``rest``.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._parts: dict[str, list[tuple[Any, Any]]] = {}
        self._device = torch.device("cpu")

    def begin(self, device: torch.device) -> None:
        """A step of tensors on ``device`` starts."""
        self._device = device
        self._parts = {"total": [(self._now(), None)], "linear": [], "attention": []}

    def end(self) -> None:
        """The step is over."""
        self._parts["total"][0] = (self._parts["total"][0][0], self._now())
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = {name: sum(self._between(*pair) for pair in pairs) for name, pairs in self._parts.items()}
        self.steps.append(seconds | {"rest": seconds["total"] - seconds["linear"] - seconds["attention"]})

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, its time counted under ``part`` while a step runs."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if part not in self._parts:  # the prompt, before the first step
                return function(*args, **kwargs)
            began = self._now()
            result = function(*args, **kwargs)
            self._parts[part].append((began, self._now()))
            return result

        return run

    def add(self, part: str, seconds: float) -> None:
        """A part has taken so long in a step on a CPU."""
        self._parts[part].append((0.0, seconds))

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _between(self, began: Any, ended: Any) -> float:
        return began.elapsed_time(ended) / 1e3 if self._device.type == "cuda" else ended - began
