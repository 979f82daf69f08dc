"""`Raster`: where the tokens of a picture's grid stand among those that a model writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..arguments import check_int


@dataclass(frozen=True)
class Raster:
    """A picture as a sequence: ``head`` tokens, then every grid row followed by its line tokens, then ``tail`` tokens.

    Attributes:
        rows, columns: of the grid.
        line_tokens: that end every row, such as Emu3's end of line.
        head: before the first row, such as Lumina-mGPT's begin of image and sizes.
        tail: after the last row, such as Emu3's end of frame, of image and of sequence.

    Raises:
        TypeError, ValueError: not an int, or too small.
    """

    rows: int
    columns: int
    line_tokens: int = 0
    head: int = 0
    tail: int = 0

    def __post_init__(self) -> None:
        for name, least in (("rows", 0), ("columns", 1), ("line_tokens", 0), ("head", 0), ("tail", 0)):
            check_int(name, getattr(self, name), least)
        if not self.tokens:
            raise ValueError("rows must be at least 1 where head and tail are 0, got 0")

    @property
    def stride(self) -> int:
        """Tokens from one row's beginning to the next one's."""
        return self.columns + self.line_tokens

    @property
    def tokens(self) -> int:
        """Of a whole picture."""
        return self.head + self.rows * self.stride + self.tail

    def place(self, token: int) -> tuple[int, int] | None:
        """(row, column) of a token by its number; None for a token that stands for no place of the grid."""
        row, column = divmod(token - self.head, self.stride)
        return (row, column) if 0 <= row < self.rows and column < self.columns else None


def raster_of(shape: Any) -> Raster:
    """The raster of a shape, ``shape.raster``; without one, rows of ``shape.columns`` tokens and nothing between."""
    known: Raster | None = getattr(shape, "raster", None)
    if known is not None:
        return known
    rows, rest = divmod(shape.num_visual_tokens, shape.columns)
    return Raster(rows, shape.columns, tail=rest)
