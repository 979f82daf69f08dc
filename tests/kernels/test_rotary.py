"""Unrotated q and k: turned by the row's own position inside the step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ssd_kernels import CompressedCache, ops, reference

from .cases import BF16, F32, Case, each_backend, each_storage, mixed
from .pair import assert_untouched, poison, snapshot

B, H, GROUP, D, PROMPT, STEPS = 2, 4, 2, 40, 5, 12


def tables(positions: int = PROMPT + STEPS, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.arange(positions)[:, None] * 10.0 ** -torch.linspace(0, 3, D // 2)
    return angles.cos().to(device), angles.sin().to(device)


def caches(case: Case, dtype: torch.dtype) -> list[CompressedCache]:
    """Two equal caches with prompts of different lengths."""
    made = []
    for _ in range(2):
        cache = CompressedCache(case.stored(mixed(H, 3)), batch_size=B, num_query_heads=H * GROUP, head_dim=D,
                                max_prompt=PROMPT, num_visual_tokens=STEPS, dtype=dtype, device=case.device,
                                backend=case.name)
        poison(cache)
        prompt = torch.randn(B, H, PROMPT, D, generator=torch.Generator().manual_seed(1)).to(dtype).to(case.device)
        cache.prefill(0, prompt, prompt, [PROMPT, 2])
        made.append(cache)
    return made


def test_rotate_is_llamas() -> None:
    """The same numbers as transformers' apply_rotary_pos_emb, whose tables hold every angle twice."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb  # slow to import

    x, (cos, sin), positions = torch.randn(B, H, D), tables(), [3, 11]
    doubled = [torch.cat([table[positions], table[positions]], -1)[:, None] for table in (cos, sin)]
    expected = apply_rotary_pos_emb(x[:, :, None], x[:, :, None], *doubled)[0][:, :, 0]
    torch.testing.assert_close(reference.rotate(x, (cos, sin), positions), expected, rtol=1e-6, atol=1e-6)


@each_storage
def test_rotating_inside_is_rotating_before(case: Case, dtype: torch.dtype) -> None:
    """Rows at different positions, refreshes included: same kept sets, and what is kept is what was rotated.

    In 8 bits such a rounding may turn a byte into the next; outputs are compared where it did not.
    """
    inside, before = caches(case, dtype)
    rotary = tables(device=case.device)
    random = torch.Generator().manual_seed(2)
    # One rounding of the stored type: float32 products may or may not be fused with their sum.
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 2 * torch.finfo(dtype).eps}
    if dtype.itemsize > 2:
        close = {"rtol": 1e-5, "atol": 1e-5}
    compared = 0
    for step in range(8):
        q, k, v = (torch.randn(B, heads, D, generator=random).to(dtype).to(case.device)
                   for heads in (H * GROUP, H, H))
        positions = [PROMPT + step, 2 + step]
        out = inside.decode(0, q, k, v, rotary=rotary)
        wanted = before.decode(0, reference.rotate(q, rotary, positions), reference.rotate(k, rotary, positions), v)
        for head in range(H):
            for mine, other in zip(inside.positions(0, head), before.positions(0, head), strict=True):
                assert torch.equal(mine, other)
        turned = 0
        for mine, other in zip(inside._layers[0].slabs, before._layers[0].slabs, strict=True):
            if mine.dtype == torch.int8:
                turned += int((mine != other).sum())
                assert ((mine.int() - other.int()).abs() <= 1).all()
            else:
                torch.testing.assert_close(mine, other, equal_nan=True, **close)
            mine.copy_(other)
        if turned == 0:
            torch.testing.assert_close(out, wanted, **close)
            compared += 1
    assert compared > 4


@each_backend
def test_operator_takes_the_tables(case: Case) -> None:
    one, other = caches(case, F32)
    rotary = tables(device=case.device)
    q, k, v = (torch.randn(B, heads, D).to(case.device) for heads in (H * GROUP, H, H))
    state = other._layers[0]
    out = torch.ops.ssd_kernels.decode(q, k, v, *state.tensors, *ops.layout_arguments(state.layout), D**-0.5,
                                       other.backend, *rotary)
    assert torch.equal(out, one.decode(0, q, k, v, rotary=rotary))


COS, SIN = tables()


@each_backend
@pytest.mark.parametrize(("rotary", "error", "message"), [
    ((COS,), TypeError, "rotary"),
    (COS, TypeError, "rotary"),
    ((COS, None), TypeError, "sin"),
    ((COS.double(), SIN), ValueError, "cos"),
    ((COS, SIN[:-1]), ValueError, "sin"),
    ((COS, SIN[:, :-1]), ValueError, "sin"),
    ((COS[0], SIN), ValueError, "cos"),
    ((COS.mT.contiguous().mT, SIN), ValueError, "cos"),
], ids=["one", "tensor", "none", "dtype", "short", "narrow", "flat", "strided"])
def test_bad_tables_are_refused(case: Case, rotary: Any, error: type[Exception], message: str) -> None:
    cache, _ = caches(case, BF16)
    before = snapshot(cache)
    if isinstance(rotary, tuple):
        rotary = tuple(table.to(case.device) if isinstance(table, torch.Tensor) else table for table in rotary)
    q, k, v = (torch.randn(B, heads, D).to(BF16).to(case.device) for heads in (H * GROUP, H, H))
    with pytest.raises(error, match=message):
        cache.decode(0, q, k, v, rotary=rotary)
    assert_untouched(cache, before)
