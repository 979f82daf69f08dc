"""All layers of a step in one call on a CPU: when that is done, and that it changes no token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from picture_requests import PROMPTS, REQUESTS, STEPS, tiny_engine
from test_engine import plan_of_budget

from ssd_janus.engine import Engine, StepTiming, engine, layers
from ssd_kernels import native
from ssd_kernels.layers import DecoderLayers

pytestmark = pytest.mark.skipif(native.missing() is not None, reason="the extension is not built")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every call of all layers."""
    rows: list[int] = []
    whole = DecoderLayers.__call__

    def seen(self: DecoderLayers, x: torch.Tensor, *others: Any) -> Any:
        rows.append(len(x))
        return whole(self, x, *others)

    monkeypatch.setattr(DecoderLayers, "__call__", seen)
    return rows


def drawn(model: Any, **options: Any) -> torch.Tensor:
    return Engine(model, plan_of_budget(model, 0.3)).generate(PROMPTS[:2], guidance=[2.0, 1.0], seeds=3, steps=STEPS,
                                                              **options)


def test_every_step_is_one_call_with_the_tokens_of_many(model: Any, calls: list[int],
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    together = drawn(model)
    assert calls == [3] * (STEPS - 1)  # the first token comes of the prompts
    calls.clear()
    monkeypatch.setattr(layers, "_together", lambda weights: None)
    assert torch.equal(drawn(model), together) and not calls


@pytest.mark.parametrize("options", [{"observer": True}, {"logits_processor": True}], ids=str)
def test_watched_steps_are_not(model: Any, calls: list[int], options: dict[str, bool]) -> None:
    def leave(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return logits

    class Nothing:
        def prefill(self, *_: Any) -> None: ...

        def decode(self, *_: Any) -> None: ...

    drawn(model, **({"observer": Nothing()} if "observer" in options else {"logits_processor": [leave]}))
    assert not calls


def test_more_rows_than_the_kernel_is_for(model: Any, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As with AMX, where torch multiplies many rows."""
    expected = drawn(model)
    calls.clear()
    for most, taken in ((2, 0), (3, STEPS - 1)):
        monkeypatch.setattr(engine, "most_rows", lambda *_, most=most: most)
        tokens = drawn(model)
        assert len(calls) == taken
        if taken:
            assert torch.equal(tokens, expected)
        calls.clear()


def test_other_products_and_backends_are_not(model: Any, calls: list[int]) -> None:
    plan = plan_of_budget(model, 0.3)
    for options in ({"products": "torch"}, {"backend": "reference"}):
        Engine(model, plan, **options).generate(PROMPTS[:1], seeds=3, steps=3)
    assert not calls


def test_an_activation_that_the_kernel_does_not_know(fresh: Any, calls: list[int]) -> None:
    fresh.model.language_model.layers[-1].mlp.act_fn = torch.nn.Tanh()
    drawn(fresh)
    assert not calls


def test_pictures_that_join_and_leave_go_together(calls: list[int]) -> None:
    one, expected = tiny_engine()
    calls.clear()
    slots = one.slots(3, steps=STEPS)
    guided = [request.guided for request in REQUESTS[:3]]
    assert slots.join(REQUESTS[:2]).advance()
    slots.step()
    assert slots.join(REQUESTS[2:3]).advance()
    while any(picture.done < STEPS for picture in slots.running.values()):
        for slot, picture in [*slots.running.items()]:
            if picture.done == STEPS:
                assert torch.equal(slots.drawn(slot), expected[slot])
                slots.leave(slot)
        slots.step()
    for slot in [*slots.running]:
        assert torch.equal(slots.drawn(slot), expected[slot])
    assert calls == [2 + sum(guided[:2]), *[3 + sum(guided)] * (STEPS - 2), 1 + guided[2]]


def test_parts_of_a_step_are_timed(model: Any, calls: list[int]) -> None:
    timing = StepTiming()
    tokens = drawn(model, timing=timing)
    assert len(calls) == len(timing.steps) == STEPS - 1 and torch.equal(tokens, drawn(model))
    for step in timing.steps:
        assert 0 < step["attention"] and 0 < step["linear"]
        assert step["attention"] + step["linear"] <= step["total"]
        assert step["rest"] == pytest.approx(step["total"] - step["linear"] - step["attention"])
