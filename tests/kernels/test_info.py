"""`ssd_kernels.info()` and what importing the package costs."""

from __future__ import annotations

import json
import subprocess
import sys

import torch

import ssd_kernels
from ssd_kernels import backends

from .cases import CASES


def test_info_says_what_runs_and_why_not_the_rest() -> None:
    """"what was built, which backends can run here and why not the others"."""
    info = ssd_kernels.info()
    assert set(info) == {"version", "torch", "python", "machine", "threads", "cpus", "cpu_quota", "waiting",
                         "openmp", "extension", "backends"}
    assert info["version"] == ssd_kernels.__version__ and info["torch"] == torch.__version__
    assert set(info["backends"]) == set(backends.backend_names()) >= {"reference", "cpu"}
    for backend in info["backends"].values():
        assert set(backend) == {"available", "reason"} and isinstance(backend["available"], bool)
        assert (backend["reason"] is None) == backend["available"] and backend["reason"] != ""
    assert info["backends"]["reference"]["available"]
    extension = info["extension"]
    assert extension["built"] == info["backends"]["cpu"]["available"]
    if extension["built"]:
        assert extension["instruction_set"] in extension["instruction_sets"] and isinstance(extension["cuda"], bool)
    else:
        assert extension["reason"]


def test_info_is_plain_data() -> None:
    """Plain values, for `--json` and bug reports."""
    assert json.loads(json.dumps(ssd_kernels.info())) == ssd_kernels.info()


def test_every_backend_is_under_test() -> None:
    """"every backend runs the same contract tests": a new one needs its line in `CASES`."""
    elsewhere = {name for name, reason in backends.available().items() if reason}
    assert {case.name for case in CASES} | elsewhere == set(backends.backend_names())
    assert {"cpu", "reference"} <= {case.name for case in CASES}


def test_import_is_light() -> None:
    """"knows torch, knows nothing of models": importing the kernels loads neither transformers nor triton."""
    code = ("import torch, sys; before = set(sys.modules); import ssd_kernels; "
            "print(*{name.split('.')[0] for name in set(sys.modules) - before})")
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "ssd_kernels" in loaded
    assert not {"transformers", "triton", "numpy", "PIL", "ssd_janus", "ssd_bench"} & set(loaded)


def test_public_names() -> None:
    """docs/specification.md, section 4: "Names below are fixed"."""
    for name in ("HeadSpec", "CachePlan", "CompressedCache", "info"):
        assert hasattr(ssd_kernels, name) and name in ssd_kernels.__all__
