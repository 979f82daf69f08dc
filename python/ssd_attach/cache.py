"""One `CompressedCache` behind transformers' cache interface.

Attention modules hand whatever ``Cache.update`` returns to the attention function, so a layer of this cache returns
itself: where attention is routed (`internals.route`), the layer is then asked to attend. That is all the coupling there
is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol

import torch
from transformers import Cache, CacheLayerMixin, DynamicCache

from ssd_kernels import CachePlan, CompressedCache

from .internals import CACHE_NAME, MODEL_ARGUMENTS, KeyHandle

# Arguments that reach the attention functions of transformers' decoders and do not change what they compute. Anything
# else that is set (softcap, sliding_window, s_aux, position_bias, ...) would be silently ignored, and so is refused.
HARMLESS = MODEL_ARGUMENTS | {"cache_position", "guidance_scale", "output_attentions", "output_hidden_states",
                              "return_dict"}
PER_ROW = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")  # arguments of a decoder, [B, ...]


class Observer(Protocol):
    """Watches the attention of one generation and changes nothing. All tensors are the call's own: read only."""

    def prefill(self, cache: CompressedCache, layer: int, keys: torch.Tensor, values: torch.Tensor,
                prompt_lens: list[int]) -> None:
        """The prompt of all rows in one layer: rotated keys and values [B, H, P, D], valid in [0, prompt_lens[b])."""

    def decode(self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None,
               out: torch.Tensor) -> None:
        """One step of one layer: query and out [B, Hq, D], the new token's keys and values [B, H, D], all rotated."""


class Watch(Protocol):
    """Is told when steps begin and end."""

    def begin(self) -> None: ...
    def end(self) -> None: ...


class Generation:
    """A prompt and what follows it, under a plan: what the layers of one transformers cache share.

    It holds no reference to them, so caches are freed at once.

    Attributes:
        owner: the hook that looks after its calls.
        guided: the call wants the unconditional rows, which Janus adds whatever the guidance scale.
        compressed: the cache, made when the first prompt arrives and its shapes are known.
        called: the prompt has been handed over.
        finished: the call that owned this generation is over.
    """

    def __init__(self, plan: CachePlan, num_visual_tokens: int, backend: str = "auto",
                 observer: Observer | None = None, *, guided: bool = True, watch: Watch | None = None,
                 owner: object = None, share: Sequence[int] | None = None) -> None:
        """
        Args:
            plan: of as many layers and KV heads as the decoder has.
            num_visual_tokens: most tokens that follow the prompt.
            backend: ``"auto"`` or a backend of `ssd_kernels`.
            observer: told of every attention call.
            guided: False leaves the second half of the rows out.
            watch: of steps on a CPU, from one to the next.
            owner: as the attribute.
            share: of every row that follows the prompt, which row of the prompt it goes on from; rows that go on from
                the same one hold it once where the plan keeps prompts. None: each has its own.
        """
        self.plan = plan
        self.num_visual_tokens = num_visual_tokens
        self.backend = backend
        self.observer = observer
        self.guided = guided
        self.watch = watch
        self.owner = owner
        self.share = None if share is None else list(share)
        self.compressed: CompressedCache | None = None
        self.called = False
        self.finished = False
        self._length = 0  # tokens seen per row, padding included: transformers derives the next position from it
        self._next_position: torch.Tensor | None = None  # the same on the device, so that a captured step counts
        self._real: torch.Tensor | None = None  # [B, P], which slots of the prompt hold tokens; None without padding
        self._prompt_lens: list[int] = []
        self._order: torch.Tensor | None = None  # [B, max(prompt_lens)] slots of the real tokens, with padding

    def layers(self) -> list[CompressedLayer]:
        """Fresh layers of a transformers cache."""
        return [CompressedLayer(index, self) for index in range(self.plan.num_layers)]

    def inputs(self, given: dict[str, Any]) -> dict[str, Any]:
        """What the decoder is to be called with instead of ``given``, its arguments by name.

        Without guidance these are the conditional rows, the first half, because nothing would halve the logits again.
        The prompt's mask stays; what its last token does not see is not stored. Steps, where padding is gone, have no
        mask.

        Raises:
            ValueError: a row of padding.
            RuntimeError: the prompt has not come to this cache.
        """
        inputs = dict(given)
        if not self.guided:
            rows = next(len(inputs[name]) for name in ("inputs_embeds", "input_ids") if inputs.get(name) is not None)
            for name in PER_ROW:
                if inputs.get(name) is not None and len(inputs[name]) == rows:
                    inputs[name] = inputs[name][:rows // 2]
        if self.called:
            if self.compressed is None:
                raise RuntimeError("the prompt never came to the compressed cache: a layer of the model computes "
                                   "attention without the cache that it is given")
            inputs["attention_mask"] = None
        elif inputs.get("attention_mask") is not None:
            self.see(inputs["attention_mask"])
        self.called = True
        return inputs

    def see(self, mask: torch.Tensor) -> None:
        """Store of the prompt only what its last token sees: ``mask`` [B, P], or [B, 1, P, P], bool or added to logits.

        Raises:
            ValueError: a row of padding.
        """
        real = mask.bool()
        if mask.dim() == 4:
            last = mask[:, 0, -1]
            real = last if mask.dtype == torch.bool else last == 0
        if not bool(real.any(1).all()):
            raise ValueError("attention_mask must leave at least one prompt token in every row, got a row of padding")
        self._real = None if bool(real.all()) else real

    def advance(self, keys: torch.Tensor) -> None:
        """Count the tokens of ``keys`` [B, H, T, D]."""
        self._length += keys.shape[2]
        if self._next_position is None:
            self._next_position = torch.zeros((), dtype=torch.long, device=keys.device)
        self._next_position += keys.shape[2]
        if self.watch is not None and keys.device.type == "cpu":
            self.watch.end()
            self.watch.begin()

    def seen(self) -> int | torch.Tensor:
        """Tokens per row, the prompt's and its padding included; on the device."""
        return 0 if self._next_position is None else self._next_position

    @property
    def length(self) -> int:
        """As `seen`, without asking the device."""
        return self._length

    def prefill(self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store a layer's prompt: query [B, Hq, P, D], keys and values [B, H, P, D], rotated."""
        compressed = self.compressed or self._begin(query, values)
        prompt = self._without_padding(keys), self._without_padding(values)
        share, lens = self.share, self._prompt_lens
        if share is not None and (self.observer is not None or not self.plan.keep_prompt):
            own, own_lens = (prompt[0][share], prompt[1][share]), [lens[entry] for entry in share]
        else:
            own, own_lens = prompt, lens
        if share is not None and self.plan.keep_prompt:
            compressed.prefill(layer, *prompt, lens, share=share)
        else:
            compressed.prefill(layer, *own, own_lens)
        if self.observer is not None:
            self.observer.prefill(compressed, layer, *own, own_lens)

    def decode(self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
               scale: float | None) -> torch.Tensor:
        """Attention [B, Hq, D] of a layer's next token: query [B, Hq, D], keys and values [B, H, D], rotated."""
        assert self.compressed is not None
        out = self.compressed.decode(layer, query, keys, values, scale)
        if self.observer is not None:
            self.observer.decode(layer, query, keys, values, scale, out)
        return out

    def finish(self) -> None:
        """Let no other call continue this generation."""
        self.finished = True

    def _begin(self, query: torch.Tensor, values: torch.Tensor) -> CompressedCache:
        rows, _, slots, head_dim = values.shape
        self._prompt_lens = [slots] * rows
        if self._real is not None:
            real = self._real.to(values.device).expand(rows, -1)
            self._prompt_lens = real.sum(1).tolist()
            self._order = real.int().argsort(dim=1, descending=True, stable=True)[:, :max(self._prompt_lens)]
        following = rows if self.share is None else len(self.share)
        compressed = CompressedCache(
            self.plan, batch_size=following, num_query_heads=query.shape[1], head_dim=head_dim,
            max_prompt=max(self._prompt_lens), num_visual_tokens=self.num_visual_tokens, dtype=values.dtype,
            device=values.device, backend=self.backend,
            shared_prompts=rows if rows < following and self.plan.keep_prompt else None)
        compressed.warmup()  # so that a compilation is announced, and not part of the first token
        self.compressed = compressed
        return compressed

    def _without_padding(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` [B, H, P, D] with the real prompt tokens of every row moved to the front."""
        if self._order is None:
            return tensor
        return torch.take_along_dim(tensor, self._order[:, None, :, None].to(tensor.device), dim=2)


def _unsupported(name: str) -> Callable[..., NoReturn]:
    def method(self: CompressedLayer, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{name} is not possible on a compressed KV cache: what a head evicted is gone")

    return method


class CompressedLayer(KeyHandle, CacheLayerMixin):
    """One layer of a transformers cache, and the handle that its attention function receives."""

    is_sliding = False

    def __init__(self, index: int, generation: Generation) -> None:
        super().__init__()
        self.index = index
        self.generation = generation
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
        if self.generation.finished:
            raise ValueError(f"{CACHE_NAME} must be a fresh cache, got the compressed cache of a finished generate "
                             f"call; leave {CACHE_NAME} out")
        if self.prefilled and key_states.shape[2] != 1:
            raise ValueError(f"after the prompt a compressed cache takes 1 token per step, got {key_states.shape[2]}")
        if self.index == 0:
            self.generation.advance(key_states)
        self.pending = key_states, value_states
        return self, self

    def attend(self, module: torch.nn.Module, query: torch.Tensor, mask: Any, plain: Callable[..., Any],
               **kwargs: Any) -> torch.Tensor:
        """Attention of ``query`` [B, Hq, T, D] over the cache and the tokens of the last `update`: [B, T, Hq, D].

        Raises:
            ValueError: dropout, attention weights, or an argument this attention does not know.
        """
        if kwargs.get("dropout"):
            raise ValueError(f"attention dropout must be 0 with a compressed cache, got {kwargs['dropout']}; call "
                             "model.eval()")
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions must be False with a compressed cache, got True")
        for name in kwargs.keys() - HARMLESS - {"dropout", "scaling"}:
            if kwargs[name] is not None:
                raise ValueError(f"attention argument {name!r} is not supported with a compressed cache; allowed are "
                                 f"{', '.join(sorted(HARMLESS))}")
        if self.pending is None:
            raise ValueError("attention on a compressed cache needs the update of the same step before it, got none")
        (keys, values), self.pending = self.pending, None
        # Under autocast RoPE leaves queries and keys in float32; the cache has the dtype of the values.
        cached = [tensor.detach().to(values.dtype) for tensor in (query, keys, values)]
        if self.prefilled:
            token = (tensor[:, :, 0] for tensor in cached)
            return self.generation.decode(self.index, *token, kwargs.get("scaling")).unsqueeze(1)
        self.generation.prefill(self.index, *cached)
        self.prefilled = True
        return plain(module, query, keys, values, mask, **kwargs)[0]

    def get_seq_length(self) -> int | torch.Tensor:
        """Tokens seen, not tokens stored: transformers takes the next position from it."""
        return self.generation.seen()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.generation.length + query_length, 0

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


class DecoderCache(Cache):
    """The transformers cache of one generation under a plan."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        super().__init__(layers=generation.layers())

    @property
    def compressed(self) -> CompressedCache | None:
        """The underlying cache; None before the prompt."""
        return self.generation.compressed

    def finish(self) -> None:
        """Let no other `generate` call continue this cache."""
        self.generation.finish()

    def release(self) -> None:
        """Free the memory now, whoever still holds this. torch.compile's records of a model that it compiled do, until
        Python collects garbage."""
        self.generation.compressed = None


def take_over(cache: DynamicCache, generation: Generation) -> None:
    """Make an empty cache of transformers that of a generation, for all who hold it."""
    cache.layers = generation.layers()
    cache.layer_class_to_replicate = None  # makes layers that a cache lacks


def generation_of(cache: object) -> Generation | None:
    """Whose cache of transformers this is; None for any other, and for no cache at all."""
    layer = next(iter(getattr(cache, "layers", None) or ()), None)
    return layer.generation if isinstance(layer, CompressedLayer) else None
