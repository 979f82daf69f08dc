"""Models to time: the included one, a checkpoint, or random weights in the shape of Janus-Pro."""

from __future__ import annotations

from typing import Any

import torch

from ssd_janus.loading import PictureJanus
from ssd_janus.quantization import FORMATS, quantize

from .contender import fill

INCLUDED = "included"
# hidden, intermediate, layers, heads of Janus-Pro's decoder (deepseek-community's configurations)
SHAPES = {"1b": (2048, 5632, 24, 16), "7b": (4096, 11008, 30, 32)}
BOS, PAD, BEGIN = 0, 1, 2
PROMPT = [BOS, *range(10, 32), BEGIN]  # for the random models
VOCABULARY = 1024  # of the random models: the text table is no part of a step


def load(name: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, list[int]]:
    """A model and a prompt for it.

    Args:
        name: ``included``, a name in `SHAPES` for random weights, or a folder or hub id; with ``:int8`` behind it,
            weights of the layers are quantized (`ssd_janus.quantization`).

    Raises:
        FileNotFoundError, OSError: no such checkpoint.
        ImportError: the extra of quantized weights is not installed.
    """
    plain, _, weights = name.rpartition(":")
    if plain and weights in FORMATS:
        model, prompt = load(plain, dtype, device)
        quantize(model, weights)
        return model, prompt
    if name in SHAPES:
        return random_model(*SHAPES[name], dtype, device), PROMPT
    from ssd_janus import Pipeline

    pipe = Pipeline.from_pretrained(None if name == INCLUDED else name, device=device, dtype=dtype)
    return pipe.model, pipe.prompt_tokens(["two blue squares above a red circle"])[0]


def random_model(hidden: int, intermediate: int, layers: int, heads: int, dtype: torch.dtype,
                 device: torch.device) -> Any:
    """A Janus of these sizes with random weights, 24 x 24 tokens of 16384 codes, and a small picture decoder."""
    from transformers import GenerationConfig, JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

    from ssd_attach.internals import no_init_weights

    text = LlamaConfig(vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=intermediate,
                       num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
                       head_dim=hidden // heads, max_position_embeddings=4096, bos_token_id=BOS, eos_token_id=None,
                       pad_token_id=PAD)
    vision = JanusVisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=1, image_size=384,
                               patch_size=16, num_image_tokens=576, projection_dim=hidden, depth=1)
    vq = JanusVQVAEConfig(embed_dim=8, num_embeddings=16384, latent_channels=32, base_channels=32,
                          channel_multiplier=(1, 1), num_res_blocks=1, projection_dim=hidden,
                          image_token_embed_dim=hidden)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        # There and nowhere else: gigabytes are not filled here and then sent.
        with no_init_weights(), torch.device(device):
            model = PictureJanus(JanusConfig(text_config=text, vision_config=vision, vq_config=vq, image_token_id=3))
    finally:
        torch.set_default_dtype(before)
    for name, tensor in model.named_parameters():
        if tensor.dim() > 1:
            fill(tensor.data)
            tensor.data.mul_(tensor.shape[-1] ** -0.5)
        else:
            tensor.data.fill_(0.0 if name.endswith("bias") else 1.0)
    model.generation_config = GenerationConfig(bos_token_id=BOS, pad_token_id=PAD,
                                               generation_kwargs={"boi_token_id": BEGIN})
    return model.eval()
