"""Compare policies at equal bytes: which plans are measured, and one record of all results.

Every plan has a folder ``OUT/fidelity/guidance-G/PLAN`` or ``OUT/quality/guidance-G/PLAN`` (`RunFolder`), whose name
says the format, too, if it is not the model's dtype: a killed comparison goes on where it was, and a plan that several
parts ask for is drawn once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ssd_attach.choice import make_plan
from ssd_kernels import CachePlan, HeadSpec, policies
from ssd_kernels.policies import HeadProfile, predicted_cost

from ..files import write_text
from ..pipeline import Pipeline
from ..progress import ProgressCallback
from ..shape import ModelShape
from . import fidelity, findings, quality, results
from .folder import keep_settings, settings

CACHES_AT_ONCE = 8  # compressed caches beside the full one while it draws
STUDY_BUDGET = 0.2
STUDIED = ("streaming_llm", "h2o", "ssd", "ssd_guarded", "adaptive")


@dataclass(frozen=True)
class Case:
    """One plan of the comparison and how it is measured.

    Attributes:
        policy, row_buffer: what makes the plan.
        budget: share of the bytes that a full cache has for keys and values; stored in the model's dtype that is the
            share of its tokens.
        parameters: of the policy's own, those that differ from its defaults; ``tau_quantile`` is a quantile of the
            profile's sparsity scores.
        competing: prompt tokens may be evicted as visual ones are.
        guidance: None for that of the whole comparison.
        study, setting: what a case of the sensitivity part varies; empty in the grid.
        kv_format: how the plan stores keys and values.
    """

    policy: str
    budget: float
    row_buffer: int
    parameters: tuple[tuple[str, float], ...] = ()
    competing: bool = False
    guidance: float | None = None
    study: str = ""
    setting: str = ""
    kv_format: str = "auto"

    @property
    def plan_name(self) -> str:
        """Name of the plan's folder, the same for every case with this plan."""
        stored = [] if self.kv_format == "auto" else [self.kv_format]
        if self.policy == "full":
            return "-".join(["full", *stored])
        parts = [self.policy, f"{self.budget:g}", f"r{self.row_buffer}",
                 *(f"{name}{value:g}" for name, value in self.parameters), *(["competing"] if self.competing else []),
                 *stored]
        return "-".join(parts)

    @property
    def label(self) -> str:
        """Key in the record."""
        return " / ".join((self.study, self.policy, self.setting)) if self.study else self.plan_name


def grid(names: Sequence[str], budgets: Sequence[float], row_buffers: Sequence[int],
         kv_formats: Sequence[str] = ("auto",)) -> list[Case]:
    """Every policy in every format at every budget in bytes and every row buffer, and the full cache once in each."""
    cases: list[Case] = []
    for kv_format in kv_formats:
        cases += [Case("full", 1.0, 0, kv_format=kv_format)] if "full" in names else []
        cases += [Case(name, budget, row_buffer, kv_format=kv_format) for name in names if name != "full"
                  for row_buffer in row_buffers for budget in budgets]
    return cases


def studies(names: Sequence[str], row_buffer: int) -> list[Case]:
    """The sensitivity part: one thing varied at a time at a budget of 20%.

    Args:
        names: policies of the comparison; others are left out.
        row_buffer: where it is not what varies.
    """
    cases: list[Case] = []

    def add(study: str, name: str, setting: str, **changes: Any) -> None:
        if name in names:
            cases.append(replace(Case(name, STUDY_BUDGET, row_buffer, study=study, setting=setting), **changes))

    def vary(study: str, name: str, parameter: str, default: float, values: Sequence[float], label: str) -> None:
        for value in values:
            add(study, name, label.format(value), parameters=() if value == default else ((parameter, value),))

    # Defaults are those of the policies: such a case then shares its plan's folder with the grid.
    vary("tau", "ssd", "tau_quantile", 0.5, (0.25, 0.5, 0.75), "quantile {:g} of the scores")
    vary("tau", "ssd_guarded", "loss", 0.4, (0.2, 0.4, 0.6), "a window misses {:g}")
    vary("W : M", "ssd", "ratio", 3, (1, 2, 3, 4), "1 : {}")
    vary("W : M", "ssd_guarded", "ratio", 1, (1, 2, 3, 4), "1 : {}")
    for name in STUDIED:
        for period in (1, 8, 24, 48):
            # A row buffer of 0 evicts at every step, just as one of 1 would.
            add("refresh period", name, str(period), row_buffer=0 if period == 1 else period)
    for name in STUDIED:
        for scale in (1.0, 5.0):
            add("guidance", name, f"{scale:g}", guidance=scale)
    for name in STUDIED:
        add("prompt", name, "kept")
        add("prompt", name, "competing", competing=True)
    return cases


def build(case: Case, shape: ModelShape, profile: HeadProfile | None, prompt_tokens: int,
          dtype: torch.dtype) -> CachePlan:
    """The plan of a case.

    Args:
        case: of the comparison.
        shape: of the model.
        profile: of its heads, if one was given.
        prompt_tokens: slots that a competing prompt brings along, see `compete`.
        dtype: of the model's caches, whose bytes the budget is a share of.

    Raises:
        TypeError, ValueError: as the policy, above all for a budget too small for the row buffer.
    """
    parameters = dict(case.parameters)
    if profile is not None and "tau_quantile" in parameters:
        parameters["tau"] = float(profile.sparsity.quantile(parameters.pop("tau_quantile")))
    plan = make_plan(case.policy, shape, None, case.row_buffer, byte_budget=case.budget, dtype=dtype,
                     kv_format=case.kv_format, profile=profile, **parameters)
    return compete(plan, prompt_tokens) if case.competing else plan


def compete(plan: CachePlan, prompt_tokens: int) -> CachePlan:
    """The plan with a prompt that may be evicted; every head gets the slots that a kept prompt would have taken.

    Args:
        plan: with the prompt kept.
        prompt_tokens: length of a prompt.
    """
    def grown(spec: HeadSpec) -> HeadSpec:
        return spec if spec.size is None else replace(spec, size=spec.size + prompt_tokens)

    return CachePlan([[grown(spec) for spec in heads] for heads in plan.layers], plan.row_buffer, keep_prompt=False,
                     kv_format=plan.kv_format)


@dataclass(frozen=True)
class Step:
    """One measure of some cases.

    Attributes:
        part: of the command, which the record says by what it was made.
        table: of the record, "grid" or "sensitivity".
        measure: "fidelity" or "quality".
        cases: to measure.
    """

    part: str
    table: str
    measure: str
    cases: Sequence[Case]


@dataclass(frozen=True)
class _Job:
    """A call that draws: its share of the progress bar in visual tokens, and the call."""

    part: str
    weight: int
    run: Callable[[ProgressCallback], None]


@dataclass
class Comparison:
    """A comparison in a folder, with its results in ``record`` and, after every few plans, in ``OUT/results.json``.

    Attributes:
        pipe: the model.
        out: folder.
        profile: of the model's heads; None if no policy needs it.
        texts: prompts of the fidelity measures.
        prompts: of the quality measures, GenEval metadata; may be empty without those.
        seeds: pictures per prompt for quality.
        guidance: None for the model's default.
        batch_size: pictures drawn at once.
        record: "parts" (how each was made), "profile" (what it cost), "grid" and "sensitivity" (results by
            `Case.label`), "prediction", "goals", "int8_goals".
        prompt_tokens: mean length of a prompt.

    Raises:
        ValueError: the folder holds results of another model, profile or setting.
    """

    pipe: Pipeline
    out: Path
    profile: HeadProfile | None
    texts: Sequence[str]
    prompts: Sequence[Mapping[str, Any]]
    seeds: int = 3
    guidance: float | None = None
    batch_size: int = 25
    record: dict[str, Any] = field(init=False)
    prompt_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        facts = settings(self.pipe, "comparison", self.pipe.shape.full_plan(), self.guidance, self.batch_size)
        self.guidance = facts["guidance_scale"]
        self.out.mkdir(parents=True, exist_ok=True)
        keep_settings(self.out, facts)
        if self.profile is not None:  # calls whose policies need none may come between
            (self.out / "profile").mkdir(exist_ok=True)
            keep_settings(self.out / "profile", {"profile": _digest(self.profile)})
        file = self.out / "results.json"
        empty: dict[str, Any] = {"parts": {}, "grid": {}, "sensitivity": {}, "prediction": None, "goals": [],
                                 "int8_goals": []}
        self.record = results.read_record(file) if file.exists() else empty
        known = self.record.get("profile")
        self.record["profile"] = known if self.profile is None else self._cost_of(self.profile)
        lengths = [len(tokens) for tokens in self.pipe.prompt_tokens(self.texts)]
        self.prompt_tokens = round(sum(lengths) / len(lengths))

    def run(self, steps: Sequence[Step], facts: Mapping[str, Any], *,
            progress: ProgressCallback = lambda done, total: None,
            publish: Callable[[dict[str, Any]], Any] = lambda record: None) -> None:
        """Take the steps; what is measured already is only summed up.

        Args:
            steps: in order.
            facts: how the results were made, kept with every part that drew something and was finished.
            progress: ``progress(done, total)`` in visual tokens of all pictures, finished ones included.
            publish: called with the record after every part.

        Raises:
            ValueError: a policy needs a profile and there is none, or a folder holds results of other settings.
            ImportError: scipy or scikit-image is missing; the message names the extra.
        """
        if self.profile is not None:
            self.profile.check(self.pipe.shape)
        for step in steps:
            # Plans can only be compared when all drew the same prompts.
            folder = self.out / step.measure
            folder.mkdir(exist_ok=True)
            texts = self.texts if step.measure == "fidelity" else [prompt["prompt"] for prompt in self.prompts]
            keep_settings(folder, {"prompts": list(texts)})
        jobs = [job for step in steps for job in self._jobs(step)]
        total, done = sum(job.weight for job in jobs), 0
        drawn = set()
        for number, job in enumerate(jobs):
            def show(part: int, whole: int, job: _Job = job) -> None:
                drawn.add(job.part)
                progress(done + job.weight * part // whole, total)  # noqa: B023

            job.run(show)
            done += job.weight
            progress(done, total)
            self.save()
            if number + 1 == len(jobs) or jobs[number + 1].part != job.part:
                runs = self.record["parts"].setdefault(job.part, [])
                # A call that found everything done says nothing about how it was made.
                if job.part in drawn or not runs:
                    runs.append(dict(facts))
                self.save()
                publish(self.record)

    def save(self) -> None:
        """Draw the conclusions and write ``results.json``."""
        entries = list(self.record["grid"].values())

        def figures(measure: str, name: str) -> dict[findings.Key, Any]:
            return {findings.key(entry): entry[measure][name] for entry in entries if measure in entry}

        kl, right = figures("fidelity", "kl_by_picture"), figures("quality", "by_prompt")
        impossible = {findings.key(entry) for entry in entries if "reason" in entry}
        close = {key: {"": values} for key, values in kl.items()}
        self.record["goals"] = [goal.as_json() for goal in findings.goals(right, close, impossible)]
        self.record["int8_goals"] = [goal.as_json() for goal in findings.int8_goals(right, close, impossible)]
        pairs = {findings.key(entry): (entry["predicted_cost"], entry["fidelity"]["kl_mean"]) for entry in entries
                 if "predicted_cost" in entry and "fidelity" in entry}
        self.record["prediction"] = findings.prediction(pairs)
        write_text(self.out / "results.json", json.dumps(self.record, indent=1) + "\n")

    def _cost_of(self, profile: HeadProfile) -> dict[str, Any]:
        known = profile.meta.get("prompts", [])
        measured = {*self.texts, *(prompt["prompt"] for prompt in self.prompts)}
        return {"prompts": len(known), "seconds": profile.meta.get("seconds"), "shared": len(measured & {*known})}

    def _jobs(self, step: Step) -> Iterator[_Job]:
        """What there is to draw for a step, cases with the same plan and guidance together."""
        plans: dict[float, dict[str, CachePlan]] = {}
        labels: dict[tuple[float, str], list[str]] = {}
        for case in step.cases:
            scale = self.pipe.guidance(self.guidance if case.guidance is None else case.guidance)
            plan = self._enter(step.table, case, scale)
            if plan is not None:
                plans.setdefault(scale, {})[case.plan_name] = plan
                labels.setdefault((scale, case.plan_name), []).append(case.label)
        draw, size = (self._fidelity, CACHES_AT_ONCE) if step.measure == "fidelity" else (self._quality, 1)
        for scale, named in plans.items():
            self._open(step.measure, named, scale)
            remaining = iter(named.items())
            while chunk := dict(islice(remaining, size)):
                def run(progress: ProgressCallback, chunk: dict[str, CachePlan] = chunk, scale: float = scale) -> None:
                    for name, result in draw(chunk, scale, progress).items():
                        for label in labels[scale, name]:
                            self.record[step.table][label][step.measure] = result.as_json()

                pictures = (len(self.texts) * (len(chunk) + 1) if step.measure == "fidelity"
                            else len(self.prompts) * self.seeds)
                yield _Job(step.part, pictures * self.pipe.shape.num_visual_tokens, run)

    def _enter(self, table: str, case: Case, scale: float) -> CachePlan | None:
        """Put a case into the record; returns its plan, or None where its policy cannot make one."""
        if case.policy in policies.NEED_PROFILE and self.profile is None:
            raise ValueError(f"policy {case.policy} needs a profile of the model's heads, got none; make one with "
                             "`ssd-janus profile`")
        entry = self.record[table].setdefault(case.label, {})
        entry.update(policy=case.policy, budget=case.budget, row_buffer=case.row_buffer, study=case.study,
                     setting=case.setting, guidance=scale, kv_format=case.kv_format)
        shape, dtype = self.pipe.shape, self.pipe.dtype
        try:
            plan = build(case, shape, self.profile, self.prompt_tokens, dtype)
        except ValueError as error:
            entry["reason"] = str(error)
            return None
        entry.pop("reason", None)
        entry["tokens"] = plan.budget(shape.num_visual_tokens)
        entry["reached"] = plan.byte_budget(shape.num_visual_tokens, head_dim=shape.head_dim, dtype=dtype)
        # What an online plan keeps is not known before it has drawn, and the full cache itself has nothing to predict.
        if self.profile is not None and case.policy != "online" and case.plan_name != "full":
            entry["predicted_cost"] = predicted_cost(plan, self.profile)
        return plan

    def _open(self, measure: str, plans: Mapping[str, CachePlan], scale: float) -> None:
        """Refuse folders of other settings before hours of drawing, not after."""
        if measure == "fidelity":
            fidelity.open_folders(self.pipe, plans, self._folder(measure, scale), prompts=self.texts,
                                  guidance_scale=scale, batch_size=self.batch_size, pictures=False)
            return
        for name, plan in plans.items():
            quality.open_folder(self.pipe, plan, self._folder(measure, scale) / name, prompts=self.prompts,
                                guidance_scale=scale, batch_size=self.batch_size)

    def _folder(self, measure: str, scale: float) -> Path:
        return self.out / measure / f"guidance-{scale:g}"

    def _fidelity(self, plans: Mapping[str, CachePlan], scale: float,
                  progress: ProgressCallback) -> Mapping[str, fidelity.Fidelity]:
        return fidelity.evaluate(self.pipe, plans, self._folder("fidelity", scale), prompts=self.texts,
                                 guidance_scale=scale, batch_size=self.batch_size, pictures=False, progress=progress)

    def _quality(self, plans: Mapping[str, CachePlan], scale: float,
                 progress: ProgressCallback) -> Mapping[str, quality.Quality]:
        return {name: quality.evaluate(self.pipe, plan, self._folder("quality", scale) / name, prompts=self.prompts,
                                       seeds=self.seeds, guidance_scale=scale, batch_size=self.batch_size,
                                       progress=progress)
                for name, plan in plans.items()}


def _digest(profile: HeadProfile) -> str:
    """Tells profiles apart."""
    parts = (profile.error, profile.sensitivity, profile.age_mass)
    return hashlib.blake2b(b"".join(part.numpy().tobytes() for part in parts), digest_size=8).hexdigest()
