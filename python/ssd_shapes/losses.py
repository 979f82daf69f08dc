"""What the language model is trained on: image tokens, and, in training only, what the picture is to show."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import JanusForConditionalGeneration

from ssd_shapes import tokens, world
from ssd_shapes.data import Batch
from ssd_shapes.janus import HIDDEN

MOST_OBJECTS = 4
PLACE_WEIGHT = 0.25
HAS_BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # else products of bfloat16 are slower
PRODUCTS = torch.bfloat16 if HAS_BFLOAT16 else torch.float32


class Reading(NamedTuple):
    """Logits, float32 [B, K, n], of what hidden states say about the token they predict."""

    shape: Tensor  # of the object that it shows
    color: Tensor
    remaining: Tensor  # number of objects that begin there or later
    row: Tensor  # where it is
    column: Tensor
    next_row: Tensor  # where the next object begins
    next_column: Tensor


class SceneHead(nn.Module):
    """Reads from a hidden state what the next token is to show; used in training only.

    Whether a picture fits its prompt is decided at the few tokens where an object begins, and the loss of image tokens
    alone hardly notices. Asking the last hidden states for the shape and colour of the object at hand, for how many
    are still to begin and where, teaches the layers below to look these up in the prompt; asking where the token is
    keeps objects from running over the right edge into the next row.
    """

    def __init__(self) -> None:
        super().__init__()
        places = (tokens.GRID,) * 4
        self.parts = (len(world.SHAPES), len(world.COLORS), MOST_OBJECTS + 1, *places)
        self.weight = nn.Parameter(torch.zeros(sum(self.parts), HIDDEN))

    def forward(self, hidden: Tensor) -> Reading:
        """Hidden states [B, K, C] to what they say."""
        return Reading(*F.linear(hidden.float(), self.weight.float()).split(self.parts, -1))


def scene_loss(read: Reading, batch: Batch) -> Tensor:
    """Nats of shape and colour where objects begin, of shape all over them, of the number still to begin, and,
    by ``PLACE_WEIGHT``, of where the token is and where the next object begins."""
    begins, shown, here, coming = batch.begins, batch.shapes >= 0, batch.places, batch.coming
    some = coming < tokens.TOKENS
    places = (
        F.cross_entropy(read.row.flatten(0, 1), (here // tokens.GRID).flatten())
        + F.cross_entropy(read.column.flatten(0, 1), (here % tokens.GRID).flatten())
        + F.cross_entropy(read.next_row[some], coming[some] // tokens.GRID)
        + F.cross_entropy(read.next_column[some], coming[some] % tokens.GRID)
    )
    return (
        F.cross_entropy(read.shape[begins], batch.shapes[begins])
        + F.cross_entropy(read.color[begins], batch.colors[begins])
        + F.cross_entropy(read.shape[shown], batch.shapes[shown])
        + F.cross_entropy(read.remaining.flatten(0, 1), batch.remaining.flatten())
        + PLACE_WEIGHT * places
    )


def scene_accuracy(read: Reading, batch: Batch) -> dict[str, float]:
    """How often the most probable reading is right: shape and colour where objects begin, number at the first token,
    column everywhere."""
    shapes, colors, remaining = (part.argmax(-1) for part in read[:3])
    begins = batch.begins
    return {
        "shape": (shapes[begins] == batch.shapes[begins]).float().mean().item(),
        "color": (colors[begins] == batch.colors[begins]).float().mean().item(),
        "number": (remaining[:, 0] == batch.remaining[:, 0]).float().mean().item(),
        "column": (read.column.argmax(-1) == batch.places % tokens.GRID).float().mean().item(),
    }


def predict(
    model: JanusForConditionalGeneration, batch: Batch, dtype: torch.dtype = PRODUCTS
) -> tuple[Tensor, Tensor]:
    """Teacher-forced hidden states [B, K, C] and logits [B, K, 1024] of the image tokens at ``batch.places``.

    Matrix products are of ``dtype``, bfloat16 or the weights' float32.
    """
    janus, (size, length) = model.model, batch.prompts.shape
    # The begin-of-image token, the last of the prompt, predicts token 0.
    text = torch.arange(length).expand(size, length)
    positions = torch.cat([text, batch.places[:, 1:] + length - 1], 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        codes = janus.generation_aligner(janus.generation_embeddings(batch.before))
        embedded = torch.cat([janus.language_model.embed_tokens(batch.prompts), codes], 1)
        everything = torch.ones_like(positions)  # without it transformers takes a jump in positions for a new sequence
        states = janus.language_model(
            inputs_embeds=embedded, attention_mask=everything, position_ids=positions, use_cache=False
        )
        hidden = states.last_hidden_state[:, length - 1 :]
        return hidden, janus.generation_head(hidden)


def token_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of the image tokens, nats per token, by ``batch.weights``. ``logits`` [B, K, 1024]."""
    each = F.cross_entropy(logits.float().flatten(0, 1), batch.codes.flatten(), reduction="none")
    return (each * batch.weights.flatten()).sum() / (len(batch.codes) * tokens.TOKENS)


def identity_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of the tokens that begin an object among all codes but the background, over 576, nats.

    Weighting these tokens' own cross-entropy would teach the model to draw more objects; given that an object begins,
    the likelihood has the same optimum whatever its weight. ``logits`` [B, K, 1024].
    """
    rows, places = batch.begins.nonzero(as_tuple=True)
    # A corner that fills little of its patch may have the background's own code: nothing to tell apart there.
    visible = batch.codes[rows, places] != batch.empty[rows]
    rows, places = rows[visible], places[visible]
    masked = logits[rows, places].float().scatter(1, batch.empty[rows, None], -math.inf)
    loss = F.cross_entropy(masked, batch.codes[rows, places], reduction="sum")
    return loss / (len(batch.codes) * tokens.TOKENS)
