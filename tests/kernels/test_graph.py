"""A whole picture replayed from one captured CUDA graph equals eager decoding bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ssd_kernels import CachePlan, CompressedCache, HeadSpec

from .cases import BF16, CASES, PART

B, H, D, PROMPT, STEPS = 4, 4, 64, 9, 576
PLANS = {
    "short": CachePlan.uniform(HeadSpec.heavy(48, recent=12, score="mean"), num_layers=1, num_heads=H, row_buffer=24),
    # Heads of more than a part, which the CUDA backend splits over blocks; two of them evict.
    "split": CachePlan([[HeadSpec.full(), HeadSpec.heavy(PART + 30, recent=12, score="mean"), HeadSpec.heavy(3),
                         HeadSpec.heavy(PART + 44)]], row_buffer=24),
}
PLANS |= {f"{name}-int8": replace(plan, kv_format="int8") for name, plan in PLANS.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", [case.name for case in CASES if case.device == "cuda"])
def test_replay_equals_eager(name: str, plan: str) -> None:
    """Every step from the same graph, refreshes included, and once more past the end, which changes nothing."""
    random = torch.Generator("cuda").manual_seed(0)
    tokens = torch.randn(STEPS, 3, B, H, D, generator=random, device="cuda").to(BF16)
    prompt = torch.randn(B, H, PROMPT, D, generator=random, device="cuda").to(BF16)
    eager, replayed = (CompressedCache(PLANS[plan], batch_size=B, num_query_heads=H, head_dim=D, max_prompt=PROMPT,
                                       num_visual_tokens=STEPS, dtype=BF16, device="cuda", backend=name,
                                       track_scores=plan.startswith("split"))
                       for _ in range(2))
    replayed.warmup()
    for cache in (eager, replayed):
        cache.prefill(0, prompt, prompt, [PROMPT, 1, 0, 5])
    given = tokens[0].clone()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = replayed.decode(0, *given)
    for step in range(STEPS):
        given.copy_(tokens[step])
        graph.replay()
        assert torch.equal(out, eager.decode(0, *tokens[step])), step
    for mine, other in zip(replayed._layers[0].everything, eager._layers[0].everything, strict=True):
        assert torch.equal(mine, other)
    graph.replay()
    for mine, other in zip(replayed._layers[0].everything, eager._layers[0].everything, strict=True):
        assert torch.equal(mine, other)
