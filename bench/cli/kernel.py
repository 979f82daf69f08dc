"""`ssd-bench kernel`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import (
    AsJson,
    Device,
    InstructionSet,
    Only,
    Out,
    Patience,
    Threads,
    Trials,
    check_out,
    on_device,
    refuse_ignored,
    run_jobs,
)

if TYPE_CHECKING:
    from ..point import Point

Repetitions = Annotated[int, typer.Option(min=1, help="Timed repetitions per trial.")]
# What options say nothing, by what decides the lengths: a plan, a policy or the options themselves.
KERNEL_OPTIONS = {
    "--plan": ("mean", "full", "spread", "score", "row_buffer", "kv", "heads", "budget"),
    "--policy": ("mean", "full", "spread", "score", "layer"),
    None: ("layer", "budget", "prompt", "start")}


def kernel(
    context: typer.Context,
    batch: Annotated[list[int], typer.Option(help="Rows; a picture with guidance takes two.")] = [16],  # noqa: B006
    heads: Annotated[list[int], typer.Option(help="KV heads of the layer.")] = [16],  # noqa: B006
    head_dim: Annotated[list[int], typer.Option(help="Elements per key.")] = [128],  # noqa: B006
    dtype: Annotated[list[str], typer.Option(help="float32, bfloat16 or float16.")] = ["bfloat16"],  # noqa: B006
    mean: Annotated[list[int], typer.Option(help="Mean tokens kept per head.")] = [120],  # noqa: B006
    full: Annotated[int, typer.Option(help="Tokens of the full cache, and of the longest head possible.")] = 600,
    spread: Annotated[list[str], typer.Option(help="How lengths differ: uniform, two-class or skewed.")] = [  # noqa: B006
        "skewed"],
    plan: Annotated[Path | None, typer.Option(help="Run one layer of this plan instead.", exists=True)] = None,
    layer: Annotated[int, typer.Option(help="Which layer of the plan.")] = 0,
    policy: Annotated[str | None, typer.Option(help="Run this policy's plan instead (needs no profile).")] = None,
    budget: Annotated[list[float], typer.Option(help="With --policy.")] = [0.2],  # noqa: B006
    prompt: Annotated[int, typer.Option(help="With a plan: prompt tokens.")] = 24,
    start: Annotated[int, typer.Option(help="With a plan: visual tokens in the cache.")] = 480,
    score: Annotated[bool | None, typer.Option(help="Only plans with scores, or without. Default: both.")] = None,
    row_buffer: Annotated[list[int], typer.Option(help="Steps between evictions; 0 evicts at each.")] = [  # noqa: B006
        0, 24],
    kv: Annotated[list[str], typer.Option(help="How ours store keys and values: auto, as --dtype says; int8.")] = [  # noqa: B006
        "auto", "int8"],
    backend: Annotated[list[str] | None, typer.Option(help="Of ours; default all that can run but reference.")] = None,
    only: Only = None,
    device: Device = "auto",
    threads: Threads = 0,
    instruction_set: InstructionSet = None,
    repetitions: Repetitions = 50,
    trials: Trials = 3,
    patience: Patience = 30,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """One decode step of one layer, ours against others' attention, on cold caches of ragged heads.

    Options that may be given several times make a table for each combination. Exits with 1 when one of our backends
    computes something wrong; it gets no number then.
    """
    from ..kernel import Options, any_wrong, measure
    from ..point import Point

    refuse_ignored(context, "--plan" if plan else "--policy" if policy else None, KERNEL_OPTIONS)
    where = on_device(device, threads, instruction_set)
    check_out(out)
    _check_backends(backend)
    _check_formats(kv)
    points: list[Point] = []
    buffers: Sequence[int] = row_buffer
    try:
        if plan is not None or policy is not None:
            points = list(_planned(plan, layer, policy, budget, row_buffer, kv, heads, batch, head_dim, dtype, prompt,
                                   start))
        else:
            points = [Point.of_lengths(*values, full=full, spread=kind) for *values, kind in
                      itertools.product(batch, heads, head_dim, dtype, mean, spread)]
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    options = Options(where, backend, (False, True) if score is None else (score,), buffers, kv, tuple(only or ()),
                      repetitions, trials, patience)
    lines = run_jobs([(point, lambda point, report: measure(point, options, report)) for point in points], as_json, out)
    raise typer.Exit(any_wrong(lines))


def _check_formats(names: Sequence[str]) -> None:
    from ssd_kernels.kv_format import KV_FORMATS

    for name in names:
        if name not in KV_FORMATS:
            raise typer.BadParameter(f"must be one of {', '.join(KV_FORMATS)}, got {name!r}", param_hint="--kv")


def _check_backends(names: list[str] | None) -> None:
    from ssd_kernels import backends

    for name in names or ():
        reason = backends.available().get(name, f"must be one of {', '.join(backends.backend_names())}")
        if reason:
            raise typer.BadParameter(f"{name!r}: {reason}", param_hint="--backend")


def _planned(path: Path | None, layer: int, policy: str | None, budgets: Sequence[float], row_buffers: Sequence[int],
             kv_formats: Sequence[str], heads: Sequence[int], batches: Sequence[int], head_dims: Sequence[int],
             dtypes: Sequence[str], prompt: int, start: int) -> Iterator[Point]:
    """Points of a plan file, or of a policy at every budget, row buffer and format."""
    from ssd_janus import ModelShape
    from ssd_kernels import CachePlan
    from ssd_kernels.policies import build

    from ..point import Point

    if path is not None and policy is not None:
        raise ValueError("give --plan or --policy, not both")
    plans = []
    if path is not None:
        plans.append((f"plan {path.name}, layer {layer}", CachePlan.load(path)))
    else:
        for count, budget, buffer, kv_format in itertools.product(heads, budgets, row_buffers, kv_formats):
            made = build(policy or "", ModelShape(1, count, count, 128, 576, 24), budget, buffer)
            label = f"policy {policy} {budget:.0%}, row buffer {buffer}" + (", int8" if kv_format == "int8" else "")
            plans.append((label, replace(made, kv_format=kv_format)))
    for (label, plan), batch, head_dim, dtype in itertools.product(plans, batches, head_dims, dtypes):
        yield Point.of_plan(plan, layer, label, batch, head_dim, dtype, prompt, start, 576)
