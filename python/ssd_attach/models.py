"""How models write pictures: their rasters, and what tells the prompt of a picture from text."""

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
        begins: whether a call of the model around the decoder is a picture, by the call's arguments by name; None
            where all calls are. Picklable, as models that are attached may be.
    """

    raster: Raster
    begins: Callable[[Mapping[str, Any]], bool] | None = None
