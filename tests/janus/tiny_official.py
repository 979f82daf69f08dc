"""A small random model of the shape of deepseek-ai/Janus, written anew: its names, folders, loops, and the maths of its
picture decoder."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tiny
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
SPECIALS = [BOS, EOS, PAD, "<begin_of_image>", "<end_of_image>", "<image_placeholder>", "<|User|>", "<|Assistant|>"]
CODES, CODE_WIDTH, BASE, LATENT, MULTIPLIER, BLOCKS = 64, 8, 32, 48, (1, 1, 2), 1


class Official(nn.Module):
    """Parts and names of a `MultiModalityCausalLM`; the vision tower is a stand-in."""

    def __init__(self, kv_heads: int = 4, layers: int = tiny.LAYERS) -> None:
        super().__init__()
        hidden = 4 * tiny.HEAD_DIM
        self.vision_model = nn.Sequential(nn.Linear(8, 8))
        self.aligner = nn.Sequential(nn.Linear(8, hidden))
        self.gen_vision_model = nn.Module()
        for name, shape in picture_decoder_shapes().items():
            _put(self.gen_vision_model, name, nn.Parameter(_values(name, shape)))
        self.gen_vision_model.quantize.register_buffer("codebook_used", torch.zeros(9))
        self.gen_aligner = nn.Module()
        self.gen_aligner.layers = nn.Sequential(nn.Linear(CODE_WIDTH, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.gen_head = Head(hidden)
        self.gen_embed = nn.Embedding(CODES, CODE_WIDTH)
        self.language_model = LlamaForCausalLM(LlamaConfig(
            vocab_size=320, hidden_size=hidden, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=kv_heads, head_dim=tiny.HEAD_DIM, max_position_embeddings=96, initializer_range=0.15))
        self.config = SimpleNamespace(vision_config=SimpleNamespace(params={"image_size": 4 * tiny.GRID}))
        for layer in (*self.gen_aligner.layers, *self.gen_head.children()):
            if isinstance(layer, nn.Linear):  # so that tokens depend on what attention returns
                nn.init.normal_(layer.weight, std=2.0 * layer.in_features ** -0.5)

    def prepare_gen_img_embeds(self, codes: torch.Tensor) -> torch.Tensor:
        return self.gen_aligner.layers(self.gen_embed(codes))


class Head(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.output_mlp_projector = nn.Linear(hidden, hidden)
        self.vision_activation = nn.GELU()
        self.vision_head = nn.Linear(hidden, CODES)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.vision_head(self.vision_activation(self.output_mlp_projector(states)))


def build(seed: int = 0, **options: Any) -> Official:
    torch.manual_seed(seed)
    return Official(**options).eval()


def picture_decoder_shapes() -> dict[str, tuple[int, ...]]:
    """Of the weights of a VQ-GAN by their names in DeepSeek's code; at the size of tests."""
    shapes: dict[str, tuple[int, ...]] = {}

    def add(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def residual(name: str, inside: int, out: int) -> None:
        add(f"{name}.norm1", inside)
        add(f"{name}.conv1", out, inside, 3, 3)
        add(f"{name}.norm2", out)
        add(f"{name}.conv2", out, out, 3, 3)
        if inside != out:
            add(f"{name}.nin_shortcut", out, inside, 1, 1)

    def attention(name: str, width: int) -> None:
        add(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            add(f"{name}.{part}", width, width, 1, 1)

    def middle(name: str, width: int) -> None:
        residual(f"{name}.mid.0", width, width)
        attention(f"{name}.mid.1", width)
        residual(f"{name}.mid.2", width, width)

    last = len(MULTIPLIER) - 1
    add("encoder.conv_in", BASE, 3, 3, 3)
    width = BASE
    for level, factor in enumerate(MULTIPLIER):
        for block in range(BLOCKS):
            residual(f"encoder.conv_blocks.{level}.res.{block}", width, width := BASE * factor)
            if level == last:
                attention(f"encoder.conv_blocks.{level}.attn.{block}", width)
        if level != last:
            add(f"encoder.conv_blocks.{level}.downsample.conv", width, width, 3, 3)
    middle("encoder", width)
    add("encoder.norm_out", width)
    add("encoder.conv_out", LATENT, width, 3, 3)
    add("decoder.conv_in", width, LATENT, 3, 3)
    middle("decoder", width)
    for number, factor in enumerate(reversed(MULTIPLIER)):
        for block in range(BLOCKS + 1):
            residual(f"decoder.conv_blocks.{number}.res.{block}", width, width := BASE * factor)
            if number == 0:
                attention(f"decoder.conv_blocks.{number}.attn.{block}", width)
        if number != last:
            add(f"decoder.conv_blocks.{number}.upsample.conv", width, width, 3, 3)
    add("decoder.norm_out", width)
    add("decoder.conv_out", 3, width, 3, 3)
    shapes["quantize.embedding.weight"] = (CODES, CODE_WIDTH)
    add("quant_conv", CODE_WIDTH, LATENT, 1, 1)
    add("post_quant_conv", LATENT, CODE_WIDTH, 1, 1)
    return shapes


def pixels(weights: dict[str, torch.Tensor], codes: torch.Tensor) -> torch.Tensor:
    """[N, H, W, 3] in about [-1, 1] of codes [N, GRID * GRID]: the decoder of a VQ-GAN from its weights alone."""

    def conv(name: str, x: torch.Tensor) -> torch.Tensor:
        weight = weights[f"{name}.weight"]
        return functional.conv2d(x, weight, weights[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.group_norm(x, 32, weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    def residual(name: str, x: torch.Tensor) -> torch.Tensor:
        inner = conv(f"{name}.conv1", functional.silu(norm(f"{name}.norm1", x)))
        inner = conv(f"{name}.conv2", functional.silu(norm(f"{name}.norm2", inner)))
        return inner + (conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in weights else x)

    def attention(name: str, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (conv(f"{name}.{part}", norm(f"{name}.norm", x)).flatten(2).transpose(1, 2) for part in "qkv")
        out = functional.softmax(q @ k.transpose(1, 2) * q.shape[-1] ** -0.5, -1) @ v
        return x + conv(f"{name}.proj_out", out.transpose(1, 2).reshape(x.shape))

    table = functional.normalize(weights["quantize.embedding.weight"], dim=-1)
    x = table[codes].view(len(codes), tiny.GRID, tiny.GRID, -1).permute(0, 3, 1, 2)
    x = conv("decoder.conv_in", conv("post_quant_conv", x))
    x = residual("decoder.mid.2", attention("decoder.mid.1", residual("decoder.mid.0", x)))
    for number in range(len(MULTIPLIER)):
        for block in range(BLOCKS + 1):
            x = residual(f"decoder.conv_blocks.{number}.res.{block}", x)
            if number == 0:
                x = attention(f"decoder.conv_blocks.{number}.attn.{block}", x)
        if number != len(MULTIPLIER) - 1:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = conv(f"decoder.conv_blocks.{number}.upsample.conv", x)
    return conv("decoder.conv_out", functional.silu(norm("decoder.norm_out", x))).permute(0, 2, 3, 1)


@torch.no_grad()
def draw(model: Official, prompt: list[int], pictures: int, seed: int = 0, guidance: float = 5.0,
         steps: int = tiny.TOKENS, greedy: bool = False) -> torch.Tensor:
    """Tokens [pictures, steps] by a loop of the shape of DeepSeek's script: rows of conditional and unconditional
    prompts in turn, no masks, no positions, the cache that the model makes by itself."""
    torch.manual_seed(seed)
    ids = torch.tensor(prompt).repeat(2 * pictures, 1)
    ids[1::2, 1:-1] = SPECIALS.index(PAD)
    inputs, cache, found = model.language_model.get_input_embeddings()(ids), None, []
    for _ in range(steps):
        outputs = model.language_model.model(inputs_embeds=inputs, use_cache=True, past_key_values=cache)
        cache = outputs.past_key_values
        logits = model.gen_head(outputs.last_hidden_state[:, -1])
        logits = logits[1::2] + guidance * (logits[0::2] - logits[1::2])
        codes = logits.argmax(-1, True) if greedy else torch.multinomial(torch.softmax(logits, -1), 1)
        found.append(codes)
        inputs = model.prepare_gen_img_embeds(codes.repeat(1, 2).view(-1)).unsqueeze(1)
    return torch.cat(found, 1)


def build_tokenizer() -> Tokenizer:
    """Bytes as in DeepSeek's, which puts begin-of-text before a prompt by its class, not by its file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(tiny.PROMPTS, trainers.BpeTrainer(
        vocab_size=310, special_tokens=SPECIALS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


def wrapped_tokenizer() -> PreTrainedTokenizerFast:
    """As transformers' code holds it."""
    return PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(), bos_token=BOS, eos_token=EOS, pad_token=PAD)


def prompt_ids(text: str, user: str = "<|User|>", assistant: str = "<|Assistant|>") -> list[int]:
    """What DeepSeek's script makes of a text."""
    prompt = f"{user}: {text}\n\n{assistant}:<begin_of_image>"
    return [SPECIALS.index(BOS), *build_tokenizer().encode(prompt).ids]


def config_of(model: Official) -> dict[str, Any]:
    """What DeepSeek's config.json says, which is little."""
    text, hidden = model.language_model.config, model.language_model.config.hidden_size
    aligner = {"cls": "MlpProjector", "params": {"depth": 2, "n_embed": hidden, "projector_type": "mlp_gelu"}}
    return {
        "architectures": ["MultiModalityCausalLM"], "model_type": "multi_modality", "torch_dtype": "bfloat16",
        "language_config": {
            "model_type": "llama", "torch_dtype": "bfloat16", "hidden_size": hidden, "vocab_size": text.vocab_size,
            "intermediate_size": text.intermediate_size, "max_position_embeddings": text.max_position_embeddings,
            "num_hidden_layers": text.num_hidden_layers, "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": text.num_key_value_heads},
        "vision_config": {"cls": "CLIPVisionTower", "params": {"image_size": 4 * tiny.GRID, "select_layer": -1}},
        "aligner_config": aligner, "gen_aligner_config": {**aligner, "params": {**aligner["params"], "input_dim": 8}},
        "gen_vision_config": {"cls": "VQ-16", "params": {"image_token_size": CODES, "n_embed": CODE_WIDTH}},
        "gen_head_config": {"cls": "vision_head", "params": {"image_token_embed": hidden, "image_token_size": CODES}},
    }


def save(model: Official, folder: Path, form: str = "bin", parts: int = 1) -> Path:
    """Write a checkpoint in DeepSeek's layout; ``form`` is "bin" or "safetensors"."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(model)))
    build_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "add_bos_token": True, "bos_token": {"__type": "AddedToken", "content": BOS}, "eos_token": EOS,
        "pad_token": PAD, "tokenizer_class": "LlamaTokenizerFast", "unk_token": None}))
    (folder / "processor_config.json").write_text(json.dumps({
        "image_tag": "<image_placeholder>", "processor_class": "VLChatProcessor", "sft_format": "deepseek"}))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    stem = "model" if form == "safetensors" else "pytorch_model"
    names = sorted(weights)
    files = [f"{stem}.{form}"] if parts == 1 else [f"{stem}-{part + 1:05d}-of-{parts:05d}.{form}"
                                                   for part in range(parts)]
    for part, file in enumerate(files):
        held = {name: weights[name] for name in names[part::parts]}
        if form == "safetensors":
            save_file(held, folder / file)
        else:
            torch.save(held, folder / file)
    if parts > 1:
        places = {name: files[index % parts] for index, name in enumerate(names)}
        (folder / f"{stem}.{form}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def _put(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    first, dot, rest = name.partition(".")
    if not dot:
        module.register_parameter(first, parameter)
        return
    if not hasattr(module, first):
        module.add_module(first, nn.Module())
    _put(getattr(module, first), rest, parameter)


def _values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if "norm" in name:
        return 1 + 0.1 * torch.randn(shape) if name.endswith("weight") else 0.1 * torch.randn(shape)
    fan_in = max(1, torch.Size(shape[1:]).numel())
    return torch.randn(shape) if name.startswith("quantize") else torch.randn(shape) * fan_in ** -0.5
