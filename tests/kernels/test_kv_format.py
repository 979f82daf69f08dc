"""docs/specification.md, section 3.13: what 8-bit caches hold, bit by bit, on every backend; and what they refuse.

Steps, evictions, prompts and scores in this format are compared by the contract tests, beside those of the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from ssd_kernels import CachePlan, CompressedCache, HeadSpec, backends, kv_format, ops, reference

from .cases import BF16, F16, F32, F64, Case, each_in_int8, mixed, uniform
from .oracle import quantised
from .pair import Pair, assert_untouched, bits, poison, snapshot

B, H = 4, 8
SMALLEST = torch.finfo(F32).smallest_normal
INT8 = Case("reference", kv_format="int8")


def hard_vectors(dtype: torch.dtype, head_dim: int) -> torch.Tensor:
    """Vectors ``[N, D]`` whose 8 bits are easily got wrong; N is a multiple of ``B * H``."""
    random = torch.Generator().manual_seed(head_dim)
    info, threshold = torch.finfo(dtype), 127 * SMALLEST
    ramp = torch.linspace(-1, 1, head_dim, dtype=F64)
    found = [ramp * 0, ramp * -0.0]
    # One element among others that are smaller by far, and the largest of all last.
    for large, small in ((info.max, 1.0), (info.max, info.max / 200), (1.0, info.smallest_normal), (300.0, 1e-3)):
        found += [ramp * small, -ramp.abs() * large, (ramp > 0) * 2 * large - large]
        found[-3][head_dim // 3], found[-3][-1] = -large, small
    # Subnormals of the dtype, and scales that are hardly normal, or hardly not, beside elements that are not.
    for amax in (info.smallest_normal / 2, info.smallest_normal, threshold, threshold * (1 - info.eps / 2),
                 threshold * (1 - info.eps), threshold * (1 + info.eps), 2 * threshold, 3 * threshold):
        found += [ramp * amax, ramp.sign() * amax, ramp * SMALLEST]
        found[-1][1] = amax
    # The largest element in every place that a reduction may forget.
    found += [torch.where(torch.arange(head_dim) == place, -3.0, ramp) for place in range(head_dim)]
    # Quotients halfway between two integers, by rights: which way they fall depends on each rounding before.
    odd = 2 * torch.randint(-127, 127, (48, head_dim), generator=random).double() + 1
    odd[:, 0] = 254
    factors = torch.randint(1, max(2, round(0.5 / info.eps / 254)), (48, 1), generator=random).double()
    found += list(odd * torch.where(torch.arange(48)[:, None] < 8, 1, factors) * 2.0**-9)
    found += list(torch.randn(16, head_dim, generator=random).double())
    found += list(torch.randn(16, head_dim, generator=random).double() * 10 ** (torch.rand(16, head_dim) * 8 - 4))
    vectors = torch.stack(found).clamp(-info.max, info.max).to(dtype)
    return torch.cat([vectors, vectors[:-len(vectors) % (B * H)]]) if len(vectors) % (B * H) else vectors


def _cache(case: Case, head_dim: int, dtype: torch.dtype, steps: int, max_prompt: int = 0, **more: Any
           ) -> CompressedCache:
    cache = CompressedCache(case.stored(uniform(HeadSpec.full(), H)), B, H, head_dim, max_prompt, steps, dtype,
                            case.device, case.name, **more)
    poison(cache)
    return cache


def _assert_holds(slabs: tuple[torch.Tensor, ...], k: torch.Tensor, v: torch.Tensor) -> None:
    """``slabs``: keys, values and their scales ``[..., n, ...]``, as the oracle quantises k and v ``[..., n, D]``."""
    for given, data, scales in ((k, *slabs[::2]), (v, *slabs[1::2])):
        wanted_data, wanted_scales = quantised(given)
        wrong = (data.cpu() != wanted_data).any(-1) | (bits(scales.cpu()) != bits(wanted_scales))
        assert not wrong.any(), (f"{given[wrong][0].tolist()}: {data.cpu()[wrong][0].tolist()} times "
                                 f"{scales.cpu()[wrong][0]}")


TYPES = pytest.mark.parametrize(("dtype", "head_dim"), [(F32, 40), (BF16, 128), (F16, 72), (F32, 256), (BF16, 104)],
                                ids=["f32-D40", "bf16-D128", "f16-D72", "f32-D256", "bf16-D104"])


@each_in_int8
@TYPES
def test_steps_store_the_same_bits_everywhere(case: Case, dtype: torch.dtype, head_dim: int) -> None:
    """"contents are bit-equal on every backend": of each step's new token, keys and values."""
    k = hard_vectors(dtype, head_dim).view(-1, B, H, head_dim)
    v = k.flip(0, 1, 2)
    cache = _cache(case, head_dim, dtype, len(k))
    for step in range(len(k)):
        cache.decode(0, *(x.to(case.device) for x in (torch.zeros_like(k[step]), k[step], v[step])))
    slabs = tuple(slab.unflatten(1, (H, len(k))) for slab in cache._layers[0].slabs)
    _assert_holds(slabs, k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3))


@each_in_int8
@TYPES
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_prompts_store_the_same_bits_everywhere(case: Case, dtype: torch.dtype, head_dim: int, shared: bool) -> None:
    """The same of prompts, rows' own and shared ones."""
    k = hard_vectors(dtype, head_dim).view(B, H, -1, head_dim)
    v, length = k.flip(0, 1, 2), k.shape[2]
    cache = _cache(case, head_dim, dtype, 1, length, **({"shared_prompts": B} if shared else {}))
    cache.prefill(0, k.to(case.device), v.to(case.device), [length] * B)
    state = cache._layers[0]
    slabs = tuple(slab.unflatten(1, (H, -1))[:, :, :length]
                  for slab in (state.prompt_slabs if shared else state.slabs))
    _assert_holds(slabs, k, v)


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=["f32", "bf16", "f16", "f64"])
@pytest.mark.parametrize("head_dim", [40, 128], ids="D{}".format)
def test_quantise_and_dequantise(dtype: torch.dtype, head_dim: int) -> None:
    """The package's own twin: the oracle's bits, and half a scale off at most."""
    vectors = hard_vectors(F32 if dtype == F64 else dtype, head_dim).to(dtype)
    data, scales = kv_format.quantise(vectors)
    wanted_data, wanted_scales = quantised(vectors)
    assert torch.equal(data, wanted_data) and torch.equal(bits(scales), bits(wanted_scales))
    assert data.dtype == torch.int8 and scales.dtype == F32 and (data > -128).all()
    back = kv_format.dequantise(data, scales, F64)
    off = (back - vectors.double()).abs().amax(-1)
    assert (off <= 0.5001 * scales.double() + 127 * SMALLEST * (scales == 0)).all()
    assert kv_format.dequantise(data, scales).dtype == F32
    for one, other in ((kv_format.encoded("int8", vectors, -vectors), "int8"),
                       (kv_format.encoded("auto", vectors, -vectors), "auto")):
        decoded = kv_format.decoded(one, F64)
        assert torch.equal(decoded[0], back if other == "int8" else vectors.double())
        assert torch.equal(decoded[1], -decoded[0])


JUNK = pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "-inf"])


@each_in_int8
@JUNK
@pytest.mark.parametrize("name", ["k", "v"])
def test_junk_cannot_hide(case: Case, junk: float, name: str) -> None:
    """"non-finite input is refused by the reference and gives NaN scale on compiled backends": nothing else suffers."""
    clean, dirty = (Pair(mixed(H, 3), case, batch=2, max_prompt=3, steps=10) for _ in range(2))
    for pair in (clean, dirty):
        pair.prefill([3, 1])
    random = torch.Generator().manual_seed(1)
    for step in range(5):
        inputs = {key: torch.randn(2, H, 40, generator=random) for key in "qkv"}
        expected = clean.step(**inputs)[0]
        if step == 2:
            inputs[name][1, 2, 7] = junk
        given = [inputs[key].to(case.device) for key in "qkv"]
        if step == 2 and not case.compiled:
            before = snapshot(dirty.cache)
            with pytest.raises(ValueError, match=f"{name} must be finite with kv_format='int8', got {junk}"):
                dirty.cache.decode(0, *given)
            assert_untouched(dirty.cache, before)
            return
        out = dirty.cache.decode(0, *given).cpu()
        for row, head in ((row, head) for row in range(2) for head in range(H)):
            if (row, head) != (1, 2):
                assert torch.equal(out[row, head], expected[row, head])
    assert out[1, 2].isnan().all()
    state = dirty.cache._layers[0]
    slot = state.layout.heads[2].offset + 1 + 2  # a full head, after one prompt token
    data, scales = (state.slabs[place + (name == "v")] for place in (0, 2))
    assert scales[1, slot].isnan() and not data[1, slot].any()


@each_in_int8
@JUNK
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_junk_in_prompts(case: Case, junk: float, shared: bool) -> None:
    """The same of prompts; beyond a prompt's length anything may stand."""
    cache = _cache(case, 40, F32, 2, 3, **({"shared_prompts": B} if shared else {}))
    k, v = torch.randn(2, B, H, 3, 40)
    k[1, 2, 1:, 7] = junk
    k, v = k.to(case.device), v.to(case.device)
    for scales in cache._layers[0].scales:
        scales.zero_()
    cache.prefill(0, k, v, [3, 1, 3, 3])
    assert not any(scales.isnan().any() for scales in cache._layers[0].scales)
    before = snapshot(cache)
    if not case.compiled:
        with pytest.raises(ValueError, match=f"k must be finite with kv_format='int8', got {junk}"):
            cache.prefill(0, k, v, [3, 2, 3, 3])
        assert_untouched(cache, before)
        return
    cache.prefill(0, k, v, [3, 2, 3, 3])
    state = cache._layers[0]
    data, _, scales, _ = state.prompt_slabs if shared else state.slabs
    at = state.prompt_of[1] if state.prompt_of is not None else 1, 2 * data.shape[1] // H + 1
    assert scales[at].isnan() and not data[at].any()


@each_in_int8
def test_one_token_is_read_as_it_is_stored(case: Case) -> None:
    """"attends to what is stored, the new token included": alone, its output is its own dequantised value."""
    v = torch.randn(B, H, 40, generator=torch.Generator().manual_seed(2))
    out = _cache(case, 40, F32, 1).decode(0, *(x.to(case.device) for x in (v, v, v)))
    data, scales = quantised(v)
    torch.testing.assert_close(out.cpu(), data * scales[..., None], rtol=5e-7, atol=0)


@each_in_int8
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("ratio", [64.0, 512.0], ids="x{:.0f}".format)
def test_queries_that_stick_out_where_keys_are_nothing(case: Case, dtype: torch.dtype, ratio: float) -> None:
    """What a query's other elements give is as exact as without its largest."""
    pair = Pair(uniform(HeadSpec.full(), 2), case, batch=1, group=2, steps=6, dtype=dtype)
    for _ in range(6):
        q, k = pair.draw(1, 4, 40), pair.draw(1, 2, 40)
        q[..., 3], k[..., 3] = ratio * q[..., 3], k[..., 3] / ratio
        pair.step(q, k)


def test_float64_caches() -> None:
    """On the reference backend, which computes in float64 from the same contents."""
    pair = Pair(mixed(H, 3), INT8, dtype=F64, group=2)
    pair.prefill([5, 2])
    pair.run(12)


def test_unsupported_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend without the format is refused by name and passed over by "auto"."""
    cpu = backends.get("cpu")
    monkeypatch.setattr(type(cpu), "kv_formats", ("auto",))
    monkeypatch.setattr(backends, "_warn_slow", lambda reasons: None)
    plan = INT8.stored(mixed(H))
    with pytest.raises(ValueError, match="backend='cpu' cannot be used: kv_format='int8' is not supported by backend"):
        CompressedCache(plan, B, H, 40, 3, backend="cpu")
    assert CompressedCache(plan, B, H, 40, 3).backend == "reference"


def _scales_given(**changes: Callable[[torch.Tensor], Any]) -> Callable[[CompressedCache], None]:
    def call(cache: CompressedCache) -> None:
        state = cache._layers[0]
        given = {name: changes.get(name, lambda x: x)(tensor) for name, tensor in ops.scale_arguments(state).items()}
        torch.ops.ssd_kernels.decode(*[torch.ones(B, H, 40)] * 3, *state.tensors, *ops.layout_arguments(state.layout),
                                     1.0, "reference", None, None, *ops.shared_arguments(state), **given)
    return call


BAD_SCALES: dict[str, tuple[Callable[[CompressedCache], None], str]] = {
    "none": (_scales_given(key_scales=lambda x: None), "key_scales must be given with keys of torch.int8, got None"),
    "values-none": (_scales_given(value_scales=lambda x: None), "value_scales must be given"),
    "prompt-none": (_scales_given(prompt_key_scales=lambda x: None), "prompt_key_scales must be given"),
    "short": (_scales_given(key_scales=lambda x: x[:, 1:].contiguous()), "key_scales must be contiguous"),
    "dtype": (_scales_given(value_scales=lambda x: x.half()), "value_scales must be contiguous .* of torch.float32"),
    "strided": (_scales_given(key_scales=lambda x: x.T.contiguous().T), "key_scales must be contiguous"),
    "prompt-rows": (_scales_given(prompt_value_scales=lambda x: x[:1]), "prompt_value_scales must be contiguous"),
}


@pytest.mark.parametrize("name", BAD_SCALES)
def test_operators_refuse_scales_that_do_not_fit(name: str) -> None:
    call, message = BAD_SCALES[name]
    cache = _cache(INT8, 40, F32, 4, 3, shared_prompts=2)
    cache.prefill(0, *torch.ones(2, 1, H, 3, 40), [3], share=[0] * B)
    before = snapshot(cache)
    with pytest.raises(ValueError, match=message):
        call(cache)
    assert_untouched(cache, before)


def test_scales_of_slabs_that_have_none() -> None:
    cache = _cache(Case("reference"), 40, F32, 4)
    state = cache._layers[0]
    with pytest.raises(ValueError, match="key_scales must be None with keys of torch.float32, got"):
        torch.ops.ssd_kernels.decode(*[torch.ones(B, H, 40)] * 3, *state.tensors, *ops.layout_arguments(state.layout),
                                     1.0, "reference", key_scales=torch.ones(B, state.layout.slots))


def _planted(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A bug in the reference backend."""
    quantise, evict, stored = kv_format.quantise, reference.evict, reference.stored

    def rounding(how: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        def wrong(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            data, scales = quantise(x)
            bad = how(x.float(), x.float().abs().amax(-1, keepdim=True), scales[..., None])
            return torch.where(scales[..., None] > 0, bad.clamp(-127, 127), data).to(torch.int8), scales
        monkeypatch.setattr(kv_format, "quantise", wrong)

    def scaling(how: Callable[[torch.Tensor], torch.Tensor]) -> None:
        def wrong(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            data, scales = quantise(x)
            return data, torch.where(scales > 0, how(x.float().abs().amax(-1)), scales)
        monkeypatch.setattr(kv_format, "quantise", wrong)

    def evicting(state: Any, *arguments: Any) -> None:
        kept = state.key_scales.clone()
        evict(state, *arguments)
        state.key_scales.copy_(kept)

    def shifting(state: Any, row: int, head: int, view: Any, slots: Any) -> tuple[torch.Tensor, ...]:
        keys, values, key_scales, value_scales = stored(state, row, head, view, slots)
        return keys, values, key_scales, value_scales.roll(1)

    bugs: dict[str, Callable[[], None]] = {
        "half-up": lambda: rounding(lambda x, amax, scale: (x * (127 / amax.double()).float() + 0.5).floor()),
        "towards-zero": lambda: rounding(lambda x, amax, scale: (x * (127 / amax.double()).float()).trunc()),
        "product-first": lambda: rounding(lambda x, amax, scale: torch.div(x * 127, amax).round()),
        "by-the-scale": lambda: rounding(lambda x, amax, scale: torch.div(x, scale).round()),
        "in-float64": lambda: rounding(lambda x, amax, scale: (x.double() * (127 / amax.double())).round()),
        "reciprocal": lambda: scaling(lambda amax: amax * torch.tensor(1 / 127)),
        "denormal-scales": lambda: monkeypatch.setattr(kv_format, "SMALLEST_AMAX", SMALLEST),
        "eviction": lambda: monkeypatch.setattr(reference, "evict", evicting),
        "other-slot": lambda: monkeypatch.setattr(reference, "stored", shifting),
    }
    bugs[name]()


@pytest.mark.parametrize("bug", ["half-up", "towards-zero", "product-first", "by-the-scale", "in-float64", "reciprocal",
                                 "denormal-scales"])
def test_wrong_bits_are_noticed(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way of getting them wrong differs in the vectors above."""
    _planted(monkeypatch, bug)
    with pytest.raises(AssertionError):
        test_steps_store_the_same_bits_everywhere(INT8, F32, 40)


@pytest.mark.parametrize("bug", ["eviction", "other-slot"])
def test_scales_that_go_astray_are_noticed(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _planted(monkeypatch, bug)
    pair = Pair(mixed(H, 3), INT8)
    with pytest.raises(AssertionError):
        pair.run(12)


def test_a_new_token_that_is_not_read_as_stored_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attending to the key and value as they were given, and storing them in 8 bits."""
    decode = reference.decode

    def wrong(state: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *more: Any) -> torch.Tensor:
        stored = reference.stored

        def exact(state: Any, row: int, head: int, view: Any, slots: list[int]) -> tuple[torch.Tensor, ...]:
            keys, values = kv_format.decoded(stored(state, row, head, view, slots), F32)
            at = slots.index(view.next_slot)
            keys[at], values[at] = k[row, head], v[row, head]
            return keys, values

        with monkeypatch.context() as patch:
            patch.setattr(reference, "stored", exact)
            return decode(state, q, k, v, *more)

    monkeypatch.setattr(reference, "decode", wrong)
    pair = Pair(uniform(HeadSpec.full(), H), INT8)
    pair.prefill([5, 2])
    with pytest.raises(AssertionError, match="error"):
        pair.run(3)


def test_plans_say_it() -> None:
    """Plain data: equality, copies, files only where it is not "auto"."""
    plan = mixed(4, 3, num_layers=2)
    stored = replace(plan, kv_format="int8")
    assert (plan.kv_format, stored.kv_format) == ("auto", "int8") and plan != stored
    assert stored == CachePlan(plan.layers, 3, True, "int8") and hash(stored) != hash(plan)
    assert "kv_format" not in plan.to_dict() and stored.to_dict()["kv_format"] == "int8"
    assert CachePlan.from_dict(stored.to_dict()) == stored
    assert CachePlan.from_dict({**plan.to_dict(), "kv_format": "auto"}) == plan
    assert CachePlan.uniform(HeadSpec.full(), 2, 4, kv_format="int8").kv_format == "int8"
    for bad in ("int4", "INT8", "", None, 8, True):
        with pytest.raises(ValueError, match="kv_format must be one of 'auto', 'int8', got"):
            CachePlan(plan.layers, kv_format=bad)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="kv_format must be one of 'auto', 'int8', got"):
            CachePlan.from_dict({**plan.to_dict(), "kv_format": bad})


def test_bytes_by_hand() -> None:
    """"bfloat16 and int8 at D = 128: 0.516 of the token budget"; `nbytes` counts 2 * (D + 4) a slot."""
    plan = uniform(HeadSpec.window(115), 16, row_buffer=24)
    stored = replace(plan, kv_format="int8")
    assert plan.byte_budget(head_dim=128, dtype=BF16) == plan.budget() == pytest.approx(139 / 576)
    assert stored.byte_budget(head_dim=128, dtype=BF16) == pytest.approx(139 / 576 * 132 / 256)
    assert stored.byte_budget(head_dim=64, dtype=F32) == pytest.approx(139 / 576 * 68 / 256)
    assert stored.byte_budget(100, head_dim=64, dtype=BF16) == pytest.approx(1.0 * 68 / 128)
    sizes = {"batch_size": 3, "head_dim": 64, "max_prompt": 10, "dtype": BF16}
    slots, shared = 16 * (139 + 10) * 3, 16 * 10 * (2 - 3)
    assert plan.nbytes(**sizes) - stored.nbytes(**sizes) == slots * 2 * (2 * 64 - 68)
    assert (plan.nbytes(**sizes, shared_prompts=2) - stored.nbytes(**sizes, shared_prompts=2)
            == (slots + shared) * 2 * (2 * 64 - 68))
    for bad in (0, -1):
        with pytest.raises(ValueError, match="head_dim must be at least 1"):
            plan.byte_budget(head_dim=bad, dtype=BF16)
