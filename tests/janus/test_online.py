"""Online typing against types computed afterwards from the whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_cli import run

from ssd_attach.online import OnlinePlan
from ssd_janus import Pipeline
from ssd_kernels import CachePlan, HeadSpec, policies

TEXTS = list(tiny.PROMPTS[:2])


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(folder)


class Watch:
    """Attention of every step, kept whole."""

    def __init__(self) -> None:
        self.queries: dict[int, list] = {}
        self.keys: dict[int, list] = {}

    def prefill(self, *arguments: Any) -> None:
        pass

    def decode(self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None,
               out: torch.Tensor) -> None:
        self.queries.setdefault(layer, []).append(query)
        self.keys.setdefault(layer, []).append(keys)


def test_heads_are_typed_at_a_row_boundary(pipe: Pipeline) -> None:
    plan = OnlinePlan(pipe.shape, 0.7, 6, loss=0.42)
    size, last = plan.layers[0][0].size, plan.rows * tiny.GRID
    assert size is not None and 12 <= last <= size
    watch = Watch()
    pipe.generate_tokens(TEXTS, seed=1, plan=pipe.shape.full_plan(), observer=watch)
    specs = []
    for layer in range(tiny.LAYERS):
        missed = torch.zeros(4)
        for step in range(tiny.GRID + 1, last):
            keys = torch.stack(watch.keys[layer][:step + 1], 2)
            mass = (watch.queries[layer][step][:, :, None] @ keys.transpose(2, 3) * tiny.HEAD_DIM ** -0.5).softmax(-1)
            missed += mass[:, :, 0, :step - tiny.GRID].sum(-1).mean(0)
        specs.append([HeadSpec.heavy(size, size if share < 0.42 else size // 2, "mean")
                      for share in (missed / (last - tiny.GRID - 1)).tolist()])
    kinds = {spec.recent for heads in specs for spec in heads}
    assert kinds == {size, size // 2}, "the example must have heads of both kinds"
    # Nothing has been evicted when heads are typed, so a plan that knew from the start draws the same.
    expected = pipe.generate_tokens(TEXTS, seed=1, plan=CachePlan(specs, 6))
    assert torch.equal(pipe.generate_tokens(TEXTS, seed=1, plan=plan), expected)
    assert torch.equal(pipe.generate_tokens(TEXTS, seed=1, plan=plan), expected)


def test_limits(pipe: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 12 slots per head for online typing, got 8"):
        OnlinePlan(pipe.shape, 0.4, 6)
    plan = OnlinePlan(pipe.shape, 0.7)
    with pytest.raises(ValueError, match="online plan has no file"):
        plan.save(tmp_path / "plan.json")
    assert plan.to_dict()["online"]["rows"] == plan.rows
    assert plan.layers == policies.heavy(pipe.shape, 0.7).layers, "as many bytes as every policy"
    with pytest.raises(ValueError, match="observer must be None under an online plan"):
        pipe.generate_tokens(TEXTS, plan=plan, observer=Watch())
    with pytest.raises(ValueError, match="loss must be within 0 .. 1, got 7"):
        OnlinePlan(pipe.shape, 0.7, loss=7)


def test_command(folder: Path, tmp_path: Path) -> None:
    result = run("generate", "a heart", "--model", folder, "--out", tmp_path, "--policy", "online", "--budget", 0.7)
    assert result.exit_code == 0, result.output
