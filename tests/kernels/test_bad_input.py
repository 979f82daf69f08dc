"""docs/specification.md, section 3.11: an error that names the argument, before anything is written."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ssd_kernels import CachePlan, CompressedCache, HeadSpec, backends, state

from .cases import Case, each_backend, each_on_the_host, mixed
from .pair import assert_untouched, on_device, snapshot

B, H, HQ, D, P, N = 3, 4, 8, 40, 6, 10


def _t(*shape: int, **kwargs: Any) -> torch.Tensor:
    return torch.ones(shape, **kwargs)


def _decode(**changes: Any) -> Callable[[CompressedCache], object]:
    def call(cache: CompressedCache) -> object:
        good = {"layer": 0, "q": _t(B, HQ, D), "k": _t(B, H, D), "v": _t(B, H, D)}
        return cache.decode(**_moved(cache, {**good, **changes}))
    return call


def _prefill(**changes: Any) -> Callable[[CompressedCache], object]:
    def call(cache: CompressedCache) -> object:
        good = {"layer": 0, "k": _t(B, H, P, D), "v": _t(B, H, P, D), "prompt_lens": [1, 2, 3]}
        return cache.prefill(**_moved(cache, {**good, **changes}))
    return call


def _moved(cache: CompressedCache, arguments: dict[str, Any]) -> dict[str, Any]:
    """Tensors on the cache's device, except those meant to be elsewhere."""
    return {name: on_device(value, cache.device) if isinstance(value, torch.Tensor) and value.device.type == "cpu"
            else value for name, value in arguments.items()}


def _rows(rows: Any, count: int = 2) -> Callable[[CompressedCache], object]:
    return _prefill(k=_t(count, H, P, D), v=_t(count, H, P, D), prompt_lens=[1] * count, rows=rows)


Call = tuple[Callable[[CompressedCache], object], type[Exception], str]
BAD_CALLS: dict[str, Call] = {
    "decode-layer-high": (_decode(layer=2), ValueError, "layer.*0 .. 1.*2"),
    "decode-layer-negative": (_decode(layer=-1), ValueError, "layer.*-1"),
    "decode-layer-float": (_decode(layer=0.0), TypeError, "layer.*0.0"),
    "decode-layer-bool": (_decode(layer=True), TypeError, "layer.*True"),
    "decode-q-batch": (_decode(q=_t(B + 1, HQ, D)), ValueError, r"q .*\[3, 8, 40\].*\[4, 8, 40\]"),
    "decode-q-heads": (_decode(q=_t(B, H, D)), ValueError, "q .*shape"),
    "decode-q-dims": (_decode(q=_t(B, HQ, 1, D)), ValueError, "q .*shape"),
    "decode-k-heads": (_decode(k=_t(B, HQ, D)), ValueError, "k .*shape"),
    "decode-k-head_dim": (_decode(k=_t(B, H, D + 8)), ValueError, "k .*shape"),
    "decode-v-batch": (_decode(v=_t(1, H, D)), ValueError, "v .*shape"),
    "decode-q-dtype": (_decode(q=_t(B, HQ, D, dtype=torch.float16)), TypeError, "q .*float32.*float16"),
    "decode-k-dtype": (_decode(k=_t(B, H, D).double()), TypeError, "k .*float32.*float64"),
    "decode-v-dtype": (_decode(v=_t(B, H, D).int()), TypeError, "v .*float32.*int32"),
    "decode-q-device": (_decode(q=_t(B, HQ, D, device="meta")), ValueError, "q .*meta"),
    "decode-k-device": (_decode(k=_t(B, H, D, device="meta")), ValueError, "k .*meta"),
    "decode-v-device": (_decode(v=_t(B, H, D, device="meta")), ValueError, "v .*meta"),
    "decode-q-stride": (_decode(q=_t(B, HQ, 2 * D)[..., ::2]), ValueError, "q .*stride"),
    "decode-k-stride": (_decode(k=_t(B, D, H).mT), ValueError, "k .*stride"),
    "decode-v-stride": (_decode(v=_t(B, H, 1).expand(B, H, D)), ValueError, "v .*stride"),
    "decode-q-list": (_decode(q=[[1.0]]), TypeError, "q .*tensor.*list"),
    "decode-k-none": (_decode(k=None), TypeError, "k .*tensor.*NoneType"),
    "decode-scale-string": (_decode(scale="big"), TypeError, "scale.*big"),
    "prefill-layer": (_prefill(layer=7), ValueError, "layer.*7"),
    "prefill-k-heads": (_prefill(k=_t(B, HQ, P, D)), ValueError, "k .*N, H, P, D"),
    "prefill-k-dims": (_prefill(k=_t(B, H, D)), ValueError, "k .*N, H, P, D"),
    "prefill-k-head_dim": (_prefill(k=_t(B, H, P, D - 8)), ValueError, "k .*N, H, P, D"),
    "prefill-k-batch": (_prefill(k=_t(B - 1, H, P, D)), ValueError, "k .*N, H, P, D"),
    "prefill-v-shorter": (_prefill(v=_t(B, H, P - 1, D)), ValueError, "v .*shape of k"),
    "prefill-k-dtype": (_prefill(k=_t(B, H, P, D).half()), TypeError, "k .*float32.*float16"),
    "prefill-v-device": (_prefill(v=_t(B, H, P, D, device="meta")), ValueError, "v .*meta"),
    "prefill-v-none": (_prefill(v=None), TypeError, "v .*tensor"),
    "prefill-lens-above-max_prompt": (
        _prefill(k=_t(B, H, P + 3, D), v=_t(B, H, P + 3, D), prompt_lens=[1, P + 1, 2]), ValueError,
        r"prompt_lens\[1\].*max_prompt = 6.*7"),
    "prefill-lens-above-P": (_prefill(k=_t(B, H, 3, D), v=_t(B, H, 3, D), prompt_lens=[1, 4, 2]), ValueError,
                             r"prompt_lens\[1\].*P = 3.*4"),
    "prefill-lens-negative": (_prefill(prompt_lens=[1, 2, -1]), ValueError, r"prompt_lens\[2\].*-1"),
    "prefill-lens-count": (_prefill(prompt_lens=[1, 2]), ValueError, "prompt_lens.*3.*2"),
    "prefill-lens-float": (_prefill(prompt_lens=[1, 2, 3.0]), TypeError, r"prompt_lens\[2\].*3.0"),
    "prefill-lens-bool": (_prefill(prompt_lens=torch.tensor([True, True, False])), TypeError, "prompt_lens.*bool"),
    "prefill-lens-float-tensor": (_prefill(prompt_lens=torch.ones(3)), TypeError, "prompt_lens.*float32"),
    "prefill-lens-2d": (_prefill(prompt_lens=torch.ones(3, 1, dtype=torch.long)), ValueError, "prompt_lens.*1-D"),
    "prefill-lens-number": (_prefill(prompt_lens=3), TypeError, "prompt_lens"),
    "prefill-lens-huge": (_prefill(prompt_lens=[1, 2**40, 3]), ValueError, r"prompt_lens\[1\]"),
    "prefill-scores-shape": (_prefill(scores=_t(B, H, P - 1)), ValueError, "scores.*N, H, P"),
    "prefill-scores-dtype": (_prefill(scores=_t(B, H, P).double()), TypeError, "scores.*float32.*float64"),
    "prefill-scores-device": (_prefill(scores=_t(B, H, P, device="meta")), ValueError, "scores.*meta"),
    "prefill-scores-list": (_prefill(scores=[0.0]), TypeError, "scores.*tensor"),
    "prefill-rows-high": (_rows([0, 3]), ValueError, "rows.*0 .. 2.*3"),
    "prefill-rows-negative": (_rows([-1, 0]), ValueError, "rows.*-1"),
    "prefill-rows-twice": (_rows([1, 1]), ValueError, r"rows.*distinct.*\[1, 1\]"),
    "prefill-rows-float": (_rows([0.0, 1.0]), TypeError, r"rows\[0\].*0.0"),
    "prefill-rows-mask": (_rows(torch.tensor([True, True])), TypeError, "rows.*bool"),
    "prefill-rows-2d": (_rows(torch.tensor([[0], [1]])), ValueError, "rows.*1-D"),
    "prefill-rows-number": (_rows(1, 1), TypeError, "rows"),
    "prefill-rows-string": (_rows("01"), TypeError, "rows"),
    "prefill-rows-count": (_rows([0, 1, 2], 2), ValueError, "k .*N, H, P, D"),
    "reset-rows-high": (lambda cache: cache.reset([3]), ValueError, "rows.*3"),
    "reset-rows-float": (lambda cache: cache.reset([1.0]), TypeError, "rows.*1.0"),
    "positions-layer": (lambda cache: cache.positions(2, 0), ValueError, "layer.*2"),
    "positions-head": (lambda cache: cache.positions(0, H), ValueError, "head.*0 .. 3.*4"),
    "positions-head-negative": (lambda cache: cache.positions(0, -1), ValueError, "head.*-1"),
    "scores-head": (lambda cache: cache.scores(0, H), ValueError, "head.*4"),
    "scores-not-kept": (lambda cache: cache.scores(0, 1), ValueError, "head 1.*window.*track_scores"),
}


def _cache(case: Case, **changes: Any) -> CompressedCache:
    arguments: dict[str, Any] = {"plan": mixed(H, 3, num_layers=2), "batch_size": B, "num_query_heads": HQ,
                                 "head_dim": D, "max_prompt": P, "num_visual_tokens": N, "dtype": torch.float32,
                                 "device": case.device, "backend": case.name}
    return CompressedCache(**{**arguments, **changes})


@each_backend
@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_refused_untouched(case: Case, name: str) -> None:
    """Wrong shape, dtype, device, stride, layer, rows, lengths: named in the message, nothing written, no step lost."""
    call, error, message = BAD_CALLS[name]
    cache = _cache(case)
    _prefill()(cache)
    _decode()(cache)
    before = snapshot(cache)
    with pytest.raises(error, match=message):
        call(cache)
    assert_untouched(cache, before)
    for _ in range(N - 1):
        _decode()(cache)


@pytest.mark.parametrize("view", [_t(B, HQ, 2 * D)[..., ::2], _t(B, H, 1).expand(B, H, D), _t(B, D, H).mT,
                                  _t(B, H + 1, D)[:, 1:]], ids=["every-other", "expanded", "transposed", "shifted"])
def test_strides_survive_the_way_to_a_device(view: torch.Tensor) -> None:
    """Or the calls above would be good ones on a GPU."""
    for device in ("cpu", "meta"):
        moved = on_device(view, device)
        assert moved.device.type == device and moved.stride() == view.stride()
        assert moved.shape == view.shape and moved.storage_offset() == view.storage_offset()
    assert torch.equal(on_device(view, "cpu"), view)


BAD_CACHES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "plan": ({"plan": "plan.json"}, TypeError, "plan.*CachePlan.*str"),
    "batch_size-zero": ({"batch_size": 0}, ValueError, "batch_size.*0"),
    "batch_size-float": ({"batch_size": 2.0}, TypeError, "batch_size.*2.0"),
    "head_dim-zero": ({"head_dim": 0}, ValueError, "head_dim.*0"),
    "head_dim-bool": ({"head_dim": True}, TypeError, "head_dim.*True"),
    "num_query_heads-zero": ({"num_query_heads": 0}, ValueError, "num_query_heads.*0"),
    "num_query_heads-not-a-multiple": ({"num_query_heads": 6}, ValueError, "num_query_heads.*4 KV heads.*6"),
    "num_query_heads-fewer": ({"num_query_heads": 2}, ValueError, "num_query_heads.*4 KV heads.*2"),
    "max_prompt-negative": ({"max_prompt": -1}, ValueError, "max_prompt.*-1"),
    "max_prompt-none": ({"max_prompt": None}, TypeError, "max_prompt.*None"),
    "num_visual_tokens-zero": ({"num_visual_tokens": 0}, ValueError, "num_visual_tokens.*0"),
    "num_visual_tokens-float": ({"num_visual_tokens": 576.0}, TypeError, "num_visual_tokens.*576.0"),
    "batch_size-huge": ({"batch_size": 2**31}, ValueError, "batch_size.*2147483647.*2147483648"),
    "head_dim-huge": ({"head_dim": 10**100}, ValueError, "head_dim.*2147483647, got an int of 333 bits"),
    "max_prompt-huge": ({"max_prompt": 2**31}, ValueError, "max_prompt and num_visual_tokens.*2147483647.*2147483648"),
    "num_visual_tokens-huge": ({"num_visual_tokens": 10**12}, ValueError, "num_visual_tokens.*2147483647"),
    "slots-huge": ({"max_prompt": 2**30}, ValueError, "max_prompt = 1073741824.*4294967.* slots"),
    "dtype-int": ({"dtype": torch.int8}, ValueError, "dtype.*float32.*int8"),
    "dtype-string": ({"dtype": "float32"}, ValueError, "dtype.*float32"),
    "device": ({"device": "nonsense"}, ValueError, "device.*nonsense"),
    "backend-unknown": ({"backend": "fast"}, ValueError, "backend.*auto.*reference.*fast"),
    "backend-none": ({"backend": None}, ValueError, "backend.*None"),
}


@each_backend
@pytest.mark.parametrize("name", BAD_CACHES)
def test_bad_caches_are_refused(case: Case, name: str) -> None:
    """The constructor names the argument, what was given and what is allowed."""
    changes, error, message = BAD_CACHES[name]
    with pytest.raises(error, match=message):
        _cache(case, **changes)


@each_on_the_host
@pytest.mark.parametrize(("changes", "lowered"), [
    ({"batch_size": 10**9}, "batch_size = 1000000000"),
    ({"num_visual_tokens": 2**29, "batch_size": 10**4}, "num_visual_tokens = 536870912"),
    ({"max_prompt": 2**28, "batch_size": 10**6}, "max_prompt = 268435456"),
    ({"batch_size": 2**31 - 1, "num_visual_tokens": 2**28, "max_prompt": 2**28}, "or the plan's budget of 0.2")],
    ids=["batch_size", "num_visual_tokens", "max_prompt", "all"])
def test_caches_that_do_not_fit(case: Case, changes: dict[str, Any], lowered: str) -> None:
    """The message says how many bytes were asked for and what to lower; no memory is filled to find out."""
    sizes = {"batch_size": B, "max_prompt": P, "num_visual_tokens": N, **changes}
    bytes_asked = mixed(H, 3, num_layers=2).nbytes(**sizes, head_dim=D, dtype=torch.float32)
    with pytest.raises(MemoryError, match=rf"a cache of {bytes_asked} bytes \(.* GiB\) does not fit on cpu.*{lowered}"):
        _cache(case, **changes)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.\nTried to"), MemoryError("no more"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])
def test_caches_for_which_there_is_no_memory(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Neither torch's words nor its types of errors need to be known."""
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(state, "zeros_in_huge_pages", fail)
    with pytest.raises(MemoryError, match=r"a cache of \d+ bytes .*lower batch_size = 3,") as caught:
        _cache(Case("reference"))
    assert "\n" not in str(caught.value) and caught.value.__cause__ is error
    error = RuntimeError("CUDA error: device-side assert triggered")
    with pytest.raises(RuntimeError, match="device-side assert"):
        _cache(Case("reference"))


@pytest.mark.parametrize(("changes", "message"), [
    ({"device": "meta"}, "device.*meta"), ({"dtype": torch.float64}, "dtype.*float64"),
    ({"head_dim": 36}, "head_dim.*36"), ({"head_dim": 24}, "head_dim.*24"), ({"head_dim": 264}, "head_dim.*264")],
    ids=["device", "float64", "D36", "D24", "D264"])
def test_cpu_backend_says_what_it_cannot_serve(changes: dict[str, Any], message: str) -> None:
    """A named backend that cannot serve the request says why; `auto` looks further."""
    if backends.available()["cpu"]:
        pytest.skip(backends.available()["cpu"])
    with pytest.raises(ValueError, match=f"backend='cpu'.*{message}"):
        _cache(Case("cpu"), **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert _cache(Case("auto"), **changes).backend == "reference"


def test_unavailable_backend_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that was not built is refused with the reason that `info()` gives."""
    monkeypatch.setattr(backends.get("cpu"), "unavailable", lambda: "left out of the build")
    with pytest.raises(ValueError, match="backend='cpu'.*left out of the build"):
        _cache(Case("cpu"))
    backends._warn_slow.cache_clear()
    with pytest.warns(UserWarning, match="slow reference.*left out of the build"):
        assert _cache(Case("auto")).backend == "reference"


@each_backend
def test_more_steps_than_the_cache_holds(case: Case) -> None:
    """"more steps than the cache holds": counted per row and per layer, raised before anything is written."""
    cache = _cache(case)
    _prefill()(cache)
    for _ in range(4):
        _decode()(cache)
    _rows([2], 1)(cache)
    for _ in range(N - 4):
        _decode()(cache)
    before = snapshot(cache)
    with pytest.raises(ValueError, match="layer 0 has taken all num_visual_tokens = 10"):
        _decode()(cache)  # rows 0 and 1 are full, row 2 is not
    assert_untouched(cache, before)
    _decode(layer=1)(cache)
    _rows([0, 1])(cache)
    _decode()(cache)


@each_backend
def test_heads_of_another_model(case: Case) -> None:
    """"a plan whose layers or heads don't match the model" shows at the first call."""
    cache = _cache(case, plan=CachePlan.uniform(HeadSpec.full(), num_layers=1, num_heads=2), num_query_heads=8)
    for call, message in ((_prefill(), "k .*N, H, P, D"), (_decode(), "k .*shape"), (_decode(layer=1), "layer")):
        with pytest.raises(ValueError, match=message):
            call(cache)
