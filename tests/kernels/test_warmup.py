"""`CompressedCache.warmup` compiles and leaves everything as it is."""

from __future__ import annotations

import pytest

from .cases import Case, each_backend, mixed
from .pair import Pair, assert_untouched, snapshot


@each_backend
@pytest.mark.parametrize("rotary", [False, True], ids=["rotated", "rotary"])
def test_warmup_changes_nothing(case: Case, rotary: bool) -> None:
    pair = Pair(mixed(4, 3, num_layers=2), case, batch=2, max_prompt=5, steps=9)
    pair.prefill([5, 2])
    pair.run(2)
    before = snapshot(pair.cache)
    assert pair.cache.warmup(rotary) >= 0
    assert_untouched(pair.cache, before)
    pair.run(2)
