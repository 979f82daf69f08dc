"""Models that the tests of ssd_janus share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Tests never ask the network; read when huggingface_hub is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import tiny
from transformers import JanusForConditionalGeneration

from ssd_janus import disable


@pytest.fixture(scope="session", params=["mha", "gqa"])
def shared_model(request: pytest.FixtureRequest) -> JanusForConditionalGeneration:
    return tiny.build_model(heads=4, kv_heads=4 if request.param == "mha" else 2)


@pytest.fixture
def model(shared_model: JanusForConditionalGeneration) -> Iterator[JanusForConditionalGeneration]:
    """Multi-head and grouped-query attention; disabled again after every test."""
    yield shared_model
    disable(shared_model)


@pytest.fixture
def fresh() -> JanusForConditionalGeneration:
    """A model that a test may spoil."""
    return tiny.build_model()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved checkpoint."""
    path = tmp_path_factory.mktemp("tiny-janus")
    tiny.build_model().save_pretrained(path)
    tiny.build_processor().save_pretrained(path)
    return path
