"""Requests for pictures, what each draws alone, and a callback that waits."""

from __future__ import annotations

import threading
from functools import cache
from typing import ClassVar

import tiny
import torch
from test_engine import plan_of_budget, prompts_of
from transformers import TopKLogitsWarper

from ssd_janus.engine import Engine, PictureRequest, Sampling
from ssd_kernels import CachePlan

WAIT = 600  # seconds, on a machine with much other work
STEPS = 20  # three rows of the grid, and some
PROMPTS = prompts_of(tiny.image_inputs())
LONG = [0, *(7 + index % 200 for index in range(50)), 3]
GREEDY = Sampling(greedy=True)
REQUESTS = (
    PictureRequest(PROMPTS[0], 5.0, 3, Sampling.make(0.9, 20, 0.9)), PictureRequest(PROMPTS[1], 1.0, 4),
    PictureRequest(PROMPTS[2], 2.0, 5, GREEDY), PictureRequest(PROMPTS[3], 0.0, 2**63 + 5, Sampling.make(0.7)),
    PictureRequest(PROMPTS[0], 5.0, 6, Sampling.make(0.9, 20, 0.9)),
    PictureRequest(LONG, 3.0, -7, Sampling.make(1.0, 5)),
    PictureRequest([3], 2.0, 8, Sampling.make(1.0, 0, 0.5)), PictureRequest(PROMPTS[1], 1.0, 9, GREEDY),
    PictureRequest(PROMPTS[0], 2.0, 3, Sampling(warpers=[TopKLogitsWarper(3), TopKLogitsWarper(2)])))


def alone(engine: Engine, request: PictureRequest, steps: int = STEPS) -> torch.Tensor:
    return engine.generate([request.prompt], guidance=request.guidance, seeds=[request.seed], steps=steps,
                           sampling=request.sampling)[0]


@cache
def tiny_engine(keep_prompt: bool = True, products: str = "auto") -> tuple[Engine, dict[int, torch.Tensor]]:
    """And the tokens of `REQUESTS` by the numbers of these."""
    model = tiny.build_model(heads=4, kv_heads=2 if keep_prompt else 4)
    plan = plan_of_budget(model, 0.2)
    engine = Engine(model, CachePlan(plan.layers, 3, keep_prompt), products=products)
    return engine, {index: alone(engine, request) for index, request in enumerate(REQUESTS)}


class Pause:
    """A callback for rows in which the drawing thread waits."""

    made: ClassVar[list[Pause]] = []

    def __init__(self) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        self.made.append(self)

    def __call__(self, tokens: torch.Tensor) -> None:
        self.reached.set()
        assert self.go_on.wait(WAIT)
