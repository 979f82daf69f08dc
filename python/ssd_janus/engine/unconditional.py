"""What classifier-free guidance steers away from."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import GenerationConfig


def unconditional_prompt(config: GenerationConfig, prompt: Sequence[int]) -> list[int]:
    """The prompt that guidance steers away from: padding tokens, which are attended to, in the place of all but the
    begin-of-text and begin-of-image tokens (transformers' Janus).

    Raises:
        ValueError: ``config`` does not name these tokens.
    """
    begin = (getattr(config, "generation_kwargs", None) or {}).get("boi_token_id")
    named = {"bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id, "boi_token_id": begin}
    for name, token in named.items():
        if not isinstance(token, int):
            raise ValueError(f"generation_config must name a {name} for guidance, got {token!r}")
    return [token if token in (config.bos_token_id, begin) else config.pad_token_id for token in prompt]
