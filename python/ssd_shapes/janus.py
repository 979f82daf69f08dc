"""The configuration of the included model: Janus-Pro's geometry at a small size."""

from __future__ import annotations

from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from ssd_shapes import text, tokens, world

HIDDEN = 256
CODE_WIDTH = 8


def build_config(tokenizer: PreTrainedTokenizerFast) -> JanusConfig:
    """Janus with 8 layers of 8 heads, 576 image tokens out of 1024 codes, pictures of 96 x 96 pixels.

    The vision tower only has to exist (it reads pictures, which this model is not trained for).
    """
    language = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=576,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=32,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    vision = JanusVisionConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=world.SIZE,
        patch_size=tokens.PATCH,
        num_image_tokens=tokens.TOKENS,
        projection_dim=HIDDEN,
        depth=1,
    )
    vq = JanusVQVAEConfig(
        embed_dim=CODE_WIDTH,
        num_embeddings=tokens.CODES,
        # Two channels in each of the 32 norm groups: norms of single channels would lose the colour of flat areas.
        latent_channels=32,
        base_channels=64,
        channel_multiplier=(1, 1, 1),
        num_res_blocks=0,
        projection_dim=HIDDEN,
        image_token_embed_dim=HIDDEN,
    )
    return JanusConfig(
        text_config=language,
        vision_config=vision,
        vq_config=vq,
        image_token_id=text.token_id(tokenizer, text.IMAGE),
        tie_word_embeddings=True,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> JanusForConditionalGeneration:
    """The model with freshly drawn weights."""
    return JanusForConditionalGeneration(build_config(tokenizer))
