"""Training batches, drawn on the fly: functions of (seed, step), so a resumed run draws the same data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ssd_shapes import text, tokens, world

_SHAPES, _COLORS = list(world.SHAPES), list(world.COLORS)


NEAR = 1  # patches around an object of which no token is left out
FAR = 48  # tokens further away that a picture keeps at least


@dataclass(frozen=True)
class Batch:
    """Prompts, image tokens, and what each image token shows. int64 if nothing else is said.

    ``prompts`` [B, P] end in the begin-of-image token. Of the 576 tokens of a picture K are predicted, those at
    ``places`` [B, K] in rising order, 0 first; ``codes`` [B, K] are they, and ``before`` [B, K - 1] the tokens before
    those at places past the first: what the model sees there. ``weights`` [B, K], float32, is how many of the 576
    tokens each stands for. ``shapes`` and ``colors`` [B, K] number the object that a token shows, -1 for background.
    ``begins`` [B, K], boolean, is true at the first token, row by row, of every object; ``remaining`` [B, K] is the
    number of objects that begin at a token or after it, and ``coming`` [B, K] where the next of them does, 576 if
    there is none. ``empty`` [B] is the code of the background.
    """

    prompts: Tensor
    places: Tensor
    weights: Tensor
    before: Tensor
    codes: Tensor
    shapes: Tensor
    colors: Tensor
    begins: Tensor
    remaining: Tensor
    coming: Tensor
    empty: Tensor


def remaining_objects(begins: Tensor) -> Tensor:
    """How many objects begin at a token or after it: boolean [B, 576] to int64 [B, 576]."""
    return begins.flip(1).cumsum(1).flip(1)


def next_begin(begins: Tensor) -> Tensor:
    """The first token at or after each at which an object begins, 576 if none: boolean [B, 576] to int64 [B, 576]."""
    places = torch.where(begins, torch.arange(tokens.TOKENS), tokens.TOKENS)
    return places.flip(1).cummin(1).values.flip(1)


def thin(shapes: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Choose the tokens to train on: all near objects, and some of the plain background.

    Most of a picture is background, predicted with hardly a doubt and paid for like the rest. Every token that is left
    out also misses as context, so that a model has to be trained on whole pictures in the end.

    Args:
        shapes: int64 [B, 576], -1 for background.
        rng: draws the far tokens.

    Returns:
        ``places`` [B, K] and ``weights`` [B, K] as in `Batch`; K is what the fullest picture needs. Weighted means over
        the tokens kept are unbiased.
    """
    shown = (shapes >= 0).float().view(-1, 1, tokens.GRID, tokens.GRID)
    near = F.max_pool2d(shown, 2 * NEAR + 1, 1, NEAR).flatten(1) > 0
    near[:, 0] = True  # the model's view of it is the begin-of-image token
    count = min(int(near.sum(1).max()) + FAR, tokens.TOKENS)
    order = torch.from_numpy(rng.random(near.shape)) - near.double()  # near ones first, the rest at random
    places = order.argsort(1)[:, :count].sort(1).values
    kept = near.gather(1, places)
    far = (tokens.TOKENS - near.sum(1)) / (count - near.sum(1)).clamp(min=1)
    return places, torch.where(kept, 1.0, far[:, None])


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
        late_from: int | None = None,
        whole_from: int = 0,
        open_colors_from: int = 0,
    ):
        """
        Args:
            tokenizer, book: for prompts and pictures.
            size: B.
            blank: share of prompts that are blanked, for guidance.
            seed, split: of the data.
            late_from: from this step on families are drawn by ``world.LATE_FAMILIES``.
            whole_from: until this step most of the background is left out (`thin`).
            open_colors_from: until this step colours that prompts leave open make no held-out pair with a shape
                either. A model that never sees a shape in some colour comes to know that there is no such thing, and
                draws another colour or shape when asked for it.
        """
        self.open_colors_from = open_colors_from
        self.tokenizer, self.book, self.late_from, self.whole_from = tokenizer, book, late_from, whole_from
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
        scenes = [world.draw_scene(rng, prompt, step >= self.open_colors_from) for prompt, _ in drawn]
        pictures = np.stack([world.render(scene) for scene in scenes])
        shapes, colors, begins = (torch.from_numpy(np.stack(part)) for part in zip(*map(label, scenes), strict=True))
        prompts = torch.tensor([[*ids, self.boi] for _, ids in drawn])
        # The unconditional rows as transformers builds them: all but <bos> and the boi token is padding.
        blanked = torch.from_numpy(rng.random(self.size) < self.blank)
        prompts[blanked, 1:-1] = self.pad
        found = self.book.encode(torch.from_numpy(pictures))
        codes = tokens.mark_margin(found)
        places, weights = torch.arange(tokens.TOKENS).expand_as(codes), torch.ones(codes.shape)
        if step < self.whole_from:
            places, weights = thin(shapes, rng)
        whole = (codes, shapes, colors, begins, remaining_objects(begins), next_begin(begins))
        before = codes.gather(1, places[:, 1:] - 1)
        empty = found.mode(1).values
        return Batch(prompts, places, weights, before, *(part.gather(1, places) for part in whole), empty)
