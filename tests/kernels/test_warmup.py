"""`CompressedCache.warmup` compiles what `decode` will run, says so, and leaves everything as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ssd_kernels import cache as cache_module
from ssd_kernels.triton import launch

from .cases import Case, each_backend, each_triton, mixed
from .pair import Pair, assert_untouched, snapshot

ROTARY = pytest.mark.parametrize("rotary", [False, True], ids=["rotated", "rotary"])


def _pair(case: Case) -> Pair:
    pair = Pair(mixed(4, 3, num_layers=2), case, batch=2, max_prompt=5, steps=9)
    pair.prefill([5, 2])
    return pair


@each_backend
@ROTARY
def test_warmup_changes_nothing(case: Case, rotary: bool) -> None:
    pair = _pair(case)
    pair.run(2)
    before = snapshot(pair.cache)
    assert pair.cache.warmup(rotary) >= 0
    assert_untouched(pair.cache, before)
    pair.run(2)


@each_backend
@pytest.mark.parametrize("takes_long", [False, True], ids=["short", "long"])
def test_a_long_warmup_is_announced(case: Case, takes_long: bool, monkeypatch: pytest.MonkeyPatch,
                                    caplog: pytest.LogCaptureFixture) -> None:
    """What took noticeable time is logged as a warning, which Python shows to a user who configured no logging."""
    monkeypatch.setattr(cache_module, "NOTICEABLE_SECONDS", 0.0 if takes_long else 1e9)
    seconds = _pair(case).cache.warmup()
    announced = [(record.levelname, record.getMessage()) for record in caplog.records]
    message = f"compiled {case.name} kernels in {seconds:.1f} s; they are kept for the next time"
    assert announced == ([("WARNING", message)] if takes_long else [])


@each_triton
@ROTARY
def test_warmup_compiles_what_decode_runs(case: Case, rotary: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same compile-time constants, for both of two unequal layers: nothing is left to compile later."""
    compiled: list[object] = []

    def constants(*arguments: Any) -> Any:
        made = decode_constants(*arguments)
        compiled.append(made)
        return made

    decode_constants = launch.decode_constants
    monkeypatch.setattr(launch, "decode_constants", constants)
    pair = Pair(mixed(1, 3, num_layers=3), case, group=2, max_prompt=5, steps=9)
    pair.cache.warmup(rotary)
    warmed = compiled.copy()
    compiled.clear()
    q, k = pair.draw(2, 2, 40), pair.draw(2, 1, 40)
    tables = pair.draw(14, 20), pair.draw(14, 20)
    for layer in range(3):
        pair.cache.decode(layer, q, k, k, rotary=tables if rotary else None)
    assert len(compiled) == 3 and all(made in warmed for made in compiled)


def test_compiled_kernels_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton keeps a kernel on disk; the same layer finds it there, another storage type does not."""
    knobs = pytest.importorskip("triton").knobs
    from ssd_kernels.triton.compiled import compile_decode

    found: list[bool] = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(knobs.compilation, "listener", lambda *, cache_hit, **_: found.append(cache_hit))
    for dtype in ("fp16", "fp16", "bf16"):
        compile_decode(90, dtype, head_dim=32, largest=64)
    assert found == [False, True, False]
