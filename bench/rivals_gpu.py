"""Libraries of attention kernels for NVIDIA GPUs as rivals, each only where it is installed.

They take heads of different lengths by the fold trick: every (row, head) pair is a sequence of its own with one head.
None of this has been run on a GPU yet; a wrong call shows as "failed" or "wrong" in the table, not as a number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from .contender import Arena, Built, Contender, NotInstalled, copies_of
from .point import Point
from .rivals import OMITS, build_dense, checker, query
from .timing import Work

FOLDED = "attend; the kept tokens, heads folded into the batch"
PackedStep = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # q [N, 1, D], k, v [total, 1, D]


def contenders(point: Point, arena: Arena, device: torch.device) -> list[Contender]:
    """Every rival that needs CUDA."""
    packed = point.attend_bytes()
    padded = point.attend_bytes(point.heads * point.longest)

    def make(name: str, build: Callable[[Point, Arena, torch.device], Built], nbytes: int,
             does: str = FOLDED) -> Contender:
        return Contender(name, does, OMITS, lambda: build(point, arena, device), int(1.1 * nbytes * copies_of(nbytes)))

    return [
        make("torch FlashAttention-2 varlen", _torch_varlen, packed),
        make("flash-attn kvcache", _flash_attn, padded),
        make("FlashInfer decode", lambda *given: _flashinfer(*given, plan_each=False), packed),
        make("FlashInfer decode, with plan", lambda *given: _flashinfer(*given, plan_each=True), packed,
             f"plan on the host, {FOLDED}"),
        make("xformers Triton split-K", _xformers, padded),
        make("fla decoding", _fla, packed),
    ]


def _offsets(point: Point, device: torch.device) -> torch.Tensor:
    """int32 ``[B * H + 1]``: where each folded sequence begins."""
    lengths = torch.tensor(point.lengths, device=device).repeat(point.batch)
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _packed(point: Point, arena: Arena, device: torch.device, step: PackedStep, extra: int = 0,
            capturable: bool = True, setup_seconds: float | None = None) -> Built:
    """A rival over keys and values ``[total, 1, D]``, the folded sequences one after the other."""
    total = point.batch * sum(point.lengths)
    shape = (total, 1, point.head_dim)
    layers = arena.take(shape, shape, copies=copies_of(point.attend_bytes()))
    q = query(point, device)
    folded = q.view(-1, 1, point.head_dim)
    calls = [lambda k=k, v=v: step(folded, k, v) for k, v in layers]
    k, v = layers[0]
    begins = _offsets(point, torch.device("cpu")).tolist()

    def kept(row: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        begin, end = begins[row * point.heads + head:][:2]
        return k[begin:end, 0], v[begin:end, 0]

    return Built(Work(calls, capturable=capturable), checker(point, calls[0], q, kept), point.attend_bytes(),
                 point.attend_bytes(), k.nbytes + v.nbytes + extra, setup_seconds=setup_seconds)


def _torch_varlen(point: Point, arena: Arena, device: torch.device) -> Built:
    """FlashAttention-2 as torch ships it: `aten::_flash_attention_forward` with cumulative lengths."""
    ends = _offsets(point, device)
    queries = torch.arange(len(ends), dtype=torch.int32, device=device)

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.aten._flash_attention_forward(
            q, k, v, queries, ends, 1, point.longest, 0.0, False, False, scale=1 / math.sqrt(point.head_dim))[0]
        return out

    return _packed(point, arena, device, step, ends.nbytes + queries.nbytes)


def _flash_attn(point: Point, arena: Arena, device: torch.device) -> Built:
    """FlashAttention-2's own decode call (Dao, arXiv 2307.08691)."""
    try:
        from flash_attn import flash_attn_with_kvcache  # type: ignore[import-not-found]
    except ImportError as error:
        raise NotInstalled("flash-attn") from error
    lengths = torch.tensor(point.lengths, dtype=torch.int32, device=device).repeat(point.batch)

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # [B, H, L, D] is contiguous, so folding is a view: [B * H, L, 1, D].
        fold = (-1, k.shape[2], 1, point.head_dim)
        out: torch.Tensor = flash_attn_with_kvcache(q.reshape(-1, 1, 1, point.head_dim), k.view(fold), v.view(fold),
                                                    cache_seqlens=lengths)
        return out

    return build_dense(point, arena, device, point.longest, step, point.lengths, lengths.nbytes)


def _flashinfer(point: Point, arena: Arena, device: torch.device, plan_each: bool) -> Built:
    """FlashInfer's paged decode (arXiv 2501.01005) with pages of one token."""
    try:
        import flashinfer  # type: ignore[import-not-found]
    except ImportError as error:
        raise NotInstalled("flashinfer") from error
    pages = point.batch * sum(point.lengths)
    ends = _offsets(point, device)
    indices = torch.arange(pages, dtype=torch.int32, device=device)
    last = torch.ones(len(ends) - 1, dtype=torch.int32, device=device)
    workspace = torch.zeros(128 * 2**20, dtype=torch.uint8, device=device)  # zeros: some of its kernels count there
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_cuda_graph=True, paged_kv_indptr_buffer=ends.clone(),
        paged_kv_indices_buffer=indices.clone(), paged_kv_last_page_len_buffer=last.clone())

    def plan() -> None:
        wrapper.plan(ends, indices, last, 1, 1, point.head_dim, 1, q_data_type=point.torch_dtype,
                     kv_data_type=point.torch_dtype)

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if plan_each:
            plan()
        out: torch.Tensor = wrapper.run(q, (k[:, None], v[:, None]))
        return out

    began = time.perf_counter()
    plan()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    extra = workspace.nbytes + ends.nbytes + indices.nbytes + last.nbytes
    return _packed(point, arena, device, step, extra, capturable=not plan_each, setup_seconds=seconds)


def _xformers(point: Point, arena: Arena, device: torch.device) -> Built:
    """xformers' Triton split-K decode over padded sequences."""
    try:
        from xformers.ops import fmha  # type: ignore[import-not-found]
    except ImportError as error:
        raise NotInstalled("xformers") from error
    count = point.batch * point.heads
    bias = fmha.attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        q_seqlen=[1] * count, kv_padding=point.longest, kv_seqlen=list(point.lengths) * point.batch)
    bias = bias.to(device)

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        flat = (1, -1, 1, point.head_dim)
        out: torch.Tensor = fmha.memory_efficient_attention_forward(
            q.reshape(flat), k.view(flat), v.view(flat), attn_bias=bias, op=fmha.triton_splitk.FwOp)
        return out

    return build_dense(point, arena, device, point.longest, step, point.lengths)


def _fla(point: Point, arena: Arena, device: torch.device) -> Built:
    """flash-linear-attention's softmax decoding kernel."""
    try:
        from fla.ops.attn.decoding import attn_decoding_one_step  # type: ignore[import-not-found]
    except ImportError as error:
        raise NotInstalled("fla-core") from error
    ends = _offsets(point, device).to(torch.int64)

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = attn_decoding_one_step(q.view(1, -1, 1, point.head_dim), k[None], v[None],
                                                   scale=1 / math.sqrt(point.head_dim), cu_seqlens=ends)
        return out

    return _packed(point, arena, device, step, ends.nbytes)
