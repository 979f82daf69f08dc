"""`attach` and `detach` for LlamaGen (github.com/FoundationVision/LlamaGen), whose ``generate`` stays as it is.

Its model is no model of transformers. Three things of it are touched: ``setup_caches``, which ``generate`` calls before
every batch, ``layers[i].attention.kv_cache``, whose ``update`` takes keys and values and returns what is attended to,
and the arguments with which its attention then calls torch's. 2-D rotary embedding, conditions and guidance, whose rows
are conditional ones and then as many null ones, are its own.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ssd_kernels import CachePlan
from ssd_kernels.policies import HeadProfile, Raster

from .cache import Generation
from .choice import Choice, choose
from .coupling import check_backend
from .online import OnlinePlan
from .shape import ModelShape

_logger = logging.getLogger("ssd_attach")
_ATTACHED = "_ssd_attach"


def shape_of(model: nn.Module) -> ModelShape:
    """The sizes of a LlamaGen; its grid is square, and its tokens are the grid's and nothing else.

    Raises:
        TypeError: the model has not got the parts of a LlamaGen.
    """
    config = getattr(model, "config", None)
    lacking = [name for name in ("n_layer", "n_head", "dim", "block_size") if not hasattr(config, name)]
    lacking += [name for name in ("setup_caches", "layers") if not hasattr(model, name)]
    if lacking:
        raise TypeError(f"model must be LlamaGen's Transformer, got {type(model).__name__} without "
                        f"{', '.join(lacking)}")
    columns = round(config.block_size ** 0.5)
    raster = Raster(columns, columns)
    return ModelShape(config.n_layer, getattr(config, "n_kv_head", None) or config.n_head, config.n_head,
                      config.dim // config.n_head, raster.tokens, columns, raster)


def attach(model: nn.Module, plan: CachePlan | str | None = None, backend: str = "auto", *,
           budget: float | None = None, byte_budget: float | None = None, kv_format: str | None = None,
           row_buffer: int | None = None, profile: HeadProfile | str | PathLike[str] | None = None,
           **parameters: Any) -> Choice:
    """Let LlamaGen's ``generate`` keep its KV caches under a plan. Attaching again replaces plan and backend.

    As LlamaGen keeps its caches in the model, one call draws at a time. Not with ``compile=True`` of its scripts.

    Args:
        model: LlamaGen's ``Transformer``.
        plan, backend, budget, byte_budget, kv_format, row_buffer, profile, parameters: as `ssd_attach.attach`.

    Returns:
        what was chosen; its text, which is logged, too, is one line.

    Raises:
        TypeError: another kind of model.
        ValueError: as `ssd_attach.attach`.
    """
    shape = shape_of(model)
    choice = choose(shape, plan, next(model.layers.parameters()).dtype, budget=budget, byte_budget=byte_budget,
                    kv_format=kv_format, row_buffer=row_buffer, profile=profile, parameters=parameters)
    check_backend(backend)
    detach(model)
    setattr(model, _ATTACHED, vars(model).get("setup_caches"))
    model.setup_caches = functools.partial(_setup_caches, model, choice.plan, shape.num_visual_tokens, backend)
    _logger.info("%s", choice)
    return choice


def detach(model: nn.Module) -> None:
    """Undo `attach`; nothing is left. A model that is not attached stays as it is."""
    if _ATTACHED not in vars(model):
        return
    before = vars(model).pop(_ATTACHED)
    del model.setup_caches
    if before is not None:
        model.setup_caches = before
    for layer in model.layers:
        if isinstance(layer.attention.kv_cache, CompressedKeys):
            layer.attention.kv_cache = None  # LlamaGen makes its own for the next batch


def _setup_caches(model: Any, plan: CachePlan, num_visual_tokens: int, backend: str, *args: Any, **kwargs: Any) -> None:
    before = vars(model)[_ATTACHED] or functools.partial(type(model).setup_caches, model)
    layers, model.layers = model.layers, nn.ModuleList()  # whose caches of full length are then not made
    try:
        before(*args, **kwargs)
    finally:
        model.layers = layers
    observer = plan.observer() if isinstance(plan, OnlinePlan) else None
    generation = Generation(plan, num_visual_tokens, backend, observer)
    for index, layer in enumerate(model.layers):
        layer.attention.kv_cache = CompressedKeys(index, generation)


class CompressedKeys(nn.Module):
    """In the place of one layer's ``KVCache``; holds no buffers of its own."""

    def __init__(self, index: int, generation: Generation) -> None:
        super().__init__()
        self.index = index
        self.generation = generation
        self.prefilled = False

    @property
    def nbytes(self) -> int:
        """Bytes of the compressed cache of all layers; 0 before the prompt."""
        return 0 if self.generation.compressed is None else self.generation.compressed.nbytes

    def update(self, input_pos: torch.Tensor, k_val: torch.Tensor, v_val: torch.Tensor) -> tuple[_Handle, _Handle]:
        """Take rotated keys and values [B, H, T, D] of a prompt, or of one new token (T = 1).

        Raises:
            ValueError: several tokens follow the prompt.
        """
        if self.prefilled and k_val.shape[2] != 1:
            raise ValueError(f"after the prompt a compressed cache takes 1 token per step, got {k_val.shape[2]}")
        handle = _Handle(self, k_val, v_val)
        return handle, handle

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None,
               dropout: float) -> torch.Tensor:
        """Attention [B, Hq, T, D] of ``query`` [B, Hq, T, D]; ``mask`` [B, 1, T, positions]."""
        if dropout:
            raise ValueError(f"dropout_p must be 0 with a compressed cache, got {dropout}; call model.eval()")
        if self.prefilled:
            token = (tensor[:, :, 0] for tensor in (query, keys, values))
            return self.generation.decode(self.index, *token, None).unsqueeze(2)
        if mask is not None:
            mask = mask[..., :keys.shape[2]]
            if self.index == 0:
                self.generation.see(mask)
        self.generation.prefill(self.index, query, keys, values)
        self.prefilled = True
        group = query.shape[1] // keys.shape[1]
        return functional.scaled_dot_product_attention(
            query, keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1), attn_mask=mask,
            is_causal=mask is None)


class _Handle:
    """What `CompressedKeys.update` returns in the place of keys and values: torch's attention asks it to attend."""

    def __init__(self, layer: CompressedKeys, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.layer, self.keys, self.values = layer, keys, values

    def repeat_interleave(self, repeats: int, dim: int) -> _Handle:
        """Query heads of a group share keys and values without copies."""
        return self

    @classmethod
    def __torch_function__(cls, function: Any, types: Sequence[type], args: Sequence[Any] = (),
                           kwargs: Mapping[str, Any] | None = None) -> torch.Tensor:
        given = dict(kwargs or {})
        if function is not functional.scaled_dot_product_attention or len(args) != 3:
            raise ValueError(f"a compressed cache only knows scaled_dot_product_attention, got "
                             f"{getattr(function, '__name__', function)}")
        query, handle, _ = args
        return handle.layer.attend(query, handle.keys, handle.values, given.get("attn_mask"),
                                   given.get("dropout_p", 0.0))
