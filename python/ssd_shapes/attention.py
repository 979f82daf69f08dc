"""Causal attention for training on a CPU: batched matmuls of blocks of queries with the keys up to their end.

With small heads in bf16 this is faster than torch's own causal attention, whose backward pass is slow there;
the price is memory, because the probabilities are kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "shapes_causal_blocks"
BLOCKS = 5


def _spans(length: int) -> list[tuple[int, int]]:
    size = -(-length // BLOCKS)
    return [(start, min(length, start + size)) for start in range(0, length, size)]


class _CausalBlocks(torch.autograd.Function):
    """Attention of [N, T, D] queries (already scaled), keys and values."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outputs, probabilities = [], []
        for start, end in _spans(q.shape[1]):
            logits = torch.bmm(q[:, start:end], k[:, :end].transpose(1, 2))
            future = torch.full((end - start, end - start), -1e4, dtype=logits.dtype, device=logits.device)
            logits[:, :, start:].add_(future.triu_(1))
            p = torch.softmax(logits, -1)
            probabilities.append(p)
            outputs.append(torch.bmm(p, v[:, :end]))
        output = torch.cat(outputs, 1)
        ctx.save_for_backward(q, k, v, output, *probabilities)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, output, *probabilities = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        # The softmax's Jacobian needs sum_j p_j dp_j, the inner product of the output and its gradient.
        inner = (grad.float() * output.float()).sum(-1, keepdim=True).to(grad.dtype)
        for (start, end), p in zip(_spans(q.shape[1]), probabilities, strict=True):
            g = grad[:, start:end]
            grad_v[:, :end] += torch.bmm(p.transpose(1, 2), g)
            grad_logits = torch.bmm(g, v[:, :end].transpose(1, 2)).sub_(inner[:, start:end]).mul_(p)
            grad_q[:, start:end] = torch.bmm(grad_logits, k[:, :end])
            grad_k[:, :end] += torch.bmm(grad_logits.transpose(1, 2), q[:, start:end])
        return grad_q, grad_k, grad_v


@torch.compiler.disable  # type: ignore[untyped-decorator]
def causal_attention(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """Causal self-attention of q, k, v [B, H, T, D] without padding: [B, T, H, D]."""
    batch, heads = q.shape[:2]
    # RoPE leaves q and k in float32 under autocast, and autocast would run the softmax in float32 too.
    with torch.autocast(q.device.type, enabled=False):
        q, k = (q * scaling).to(v.dtype), k.to(v.dtype)
        out: Tensor = _CausalBlocks.apply(*(x.flatten(0, 1) for x in (q, k, v)))  # type: ignore[no-untyped-call]
    return out.view(batch, heads, *out.shape[1:]).transpose(1, 2)


def _forward(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    if mask is not None:
        raise ValueError("this attention takes no mask: prompts of a batch must have one length")
    return causal_attention(q, k, v, scaling).contiguous(), None


def register() -> str:
    """Make this attention known to transformers; returns the name to select it by."""
    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    return NAME
