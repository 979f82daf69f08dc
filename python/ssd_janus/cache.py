"""One `CompressedCache` behind transformers' cache interface.

`LlamaAttention` hands whatever ``Cache.update`` returns to the attention function, so a layer of this cache returns
itself: while `internals.routed_attention` lasts, the layer is then asked to attend. That is all the coupling there is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, Protocol

import torch
from transformers import Cache, CacheLayerMixin

from ssd_kernels import CachePlan, CompressedCache

from . import waiting
from .internals import CACHE_NAME, MODEL_ARGUMENTS, KeyHandle, sdpa_attention_forward

# Arguments that reach the attention function of a Janus and do not change what it computes. Anything else that is set
# (softcap, sliding_window, s_aux, position_bias, ...) would be silently ignored, and so is refused.
HARMLESS = MODEL_ARGUMENTS | {"cache_position", "guidance_scale", "output_attentions", "output_hidden_states",
                              "return_dict"}


class Observer(Protocol):
    """Watches the attention of one `generate` call and changes nothing. All tensors are the call's own: read only."""

    def prefill(self, cache: CompressedCache, layer: int, keys: torch.Tensor, values: torch.Tensor,
                prompt_lens: list[int]) -> None:
        """The prompt of all rows in one layer: rotated keys and values [B, H, P, D], valid in [0, prompt_lens[b])."""

    def decode(self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None,
               out: torch.Tensor) -> None:
        """One step of one layer: query and out [B, Hq, D], the new token's keys and values [B, H, D], all rotated."""


class _Shared:
    """What the layers of one `JanusCache` share; it holds no reference to them, so caches are freed at once.

    Attributes:
        compressed: the cache, made when the first prompt arrives and its shapes are known.
        length: tokens seen per row, left padding included. transformers derives the next position from it.
        next_position: the same count as a 0-d tensor on the device, so that a captured step counts on replay.
        real: ``[B, P]``, which slots of the prompt hold tokens; None without padding.
        prompt_lens: real prompt tokens of each row.
        order: ``[B, max(prompt_lens)]`` slots of the real prompt tokens, or None without padding.
        finished: the `generate` call that owned this cache is over.
        observer: told of every attention call, if there is one.
        watch: of steps on a CPU, from one to the next.
    """

    def __init__(self, plan: CachePlan, num_visual_tokens: int, backend: str, observer: Observer | None) -> None:
        self.plan = plan
        self.num_visual_tokens = num_visual_tokens
        self.backend = backend
        self.compressed: CompressedCache | None = None
        self.length = 0
        self.next_position: torch.Tensor | None = None
        self.real: torch.Tensor | None = None
        self.prompt_lens: list[int] = []
        self.order: torch.Tensor | None = None
        self.finished = False
        self.observer = observer
        self.watch = waiting.StepWatch()

    def advance(self, keys: torch.Tensor) -> None:
        """Count the tokens of ``keys`` [B, H, T, D]."""
        self.length += keys.shape[2]
        if self.next_position is None:
            self.next_position = torch.zeros((), dtype=torch.long, device=keys.device)
        self.next_position += keys.shape[2]
        if keys.device.type == "cpu":
            self.watch.end()
            self.watch.begin()

    def begin(self, query: torch.Tensor, values: torch.Tensor) -> CompressedCache:
        """Make the cache for the prompt's query [B, Hq, P, D] and values [B, H, P, D]."""
        rows, _, slots, head_dim = values.shape
        self.prompt_lens = [slots] * rows
        if self.real is not None:
            self.prompt_lens = self.real.sum(1).tolist()
            self.order = self.real.int().argsort(dim=1, descending=True, stable=True)[:, :max(self.prompt_lens)]
        self.compressed = CompressedCache(
            self.plan, batch_size=rows, num_query_heads=query.shape[1], head_dim=head_dim,
            max_prompt=max(self.prompt_lens), num_visual_tokens=self.num_visual_tokens, dtype=values.dtype,
            device=values.device, backend=self.backend)
        self.compressed.warmup()  # so that a compilation is announced, and not part of the first token
        return self.compressed

    def without_padding(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` [B, H, P, D] with the real prompt tokens of every row moved to the front."""
        if self.order is None:
            return tensor
        return torch.take_along_dim(tensor, self.order[:, None, :, None].to(tensor.device), dim=2)


def _unsupported(name: str) -> Callable[..., NoReturn]:
    def method(self: CompressedLayer, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{name} is not possible on a compressed KV cache: what a head evicted is gone")

    return method


class CompressedLayer(KeyHandle, CacheLayerMixin):
    """One layer of a `JanusCache`, and the handle that its attention function receives."""

    is_sliding = False

    def __init__(self, index: int, shared: _Shared) -> None:
        super().__init__()
        self.index = index
        self.shared = shared
        self.prefilled = False
        self.pending: tuple[torch.Tensor, torch.Tensor] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        pass

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any,
               **kwargs: Any) -> tuple[CompressedLayer, CompressedLayer]:
        """Take the rotated keys and values [B, H, T, D] of a prompt, or of one new token (T = 1).

        Raises:
            ValueError: the cache was used by an earlier `generate`, or several tokens follow the prompt.
        """
        if self.shared.finished:
            raise ValueError(f"{CACHE_NAME} must be a fresh cache, got the compressed cache of a finished generate "
                             f"call; leave {CACHE_NAME} out")
        if self.prefilled and key_states.shape[2] != 1:
            raise ValueError(f"after the prompt a compressed cache takes 1 token per step, got {key_states.shape[2]}")
        if self.index == 0:
            self.shared.advance(key_states)
        self.pending = key_states, value_states
        return self, self

    def attend(self, module: torch.nn.Module, query: torch.Tensor, mask: torch.Tensor | None, scaling: float | None,
               dropout: float, **kwargs: Any) -> torch.Tensor:
        """Attention of ``query`` [B, Hq, T, D] over the cache and the tokens of the last `update`: [B, T, Hq, D].

        Raises:
            ValueError: dropout, attention weights, or an argument this attention does not know.
        """
        if dropout:
            raise ValueError(f"attention dropout must be 0 with a compressed cache, got {dropout}; call model.eval()")
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions must be False with a compressed cache, got True")
        for name in kwargs.keys() - HARMLESS:
            if kwargs[name] is not None:
                raise ValueError(f"attention argument {name!r} is not supported with a compressed cache; allowed are "
                                 f"{', '.join(sorted(HARMLESS))}")
        if self.pending is None:
            raise ValueError("attention on a compressed cache needs the update of the same step before it, got none")
        (keys, values), self.pending = self.pending, None
        # Under autocast RoPE leaves queries and keys in float32; the cache has the dtype of the values.
        query, keys = query.to(values.dtype), keys.to(values.dtype)
        shared = self.shared
        if self.prefilled and shared.compressed is not None:
            token = query[:, :, 0], keys[:, :, 0], values[:, :, 0]
            out = shared.compressed.decode(self.index, *token, scaling)
            if shared.observer is not None:
                shared.observer.decode(self.index, *token, scaling, out)
            return out.unsqueeze(1)
        compressed = shared.compressed or shared.begin(query, values)
        prompt = shared.without_padding(keys), shared.without_padding(values)
        compressed.prefill(self.index, *prompt, shared.prompt_lens)
        self.prefilled = True
        if shared.observer is not None:
            shared.observer.prefill(compressed, self.index, *prompt, shared.prompt_lens)
        return sdpa_attention_forward(module, query, keys, values, mask, scaling=scaling)[0]

    def get_seq_length(self) -> int | torch.Tensor:
        """Tokens seen, not tokens stored: transformers takes the next position from it."""
        return 0 if self.shared.next_position is None else self.shared.next_position

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.shared.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in earlier releases of transformers

    crop = _unsupported("crop")
    reset = _unsupported("reset")
    offload = _unsupported("offload")
    prefetch = _unsupported("prefetch")
    reorder_cache = _unsupported("reorder_cache")
    batch_repeat_interleave = _unsupported("batch_repeat_interleave")
    batch_select_indices = _unsupported("batch_select_indices")


class JanusCache(Cache):
    """The KV cache of one `generate` call under a plan.

    Attributes:
        guided: the call wants the unconditional rows, which Janus adds whatever the guidance scale.
        called: the prompt has been handed over.
    """

    def __init__(self, plan: CachePlan, num_visual_tokens: int, backend: str = "auto",
                 observer: Observer | None = None, guided: bool = True) -> None:
        self.shared = _Shared(plan, num_visual_tokens, backend, observer)
        self.guided = guided
        self.called = False
        super().__init__(layers=[CompressedLayer(index, self.shared) for index in range(plan.num_layers)])

    @property
    def compressed(self) -> CompressedCache | None:
        """The underlying cache; None before the prompt."""
        return self.shared.compressed

    def inputs(self, given: dict[str, Any]) -> dict[str, Any]:
        """What the language model is to be called with instead of ``given``, its arguments by name.

        Without guidance these are the conditional rows, the first half, because nothing would halve the logits again.
        The mask is the prompt's as its attention wants it, [B, 1, P, P]; steps, where padding is gone, have none.

        Raises:
            ValueError: a row of padding.
            RuntimeError: the prompt has not come to this cache.
        """
        inputs = dict(given)
        rows = inputs["inputs_embeds"].shape[0]
        if not self.guided:
            for name in ("inputs_embeds", "attention_mask", "position_ids"):
                if inputs.get(name) is not None and inputs[name].shape[0] == rows:
                    inputs[name] = inputs[name][:rows // 2]
        mask, inputs["attention_mask"] = inputs.get("attention_mask"), None
        if self.called and self.compressed is None:
            raise RuntimeError("the prompt never came to the compressed cache: a layer of the model computes attention "
                               "without the cache that it is given")
        if not self.called and mask is not None and not bool(mask.all()):
            real = mask.bool().to(inputs["inputs_embeds"].device)
            if not bool(real.any(1).all()):
                raise ValueError("attention_mask must leave at least one prompt token in every row, got a row of "
                                 "padding")
            self.shared.real = real
            causal = torch.ones(real.shape[1], real.shape[1], dtype=torch.bool, device=real.device).tril()
            inputs["attention_mask"] = causal & real[:, None, None]
        self.called = True
        return inputs

    def finish(self) -> None:
        """Let no other `generate` call continue this cache."""
        self.shared.finished = True
