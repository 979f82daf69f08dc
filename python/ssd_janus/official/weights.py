"""Names and shapes of the weights of DeepSeek's `MultiModalityCausalLM`, as far as drawing uses them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

# The beginnings of names in DeepSeek's code and in transformers' Janus; {} is a number. The first that fits counts.
NAMES = (
    ("language_model.model.", "model.language_model."),
    ("gen_embed.", "model.generation_embeddings."),
    ("gen_aligner.layers.0.", "model.generation_aligner.fc1."),
    *((f"gen_aligner.layers.{2 * layer + 2}.", f"model.generation_aligner.hidden_layers.{layer}.")
      for layer in range(8)),  # the odd ones are activations
    ("gen_head.output_mlp_projector.", "model.generation_head.proj_out."),
    ("gen_head.vision_head.", "model.generation_head.vision_head."),
    *((f"gen_vision_model.{side}.{old}.", f"model.vqmodel.{side}.{new}.")
      for side, level in (("encoder", "down"), ("decoder", "up"))
      for old, new in (("mid.0", "mid.block_1"), ("mid.1", "mid.attn_1"), ("mid.2", "mid.block_2"),
                       ("conv_blocks.{}.res", f"{level}.{{}}.block"), ("conv_blocks", level))),
    ("gen_vision_model.", "model.vqmodel."),
)
# Tables that old releases saved, and counts of training.
NO_WEIGHTS = re.compile(r"\.rotary_emb\.|^gen_vision_model\.quantize\.codebook_used$")


def renamed(name: str) -> str | None:
    """transformers' name of a weight of DeepSeek's code; None where drawing does not use it: the text head, the vision
    tower and its aligner."""
    return None if NO_WEIGHTS.search(name) else _translated(name, NAMES)


def official_name(name: str) -> str | None:
    """The opposite of `renamed`."""
    return _translated(name, [(old, new) for new, old in NAMES])


def _translated(name: str, table: Iterable[tuple[str, str]]) -> str | None:
    for old, new in table:
        match = re.match(re.escape(old).replace(r"\{\}", r"(\d+)"), name)
        if match:
            return new.format(*match.groups()) + name[match.end():]
    return None


def janus_config(text: LlamaConfig, shapes: Mapping[str, Sequence[int]], image_size: int) -> JanusConfig:
    """transformers' configuration of an official model. The sizes of its picture tokenizer, which its config.json does
    not give, are those of its weights.

    Args:
        text: of the language model.
        shapes: of the weights, by their names in DeepSeek's code.
        image_size: pixels of a picture's side.

    Raises:
        ValueError: a weight is missing or lacks a dimension, or the side is no whole number of tokens.
    """

    def size(name: str, dimension: int = 0) -> int:
        if name not in shapes:
            raise ValueError(f"the weight {name} is missing")
        shape = list(shapes[name])
        if len(shape) <= dimension or not shape[dimension]:
            raise ValueError(f"the weight {name} must have a size above 0 in dimension {dimension}, got the shape "
                             f"{shape}")
        return int(shape[dimension])

    def count(pattern: str) -> int:
        """Of the numbers that stand in the names of weights."""
        return len(set(_numbers(pattern, shapes)))

    vq, base = "gen_vision_model", size("gen_vision_model.encoder.conv_in.weight")
    levels, pixels = count(rf"{vq}\.encoder\.conv_blocks\.(\d+)\."), token_pixels(shapes)
    multiplier = [size(f"{vq}.encoder.conv_blocks.{level}.res.0.conv1.weight") // base for level in range(levels)]
    if image_size < 1 or image_size % pixels:
        raise ValueError(f"image_size must be a positive multiple of the {pixels} pixels of a token, got {image_size}")
    latent = size(f"{vq}.post_quant_conv.weight")
    vq_config = JanusVQVAEConfig(
        embed_dim=size(f"{vq}.quantize.embedding.weight", 1), num_embeddings=size(f"{vq}.quantize.embedding.weight"),
        double_latent=size(f"{vq}.encoder.conv_out.weight") == 2 * latent, latent_channels=latent,
        in_channels=size(f"{vq}.encoder.conv_in.weight", 1), out_channels=size(f"{vq}.decoder.conv_out.weight"),
        base_channels=base, channel_multiplier=multiplier,
        num_res_blocks=count(rf"{vq}\.encoder\.conv_blocks\.0\.res\.(\d+)\."),
        num_hidden_layers=count(r"gen_aligner\.layers\.(\d+)\.weight"),
        projection_dim=size("gen_aligner.layers.0.weight"),
        image_token_embed_dim=size("gen_head.output_mlp_projector.weight"))
    vision = JanusVisionConfig(image_size=image_size, patch_size=pixels, num_image_tokens=(image_size // pixels) ** 2,
                               projection_dim=text.hidden_size)
    return JanusConfig(text_config=text, vision_config=vision, vq_config=vq_config)


def token_pixels(names: Iterable[str]) -> int:
    """Pixels of a token's side by the names of weights: every level of the decoder but the last doubles the picture."""
    return 2 ** max(0, len(set(_numbers(r"gen_vision_model\.decoder\.conv_blocks\.(\d+)\.", names))) - 1)


def _numbers(pattern: str, names: Iterable[str]) -> list[int]:
    found = (re.match(pattern, name) for name in names)
    return [int(match[1]) for match in found if match]
