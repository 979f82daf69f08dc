"""Everything of transformers' inside that this project touches. All other code imports what `transformers` exports.

`tests/janus/test_internals.py` holds the rest of the code to that. Features are detected, never releases. What is here,
and why there is no way around it:

- `CACHE_NAME`: the argument and the output that hold the cache have different names in different releases.
- `route`: ``config._attn_implementation``, where attention modules look up the name of the function that computes them;
  `AttentionInterface` and `AttentionMaskInterface` have no lookup of a function by name that is public.
- `prepared_config`, `logits_processors`: what a ``generate`` call samples with, in transformers' own order. They are
  methods of its models: ``_prepare_generation_config``, ``_prepare_special_tokens`` and ``_get_logits_processor``.
- `GenerationMode`: names the method that a configuration asks for.
- `STOCK`: the modules whose forward the engine does itself, which it must recognise.
- `remove_hooks`: torch's hooks by what they are; a copy of a module has them, but no handles to remove them by.
- `foreign_hooks`: hooks of a module that change what it computes. Some of transformers' own (`IDLE_HOOKS`) stay on a
  model whose hidden states were asked for once, and do nothing outside such calls.
- `cache_advice`: ``generate`` of a Janus has a loop of its own for pictures, which makes its cache itself and takes no
  other; that its class is such a one is not told by anything public.
- `checkpoints_layers`: layers drop the KV cache while they checkpoint gradients.
- `ACT2FN`: activations by name, of which some can be fused.
- `without_weights`: a model class says by underscored attributes which weights it goes without.
- `KEPT_WHEN_LOADED`: without it ``from_pretrained`` drops the values of a saved generation configuration.
- `compiled`: a module that is compiled in place cannot be put back otherwise (torch's, not transformers').
- `no_init_weights`, `modeling_janus`: large random models for benchmarks; blocks of the picture decoder for training.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GenerationConfig,
    JanusForConditionalGeneration,
    LlamaModel,
    LogitsProcessorList,
)
from transformers.activations import ACT2FN
from transformers.generation import GenerationMode
from transformers.initialization import no_init_weights
from transformers.models.janus import modeling_janus
from transformers.models.janus.modeling_janus import JanusVQVAEAlignerMLP, JanusVQVAEHead
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

__all__ = ["ACT2FN", "CACHE_NAME", "GenerationMode", "KEPT_WHEN_LOADED", "KeyHandle", "MODEL_ARGUMENTS", "STOCK",
           "cache_advice", "checkpoints_layers", "compiled", "foreign_hooks", "is_routed", "logits_processors",
           "modeling_janus", "no_init_weights", "prepared_config", "register_routed", "remove_hooks", "route",
           "unroute", "without_weights"]

# `inspect.signature` sees through decorators that still take a former name.
CACHE_NAME = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
# What a model's forward takes beside. Of what is given to ``generate``, attention functions are handed these, too.
MODEL_ARGUMENTS = frozenset(inspect.signature(JanusForConditionalGeneration.forward).parameters)
STOCK = (LlamaModel, LlamaDecoderLayer, LlamaAttention, LlamaMLP, LlamaRMSNorm, JanusVQVAEAlignerMLP, JanusVQVAEHead,
         nn.Linear, nn.Embedding, nn.ModuleList)
IDLE_HOOKS = "transformers.utils.output_capturing"
UNKNOWING = ("attention was left to a function that knows no compressed caches: the model's attention implementation "
             "must not be changed while a picture is drawn, and a compressed cache works on the model that made it, "
             "while it is attached or enabled")
KEPT_WHEN_LOADED: dict[str, Any] = {"_from_model_config": False}
ROUTED = "ssd_attach|"  # before the name of the attention that plain tensors are left to


def prepared_config(model: Any, config: GenerationConfig | None, **options: Any) -> tuple[GenerationConfig, dict]:
    """The configuration that ``model.generate(generation_config=config, **options)`` works with, and the options that
    are none of its fields. Changes nothing that is given."""
    return model._prepare_generation_config(copy.deepcopy(config), **options)


def logits_processors(model: Any, config: GenerationConfig, given: Sequence[Any] = (), prompt_length: int = 1) -> list:
    """What transformers applies to logits under a prepared ``config``, in its order; ``given`` is the call's own."""
    prompt = torch.zeros(1, prompt_length, dtype=torch.long)
    config = copy.deepcopy(config)
    model._prepare_special_tokens(config, True, device="cpu")  # some processors read them
    return list(model._get_logits_processor(
        generation_config=config, input_ids_seq_length=prompt_length, encoder_input_ids=prompt,
        prefix_allowed_tokens_fn=None, logits_processor=LogitsProcessorList(given), device="cpu"))


def foreign_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks, or a forward of its own, that may change what it computes."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return "forward" in vars(module) or any(
        not getattr(hook, "__module__", "").startswith((IDLE_HOOKS, f"{__package__}.")) for hook in hooks)


def remove_hooks(module: nn.Module, owner: object) -> None:
    """Take an object and its methods off the forward hooks of a module, before and after."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number in [number for number, hook in hooks.items() if getattr(hook, "__self__", hook) is owner]:
            for each in (hooks, module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs,
                         module._forward_hooks_always_called):
                each.pop(number, None)


def cache_advice(model: nn.Module) -> str | None:
    """What else to do where ``generate`` of a model makes caches that cannot be compressed; None for most models."""
    if not isinstance(model, JanusForConditionalGeneration):
        return None
    return ("transformers' loop for the pictures of a Janus makes one; ssd_janus.enable(model, ...) draws them with "
            "compressed caches")


def checkpoints_layers(module: nn.Module) -> bool:
    """Whether gradients are checkpointed in a module as it is."""
    return any(part.training and getattr(part, "gradient_checkpointing", False) for part in module.modules())


@contextmanager
def compiled(module: nn.Module) -> Iterator[None]:
    """A module runs through torch.compile while this lasts."""
    module.compile()
    try:
        yield
    finally:
        module._compiled_call_impl = None


def without_weights(*patterns: str) -> Callable[[type], type]:
    """Class decorator: weights of a checkpoint that match the patterns are not missed, and none are tied."""

    def decorate(model_class: Any) -> Any:
        model_class._keys_to_ignore_on_load_unexpected = list(patterns)
        model_class._tied_weights_keys = {}
        return model_class

    return decorate


class KeyHandle:
    """What a cache's ``update`` may return in the place of keys and values: it attends by itself.

    It gets to attention functions that know nothing of it when the implementation of a model's attention is changed
    while a picture is drawn; what they look at first says so.
    """

    def attend(self, module: nn.Module, query: torch.Tensor, mask: Any, plain: Callable[..., Any],
               **kwargs: Any) -> torch.Tensor:
        """Attention of ``query`` [B, Hq, T, D] over the cache: [B, T, Hq, D].

        ``plain`` is the attention function for plain tensors, to be called as transformers calls it, with ``module``,
        ``mask``, which was made for it, and ``kwargs``.
        """
        raise NotImplementedError

    @property
    def shape(self) -> NoReturn:
        raise ValueError(UNKNOWING)

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(UNKNOWING)


_lock = threading.RLock()
_routed: dict[int, tuple[weakref.ref[Any], weakref.WeakSet[Any]]] = {}  # by id: the configuration, and who wants it so


def route(module: nn.Module, caller: object) -> str:
    """From now on attention of ``module`` that is given a `KeyHandle` asks it to attend, until `unroute`.

    The keys decide, so that any number of callers may come and go in any order. All other attention is what it would be
    without: plain tensors are left to the function, and masks to the mask function, of the name that the module's
    configuration had before. Callers are held weakly. Calling again changes nothing, unless the name was changed
    meanwhile: then it is routed, too.

    Returns:
        the name by which the function is selected, for `register_routed`.
    """
    config = module.config
    with _lock:
        _callers(config).add(caller)
        if not is_routed(config):
            # A dict leaves the names of configurations inside this one alone.
            config._attn_implementation = {"": register_routed(f"{ROUTED}{config._attn_implementation or ''}")}
        return config._attn_implementation


def unroute(module: nn.Module, caller: object) -> None:
    """Undo `route`: the last caller's name is put back. Also for a copy of a module that was routed."""
    config = module.config
    with _lock:
        callers = _callers(config)
        callers.discard(caller)
        if not callers:
            _routed.pop(id(config), None)
            if is_routed(config):
                config._attn_implementation = {"": config._attn_implementation[len(ROUTED):] or None}


def is_routed(config: Any) -> bool:
    """Whether attention modules of a configuration ask a `KeyHandle`."""
    return (config._attn_implementation or "").startswith(ROUTED)


def register_routed(routed: str) -> str:
    """Make known the functions of a name that `route` gave; nothing if they are. Returns the name."""
    if routed not in AttentionInterface():
        name = routed[len(ROUTED):] or None
        AttentionInterface.register(routed, functools.partial(_attention, name))
        # Without a mask function of the same name transformers would silently drop the padding mask.
        AttentionMaskInterface.register(routed, functools.partial(_mask, name))
    return routed


def _callers(config: Any) -> weakref.WeakSet[Any]:
    known, callers = _routed.get(id(config), (None, None))
    if known is None or callers is None or known() is not config:
        callers = weakref.WeakSet()
        _routed[id(config)] = weakref.ref(config, functools.partial(_forget, id(config))), callers
    return callers


def _forget(number: int, reference: weakref.ref[Any]) -> None:
    """A configuration is gone, and another one may have its number by now."""
    known = _routed.get(number)
    if known is not None and known[0] is reference:
        _routed.pop(number, None)


def _attention(name: str | None, module: nn.Module, query: torch.Tensor, key: Any, value: Any,
               attention_mask: torch.Tensor | None, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    if isinstance(key, KeyHandle):
        return key.attend(module, query, attention_mask, functools.partial(_plain, name), **kwargs), None
    return _plain(name, module, query, key, value, attention_mask, **kwargs)


def _plain(name: str | None, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    function = _eager(type(module)) if name in (None, "eager") else AttentionInterface()[name]
    if name not in (None, "eager", "sdpa"):
        # Others may look up by which name they were selected.
        module = copy.copy(module)
        module.config = copy.copy(module.config)
        module.config._attn_implementation = {"": name}
    return function(module, *args, **kwargs)


def _mask(name: str | None, *args: Any, **kwargs: Any) -> Any:
    functions = AttentionMaskInterface()
    return functions[name](*args, **kwargs) if name in functions else None


def _eager(module_class: type) -> Callable[..., Any]:
    """The attention function of a modeling file, which no interface lists."""
    homes = (sys.modules.get(each.__module__) for each in module_class.__mro__)
    return next(home.eager_attention_forward for home in homes if hasattr(home, "eager_attention_forward"))
