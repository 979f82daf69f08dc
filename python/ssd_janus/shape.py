"""The sizes of a Janus model that a plan has to fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

import ssd_attach.shape
from ssd_kernels.policies import Raster


def placement(model: Any) -> tuple[torch.device, torch.dtype]:
    """Where a Janus draws its tokens, and in which dtype: the language model's, which caches follow.

    ``model.device`` and ``model.dtype`` are the first parameter's, which belongs to the vision tower.
    """
    weight = model.model.language_model.get_input_embeddings().weight
    return weight.device, weight.dtype


@dataclass(frozen=True)
class ModelShape(ssd_attach.shape.ModelShape):
    """Sizes of the language model and of the picture grid, read from a model's configuration."""

    @classmethod
    def of(cls, model: Any) -> ModelShape:
        """The shape of a ``JanusForConditionalGeneration``, whose tokens are the grid's and nothing else."""
        columns = model.config.vq_config.num_patches
        rows, rest = divmod(model.model.vision_model.config.num_image_tokens, columns)
        return replace(cls.of_decoder(model.model.language_model.config, Raster(rows, columns, tail=rest)), raster=None)
