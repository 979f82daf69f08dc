"""Training batches, drawn on the fly: functions of (seed, step), so a resumed run draws the same data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ssd_shapes import text, tokens, world


@dataclass(frozen=True)
class Batch:
    """``prompts`` [B, P] end in the begin-of-image token; ``codes`` [B, 576] are the image tokens (int64)."""

    prompts: Tensor
    codes: Tensor


class Batches:
    """Batches of prompts of one length, so that plain causal attention needs no padding mask."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        book: tokens.CodeBook,
        size: int = 16,
        blank: float = 0.1,
        seed: int = 0,
        split: world.Split = "train",
    ):
        self.tokenizer, self.book = tokenizer, book
        self.size, self.blank, self.seed, self.split = size, blank, seed, split
        self.boi, self.pad = (text.token_id(tokenizer, token) for token in (text.BOI, text.PAD))

    def _draw(self, rng: np.random.Generator) -> tuple[world.Prompt, list[int]]:
        prompt = world.draw_prompt(rng, self.split)
        return prompt, self.tokenizer.backend_tokenizer.encode(prompt.text).ids

    def __call__(self, step: int) -> Batch:
        """The batch of one step. The first prompt sets the length; others are drawn until they have it too,
        which leaves the distribution of prompts unchanged."""
        rng = np.random.default_rng([self.seed, step, self.split == "test"])
        first = self._draw(rng)
        drawn = [first]
        while len(drawn) < self.size:
            other = self._draw(rng)
            if len(other[1]) == len(first[1]):
                drawn.append(other)
        pictures = np.stack([world.render(world.draw_scene(rng, prompt)) for prompt, _ in drawn])
        prompts = torch.tensor([[*ids, self.boi] for _, ids in drawn])
        # The unconditional rows as transformers builds them: all but <bos> and the boi token is padding.
        blanked = torch.from_numpy(rng.random(self.size) < self.blank)
        prompts[blanked, 1:-1] = self.pad
        return Batch(prompts, self.book.encode(torch.from_numpy(pictures)))
