"""One `CompressedCache` behind transformers' cache, attention and mask interfaces.

`LlamaAttention` hands whatever ``Cache.update`` returns to the attention function, so a layer of this cache returns
itself: the attention function then asks the layer to attend. That is all the coupling there is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.llama.modeling_llama import LlamaModel

from ssd_kernels import CachePlan, CompressedCache

ATTENTION = "ssd_janus"

# The argument and the output that hold the cache: renamed in 5.24 of transformers. `inspect.signature` sees through its decorators.
CACHE_NAME = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"

# Arguments that reach the attention function of a Janus and do not change what it computes. Anything else that is set
# (softcap, sliding_window, s_aux, position_bias, ...) would be silently ignored, and so is refused.
HARMLESS = frozenset({"position_ids", "cache_position", "use_cache", "guidance_scale", "output_attentions",
                      "output_hidden_states", "return_dict"})


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
        prompt_lens: real prompt tokens of each row.
        order: ``[B, max(prompt_lens)]`` slots of the real prompt tokens, or None without padding.
        finished: the `generate` call that owned this cache is over.
        observer: told of every attention call, if there is one.
    """

    def __init__(self, plan: CachePlan, num_visual_tokens: int, backend: str, observer: Observer | None) -> None:
        self.plan = plan
        self.num_visual_tokens = num_visual_tokens
        self.backend = backend
        self.compressed: CompressedCache | None = None
        self.length = 0
        self.next_position: torch.Tensor | None = None
        self.prompt_lens: list[int] = []
        self.order: torch.Tensor | None = None
        self.finished = False
        self.observer = observer

    def advance(self, keys: torch.Tensor) -> None:
        """Count the tokens of ``keys`` [B, H, T, D]."""
        self.length += keys.shape[2]
        if self.next_position is None:
            self.next_position = torch.zeros((), dtype=torch.long, device=keys.device)
        self.next_position += keys.shape[2]

    def begin(self, query: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> CompressedCache:
        """Read the real prompt lengths off the prefill's mask [B, 1, P, P] and make the cache."""
        rows, _, slots, head_dim = values.shape
        self.prompt_lens = [slots] * rows
        if mask is not None:
            # The last query sees every slot that is not padding.
            real = mask[:, 0, -1].expand(rows, slots)
            self.prompt_lens = real.sum(1).tolist()
            self.order = real.int().argsort(dim=1, descending=True, stable=True)[:, :max(self.prompt_lens)]
        if min(self.prompt_lens) == 0:
            raise ValueError("attention_mask must leave at least one prompt token in every row, got a row of padding")
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
        return torch.take_along_dim(tensor, self.order[:, None, :, None], dim=2)


def _unsupported(name: str) -> Callable[..., NoReturn]:
    def method(self: CompressedLayer, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{name} is not possible on a compressed KV cache: what a head evicted is gone")

    return method


class CompressedLayer(CacheLayerMixin):
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
            raise ValueError("past_key_values must be a fresh cache, got the compressed cache of a finished generate "
                             "call; leave past_key_values out")
        if self.prefilled and key_states.shape[2] != 1:
            raise ValueError(f"after the prompt a compressed cache takes 1 token per step, got {key_states.shape[2]}")
        if self.index == 0:
            self.shared.advance(key_states)
        self.pending = key_states, value_states
        return self, self

    def attend(self, module: torch.nn.Module, query: torch.Tensor, mask: torch.Tensor | None,
               scale: float | None) -> torch.Tensor:
        """Attention of ``query`` [B, Hq, T, D] over the cache and the tokens of the last `update`: [B, T, Hq, D]."""
        if self.pending is None:
            raise ValueError("attention on a compressed cache needs the update of the same step before it, got none")
        (keys, values), self.pending = self.pending, None
        # Under autocast RoPE leaves queries and keys in float32; the cache has the dtype of the values.
        query, keys = query.to(values.dtype), keys.to(values.dtype)
        shared = self.shared
        if self.prefilled and shared.compressed is not None:
            token = query[:, :, 0], keys[:, :, 0], values[:, :, 0]
            out = shared.compressed.decode(self.index, *token, scale)
            if shared.observer is not None:
                shared.observer.decode(self.index, *token, scale, out)
            return out.unsqueeze(1)
        compressed = shared.compressed or shared.begin(query, values, mask)
        prompt = shared.without_padding(keys), shared.without_padding(values)
        compressed.prefill(self.index, *prompt, shared.prompt_lens)
        self.prefilled = True
        if shared.observer is not None:
            shared.observer.prefill(compressed, self.index, *prompt, shared.prompt_lens)
        return sdpa_attention_forward(module, query, keys, values, mask, scaling=scale)[0]

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
    """The KV cache of one `generate` call under a plan."""

    def __init__(self, plan: CachePlan, num_visual_tokens: int, backend: str = "auto",
                 observer: Observer | None = None) -> None:
        self.shared = _Shared(plan, num_visual_tokens, backend, observer)
        super().__init__(layers=[CompressedLayer(index, self.shared) for index in range(plan.num_layers)])

    @property
    def compressed(self) -> CompressedCache | None:
        """The underlying cache; None before the prompt."""
        return self.shared.compressed

    def finish(self) -> None:
        """Let no other `generate` call continue this cache."""
        self.shared.finished = True


def attention(module: torch.nn.Module, query: torch.Tensor, key: Any, value: Any,
              attention_mask: torch.Tensor | None, scaling: float | None = None, dropout: float = 0.0,
              **kwargs: Any) -> tuple[torch.Tensor, None]:
    """transformers' attention function for a `JanusCache`: query [B, Hq, T, D] to [B, T, Hq, D].

    Raises:
        TypeError: the keys do not come from a `JanusCache`.
        ValueError: dropout, attention weights, or an argument this attention does not know.
    """
    if not isinstance(key, CompressedLayer):
        raise TypeError(f"attention {ATTENTION!r} works on the cache of an enabled model inside generate, got keys of "
                        f"type {type(key).__name__}; call ssd_janus.enable(model, plan) instead of selecting it")
    if dropout:
        raise ValueError(f"attention dropout must be 0 with a compressed cache, got {dropout}; call model.eval()")
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions must be False with a compressed cache, got True")
    for name in kwargs.keys() - HARMLESS:
        if kwargs[name] is not None:
            raise ValueError(f"attention argument {name!r} is not supported with a compressed cache; allowed are "
                             f"{', '.join(sorted(HARMLESS))}")
    return key.attend(module, query, attention_mask, scaling), None


def mask(batch_size: int, q_length: int, kv_length: int, **kwargs: Any) -> torch.Tensor | None:
    """transformers' mask function: the usual mask for the prompt, none for steps, where padding is gone already."""
    if kv_length > q_length:
        return None
    return sdpa_mask(batch_size=batch_size, q_length=q_length, kv_length=kv_length, **kwargs)


# Without a mask function of the same name transformers would silently drop the padding mask.
AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, mask)
