"""One batch of pictures while it is drawn: static buffers, the prompt, and the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ssd_attach.cache import Observer
from ssd_attach.online import Typing
from ssd_kernels import CompressedCache
from ssd_kernels.filters import guided
from ssd_kernels.reference import rotate
from ssd_kernels.sampling import MAX_CODES

from .layers import Layers, PromptGroup, finished, grouped
from .sampling import CountedNoise, Noise, Sampling
from .timing import StepTiming
from .weights import Weights

LogitsProcessor = Callable[[Any, torch.Tensor], torch.Tensor]


class Batch:
    """Pictures that are drawn together.

    Rows are the prompts of all pictures, then the unconditional prompts of the guided ones, which come first among the
    pictures. A step reads and writes buffers that stay where they are, counts on the device and asks the host nothing,
    so that it can be captured: `advance` and nothing else is the step.

    Attributes:
        cache: of all rows.
        layers: that the rows go through.
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
        self.layers = Layers(weights, row_multiple=row_multiple, compiled=compiled, timing=timing)
        self.weights, self.cache, self.sampling, self.noise = self.layers.weights, cache, sampling, noise
        self.observer, self.logits_processor, self.timing = observer, logits_processor, timing
        self.pictures, self.guided = len(guidance), sum(scale > 1 for scale in guidance)
        self.rows = self.pictures + self.guided
        device, dtype = weights.device, weights.dtype
        padded = self.layers.padded(self.rows)
        self.scale = torch.tensor(guidance[:self.guided], dtype=torch.float32, device=device)
        pictures = [*range(self.pictures), *range(self.guided)] + [0] * (padded - self.rows)
        self.picture_of_row = torch.tensor(pictures, device=device)
        self.inputs = torch.zeros(padded, weights.embed.shape[1], device=device, dtype=dtype)
        self.attended = torch.zeros(padded, weights.num_query_heads * weights.head_dim, device=device, dtype=dtype)
        self.tokens = torch.zeros(self.pictures, steps, dtype=torch.long, device=device)
        self.column = torch.zeros(1, dtype=torch.long, device=device)
        self.done = 0
        self.lengths = torch.zeros(self.rows, dtype=torch.long, device=device)
        # Guidance, filters and draw in one launch, where the noise allows.
        self._numbers = sampling.numbers if isinstance(noise, CountedNoise) and weights.codes <= MAX_CODES else None
        self._decode = cache.decode if timing is None else timing.timed("attention", cache.decode)

    @torch.no_grad()
    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        """Run the prompts, one of every row, and draw the first tokens."""
        last = torch.empty_like(self.inputs[:self.rows])
        watched = _WatchedPrompts(self.cache, self.observer, [len(prompt) for prompt in prompts]
                                  ) if self.observer else None
        for group in grouped(prompts, self.layers.chunk):

            def store(layer: int, keys: torch.Tensor, values: torch.Tensor, group: PromptGroup = group) -> None:
                group.start(self.cache, layer, keys, values)
                if watched is not None:
                    watched.prefill(layer, keys, values, group)

            hidden = finished(self.layers.prompts(group, self.cache.dtype, store))
            last.index_copy_(0, torch.tensor(group.rows, device=last.device), hidden)
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
        caches = () if self._watched else (self.cache,)
        self._choose(self.layers.step(self.inputs, self.rows, self.attended, self._attend, caches))

    @property
    def _watched(self) -> bool:
        """Whether somebody wants to see what is attended to, or will be compared with who does."""
        return self.observer is not None or bool(self.logits_processor)

    def _attend(self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Attention of one layer over the cache; query, keys and values [rows, heads, D], unrotated."""
        if not self._watched:
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
        logits = self.layers.logits(hidden, self.rows)
        for processor in self.logits_processor:
            logits = processor(self.tokens, logits)
        token = self._token(logits)
        self.tokens.index_copy_(1, self.column, token[:, None])
        self.column += 1
        self.inputs.copy_(self.weights.following(token.index_select(0, self.picture_of_row)))

    def _token(self, logits: torch.Tensor) -> torch.Tensor:
        """Tokens [pictures] of the logits [rows, codes] before guidance."""
        if self._numbers is not None:
            assert isinstance(self.noise, CountedNoise)
            return self.noise.draw(logits.float().contiguous(), self.scale, self.column, self._numbers)
        noise = None if self.noise is None else self.noise.values(self.column)
        return self.sampling.choose(guided(logits, self.scale), noise)


class _WatchedPrompts:
    """Collects the prompts of all rows, as an observer wants to see them together."""

    def __init__(self, cache: CompressedCache, observer: Observer, lengths: list[int]) -> None:
        self.cache, self.observer, self.lengths = cache, observer, lengths
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def prefill(self, layer: int, keys: torch.Tensor, values: torch.Tensor, group: PromptGroup) -> None:
        if layer == len(self.layers):
            size = (len(self.lengths), keys.shape[1], max(self.lengths), keys.shape[3])
            self.layers.append((keys.new_zeros(size), values.new_zeros(size)))
        for store, tensor in zip(self.layers[layer], (keys, values), strict=True):
            for row, entry in zip(group.rows, group.share, strict=True):
                length = len(group.prompts[entry])
                store[row, :, :length] = tensor[entry, :, :length]

    def finish(self) -> None:
        for layer, (keys, values) in enumerate(self.layers):
            self.observer.prefill(self.cache, layer, keys, values, self.lengths)
