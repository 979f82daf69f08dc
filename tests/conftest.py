"""Settings of every test: threads, seeds and hypothesis profiles."""

import importlib
import os

# Before torch loads its OpenMP runtime: idle threads sleep, so that tests share a machine politely.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

THREADS = 2  # on any number of cores: work is split in every test, and nothing may depend on how many run at once

settings.register_profile("ci", derandomize=True, database=None, deadline=None, max_examples=30,
                          suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
# Where time is short: a failure is reported as it is found.
settings.register_profile("gpu", settings.get_profile("ci"), phases=(Phase.explicit, Phase.generate))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    if "SSD_TEST_RECORD" in os.environ:
        config.pluginmanager.register(importlib.import_module("on_gpu"))


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
