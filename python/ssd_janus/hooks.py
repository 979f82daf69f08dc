"""`enable` and `disable`: compressed caches for a model whose ``generate`` calls stay as they are."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import math
import numbers
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from transformers import JanusForConditionalGeneration

from ssd_attach.cache import DecoderCache
from ssd_attach.choice import Choice, choose
from ssd_attach.coupling import Coupling, check_backend, coupled
from ssd_attach.internals import CACHE_NAME, unroute
from ssd_kernels import CachePlan
from ssd_kernels.policies import HeadProfile

from .engine import call, fuse, unfuse
from .official import is_official, loops
from .shape import ModelShape, placement
from .waiting import StepWatch

_logger = logging.getLogger("ssd_janus")
_ENABLED = "_ssd_janus"
_lock = threading.RLock()  # held while models are enabled and disabled, never while they draw
BY_POSITION = tuple(inspect.signature(JanusForConditionalGeneration.generate).parameters)[1:4]


@dataclass(frozen=True)
class _Enabled:
    """Kept on an enabled model.

    Attributes:
        coupling: has what caches are made from, and wants attention routed.
        inner: ``generate`` as found on the instance, or None when it was the class's own.
        engine: let the engine draw what it can.
    """

    coupling: Coupling
    inner: Callable[..., Any] | None
    engine: bool = True

    def fresh(self) -> Coupling:
        """The coupling of one call."""
        own = self.coupling
        return Coupling(own.plan, own.num_visual_tokens, own.backend)


def enable(model: JanusForConditionalGeneration, plan: CachePlan | str | None = None, backend: str = "auto", *,
           budget: float | None = None, byte_budget: float | None = None, kv_format: str | None = None,
           row_buffer: int | None = None, profile: HeadProfile | str | PathLike[str] | None = None,
           engine: bool = True, **parameters: Any) -> Choice:
    """Make ``model.generate(..., generation_mode="image")`` keep its KV cache under a plan.

    Calls stay literally unchanged, and all of transformers' sampling options work. ``guidance_scale <= 1`` draws with
    one row per picture; None means the model's default. Text generation and plain forward passes are not touched:
    the call's cache decides what attends. Calls may run in several threads. Enabling again replaces plan and backend.

    A model of DeepSeek's code (deepseek-ai/Janus) has no ``generate`` for pictures; loops over it keep their caches
    under the plan (`ssd_janus.official.loops.enable`).

    Args:
        model: transformers' ``JanusForConditionalGeneration``, or DeepSeek's `MultiModalityCausalLM`.
        plan: head specs for the model's layers and KV heads, or the name of a policy, such as ``"decayed"``; None for
            a default, see `ssd_attach.choice.choose`.
        backend: ``"auto"`` or one of `ssd_kernels.info`'s backends.
        budget, byte_budget, kv_format, row_buffer, profile, parameters: of the policy, see `ssd_attach.choice.choose`.
        engine: draw with `ssd_janus.engine`, which gives the same tokens, where the call's options allow; else, and
            for all other calls, transformers' own loop draws. Loops over a model of DeepSeek's code stay what they are.

    Returns:
        what was chosen; its text, which is logged, too, is one line.

    Raises:
        TypeError: another kind of model, or ``plan`` is neither a plan nor a name.
        ValueError: the plan does not fit the model, no plan can be made as asked, or the backend is unknown or cannot
            run here.
    """
    if is_official(model):
        return loops.enable(model, plan, backend, budget=budget, byte_budget=byte_budget, kv_format=kv_format,
                            row_buffer=row_buffer, profile=profile, **parameters)
    _check_model(model)
    shape = ModelShape.of(model)
    choice = choose(shape, plan, placement(model)[1], budget=budget, byte_budget=byte_budget,
                    kv_format=kv_format, row_buffer=row_buffer, profile=profile, parameters=parameters)
    check_backend(backend)
    with _lock:
        if engine:
            fuse(model)  # rather than at the first picture, when other threads may be using the model
        current = vars(model).get(_ENABLED)
        inner = current.inner if current else vars(model).get("generate")
        enabled = _Enabled(Coupling(choice.plan, shape.num_visual_tokens, backend), inner, engine)
        enabled.coupling.route(model.model.language_model)
        setattr(model, _ENABLED, enabled)
        # Copies and pickles of the model must drive themselves. A bound method would be pickled as the name of its
        # function and come back as transformers' own.
        model.generate = functools.partial(_generate, model)
    _logger.info("%s", choice)
    return choice


@contextmanager
def enabled(model: JanusForConditionalGeneration, *args: Any, **kwargs: Any) -> Iterator[Choice]:
    """`enable` for a block, with the same arguments; gives what was chosen. What was in force before is so again; on a
    model of DeepSeek's code nothing is.

    Raises: as `enable`.
    """
    if not is_official(model):
        _check_model(model)
    before = vars(model).get(_ENABLED)
    choice = enable(model, *args, **kwargs)
    try:
        yield choice
    finally:
        with _lock:
            if before is None or not is_enabled(model):
                disable(model)
            else:
                before.coupling.route(model.model.language_model)
                setattr(model, _ENABLED, before)


def disable(model: JanusForConditionalGeneration) -> None:
    """Undo `enable`, and the engine's fusing of weights (`unfuse`). A model that is not enabled stays as it is.

    Raises:
        TypeError: another kind of model.
    """
    if is_official(model):
        return loops.disable(model)
    _check_model(model)
    with _lock:
        enabled = vars(model).pop(_ENABLED, None)
        if enabled is None:
            return
        del model.generate
        if enabled.inner is not None:
            model.generate = enabled.inner
        unroute(model.model.language_model, enabled.coupling)
        unfuse(model)


def is_enabled(model: JanusForConditionalGeneration) -> bool:
    """Whether `enable` is in force."""
    return _ENABLED in vars(model)


def in_force(model: JanusForConditionalGeneration) -> tuple[CachePlan, str] | None:
    """Plan and backend of `enable`, or None."""
    enabled: _Enabled | None = vars(model).get(_ENABLED)
    return None if enabled is None else (enabled.coupling.plan, enabled.coupling.backend)


@contextmanager
def drawing(model: JanusForConditionalGeneration, coupling: Coupling, cache: DecoderCache) -> Iterator[None]:
    """While this lasts, transformers' own ``generate`` may draw with a cache of ``coupling``, and never again.

    Raises:
        ValueError: the model checkpoints gradients.
    """
    try:
        with coupled(model.model.language_model, coupling):
            yield
    finally:
        cache.finish()


@functools.wraps(JanusForConditionalGeneration.generate, assigned=("__doc__",))
def _generate(self: JanusForConditionalGeneration, *args: Any, **kwargs: Any) -> Any:
    enabled: _Enabled | None = vars(self).get(_ENABLED)
    stock = types.MethodType(type(self).generate, self)
    if enabled is None:  # disabled by another thread after the call began
        return stock(*args, **kwargs)
    inner = enabled.inner or stock
    text = kwargs.get("generation_mode", "text") == "text"
    given = kwargs.get(CACHE_NAME, kwargs.get("past_key_values"))
    if isinstance(given, DecoderCache) or (given is not None and not text):
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
    enabled.coupling.route(self.model.language_model)  # the implementation may have been changed since
    coupling = enabled.fresh()
    cache = DecoderCache(coupling.generation(guided=guided, watch=StepWatch()))
    with drawing(self, coupling, cache):
        output = inner(*args, **{**kwargs, CACHE_NAME: cache})
    if isinstance(output, torch.Tensor):  # anything else may hold the cache for the caller
        cache.release()
    return output


def _through_engine(model: JanusForConditionalGeneration, enabled: _Enabled, args: tuple[Any, ...],
                    kwargs: dict[str, Any]) -> torch.Tensor:
    """What the call returns, drawn by the engine. Raises NotForTheEngine."""
    if not enabled.engine:
        raise call.NotForTheEngine("engine=False")
    if enabled.inner is not None:
        raise call.NotForTheEngine("generate has been replaced on this model")
    if args:
        raise call.NotForTheEngine("arguments are given twice or too many by position")
    return call.draw(model, enabled.coupling.plan, enabled.coupling.backend, kwargs)


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
        raise TypeError("model must be a MultiModalityCausalLM of deepseek-ai/Janus or a transformers "
                        f"JanusForConditionalGeneration, got {type(model).__name__}; ssd_janus.attach takes other "
                        "decoders of transformers")
