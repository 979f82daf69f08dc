"""Slots whose pictures bring their own caches: where a step is not captured, as on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ssd_kernels import CompressedCache
from ssd_kernels.filters import guided

from .sampling import noise_for
from .slots import Kept, Lineup, Picture, Slots


class OwnCaches(Slots):
    """A cache for every picture, as large as its prompt needs, and products of the rows that are there: a step costs
    what its pictures cost. For steps that are not captured."""

    any_plan = True
    _lineup: Lineup | None = None

    @property
    def nbytes(self) -> int:
        return sum(picture.cache.nbytes for picture in self.running.values() if picture.cache is not None)

    def prepare(self, lineup: Lineup) -> None:
        shape, weights = self.engine.shape, self.weights
        for picture in lineup.pictures:
            request = picture.request
            picture.cache = CompressedCache(
                self.plan_of(request), 1 + request.guided, shape.num_query_heads, shape.head_dim, len(request.prompt),
                shape.num_visual_tokens, self.dtype, weights.device, self.engine.backend)
            picture.cache.warmup(rotary=True)
            if not request.sampling.greedy:
                picture.noise = noise_for(1, weights.codes, [request.seed], weights.device)

    def store(self, lineup: Lineup, part: Kept, kept: list[Kept]) -> None:
        group, layer, keys, values = part
        for row, entry in zip(group.rows, group.share, strict=True):
            second, index = divmod(row, len(lineup.pictures))
            cache, one = lineup.pictures[index].cache, slice(entry, entry + 1)
            assert cache is not None
            cache.prefill(layer, keys[one], values[one], [len(group.prompts[entry])], rows=[second])

    def _first(self, lineup: Lineup, logits: torch.Tensor, kept: Sequence[Kept]) -> None:
        self._write(lineup, self._token(lineup, logits))
        self._lineup = None

    def _empty(self, slot: int) -> None:
        self._lineup = None

    def _step(self) -> None:
        if self._lineup is None:
            self._arrange()
        lineup = self._lineup
        assert lineup is not None
        hidden = self.layers.step(self._inputs, lineup.rows, self._attended, self._attend, self._caches)
        token = self._token(lineup, self.layers.logits(hidden.index_select(0, self._rows), lineup.rows))
        self._write(lineup, token)
        self._inputs = self.weights.following(token.index_select(0, self._picture_of_row))

    def _arrange(self) -> None:
        """After pictures have joined or left."""
        weights = self.weights
        self._lineup = lineup = Lineup.of(list(self.running.values()), self.layers)
        padded, pictures = len(lineup.picture_of_row), len(lineup.pictures)
        self._caches = [picture.cache for picture in lineup.pictures if picture.cache is not None]
        # Rows go through the layers cache by cache: a picture's row, and its unconditional one if there is one.
        order = torch.tensor([row for index in range(pictures) for row in range(index, lineup.rows, pictures)]
                             + list(range(lineup.rows, padded)), device=weights.device)
        self._rows = order.argsort()
        self._picture_of_row = lineup.picture_of_row[order]
        self._attended = torch.zeros(padded, weights.num_query_heads * weights.head_dim, device=weights.device,
                                     dtype=weights.dtype)
        self._out = torch.empty(lineup.rows, weights.num_query_heads, weights.head_dim, device=weights.device,
                                dtype=self.dtype)
        columns = torch.tensor([picture.done - 1 for picture in lineup.pictures], device=weights.device)
        token = self.tokens[lineup.slots, columns]
        self._inputs = weights.following(token.index_select(0, self._picture_of_row))

    def _attend(self, layer: int, *heads: torch.Tensor) -> torch.Tensor:
        weights, first = self.weights, 0
        for cache in self._caches:
            own = slice(first, first + cache.batch_size)
            self._out[own] = cache.decode(layer, *(tensor[own] for tensor in heads), weights.scale, weights.rotary)
            first = own.stop
        return self._out

    def _token(self, lineup: Lineup, logits: torch.Tensor) -> torch.Tensor:
        """Tokens [pictures] of logits [rows, codes]."""
        logits = guided(logits, lineup.scale)
        token = lineup.slots.new_empty(len(lineup.pictures))
        for sampling, of in lineup.samplings:
            numbers = range(len(lineup.pictures)) if of is None else of.tolist()
            noise = None if sampling.greedy else torch.cat([self._noise(lineup.pictures[index]) for index in numbers])
            token[slice(None) if of is None else of] = sampling.choose(logits if of is None else logits[of], noise)
        return token

    def _noise(self, picture: Picture) -> torch.Tensor:
        """float32 [1, codes] of the picture's next token."""
        assert picture.noise is not None
        picture.noise.prepare()
        return picture.noise.values(torch.tensor([picture.done], device=self.weights.device))

    def _write(self, lineup: Lineup, token: torch.Tensor) -> None:
        columns = torch.tensor([picture.done for picture in lineup.pictures], device=token.device)
        self.tokens[lineup.slots, columns] = token
