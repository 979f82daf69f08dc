"""The command ``compare``."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..ranks import GO_ON, Ranks
from .evaluate import FIDELITY_PROMPTS, SuiteName, suite_prompts
from .options import (
    SAMPLING,
    Backend,
    Device,
    Dtype,
    FormatName,
    Guidance,
    Model,
    PolicyName,
    ProfileFile,
    PromptsFile,
    Temperature,
    TopK,
    TopP,
    load,
    load_profile,
)
from .presets import Preset, filled
from .terminal import console, messages, saying

if TYPE_CHECKING:
    from ..pipeline import Pipeline

BUDGETS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)


class SectionName(str, Enum):
    """The sections of `evaluation.comparison_page`, written down here so that ``--help`` need not import numpy."""

    goals = "goals"
    runs = "runs"
    fidelity = "fidelity"
    quality = "quality"
    sensitivity = "sensitivity"
    prediction = "prediction"
    int8 = "int8"


class PartName(str, Enum):
    fidelity = "fidelity"
    quality = "quality"
    sensitivity = "sensitivity"


def compare(
    out: Annotated[Path, typer.Option(help="Folder for results. A run that was stopped goes on when called again.")],
    page: Annotated[Path | None, typer.Option(help="Also put the tables into this Markdown page, each between its "
                                                   "comments, as in docs/policy-results.md.")] = None,
    section: Annotated[list[SectionName] | None, typer.Option(
        help="Which tables of the page; may be repeated. Default: all, int8 only with --kv int8.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Also draw plots into this folder (needs matplotlib).")] = None,
    part: Annotated[list[PartName] | None, typer.Option(help="What to measure; may be repeated. Default: all.")] = None,
    policy: Annotated[list[PolicyName] | None, typer.Option(help="May be repeated. Default: all.")] = None,
    budget: Annotated[list[float] | None, typer.Option(
        help=f"Share of the bytes of a full cache that policies may keep, which is that of the picture's tokens with "
             f"--kv auto; may be repeated. Default: {', '.join(map(str, BUDGETS))}.")] = None,
    kv: Annotated[list[FormatName] | None, typer.Option(
        help="How plans store keys and values: auto, in the model's dtype, or int8; may be repeated. Default: "
             "auto.")] = None,
    row_buffer: Annotated[list[int] | None, typer.Option(
        min=0, help="Steps between evictions; may be repeated. Default: 0 and one grid row (24).")] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="Only the first so many prompts for quality. Default: "
                                                            "all.")] = None,
    fidelity_prompts: Annotated[int, typer.Option(min=1, help="Only the first so many prompts for "
                                                              "fidelity.")] = FIDELITY_PROMPTS,
    seeds: Annotated[int | None, typer.Option(min=1, help="Pictures per prompt (quality). Default: 3.")] = None,
    sensitivity_quality: Annotated[bool, typer.Option(
        "--sensitivity-quality/--no-sensitivity-quality",
        help="Also judge pictures in the sensitivity part, which otherwise measures fidelity only.")] = False,
    model: Model = None,
    profile: ProfileFile = None,
    prompts_file: PromptsFile = None,
    preset: Preset = None,
    guidance: Guidance = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    backend: Backend = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 25,
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json.")] = False,
) -> None:
    """Compare policies at equal bytes: fidelity, quality, sensitivity and the goals; writes results.json.

    --policy, --budget, --kv, --row-buffer, --prompts, --fidelity-prompts and --seeds make it smaller. Several calls may
    work in one folder at once. With RANK and WORLD_SIZE in the environment, as torchrun sets them, or in a step of
    Slurm, each process does its share of the batches, and the last one to finish sums up.
    """
    ranks = Ranks.here()
    for value in budget or []:
        if not 0 < value <= 1:
            raise ValueError(f"--budget must be within (0, 1], got {value}")
    given = filled(preset, {"guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p,
                            "seeds": seeds})
    guidance, seeds = given["guidance"], given["seeds"] or 3
    parts = list(dict.fromkeys(part or PartName))
    names = [name for name in PolicyName if name in (policy or PolicyName)]
    if FormatName.best in (kv or []):
        raise ValueError("--kv must be auto or int8, got best: both are compared at as many bytes, and the page says "
                         "which one a profile predicts to cost less")
    formats = [name.value for name in FormatName if name in (kv or [FormatName.auto])]
    if section and page is None:
        raise ValueError("--section says nothing without --page")
    chapters = [name.value for name in SectionName if name in (section or SectionName)
                and (section or name is not SectionName.int8 or "int8" in formats)]
    judged = PartName.quality in parts or sensitivity_quality
    suites = (suite_prompts(SuiteName.shapes if judged else SuiteName.fidelity, prompts_file, prompts),
              suite_prompts(SuiteName.fidelity, prompts_file, fidelity_prompts))
    from ssd_kernels.files import check_folder

    from ..evaluation import comparison, report
    from ..evaluation.comparison_page import goal_lines, sections

    check_folder(out)
    if page is not None:
        report.check_page(page, chapters)
    if plots is not None:
        from ..extras import needs

        with needs("plot", "matplotlib"):
            import matplotlib  # noqa: F401  # before the long part, not after
        check_folder(plots)
    pipe = load(model, device, dtype, backend, ranks, sampling={name: given[name] for name in SAMPLING})
    heads = load_profile(profile, model, names, pipe)
    from ..prompts import fitting

    scenes, measured = ([prompt.metadata for prompt in fitting(pipe, own)] for own in suites)
    texts = [scene["prompt"] for scene in measured]
    run = comparison.Comparison(pipe, out, heads, texts, scenes, seeds, guidance, batch_size)
    chosen = [name.value for name in names]
    cases = comparison.grid(chosen, list(dict.fromkeys(budget or BUDGETS)),
                            list(dict.fromkeys([0, pipe.shape.columns] if row_buffer is None else row_buffer)), formats)
    variants = comparison.studies(chosen, pipe.shape.columns)
    steps = {
        PartName.fidelity: [comparison.Step("fidelity", "grid", "fidelity", cases)],
        PartName.quality: [comparison.Step("quality", "grid", "quality", cases)],
        PartName.sensitivity: [comparison.Step("sensitivity", "sensitivity", measure, variants)
                               for measure in (["fidelity", "quality"] if sensitivity_quality else ["fidelity"])]}
    facts = {"command": shlex.join(["ssd-janus", *sys.argv[1:]]), "date": datetime.now(timezone.utc).date().isoformat(),
             "machine": _machine(pipe), "guidance": run.guidance, "fidelity_prompts": len(texts),
             "prompts": len(scenes), "seeds": seeds, "batch_size": batch_size,
             "sensitivity_quality": sensitivity_quality, "dtype": str(pipe.dtype).removeprefix("torch.")}

    def publish(record: dict[str, Any]) -> None:
        images = {}
        if plots is not None:
            from ..plots import save_comparison

            plots.mkdir(parents=True, exist_ok=True)
            images = save_comparison(record["grid"].values(), plots, list(PolicyName.__members__))
        if page is not None:
            addresses = {name: Path(os.path.relpath(file, page.parent)).as_posix() for name, file in images.items()}
            made = sections(record, list(PolicyName.__members__), addresses)
            report.fill_page(page, {name: made[name] for name in chapters})

    from ..progress import progress_bar

    with progress_bar("comparing", ranks) as show:
        missing = run.run([step for name in parts for step in steps[name]], facts, progress=show, publish=publish,
                          ranks=ranks)
    if missing:
        saying(ranks)(f"{len(missing)} batches are not there yet, such as {missing[0]}: {GO_ON}")
        return
    if as_json:
        print((out / "results.json").read_text(), end="")
        return
    for line in goal_lines([*run.record["goals"], *run.record["int8_goals"]]):
        console.print(line, soft_wrap=True)
    messages.print(f"results.json is in {out}", soft_wrap=True)


def _machine(pipe: Pipeline) -> str:
    """What the figures were made on, for a reader."""
    import torch

    device = torch.cuda.get_device_name(pipe.device) if pipe.device.type == "cuda" else "CPU"
    return (f"{platform.system()} {platform.machine()} ({device}), {os.cpu_count()} cores, torch {torch.__version__} "
            f"with {torch.get_num_threads()} threads")
