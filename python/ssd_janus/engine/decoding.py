"""From visual tokens to pixels, in chunks that fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

from ..shape import ModelShape
from . import memory

DECODE_CHUNK = 8  # pictures; more at once are hardly faster


@torch.no_grad()
def decode(model: Any, tokens: torch.Tensor, chunk: int | None = None) -> Iterator[torch.Tensor]:
    """Pixels of visual tokens, or of the first rows of them.

    Args:
        model: transformers' Janus.
        tokens: long [pictures, n], n a multiple of a grid row's tokens.
        chunk: pictures decoded at once; None for as many as fit, at most `DECODE_CHUNK`.

    Yields:
        [up to chunk, height, width, 3], floats in about [-1, 1], on the picture decoder's device and in its dtype;
        without the rows still to be drawn.

    Raises:
        ValueError: no whole number of rows.
    """
    shape = ModelShape.of(model)
    columns, whole = shape.columns, shape.num_visual_tokens
    if tokens.dim() != 2 or tokens.shape[1] % columns or not 0 < tokens.shape[1] <= whole:
        raise ValueError(f"tokens must be [pictures, n] with n a multiple of {columns} up to {whole}, got "
                         f"{list(tokens.shape)}")
    device = next(model.model.vqmodel.parameters()).device
    if chunk is None:
        room = memory.available_memory(device) * memory.USABLE_SHARE
        chunk = max(1, min(DECODE_CHUNK, int(room // memory.decode_bytes(model, 1))))
    for part in tokens.split(chunk):
        yield _pixels(model, part.to(device), columns)


def _pixels(model: Any, tokens: torch.Tensor, columns: int) -> torch.Tensor:
    vq, rows = model.model.vqmodel, tokens.shape[1] // columns
    if rows == columns:
        return model.decode_image_tokens(tokens)
    # As the quantizer looks codes up, which insists on whole pictures.
    latents = functional.normalize(vq.quantize.embedding(tokens), p=2, dim=-1)
    latents = latents.view(len(tokens), rows, columns, -1).permute(0, 3, 1, 2).contiguous()
    return vq.decoder(vq.post_quant_conv(latents)).permute(0, 2, 3, 1)
