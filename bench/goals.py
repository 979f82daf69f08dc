"""The project's goals on a CPU, met or missed: shares of the ceiling or of the floor, with the rivals beside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .kernel import ours_of, share
from .records import LEFT_OUT, OK, Record
from .steady import MOST_MOVED, movement

POINT = {"device": "cpu", "heads": 16, "head_dim": 128, "mean": 120, "full": 600}
BATCHES = range(2, 65)
SHARE = 0.95  # of the ceiling, for one layer's step
# The same bytes if all heads were alike; and what padding takes.
RIVALS = ("SDPA, every head the mean length", "two bmm, every head the mean length", "SDPA padded + mask")
BUDGET, ROW_BUFFER = 0.2, 24  # of the engine's plan that steps are judged by
# (model, dtype, pictures) -> share of the floor that a step is to reach.
FLOORS = {("1b", "bfloat16", 1): 0.8}
# The same -> times as fast as the best of transformers' loops.
TIMES = {("1b", "bfloat16", 8): 2.5, ("included", "float32", 1): 2.0, ("included", "float32", 8): 3.0}
LOOPS, NOT_MEASURED = "as fast as transformers' best loop", "not measured"
COLUMNS = ("point", "goal", "reached", "", "beside it")


def goals(lines: Sequence[Record]) -> list[tuple[str, str, str, str]]:
    """What is aimed at, what was reached, the verdict and what stands beside it, for the records of one point; none at
    points that the project has no goals for.

    The verdict is ``met``, ``missed``, ``no verdict`` where times moved too much for one, or ``not measured`` at points
    that were left out.
    """
    return {"kernel": _kernel, "step": _step}.get(lines[0]["kind"], lambda lines: [])(lines)


def sentences(lines: Sequence[Record]) -> list[str]:
    """`goals` as text, a line each."""
    return [", ".join(filter(None, (f"{aim}: {verdict}", reached))) + (f"; {beside}" if beside else "")
            for aim, reached, verdict, beside in goals(lines)]


def rows(groups: Iterable[Sequence[Record]]) -> list[list[str]]:
    """A row under `COLUMNS` per goal of several points' records."""
    return [[_point(group[0]), *found] for group in groups for found in goals(group)]


def moved(line: Record) -> bool:
    """Whether the ceiling moved so much between the trials that nothing is to be concluded from them."""
    return float(line.get("moved", 0.0)) > MOST_MOVED


def _kernel(lines: Sequence[Record]) -> list[tuple[str, str, str, str]]:
    point = lines[0]["point"]
    if point["batch"] not in BATCHES or any(point.get(name) != value for name, value in POINT.items()):
        return []
    found = []
    for kv_format, stored in (("auto", point["dtype"]), ("int8", "int8")):
        aim = f"{stored} at {SHARE:.0%} of the ceiling"
        ours = ours_of(lines, kv_format)
        if ours is None:
            if kv_format == "auto" and lines[0]["status"].startswith(LEFT_OUT):
                found.append((aim, "", NOT_MEASURED, ""))
            continue
        reached = share(ours)
        best = {line["contender"]["name"]: line["seconds"]["best"] for line in lines if line["status"] == OK}
        beside = ", ".join(f"{name}: {best[name] / ours['seconds']['best']:.1f} times as long" for name in RIVALS
                           if name in best)
        found.append((aim, f"{reached:.0%}", _verdict(ours, reached >= SHARE), beside))
    return found


def _step(lines: Sequence[Record]) -> list[tuple[str, str, str, str]]:
    point = lines[0]["point"]
    key = point["label"], point["dtype"], point["batch"]
    timed = [line for line in lines if line["status"] == OK]
    ours = next((line for line in timed if line["contender"].get("budget") == BUDGET
                 and line["contender"].get("row_buffer") == ROW_BUFFER), None)
    of_floors, of_times = f"{FLOORS.get(key, 0):.0%} of the floor", f"{TIMES.get(key, 0):g} times {LOOPS}"
    if ours is None:
        aims = [aim for aim, aimed in ((of_floors, FLOORS), (of_times, TIMES)) if key in aimed]
        return [(aim, "", NOT_MEASURED, "") for aim in aims if lines[0]["status"].startswith(LEFT_OUT)]
    theirs = min((line["seconds"]["best"] for line in timed if line["contender"]["backend"] is None), default=None)
    times = None if theirs is None else theirs / ours["seconds"]["best"]
    reached = floor_share(ours)
    of_floor = "" if reached is None else f"{reached:.0%} of the floor"
    of_theirs = "" if times is None else f"{times:.2f} times {LOOPS}"
    found = []
    if key in FLOORS and reached is not None:
        found.append((of_floors, f"{reached:.0%}", _verdict(ours, reached >= FLOORS[key]), of_theirs))
    if key in TIMES and times is not None:
        found.append((of_times, f"{times:.2f} times", _verdict(ours, times >= TIMES[key]), of_floor))
    return found


def floor_share(line: Record) -> float | None:
    """The time that reading a step's bytes once takes over the step's, best with best; None where it is not known."""
    floor = line.get("floor")
    return None if floor is None else float(floor["bytes"] / floor["read"] / line["seconds"]["best"])


def unsteady(line: Record) -> bool:
    """Whether a contender's best moved as much from trial to trial: on a busy machine long repetitions hardly ever get
    through undisturbed, though the ceiling's do.
    """
    return movement(line["seconds"].get("bests", [1.0])) > MOST_MOVED


def _verdict(line: Record, met: bool) -> str:
    return "no verdict" if moved(line) or unsteady(line) else "met" if met else "missed"


def _point(line: Record) -> str:
    point = line["point"]
    if line["kind"] == "kernel":
        return f"batch {point['batch']}, {point['label']}, {point['dtype']}"
    return f"step, model {point['label']}, {point['rows']} rows, {point['dtype']}"
