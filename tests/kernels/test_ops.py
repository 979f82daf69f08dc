"""`torch.ops.ssd_kernels.*`: opcheck, fakes, torch.compile without graph breaks, and refusal of what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend

from ssd_kernels import CompressedCache, ops
from ssd_kernels.layout import LayerLayout

from .cases import (
    BF16,
    F32,
    Case,
    each_backend,
    each_compiled,
    each_format,
    each_on_the_host,
    each_without_table,
    mixed,
)
from .pair import assert_untouched, bits, on_device, snapshot
from .test_memory import Guarded

B, H, HQ, D, P, N = 2, 4, 8, 40, 5, 12
OPS = torch.ops.ssd_kernels
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def _cache(case: Case, dtype: torch.dtype = F32, layers: int = 1) -> CompressedCache:
    return CompressedCache(case.stored(mixed(H, 3, num_layers=layers)), batch_size=B, num_query_heads=HQ, head_dim=D,
                           max_prompt=P, num_visual_tokens=N, dtype=dtype, device=case.device, backend=case.name)


def _started(case: Case, dtype: torch.dtype = F32, layers: int = 1) -> CompressedCache:
    cache = _cache(case, dtype, layers)
    random = torch.Generator().manual_seed(0)
    for layer in range(layers):
        k, v = torch.randn(2, B, H, P, D, generator=random).to(case.device, dtype)
        cache.prefill(layer, k, v, [5, 2])
    return cache


def _inputs(case: Case, dtype: torch.dtype = F32, seed: int = 1) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, heads, D, generator=random).to(case.device, dtype) for heads in (HQ, H, H))


def _decode_arguments(cache: CompressedCache, case: Case, dtype: torch.dtype = F32) -> list[Any]:
    state = cache._layers[0]
    return [*_inputs(case, dtype), *state.tensors, *ops.layout_arguments(state.layout), D**-0.5, case.name]


def _prefill_arguments(cache: CompressedCache, scores: torch.Tensor | None) -> list[Any]:
    state = cache._layers[0]
    k, v = torch.randn(2, 1, H, P, D, device=cache.device)
    return [k, v, torch.tensor([4]), scores, torch.tensor([1]), *state.tensors, *ops.layout_arguments(state.layout),
            cache.backend]


@each_format
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_opcheck_decode(case: Case, dtype: torch.dtype) -> None:
    """"registered with fakes and mutation annotations (`torch.library.opcheck` passes)"."""
    cache = _started(case, dtype)
    result = torch.library.opcheck(OPS.decode.default, _decode_arguments(cache, case, dtype),
                                   ops.scale_arguments(cache._layers[0]))
    assert result == dict.fromkeys(OPCHECKS, "SUCCESS")


@each_format
@pytest.mark.parametrize("scored", [False, True], ids=["no-scores", "scores"])
def test_opcheck_prefill(case: Case, scored: bool) -> None:
    """The same for prefill, with and without given scores."""
    scores = torch.rand(1, H, P, device=case.device) if scored else None
    cache = _started(case)
    result = torch.library.opcheck(OPS.prefill.default, _prefill_arguments(cache, scores),
                                   ops.scale_arguments(cache._layers[0]))
    assert result == dict.fromkeys(OPCHECKS, "SUCCESS")


@each_format
def test_operators_compute_what_the_cache_does(case: Case) -> None:
    """The dispatcher and the short path give the same bits and the same cache."""
    direct, dispatched = _started(case), _started(case)
    for seed in range(N):
        expected = direct.decode(0, *_inputs(case, seed=seed))
        state = dispatched._layers[0]
        out = OPS.decode(*_inputs(case, seed=seed), *state.tensors, *ops.layout_arguments(state.layout), D**-0.5,
                         case.name, **ops.scale_arguments(state))
        assert torch.equal(out, expected) and out.is_contiguous()
    for one, other in zip(snapshot(direct), snapshot(dispatched), strict=True):
        assert torch.equal(one, other)


@each_backend
def test_prefill_operator(case: Case) -> None:
    """`torch.ops.ssd_kernels.prefill` restarts the rows it is given."""
    cache = _started(case)
    arguments = _prefill_arguments(cache, None)
    OPS.prefill(*arguments)
    assert [kept.tolist() for kept in cache.positions(0, 2)] == [[0, 1, 2, 3, 4], [0, 1, 2, 3]]
    span = cache._layers[0].layout.heads[2]
    assert torch.equal(cache._layers[0].keys[1, span.offset:span.offset + 4], arguments[0][0, 2, :4])


@each_format
@pytest.mark.parametrize("engine", ["aot_eager", "inductor"])
def test_compiled_decode_equals_eager(case: Case, engine: str) -> None:
    """"`torch.compile(fullgraph=True)` ... work[s]", in-place cache update included, compiled once."""
    torch._dynamo.reset()
    eager, compiled = _started(case, layers=2), _started(case, layers=2)
    counter = CompileCounterWithBackend(engine)

    def step(cache: CompressedCache, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        first = cache.decode(0, q * 2, k, v)
        return cache.decode(1, first, k + 1, v, scale=0.2) - 1

    fast = torch.compile(step, backend=counter, fullgraph=True)
    for seed in range(N):
        inputs = _inputs(case, seed=seed)
        torch.testing.assert_close(fast(compiled, *inputs), step(eager, *inputs), rtol=1e-5, atol=1e-6)
        for one, other in zip(eager._layers, compiled._layers, strict=True):
            assert torch.equal(one.cursors, other.cursors) and torch.equal(one.positions, other.positions)
            for slab, twin in zip(one.slabs, other.slabs, strict=True):
                assert torch.equal(bits(slab), bits(twin))
    assert counter.frame_count == 1, "decoding recompiled"


@each_backend
def test_fakes_tell_shape_dtype_and_strides(case: Case) -> None:
    """Fakes: decode's result is contiguous `[B, Hq, D]` in q's dtype, also for strided q; nothing is written."""
    cache = _started(case, BF16)
    before = snapshot(cache)
    mode = torch._subclasses.FakeTensorMode()
    arguments = [mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
                 for value in _decode_arguments(cache, case, BF16)]
    with mode:
        arguments[0] = torch.empty(HQ, B, D, dtype=BF16, device=case.device).transpose(0, 1)
        out = OPS.decode(*arguments)
    assert out.shape == (B, HQ, D) and out.dtype == BF16 and out.is_contiguous() and out.device == cache.device
    assert_untouched(cache, before)


def test_schemas_name_what_is_changed() -> None:
    """Mutation annotations: keys, values, scores, positions, cursors and scales change, nothing else does."""
    for op in (OPS.decode.default, OPS.prefill.default):
        written = [argument.name for argument in op._schema.arguments
                   if argument.alias_info and argument.alias_info.is_write]
        assert written == ["keys", "values", "scores", "positions", "cursors", "key_scales", "value_scales"]


BAD_ARGUMENTS: dict[str, tuple[int, Any, str]] = {
    "q-heads": (0, torch.ones(B, HQ + 1, D), "q "),
    "q-dtype": (0, torch.ones(B, HQ, D).half(), "q "),
    "k-batch": (1, torch.ones(B + 1, H, D), "k "),
    "v-stride": (2, torch.ones(B, D, H).mT, "v "),
    "keys-2d": (3, torch.ones(B, 7), "keys|table"),
    "keys-1d": (3, torch.ones(B), "keys"),
    "values-shape": (4, torch.ones(B, 7, D), "values"),
    "scores-dtype": (5, torch.ones(B, 14).double(), "scores|table"),
    "scores-none": (5, torch.ones(B, 0), "scores|table|positions"),
    "scores-1d": (5, torch.ones(B), "scores"),
    "positions-dtype": (6, torch.ones(B, 14), "positions"),
    "cursors-shape": (7, torch.ones(B, 3, dtype=torch.int32), "cursors"),
    "cursors-batch": (7, torch.ones(B + 1, 2, dtype=torch.int32), "cursors"),
    "table-dtype": (8, torch.ones(H, 8), "table"),
    "table-columns": (8, torch.ones(H, 7, dtype=torch.int32), "table"),
    "table-strided": (8, lambda table: torch.stack([table, table], -1)[..., 0], "table"),
    "keys-strided": (3, lambda keys: keys.transpose(1, 2).contiguous().transpose(1, 2), "keys"),
    "keys-dtype": (3, lambda keys: keys.double(), "values"),
    "pinned-heads": (9, torch.zeros(H - 1, 1, dtype=torch.int32), "pinned"),
    "pinned-words": (9, torch.zeros(H, 0, dtype=torch.int32), "pinned"),
    "pinned-dtype": (9, torch.zeros(H, 1, dtype=torch.int64), "pinned"),
    "pinned-strided": (9, lambda pinned: torch.stack([pinned, pinned], -1)[..., 0], "pinned"),
    "num_visual_tokens-huge": (11, 10**6, "table|num_visual_tokens|pinned"),
    "row_buffer-negative": (12, -1, "row_buffer"),
    "largest-negative": (14, -1, "largest"),
    "longest-negative": (15, -1, "longest"),
    "backend": (17, "fast", "backend"),
}


def _filled(columns: slice, value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def fill(table: torch.Tensor) -> torch.Tensor:
        table = table.clone()
        table[:, columns] = value
        return table
    return fill


# What only the table shows: to the host where it lies on the CPU, else to the kernel. And whether no head at all can be
# served then.
BAD_TABLES: dict[str, tuple[int, Any, bool]] = {
    "table-huge": (8, _filled(slice(7), 2**30), True),
    "table-negative": (8, _filled(slice(7), -1), True),
    "table-junk": (8, _filled(slice(8), 2**30), False),  # the order of heads too: some are not looked at
    "table-rule": (8, _filled(slice(5, 6), 4), False),
    "table-offset": (8, _filled(slice(1, 2), 60), True),
    "max_prompt-huge": (10, 10**6, True),
    "row_buffer-huge": (12, 10**6, False),
    "largest-small": (14, 0, False),
    "longest-small": (15, 3, False),
}


def _changed_arguments(cache: CompressedCache, case: Case, place: int, value: Any) -> list[Any]:
    arguments = _decode_arguments(cache, case)
    value = value(arguments[place]) if callable(value) else value
    arguments[place] = on_device(value, case.device) if isinstance(value, torch.Tensor) else value
    return arguments


def _assert_refused(case: Case, place: int, value: Any, message: str) -> None:
    cache = _started(case)
    arguments = _changed_arguments(cache, case, place, value)
    before = snapshot(cache)
    with pytest.raises(ValueError, match=message):
        OPS.decode(*arguments)
    assert_untouched(cache, before)


@each_backend
@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_operators_refuse_what_does_not_fit(case: Case, name: str) -> None:
    """"No input may read or write outside the slab", and none does when the operator is called by hand."""
    _assert_refused(case, *BAD_ARGUMENTS[name])


@each_on_the_host
@pytest.mark.parametrize("name", BAD_TABLES)
def test_operators_refuse_bad_tables(case: Case, name: str) -> None:
    """The same for what only the table shows, which the host does not read on a device."""
    _assert_refused(case, *BAD_TABLES[name][:2], "table")


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators do not read the table on the CPU either, as on a GPU, where that would wait for the device."""
    read = LayerLayout.from_table
    monkeypatch.setattr(LayerLayout, "from_table", lambda *given, **named: read(*given, **{**named, "read": False}))


@each_without_table
@pytest.mark.parametrize("name", BAD_ARGUMENTS)
@pytest.mark.usefixtures("unread")
def test_operators_that_read_no_table_refuse_the_rest(case: Case, name: str) -> None:
    """All that can be known without the table's values is refused before anything is launched."""
    _assert_refused(case, *BAD_ARGUMENTS[name])


@each_without_table
@pytest.mark.parametrize("name", BAD_TABLES)
@pytest.mark.usefixtures("unread")
@pytest.mark.races_expected  # where blocks are told the same head
def test_kernels_survive_bad_tables(case: Case, name: str) -> None:
    """Nothing outside the tensors is written; heads that cannot be right stay as they are, their output is 0."""
    place, value, nothing_fits = BAD_TABLES[name]
    cache = _started(case)
    guarded = Guarded(cache)
    arguments = _changed_arguments(cache, case, place, value)
    before = snapshot(cache)
    out = OPS.decode(*arguments)
    guarded.check()
    if nothing_fits:
        assert not out.any()
        for old, new in zip(before[:4], snapshot(cache)[:4], strict=True):  # all but the cursors
            assert torch.equal(old, new)


@each_compiled
@pytest.mark.parametrize(("head_dim", "dtype", "message"), [(12, F32, "head_dim.*12"), (2048, F32, "head_dim.*2048"),
                                                            (40, torch.float64, "dtype.*float64")])
def test_operators_ask_the_backend(case: Case, head_dim: int, dtype: torch.dtype, message: str) -> None:
    """What the constructor of the cache would refuse, the operators refuse: sizes beyond the kernels' buffers."""
    cache = CompressedCache(mixed(H, 3), B, H, head_dim, P, N, dtype, case.device, "reference")
    state, x = cache._layers[0], torch.ones(B, H, head_dim, dtype=dtype, device=case.device)
    tables = torch.ones(P + N, head_dim // 2, device=case.device)
    layer, prompt = (*state.tensors, *ops.layout_arguments(state.layout)), torch.stack([x, x], 2)
    ones, before = torch.ones(B, dtype=torch.int64), snapshot(cache)
    with pytest.raises(ValueError, match=f"backend='{case.name}' cannot be used.*{message}"):
        OPS.decode(x, x, x, *layer, 1.0, case.name, tables, tables)
    with pytest.raises(ValueError, match=f"backend='{case.name}' cannot be used.*{message}"):
        OPS.prefill(prompt, prompt, ones, None, torch.arange(B), *layer, case.name)
    assert_untouched(cache, before)


def test_operators_ask_the_backend_for_its_device() -> None:
    """Triton's kernels never get tensors of the CPU."""
    case = Case("reference")
    arguments = _decode_arguments(_started(case), case)
    with pytest.raises(ValueError, match="backend='triton' cannot be used: it needs device cuda, got cpu"):
        OPS.decode(*arguments[:-1], "triton")


BAD_PREFILLS: dict[str, tuple[int, Any, str]] = {
    "k-heads": (0, torch.ones(1, H + 1, P, D), "k "),
    "k-dims": (0, torch.ones(H, P, D), "k "),
    "k-dtype": (0, torch.ones(1, H, P, D).half(), "k "),
    "v-shape": (1, torch.ones(1, H, P - 1, D), "v "),
    "v-dtype": (1, torch.ones(1, H, P, D).bfloat16(), "v "),
    "prompt_lens-above-P": (2, torch.tensor([P + 1]), "prompt_lens"),
    "prompt_lens-negative": (2, torch.tensor([-1]), "prompt_lens"),
    "prompt_lens-count": (2, torch.tensor([1, 2]), "prompt_lens"),
    "prompt_scores-shape": (3, torch.ones(1, H, P - 1), "prompt_scores"),
    "prompt_scores-dtype": (3, torch.ones(1, H, P).half(), "prompt_scores"),
    "prompt_lens-float": (2, torch.tensor([1.5]), "prompt_lens must hold integers.*float32"),
    "prompt_lens-2d": (2, torch.tensor([[1]]), "prompt_lens must be 1-D"),
    "rows-float": (4, torch.tensor([0.5]), "rows must hold integers.*float32"),
    "rows-bool": (4, torch.tensor([True]), "rows must hold integers.*bool"),
    "rows-2d": (4, torch.tensor([[1]]), "rows must be 1-D"),
    "rows-high": (4, torch.tensor([B]), "rows"),
    "rows-negative": (4, torch.tensor([-1]), "rows"),
    "backend": (-1, "fast", "backend"),
}


@each_backend
@pytest.mark.parametrize("name", BAD_PREFILLS)
def test_prefill_operator_refuses_what_does_not_fit(case: Case, name: str) -> None:
    """The same for prefill: what the compiled code would read past the end of never reaches it."""
    place, value, message = BAD_PREFILLS[name]
    cache = _started(case)
    arguments = _prefill_arguments(cache, None)
    arguments[place] = value.to(case.device) if isinstance(value, torch.Tensor) and place < 2 else value
    before = snapshot(cache)
    with pytest.raises(TypeError if "must hold integers" in message else ValueError, match=message):
        OPS.prefill(*arguments)
    assert_untouched(cache, before)
