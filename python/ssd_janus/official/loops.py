"""Compressed caches for loops over models of DeepSeek's code, which stay as they are: its scripts and training code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ssd_attach
from ssd_attach import Choice, PictureForm
from ssd_kernels import CachePlan
from ssd_kernels.policies import Raster

from .live import check_official, image_size
from .weights import token_pixels


def enable(model: Any, plan: CachePlan | str | None = None, backend: str = "auto", **options: Any) -> Choice:
    """Let every loop over an official model keep its KV cache under a plan while it draws.

    A call of ``model.language_model.model`` with ``use_cache=True`` and no cache is the prompt of pictures; the cache
    in its output is compressed, and calls that pass it on are their steps. Rows may come in any order, conditional and
    unconditional ones in turn as in DeepSeek's loops. A prompt may have a mask, which may differ from row to row: what
    the last token does not see is not stored, and positions count it all the same, as in the loops without this. Calls
    of ``model.language_model`` itself are text and left alone, as are calls without a cache, such as training's.

    Args, Returns, Raises: as `ssd_attach.attach`, for a model of which `is_official` is true.
    """
    check_official(model)
    grid = image_size(model) // token_pixels(name for name, _ in model.named_parameters())
    return ssd_attach.attach(model.language_model, plan, backend, pictures=PictureForm(Raster(grid, grid), _never),
                             **options)


def disable(model: Any) -> None:
    """Undo `enable`; nothing is left.

    Raises:
        TypeError: another kind of model.
    """
    check_official(model)
    ssd_attach.detach(model.language_model)


def _never(call: Mapping[str, Any]) -> bool:
    """Whether a call of the language model, which has a text head, draws."""
    return False
