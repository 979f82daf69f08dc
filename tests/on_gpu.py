"""pytest plugin for runs on a GPU, where tests may break the device or be killed: tests/conftest.py registers it.

Failures are told when they happen, and every result goes to the JSON lines file in the variable SSD_TEST_RECORD. The
fault of a kernel stays with its process, where all that comes after it fails: a worker of pytest-xdist with such a
device ends, and another takes its place.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
import torch


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Of the process that collects what the workers report."""
    if "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and not report.failed):
        return
    error = message(report)
    if error:
        print(f"\nFAILED {report.nodeid}: {error}", flush=True)
    line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3), "error": error}
    with Path(os.environ["SSD_TEST_RECORD"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and "PYTEST_XDIST_WORKER" in os.environ and broken():
        print(f"FAILED {item.nodeid}: {message(report)}; the device is broken", file=sys.stderr, flush=True)
        os._exit(1)
    return report


def message(report: pytest.TestReport) -> str | None:
    """The first line of why a test failed; None if it did not."""
    if not report.failed:
        return None
    crash = getattr(report.longrepr, "reprcrash", None)
    return (getattr(crash, "message", None) or str(report.longrepr)).strip().partition("\n")[0]


def broken() -> bool:
    """Whether the CUDA device has a fault that stays."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
