"""Folders in DeepSeek's layout (deepseek-ai/Janus-Pro-1B, -7B, Janus-1.3B), read without their package.

Drawing uses neither the vision tower nor the text head, so renaming weights is all there is to do. Nothing is written.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import JanusConfig, JanusProcessor, LlamaConfig

from ssd_kernels.reading import Field, naming, read_json, regular_file, shown

from ..loading import PictureJanus
from .processor import SpecialTokens, load_processor
from .weights import janus_config, official_name, renamed

MODEL_TYPE = "multi_modality"
MAX_CONFIG, MAX_INDEX = 1 << 20, 64 << 20  # bytes
FILES = ("model.safetensors", "pytorch_model.bin")
PARTS = ("language", "vision", "gen_vision", "gen_aligner", "gen_head")
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
         "max_position_embeddings")
MOST_LAYERS, LARGEST_SIZE = 1 << 10, 1 << 24
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Settings of a language model that are no sizes: what made it, and what others would do with it.
NOT_TAKEN = {"model_type", "torch_dtype", "dtype", "architectures", "bos_token_id", "eos_token_id", "pad_token_id",
             "transformers_version"}


@dataclass(frozen=True)
class _Weight:
    """A tensor and the file that it is from."""

    file: Path
    tensor: torch.Tensor


def is_official_config(config: Mapping[str, Any]) -> bool:
    """Whether the contents of a config.json are those of a model of DeepSeek's code."""
    return config.get("model_type") == MODEL_TYPE


def download(name: str) -> Path:
    """The folder of a hub id, with those of its files that drawing needs.

    Raises:
        OSError: it cannot be had.
    """
    folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    if not any(folder.glob("*.safetensors")):
        snapshot_download(name, allow_patterns=["*.json", "*.bin"])
    return folder


def load(folder: str | Path, dtype: torch.dtype | str = "auto", name: str | None = None
         ) -> tuple[PictureJanus, JanusProcessor]:
    """The model of a folder in DeepSeek's layout and what prepares its prompts.

    Args:
        folder: with config.json, tokenizer.json, and weights as ``model.safetensors`` or ``pytorch_model.bin``, in one
            file or in parts with an index.
        dtype: of the weights; ``"auto"`` for their own.
        name: of the checkpoint, which tells the role tags of its prompts (`chat_template`); None for the folder's path.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or holds what it may not, or weights are missing or do not fit; the message names
            file and weight.
    """
    folder = Path(folder)
    config_file = folder / "config.json"
    given = read_json(config_file, MAX_CONFIG)
    with naming(config_file):
        sections = _sections(given)
    processor = load_processor(folder, name)
    tokens = SpecialTokens.of(processor.tokenizer)
    weights = _read_weights(folder)
    with naming(config_file):
        sizes = {key: value for key, value in sections["language"].items() if key not in NOT_TAKEN and key[:1] != "_"}
        for key, most in (*((key, LARGEST_SIZE) for key in SIZES), ("num_hidden_layers", MOST_LAYERS)):
            if sizes.get(key) is not None:
                Field(sizes[key], f"language_config.{key}").integer(1, most)
        try:
            text = LlamaConfig(**sizes, bos_token_id=tokens.bos, eos_token_id=tokens.eos, pad_token_id=tokens.pad)
        except StrictDataclassError as error:
            raise ValueError(f"language_config must be a LlamaConfig's, got {error}") from None
        if tokens.largest >= text.vocab_size:
            raise ValueError(f"language_config.vocab_size must be above the numbers of all special tokens, up to "
                             f"{tokens.largest}, got {text.vocab_size}")
        image_size = Field(sections["vision"].get("image_size"), "vision_config.params.image_size").integer(1, 1 << 14)
    with naming(folder):
        config = janus_config(text, {name: weight.tensor.shape for name, weight in weights.items()}, image_size)
        processor.num_image_tokens = config.vision_config.num_image_tokens
        _check_weights(config, weights)
    if dtype == "auto":
        dtype = weights["language_model.model.embed_tokens.weight"].tensor.dtype
    state = {renamed(name): weight.tensor for name, weight in weights.items()}
    model = PictureJanus.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    model.generation_config = tokens.generation_config()
    return model.eval(), processor


def _sections(given: object) -> dict[str, dict[str, Any]]:
    """The parameters of a model's parts, checked as far as they say what is drawn."""
    fields = Field(given).members(("model_type",), None)
    fields["model_type"].choice((MODEL_TYPE,))
    if "gen_vision_config" not in fields:
        raise ValueError("gen_vision_config is missing, which every model that draws by tokens has; JanusFlow does not "
                         "and is not supported")
    Field(given).members([f"{part}_config" for part in PARTS], None)
    sections: dict[str, dict[str, Any]] = {}
    for part in PARTS:
        members = fields[f"{part}_config"].members(() if part == "language" else ("params",), None)
        params = fields[f"{part}_config"] if part == "language" else members["params"]
        params.members((), None)
        sections[part] = params.value
    Field(sections["gen_aligner"].get("projector_type", "mlp_gelu"), "gen_aligner_config.params.projector_type").choice(
        ("mlp_gelu",))
    Field(sections["language"].get("model_type", "llama"), "language_config.model_type").choice(("llama",))
    return sections


def _read_weights(folder: Path) -> dict[str, _Weight]:
    """The weights that drawing uses, by their names in DeepSeek's code."""
    weights: dict[str, _Weight] = {}
    for file in _weight_files(folder):
        os.close(regular_file(file))
        with naming(file):
            tensors = _safetensors(file) if file.suffix == ".safetensors" else _pickled_tensors(file)
            weights.update({name: _Weight(file, tensor) for name, tensor in tensors})
    return weights


def _weight_files(folder: Path) -> list[Path]:
    """Those that hold weights that drawing uses."""
    for name in FILES:
        if (folder / name).exists():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.exists():
            given = read_json(index, MAX_INDEX)
            with naming(index):
                places = Field(given).members(("weight_map",), None)["weight_map"].members((), None)
                names = {place.string() for weight, place in places.items() if renamed(weight)}
                for part in names:
                    if part in ("", "..") or Path(part).name != part:
                        raise ValueError(f"weight_map must name files beside it, got {shown(part)}")
            return [folder / part for part in sorted(names)]
    raise FileNotFoundError(f"{folder} must hold weights as {' or '.join(FILES)}, or parts of them and an index, got "
                            "neither")


def _safetensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield from ((name, tensors.get_tensor(name)) for name in tensors.keys() if renamed(name))
    except SafetensorError as error:
        raise ValueError(f"the weights are damaged ({error}); download them again") from None


def _pickled_tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Of a file of ``torch.save``, of which nothing but tensors is read: other objects could run code."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError:
        raise ValueError("must hold tensors and nothing else, got other objects, which are never loaded because they "
                         "could run code, or damage; save the weights as model.safetensors") from None
    except (EOFError, RuntimeError) as error:
        raise ValueError(f"the weights are damaged ({error}); download them again") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError(f"must hold tensors by name, got {shown(tensors)}")
    yield from ((name, tensor) for name, tensor in tensors.items() if renamed(name))


def _check_weights(config: JanusConfig, weights: Mapping[str, _Weight]) -> None:
    """Every weight of the model is there, in its shape, and no layer too many."""
    try:
        with torch.device("meta"):
            wanted = PictureJanus(config).state_dict()
    except (ArithmeticError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError("config.json must describe a model that transformers can make, got "
                         f"{type(error).__name__}: {error}") from None
    for name in sorted(wanted.keys() - {renamed(name) for name in weights}):
        raise ValueError(f"the weight {official_name(name)} is missing")
    for name, weight in weights.items():
        with naming(weight.file):
            tensor = wanted.get(renamed(name) or "")
            if tensor is None:
                raise ValueError(f"holds the weight {name}, for which config.json leaves no place")
            if tensor.shape != weight.tensor.shape:
                raise ValueError(f"the weight {name} must be {list(tensor.shape)} as config.json says, got "
                                 f"{list(weight.tensor.shape)}")
            if weight.tensor.dtype not in DTYPES:
                raise ValueError(f"the weight {name} must be float32, bfloat16, float16 or float64, got "
                                 f"{str(weight.tensor.dtype).removeprefix('torch.')}: quantized weights are not read")
