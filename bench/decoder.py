"""`ssd-bench step` and `image`: whole decoder steps and whole pictures, transformers' loop beside our engine."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ssd_janus import ModelShape
from ssd_janus.engine import Engine, StepTiming, max_batch
from ssd_janus.engine.memory import weight_bytes
from ssd_kernels import CachePlan
from ssd_kernels.layout import LayerLayout
from ssd_kernels.policies import build
from ssd_kernels.triton.launch import step_bytes

from . import ceiling, machine
from .kernel import first_line
from .loops import CACHES, TOP_K, Drawn, engine_loop, transformers_loop
from .records import OK, Record, record
from .steady import adds_up, movement, until_steady
from .timing import PATIENCE, Timing, cpu_stopwatch, nothing
from .turns import in_turn

POLICY = "heavy"
WARM_STEPS = 3  # of every loop, not counted; on a GPU the engine records its graph in the last
GATE_STEPS = 6
SPLITS = 3  # attempts to have a step's parts add up to its time
READ_BYTES = 2**24  # that measure the ceiling between two loops' turns
PARTS = ("linear", "attention", "rest")


@dataclass(frozen=True)
class Setting:
    """What is timed.

    Attributes:
        model: name for tables. dtype: of weights and cache. pictures: at once; two rows each.
        steps: timed ones per trial, or the picture's tokens.
        start: visual tokens in the cache beforehand; None draws whole pictures from the prompt on.
        trials, patience: of the protocol (`timing.Protocol`).
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
    patience: float = PATIENCE

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
    """A contender: its name, what its cache keeps, how to run it for some steps, and the tokens of its prompt.

    ``run`` takes pictures, steps, start, timing, sample and pause (`loops`).
    """

    name: str
    features: dict[str, Any]
    plan: CachePlan
    run: Callable[[int, int, int | None, StepTiming | None, bool, Callable[[], None]], Drawn]
    prompt: int = 0

    @property
    def alone(self) -> bool:
        """Whether others cannot take turns with it: compiling changes the model for everybody."""
        return "compile" in self.name


def loops(model: Any, prompt: Sequence[int], compiled: bool = False, budgets: Sequence[float] = (0.5, 0.2),
          row_buffers: Sequence[int] = (0, 24), backend: str = "auto", seeds: int | None = None, top_k: int = TOP_K,
          plans: Mapping[str, CachePlan] | None = None) -> Iterator[Loop]:
    """transformers with its kinds of cache, then the engine with a full plan and with budgets, or with ``plans``.

    With ``seeds`` every picture of the engine's draws from numbers of its own (`engine_loop`).
    """
    def transformers(kind: str) -> Callable[..., Drawn]:
        def run(pictures: int, steps: int, start: int | None, timing: StepTiming | None, sample: bool,
                pause: Callable[[], None] = nothing) -> Drawn:
            # With tokens in the cache, a prompt of one: what was held and the prompt are as many as the engine's.
            given, held = (prompt, 0) if start is None else (prompt[-1:], len(prompt) + start - 1)
            return transformers_loop(model, [list(given)] * pictures, steps, kind, held, timing, sample, top_k, pause)

        return run

    shape = ModelShape.of(model)
    for kind in CACHES if compiled else CACHES[:2]:
        yield Loop(f"transformers, {kind} cache", {"backend": None}, shape.full_plan(), transformers(kind), len(prompt))
    made = [(name, plan.budget(shape.num_visual_tokens), plan) for name, plan in (plans or {}).items()] or [
        (f"{budget:.0%}, row buffer {row_buffer}", budget, build(POLICY, shape, budget, row_buffer))
        for budget in budgets for row_buffer in row_buffers]
    for name, budget, plan in [("full plan", 1.0, shape.full_plan()), *made]:
        engine = Engine(model, plan, backend=backend)

        def run(pictures: int, steps: int, start: int | None, timing: StepTiming | None, sample: bool,
                pause: Callable[[], None] = nothing, engine: Engine = engine) -> Drawn:
            return engine_loop(engine, [list(prompt)] * pictures, steps, start, timing, sample, seeds, top_k, pause)

        yield Loop(f"engine, {name}", {"backend": backend, "budget": budget, "row_buffer": plan.row_buffer}, plan, run,
                   len(prompt))


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
    """Time every loop at one setting, in turn, and then each once more alone with the time of its parts.

    On a CPU they take turns after a few steps, and memory is read in between: the ceiling. Then all their caches are
    there at once. In float32 on a CPU the engine gets no number when its tokens are not transformers'.

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
    steps = setting.steps + (1 + WARM_STEPS if setting.start is not None else 0)
    memory = Ceiling(model.device)

    def attempt(loops: Sequence[Loop], timing: StepTiming | None = None) -> list[Drawn | None]:
        def job(loop: Loop) -> Callable[[Callable[[], None]], Drawn]:
            return lambda pause: loop.run(setting.pictures, steps, setting.start, timing, True, pause)

        torch.manual_seed(0)
        drawn: list[Drawn | None] = []
        for loop, found in zip(loops, in_turn([job(loop) for loop in loops], memory.measure), strict=True):
            if isinstance(found, (RuntimeError, torch.OutOfMemoryError, MemoryError)):
                status[loop.name] = f"failed: {first_line(found)}"
            elif isinstance(found, Exception):
                raise found
            drawn.append(None if isinstance(found, Exception) else found)
        gc.collect()
        return drawn

    def running() -> list[Loop]:
        return [loop for loop in listed if status[loop.name] == OK]

    def trial() -> float:
        progress("timing")
        memory.begin()
        together = [loop for loop in running() if memory.works and not loop.alone]
        for group in (together, *([loop] for loop in running() if loop not in together)):
            machine.reset_peak(model.device)
            for loop, drawn in zip(group, attempt(group), strict=True):
                if drawn is not None:
                    seconds[loop.name].append(drawn.seconds[WARM_STEPS:])
                    peak = machine.peak(model.device) if len(group) == 1 else None
                    details[loop.name]["bytes"] = {"cache": drawn.cache_bytes, "peak": peak}
        return memory.best

    counted = until_steady(trial, setting.trials, setting.patience, time.monotonic)
    timings = {loop.name: Timing.of([seconds[loop.name][number] for number in counted]) for loop in running()}
    for loop in running():
        for _ in range(0 if loop.alone else SPLITS):
            progress(f"splitting {loop.name}")
            timing = StepTiming()
            machine.reset_peak(model.device)
            [drawn] = attempt([loop], timing)
            if drawn is None:
                break
            details[loop.name]["bytes"]["peak"] = details[loop.name]["bytes"]["peak"] or machine.peak(model.device)
            split, taken = parts_of(timing.steps[WARM_STEPS:], timings[loop.name], setting.kind)
            if adds_up(split.values(), taken):
                details[loop.name]["split"] = split
                break
    about["load_after"] = machine.load()
    ceilings = [memory.trials[number] for number in counted]
    lines = []
    for loop in listed:
        timed, more = [seconds[loop.name][number] for number in counted if status[loop.name] == OK], details[loop.name]
        if status[loop.name] == OK and setting.start is None:
            columns = ModelShape.of(model).columns
            more["by_row"] = _by_row(timed, columns)
            more["loop_seconds"] = statistics.median(map(sum, timed))
        if memory.works:
            more["moved"] = movement(ceilings)
            if setting.start is not None:
                moving = decode_bytes(model, loop.plan, loop.prompt, 2 * setting.pictures, setting.start)
                more["floor"] = {"bytes": moving, "read": READ_BYTES / min(ceilings)}
        lines.append(record(setting.kind, about, setting.point(), {"name": loop.name, **loop.features},
                            status=status[loop.name],
                            seconds=asdict(timings[loop.name]) if status[loop.name] == OK else None,
                            same_tokens=verdict, **(more if status[loop.name] == OK else {})))
    return lines


class Ceiling:
    """How fast memory is read between the turns of a trial, by `ceiling.loops`; nothing on a GPU.

    Attributes:
        works: whether there is anything that measures it. trials: the best seconds of each, for `READ_BYTES`.
    """

    def __init__(self, device: torch.device) -> None:
        loops = ceiling.loops(ceiling.cold(READ_BYTES, device)) if device.type == "cpu" else {}
        self._watches = [cpu_stopwatch(work, ahead=number) for number, work in enumerate(loops.values())]
        self.works, self.trials = bool(loops), list[float]()

    def begin(self) -> None:
        """A trial begins."""
        self.trials.append(float("inf") if self.works else 1.0)

    def measure(self) -> None:
        """Read once more."""
        for watch in self._watches:
            self.trials[-1] = min(self.trials[-1], *watch(1))

    @property
    def best(self) -> float:
        """Seconds, of the trial that began last."""
        return self.trials[-1]


def parts_of(steps: Sequence[dict[str, float]], timing: Timing, kind: str) -> tuple[dict[str, float], float]:
    """Seconds of a step's parts, and of the step that they should add up to: those of the fastest step; of whole
    pictures, in which steps grow, medians.

    Args:
        steps: of `StepTiming`. timing: of the same loop without it.
    """
    if kind == "image":
        return {part: statistics.median(step[part] for step in steps) for part in PARTS}, timing.median
    fastest = min(steps, key=lambda step: step["total"])
    return {part: fastest[part] for part in PARTS}, timing.best


def decode_bytes(model: Any, plan: CachePlan, prompt: int, rows: int, start: int) -> int:
    """Bytes that a step of the decoder has to move after ``start`` visual tokens: the layers' weights once, and what
    `step_bytes` counts for every row.
    """
    language, shape = model.model.language_model, ModelShape.of(model)
    layouts = [LayerLayout.build(specs, plan, prompt, shape.num_visual_tokens) for specs in plan.layers]
    size = language.embed_tokens.weight.dtype.itemsize
    return weight_bytes(language.layers) + rows * sum(step_bytes(layout, prompt, start, shape.head_dim, size)
                                                      for layout in layouts)


def _by_row(trials: Sequence[Sequence[float]], columns: int) -> list[float]:
    """Median seconds per step in each row of the picture, of the best trial of each step."""
    steps = [min(values) for values in zip(*trials, strict=True)]
    return [statistics.median(steps[first:first + columns]) for first in range(0, len(steps), columns)]
