"""`enable` and `disable`: compressed caches for a model whose ``generate`` calls stay as they are."""

from __future__ import annotations

import copy
import functools
import math
import numbers
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import JanusForConditionalGeneration

import ssd_kernels
from ssd_kernels import CachePlan

from .cache import ATTENTION, CACHE_NAME, JanusCache, Observer
from .engine import call, unfuse
from .online import OnlinePlan, check_observer
from .shape import ModelShape

_ENABLED = "_ssd_janus"


@dataclass(frozen=True)
class _Enabled:
    """Kept on an enabled model.

    Attributes:
        plan, backend, shape, observer: what the caches are made from.
        inner: ``generate`` as found on the instance, or None when it was the class's own.
        engine: let the engine draw what it can.
    """

    plan: CachePlan
    backend: str
    shape: ModelShape
    inner: Callable[..., Any] | None
    observer: Observer | None = None
    engine: bool = True


def enable(model: JanusForConditionalGeneration, plan: CachePlan, backend: str = "auto", *,
           engine: bool = True) -> None:
    """Make ``model.generate(..., generation_mode="image")`` keep its KV cache under ``plan``.

    Calls stay literally unchanged, and all of transformers' sampling options work. ``guidance_scale <= 1`` draws with
    one row per picture; None means the model's default. Text generation and plain forward passes are not touched:
    attention is replaced only while pictures are drawn. Enabling again replaces plan and backend.

    Args:
        model: transformers' ``JanusForConditionalGeneration``.
        plan: head specs for the model's layers and KV heads.
        backend: ``"auto"`` or one of `ssd_kernels.info`'s backends.
        engine: draw with `ssd_janus.engine`, which gives the same tokens, where the call's options allow; else, and
            for all other calls, transformers' own loop draws.

    Raises:
        TypeError: another kind of model, or ``plan`` is no `CachePlan`.
        ValueError: the plan does not fit the model, or the backend is unknown or cannot run here.
    """
    _enable(model, plan, backend, None, engine)


def _enable(model: JanusForConditionalGeneration, plan: CachePlan, backend: str, observer: Observer | None,
            engine: bool = False) -> None:
    _check_model(model)
    shape = ModelShape.of(model)
    shape.check(plan)
    check_observer(plan, observer)
    _check_backend(backend)
    current = vars(model).get(_ENABLED)
    inner = current.inner if current else vars(model).get("generate")
    setattr(model, _ENABLED, _Enabled(plan, backend, shape, inner, observer, engine))
    # Copies and pickles of the model must drive themselves. A bound method would be pickled as the name of its function
    # and come back as transformers' own.
    model.generate = functools.partial(_generate, model)


def disable(model: JanusForConditionalGeneration) -> None:
    """Undo `enable`, and the engine's fusing of weights (`unfuse`). A model that is not enabled stays as it is.

    Raises:
        TypeError: another kind of model.
    """
    _check_model(model)
    enabled = vars(model).pop(_ENABLED, None)
    if enabled is None:
        return
    del model.generate
    if enabled.inner is not None:
        model.generate = enabled.inner
    unfuse(model)


def is_enabled(model: JanusForConditionalGeneration) -> bool:
    """Whether `enable` is in force."""
    return _ENABLED in vars(model)


def in_force(model: JanusForConditionalGeneration) -> tuple[CachePlan, str] | None:
    """Plan and backend of `enable`, or None."""
    enabled: _Enabled | None = vars(model).get(_ENABLED)
    return None if enabled is None else (enabled.plan, enabled.backend)


@contextmanager
def applied(model: JanusForConditionalGeneration, plan: CachePlan, backend: str = "auto",
            observer: Observer | None = None) -> Iterator[None]:
    """`enable` for the length of a ``with`` block; what was in force before is restored.

    ``observer`` watches the attention of the calls in the block.
    """
    before = {name: vars(model)[name] for name in (_ENABLED, "generate") if name in vars(model)}
    _enable(model, plan, backend, observer)
    try:
        yield
    finally:
        for name in (_ENABLED, "generate"):
            vars(model).pop(name, None)
        vars(model).update(before)


@functools.wraps(JanusForConditionalGeneration.generate, assigned=("__doc__",))
def _generate(self: JanusForConditionalGeneration, *args: Any, **kwargs: Any) -> Any:
    enabled: _Enabled = vars(self)[_ENABLED]
    inner = enabled.inner or types.MethodType(type(self).generate, self)
    text = kwargs.get("generation_mode", "text") == "text"
    given = kwargs.get(CACHE_NAME, kwargs.get("past_key_values"))
    if isinstance(given, JanusCache) or (given is not None and not text):
        raise ValueError("past_key_values must be left out on an enabled model, which makes a fresh cache for every "
                         f"picture call, got {type(given).__name__}; after ssd_janus.disable(model) transformers' own "
                         "caches are taken again")
    if text:
        return inner(*args, **kwargs)
    if _option(self, kwargs, "output_attentions"):
        raise ValueError("output_attentions must be False on an enabled model, got True: evicted tokens have no "
                         "attention weights")
    guided = _settle_guidance(self, kwargs)
    try:
        return _through_engine(self, enabled, args, kwargs)
    except call.NotForTheEngine as reason:
        if enabled.engine:
            call.say_once(str(reason))
    observer = enabled.plan.observer() if isinstance(enabled.plan, OnlinePlan) else enabled.observer
    cache = JanusCache(enabled.plan, enabled.shape.num_visual_tokens, enabled.backend, observer)
    # Given a cache, transformers makes none of its own (5.13 to 5.17 fail when they try).
    kwargs[CACHE_NAME] = cache
    try:
        with _attention_of(self.model.language_model, guided):
            return inner(*args, **kwargs)
    finally:
        cache.finish()


def _through_engine(model: JanusForConditionalGeneration, enabled: _Enabled, args: tuple[Any, ...],
                    kwargs: dict[str, Any]) -> torch.Tensor:
    """What the call returns, drawn by the engine. Raises NotForTheEngine."""
    if not enabled.engine:
        raise call.NotForTheEngine("engine=False")
    if enabled.inner is not None:
        raise call.NotForTheEngine("generate has been replaced on this model")
    if args:
        raise call.NotForTheEngine("arguments are given by position")
    return call.draw(model, enabled.plan, enabled.backend, kwargs)


@contextmanager
def _attention_of(language_model: torch.nn.Module, guided: bool) -> Iterator[None]:
    """Select the compressed attention; without guidance, also run the language model on conditional rows only."""
    config: Any = language_model.config
    with ExitStack() as stack:
        stack.callback(setattr, config, "_attn_implementation", config._attn_implementation)
        config._attn_implementation = ATTENTION
        if not guided:
            stack.callback(language_model.register_forward_pre_hook(_conditional_rows, with_kwargs=True).remove)
        yield


def _conditional_rows(module: torch.nn.Module, args: tuple[Any, ...],
                      kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Drop the unconditional second half of the batch.

    Janus doubles the batch whatever the guidance scale, and only the guidance itself would halve the logits again.
    """
    rows = kwargs["inputs_embeds"].shape[0]
    for name in ("inputs_embeds", "attention_mask", "position_ids"):
        if kwargs.get(name) is not None and kwargs[name].shape[0] == rows:
            kwargs[name] = kwargs[name][:rows // 2]
    return args, kwargs


def _option(model: JanusForConditionalGeneration, kwargs: dict[str, Any], name: str) -> Any:
    """A generation option as transformers resolves it: argument, then given config, then the model's."""
    found = (kwargs.get(name), getattr(kwargs.get("generation_config"), name, None),
             getattr(model.generation_config, name, None))
    return next((value for value in found if value is not None), None)


def _settle_guidance(model: JanusForConditionalGeneration, kwargs: dict[str, Any]) -> bool:
    """Whether guidance is on. Scales up to 1 become 1 in ``kwargs``, a None there becomes the model's default."""
    scale = _option(model, kwargs, "guidance_scale")
    if kwargs.get("guidance_scale") is None:
        kwargs.pop("guidance_scale", None)
    if scale is None:
        return True
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(f"guidance_scale must be a number, got {scale!r}")
    if not math.isfinite(scale):
        raise ValueError(f"guidance_scale must be finite, got {scale}")
    if scale > 1:
        return True
    if kwargs.get("generation_config") is not None:
        kwargs["generation_config"] = copy.deepcopy(kwargs["generation_config"])
        kwargs["generation_config"].guidance_scale = 1.0
        kwargs.pop("guidance_scale", None)
    else:
        kwargs["guidance_scale"] = 1.0
    return False


def _check_model(model: object) -> None:
    if not isinstance(model, JanusForConditionalGeneration):
        raise TypeError(f"model must be a transformers JanusForConditionalGeneration, got {type(model).__name__}")


def _check_backend(backend: object) -> None:
    backends = ssd_kernels.info()["backends"]
    if backend != "auto" and backend not in backends:
        raise ValueError(f"backend must be one of {', '.join(['auto', *backends])}, got {backend!r}")
    if backend != "auto" and not backends[backend]["available"]:
        raise ValueError(f"backend={backend!r} cannot be used: {backends[backend]['reason']}")
