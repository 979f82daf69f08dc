"""Random models for benchmarks are made where they are used."""

from __future__ import annotations

import pytest
import torch
from pretend import guard, pretended

from ssd_bench import models
from ssd_bench.models import random_model


@pytest.mark.skipif(guard.unsupported() is not None, reason=f"no pretended GPU: {guard.unsupported()}")
def test_weights_are_made_on_the_device() -> None:
    """Gigabytes are not filled on the host and then sent."""
    with pretended() as machine:
        model = random_model(64, 96, 2, 2, torch.bfloat16, torch.device("cuda"))
        assert {str(tensor.device) for tensor in (*model.parameters(), *model.buffers())} == {"cuda:0"}
        assert sum(event.nbytes for event in machine.of_kind("to_device", "to_host")) < 1000
        weight = model.model.language_model.layers[1].mlp.down_proj.weight
        assert 0.5 < weight.float().std().item() * weight.shape[1] ** 0.5 < 2


def test_int8_behind_a_name_quantizes_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, str]] = []
    monkeypatch.setattr(models, "quantize", lambda model, weights: asked.append((model, weights)))
    monkeypatch.setattr(models, "SHAPES", {"small": (32, 48, 2, 2)})
    model, prompt = models.load("small:int8", torch.float32, torch.device("cpu"))
    assert prompt == models.PROMPT and asked == [(model, "int8")]
    models.load("small", torch.float32, torch.device("cpu"))
    assert len(asked) == 1
