"""What the language model is trained on: image tokens, and, in training only, what the picture is to show."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import JanusForConditionalGeneration

from ssd_shapes import tokens, world
from ssd_shapes.data import Batch
from ssd_shapes.janus import HIDDEN

MOST_OBJECTS = 4


class SceneHead(nn.Module):
    """Reads from a hidden state what the next token is to show; used in training only.

    Whether a picture fits its prompt is decided at the few tokens where an object begins, and the loss of image tokens
    alone hardly notices. Asking the last hidden states for the shape and colour of the object at hand, and
    for how many are still to begin, teaches the layers below to look these up in the prompt.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parts = (len(world.SHAPES), len(world.COLORS), MOST_OBJECTS + 1)
        self.weight = nn.Parameter(torch.zeros(sum(self.parts), HIDDEN))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [B, 576, C] to logits of shape, colour and number of objects to begin, float32."""
        shapes, colors, remaining = F.linear(hidden.float(), self.weight.float()).split(self.parts, -1)
        return shapes, colors, remaining


def remaining_objects(begins: Tensor) -> Tensor:
    """How many objects begin at a token or after it: boolean [B, 576] to int64 [B, 576]."""
    return begins.flip(1).cumsum(1).flip(1)


def scene_loss(read: tuple[Tensor, Tensor, Tensor], batch: Batch) -> Tensor:
    """Nats of shape and colour where objects begin, of shape all over them, and of the number still to begin."""
    shapes, colors, remaining = read
    begins, shown = batch.begins, batch.shapes >= 0
    return (
        F.cross_entropy(shapes[begins], batch.shapes[begins])
        + F.cross_entropy(colors[begins], batch.colors[begins])
        + F.cross_entropy(shapes[shown], batch.shapes[shown])
        + F.cross_entropy(remaining.flatten(0, 1), remaining_objects(begins).flatten())
    )


def scene_accuracy(read: tuple[Tensor, Tensor, Tensor], batch: Batch) -> dict[str, float]:
    """How often the most probable reading is right: shape and colour where objects begin, number at the first token."""
    shapes, colors, remaining = (part.argmax(-1) for part in read)
    begins = batch.begins
    return {
        "shape": (shapes[begins] == batch.shapes[begins]).float().mean().item(),
        "color": (colors[begins] == batch.colors[begins]).float().mean().item(),
        "number": (remaining[:, 0] == begins.sum(1)).float().mean().item(),
    }


def predict(model: JanusForConditionalGeneration, batch: Batch) -> tuple[Tensor, Tensor]:
    """Teacher-forced hidden states [B, 576, C] and logits [B, 576, 1024] of the image tokens, in bfloat16."""
    janus = model.model
    with torch.autocast("cpu", torch.bfloat16):
        codes = janus.generation_aligner(janus.generation_embeddings(batch.codes[:, :-1]))
        embedded = torch.cat([janus.language_model.embed_tokens(batch.prompts), codes], 1)
        hidden = janus.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state[:, -tokens.TOKENS :]
        return hidden, janus.generation_head(hidden)


def token_loss(logits: Tensor, codes: Tensor) -> Tensor:
    """Mean cross-entropy of the image tokens, nats. ``logits`` [B, 576, 1024], ``codes`` [B, 576]."""
    return F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())


def identity_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of the tokens that begin an object among all codes but the background, over 576, nats.

    Weighting these tokens' own cross-entropy would teach the model to draw more objects; given that an object begins,
    the likelihood has the same optimum whatever its weight. ``logits`` [B, 576, 1024].
    """
    rows, places = batch.begins.nonzero(as_tuple=True)
    background = batch.codes.mode(dim=1).values
    # A corner that fills little of its patch may have the background's own code: nothing to tell apart there.
    visible = batch.codes[rows, places] != background[rows]
    rows, places = rows[visible], places[visible]
    masked = logits[rows, places].float().scatter(1, background[rows, None], -math.inf)
    return F.cross_entropy(masked, batch.codes[rows, places], reduction="sum") / batch.codes.numel()
