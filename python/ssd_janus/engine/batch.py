"""One batch of pictures while it is drawn: static buffers, the prompt, and the step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from ssd_attach.cache import Observer
from ssd_attach.online import Typing
from ssd_kernels import CompressedCache
from ssd_kernels.filters import guided
from ssd_kernels.reference import rotate
from ssd_kernels.sampling import MAX_CODES

from .sampling import CountedNoise, Noise, Sampling
from .timing import StepTiming
from .weights import Layer, Weights

# torch's float32 products on a CPU give a row the same bits in every batch whose size is a multiple of this, and other
# bits in some smaller ones (docs/engine.md, "Seeds"). oneDNN's from packed weights have other bits for one row alone on
# some processors.
ROW_MULTIPLE, PACKED_ROW_MULTIPLE = 8, 2
PREFILL_TOKENS = 4096  # of prompts that go through the layers together, where any number may
# Where it has to be the same number at all times, so that nothing is compiled or set up for another prompt; a power of
# two. By its data sheet an H200 computes with bfloat16 weights as long as it reads them at 206 tokens: products of much
# fewer would take as long, and those of much more longer, which one prompt alone would feel.
PREFILL_CHUNK = 512
SHORTEST_WIDTH = 32  # that prompts are padded to then

LogitsProcessor = Callable[[Any, torch.Tensor], torch.Tensor]


class Batch:
    """Pictures that are drawn together.

    Rows are the prompts of all pictures, then the unconditional prompts of the guided ones, which come first among the
    pictures. A step reads and writes buffers that stay where they are, counts on the device and asks the host nothing,
    so that it can be captured: `advance` and nothing else is the step.

    Attributes:
        cache: of all rows.
        chunk: tokens of prompts that go through a layer's products at once, always; None: as many as there are.
        tokens: long [pictures, steps], on the device; filled column by column.
        done: columns filled.
    """

    def __init__(self, weights: Weights, cache: CompressedCache, guidance: Sequence[float], steps: int,
                 sampling: Sampling, noise: Noise | None, *, row_multiple: int = 1, compiled: bool = False,
                 observer: Observer | None = None, logits_processor: Sequence[LogitsProcessor] = (),
                 timing: StepTiming | None = None) -> None:
        """
        Args:
            weights: of the model.
            cache: fresh, with a row for every picture and one more for every guided picture.
            guidance: scale of each picture, those above 1 first.
            steps: tokens per picture.
            sampling, noise: how tokens are chosen; no noise if greedy.
            row_multiple: pad the rows of every product to a multiple of this.
            compiled: run what lies between two attentions through torch.compile.
            observer: watches the attention.
            logits_processor: called with the logits before guidance [rows, codes], the conditional rows first.
            timing: takes the time of every step.
        """
        if timing is not None:
            weights = weights.timed(functools.partial(timing.timed, "linear"))
        self.weights, self.cache, self.sampling, self.noise = weights, cache, sampling, noise
        self.observer, self.logits_processor, self.timing = observer, logits_processor, timing
        self.pictures, self.guided = len(guidance), sum(scale > 1 for scale in guidance)
        self.rows = self.pictures + self.guided
        device, dtype = weights.device, weights.dtype
        self.row_multiple = row_multiple
        padded = self._padded(self.rows)
        self.scale = torch.tensor(guidance[:self.guided], dtype=torch.float32, device=device)
        pictures = [*range(self.pictures), *range(self.guided)] + [0] * (padded - self.rows)
        self.picture_of_row = torch.tensor(pictures, device=device)
        self.inputs = torch.zeros(padded, weights.embed.shape[1], device=device, dtype=dtype)
        self.attended = torch.zeros(padded, weights.num_query_heads * weights.head_dim, device=device, dtype=dtype)
        self.tokens = torch.zeros(self.pictures, steps, dtype=torch.long, device=device)
        self.column = torch.zeros(1, dtype=torch.long, device=device)
        self.done = 0
        self.lengths = torch.zeros(self.rows, dtype=torch.long, device=device)
        self.chunk = PREFILL_CHUNK if compiled or device.type == "cuda" else None
        self._project = _compiled(project) if compiled and timing is None else project
        self._mix = _compiled(mix) if compiled and timing is None else mix
        # Guidance, filters and draw in one launch, where the noise allows.
        self._numbers = sampling.numbers if isinstance(noise, CountedNoise) and weights.codes <= MAX_CODES else None
        self._decode = cache.decode if timing is None else timing.timed("attention", cache.decode)

    @torch.no_grad()
    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        """Run the prompts, one of every row, and draw the first tokens.

        Equal prompts run once, and prompts of equal `prefill_width` together.
        """
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows_of.setdefault(tuple(prompt), []).append(row)
        widths: dict[int, list[tuple[int, ...]]] = {}
        for prompt in rows_of:
            widths.setdefault(prefill_width(len(prompt), self.chunk), []).append(prompt)
        last = torch.empty_like(self.inputs[:self.rows])
        watched = _WatchedPrompts(self.cache, self.observer, [len(prompt) for prompt in prompts]
                                  ) if self.observer else None
        for width, group in widths.items():
            size = max(1, (self.chunk or PREFILL_TOKENS) // width)
            for part in (group[first:first + size] for first in range(0, len(group), size)):
                rows = [row for prompt in part for row in rows_of[prompt]]
                share = [index for index, prompt in enumerate(part) for _ in rows_of[prompt]]
                hidden = self._prefill(part, width, size if self.chunk else len(part), rows, share, watched)
                last.index_copy_(0, torch.tensor(rows, device=last.device), hidden)
        if watched is not None:
            watched.finish()
        self.lengths.copy_(torch.tensor([len(prompt) for prompt in prompts]))
        self.inputs[:self.rows] = last
        self.prepare()
        self._choose(self.inputs)
        self.done = 1

    def prepare(self) -> None:
        """What comes before a step and is no part of it: noise from generators."""
        if self.noise is not None:
            self.noise.prepare()

    @torch.no_grad()
    def step(self) -> None:
        """Draw the next token of every picture."""
        if self.timing is not None:
            self.timing.begin(self.weights.device)
        self.prepare()
        self.advance()
        self.done += 1
        if isinstance(self.observer, Typing) and self.observer.finished:
            self.observer = None  # from here on the step can be captured
        if self.timing is not None:
            self.timing.end()

    @torch.no_grad()
    def advance(self) -> None:
        """The step proper: layers, head, guidance, sampling, and the input of the next step."""
        hidden = self.inputs
        for index, layer in enumerate(self.weights.layers):
            heads = self._heads(self._project(hidden, layer)[:self.rows])
            attended = self._attend(index, *(tensor.to(self.cache.dtype) for tensor in heads)).flatten(1)
            if len(self.attended) != self.rows or attended.dtype != self.attended.dtype:
                self.attended[:self.rows] = attended
                attended = self.attended
            hidden = self._mix(hidden, attended, layer)
        self._choose(hidden)

    def _padded(self, rows: int) -> int:
        return -(-rows // self.row_multiple) * self.row_multiple

    def _heads(self, projected: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries [N, Hq, D], keys and values [N, H, D] of [N, (Hq + 2 H) D]."""
        weights = self.weights
        heads = projected.view(len(projected), -1, weights.head_dim)
        return heads.split((weights.num_query_heads, weights.num_heads, weights.num_heads), 1)

    def _attend(self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Attention of one layer over the cache; query, keys and values [rows, heads, D], unrotated."""
        if self.observer is None and not self.logits_processor:
            return self._decode(layer, query, keys, values, self.weights.scale, self.weights.rotary)
        # An observer wants them rotated, and who compares runs, some of them observed, wants the same bits in all.
        positions = self.lengths + (self.column - 1)
        query, keys = (rotate(tensor, self.weights.rotary, positions) for tensor in (query, keys))
        out = self._decode(layer, query, keys, values, self.weights.scale)
        if self.observer is not None:
            self.observer.decode(layer, query, keys, values, self.weights.scale, out)
        return out

    def _choose(self, hidden: torch.Tensor) -> None:
        """From the last hidden states [padded rows, hidden] to the tokens of this column and the next inputs."""
        weights = self.weights
        normed = functional.rms_norm(hidden, weights.norm.shape, weights.norm, weights.epsilon)
        logits = weights.head(normed)[:self.rows].float()
        for processor in self.logits_processor:
            logits = processor(self.tokens, logits)
        token = self._token(logits)
        self.tokens.index_copy_(1, self.column, token[:, None])
        self.column += 1
        self.inputs.copy_(weights.following(token.index_select(0, self.picture_of_row)))

    def _token(self, logits: torch.Tensor) -> torch.Tensor:
        """Tokens [pictures] of the logits [rows, codes] before guidance."""
        if self._numbers is not None:
            assert isinstance(self.noise, CountedNoise)
            return self.noise.draw(logits.float().contiguous(), self.scale, self.column, self._numbers)
        noise = None if self.noise is None else self.noise.values(self.column)
        return self.sampling.choose(guided(logits, self.scale), noise)

    def _prefill(self, prompts: Sequence[tuple[int, ...]], width: int, count: int, rows: list[int], share: list[int],
                 watched: _WatchedPrompts | None) -> torch.Tensor:
        """Run different prompts; ``share`` says which of them each of ``rows`` takes.

        Prompts are padded behind their end, where causal attention does not look, to ``width``, and their number to
        ``count``, with tokens whose results nobody reads.

        Returns:
            last hidden states [rows, hidden].
        """
        weights, size = self.weights, count * width
        lengths = [len(prompt) for prompt in prompts]
        padding = [0] * (self._padded(size) - width * len(prompts))
        tokens = torch.tensor([token for prompt in prompts for token in (*prompt, *[0] * (width - len(prompt)))]
                              + padding, device=weights.device)
        # Of what comes behind a prompt, positions beyond the rotary table do not matter.
        positions = torch.arange(width, device=weights.device).clamp(max=len(weights.rotary[0]) - 1).repeat(count)
        keep_prompt = self.cache.plan.keep_prompt
        copies = None if keep_prompt else torch.tensor(share, device=weights.device)
        hidden = functional.embedding(tokens, weights.embed).to(weights.dtype)
        for index, layer in enumerate(weights.layers):
            query, keys, values = self._heads(self._in_chunks(self._project, layer, hidden)[:size])
            query, keys = (rotate(tensor, weights.rotary, positions) for tensor in (query, keys))
            # [prompts, heads, width, D]
            query, keys, values = (tensor.unflatten(0, (count, width)).transpose(1, 2)
                                   for tensor in (query, keys, values))
            stored = [tensor[:len(prompts)].to(self.cache.dtype) for tensor in (keys, values)]
            if keep_prompt:
                self.cache.prefill(index, *stored, lengths, rows=rows, share=share)
            else:
                self.cache.prefill(index, *(tensor[copies] for tensor in stored), [lengths[entry] for entry in share],
                                   rows=rows)
            if watched is not None:
                watched.prefill(index, *stored, lengths, rows, share)
            out = functional.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=weights.scale,
                                                          enable_gqa=weights.num_heads != weights.num_query_heads)
            attended = hidden.new_zeros(len(hidden), out.shape[1] * out.shape[3])
            attended[:size] = out.transpose(1, 2).flatten(2).flatten(0, 1)
            hidden = self._in_chunks(self._mix, layer, hidden, attended)
        ends = torch.tensor([entry * width + lengths[entry] - 1 for entry in share], device=weights.device)
        return hidden.index_select(0, ends)

    def _in_chunks(self, function: Callable[..., torch.Tensor], layer: Layer, *tensors: torch.Tensor) -> torch.Tensor:
        """`project` or `mix` of tensors [tokens, ...], `chunk` tokens at a time."""
        if self.chunk is None or len(tensors[0]) == self.chunk:
            return function(*tensors, layer)
        chunks = zip(*(tensor.split(self.chunk) for tensor in tensors), strict=True)
        return torch.cat([function(*chunk, layer) for chunk in chunks])


class _WatchedPrompts:
    """Collects the prompts of all rows, as an observer wants to see them together."""

    def __init__(self, cache: CompressedCache, observer: Observer, lengths: list[int]) -> None:
        self.cache, self.observer, self.lengths = cache, observer, lengths
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def prefill(self, layer: int, keys: torch.Tensor, values: torch.Tensor, lengths: list[int], rows: list[int],
                share: list[int]) -> None:
        if layer == len(self.layers):
            size = (len(self.lengths), keys.shape[1], max(self.lengths), keys.shape[3])
            self.layers.append((keys.new_zeros(size), values.new_zeros(size)))
        for store, tensor in zip(self.layers[layer], (keys, values), strict=True):
            for row, entry in zip(rows, share, strict=True):
                store[row, :, :lengths[entry]] = tensor[entry, :, :lengths[entry]]

    def finish(self) -> None:
        for layer, (keys, values) in enumerate(self.layers):
            self.observer.prefill(self.cache, layer, keys, values, self.lengths)


def prefill_width(length: int, chunk: int | None) -> int:
    """Tokens that a prompt of ``length`` is padded to: none is added where there is no constant ``chunk``; where there
    is, the attention sees powers of two from `SHORTEST_WIDTH` on."""
    return length if chunk is None else max(SHORTEST_WIDTH, 1 << (length - 1).bit_length())


def project(hidden: torch.Tensor, layer: Layer) -> torch.Tensor:
    """Queries, keys and values [rows, (Hq + 2 H) D] of ``hidden`` [rows, hidden]."""
    return layer.qkv(functional.rms_norm(hidden, layer.input_norm.shape, layer.input_norm, layer.epsilon[0]))


def mix(hidden: torch.Tensor, attended: torch.Tensor, layer: Layer) -> torch.Tensor:
    """The rest of a layer: output projection and the gated feed-forward network (SwiGLU, arXiv 2002.05202)."""
    hidden = layer.out(attended, plus=hidden)
    normed = functional.rms_norm(hidden, layer.post_norm.shape, layer.post_norm, layer.epsilon[1])
    return layer.down(layer.gated(normed), plus=hidden)


@functools.cache
def _compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return torch.compile(function, dynamic=False)
