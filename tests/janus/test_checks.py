"""Check of the checkers: on the included model, the measures move as they must."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from PIL import Image

from ssd_janus import Pipeline
from ssd_janus.evaluation import fidelity, quality
from ssd_janus.prompts import shapes_suite
from ssd_kernels import CachePlan, HeadSpec, policies

pytestmark = pytest.mark.slow
SUITE = shapes_suite()
PROMPTS = SUITE[:12]  # two of each family
OTHERS = 8  # prompts that each picture is also judged by


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_pretrained(None)


def window(pipe: Pipeline, size: int) -> CachePlan:
    return CachePlan.uniform(HeadSpec.window(size), pipe.shape.num_layers, pipe.shape.num_heads)


def score(pipe: Pipeline, plan: CachePlan, out: Path) -> float:
    return quality.evaluate(pipe, plan, out, prompts=PROMPTS, batch_size=len(PROMPTS)).overall.mean


def test_scores_collapse_without_a_cache_and_with_other_prompts(pipe: Pipeline, tmp_path: Path) -> None:
    full = score(pipe, pipe.shape.full_plan(), tmp_path / "full")
    assert full >= 0.5
    assert score(pipe, window(pipe, 4), tmp_path / "five tokens") <= 0.25 * full
    # The same pictures judged by other prompts of the same family.
    from ssd_shapes import detector

    right = []
    for batch in (tmp_path / "full" / "batches").iterdir():
        for record in json.loads(batch.read_text()):
            own = PROMPTS[record["index"]]
            others = [other for other in SUITE if other["tag"] == own["tag"] and other["include"] != own["include"]]
            with Image.open(tmp_path / "full" / record["file"]) as picture:
                right += [detector.score(picture, other).correct for other in random.Random(0).sample(others, OTHERS)]
    assert len(right) == OTHERS * len(PROMPTS) and sum(right) / len(right) <= 0.25 * full


def test_divergence_grows_as_budgets_shrink(pipe: Pipeline, tmp_path: Path) -> None:
    texts = [PROMPTS[1]["prompt"]]
    plans = {"full": pipe.shape.full_plan()} | {
        str(budget): policies.heavy(pipe.shape, budget) for budget in (0.5, 0.06)}
    found = list(fidelity.evaluate(pipe, plans, tmp_path, prompts=texts, pictures=False).values())
    assert found[0].kl_mean == 0 and found[0].agreement == 1
    for more, less in zip(found, found[1:], strict=False):
        assert more.kl_mean < less.kl_mean and more.agreement >= less.agreement
    assert found[-1].agreement < 1
