"""A transformers Janus around the modules of a living model of DeepSeek's code, which the engine draws with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ssd_kernels.reading import naming

from ..loading import PictureJanus
from .processor import SpecialTokens
from .weights import janus_config, renamed

PARTS = ("language_model.model.layers", "gen_embed.weight", "gen_aligner.layers", "gen_head.output_mlp_projector",
         "gen_head.vision_head", "gen_vision_model.decoder")
IMAGE_SIZE = 384  # of every model DeepSeek released, where the configuration of a model does not say it


def missing_parts(model: object) -> list[str]:
    """Which of the parts that drawing uses a model does not have; none for a `MultiModalityCausalLM`."""
    missing = []
    for part in PARTS:
        found: Any = model
        for name in part.split("."):
            found = getattr(found, name, None)
        if found is None:
            missing.append(part)
    return missing


def is_official(model: object) -> bool:
    """Whether a model is built as DeepSeek's `MultiModalityCausalLM`, whatever its class."""
    return isinstance(model, nn.Module) and not missing_parts(model)


def check_official(model: object) -> None:
    """
    Raises:
        TypeError: not built as a `MultiModalityCausalLM`.
    """
    missing = missing_parts(model)
    if missing:
        raise TypeError(f"model must be a model of deepseek-ai/Janus (MultiModalityCausalLM), got a "
                        f"{type(model).__name__} without {', '.join(missing)}")


def as_transformers(model: nn.Module, tokenizer: Any) -> PictureJanus:
    """transformers' Janus around the parts of a living official model, for drawing.

    No weight is copied: steps of training that are made in place, and moves to another device, are seen by both. The
    official model stays as it is, its mode (training or evaluation) included; as for every model the engine makes its
    projections views of one matrix (`ssd_janus.engine.unfuse` undoes it). Making it is cheap enough to do it whenever
    parts were exchanged, by adapters for instance.

    Args:
        model: as DeepSeek's `MultiModalityCausalLM` (`is_official`).
        tokenizer: of the model, or DeepSeek's `VLChatProcessor`, which has one.

    Raises:
        TypeError: another kind of model.
        ValueError: the tokenizer lacks a token that prompts need, or a part has sizes that transformers' Janus cannot
            have.
    """
    check_official(model)
    official: Any = model
    tokens = SpecialTokens.of(getattr(tokenizer, "tokenizer", tokenizer))
    decoder = official.language_model.model
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    with naming(type(model).__name__):
        config = janus_config(decoder.config, {name: tensor.shape for name, tensor in tensors.items()},
                              image_size(official))
    with torch.device("meta"):
        janus = PictureJanus(config)
    inner, aligner, head = janus.model, official.gen_aligner.layers, official.gen_head
    inner.language_model, inner.generation_embeddings = decoder, official.gen_embed
    inner.generation_aligner.fc1 = aligner[0]
    inner.generation_aligner.hidden_layers = nn.ModuleList(aligner[2::2])
    inner.generation_head.proj_out, inner.generation_head.vision_head = head.output_mlp_projector, head.vision_head
    for name, tensor in tensors.items():
        new = renamed(name) or ""
        if new.startswith("model.vqmodel."):
            place, _, last = new.rpartition(".")
            setattr(janus.get_submodule(place), last, tensor)
    left = [name for name, tensor in (*janus.named_parameters(), *janus.named_buffers()) if tensor.is_meta]
    if left:
        raise ValueError(f"{type(model).__name__} must have all weights of a picture decoder, got none for {left[0]}")
    theirs = set(model.modules())
    for module in janus.modules():
        if module not in theirs:
            module.training = False
    janus.generation_config = tokens.generation_config()
    return janus


def image_size(model: Any) -> int:
    """Pixels of the side of an official model's pictures."""
    params = getattr(getattr(getattr(model, "config", None), "vision_config", None), "params", None) or {}
    return int(params.get("image_size", IMAGE_SIZE))
