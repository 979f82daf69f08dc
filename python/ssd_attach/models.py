"""How models write pictures: their rasters, and what tells the prompt of a picture from text (docs/models.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ssd_kernels.policies import Raster


@dataclass(frozen=True)
class PictureForm:
    """How a model writes pictures.

    Attributes:
        raster: of the tokens that follow a prompt.
        begins: whether a call of the model around the decoder is the prompt of a picture, by the call's arguments by
            name; None where all prompts are. Picklable, where models are pickled while attached.
    """

    raster: Raster
    begins: Callable[[Mapping[str, Any]], bool] | None = None


@dataclass(frozen=True)
class EndsWith:
    """Calls whose ``input_ids`` [B, P] end with a token in every row; calls without ``input_ids`` do not."""

    token: int

    def __call__(self, call: Mapping[str, Any]) -> bool:
        ids = call.get("input_ids")
        return ids is not None and bool((ids[:, -1] == self.token).all())


def emu3(rows: int = 90, columns: int = 90, *, begin: int = 151851) -> PictureForm:
    """Emu3 of transformers: rows that end with an end-of-line token; then end of frame, of image and of sequence.

    The prompt ends with ``<|image token|>``, after the size as text. Guidance is a second forward with a cache of its
    own, for a prompt that ends in the same way.

    Args:
        rows, columns: of the picture, as the prompt's size has them: pixels / 8.
        begin: number of ``<|image token|>``, the processor's ``tokenizer.image_wrapper_token_id``.
    """
    return PictureForm(Raster(rows, columns, line_tokens=1, tail=3), EndsWith(begin))


def chameleon(rows: int = 48, columns: int = 48, *, sized: bool = True) -> PictureForm:
    """Chameleon's picture tokens as Lumina-mGPT writes them: rows that end with a new-line token; then end of image and
    of turn.

    Guidance is a second forward with a cache of its own, whose prompt is begin of image and two size tokens.

    Args:
        rows, columns: of the picture: pixels / 16.
        sized: the prompt ends with begin of image and the sizes, too; else they are the first three tokens written,
            and places of the grid are meant for the rows that are guided towards.
    """
    return PictureForm(Raster(rows, columns, line_tokens=1, head=0 if sized else 3, tail=2))
