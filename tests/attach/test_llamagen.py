"""LlamaGen's way of writing pictures under compressed caches: its code stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llamagen_like
import pytest
import torch
from llamagen_like import GRID, HEADS, LAYERS, PROMPT, Model, generate
from torch.nn import functional

from ssd_attach import llamagen
from ssd_kernels import CachePlan, HeadSpec
from ssd_kernels.policies import Raster


@pytest.fixture(scope="module", params=[HEADS, 2], ids=["mha", "gqa"])
def shared_model(request: pytest.FixtureRequest) -> Model:
    torch.manual_seed(0)
    return Model(request.param).eval()


@pytest.fixture
def model(shared_model: Model) -> Any:
    yield shared_model
    llamagen.detach(shared_model)


def inputs(model: Model) -> tuple[torch.Tensor, torch.Tensor]:
    """Conditions of three pictures, padded on the left."""
    torch.manual_seed(3)
    padding = torch.ones(3, PROMPT)
    padding[0, :5], padding[2, :1] = 0, 0
    return torch.randn(3, PROMPT, model.config.dim) * padding[:, :, None], padding


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_full_plan_gives_the_same_codes(model: Model, backend: str) -> None:
    given = inputs(model)
    expected = generate(model, *given)
    choice = llamagen.attach(model, "full", backend)
    assert torch.equal(generate(model, *given), expected) and expected.unique().numel() > 8
    assert choice.shape.raster == Raster(GRID, GRID) and choice.shape.num_heads == model.config.n_kv_head
    assert not list(model.buffers())  # nothing of full length


@torch.no_grad()
def dense(model: Model, plan: CachePlan, condition: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """Greedy codes by one forward over everything per step, masked per head by what a plan of windows keeps."""
    hidden, drawn, scale = torch.cat([condition, torch.zeros_like(condition)]), [], 3.0
    real = torch.cat([padding, padding]).bool()
    for step in range(GRID * GRID):
        total = PROMPT + step
        seen = torch.ones(total, total, dtype=torch.bool).tril() & functional.pad(real, (0, step), value=True)[:, None]
        seen |= torch.eye(total, dtype=torch.bool)
        state = hidden
        for layer, block in enumerate(model.layers):
            windows = torch.tensor([10**6 if spec.size is None else spec.size for spec in plan.layers[layer]])
            age = torch.arange(total)[:, None] - torch.arange(total)
            # A window of W besides the token itself; the prompt stays.
            kept = (age <= windows[:, None, None]) | (torch.arange(total) < PROMPT)
            mask = (seen[:, None] & kept).repeat_interleave(HEADS // len(windows), 1)
            block.attention.kv_cache = Recall()
            state = block(state, model.rotary[:total], torch.arange(total), mask)
        wanted, null = model.head(state[:, -1]).chunk(2)
        drawn.append((null + (wanted - null) * scale).argmax(-1, keepdim=True))
        hidden = torch.cat([hidden, model.codes(torch.cat([drawn[-1]] * 2))], 1)
    return torch.cat(drawn, 1)


class Recall(torch.nn.Module):
    """No cache: all keys and values come anew."""

    def update(self, input_pos: torch.Tensor, k_val: torch.Tensor, v_val: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return k_val, v_val


def test_plans_that_evict_agree_with_dense_masked_attention(model: Model) -> None:
    heads = [HeadSpec.window(3), HeadSpec.full(), HeadSpec.window(0), HeadSpec.window(GRID + 1)]
    own = heads[:model.config.n_kv_head]
    plan = CachePlan([own[layer % len(own):] + own[:layer % len(own)] for layer in range(LAYERS)])
    given = inputs(model)
    expected = dense(model, plan, *given)
    assert not torch.equal(expected, generate(model, *given, sample=False))
    llamagen.attach(model, plan)
    assert torch.equal(generate(model, *given, sample=False), expected)


def test_memory_is_saved(model: Model) -> None:
    given, taken = inputs(model), []
    for budget in (None, 0.4):
        choice = llamagen.attach(model, "full" if budget is None else "decayed", budget=budget)
        generate(model, *given)
        taken.append(model.layers[0].attention.kv_cache.nbytes)
        assert taken[-1] == choice.nbytes(rows=6, max_prompt=PROMPT)
    full = 6 * LAYERS * model.config.n_kv_head * (PROMPT + GRID * GRID) * 2 * 32 * 4
    assert taken[1] < 0.6 * taken[0] and full <= taken[0] < 1.01 * full


def test_detach_leaves_nothing(model: Model) -> None:
    given = inputs(model)
    expected, before = generate(model, *given), set(vars(model))
    for _ in range(2):
        llamagen.attach(model, budget=0.4)
        assert not torch.equal(generate(model, *given), expected)
    llamagen.detach(model)
    assert set(vars(model)) == before and len(model.layers) == LAYERS
    assert all(layer.attention.kv_cache is None for layer in model.layers)
    assert torch.equal(generate(model, *given), expected)
    llamagen.detach(model)
    calls: list[int] = []

    def own(**sizes: Any) -> None:
        calls.append(1)
        Model.setup_caches(model, **sizes)

    model.setup_caches = own
    llamagen.attach(model, "full")
    assert torch.equal(generate(model, *given), expected) and calls == [1]
    llamagen.detach(model)
    assert model.setup_caches is own
    del model.setup_caches


def test_misuse_is_refused(model: Model) -> None:
    with pytest.raises(TypeError, match="model must be LlamaGen's Transformer, got Linear without n_layer, .*layers"):
        llamagen.attach(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=f"the model's {LAYERS} layers x"):
        llamagen.attach(model, CachePlan.uniform(HeadSpec.full(), 1, 1))
    llamagen.attach(model, "full")
    model.setup_caches(2, PROMPT + 4, torch.float32)
    hidden = torch.randn(2, PROMPT, model.config.dim)
    with torch.no_grad():
        model(hidden, torch.arange(PROMPT))
        with pytest.raises(ValueError, match="takes 1 token per step, got 2"):
            model(hidden[:, :2], torch.arange(2))
    token = torch.randn(2, 2, model.config.n_kv_head, 1, 32)
    handle, _ = model.layers[0].attention.kv_cache.update(torch.arange(1), *token)
    refused: list[tuple[str, Callable[[], Any]]] = [
        ("only knows scaled_dot_product_attention", lambda: torch.cat([handle, handle])),
        ("dropout_p must be 0", lambda: functional.scaled_dot_product_attention(
            torch.randn(2, HEADS, 1, 32), handle, handle, dropout_p=0.1))]
    for match, call in refused:
        with pytest.raises(ValueError, match=match):
            call()


def test_the_table_has_no_turn_for_conditions() -> None:
    assert not llamagen_like.table(GRID, 32)[:PROMPT].any()
