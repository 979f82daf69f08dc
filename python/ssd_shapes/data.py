"""Training batches, drawn on the fly: functions of (seed, step), so a resumed run draws the same data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ssd_shapes import text, tokens, world

_SHAPES, _COLORS = list(world.SHAPES), list(world.COLORS)


@dataclass(frozen=True)
class Batch:
    """Prompts, image tokens, and what each image token shows.

    ``prompts`` [B, P] end in the begin-of-image token; ``codes`` [B, 576] are the image tokens. ``shapes`` and
    ``colors`` [B, 576] number the object that a token shows, -1 for background. All int64. ``begins`` [B, 576],
    boolean, is true at the first token, row by row, of every object.
    """

    prompts: Tensor
    codes: Tensor
    shapes: Tensor
    colors: Tensor
    begins: Tensor


def label(scene: world.Scene) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """``shapes``, ``colors`` and ``begins`` of ``Batch`` for one scene, [576] each."""
    shares = np.zeros((len(scene.objects), world.SIZE, world.SIZE), np.float32)
    for share, item in zip(shares, scene.objects, strict=True):
        half, (x, y) = item.radius + 1, item.center
        share[y - half : y + half + 1, x - half : x + half + 1] = world.coverage(item.shape, item.radius)[..., 0]
    shares = shares.reshape(-1, tokens.GRID, tokens.PATCH, tokens.GRID, tokens.PATCH).mean((2, 4))
    shares = shares.reshape(-1, tokens.TOKENS)
    owner = np.where(shares.max(0) >= world.SHOWN, shares.argmax(0), -1)
    # Index -1 reads the entry that is appended for the background.
    shapes = np.array([*(_SHAPES.index(item.shape) for item in scene.objects), -1])[owner]
    colors = np.array([*(_COLORS.index(item.color) for item in scene.objects), -1])[owner]
    begins = np.zeros(tokens.TOKENS, bool)
    begins[[int(np.argmax(owner == number)) for number in range(len(scene.objects))]] = True
    return shapes, colors, begins


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
        free_steps: int = 0,
        late_from: int | None = None,
        margin_from: int | None = None,
    ):
        """
        Args:
            tokenizer, book: for prompts and pictures.
            size: B.
            blank: share of prompts that are blanked, for guidance.
            seed, split: of the data.
            free_steps: until this step objects stand anywhere, later where the world puts them. More kinds of edges
                are harder to learn.
            margin_from: from this step on the left column is marked (`tokens.mark_margin`).
            late_from: from this step on families are drawn by ``world.LATE_FAMILIES``.
        """
        self.tokenizer, self.book, self.free_steps, self.late_from = tokenizer, book, free_steps, late_from
        self.margin_from = margin_from
        self.size, self.blank, self.seed, self.split = size, blank, seed, split
        self.boi, self.pad = (text.token_id(tokenizer, token) for token in (text.BOI, text.PAD))

    def _draw(self, rng: np.random.Generator, shares: dict[str, float]) -> tuple[world.Prompt, list[int]]:
        prompt = world.draw_prompt(rng, self.split, shares=shares)
        return prompt, self.tokenizer.backend_tokenizer.encode(prompt.text).ids

    def __call__(self, step: int) -> Batch:
        """The batch of one step. The first prompt sets the length; others are drawn until they have it too,
        which leaves the distribution of prompts unchanged."""
        rng = np.random.default_rng([self.seed, step, self.split == "test"])
        late = self.late_from is not None and step >= self.late_from
        shares = world.LATE_FAMILIES if late else world.FAMILIES
        first = self._draw(rng, shares)
        drawn = [first]
        while len(drawn) < self.size:
            other = self._draw(rng, shares)
            if len(other[1]) == len(first[1]):
                drawn.append(other)
        places = 1 if step < self.free_steps else world.PATCH
        scenes = [world.draw_scene(rng, prompt, places) for prompt, _ in drawn]
        pictures = np.stack([world.render(scene) for scene in scenes])
        shapes, colors, begins = (torch.from_numpy(np.stack(part)) for part in zip(*map(label, scenes), strict=True))
        prompts = torch.tensor([[*ids, self.boi] for _, ids in drawn])
        # The unconditional rows as transformers builds them: all but <bos> and the boi token is padding.
        blanked = torch.from_numpy(rng.random(self.size) < self.blank)
        prompts[blanked, 1:-1] = self.pad
        codes = self.book.encode(torch.from_numpy(pictures))
        if self.margin_from is not None and step >= self.margin_from:
            codes = tokens.mark_margin(codes)
        return Batch(prompts, codes, shapes, colors, begins)
