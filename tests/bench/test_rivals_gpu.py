"""GPU rivals without a GPU: each library is stood in for by a plain implementation of the call we make.

That shows that layouts, lengths and order of the folded heads are right, not that the libraries take the call.
"""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest
import torch

from ssd_bench import contender, rivals, rivals_gpu
from ssd_bench.point import Point

CPU = torch.device("cpu")
POINT = Point.of_lengths(2, 3, 32, "float32", 6, 20)


@pytest.fixture(autouse=True)
def two_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (contender, rivals, rivals_gpu):
        monkeypatch.setattr(module, "copies_of", lambda nbytes: 2)


def ragged(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of q [N, 1, D] over k, v [total, 1, D], sequence i being ``ends[i]:ends[i + 1]``."""
    out = []
    for index, (begin, end) in enumerate(zip(ends.tolist(), ends.tolist()[1:], strict=False)):
        weights = torch.softmax(k[begin:end, 0] @ q[index, 0] * scale, 0)
        out.append(weights @ v[begin:end, 0])
    return torch.stack(out)[:, None]


def torch_varlen(q, k, v, queries, ends, longest_query, longest, dropout, causal, debug, scale):
    assert queries.tolist() == list(range(len(q) + 1)) and longest == max(ends.diff()) and not causal
    return ragged(q, k, v, ends, scale), None


def flash_attn_with_kvcache(q, k, v, cache_seqlens):
    """q [N, 1, 1, D], caches [N, L, 1, D] (flash-attn)."""
    kept = torch.arange(k.shape[1]) < cache_seqlens[:, None]
    weights = (q * k).sum(-1).squeeze(-1) / math.sqrt(q.shape[-1])
    return (torch.softmax(weights.masked_fill(~kept, -math.inf), 1)[:, :, None, None] * v).sum(1, keepdim=True)


class Wrapper:
    """Of FlashInfer's paged decode, NHD: pages [pages, page size, heads, D]."""

    def __init__(self, workspace, layout, use_cuda_graph, paged_kv_indptr_buffer, paged_kv_indices_buffer,
                 paged_kv_last_page_len_buffer):
        assert layout == "NHD" and use_cuda_graph

    def plan(self, ends, indices, last, query_heads, heads, head_dim, page_size, q_data_type, kv_data_type):
        assert (query_heads, heads, page_size) == (1, 1, 1) and last.tolist() == [1] * (len(ends) - 1)
        self.ends, self.indices = ends, indices

    def run(self, q, slabs):
        k, v = (slab[self.indices.long(), 0] for slab in slabs)
        return ragged(q, k, v, self.ends, 1 / math.sqrt(q.shape[-1]))


def xformers_forward(q, k, v, attn_bias, op):
    """Everything [1, N * padding, 1, D] (xformers' block-diagonal bias with padded keys)."""
    padding, lengths = attn_bias
    k, v = (tensor[0].unflatten(0, (-1, padding)) for tensor in (k, v))
    out = [ragged(q[0, index, None], k[index], v[index], torch.tensor([0, length]), 1 / math.sqrt(q.shape[-1]))
           for index, length in enumerate(lengths)]
    return torch.cat(out)[None]


def fla_step(q, k, v, scale, cu_seqlens):
    return ragged(q[0], k[0], v[0], cu_seqlens, scale)[None]


class Bias(tuple):
    @classmethod
    def from_seqlens(cls, q_seqlen, kv_padding, kv_seqlen):
        assert len(q_seqlen) == len(kv_seqlen)
        return cls((kv_padding, kv_seqlen))

    def to(self, device):
        return self


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", torch_varlen)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    fmha = SimpleNamespace(
        attn_bias=SimpleNamespace(BlockDiagonalCausalWithOffsetPaddedKeysMask=Bias),
        triton_splitk=SimpleNamespace(FwOp=None), memory_efficient_attention_forward=xformers_forward)
    for name, module in {
        "flash_attn": SimpleNamespace(flash_attn_with_kvcache=flash_attn_with_kvcache),
        "flashinfer": SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=Wrapper),
        "xformers": SimpleNamespace(), "xformers.ops": SimpleNamespace(fmha=fmha),
        "fla": SimpleNamespace(), "fla.ops": SimpleNamespace(), "fla.ops.attn": SimpleNamespace(),
        "fla.ops.attn.decoding": SimpleNamespace(attn_decoding_one_step=fla_step),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)


def test_folded_heads_are_laid_out_as_the_gate_expects(libraries: None):
    arena = contender.Arena(POINT, CPU)
    for one in rivals_gpu.contenders(POINT, arena, CPU):
        ready = one.build()
        ready.check()
        assert ready.useful == POINT.attend_bytes()
        assert ready.work.capturable == ("with plan" not in one.name)


def test_a_library_that_is_wrong_is_found_out(libraries: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Wrapper, "run", lambda self, q, slabs: q)
    arena = contender.Arena(POINT, CPU)
    [one] = [one for one in rivals_gpu.contenders(POINT, arena, CPU) if one.name == "FlashInfer decode"]
    with pytest.raises(contender.WrongResult):
        one.build().check()
