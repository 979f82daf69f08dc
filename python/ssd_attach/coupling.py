"""`attach` and `detach`: compressed caches for a decoder of transformers whose loops stay as they are."""

from __future__ import annotations

import inspect
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

import ssd_kernels
from ssd_kernels import CachePlan, CompressedCache
from ssd_kernels.policies import HeadProfile, Raster

from .cache import DecoderCache, Generation, Observer, Watch, generation_of, take_over
from .choice import Choice, choose
from .internals import CACHE_NAME, cache_advice, checkpoints_layers, register_routed, remove_hooks, route, unroute
from .models import PictureForm
from .online import OnlinePlan
from .shape import ModelShape

logger = logging.getLogger("ssd_attach")
_ATTACHED = "_ssd_attach"
_CACHE_NAMES = (CACHE_NAME, "past_key_values")
_lock = threading.RLock()  # held while decoders are attached and detached, never while they compute


class Coupling:
    """Forward pre-hook of a decoder stack, for the caches that it makes. Calls without one of them pass.

    Calls share nothing but what is the same for all. A copy of a module that has this hook has one of its own.

    Attributes:
        plan, num_visual_tokens, backend: what caches are made from.
        answers: put a cache in the place of an absent or empty one; else only `generation` makes them.
        through_model: what was attached is a model around the decoder.
        advice: what to do about calls with a cache that can be no compressed one.
    """

    through_model = False
    advice = "leave cache_implementation out"

    def __init__(self, plan: CachePlan, num_visual_tokens: int, backend: str = "auto", *, answers: bool = False,
                 begins: Callable[[Mapping[str, Any]], bool] | None = None) -> None:
        """
        Args:
            plan, num_visual_tokens, backend: as `Generation`.
            answers: as the attribute.
            begins: whether calls inside a call of the module that has `enter` and `leave` as hooks, with these
                arguments by name, are pictures; calls outside of it are.
        """
        self.plan, self.num_visual_tokens, self.backend = plan, num_visual_tokens, backend
        self.answers = answers
        self._begins = begins
        self._routed: str | None = None
        self._renew()

    def _renew(self) -> None:
        self._generations: weakref.WeakSet[Generation] = weakref.WeakSet()
        self._around = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        """A copy takes no cache along."""
        return {name: value for name, value in vars(self).items() if name not in ("_generations", "_around")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._renew()
        if self._routed is not None:  # this may be another process
            register_routed(self._routed)

    def route(self, decoder: torch.nn.Module) -> None:
        """Let attention of the decoder ask caches to attend, for as long as this lives or until `unroute`."""
        self._routed = route(decoder, self)

    def generation(self, observer: Observer | None = None, guided: bool = True, watch: Watch | None = None,
                   share: Sequence[int] | None = None) -> Generation:
        """A fresh one; an online plan brings its own observer."""
        if isinstance(self.plan, OnlinePlan):
            observer = self.plan.observer()
        made = Generation(self.plan, self.num_visual_tokens, self.backend, observer, guided=guided, watch=watch,
                          owner=self, share=share)
        self._generations.add(made)
        return made

    def caches(self) -> list[CompressedCache]:
        """Those that are alive."""
        return [each.compressed for each in list(self._generations) if each.compressed is not None]

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
                 ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if kwargs is None:  # another thread's call, which met the hook while it was put up or taken down
            return None
        given = _by_name(module, args, kwargs)
        name = next((name for name in _CACHE_NAMES if given.get(name) is not None), CACHE_NAME)
        generation = generation_of(given.get(name))
        if generation is None and self.answers and self._starts(given, given.get(name)):
            generation = self.begun(module)
            if given.get(name) is None:
                given[name] = DecoderCache(generation)
            else:
                take_over(given[name], generation)
        if generation is None or generation.owner is not self:
            return None
        return (), generation.inputs(given)

    def begun(self, decoder: torch.nn.Module, share: Sequence[int] | None = None) -> Generation:
        """A fresh generation of an attached decoder; ``share`` as in `Generation`.

        Raises:
            ValueError: the decoder checkpoints gradients.
        """
        _check_takes_caches(decoder)
        self.route(decoder)  # the implementation may have been changed since
        return self.generation(share=share)

    def _starts(self, given: Mapping[str, Any], cache: object) -> bool:
        """Whether a call is the beginning of what is to be compressed."""
        if cache is None and given.get("use_cache") is not True:
            return False
        if cache is not None and (not isinstance(cache, Cache) or int(cache.get_seq_length())):
            return False
        around = getattr(self._around, "calls", None)
        if around and self._begins is not None and not self._begins(around[-1]):
            return False
        if cache is not None and not isinstance(cache, DynamicCache):
            raise ValueError(f"{CACHE_NAME} must be left out or an empty DynamicCache on an attached decoder, whose "
                             f"plan says what is cached, got {type(cache).__name__}; {self.advice}")
        return True

    def enter(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """Forward pre-hook of a module around the decoder."""
        if not hasattr(self._around, "calls"):
            self._around.calls = []
        self._around.calls.append(_by_name(module, args, kwargs or {}))

    def leave(self, module: torch.nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Forward hook of the same module, called whatever happens."""
        if getattr(self._around, "calls", None):
            self._around.calls.pop()


def _by_name(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    if not args:
        return dict(kwargs)
    names = list(inspect.signature(module.forward).parameters)[:len(args)]
    return {**dict(zip(names, args, strict=True)), **kwargs}


def _check_takes_caches(decoder: torch.nn.Module) -> None:
    if checkpoints_layers(decoder):
        raise ValueError("gradient checkpointing must be off while pictures are drawn, because layers that checkpoint "
                         "take no KV cache; call model.eval() or model.gradient_checkpointing_disable()")


@contextmanager
def coupled(decoder: torch.nn.Module, coupling: Coupling) -> Iterator[None]:
    """While this lasts, the decoder may be called with the caches of ``coupling``. Other calls notice nothing of it.

    Raises:
        ValueError: the decoder checkpoints gradients.
    """
    _check_takes_caches(decoder)
    try:
        coupling.route(decoder)
        hook = decoder.register_forward_pre_hook(coupling, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
    finally:
        unroute(decoder, coupling)


def attach(model: PreTrainedModel, plan: CachePlan | str | None = None, backend: str = "auto", *,
           pictures: Raster | PictureForm, budget: float | None = None, byte_budget: float | None = None,
           kv_format: str | None = None, row_buffer: int | None = None,
           profile: HeadProfile | str | PathLike[str] | None = None, **parameters: Any) -> Choice:
    """Keep the KV caches of a decoder under a plan, in loops that stay as they are.

    A call with an empty `DynamicCache`, or with ``use_cache=True`` and none, is the prompt of a new generation, which
    gets a compressed cache of its own: rows of a batch, and a second forward for guidance, too. All tokens of that call
    are the prompt; those that follow come one by one. Other calls, and generations that began before, are not touched.
    Calls may run in several threads. Attaching again replaces plan and backend.

    Args:
        model: a decoder stack of transformers that computes attention through its attention interface, or a model that
            has one (``model.get_decoder()``).
        plan: what caches keep, or the name of a policy, such as ``"decayed"``; None for a default, see `choose`.
        backend: ``"auto"`` or one of `ssd_kernels.info`'s backends.
        pictures: where the rows of a picture's grid stand among the tokens that follow a prompt, and how many these
            are: at most that many follow. A form (`ssd_attach.models`) may also say which calls of ``model`` are
            pictures; others, such as text, are left alone.
        budget, byte_budget, kv_format, row_buffer, profile, parameters: of the policy, see `choose`.

    Returns:
        what was chosen; its text, which is logged, too, is one line.

    Raises:
        TypeError: another kind of model, plan or pictures.
        ValueError: as `choose`, the backend is unknown or cannot run here, or the decoder is attached as part of
            another model.
    """
    _check_model(model)
    form = PictureForm(pictures) if isinstance(pictures, Raster) else pictures
    if not isinstance(form, PictureForm):
        raise TypeError(f"pictures must be a Raster or a PictureForm, got {type(pictures).__name__}")
    decoder = model.get_decoder()
    if form.begins is not None and decoder is model:
        raise ValueError(f"model must be one around its decoder for pictures that its calls tell from text, got the "
                         f"decoder itself, {type(model).__name__}")
    choice = choose(ModelShape.of_decoder(decoder.config, form.raster), plan,
                    decoder.get_input_embeddings().weight.dtype, budget=budget, byte_budget=byte_budget,
                    kv_format=kv_format, row_buffer=row_buffer, profile=profile, parameters=parameters)
    check_backend(backend)
    coupling = Coupling(choice.plan, choice.shape.num_visual_tokens, backend, answers=True, begins=form.begins)
    with _lock:
        detach(model)
        coupling.route(decoder)
        decoder.register_forward_pre_hook(coupling, with_kwargs=True)
        for module in {model, decoder}:
            vars(module)[_ATTACHED] = coupling
        coupling.through_model = model is not decoder
        coupling.advice = cache_advice(model) or coupling.advice
        if form.begins is not None:
            model.register_forward_pre_hook(coupling.enter, with_kwargs=True)
            model.register_forward_hook(coupling.leave, always_call=True)
    logger.info("%s", choice)
    return choice


def detach(model: PreTrainedModel) -> None:
    """Undo `attach`; nothing is left. A model that is not attached stays as it is.

    A generation that is under way in another thread ends with a `ValueError`.

    Raises:
        TypeError: another kind of model.
        ValueError: the decoder of this model was attached as part of another.
    """
    _check_model(model)
    decoder = model.get_decoder()
    with _lock:
        coupling: Coupling | None = vars(decoder).get(_ATTACHED)
        if coupling is None:
            return
        if vars(model).get(_ATTACHED) is not coupling or coupling.through_model != (model is not decoder):
            raise ValueError(f"the decoder of this {type(model).__name__} is attached as part of another model; detach "
                             "that one first")
        for module in {model, decoder}:
            del vars(module)[_ATTACHED]
        for module in (model, decoder):
            remove_hooks(module, coupling)
        unroute(decoder, coupling)


@contextmanager
def attached(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Iterator[Choice]:
    """`attach` for a block, with the same arguments; gives what was chosen."""
    choice = attach(model, *args, **kwargs)
    try:
        yield choice
    finally:
        detach(model)


def caches(model: PreTrainedModel) -> list[CompressedCache]:
    """The compressed caches of an attached model that are alive: those of generations under way, or that a caller still
    holds. Their ``nbytes`` is what they take. None of a model that is not attached.

    Raises:
        TypeError: no model.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a model or decoder, got {type(model).__name__}")
    coupling: Coupling | None = vars(model).get(_ATTACHED)
    return [] if coupling is None else coupling.caches()


def cache_for(model: PreTrainedModel, share: Sequence[int]) -> DecoderCache | None:
    """The cache to call the decoder of an attached model with for prompts that several rows go on from; None if it is
    not attached.

    Args:
        model: as given to `attach`.
        share: of every row that follows, which row of the prompts it goes on from.

    Raises:
        ValueError: the decoder checkpoints gradients.
    """
    decoder = model.get_decoder()
    coupling: Coupling | None = vars(decoder).get(_ATTACHED)
    return None if coupling is None else DecoderCache(coupling.begun(decoder, share))


def _check_model(model: object) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a model or decoder of transformers, got {type(model).__name__}")


def check_backend(backend: object) -> None:
    """
    Raises:
        ValueError: unknown, or cannot run here.
    """
    backends = ssd_kernels.info()["backends"]
    if not isinstance(backend, str) or backend not in ("auto", *backends):
        raise ValueError(f"backend must be one of {', '.join(['auto', *backends])}, got {backend!r}")
    if backend != "auto" and not backends[backend]["available"]:
        raise ValueError(f"backend={backend!r} cannot be used: {backends[backend]['reason']}")
