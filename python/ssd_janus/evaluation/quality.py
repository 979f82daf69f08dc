"""The shapes suite: draw its prompts with the included model, let the detector judge, as GenEval does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ssd_kernels import CachePlan
from ssd_kernels.reading import Field, naming, read_json

from ..extras import needs
from ..files import write_text
from ..images import file_names, save_picture
from ..pipeline import Pipeline
from ..progress import ProgressCallback
from ..ranks import ALONE, Ranks
from .folder import LARGEST, Batch, RunFolder, check_pictures, settings
from .statistics import Interval, family_scores


@dataclass(frozen=True)
class Quality:
    """Scores of one plan.

    Attributes:
        families: family -> share of right pictures.
        overall: mean over the families.
        by_prompt: family -> share of right pictures of every prompt, in the suite's order.
        pictures: judged in all.
        budget: of the plan.
    """

    families: dict[str, Interval]
    overall: Interval
    by_prompt: dict[str, list[float]]
    pictures: int
    budget: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(pipe: Pipeline, plan: CachePlan, out: Path, *, prompts: Sequence[Mapping[str, Any]], seeds: int = 1,
             guidance_scale: float | None = None, batch_size: int = 16,
             progress: ProgressCallback = lambda done, total: None) -> Quality:
    """Draw every prompt once per seed, judge the pictures, and sum up.

    Pictures go to ``out/pictures/seed-S``, verdicts to ``out/batches``; both stay, and what is there is not drawn
    again, so a killed run goes on where it was and more seeds may be added later. A batch of which a file is damaged
    or a picture missing is drawn again, and a warning names it.

    Args:
        pipe: the model; its pictures must be of the shapes world.
        plan: what the caches keep.
        out: folder of this plan.
        prompts: GenEval metadata with "tag", "include" and "prompt".
        seeds: pictures per prompt.
        guidance_scale: None for the model's default.
        batch_size: pictures drawn at once.
        progress: ``progress(done_steps, all_steps)``, steps of batches still to draw.

    Raises:
        ValueError: ``out`` holds results made with other settings.
        ImportError: scipy is missing; the message names the extra.
    """
    folder = open_folder(pipe, plan, out, prompts=prompts, guidance_scale=guidance_scale, batch_size=batch_size)
    draw(pipe, plan, folder, prompts=prompts, seeds=seeds, guidance_scale=guidance_scale, progress=progress)
    return result(pipe, plan, folder, seeds)


def draw(pipe: Pipeline, plan: CachePlan, folder: RunFolder[list[dict[str, Any]]], *,
         prompts: Sequence[Mapping[str, Any]], seeds: int, guidance_scale: float | None,
         progress: ProgressCallback = lambda done, total: None, ranks: Ranks = ALONE, before: int = 0) -> None:
    """Draw and judge the batches of a folder that are still to do. Args: as of `evaluate`, and

        folder: of `open_folder` with the same arguments.
        ranks: which of several processes this is; each draws its own batches.
        before: batches of the same work that were dealt out before, see `Ranks.own`.

    Raises:
        ImportError: scipy is missing, which `result` needs; the message names the extra.
    """
    with needs("evaluate", "scipy"):
        from ssd_shapes import detector
    texts = [prompt["prompt"] for prompt in prompts]
    names, out = file_names(texts, 1), folder.path
    remaining, steps = folder.to_do(ranks.own(folder.batches(seeds), before)), pipe.shape.num_visual_tokens
    for number, batch in enumerate(remaining):
        pictures = pipe(list(batch.prompts), guidance_scale=guidance_scale, seed=folder.sampling_seed(batch), plan=plan,
                        progress=lambda done, _: progress(number * steps + done, len(remaining) * steps))  # noqa: B023
        target = out / "pictures" / f"seed-{batch.seed}"
        target.mkdir(parents=True, exist_ok=True)
        records = []
        for index, picture in enumerate(pictures, batch.first):
            save_picture(picture, target / names[index])
            verdict = detector.score(picture, prompts[index])
            records.append({"prompt": texts[index], "tag": prompts[index]["tag"], "seed": batch.seed, "index": index,
                            "file": str((target / names[index]).relative_to(out)), "correct": verdict.correct,
                            "reason": verdict.reason})
        write_text(folder.file(batch), json.dumps(records, indent=1) + "\n")


def result(pipe: Pipeline, plan: CachePlan, folder: RunFolder[list[dict[str, Any]]], seeds: int) -> Quality:
    """The scores of a folder whose batches are all done."""
    return summarise([record for records in folder.contents(seeds) for record in records],
                     plan.budget(pipe.shape.num_visual_tokens))


def open_folder(pipe: Pipeline, plan: CachePlan, out: Path, *, prompts: Sequence[Mapping[str, Any]],
                guidance_scale: float | None, batch_size: int) -> RunFolder[list[dict[str, Any]]]:
    """The folder of a plan's verdicts; args as of `evaluate`.

    Raises:
        ValueError: it holds results made with other settings.
    """
    texts = [prompt["prompt"] for prompt in prompts]
    names = file_names(texts, 1)

    def read(file: Path, batch: Batch) -> list[dict[str, Any]]:
        records = _read(file, batch, prompts)
        check_pictures(out / "pictures" / f"seed-{batch.seed}" / names[record["index"]] for record in records)
        return records

    metadata = [{name: value for name, value in prompt.items() if name != "prompt"} for prompt in prompts]
    wanted = settings(pipe, "shapes", plan, guidance_scale, batch_size) | {"metadata": metadata}
    return RunFolder(out, wanted, texts, ".json", read)


def _read(file: Path, batch: Batch, prompts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The verdicts of a batch.

    Raises:
        ValueError: they are not of this batch, or damaged; the message names file and field.
    """
    count = len(batch.prompts)
    found = Field(read_json(file, LARGEST))
    with naming(file):
        for index, record in enumerate(found.items(count, count), batch.first):
            members = record.members(("prompt", "tag", "seed", "index", "file", "correct", "reason"))
            expected = {"prompt": prompts[index]["prompt"], "tag": prompts[index]["tag"], "seed": batch.seed,
                        "index": index}
            for name, value in expected.items():
                members[name].choice([value])
            members["correct"].boolean()
            for name in ("file", "reason"):
                members[name].string()
    records: list[dict[str, Any]] = found.value
    return records


def summarise(records: Sequence[Mapping[str, Any]], budget: float) -> Quality:
    """Scores from records with "tag", "index" of the prompt, and "correct"."""
    outcomes: dict[str, dict[int, list[bool]]] = {}
    for record in records:
        outcomes.setdefault(record["tag"], {}).setdefault(record["index"], []).append(record["correct"])
    shares = {tag: [sum(pictures) / len(pictures) for _, pictures in sorted(prompts.items())]
              for tag, prompts in outcomes.items()}
    return Quality(*family_scores(shares), by_prompt=shares, pictures=len(records), budget=budget)
