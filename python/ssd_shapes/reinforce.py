"""Reinforcement learning from compressed rollouts: ``python -m ssd_shapes.reinforce --help``.

The included model learns from the detector's verdict by GRPO (Shao et al., "DeepSeekMath", arXiv 2402.03300), with
rollouts from a full cache, from a compressed one, and from a compressed one with the correction of Sparse-RL (Luo et
al., arXiv 2601.10079). docs/reinforce.md says what came out.
"""

from __future__ import annotations

if __name__ == "__main__":
    from ssd_janus import waiting

    waiting.prepare()  # before torch loads

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

import ssd_kernels
from ssd_attach.choice import choose
from ssd_attach.units import show_bytes
from ssd_janus.evaluation import report
from ssd_janus.extras import needs
from ssd_janus.pipeline import Pipeline
from ssd_janus.progress import progress_bar
from ssd_janus.shape import ModelShape
from ssd_kernels.files import write_atomically
from ssd_shapes import attention, export, runs, suite, tokens, world
from ssd_shapes.grpo import PARTS, VARIANTS, Asked, Learner, Options, Record, Task, Wanted, trained

with needs("train", "scipy"):
    from ssd_shapes import detector

FAMILIES = ("two_object", "counting", "position", "color_attr")  # of several objects


def reward_of(found: Sequence[detector.Found], wanted: Wanted) -> float:
    """Half for a right picture, and half times the share of the wanted objects that are there: 1 only if it is right.

    The verdict alone says the same of most samples of a prompt, from which nothing can be learnt.
    """
    there = 0
    for thing in wanted["include"]:
        fits = [item for item in found
                if item.shape == thing["class"] and thing.get("color") in (None, item.color)]
        there += min(len(fits), thing["count"])
    share = there / sum(thing["count"] for thing in wanted["include"])
    return 0.5 * detector.judge(list(found), wanted).correct + 0.5 * share


def shapes_task(pipe: Pipeline, policy: str, budget: float, held_out: int) -> Task:
    """Pictures of several objects that the detector finds right, by a model of the shapes world."""
    model, book = pipe.model.float(), tokens.CodeBook.load()
    model.set_attn_implementation({"text_config": attention.register()})
    profile = export.MODEL / "profile.safetensors" if policy == "adaptive" else None
    choice = choose(ModelShape.of(model), policy, torch.float32, budget=budget, profile=profile)

    def asked(wanted: Sequence[Wanted]) -> list[Asked]:
        return list(zip(pipe.prompt_tokens([each["prompt"] for each in wanted]), wanted, strict=True))

    def several(wanted: Wanted) -> bool:
        return sum(thing["count"] for thing in wanted["include"]) > 1

    def draw(seed: int, step: int, size: int) -> list[Asked]:
        rng, drawn = np.random.default_rng([seed, step]), list[Wanted]()
        while len(drawn) < size:
            prompt = world.draw_prompt(rng, "train", FAMILIES[int(rng.integers(len(FAMILIES)))])
            wanted = {"prompt": prompt.text, "include": prompt.include, "exclude": prompt.exclude}
            drawn += [wanted] if several(wanted) else []
        return asked(drawn)

    def reward(codes: Tensor, wanted: Sequence[Wanted]) -> Tensor:
        pictures = book.decode(codes).round().clamp(0, 255).to(torch.uint8).numpy()
        return torch.tensor([reward_of(detector.detect(picture), each)
                             for picture, each in zip(pictures, wanted, strict=True)])

    tests = [prompt for prompt in suite.load() if prompt["tag"] in FAMILIES and several(prompt)]
    return Task(model, choice.plan, draw, reward, asked(tests[:held_out]))


def mean(values: Sequence[float | None]) -> float | None:
    """Of the values that are there; None if none is."""
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there else None


def summarise(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """What a variant's runs came to, by its name; variants without a step are left out."""
    summary = {}
    for variant in VARIANTS:
        found = [record for record in records if record.variant == variant and record.steps]
        steps = [step for record in found for step in record.steps]
        if not steps:
            continue
        seconds = {part: sum(step["seconds"][part] for step in steps) for part in PARTS}
        cpu = {part: sum(step["cpu_seconds"][part] for step in steps) for part in PARTS}
        late = [step for record in found for step in record.steps[-max(1, len(record.steps) // 4):]]
        summary[variant] = {
            "seeds": [record.seed for record in found], "steps": [len(record.steps) for record in found],
            "held_out_first": [record.held_out[0] for record in found],
            "held_out_last": [record.held_out[-1] for record in found],
            "reward_last_quarter": mean([step["reward"] for step in late]),
            "kl_per_token": mean([step["kl"] for step in steps]),
            "kl_last_quarter": mean([step["kl"] for step in late]),
            "far": mean([step["far"] for step in steps]),
            "rejected": sum(step["rejected"] for step in steps) / max(1, sum(step["trained"] for step in steps)),
            "cache_bytes": max(step["cache_bytes"] for step in steps),
            "rollout_share": seconds["rollout"] / sum(seconds.values()),
            "rollout_share_of_cpu": cpu["rollout"] / sum(cpu.values()),
            "cpu_seconds_per_step": sum(cpu.values()) / len(steps),
            "rollout_cpu_seconds_per_step": cpu["rollout"] / len(steps),
        }
    return summary


def tables(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """A summary as two tables of Markdown: what was learnt, as means over seeds with the lowest and the highest, and
    what the rollouts were."""
    learnt = ["| rollouts | seeds | steps | held-out reward, full cache | compressed cache | right, full cache "
              "| compressed cache |", "|---|---:|---:|---|---|---|---|"]
    drawn = ["| rollouts | KL, nats per picture | tokens of a ratio beyond 2 | pictures rejected | cache of a step | "
             "rollouts' share of the wall time | of the CPU time | CPU seconds per step |",
             "|---|---:|---:|---:|---:|---:|---:|---:|"]

    def change(found: Mapping[str, Any], name: str) -> str:
        first, last = ([each[name] for each in found[f"held_out_{when}"]] for when in ("first", "last"))
        spread = f" ({min(last):.2f} to {max(last):.2f})" if len(last) > 1 else ""
        return f"{statistics.fmean(first):.2f} to {statistics.fmean(last):.2f}{spread}"

    for variant, found in summary.items():
        held_out = " | ".join(change(found, name) for name in ("full", "compressed", "full_right", "compressed_right"))
        learnt.append(f"| {variant} | {len(found['seeds'])} | {max(found['steps'])} | {held_out} |")
        kl = "-" if found["kl_per_token"] is None else f"{tokens.TOKENS * found['kl_per_token']:.3f}"
        far = "-" if found["far"] is None else f"{found['far']:.2%}"
        drawn.append(f"| {variant} | {kl} | {far} | {found['rejected']:.1%} | {show_bytes(found['cache_bytes'])} | "
                     f"{found['rollout_share']:.0%} | {found['rollout_share_of_cpu']:.0%} | "
                     f"{found['cpu_seconds_per_step']:.1f} |")
    return "\n".join([*learnt, "", *drawn]) + "\n"


def save_plot(records: Sequence[Record], file: Path) -> None:
    """Held-out and training reward and the divergence over steps as PNG: a thin line per run, a thick one per variant
    over the steps that all of its runs have made.

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
    """
    with needs("plot", "matplotlib"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = (("held_out", "full", "held-out reward, full cache"),
              ("held_out", "compressed", "held-out reward, compressed cache"),
              ("steps", "reward", "reward of the rollouts"),
              ("steps", "kl", "KL of rollouts to training, nats per token"))
    for axes, (part, key, label) in zip(figure.subplots(2, 2, sharex=True).flat, panels, strict=True):
        for number_, variant in enumerate(VARIANTS):
            lines = [{point["step"]: point[key] for point in getattr(record, part) if point[key] is not None}
                     for record in records if record.variant == variant and record.steps]
            style = {"color": f"C{number_}", "linestyle": ("-", "--", ":")[number_]}
            for line in lines:
                axes.plot(line.keys(), line.values(), linewidth=0.6, alpha=0.6, **style)
            common = sorted(set.intersection(*(set(line) for line in lines))) if lines else []
            axes.plot(common, [statistics.fmean(line[step] for line in lines) for step in common], linewidth=2,
                      marker="os^"[number_], label=variant, **style)
        axes.set(ylabel=label, **({} if key == "kl" else {"ylim": (0, 1)}))
        axes.grid(alpha=0.3)
    for axes in figure.axes[2:]:
        axes.set_xlabel("steps")
    figure.axes[0].legend()
    write_atomically(file, lambda out: figure.savefig(out, format="png", dpi=110))


def write_results(records: Sequence[Record], options: Mapping[str, Any], out: Path) -> str:
    """Write ``results.json`` and ``reinforce.png`` into a folder; returns the tables."""
    summary = summarise(records)
    runs.write_json(out / "results.json", {"options": options, "summary": summary,
                                           "runs": [asdict(record) for record in records if record.steps]})
    save_plot(records, out / "reinforce.png")
    return tables(summary)


def reinforce(
    out: Annotated[Path, typer.Option(help="Folder of runs and results; runs in there go on.")],
    steps: Annotated[int, typer.Option(help="Of a run.", min=1)] = 10,
    seeds: Annotated[int, typer.Option(help="Runs of each variant.", min=1)] = 3,
    variant: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(VARIANTS)}; may be repeated. All if not given.")
    ] = None,
    prompts: Annotated[int, typer.Option(help="Per step.", min=1)] = 2,
    samples: Annotated[int, typer.Option(help="Pictures of a prompt.", min=2)] = 8,
    lr: Annotated[float, typer.Option(help="Of AdamW.")] = 3e-4,
    layers: Annotated[int, typer.Option(help="That learn, the last ones, with the norm and head behind them.")] = 4,
    temperature: Annotated[float, typer.Option(help="Of the policy that draws and learns.", min=0.01)] = 0.7,
    policy: Annotated[str, typer.Option(help="Of the compressed caches.")] = "decayed",
    budget: Annotated[float, typer.Option(help="Of the compressed caches.")] = 0.2,
    cap: Annotated[float, typer.Option(help="Most that a token weighs with the correction.")] = 2.0,
    held_out: Annotated[int, typer.Option(help="Prompts to measure with.", min=1)] = 24,
    measure_every: Annotated[int, typer.Option(help="Steps between measurements.", min=1)] = 5,
    model: Annotated[Path | None, typer.Option(help="Folder of the model; the included one if not given.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice.", min=0)] = 1,
    page: Annotated[
        Path | None, typer.Option(help="Page whose tables to write, between <!-- reinforce --> and "
                                       "<!-- /reinforce -->; the plot goes beside it.")
    ] = None,
) -> None:
    """Train from full, compressed and corrected rollouts, and write results.json and reinforce.png.

    After every step all that is needed to go on is in the folder: a stopped command is given again. Runs are made seed
    by seed, so that a stopped comparison is one of fewer seeds.
    """
    chosen = [name for name in VARIANTS if name in (variant or VARIANTS)]
    for name in variant or ():
        if name not in VARIANTS:
            raise ValueError(f"--variant must be one of {', '.join(VARIANTS)}, got {name}")
    if page is not None:
        report.check_page(page, ("reinforce",))
    with needs("plot", "matplotlib"):
        import matplotlib  # noqa: F401  # not to miss it after hours
    if threads:
        torch.set_num_threads(threads)
    pipe = Pipeline.from_pretrained(model, dtype=torch.float32)
    task = shapes_task(pipe, policy, budget, held_out)
    options = Options(steps, prompts, samples, lr, layers, temperature, cap, measure_every)
    initial = {name: value.detach().clone() for name, value in trained(task.model, layers).items()}
    out.mkdir(parents=True, exist_ok=True)
    kept = {"version": ssd_kernels.__version__, **asdict(options), "policy": policy, "budget": budget,
            "held_out": held_out, "model": runs.digest((model or export.MODEL) / "model.safetensors")}
    runs.keep_options(out, kept, any(out.glob("*-*.json")), False)
    plan = [(name, seed) for seed in range(seeds) for name in chosen]
    records, start = list[Record](), None
    with progress_bar("steps of all runs") as progress:
        for number_, (name, seed) in enumerate(plan):
            learner = Learner(task, options, name, seed, initial, out)
            records.append(learner.record)
            if not learner.record.held_out and start is not None:
                learner.record.held_out.append(start)  # the same weights, prompts and noise
            while not learner.done:
                learner.step()
                last = learner.record.steps[-1]
                kl = "none" if last["kl"] is None else f"{last['kl']:.2e}"
                print(f"{learner.record.name} step {last['step']}: reward {last['reward']:.3f} kl {kl} trained "
                      f"{last['trained']} rejected {last['rejected']} "
                      f"{sum(last['seconds'].values()):.0f} s ({sum(last['cpu_seconds'].values()):.0f} s of CPU)",
                      flush=True)
                progress(number_ * steps + last["step"], len(plan) * steps)
            start = start or learner.record.held_out[0]
            shown = write_results(records, kept, out)
            first, last = learner.record.held_out[0], learner.record.held_out[-1]
            print(f"{learner.record.name} done; held out, full cache: {first['full']:.3f} -> {last['full']:.3f}, "
                  f"compressed: {first['compressed']:.3f} -> {last['compressed']:.3f}", flush=True)
    print(shown, end="")
    if page is not None:
        report.fill_page(page, {"reinforce": shown})
        save_plot(records, page.with_name("reinforce.png"))


if __name__ == "__main__":
    runs.main(reinforce)
