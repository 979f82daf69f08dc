"""What DeepSeek's models are asked with: tokenizer, special tokens and the form of a prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig, JanusImageProcessorPil, JanusProcessor, PreTrainedTokenizerFast

from ssd_kernels.reading import Field, naming, read_json, read_text

MAX_BYTES = 64 << 20  # of a file
GUIDANCE = 5.0  # of DeepSeek's script, which restricts sampling in no way
PAD = "<｜▁pad▁｜>"
TAGS = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
TOKENS = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}  # unless the folder says others
FIRST_JANUS = re.compile(r"janus-1\.3b", re.IGNORECASE)


@dataclass(frozen=True)
class SpecialTokens:
    """Numbers of the tokens that prompts consist of beside their text; ``boi`` is begin-of-image."""

    bos: int
    eos: int
    pad: int
    boi: int

    @classmethod
    def of(cls, tokenizer: Any) -> SpecialTokens:
        """Those of a tokenizer of transformers.

        Raises:
            ValueError: it lacks one.
        """
        numbers = tokenizer.get_vocab()
        tokens = (tokenizer.bos_token, tokenizer.eos_token, PAD, TAGS["boi_token"])
        for token in tokens:
            if token not in numbers:
                raise ValueError(f"tokenizer must have the token {token!r}, which prompts of Janus need")
        return cls(*(numbers[token] for token in tokens))

    @property
    def largest(self) -> int:
        return max(astuple(self))

    def generation_config(self) -> GenerationConfig:
        """What DeepSeek's script draws with: guidance 5, temperature 1 and the whole distribution."""
        return GenerationConfig(
            bos_token_id=self.bos, eos_token_id=self.eos, pad_token_id=self.pad, guidance_scale=GUIDANCE,
            do_sample=True, temperature=1.0, top_k=0, generation_kwargs={"boi_token_id": self.boi})


def chat_template(user: str = "<|User|>", assistant: str = "<|Assistant|>") -> str:
    """DeepSeek's form of a conversation with these names for its sides, as a Jinja template.

    Janus-Pro was trained with the default ones, Janus-1.3B with ``"User"`` and ``"Assistant"``. A pipeline takes
    another one by ``pipe.processor.chat_template = chat_template("User", "Assistant")``.
    """
    return ("{% for message in messages %}{% set user = message.role|lower == 'user' %}"
            f"{{{{ '{user}' if user else '{assistant}' }}}}: "
            "{% for part in message.content %}{{ part.text|trim if part.type == 'text' else '<image_placeholder>\\n' }}"
            "{% endfor %}{{ '\\n\\n' if user else '<｜end▁of▁sentence｜>' }}{% endfor %}"
            f"{{% if add_generation_prompt %}}{assistant}:{{% endif %}}")


def load_processor(folder: str | Path, name: str | None = None) -> JanusProcessor:
    """What prepares the prompts of a folder in DeepSeek's layout: tokenizer and form.

    tokenizer.json is read by itself. Releases of transformers differ in what they make of the class that the folder
    names; some split words differently, some leave begin-of-text out.

    Args:
        folder: with tokenizer.json, and tokenizer_config.json and processor_config.json where there are any.
        name: of the checkpoint, which tells the role tags of its prompts (`chat_template`); None for the folder's path.

    Raises:
        FileNotFoundError: there is no tokenizer.json.
        ValueError: a file is damaged, or a token is missing; the message names both.
    """
    folder = Path(folder)
    file, settings_file, format_file = (folder / f"{each}.json" for each in
                                        ("tokenizer", "tokenizer_config", "processor_config"))
    text = read_text(file, MAX_BYTES)
    with naming(file):
        try:
            tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"must be a file of the tokenizers library, got one it cannot read ({error})") from None
    settings = _optional(settings_file)
    prompt_format = _optional(format_file)
    with naming(settings_file):
        tokens = {key: _token(settings, key, default) for key, default in TOKENS.items()}
        add_bos = "add_bos_token" not in settings or settings["add_bos_token"].boolean()
    with naming(format_file):
        old = "sft_format" in prompt_format and prompt_format["sft_format"].string() == "deepseek_old"
    with naming(file):
        for token in (*tokens.values(), PAD, TAGS["boi_token"]):
            if tokenizer.token_to_id(token) is None:
                raise ValueError(f"must have the token {token!r}, which prompts of Janus need")
    if add_bos:
        number = tokenizer.token_to_id(tokens["bos_token"])
        tokenizer.post_processor = TemplateProcessing(single=f"{tokens['bos_token']} $A",
                                                      special_tokens=[(tokens["bos_token"], number)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens, pad_token=PAD, padding_side="left",
                                      extra_special_tokens=TAGS)
    first = old or FIRST_JANUS.search(f"{folder} {folder.resolve()}" if name is None else name)
    return JanusProcessor(JanusImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3), wrapped,
                          chat_template=chat_template(*(("User", "Assistant") if first else ())))


def _optional(file: Path) -> dict[str, Field]:
    """The fields of a JSON object, none where there is no file."""
    if not file.exists():
        return {}
    given = read_json(file, MAX_BYTES)
    with naming(file):
        return Field(given).members((), None)


def _token(settings: Mapping[str, Field], key: str, default: str) -> str:
    """A token that the settings name, as a string or as an object with its content."""
    if key not in settings or settings[key].value is None:
        return default
    if isinstance(settings[key].value, dict):
        return settings[key].members(("content",), None)["content"].string()
    return settings[key].string()
