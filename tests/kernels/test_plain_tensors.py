"""Tensors that are not plain memory: read as what they stand for, or refused by name before anything is written.

Kernels read addresses. A lazily negated view has the address of what it negates, a zero tensor has none, and a fake
tensor has one that holds nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ssd_kernels import CompressedCache, HeadSpec, ops
from ssd_kernels.arguments import plain
from ssd_kernels.layout import RECENT

from .cases import Case, each_on_the_host, mixed, uniform
from .pair import assert_untouched, snapshot

B, H, HQ, D, P, N = 2, 4, 8, 40, 3, 6
OPS = torch.ops.ssd_kernels


class Named(torch.Tensor):
    """Adds a name to tensors, as libraries of datapoints do."""


class Wrapped(torch.Tensor):
    """Holds a tensor and has no memory of its own."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapped:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("nothing may be computed with it")


def _inference(x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return x.clone()


def _unaligned(x: torch.Tensor) -> torch.Tensor:
    memory = bytearray(b"?" + x.contiguous().view(torch.uint8).numpy().tobytes())
    return torch.frombuffer(memory, dtype=x.dtype, offset=1).view(x.shape)


def _offset(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def _imaginary(x: torch.Tensor) -> torch.Tensor:
    return torch.complex(torch.ones_like(x), -x).conj().imag


def _freed(x: torch.Tensor) -> torch.Tensor:
    freed = x.clone()
    freed.untyped_storage().resize_(0)
    return freed


# How to make a tensor of this kind that stands for x.
RESOLVED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "negated": lambda x: torch._neg_view(-x), "parameter": lambda x: torch.nn.Parameter(x, x.is_floating_point()),
    "subclass": lambda x: x.as_subclass(Named), "inference": _inference, "offset": _offset, "unaligned": _unaligned,
    "negated-subclass": lambda x: torch._neg_view(-x).as_subclass(Named)}
FLOATING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "imaginary": _imaginary, "with-grad": lambda x: x.clone().requires_grad_(),
    "computed-with-grad": lambda x: x.clone().requires_grad_() * 1}
REFUSED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "fake": lambda x: FakeTensorMode().from_tensor(x), "meta": lambda x: x.to("meta"), "wrapped": Wrapped,
    "freed": _freed, "sparse": lambda x: x.to_sparse(), "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "jagged": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged)}
REFUSED_FLOATING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "csr": lambda x: x.to_sparse_csr(), "mkldnn": lambda x: x.to_mkldnn(),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "conjugated": lambda x: torch.complex(x, x).conj()}
# Where a tensor changes into another kind for a function's sake: run(function, x) calls function(x as that kind).
TRANSFORMS: dict[str, Callable[[Callable[[torch.Tensor], Any], torch.Tensor], Any]] = {
    "vmap": lambda f, x: torch.vmap(lambda t: (f(t), t)[1])(x[None]),
    "grad": lambda f, x: torch.func.grad(lambda t: (f(t), t.sum())[1])(x),
    "jvp": lambda f, x: torch.func.jvp(lambda t: (f(t), t)[1], (x,), (x,)),
    "functionalize": lambda f, x: torch.func.functionalize(lambda t: (f(t), t)[1])(x)}


def _cache(case: Case) -> CompressedCache:
    cache = CompressedCache(mixed(H, 2), batch_size=B, num_query_heads=HQ, head_dim=D, max_prompt=P,
                            num_visual_tokens=N, device=case.device, backend=case.name)
    random = torch.Generator().manual_seed(3)
    k, v = torch.randn(2, B, H, P, D, generator=random).to(case.device)
    cache.prefill(0, k, v, [3, 2])
    cache.decode(0, torch.ones(B, HQ, D, device=case.device), k[:, :, 0], v[:, :, 0])
    return cache


def _arguments(method: str) -> dict[str, Any]:
    """Good arguments of a method or operator."""
    random = torch.Generator().manual_seed(4)
    if "decode" in method:
        q, k, v = (torch.randn(B, heads, D, generator=random) for heads in (HQ, H, H))
        angles = torch.rand(P + N, D // 2, generator=random)
        cos, sin = angles.cos(), angles.sin()
        return {"q": q, "k": k, "v": v, "cos": cos, "sin": sin}
    if "prefill" in method:
        k, v = torch.randn(2, 1, H, P, D, generator=random)
        return {"k": k, "v": v, "prompt_lens": torch.tensor([2]), "scores": torch.rand(1, H, P, generator=random),
                "rows": torch.tensor([1])}
    return {"rows": torch.tensor([1])}


def _call(cache: CompressedCache, method: str, given: dict[str, Any]) -> Any:
    if method == "decode":
        return cache.decode(0, given["q"], given["k"], given["v"], rotary=(given["cos"], given["sin"]))
    if method == "prefill":
        return cache.prefill(0, **given)
    if method == "reset":
        return cache.reset(**given)
    state = cache._layers[0]
    rest = [*state.tensors, *ops.layout_arguments(state.layout)]
    if method == "ops.decode":
        return OPS.decode(given["q"], given["k"], given["v"], *rest, D**-0.5, cache.backend, given["cos"], given["sin"])
    return OPS.prefill(given["k"], given["v"], given["prompt_lens"], given["scores"], given["rows"], *rest,
                       cache.backend)


ARGUMENTS = [(method, name) for method in ("decode", "prefill", "reset", "ops.decode", "ops.prefill")
             for name in _arguments(method)]
each_argument = pytest.mark.parametrize(("method", "name"), ARGUMENTS, ids=[f"{m}-{n}" for m, n in ARGUMENTS])


def _outcome(case: Case, method: str, given: dict[str, Any]) -> tuple[Any, list[torch.Tensor]]:
    cache = _cache(case)
    result = _call(cache, method, given)
    return result, snapshot(cache)


def _assert_same(one: tuple[Any, list[torch.Tensor]], other: tuple[Any, list[torch.Tensor]]) -> None:
    if one[0] is not None:
        assert not other[0].is_neg()
        assert torch.equal(one[0], other[0]) and one[0].isfinite().all()
    for before, after in zip(one[1], other[1], strict=True):
        assert torch.equal(before, after)


@each_on_the_host
@each_argument
def test_tensors_stand_for_their_values(case: Case, method: str, name: str) -> None:
    """Every kind that has values gives what a plain tensor of these values gives, bit for bit."""
    given = _arguments(method)
    wanted = _outcome(case, method, given)
    floating = given[name].is_floating_point()
    for kind, make in {**RESOLVED, **(FLOATING if floating else {})}.items():
        odd = make(given[name])
        assert torch.equal(odd.detach().clone(), given[name]), kind
        found = _outcome(case, method, {**given, name: odd})
        _assert_same(wanted, found)
        if method == "decode":  # torch's dispatcher gives a subclass back, and marks what is computed from parameters
            assert type(found[0]) is torch.Tensor and not found[0].requires_grad


@each_on_the_host
@each_argument
@pytest.mark.parametrize("offset", [0, 2])
def test_zeros_without_memory(case: Case, method: str, name: str, offset: int) -> None:
    """They count as zeros, and so do parts of them, whose address is not 0.

    Operators get others from torch in their place, whose strides of 0 may be refused.
    """
    given = _arguments(method)
    zeros = torch.zeros_like(given[name])
    odd = torch._efficientzerotensor((3, *zeros.shape), dtype=zeros.dtype)[offset]
    if method.startswith("ops") and name in ("q", "k", "v", "cos", "sin"):
        cache, before = _cache(case), snapshot(_cache(case))
        try:
            _call(cache, method, {**given, name: odd})
        except ValueError as error:
            assert str(error).startswith(f"{name} must be")
            assert_untouched(cache, before)
            return
    _assert_same(_outcome(case, method, {**given, name: zeros}), _outcome(case, method, {**given, name: odd}))


@each_on_the_host
@pytest.mark.parametrize("method", ["decode", "prefill"])
def test_tensors_that_repeat_their_elements(case: Case, method: str) -> None:
    """Strides of 0 in all but the last dimension."""
    given = _arguments(method)
    for name in ("q", "k", "v") if method == "decode" else ("k", "v", "scores"):
        short = given[name][:1, :1]
        odd = short.expand(given[name].shape)
        assert 0 in odd.stride()
        _assert_same(_outcome(case, method, {**given, name: odd.clone(memory_format=torch.contiguous_format)}),
                     _outcome(case, method, {**given, name: odd}))


Bits = list[torch.Tensor]


def _refused(cache: CompressedCache, method: str, name: str, given: dict[str, Any], before: Bits, after: Bits) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^{name} (must|of)"):
        _call(cache, method, given)
    assert_untouched(cache, before)


def _harmless(cache: CompressedCache, method: str, name: str, given: dict[str, Any], before: Bits, after: Bits) -> None:
    """Of an operator, torch's dispatcher may say something else, leave it at a fake result, or unwrap what it gets."""
    try:
        _call(cache, method, given)
    except (TypeError, ValueError, RuntimeError, AssertionError):
        after = before
    now = snapshot(cache)
    assert all(map(torch.equal, now, before)) or all(map(torch.equal, now, after))


def _without_values(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """All kinds that torch has of tensors like ``x``."""
    for kind, make in {**REFUSED, **(REFUSED_FLOATING if x.is_floating_point() else {})}.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some kinds are announced as new
            try:
                odd = make(x)
            except RuntimeError:
                assert kind in ("nested", "jagged", "csr") and x.dim() < 3
                continue
        yield odd


@each_on_the_host
@each_argument
def test_tensors_without_values_are_refused(case: Case, method: str, name: str) -> None:
    """Fake, meta, sparse, nested and other tensors: by name, and nothing is written."""
    given = _arguments(method)
    before, after = snapshot(_cache(case)), _outcome(case, method, given)[1]
    refused = _harmless if method.startswith("ops") else _refused
    for odd in _without_values(given[name]):
        refused(_cache(case), method, name, {**given, name: odd}, before, after)
    for kind, run in TRANSFORMS.items():
        if given[name].is_floating_point() or kind in ("vmap", "functionalize"):
            for part in given[name], torch.stack([given[name]] * 2)[1]:  # also one with an offset in its storage
                cache = _cache(case)
                run(lambda odd: refused(cache, method, name, {**given, name: odd}, before, after), part)  # noqa: B023


@each_on_the_host
def test_set_recent(case: Case) -> None:
    """Its tensor too."""
    wanted = torch.tensor([3, 2])
    for kind, make in RESOLVED.items():
        cache = CompressedCache(uniform(HeadSpec.heavy(4)), 1, 2, 32, 0, 8, device=case.device, backend=case.name)
        cache.set_recent(0, make(wanted))
        assert cache._layers[0].table[:, RECENT].tolist() == [3, 2], kind
        before = snapshot(cache)
        for odd in _without_values(wanted):
            with pytest.raises((TypeError, ValueError), match="^recent must"):
                cache.set_recent(0, odd)
        cache.set_recent(0, torch._efficientzerotensor((2, 2), dtype=torch.long)[1])
        assert cache._layers[0].table[:, RECENT].tolist() == [0, 0]
        cache.set_recent(0, wanted)
        assert_untouched(cache, before)


@each_on_the_host
def test_state_that_could_not_be_written(case: Case) -> None:
    """Of the operators' own tensors, copies would be written in vain: the owner of what was given would not see it."""
    given = _arguments("ops.decode")
    for index in range(7):
        for kind in ("unaligned", "wrapped", "nested"):
            cache = _cache(case)
            state = cache._layers[0]
            tensors = list(state.tensors)
            tensors[index] = {**RESOLVED, **REFUSED}[kind](tensors[index])
            before = snapshot(cache)
            with pytest.raises((TypeError, ValueError, AssertionError)):
                ops.decode(given["q"], given["k"], given["v"], *tensors, *ops.layout_arguments(state.layout), 1.0,
                           case.name)
            assert_untouched(cache, before)


@each_on_the_host
def test_compiled_calls(case: Case) -> None:
    """Lazily negated views that go into torch.compile, or are made there, keep their sign."""
    given = {name: value for name, value in _arguments("decode").items() if name in ("q", "k", "v")}
    plainly, outside, inside = _cache(case), _cache(case), _cache(case)
    wanted = plainly.decode(0, **given)
    compiled = torch.compile(lambda q, k, v: outside.decode(0, q, k, v), backend="aot_eager", fullgraph=True)
    assert torch.equal(wanted, compiled(*(torch._neg_view(-value) for value in given.values())))
    compiled = torch.compile(lambda q, k, v: inside.decode(0, *(torch._neg_view(-x) for x in (q, k, v))),
                             backend="aot_eager", fullgraph=True)
    assert torch.equal(wanted, compiled(*given.values()))
    for cache in (outside, inside):
        assert all(map(torch.equal, snapshot(plainly), snapshot(cache)))


def test_plain_tensors_stay_what_they_are() -> None:
    """No copy is made of what can be read as it is, and an empty tensor needs no memory."""
    whole = torch.randn(3, 4, 5)
    for tensor in (whole, whole[1:], whole.mT, whole[:, :1].expand(3, 4, 5), torch.empty(0, 4), whole[3:],
                   torch.empty(3, 0)[:, 0:]):
        assert plain("x", tensor) is tensor
    for other in (torch.nn.Parameter(whole), whole.as_subclass(Named)):
        assert plain("x", other).data_ptr() == whole.data_ptr() and type(plain("x", other)) is torch.Tensor
    for value in (None, [1.0], 3, "x"):
        with pytest.raises(TypeError, match="^x must be a tensor, got "):
            plain("x", value)
