"""Load only those weights of a Janus that drawing needs."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers import JanusConfig, JanusForConditionalGeneration

from ssd_attach.internals import without_weights

from .checkpoints import UNUSED


class _LeftOut(nn.Module):
    """In the place of a part that was not loaded; has its configuration, which others read."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("this model was loaded for drawing, without its vision tower and text head; load it with "
                         "transformers' JanusForConditionalGeneration to describe pictures or to write text")


@without_weights(*(f"^{re.escape(prefix)}" for prefix in UNUSED))
class PictureJanus(JanusForConditionalGeneration):
    """A Janus without vision tower, its aligner and the text head, which drawing does not use.

    Their weights are neither read from disk nor kept in memory. Everything else is transformers' class.
    """

    def __init__(self, config: JanusConfig) -> None:
        super().__init__(config)  # from_pretrained makes it without memory
        self.model.vision_model = _LeftOut(config.vision_config)
        self.model.aligner = _LeftOut(config.vision_config)
        self.lm_head = _LeftOut(config.text_config)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``generate`` for pictures. Raises ValueError for text."""
        if kwargs.get("generation_mode", "text") == "text":
            self.lm_head()
        return super().generate(*args, **kwargs)
