"""Models that the tests of ssd_attach share."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Tests never ask the network; read when huggingface_hub is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import decoders
import pytest
from transformers import PreTrainedModel

from ssd_attach import detach


@pytest.fixture(scope="session", params=decoders.KV_HEADS)
def shared_model(request: pytest.FixtureRequest) -> tuple[str, PreTrainedModel]:
    return request.param, decoders.build(request.param)


@pytest.fixture
def named_model(shared_model: tuple[str, PreTrainedModel]) -> Iterator[tuple[str, PreTrainedModel]]:
    """Of every family; detached again after every test."""
    yield shared_model
    detach(shared_model[1])


@pytest.fixture
def llama() -> PreTrainedModel:
    """A model that a test may spoil."""
    return decoders.build("llama")
