"""Small random decoders of transformers, with prompts and calls for them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    Emu3Config,
    Emu3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from ssd_kernels import CachePlan, HeadSpec

LAYERS, HEADS, PAD = 3, 4, 0
BEGIN, LINE, END_FRAME, END_IMAGE, END = 9, 6, 7, 8, 2  # tokens of a picture
CODES = range(16, 48)
IDS = torch.tensor([[PAD, PAD, 3, 10, 11, BEGIN], [1, 4, 50, 51, 52, BEGIN], [PAD, 1, 53, 54, 55, BEGIN]])
MASK = (IDS != PAD).long()
NEGATIVE = torch.tensor([[1, 14, BEGIN]] * 3)
TEXT = dict(vocab_size=64, hidden_size=128, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            max_position_embeddings=256, initializer_range=0.15, pad_token_id=PAD, bos_token_id=1, eos_token_id=END)
VQ = dict(base_channels=32, channel_multiplier=(1, 1), num_res_blocks=1, embed_dim=4, latent_channels=4)
VOCABULARY = {"<image>": 5, "<|extra_200|>": LINE, "<|extra_201|>": END_FRAME, "<|image end|>": END_IMAGE,
              **{f"<|visual token {code:06d}|>": token for code, token in enumerate(CODES)}}
KV_HEADS = {"llama": 2, "emu3": 2, "chameleon": 4}


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """A float32 model of 3 layers and 4 query heads x 32, with peaked attention: a key of `KV_HEADS`."""
    torch.manual_seed(seed)
    text = TEXT | {"num_key_value_heads": KV_HEADS[name]}
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**text)).eval()
    if name == "emu3":
        vq = VQ | {"codebook_size": len(CODES), "hidden_size": 32, "attn_resolutions": ()}
        return Emu3ForConditionalGeneration(Emu3Config(
            text_config=text | {"attention_dropout": 0.0}, vq_config=vq, vocabulary_map=VOCABULARY)).eval()
    # Without picture tokens in its vocabulary transformers' class lets them be written.
    vq = VQ | {"num_embeddings": len(CODES), "resolution": 16, "latent_channels": 32}
    return ChameleonForConditionalGeneration(ChameleonConfig(
        **text, vq_config=vq, vocabulary_map={"<image>": 5})).eval()


def write(model: PreTrainedModel, tokens: int, seed: int = 0, guided: bool = True, **options: Any) -> Any:
    """The user's call, the same for attached and stock models: sampled, left-padded, guided by a second forward."""
    torch.manual_seed(seed)
    guidance = {"guidance_scale": 2.5, "negative_prompt_ids": NEGATIVE.clone()} if guided else {}
    return model.generate(**{"input_ids": IDS, "attention_mask": MASK, "do_sample": True, "top_k": 0,
                             "max_new_tokens": tokens, "min_new_tokens": tokens, **guidance, **options})


def plan_of(name: str, *heads: HeadSpec, **options: Any) -> CachePlan:
    """These heads, as many as the model has, in every layer, turned by one from layer to layer."""
    own = heads[:KV_HEADS[name]]
    return CachePlan([own[layer % len(own):] + own[:layer % len(own)] for layer in range(LAYERS)], **options)
