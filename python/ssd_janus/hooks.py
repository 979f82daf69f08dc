"""`enable` and `disable`: compressed caches for a model whose ``generate`` calls stay as they are."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import numbers
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import JanusForConditionalGeneration

import ssd_kernels
from ssd_kernels import CachePlan

from .cache import JanusCache
from .engine import call, fuse, unfuse
from .internals import CACHE_NAME, checkpoints_layers, end_routing, routed_attention
from .online import OnlinePlan
from .shape import ModelShape

_ENABLED = "_ssd_janus"
_lock = threading.RLock()  # held while models are enabled and disabled, never while they draw
BY_POSITION = tuple(inspect.signature(JanusForConditionalGeneration.generate).parameters)[1:4]


@dataclass(frozen=True)
class _Enabled:
    """Kept on an enabled model.

    Attributes:
        plan, backend, shape: what the caches are made from.
        inner: ``generate`` as found on the instance, or None when it was the class's own.
        engine: let the engine draw what it can.
    """

    plan: CachePlan
    backend: str
    shape: ModelShape
    inner: Callable[..., Any] | None
    engine: bool = True


def enable(model: JanusForConditionalGeneration, plan: CachePlan, backend: str = "auto", *,
           engine: bool = True) -> None:
    """Make ``model.generate(..., generation_mode="image")`` keep its KV cache under ``plan``.

    Calls stay literally unchanged, and all of transformers' sampling options work. ``guidance_scale <= 1`` draws with
    one row per picture; None means the model's default. Text generation and plain forward passes are not touched:
    the call's cache decides what attends. Calls may run in several threads. Enabling again replaces plan and backend.

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
    _check_model(model)
    shape = ModelShape.of(model)
    shape.check(plan)
    _check_backend(backend)
    with _lock:
        if engine:
            fuse(model)  # rather than at the first picture, when other threads may be using the model
        current = vars(model).get(_ENABLED)
        inner = current.inner if current else vars(model).get("generate")
        setattr(model, _ENABLED, _Enabled(plan, backend, shape, inner, engine))
        # Copies and pickles of the model must drive themselves. A bound method would be pickled as the name of its
        # function and come back as transformers' own.
        model.generate = functools.partial(_generate, model)


def disable(model: JanusForConditionalGeneration) -> None:
    """Undo `enable`, and the engine's fusing of weights (`unfuse`). A model that is not enabled stays as it is.

    Raises:
        TypeError: another kind of model.
    """
    _check_model(model)
    with _lock:
        enabled = vars(model).pop(_ENABLED, None)
        if enabled is None:
            return
        del model.generate
        if enabled.inner is not None:
            model.generate = enabled.inner
        end_routing(model.model.language_model)
        unfuse(model)


def is_enabled(model: JanusForConditionalGeneration) -> bool:
    """Whether `enable` is in force."""
    return _ENABLED in vars(model)


def in_force(model: JanusForConditionalGeneration) -> tuple[CachePlan, str] | None:
    """Plan and backend of `enable`, or None."""
    enabled: _Enabled | None = vars(model).get(_ENABLED)
    return None if enabled is None else (enabled.plan, enabled.backend)


@contextmanager
def drawing(model: JanusForConditionalGeneration, cache: JanusCache) -> Iterator[None]:
    """While this lasts, transformers' own ``generate`` may draw with ``cache``. Other calls notice nothing of it.

    Raises:
        ValueError: the model checkpoints gradients.
    """
    language_model = model.model.language_model
    if checkpoints_layers(language_model):
        raise ValueError("gradient checkpointing must be off while pictures are drawn, because layers that checkpoint "
                         "take no KV cache; call model.eval() or model.gradient_checkpointing_disable()")
    try:
        with routed_attention(language_model):
            hook = language_model.register_forward_pre_hook(_Inputs(cache), with_kwargs=True)
            try:
                yield
            finally:
                hook.remove()
    finally:
        cache.finish()


class _Inputs:
    """Forward pre-hook of the language model in the calls that hold one cache; others pass."""

    def __init__(self, cache: JanusCache | None) -> None:
        self.cache = cache

    def __reduce__(self) -> tuple[Any, ...]:
        """A model that is copied meanwhile takes no cache along."""
        return _Inputs, (None,)

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
                 ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # Without keyword arguments it is another thread's call, which met the hook while it was put up or taken down.
        if self.cache is None or kwargs is None or kwargs.get(CACHE_NAME) is not self.cache:
            return None
        return args, self.cache.inputs(kwargs)


@functools.wraps(JanusForConditionalGeneration.generate, assigned=("__doc__",))
def _generate(self: JanusForConditionalGeneration, *args: Any, **kwargs: Any) -> Any:
    enabled: _Enabled | None = vars(self).get(_ENABLED)
    stock = types.MethodType(type(self).generate, self)
    if enabled is None:  # disabled by another thread after the call began
        return stock(*args, **kwargs)
    inner = enabled.inner or stock
    text = kwargs.get("generation_mode", "text") == "text"
    given = kwargs.get(CACHE_NAME, kwargs.get("past_key_values"))
    if isinstance(given, JanusCache) or (given is not None and not text):
        raise ValueError(f"{CACHE_NAME} must be left out on an enabled model, which makes a fresh cache for every "
                         f"picture call, got {type(given).__name__}; after ssd_janus.disable(model) transformers' own "
                         "caches are taken again")
    if text:
        return inner(*args, **kwargs)
    _refuse_what_would_be_ignored(self, kwargs)
    guided = _settle_guidance(self, kwargs)
    if enabled.inner is None and len(args) <= len(BY_POSITION) and not kwargs.keys() & set(BY_POSITION[:len(args)]):
        args, kwargs = (), {**dict(zip(BY_POSITION, args, strict=False)), **kwargs}
    if kwargs.get("logits_processor") is not None:
        # transformers appends its guidance to the list that it is given, once more at every call.
        kwargs["logits_processor"] = copy.copy(kwargs["logits_processor"])
    try:
        return _through_engine(self, enabled, args, kwargs)
    except call.NotForTheEngine as reason:
        if enabled.engine:
            call.say_once(str(reason))
    observer = enabled.plan.observer() if isinstance(enabled.plan, OnlinePlan) else None
    cache = JanusCache(enabled.plan, enabled.shape.num_visual_tokens, enabled.backend, observer, guided)
    with drawing(self, cache):
        return inner(*args, **{**kwargs, CACHE_NAME: cache})


def _through_engine(model: JanusForConditionalGeneration, enabled: _Enabled, args: tuple[Any, ...],
                    kwargs: dict[str, Any]) -> torch.Tensor:
    """What the call returns, drawn by the engine. Raises NotForTheEngine."""
    if not enabled.engine:
        raise call.NotForTheEngine("engine=False")
    if enabled.inner is not None:
        raise call.NotForTheEngine("generate has been replaced on this model")
    if args:
        raise call.NotForTheEngine("arguments are given twice or too many by position")
    return call.draw(model, enabled.plan, enabled.backend, kwargs)


def _refuse_what_would_be_ignored(model: JanusForConditionalGeneration, kwargs: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: options about the cache or about attention weights, whose caller expects what is not done.
    """
    if _option(model, kwargs, "output_attentions"):
        raise ValueError("output_attentions must be False on an enabled model, got True: evicted tokens have no "
                         "attention weights")
    kind = _option(model, kwargs, "cache_implementation")
    if kind is not None:
        raise ValueError("cache_implementation must be None on an enabled model, whose plan says what is cached, got "
                         f"{kind!r}; leave it out, also of model.generation_config, or call ssd_janus.disable(model)")
    if _option(model, kwargs, "use_cache") is False:
        raise ValueError("use_cache must be True on an enabled model, which draws with a compressed cache, got False; "
                         "leave it out, also of model.generation_config, or call ssd_janus.disable(model)")


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
