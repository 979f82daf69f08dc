"""The tokenizer: a byte-level BPE of at most 512 entries, trained on the world's prompts."""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedTokenizerFast

from ssd_shapes import world

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
BOI, EOI, IMAGE = "<begin_of_image>", "<end_of_image>", "<image_placeholder>"
VOCABULARY = 512


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """Index of one special token."""
    index = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(index, int)
    return index


def build_tokenizer(seed: int = 0, prompts: int = 20_000) -> PreTrainedTokenizerFast:
    """Train the tokenizer; it puts <bos> first and pads on the left, as Janus does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    rng = np.random.default_rng(seed)
    tokenizer = Tokenizer(models.BPE())
    # The leading space makes the first word the same token as the same word elsewhere.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD, BOI, EOI, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((world.draw_prompt(rng).text for _ in range(prompts)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE, "boi_token": BOI, "eoi_token": EOI},
        padding_side="left",
    )
