"""DeepSeek's own checkpoints and living models: their tokens, their pixels, and what is refused."""

from __future__ import annotations

import json
import pickle
import re
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_official
import torch
from PIL import Image
from test_cli import run
from torch import nn

from ssd_janus import Pipeline, official
from ssd_janus.checkpoints import fingerprint
from ssd_janus.engine import Engine, Sampling, unfuse
from ssd_janus.images import to_pictures
from ssd_janus.official.weights import official_name, renamed
from ssd_kernels import CachePlan, HeadSpec, policies

PROMPT = "two blue squares and a green star"


@pytest.fixture(scope="module")
def model() -> tiny_official.Official:
    return tiny_official.build()


@pytest.fixture(scope="module")
def folder(model: tiny_official.Official, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_official.save(model, tmp_path_factory.mktemp("official") / "Janus-Pro-1B")


@pytest.fixture
def spoiled(folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", folder, copy], check=True)
    return copy


def engine_tokens(janus: Any, prompt: list[int], pictures: int, seed: int = 0, plan: CachePlan | None = None
                  ) -> torch.Tensor:
    torch.manual_seed(seed)
    return Engine(janus, plan).generate([prompt] * pictures, guidance=5.0, seeds=None, sampling=Sampling())


@pytest.mark.parametrize("form, parts, kv_heads", [("bin", 1, 4), ("safetensors", 1, 2), ("bin", 3, 2),
                                                   ("safetensors", 2, 4)])
def test_a_folder_draws_the_scripts_tokens_and_pixels(tmp_path: Path, form: str, parts: int, kv_heads: int) -> None:
    model = tiny_official.build(kv_heads, kv_heads=kv_heads)
    folder = tiny_official.save(model, tmp_path / "Janus-Pro-1B", form, parts)
    pipe = Pipeline.from_pretrained(folder)
    prompt = tiny_official.prompt_ids(PROMPT)
    assert pipe.prompt_tokens([f" {PROMPT} "]) == [prompt]
    expected = tiny_official.draw(model, prompt, 3, seed=4)
    tokens = engine_tokens(pipe.model, prompt, 3, seed=4)
    assert torch.equal(tokens, expected)
    exact = tiny_official.pixels(model.gen_vision_model.double().state_dict(), tokens)
    same_dtype = tiny_official.pixels(model.gen_vision_model.float().state_dict(), tokens)
    got = pipe.model.decode_image_tokens(tokens)
    assert (got - exact).abs().max() <= 2 * (same_dtype - exact).abs().max() + 1e-5
    assert got.std() > 0.1
    assert Sampling.of(pipe.model, do_sample=True) == Sampling() and pipe.guidance() == 5.0
    # One picture with the script's own defaults is the pipeline's picture of that seed.
    (picture,) = pipe(PROMPT, seed=7)
    pixels = pipe.model.decode_image_tokens(tiny_official.draw(model, prompt, 1, seed=7))
    assert picture.tobytes() == to_pictures(pixels)[0].tobytes()


def test_a_folder_draws_through_the_command_line(folder: Path, model: tiny_official.Official, tmp_path: Path) -> None:
    result = run("generate", PROMPT, "--model", folder, "--out", tmp_path / "out", "--seed", 3, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert (record["guidance_scale"], record["plan_budget"]) == (5.0, 1.0)
    tokens = tiny_official.draw(model, tiny_official.prompt_ids(PROMPT), 1, seed=3)
    expected = to_pictures(Pipeline.from_pretrained(folder).model.decode_image_tokens(tokens))[0]
    with Image.open(record["file"]) as picture:
        assert picture.tobytes() == expected.tobytes()
    smaller = run("generate", PROMPT, "--model", folder, "--out", tmp_path / "small", "--policy", "decayed", "--json")
    assert smaller.exit_code == 0, smaller.output
    assert json.loads(smaller.stdout)["cache_bytes"] < record["cache_bytes"]


def test_only_what_draws_is_loaded(folder: Path, model: tiny_official.Official) -> None:
    loaded = Pipeline.from_pretrained(folder).model
    theirs = {name: value for name, value in model.named_parameters() if renamed(name)}
    ours = dict(loaded.named_parameters())
    assert {renamed(name) for name in theirs} == set(ours)
    assert all(official_name(renamed(name) or "") == name for name in theirs)
    left_out = {name.split(".")[0] for name, _ in model.named_parameters()} - {name.split(".")[0] for name in theirs}
    assert left_out == {"vision_model", "aligner"} and not any("lm_head" in name for name in ours)
    for name, value in theirs.items():
        assert torch.equal(ours[renamed(name) or ""], value)
    assert fingerprint(loaded) == fingerprint(official.as_transformers(model, official.load_processor(folder)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_auto_takes_the_dtype_of_the_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = tiny_official.save(tiny_official.build().to(dtype), tmp_path / "model")
    loaded, _ = official.load(folder)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert Pipeline.from_pretrained(folder).dtype == torch.float32  # of a CPU
    assert Pipeline.from_pretrained(folder, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("name, settings, roles", [
    ("Janus-Pro-1B", {}, ("<|User|>", "<|Assistant|>")), ("Janus-1.3B", {}, ("User", "Assistant")),
    ("model", {"sft_format": "deepseek_old"}, ("User", "Assistant"))])
def test_role_tags(model: tiny_official.Official, tmp_path: Path, name: str, settings: dict[str, Any],
                   roles: tuple[str, str]) -> None:
    folder = tiny_official.save(model, tmp_path / name)
    (folder / "processor_config.json").write_text(json.dumps(settings))
    pipe = Pipeline.from_pretrained(folder)
    assert pipe.prompt_tokens([PROMPT]) == [tiny_official.prompt_ids(PROMPT, *roles)]
    pipe.processor.chat_template = official.chat_template("Human", "Robot")
    assert pipe.prompt_tokens([PROMPT]) == [tiny_official.prompt_ids(PROMPT, "Human", "Robot")]


def test_settings_of_the_language_model_are_its_own(folder: Path, spoiled: Path) -> None:
    """Those that config.json names count, not only those of the released models."""
    config = json.loads((spoiled / "config.json").read_text())
    config["language_config"] |= {"rope_theta": 500.0, "rms_norm_eps": 0.01, "_attn_implementation": "eager"}
    (spoiled / "config.json").write_text(json.dumps(config))
    plain, changed = (official.load(each)[0].model.language_model for each in (folder, spoiled))
    assert changed.norm.variance_epsilon == 0.01 != plain.norm.variance_epsilon
    assert not torch.equal(changed.rotary_emb.inv_freq, plain.rotary_emb.inv_freq)
    assert plain.rotary_emb.inv_freq[1] == pytest.approx(10000 ** (-2 / tiny.HEAD_DIM))
    assert changed.rotary_emb.inv_freq[1] == pytest.approx(500 ** (-2 / tiny.HEAD_DIM))


def test_a_hub_id_is_downloaded_without_what_is_not_needed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr("ssd_janus.official.checkpoint.snapshot_download", snapshot)
    monkeypatch.setattr("ssd_janus.pipeline.JanusConfig.get_config_dict",
                        lambda source, **options: ({"model_type": "multi_modality"}, {}))
    pipe = Pipeline.from_pretrained("deepseek-ai/Janus-1.3B")
    assert asked == [["*.json", "*.safetensors"], ["*.json", "*.bin"]]
    assert pipe.prompt_tokens([PROMPT]) == [tiny_official.prompt_ids(PROMPT, "User", "Assistant")]


def without(file: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / file).unlink()


def config_with(**changes: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        for path, value in changes.items():
            place, *parts = config, *path.split("__")
            for part in parts[:-1]:
                place = place[part]
            if value is None:
                del place[parts[-1]]
            else:
                place[parts[-1]] = value
        (folder / "config.json").write_text(json.dumps(config))

    return change


def weights_with(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        weights = torch.load(folder / "pytorch_model.bin")
        change(weights)
        torch.save(weights, folder / "pytorch_model.bin")

    return write


def token_missing(token: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        file = folder / "tokenizer.json"
        file.write_text(file.read_text().replace(token, "<other>"))

    return write


NORM = "language_model.model.norm.weight"


@pytest.mark.parametrize("spoil, error, message", [
    (without("pytorch_model.bin"), FileNotFoundError, "must hold weights as model.safetensors or pytorch_model.bin"),
    (without("tokenizer.json"), FileNotFoundError, "tokenizer.json"),
    (config_with(gen_vision_config=None), ValueError, "config.json: gen_vision_config is missing.* JanusFlow"),
    (config_with(gen_head_config=None), ValueError, "config.json: gen_head_config is missing"),
    (config_with(gen_aligner_config__params__projector_type="linear"), ValueError,
     "config.json: gen_aligner_config.params.projector_type must be 'mlp_gelu', got 'linear'"),
    (config_with(language_config__model_type="qwen2"), ValueError, "language_config.model_type must be 'llama'"),
    (config_with(vision_config__params__image_size="big"), ValueError,
     "config.json: vision_config.params.image_size must be an int"),
    (config_with(vision_config__params__image_size=25), ValueError, "image_size must be a positive multiple of the 4"),
    (config_with(language_config__num_hidden_layers=4), ValueError,
     r"copy: the weight language_model.model.layers.3\.\S+ is missing"),
    (config_with(language_config__num_hidden_layers=2), ValueError,
     r"pytorch_model.bin: holds the weight language_model.model.layers.2\.\S+, for which config.json leaves no place"),
    (config_with(language_config__intermediate_size=95), ValueError,
     r"pytorch_model.bin: the weight language_model.model.layers.0.mlp.\S+ must be \[.*95.*\] .*got \[.*96"),
    (config_with(language_config__hidden_size="big"), ValueError, "config.json: language_config.hidden_size must be"),
    *((config_with(**{f"language_config__{size}": value}), ValueError,
       f"config.json: language_config.{size} must be an int within 1 .. [0-9]+, got {value}")
      for size, value in (("hidden_size", 0), ("intermediate_size", -1), ("num_attention_heads", 0), ("head_dim", -2),
                          ("num_key_value_heads", 0), ("max_position_embeddings", -1), ("num_hidden_layers", 0),
                          ("num_hidden_layers", 10**9))),
    (config_with(language_config__hidden_act="nope"), ValueError, "copy: config.json must describe a model .*nope"),
    (config_with(language_config__rope_scaling={"rope_type": "nope"}), ValueError, "copy: config.json must .*nope"),
    (config_with(language_config__rope_theta="x"), ValueError, "copy: config.json must describe a model .*TypeError"),
    *((weights_with(lambda weights, name=name, shape=shape: weights.update({name: torch.ones(shape)})), ValueError,
       f"copy: the weight {name} must have a size above 0 in dimension [01], got the shape \\[")
      for name in ("gen_vision_model.quantize.embedding.weight", "gen_vision_model.encoder.conv_in.weight")
      for shape in ([], [5], [0, 0, 0, 0])),
    *((weights_with(lambda weights, name=name, dtype=dtype: weights.update({name: weights[name].to(dtype)})),
       ValueError, f"pytorch_model.bin: the weight {name} must be float32, .*got {str(dtype)[6:]}")
      for name, dtype in ((NORM, torch.int8), ("gen_embed.weight", torch.float8_e4m3fn),
                          ("language_model.model.embed_tokens.weight", torch.complex64))),
    (config_with(language_config__num_attention_heads=7), ValueError, "config.json: language_config .*heads"),
    (config_with(language_config__vocab_size=3), ValueError, "vocab_size must be above .* up to 3, got 3"),
    (weights_with(lambda weights: weights.pop(NORM)), ValueError, f"copy: the weight {NORM} is missing"),
    (weights_with(lambda weights: weights.pop("gen_vision_model.decoder.mid.1.q.bias")), ValueError,
     r"copy: the weight gen_vision_model.decoder.mid.1.q.bias is missing"),
    (weights_with(lambda weights: weights.pop("gen_vision_model.post_quant_conv.weight")), ValueError,
     "copy: the weight gen_vision_model.post_quant_conv.weight is missing"),
    (weights_with(lambda weights: weights.update({"step": Path("x")})), ValueError,
     "pytorch_model.bin: must hold tensors and nothing else"),
    (weights_with(lambda weights: weights.update({"step": 3})), ValueError, "pytorch_model.bin: must hold tensors by"),
    (token_missing("<begin_of_image>"), ValueError, "tokenizer.json: must have the token '<begin_of_image>'"),
    (token_missing("<｜▁pad▁｜>"), ValueError, "tokenizer.json: must have the token '<｜▁pad▁｜>'"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), ValueError, "tokenizer.json: must be a file of"),
])
def test_what_is_missing_is_named(spoiled: Path, spoil: Callable[[Path], Any], error: type[Exception],
                                  message: str) -> None:
    spoil(spoiled)
    with pytest.raises(error, match=message) as found:
        Pipeline.from_pretrained(spoiled)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_damaged_weights_are_named(model: tiny_official.Official, tmp_path: Path, form: str, share: float) -> None:
    folder = tiny_official.save(model, tmp_path / "model", form)
    file = next(folder.glob(f"*.{form}"))
    file.write_bytes(file.read_bytes()[:int(share * file.stat().st_size)])
    with pytest.raises(ValueError, match=f"{file}: .*damage"):
        Pipeline.from_pretrained(folder)


class Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize("old_format", [True, False])
def test_no_code_is_run(spoiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old_format: bool) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({NORM: Evil()}, spoiled / "pytorch_model.bin", _use_new_zipfile_serialization=not old_format)
    with pytest.raises(ValueError, match="never loaded because they could run code"):
        Pipeline.from_pretrained(spoiled)
    assert not Path("ran").exists()


def test_files_of_old_torch_releases_are_read(spoiled: Path, model: tiny_official.Official) -> None:
    torch.save(model.state_dict(), spoiled / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    loaded, _ = official.load(spoiled)
    assert torch.equal(loaded.model.language_model.norm.weight, model.language_model.model.norm.weight)


@pytest.mark.parametrize("part", ["../elsewhere.bin", "/etc/passwd", "..", ".", "", 3])
def test_an_index_names_files_beside_it(spoiled: Path, part: Any) -> None:
    (spoiled / "pytorch_model.bin").unlink()
    (spoiled / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {NORM: part}}))
    with pytest.raises(ValueError, match=r"pytorch_model.bin.index.json: weight_map.* must "):
        Pipeline.from_pretrained(spoiled)


def test_the_engine_around_a_living_model(folder: Path) -> None:
    model, processor = tiny_official.build(3), official.load_processor(folder)
    prompt = tiny_official.prompt_ids(PROMPT)
    janus = official.as_transformers(model, processor.tokenizer)
    before = tiny_official.draw(model, prompt, 2, seed=1)
    assert torch.equal(engine_tokens(janus, prompt, 2, seed=1), before)
    pixels = janus.decode_image_tokens(before)
    theirs = tiny_official.pixels(model.gen_vision_model.state_dict(), before)
    assert torch.allclose(pixels, theirs, atol=1e-4)
    # Nothing was copied: every weight is the official model's own parameter.
    own = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in janus.parameters()} <= own
    pipe = Pipeline(janus, processor)
    assert torch.equal(pipe.generate_tokens(PROMPT, seed=1), tiny_official.draw(model, prompt, 1, seed=1))


def test_steps_of_training_are_seen(folder: Path) -> None:
    """Made in place, between two draws with the same engine, of every part."""
    model, processor = tiny_official.build(3), official.load_processor(folder)
    prompt = tiny_official.prompt_ids(PROMPT)
    janus = official.as_transformers(model, processor)
    engine = Engine(janus)

    def drawn() -> torch.Tensor:
        torch.manual_seed(1)
        return engine.generate([prompt] * 2, seeds=None)

    seen = [drawn()]
    parts = [model.language_model.model, model.gen_head, model.gen_aligner, model.gen_embed]
    for part in parts:
        optimizer = torch.optim.SGD(part.parameters(), lr=0.05)
        for parameter in part.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
        optimizer.step()
        seen.append(drawn())
        assert torch.equal(seen[-1], tiny_official.draw(model, prompt, 2, seed=1))
        assert not torch.equal(seen[-1], seen[-2])
    pixels = janus.decode_image_tokens(seen[-1])
    with torch.no_grad():
        model.gen_vision_model.decoder.conv_out.weight.mul_(2)
    assert not torch.allclose(janus.decode_image_tokens(seen[-1]), pixels)


def test_a_living_model_keeps_mode_gradients_and_storages(folder: Path) -> None:
    model, processor = tiny_official.build(3).train(), official.load_processor(folder)
    model.gen_vision_model.eval().requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    janus = official.as_transformers(model, processor)
    engine_tokens(janus, tiny_official.prompt_ids(PROMPT), 1)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert trained == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert "gen_vision_model" in {name.split(".")[0] for name in model.state_dict()}
    unfuse(janus)
    assert all(parameter.untyped_storage().nbytes() == parameter.nbytes for parameter in model.parameters())


class Adapted(nn.Module):
    """A projection with an adapter."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def test_adapters_are_drawn_by_transformers(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, processor = tiny_official.build(3), official.load_processor(folder)
    before = tiny_official.draw(model, tiny_official.prompt_ids(PROMPT), 1)
    for layer in model.language_model.model.layers:
        layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)
    janus = official.as_transformers(model, processor)
    expected = tiny_official.draw(model, tiny_official.prompt_ids(PROMPT), 1)
    assert not torch.equal(expected, before)
    assert torch.equal(Pipeline(janus, processor).generate_tokens(PROMPT), expected)
    assert "is a Adapted, whose forward the engine would not call" in caplog.text
    with pytest.raises(ValueError, match="whose forward the engine would not call"):
        Engine(janus)


def test_plans_that_evict_are_the_same_for_folder_and_living_model(folder: Path,
                                                                   model: tiny_official.Official) -> None:
    pipe = Pipeline.from_pretrained(folder)
    plan = policies.heavy(pipe.shape, 0.3)
    assert pipe.shape.num_visual_tokens == tiny.TOKENS and pipe.shape.columns == tiny.GRID
    prompt = tiny_official.prompt_ids(PROMPT)
    live = official.as_transformers(model, pipe.processor)
    drawn = [engine_tokens(janus, prompt, 2, plan=plan) for janus in (pipe.model, live)]
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], engine_tokens(live, prompt, 2))


def test_what_is_no_official_model(model: tiny_official.Official, folder: Path) -> None:
    processor = official.load_processor(folder)
    assert official.is_official(model) and not official.is_official(tiny.build_model())
    with pytest.raises(TypeError, match="model must be .*deepseek-ai/Janus .*got a Linear without language_model"):
        official.as_transformers(nn.Linear(1, 1), processor)
    broken = tiny_official.build()
    del broken.gen_vision_model.decoder.conv_out
    with pytest.raises(ValueError, match="Official: the weight gen_vision_model.decoder.conv_out.weight is missing"):
        official.as_transformers(broken, processor)
    with pytest.raises(ValueError, match="tokenizer must have the token '<｜▁pad▁｜>'"):
        official.as_transformers(model, tiny.build_tokenizer())


def test_a_huge_header_is_no_reason_to_fail_otherwise(model: tiny_official.Official, tmp_path: Path) -> None:
    folder = tiny_official.save(model, tmp_path / "model", "safetensors")
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**62) + file.read_bytes()[8:])
    with pytest.raises(ValueError, match=f"{file}: the weights are damaged"):
        Pipeline.from_pretrained(folder)


def test_pickles_of_other_kinds(spoiled: Path) -> None:
    (spoiled / "pytorch_model.bin").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ValueError, match="pytorch_model.bin: "):
        Pipeline.from_pretrained(spoiled)
    torch.save(torch.ones(3), spoiled / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin: must hold tensors by name, got tensor"):
        Pipeline.from_pretrained(spoiled)


def test_heads_of_every_kind_fit(folder: Path) -> None:
    pipe = Pipeline.from_pretrained(folder)
    plan = tiny.plan_of(HeadSpec.full(), HeadSpec.window(3), HeadSpec.heavy(5), HeadSpec.heavy(4, 2))
    assert pipe.generate_tokens([PROMPT, "a heart"], plan=plan).shape == (2, tiny.TOKENS)


def test_the_guide_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of it, one after the other."""
    load = Pipeline.from_pretrained
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda source: load(folder))
    text = (Path(__file__).parents[2] / "docs" / "official-janus.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 5
    model = tiny_official.build()
    processor = official.load_processor(folder)
    processor.pad_id = processor.tokenizer.pad_token_id  # as DeepSeek's has
    names: dict[str, Any] = {"vl_gpt": model, "vl_chat_processor": processor,
                             "input_ids": torch.tensor([tiny_official.prompt_ids(PROMPT)]),
                             "attention_mask": torch.ones(1, len(tiny_official.prompt_ids(PROMPT)), dtype=torch.long),
                             "plan": tiny.plan_of(*[HeadSpec.window(4)] * 4),
                             "prompts": [tiny_official.prompt_ids(PROMPT)] * 2}
    for block in blocks:
        exec(block, names)
    assert names["codes"].shape == (2, tiny.TOKENS) and names["drawn"].tokens.shape == (8, tiny.TOKENS)
