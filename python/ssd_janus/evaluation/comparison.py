"""Compare policies at equal bytes: which plans are measured, and one record of all results.

Every plan has a folder ``OUT/fidelity/guidance-G/PLAN`` or ``OUT/quality/guidance-G/PLAN`` (`RunFolder`), whose name
says the format, too, if it is not the model's dtype: a killed comparison goes on where it was, and a plan that several
parts ask for is drawn once. Processes may work in one folder at once, on the same plans (`Ranks`) or on others.
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
from ..ranks import ALONE, Ranks
from ..shape import ModelShape
from . import fidelity, findings, quality
from .entries import Entries
from .folder import RunFolder, keep_settings, settings

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
    """Some plans and one of their measures.

    Attributes:
        part: of the command.
        weight: its share of the progress bar in visual tokens.
        batches: in all plans.
        draw: draws those of a rank, ``draw(progress, ranks, before)``.
        missing: files of batches that are not done.
        enter: sums up what is done and keeps it.
    """

    part: str
    weight: int
    batches: int
    draw: Callable[[ProgressCallback, Ranks, int], None]
    missing: Callable[[], list[Path]]
    enter: Callable[[], None]


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
    entries: Entries = field(init=False)
    prompt_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        facts = settings(self.pipe, "comparison", self.pipe.shape.full_plan(), self.guidance, self.batch_size)
        self.guidance = facts["guidance_scale"]
        self.out.mkdir(parents=True, exist_ok=True)
        keep_settings(self.out, facts)
        if self.profile is not None:  # calls whose policies need none may come between
            (self.out / "profile").mkdir(exist_ok=True)
            keep_settings(self.out / "profile", {"profile": _digest(self.profile)})
        self.entries = Entries(self.out)
        if self.profile is not None:
            self.entries.add_profile(self._cost_of(self.profile))
        self.record = self._conclude(self.entries.read())
        lengths = [len(tokens) for tokens in self.pipe.prompt_tokens(self.texts)]
        self.prompt_tokens = round(sum(lengths) / len(lengths))

    def run(self, steps: Sequence[Step], facts: Mapping[str, Any], *,
            progress: ProgressCallback = lambda done, total: None,
            publish: Callable[[dict[str, Any]], Any] = lambda record: None, ranks: Ranks = ALONE) -> list[Path]:
        """Take the steps; what is measured already is only summed up.

        Args:
            steps: in order.
            facts: how the results were made, kept with every part that drew something and was finished.
            progress: ``progress(done, total)`` in visual tokens of all pictures, finished ones included.
            publish: called with the record after every part that is complete.
            ranks: which of several processes this is; each draws its own batches, and the last one that finds all of
                them sums up.

        Returns:
            Files of batches that other ranks have not finished yet; empty if all is done.

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
        total, done, before = sum(job.weight for job in jobs), 0, 0
        drawn, left = set(), []
        for number, job in enumerate(jobs):
            def show(part: int, whole: int, job: _Job = job) -> None:
                drawn.add(job.part)
                progress(done + job.weight * part // whole, total)  # noqa: B023

            job.draw(show, ranks, before)
            done, before = done + job.weight, before + job.batches
            progress(done, total)
            if ranks.alone or not job.missing():
                job.enter()
                self.save()
            else:
                left.append(job)
            if number + 1 == len(jobs) or jobs[number + 1].part != job.part:
                if job.part in drawn:
                    self.entries.add_run(job.part, facts)
                if all(other.part != job.part for other in left):
                    self._finish(job.part, facts, publish)
        missing = {id(job): job.missing() for job in left}
        for job in left:
            if not missing[id(job)]:
                job.enter()
        for part in dict.fromkeys(job.part for job in left):
            if not any(missing[id(job)] for job in left if job.part == part):
                self._finish(part, facts, publish)
        self.save()
        return [file for files in missing.values() for file in files]

    def _finish(self, part: str, facts: Mapping[str, Any], publish: Callable[[dict[str, Any]], Any]) -> None:
        # A call that found everything done says nothing about how it was made.
        if part not in self.entries.read()["parts"]:
            self.entries.add_run(part, facts)
        self.save(publish)

    def save(self, publish: Callable[[dict[str, Any]], Any] = lambda record: None) -> None:
        """Draw the conclusions from all findings of the folder, write ``results.json``, and publish them.

        Whoever adds a finding sums up afterwards. Where another process adds one meanwhile, the older of two sums could
        be written last; so it is done again until nothing has come, and what is written last holds everything.
        """
        state = None
        while state != (state := self.entries.state()):
            self.record = self._conclude(self.entries.read())
            write_text(self.out / "results.json", json.dumps(self.record, indent=1) + "\n")
            publish(self.record)

    def _conclude(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """A record with its cases in the order of `grid` and `studies`, and conclusions."""
        order = [*policies.POLICIES, "online"]
        rank = {name: number for number, name in enumerate(order)}
        variants = {case.label: number for number, case in enumerate(studies(order, 0))}
        cells = sorted(found["grid"].items(), key=lambda item: (
            item[1].get("kv_format", "auto"), item[1]["policy"] != "full", rank.get(item[1]["policy"], len(rank)),
            item[1]["row_buffer"], item[1]["budget"], item[0]))
        varied = sorted(found["sensitivity"].items(), key=lambda item: (variants.get(item[0], len(variants)), item[0]))
        return {"parts": found["parts"], "grid": dict(cells), "sensitivity": dict(varied),
                **findings.conclusions([entry for _, entry in cells]), "profile": found["profile"]}

    def _cost_of(self, profile: HeadProfile) -> dict[str, Any]:
        known = profile.meta.get("prompts", [])
        measured = {*self.texts, *(prompt["prompt"] for prompt in self.prompts)}
        return {"prompts": len(known), "seconds": profile.meta.get("seconds"), "shared": len(measured & {*known})}

    def _jobs(self, step: Step) -> Iterator[_Job]:
        """What there is to draw for a step, cases with the same plan and guidance together."""
        plans: dict[float, dict[str, CachePlan]] = {}
        entries: dict[tuple[float, str], dict[str, dict[str, Any]]] = {}
        for case in step.cases:
            scale = self.pipe.guidance(self.guidance if case.guidance is None else case.guidance)
            plan, entry = self._plan(case, scale)
            if plan is None:
                self.entries.add(step.table, step.measure, case.label, entry)
            else:
                plans.setdefault(scale, {})[case.plan_name] = plan
                entries.setdefault((scale, case.plan_name), {})[case.label] = entry
        make, size = (self._fidelity, CACHES_AT_ONCE) if step.measure == "fidelity" else (self._quality, 1)
        for scale, named in plans.items():
            remaining = iter(named.items())
            while chunk := dict(islice(remaining, size)):
                def add(results: Mapping[str, quality.Quality | fidelity.Fidelity], scale: float = scale) -> None:
                    for name, result in results.items():
                        for label, entry in entries[scale, name].items():
                            self.entries.add(step.table, step.measure, label, {**entry, step.measure: result.as_json()})

                yield make(step.part, chunk, scale, add)

    def _plan(self, case: Case, scale: float) -> tuple[CachePlan | None, dict[str, Any]]:
        """The plan of a case, or None where its policy cannot make one, and what its entry begins with."""
        if case.policy in policies.NEED_PROFILE and self.profile is None:
            raise ValueError(f"policy {case.policy} needs a profile of the model's heads, got none; make one with "
                             "`ssd-janus profile`")
        entry: dict[str, Any] = {
            "policy": case.policy, "budget": case.budget, "row_buffer": case.row_buffer, "study": case.study,
            "setting": case.setting, "guidance": scale, "kv_format": case.kv_format}
        shape, dtype = self.pipe.shape, self.pipe.dtype
        try:
            plan = build(case, shape, self.profile, self.prompt_tokens, dtype)
        except ValueError as error:
            return None, {**entry, "reason": str(error)}
        entry["tokens"] = plan.budget(shape.num_visual_tokens)
        entry["reached"] = plan.byte_budget(shape.num_visual_tokens, head_dim=shape.head_dim, dtype=dtype)
        # What an online plan keeps is not known before it has drawn, and the full cache itself has nothing to predict.
        if self.profile is not None and case.policy != "online" and case.plan_name != "full":
            entry["predicted_cost"] = predicted_cost(plan, self.profile)
        return plan, entry

    def _folder(self, measure: str, scale: float) -> Path:
        return self.out / measure / f"guidance-{scale:g}"

    def _fidelity(self, part: str, plans: Mapping[str, CachePlan], scale: float,
                  add: Callable[[Mapping[str, fidelity.Fidelity]], None]) -> _Job:
        common: dict[str, Any] = {"prompts": self.texts, "guidance_scale": scale, "pictures": False}
        folders = fidelity.open_folders(self.pipe, plans, self._folder("fidelity", scale), batch_size=self.batch_size,
                                        **common)
        return _Job(part, len(self.texts) * (len(plans) + 1) * self.pipe.shape.num_visual_tokens,
                    sum(len(folder.batches(1)) for folder in folders.values()),
                    lambda progress, ranks, before: fidelity.draw(self.pipe, plans, folders, progress=progress,
                                                                  ranks=ranks, before=before, **common),
                    lambda: [file for folder in folders.values() for file in folder.missing(1)],
                    lambda: add(fidelity.results(self.pipe, plans, folders)))

    def _quality(self, part: str, plans: Mapping[str, CachePlan], scale: float,
                 add: Callable[[Mapping[str, quality.Quality]], None]) -> _Job:
        ((name, plan),) = plans.items()
        common: dict[str, Any] = {"prompts": self.prompts, "guidance_scale": scale}
        folder: RunFolder[list[dict[str, Any]]] = quality.open_folder(
            self.pipe, plan, self._folder("quality", scale) / name, batch_size=self.batch_size, **common)
        return _Job(part, len(self.prompts) * self.seeds * self.pipe.shape.num_visual_tokens,
                    len(folder.batches(self.seeds)),
                    lambda progress, ranks, before: quality.draw(
                        self.pipe, plan, folder, seeds=self.seeds, progress=progress, ranks=ranks, before=before,
                        **common),
                    lambda: folder.missing(self.seeds),
                    lambda: add({name: quality.result(self.pipe, plan, folder, self.seeds)}))


def _digest(profile: HeadProfile) -> str:
    """Tells profiles apart."""
    parts = (profile.error, profile.sensitivity, profile.age_mass)
    return hashlib.blake2b(b"".join(part.numpy().tobytes() for part in parts), digest_size=8).hexdigest()
