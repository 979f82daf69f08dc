"""What is touched of transformers' inside stands in one module, and that module leaves all other attention alone."""

from __future__ import annotations

import ast
import copy
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AttentionInterface, AttentionMaskInterface, Cache, CacheLayerMixin, GenerationConfig

from ssd_attach import internals
from ssd_attach.internals import is_routed, route, unroute

ROOT = Path(__file__).parents[2]
SOURCES = [file for room in ("python", "bench", "ssd_kernels") for file in sorted((ROOT / room).rglob("*.py"))
           if file != Path(internals.__file__)]


def private_names() -> frozenset[str]:
    """Underscored attributes of transformers' models, their modules and configurations, and caches."""
    model = tiny.build_model()
    things = [model, *model.modules(), model.config, model.config.text_config, model.generation_config, Cache,
              CacheLayerMixin, GenerationConfig]
    names = {name for thing in things for name in (*dir(thing), *getattr(thing, "__dict__", {}))}
    return frozenset(name for name in names if name.startswith("_") and not name.startswith("__"))


def violations(source: str, private: frozenset[str]) -> Iterator[str]:
    tree = ast.parse(source)
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    strings = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    for node in [*ast.walk(tree), *strings]:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("transformers.")]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""] if not node.level and (node.module or "").startswith("transformers.") else []
        else:
            found = {ast.Attribute: "attr", ast.keyword: "arg", ast.Constant: "value"}.get(type(node))
            if isinstance(node, ast.ClassDef):  # attributes of a class, its methods included
                names = [target.id for each in node.body for target in
                         getattr(each, "targets", [getattr(each, "target", None)]) if isinstance(target, ast.Name)]
            else:
                names = [getattr(node, found)] if found else []
            names = [name for name in names if isinstance(name, str) and name in private - own]
        yield from (f"line {getattr(node, 'lineno', '?')}: {name}" for name in names)


def test_all_other_code_keeps_to_what_transformers_exports() -> None:
    private = private_names()
    assert {"_attn_implementation", "_prepare_generation_config", "_get_logits_processor", "_forward_hooks"} <= private
    found = [f"{file.relative_to(ROOT)}, {each}" for file in SOURCES for each in violations(file.read_text(), private)]
    assert len(SOURCES) > 50 and not found, "\n".join(found)


@pytest.mark.parametrize("source", [
    "from transformers.cache_utils import Cache", "import transformers.models.llama as llama",
    "def f():\n    from transformers.utils import logging", "model._prepare_generation_config(None)",
    "config._attn_implementation = 'eager'", "setattr(config, '_attn_implementation', 'eager')",
    "GenerationConfig(_from_model_config=False)", "class M(Janus):\n    _tied_weights_keys = {}",
    "class M(Janus):\n    _tied_weights_keys: dict = {}",
])
def test_what_counts(source: str) -> None:
    assert list(violations(source, private_names() | {"_from_model_config"}))


def test_every_entry_is_listed_in_the_docstring() -> None:
    text = internals.__doc__ or ""
    explained = set(internals.__all__) - {"KeyHandle", "MODEL_ARGUMENTS", "is_routed", "register_routed", "unroute"}
    assert not [name for name in explained if f"`{name}`" not in text]


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "test_own"])
def test_plain_attention_is_what_it_was(fresh: Any, implementation: str) -> None:
    """Also by functions that look up by which name they were selected, and without a mask function of their own."""
    selected = []

    def own(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        selected.append((module.config._attn_implementation, mask))
        return AttentionInterface()["sdpa"](module, query, key, value, mask, **kwargs)

    AttentionInterface.register("test_own", own)
    text = tiny.build_processor()(text=list(tiny.PROMPTS), padding=True, return_tensors="pt")
    inputs = {"input_ids": text["input_ids"], "attention_mask": text["attention_mask"]}
    fresh.set_attn_implementation(implementation)
    language_model = fresh.model.language_model
    with torch.no_grad():
        expected = fresh(**inputs).logits
        callers = [Caller(), Caller()]
        for caller in callers:
            route(language_model, caller)
        assert is_routed(language_model.config)
        assert torch.equal(fresh(**inputs).logits, expected)
        for caller in callers:
            unroute(language_model, caller)
    assert language_model.config._attn_implementation == implementation
    assert {name for name, _ in selected} <= {"test_own"} and len(selected) in (0, 2 * tiny.LAYERS)
    assert all(mask is None for _, mask in selected)


class Caller:
    """Who wants attention routed."""


def test_routing_ends_with_its_last_caller_and_in_copies(fresh: Any) -> None:
    language_model, first, second = fresh.model.language_model, Caller(), Caller()
    for caller in (first, second, first):
        assert route(language_model, caller) == "ssd_attach|sdpa"
    other = copy.deepcopy(language_model)
    unroute(language_model, first)
    assert language_model.config._attn_implementation == "ssd_attach|sdpa"
    unroute(language_model, Caller())  # still wanted
    assert language_model.config._attn_implementation == "ssd_attach|sdpa"
    unroute(language_model, second)
    assert language_model.config._attn_implementation == "sdpa"
    assert other.config._attn_implementation == "ssd_attach|sdpa"
    unroute(other, first)
    assert other.config._attn_implementation == "sdpa"


def test_callers_and_configurations_are_not_kept(fresh: Any) -> None:
    """Who is gone wants nothing, and what is gone leaves no entry that another one could find."""
    language_model, caller = copy.deepcopy(fresh.model.language_model), Caller()
    number = id(language_model.config)
    route(language_model, caller)
    route(language_model, Caller())
    gc.collect()
    unroute(language_model, caller)
    assert language_model.config._attn_implementation == "sdpa" and number not in internals._routed
    route(language_model, caller)
    assert number in internals._routed
    del language_model
    gc.collect()
    assert number not in internals._routed


def test_inner_configurations_keep_their_names() -> None:
    model, caller = tiny.build_model(), Caller()
    model.config.vq_config._attn_implementation = "eager"
    for _ in range(2):
        route(model, caller)
        assert is_routed(model.config) and model.config.vq_config._attn_implementation == "eager"
        unroute(model, caller)
        assert model.config._attn_implementation == "sdpa"
        assert model.config.vq_config._attn_implementation == "eager"


def test_a_choice_made_meanwhile_stays(fresh: Any) -> None:
    language_model, caller = fresh.model.language_model, Caller()
    route(language_model, caller)
    fresh.set_attn_implementation("eager")
    unroute(language_model, caller)
    assert language_model.config._attn_implementation == "eager"
    route(language_model, caller)
    fresh.set_attn_implementation("sdpa")
    assert route(language_model, caller) == "ssd_attach|sdpa"
    unroute(language_model, caller)
    for name in (None, "eager"):
        language_model.config._attn_implementation = name
        route(language_model, caller)
        assert "ssd_attach|" + (name or "") in AttentionMaskInterface()
        unroute(language_model, caller)
        assert language_model.config._attn_implementation == name
