"""The weights of a Janus as the engine's step reads them."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ssd_attach.internals import STOCK, foreign_hooks

from ..quantization import BYTES, SCALE, in_bytes, is_quantized
from .linear import Chain, KernelLinear, Linear, Norm, QuantizedLinear

# Up to so many image codes the inputs of the next step are kept in a table. With more it would cost more than it saves:
# a picture needs only as many inputs as it has tokens.
TABLE_CODES = 4096
_fusing = threading.RLock()  # held while parameters become views of one another, or stop to be


@dataclass(frozen=True)
class Layer:
    """One decoder layer; ``qkv`` and ``gated`` are several projections in one matrix."""

    qkv: Linear | KernelLinear
    out: Linear | KernelLinear
    gated: Linear | KernelLinear
    down: Linear | KernelLinear

    def each(self, function: Callable[[Any], Any]) -> Layer:
        """The same with what ``function`` makes of every product."""
        return Layer(*(function(getattr(self, field.name)) for field in fields(self)))


@dataclass(frozen=True)
class Weights:
    """Everything that drawing the tokens of a picture reads.

    The fused matrices are no copies: the projections of the model become views of them, so that no weight is stored
    twice and changes in place are seen by both. `unfuse` undoes it.

    Attributes:
        layers: of the language model.
        embed: text embedding ``[vocabulary, hidden]``.
        image_embed, aligner: from an image code to the next input; ``table``: that input of every code, or None.
        head: from the last hidden state to logits of image codes, the language model's last norm before.
        rotary: (cos, sin), float32 ``[positions, D / 2]``.
        num_heads, num_query_heads, head_dim, scale: of the attention.
        codes: size of the image codebook.
    """

    layers: tuple[Layer, ...]
    embed: torch.Tensor
    image_embed: torch.Tensor
    aligner: Chain
    head: Chain
    rotary: tuple[torch.Tensor, torch.Tensor]
    num_heads: int
    num_query_heads: int
    head_dim: int
    scale: float
    codes: int
    table: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.embed.device

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states, keys and values."""
        return self.embed.dtype

    def following(self, codes: torch.Tensor) -> torch.Tensor:
        """Inputs of the next step ``[N, hidden]`` after image codes ``[N]``."""
        if self.table is not None:
            return self.table.index_select(0, codes)
        return self.aligner(functional.embedding(codes, self.image_embed))

    @torch.no_grad()
    def prepared(self, kernel: bool, most_rows: int | None = None) -> Weights:
        """For drawing: products by our kernel (`KernelLinear`) or by torch, and a table where codes are few."""
        weights = self if not kernel else replace(
            self, layers=tuple(layer.each(lambda linear: KernelLinear(linear, most_rows)) for layer in self.layers),
            aligner=self.aligner.by_kernel(most_rows), head=self.head.by_kernel(most_rows))
        if self.codes > TABLE_CODES:
            return weights
        return replace(weights, table=weights.following(torch.arange(self.codes, device=self.device)))

    @property
    def torchao_multiplies(self) -> bool:
        """Whether some weights are quantized in a way that our kernel does not know."""
        products = [*self.aligner.linears, *self.head.linears,
                    *(getattr(layer, field.name) for layer in self.layers for field in fields(layer))]
        return any(isinstance(product, QuantizedLinear) and product.digits is None for product in products)

    def timed(self, timed: Callable[[Any], Any]) -> Weights:
        """The same with every product wrapped."""
        return replace(self, layers=tuple(layer.each(timed) for layer in self.layers), aligner=timed(self.aligner),
                       head=timed(self.head))

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, positions: int) -> Weights:
        """The weights of a ``JanusForConditionalGeneration``. Calling it again is cheap and finds moved weights.

        Args:
            model: with `unsupported` returning None.
            positions: tokens of the longest row, prompt included.

        Raises:
            ValueError: `unsupported` names a reason.
        """
        reason = unsupported(model)
        if reason is not None:
            raise ValueError(f"the engine cannot run this model: {reason}")
        language_model = model.model.language_model
        config, aligner, head = language_model.config, model.model.generation_aligner, model.model.generation_head
        head_dim = language_model.layers[0].self_attn.head_dim
        embed = language_model.embed_tokens.weight.detach()
        cos, sin = language_model.rotary_emb(torch.empty(0, dtype=torch.float32, device=embed.device),
                                             torch.arange(positions, device=embed.device)[None])
        with _fusing:
            layers = tuple(_layer(layer) for layer in language_model.layers)
            to_inputs = [_fused([module]) for module in (aligner.fc1, *aligner.hidden_layers)]
            to_logits = [_fused([module]) for module in (head.proj_out, head.vision_head)]
        return cls(
            layers=layers, embed=embed,
            image_embed=model.model.generation_embeddings.weight.detach(),
            aligner=Chain.of(to_inputs, aligner.activation_fn),
            head=Chain.of(to_logits, head.activation_fn, _norm(language_model.norm)),
            rotary=(cos[0, :, :head_dim // 2].contiguous(), sin[0, :, :head_dim // 2].contiguous()),
            num_heads=config.num_key_value_heads, num_query_heads=config.num_attention_heads, head_dim=head_dim,
            scale=language_model.layers[0].self_attn.scaling,
            codes=head.vision_head.out_features)


PARTS = ("language_model", "generation_embeddings", "generation_aligner", "generation_head")
# Activations and rotary embeddings the engine calls, so they may be others than transformers' own.
CALLED = re.compile(r"(act_fn|activation_fn|rotary_emb)(\.|$)")
IN_ONE_MATRIX = re.compile(r"\b(q|k|v|gate|up)_proj\.")
# Tables of these kinds do not depend on how long the sequence has become.
FIXED_ROTARY = frozenset({"default", "linear", "llama3", "yarn"})


def unsupported(model: Any) -> str | None:
    """Why the engine cannot run a ``JanusForConditionalGeneration``, or None when it can."""
    language_model = model.model.language_model
    parts = {part: getattr(model.model, part) for part in PARTS}
    for part, root in parts.items():
        for name, module in root.named_modules():
            place = f"{part}.{name}".rstrip(".")
            if foreign_hooks(module):
                return f"{place} has hooks, which the engine would not call"
            if type(module) not in STOCK and not CALLED.search(name):
                return f"{place} is a {type(module).__name__}, whose forward the engine would not call"
    parameters = [parameter for root in parts.values() for parameter in root.parameters()]
    places = {(str(parameter.device), parameter.dtype) for parameter in parameters}
    if len(places) != 1:
        return f"its weights are not all on one device in one dtype: {sorted(map(str, places))}"
    if parameters[0].device.type == "meta" or not parameters[0].is_floating_point():
        return f"its weights are {parameters[0].dtype} on {parameters[0].device}"
    rotary = getattr(language_model.rotary_emb, "rope_type", "default")
    if rotary not in FIXED_ROTARY:
        return f"its rotary embedding is of type {rotary!r}; allowed are {', '.join(sorted(FIXED_ROTARY))}"
    if any(layer.self_attn.training and layer.self_attn.attention_dropout for layer in language_model.layers):
        return "it is in training mode with attention dropout"
    if torch.is_autocast_enabled(parameters[0].device.type):
        return "autocast is on"
    return None


def _layer(layer: nn.Module) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return Layer(
        qkv=_fused([attention.q_proj, attention.k_proj, attention.v_proj], norm=_norm(layer.input_layernorm)),
        out=_fused([attention.o_proj]),
        gated=_fused([mlp.gate_proj, mlp.up_proj], norm=_norm(layer.post_attention_layernorm), activation=mlp.act_fn,
                     gated=True),
        down=_fused([mlp.down_proj]))


def _norm(module: nn.Module) -> Norm:
    return Norm(module.weight.detach(), module.variance_epsilon)


def _fused(projections: Sequence[nn.Linear], **around: Any) -> Linear:
    """The projections as one, above one another in the rows of the weight; ``around``: of `Linear`."""
    weights = [projection.weight for projection in projections]
    biases = None
    if projections[0].bias is not None:
        biases = _stacked([projection.bias for projection in projections], "data")
    if not any(map(is_quantized, weights)):
        return Linear(_stacked(weights, "data"), biases, **around)
    digits = scale = None
    if all(in_bytes(weight) is not None for weight in weights):
        digits, scale = _stacked(weights, BYTES), _stacked(weights, SCALE)
    matrices = [(projection.weight.detach(), None if projection.bias is None else projection.bias.detach())
                for projection in projections]
    return QuantizedLinear(*matrices[0], **around, matrices=matrices, digits=digits, scale=scale, biases=biases)


def _stacked(parameters: Sequence[nn.Parameter], attribute: str) -> torch.Tensor:
    """One tensor of which a tensor that each parameter holds is consecutive rows; those become views of it.

    Args:
        attribute: its name; ``"data"`` for plain parameters.
    """
    before = [getattr(parameter, attribute) for parameter in parameters]
    rows = [len(tensor) for tensor in before]
    with _kept(before[0]):
        first = before[0].detach()
        if _consecutive(before):
            return first.as_strided((sum(rows), *first.shape[1:]), first.stride(), first.storage_offset())
        stacked = torch.cat(before)  # what was there stays alive for who reads it in another thread
        for parameter, view in zip(parameters, stacked.split(rows), strict=True):
            setattr(parameter, attribute, view)
        return stacked


def fuse(model: Any) -> None:
    """Fuse the projections of a ``JanusForConditionalGeneration``, if the engine can run it.

    Later draws then find them fused. The first would change parameters, in place and without changing a value, and that
    is better not done while other threads compute with them.
    """
    if unsupported(model) is None:
        Weights.of(model, 1)


def unfuse(model: Any) -> None:
    """Give the projections of a ``JanusForConditionalGeneration`` storage of their own again.

    Who writes storages instead of tensors, as ``safetensors.torch.save_model``, refuses fused ones. The engine fuses
    again when it draws next.
    """
    with _fusing:
        for name, parameter in model.model.language_model.named_parameters():
            if not IN_ONE_MATRIX.search(name) or is_quantized(parameter) and in_bytes(parameter) is None:
                continue
            for attribute in (BYTES, SCALE) if is_quantized(parameter) else ("data",):
                tensor = getattr(parameter, attribute)
                if tensor.untyped_storage().nbytes() > tensor.nbytes:
                    with _kept(tensor):
                        setattr(parameter, attribute, tensor.clone())


@contextmanager
def _kept(tensor: torch.Tensor) -> Iterator[None]:
    """For new contents of a parameter, which outlive the call and stay what it is: trainable, although the caller may
    be in inference mode, or made in inference mode, although the caller may be out of it."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        yield


def _consecutive(tensors: Sequence[torch.Tensor]) -> bool:
    storage, offset = tensors[0].untyped_storage().data_ptr(), tensors[0].storage_offset()
    for tensor in tensors:
        if (not tensor.is_contiguous() or tensor.untyped_storage().data_ptr() != storage
                or tensor.storage_offset() != offset):
            return False
        offset += tensor.numel()
    return True
