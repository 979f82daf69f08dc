"""`ssd-bench step` and `image`: whole decoder steps and whole pictures, transformers' loop beside our engine."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ssd_janus import ModelShape
from ssd_janus.engine import Engine, StepTiming, max_batch
from ssd_kernels import CachePlan
from ssd_kernels.policies import build

from . import machine
from .kernel import first_line
from .loops import CACHES, TOP_K, Drawn, engine_loop, transformers_loop
from .records import OK, Record, record
from .timing import Timing

POLICY = "heavy"
WARM_STEPS = 3  # of every loop, not counted; on a GPU the engine records its graph in the last
GATE_STEPS = 6
PARTS = ("linear", "attention", "rest")


@dataclass(frozen=True)
class Setting:
    """What is timed.

    Attributes:
        model: name for tables. dtype: of weights and cache. pictures: at once; two rows each.
        steps: timed ones per trial, or the picture's tokens.
        start: visual tokens in the cache beforehand; None draws whole pictures from the prompt on.
        trials: rounds over all contenders.
        kind_of_batch: "fixed", or what limits a largest batch.
        top_k: that the loops sample with.
    """

    model: str
    dtype: str
    pictures: int
    steps: int
    start: int | None
    trials: int = 3
    kind_of_batch: str = "fixed"
    top_k: int = TOP_K

    @property
    def kind(self) -> str:
        return "image" if self.start is None else "step"

    def point(self) -> dict[str, Any]:
        """What identifies it in records."""
        return {"label": self.model, "batch": self.pictures, "rows": 2 * self.pictures, "dtype": self.dtype,
                "steps": self.steps, "start": self.start, "batch_is": self.kind_of_batch,
                **({} if self.top_k == TOP_K else {"top_k": self.top_k})}  # older results did not say it


@dataclass(frozen=True)
class Loop:
    """A contender: its name, what its cache keeps, and how to run it for some steps."""

    name: str
    features: dict[str, Any]
    plan: CachePlan
    run: Callable[[int, int, int | None, StepTiming | None, bool], Drawn]  # pictures, steps, start, timing, sample


def loops(model: Any, prompt: Sequence[int], compiled: bool = False, budgets: Sequence[float] = (0.5, 0.2),
          row_buffers: Sequence[int] = (0, 24), backend: str = "auto", seeds: int | None = None, top_k: int = TOP_K,
          plans: Mapping[str, CachePlan] | None = None) -> Iterator[Loop]:
    """transformers with its kinds of cache, then the engine with a full plan and with budgets, or with ``plans``.

    With ``seeds`` every picture of the engine's draws from numbers of its own (`engine_loop`).
    """
    def transformers(kind: str) -> Callable[..., Drawn]:
        def run(pictures: int, steps: int, start: int | None, timing: StepTiming | None, sample: bool) -> Drawn:
            # With tokens in the cache, a prompt of one: what was held and the prompt are as many as the engine's.
            given, held = (prompt, 0) if start is None else (prompt[-1:], len(prompt) + start - 1)
            return transformers_loop(model, [list(given)] * pictures, steps, kind, held, timing, sample, top_k)

        return run

    shape = ModelShape.of(model)
    for kind in CACHES if compiled else CACHES[:2]:
        yield Loop(f"transformers, {kind} cache", {"backend": None}, shape.full_plan(), transformers(kind))
    made = [(name, plan.budget(shape.num_visual_tokens), plan) for name, plan in (plans or {}).items()] or [
        (f"{budget:.0%}, row buffer {row_buffer}", budget, build(POLICY, shape, budget, row_buffer))
        for budget in budgets for row_buffer in row_buffers]
    for name, budget, plan in [("full plan", 1.0, shape.full_plan()), *made]:
        engine = Engine(model, plan, backend=backend)

        def run(pictures: int, steps: int, start: int | None, timing: StepTiming | None, sample: bool,
                engine: Engine = engine) -> Drawn:
            return engine_loop(engine, [list(prompt)] * pictures, steps, start, timing, sample, seeds, top_k)

        yield Loop(f"engine, {name}", {"backend": backend, "budget": budget, "row_buffer": plan.row_buffer}, plan, run)


def largest(loop: Loop, model: Any, prompt: int, gigabytes: float) -> int:
    """Most pictures of a loop at once in so much memory, weights included, by our estimate (`engine.max_batch`).

    transformers' copies while a dynamic cache grows are not in it, nor is its own overhead.

    Raises:
        ValueError: not even one fits.
    """
    count = max_batch(loop.plan, model, int(1e9 * gigabytes), max_prompt=prompt)
    if count < 1:
        raise ValueError(f"largest-in must be enough for one picture of {loop.name}, got {gigabytes:g} GB")
    return count


def gate(listed: Sequence[Loop]) -> str:
    """Whether the engine with everything kept draws transformers' tokens: "ok", or "wrong" and where.

    Greedy, from the prompt on. Exact in float32 on a CPU; elsewhere rounding may change a token.
    """
    first, full = listed[0], next(loop for loop in listed if loop.features.get("budget") == 1.0)
    theirs, ours = (loop.run(1, GATE_STEPS, None, None, False).tokens for loop in (first, full))
    if torch.equal(theirs, ours):
        return OK
    step = int((theirs != ours).any(0).int().argmax())
    return f"wrong: the engine's tokens differ from transformers' at step {step}"


def measure(model: Any, listed: Sequence[Loop], setting: Setting,
            progress: Callable[[str], None] = lambda text: None) -> list[Record]:
    """Time every loop at one setting, in turn, and then once more with the time of its parts.

    In float32 on a CPU the engine gets no number when its tokens are not transformers'.

    Args:
        listed: of `loops`; those without a number say why.

    Raises:
        ValueError: the picture has not so many tokens.
    """
    room = ModelShape.of(model).num_visual_tokens - (0 if setting.start is None else setting.start + 1 + WARM_STEPS)
    if not 1 <= setting.steps <= room:
        raise ValueError(f"steps must be within 1 .. {room}, what is left of a picture, got {setting.steps}")
    about = machine.facts(model.device)
    strict = model.dtype == torch.float32 and model.device.type == "cpu"
    progress("checking tokens")
    verdict = gate(listed) if any(loop.features["backend"] is None for loop in listed) and any(
        loop.features.get("budget") == 1.0 for loop in listed) else "not compared"
    status = {loop.name: verdict if strict and loop.features["backend"] and verdict.startswith("wrong") else OK
              for loop in listed}
    seconds: dict[str, list[list[float]]] = {loop.name: [] for loop in listed}
    details: dict[str, dict[str, Any]] = {loop.name: {} for loop in listed}

    def attempt(loop: Loop, timing: StepTiming | None = None) -> Drawn | None:
        if status[loop.name] != OK:
            return None
        torch.manual_seed(0)
        steps = setting.steps + (1 + WARM_STEPS if setting.start is not None else 0)
        try:
            return loop.run(setting.pictures, steps, setting.start, timing, True)
        except (RuntimeError, torch.OutOfMemoryError, MemoryError) as error:
            status[loop.name] = f"failed: {first_line(error)}"
            return None

    for _ in range(setting.trials):
        for loop in listed:
            progress(f"timing {loop.name}")
            machine.reset_peak(model.device)
            drawn = attempt(loop)
            if drawn is not None:
                seconds[loop.name].append(drawn.seconds[WARM_STEPS:])
                details[loop.name] |= {"bytes": {"cache": drawn.cache_bytes, "peak": machine.peak(model.device)}}
            gc.collect()
    for loop in listed:
        progress(f"splitting {loop.name}")
        timing = StepTiming()
        if "compile" not in loop.name and attempt(loop, timing) is not None:
            found = timing.steps[WARM_STEPS:]
            details[loop.name]["split"] = {part: statistics.median(step[part] for step in found) for part in PARTS}
    about["load_after"] = machine.load()
    lines = []
    for loop in listed:
        timed, more = seconds[loop.name], details[loop.name]
        if status[loop.name] == OK and setting.start is None:
            columns = ModelShape.of(model).columns
            more["by_row"] = _by_row(timed, columns)
            more["loop_seconds"] = statistics.median(map(sum, timed))
        lines.append(record(setting.kind, about, setting.point(), {"name": loop.name, **loop.features},
                            status=status[loop.name],
                            seconds=asdict(Timing.of(timed)) if status[loop.name] == OK else None,
                            same_tokens=verdict, **(more if status[loop.name] == OK else {})))
    return lines


def _by_row(trials: Sequence[Sequence[float]], columns: int) -> list[float]:
    """Median seconds per step in each row of the picture, of the best trial of each step."""
    steps = [min(values) for values in zip(*trials, strict=True)]
    return [statistics.median(steps[first:first + columns]) for first in range(0, len(steps), columns)]
