"""Rollouts for training: samples of prompts with the log-probabilities of their tokens, as the compressed caches saw
them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from ssd_kernels.arguments import check_int

from ..progress import ProgressCallback
from .sampling import Sampling

if TYPE_CHECKING:
    from .engine import Engine


@dataclass(frozen=True)
class Rollout:
    """Samples of prompts, all of the first prompt's before those of the second. Tensors are on the engine's device.

    Attributes:
        tokens: long [prompts * samples, steps].
        drawn: float32 [prompts * samples, steps], log-probability of every token under the distribution that it was
            drawn from, after guidance, temperature, top-k and top-p; 0 for greedy ones. None if not asked for.
        plain: the same after guidance alone.
        batches: pictures of each batch.
        cache_bytes: of the largest batch.
    """

    tokens: torch.Tensor
    drawn: torch.Tensor | None
    plain: torch.Tensor | None
    batches: tuple[int, ...]
    cache_bytes: int


@dataclass(frozen=True)
class Recording(Sampling):
    """Chooses as another `Sampling` and writes down how likely the choice was.

    Attributes:
        drawn, plain: float32 [pictures, steps], as of `Rollout`; NaN until written.
        column: long [1], of the next token; on the device, so that a captured step counts.
    """

    drawn: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    plain: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    column: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    numbers = None  # by which a choice could be made in one launch, which would keep no logits

    @classmethod
    def of_pictures(cls, sampling: Sampling, pictures: int, steps: int, device: torch.device) -> Recording:
        """For a batch of pictures of ``steps`` tokens."""
        drawn, plain = (torch.full((pictures, steps), torch.nan, device=device) for _ in range(2))
        return cls(sampling.greedy, sampling.warpers, drawn, plain, torch.zeros(1, dtype=torch.long, device=device))

    def choose(self, logits: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """As `Sampling.choose`."""
        restricted = logits
        for warper in self.warpers:
            restricted = warper(None, restricted)
        token = Sampling(self.greedy).choose(restricted, noise)
        self.plain.index_copy_(1, self.column, _log_probability(logits, token))
        self.drawn.index_copy_(1, self.column, torch.zeros_like(token, dtype=torch.float32)[:, None] if self.greedy
                               else _log_probability(restricted, token))
        self.column.add_(1)
        return token


def _log_probability(logits: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """[N, 1] of tokens [N] by logits [N, codes]."""
    return logits.log_softmax(-1).gather(1, token[:, None])


def rollout(engine: Engine, prompts: Sequence[Sequence[int] | torch.Tensor], samples: int = 1,
            seeds: int | Sequence[int] | None = 0, *, guidance: float = 5.0, sampling: Sampling | None = None,
            batch_size: int | None = None, steps: int | None = None, logprobs: bool = True,
            progress: ProgressCallback | None = None) -> Rollout:
    """Draw ``samples`` pictures of every prompt.

    Weights may have changed in place since the last call; they are read anew, and nothing else is made again.

    Args:
        engine: that draws; its plan says what the caches keep.
        prompts: token numbers of each, begin-of-image included, without padding; lengths may differ.
        samples: pictures of each prompt. A backend that can, stores their prompt once.
        seeds: of the first picture, the others counting on, or one per picture; None draws from torch's own generator.
        guidance, sampling, steps: as `Engine.generate`.
        batch_size: most pictures at once; None for as many as fit.
        logprobs: False leaves log-probabilities out.
        progress: ``progress(done_steps, all_steps)``.

    Raises:
        TypeError, ValueError: an argument is wrong; nothing has been drawn then.
        MemoryError: a batch did not fit after all.
    """
    check_int("samples", samples, 1)
    if isinstance(guidance, bool) or not isinstance(guidance, (int, float)):
        raise TypeError(f"guidance must be one number for all pictures, got {guidance!r}")
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    request = engine._request(repeated, guidance, seeds, steps, sampling, None)
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size must be None or an int of at least 1, got {batch_size!r}")
    size = engine._fitting(request, min(len(repeated), batch_size or len(repeated)))
    parts = [range(first, min(first + size, len(repeated))) for first in range(0, len(repeated), size)]
    found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    done, cache_bytes = 0, 0
    for numbers in parts:
        chosen = request.sampling
        record = Recording.of_pictures(chosen, len(numbers) if logprobs else 0, request.steps, engine.device)
        batch = engine._started(replace(request, sampling=record if logprobs else chosen), numbers)
        for _ in engine._steps(batch, request.steps):
            done += 1
            if progress is not None:
                progress(done, request.steps * len(parts))
        found.append((batch.tokens, record.drawn, record.plain))
        cache_bytes = max(cache_bytes, batch.cache.nbytes)
        del batch  # or the next one's cache would be made while this one holds its memory
    tokens, drawn, plain = (torch.cat(each) for each in zip(*found, strict=True))
    return Rollout(tokens, drawn if logprobs else None, plain if logprobs else None, tuple(map(len, parts)),
                   cache_bytes)
