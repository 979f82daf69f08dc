"""A small random Janus with its processor, and an independent dense oracle for its generation."""

from __future__ import annotations

from typing import Any

import torch
from dense_oracle import DenseOracle
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    DynamicCache,
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusImageProcessorPil,
    JanusProcessor,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from ssd_attach.internals import CACHE_NAME
from ssd_kernels import CachePlan, HeadSpec

LAYERS, GRID, HEAD_DIM = 3, 6, 32
TOKENS = GRID * GRID
PROMPTS = ("a red circle", "two blue squares and a green star", "a heart", "three pink rings above a black cross")
SPECIALS = ["<bos>", "<eos>", "<pad>", "<begin_of_image>", "<end_of_image>", "<image_placeholder>"]
CHAT_TEMPLATE = ("{% for message in messages %}<|User|>: {{ message['content'][0]['text'] }}\n\n{% endfor %}"
                 "{% if add_generation_prompt %}<|Assistant|>:{% endif %}")


def build_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.train_from_iterator(PROMPTS, trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIALS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", padding_side="left",
        extra_special_tokens={"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>",
                              "eoi_token": "<end_of_image>"})


def build_processor(chat_template: str | None = None) -> JanusProcessor:
    return JanusProcessor(JanusImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3), build_tokenizer(),
                          chat_template=chat_template, num_image_tokens=TOKENS)


def build_model(heads: int = 4, kv_heads: int = 4, seed: int = 0) -> JanusForConditionalGeneration:
    """A float32 Janus of 3 layers, 6 x 6 visual tokens out of 64 codes, and peaked attention."""
    torch.manual_seed(seed)
    hidden = heads * HEAD_DIM
    tokenizer = build_tokenizer()
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=96, num_hidden_layers=LAYERS,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=HEAD_DIM, max_position_embeddings=96,
        bos_token_id=0, eos_token_id=1, pad_token_id=2, initializer_range=0.15)
    vision = JanusVisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=1, image_size=GRID * 4,
                               patch_size=4, num_image_tokens=TOKENS, projection_dim=hidden, depth=1)
    vq = JanusVQVAEConfig(embed_dim=8, num_embeddings=64, latent_channels=32, base_channels=32,
                          channel_multiplier=(1, 1, 2), num_res_blocks=1, projection_dim=hidden,
                          image_token_embed_dim=hidden)
    model = JanusForConditionalGeneration(JanusConfig(
        text_config=text, vision_config=vision, vq_config=vq, image_token_id=5, tie_word_embeddings=True)).eval()
    # The image path has its own small initialisation; enlarged, so that tokens depend on what attention returns.
    with torch.no_grad():
        model.model.generation_embeddings.weight.normal_()
        for module in (model.model.generation_aligner, model.model.generation_head):
            for layer in module.modules():
                if isinstance(layer, torch.nn.Linear):
                    layer.weight.normal_(std=2.0 * layer.in_features ** -0.5)
    model.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=1, pad_token_id=2, guidance_scale=2.0, _from_model_config=False,
        generation_kwargs={"boi_token_id": 3})
    return model


def image_inputs(prompts: tuple[str, ...] = PROMPTS) -> dict[str, torch.Tensor]:
    """A left-padded batch; prompts have different lengths."""
    batch = build_processor()(text=list(prompts), generation_mode="image", padding=True, return_tensors="pt")
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def draw(model: JanusForConditionalGeneration, seed: int = 0, **options: Any) -> Any:
    """The user's call, the same with an enabled and with a stock model."""
    torch.manual_seed(seed)
    return model.generate(**{**image_inputs(), **options}, generation_mode="image")


def plan_of(*heads: HeadSpec, **options: Any) -> CachePlan:
    """These heads in every layer, turned by one from layer to layer so that layers differ."""
    return CachePlan([heads[layer % len(heads):] + heads[:layer % len(heads)] for layer in range(LAYERS)], **options)


class Oracle(DenseOracle):
    """Of Janus' picture generation."""

    def generate(self, model: JanusForConditionalGeneration, **options: Any) -> torch.Tensor:
        with self.on(model.model.language_model):
            return model.generate(**options, **{CACHE_NAME: DynamicCache()}, generation_mode="image")
