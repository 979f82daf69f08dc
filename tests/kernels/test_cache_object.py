"""`CompressedCache` as a Python object: gradients, inference mode, copies, and sizes beyond what a table holds."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch

from ssd_kernels import CachePlan, CompressedCache, HeadSpec

from .cases import Case, each_backend, each_format, each_format_of, mixed, uniform
from .pair import assert_untouched, snapshot

B, H, D, P, N = 2, 4, 40, 3, 8


def _cache(case: Case, plan: CachePlan | None = None) -> CompressedCache:
    return CompressedCache(case.stored(plan or mixed(H)), B, H, D, P, N, device=case.device, backend=case.name)


def _step(cache: CompressedCache, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return cache.decode(0, *torch.randn(3, B, H, D, generator=random).to(cache.device))


@each_format
def test_results_carry_no_gradient(case: Case) -> None:
    """"Inference only", whatever is given: a cache that held on to graphs would fill the memory."""
    cache = _cache(case)
    given = torch.ones(B, H, P, D, device=case.device, requires_grad=True)
    cache.prefill(0, 2 * given, 3 * given, [P, 1])
    out = cache.decode(0, *(factor * given[:, :, 0] for factor in (2, 3, 4)))
    assert not out.requires_grad
    assert not any(tensor.requires_grad for tensor in cache._layers[0].everything)


@each_format
def test_a_cache_made_in_inference_mode_serves_outside_it(case: Case) -> None:
    with torch.inference_mode():
        cache = _cache(case)
        first = _step(cache)
    _step(cache, seed=1)
    cache.reset()
    assert torch.equal(_step(cache), first)


@each_format_of("cpu", "reference")
def test_copies_go_their_own_way(case: Case) -> None:
    """Copied between two steps; a copy's steps are written to the copy, and give what the original's give."""
    cache = _cache(case)
    _step(cache)
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        before = snapshot(cache)
        out = _step(other, seed=1)
        assert_untouched(cache, before)
        assert torch.equal(out, _step(copy.deepcopy(cache), seed=1))
        assert other.positions(0, 0)[0].tolist() == [0, 1]


@each_format
def test_a_layer_with_other_tensors_is_another(case: Case) -> None:
    """What a backend remembers of a layer's addresses does not go along."""
    cache = _cache(case)
    expected = _step(cache)
    cache.reset()
    other = copy.copy(cache)
    other._layers = [dataclasses.replace(state, **{field.name: value.clone() for field in dataclasses.fields(state)
                                                   if isinstance(value := getattr(state, field.name), torch.Tensor)})
                     for state in cache._layers]
    before = snapshot(cache)
    assert torch.equal(_step(other), expected)
    assert_untouched(cache, before)
    assert other.positions(0, 0)[0].tolist() == [0]


@each_backend
@pytest.mark.parametrize(("huge", "largest"), [
    (uniform(HeadSpec.window(4), H, row_buffer=2**31), uniform(HeadSpec.window(4), H, row_buffer=2**31 - 1)),
    (uniform(HeadSpec.heavy(2**40, recent=2**33), H), uniform(HeadSpec.heavy(N, recent=N), H))],
    ids=["row_buffer", "recent"])
def test_numbers_beyond_int32_are_the_largest(case: Case, huge: CachePlan, largest: CachePlan) -> None:
    """A plan may say more than the head table holds; nothing is evicted then."""
    one, other = _cache(case, huge), _cache(case, largest)
    for seed in range(N):
        assert torch.equal(_step(one, seed), _step(other, seed))
    assert one.positions(0, 0)[0].tolist() == list(range(N))


@pytest.mark.parametrize("scale", [1, True, 1.0, None])
def test_backends_get_the_scale_as_a_float(scale: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is compiled for the kinds of its arguments is compiled once."""
    cache = _cache(Case("reference"))
    kinds, decode = [], cache._backend.decode

    def watched(*arguments: object) -> object:
        kinds.append(type(arguments[4]))
        return decode(*arguments)

    monkeypatch.setattr(cache._backend, "decode", watched)
    cache.decode(0, *torch.randn(3, B, H, D), scale)
    assert kinds == [float]


@each_format
def test_finished_rows_wait_for_their_restart(case: Case) -> None:
    """Others go on where kernels leave finished rows alone; whoever restarts has what a fresh row has."""
    cache, twin = _cache(case), _cache(case)
    prompt = torch.randn(2, B, H, P, D, generator=torch.Generator().manual_seed(1)).to(case.device)
    for each in (cache, twin):
        each.prefill(0, *prompt, [P, 2])
        assert _step(each, 1) is not None
    cache.finish([1])
    if case.name in ("cpu", "reference"):
        before = snapshot(cache)
        with pytest.raises(ValueError, match=f"row 1 has taken {N} steps"):
            _step(cache, 2)
        assert_untouched(cache, before)
    else:
        kept = [tensor[1].clone() for tensor in (cache._layers[0].keys, cache._layers[0].scores)]
        for seed in range(2, 2 + N - 1):
            assert torch.equal(_step(cache, seed)[0], _step(twin, seed)[0])
        assert all(map(torch.equal, kept, (cache._layers[0].keys[1], cache._layers[0].scores[1])))
        with pytest.raises(ValueError, match="has taken all"):
            _step(cache)
    cache.prefill(0, *(tensor[1:] for tensor in prompt), [P], rows=[1])
    cache.prefill(0, *(tensor[:1] for tensor in prompt), [P], rows=[0])
    twin.prefill(0, *prompt, [P, P])
    for seed in range(N):
        assert torch.equal(_step(cache, seed), _step(twin, seed))
    for rows in ([2], [0, 0]):
        with pytest.raises(ValueError, match="rows must be"):
            cache.finish(rows)
