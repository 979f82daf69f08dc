"""The VQ model and the export on small models, and the included model."""

import json
import logging
import math
import socket
import warnings
from dataclasses import asdict

import pytest
import torch
from mutants import check_json_reader
from safetensors.torch import save_file
from transformers import JanusForConditionalGeneration, JanusProcessor

from ssd_shapes import export, janus, losses, runs, text, tokens, train, vq

included = pytest.mark.skipif(not (export.MODEL / "config.json").exists(), reason="the model is not exported yet")


@pytest.fixture(scope="module")
def book():
    return tokens.CodeBook.load()


@pytest.fixture(scope="module")
def start(book):
    """The VQ model before its first step, with some noise in place of what is zero then."""
    torch.manual_seed(0)
    model = vq.build()
    vq.initialise(model, book)
    vq.soften(model)
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory, start):
    """A folder exported from an untrained language model and VQ model, with the weights that went in."""
    root = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    model = janus.build_model(text.build_tokenizer())
    progress = train.Progress(step=7, pictures=56, seconds=60.0, loss=2.0, held_out_loss=2.5,
                              held_out_scene={"shape": 0.5, "color": 0.25, "number": 1.0})
    train.save(root / "lm", model, losses.SceneHead(), [], progress)
    (root / "vq").mkdir()
    save_file({k: v.contiguous() for k, v in start.state_dict().items()}, root / "vq" / "model.safetensors")
    held_out = {"pictures": 3, "psnr_db": 12.3, "psnr_of_patches_db": 36.0, "code_accuracy": 0.987,
                "code_accuracy_at_edges": 0.9}
    record = asdict(vq.Progress(step=5, crops=40, seconds=60.0, held_out=held_out))
    (root / "vq" / "progress.json").write_text(json.dumps(record))
    runs.seal(root / "vq", vq.FILES)
    export.export(root / "lm", root / "vq", root / "model", guidance=1.5, top_k=5)
    return root / "model", train.trained_state(model)


def test_config_keeps_janus_pros_geometry():
    config = vq.build().config
    assert (config.num_patches, config.num_embeddings, config.embed_dim) == (24, tokens.CODES, 8)
    assert config.base_channels % 32 == 0 and config.base_channels // 32 >= 2
    assert 2 ** (len(config.channel_multiplier) - 1) == tokens.PATCH


def test_crops_show_edges(book):
    parts, codes = vq.crops(vq.draw(0, 3, 6), book, 1)
    assert parts.shape == (6, 48, 48, 3) and parts.dtype == torch.uint8 and codes.shape == (6, 12, 12)
    for part, code in zip(parts, codes, strict=True):
        assert len(part.flatten(0, 1).unique(dim=0)) > 1
        cut = part.unfold(0, 4, 4).unfold(1, 4, 4).permute(0, 1, 3, 4, 2).reshape(12, 12, 48)
        assert torch.equal(tokens.nearest(cut.float(), book.codes), code)
    again = vq.crops(vq.draw(0, 3, 6), book, 1)
    assert torch.equal(again[0], parts) and torch.equal(again[1], codes)


def test_the_encoder_starts_close(book, start):
    assert vq.evaluate(start, book, vq.draw(0, 0, 4, "test"))["code_accuracy"] > 0.97


def test_hardening_changes_nothing(book):
    torch.manual_seed(0)
    model = vq.build()
    vq.initialise(model, book)
    vq.soften(model)
    for parameter in model.parameters():  # biases and attention too
        parameter.data += 0.02 * torch.randn_like(parameter)
    pictures = vq.draw(0, 1, 2)
    codes = book.encode(pictures)

    @torch.no_grad()
    def outputs():
        return model.quant_conv(model.encoder(vq.to_model(pictures))), model.decode(codes)

    before = outputs()
    vq.harden(model)
    for a, b in zip(before, outputs(), strict=True):
        assert b.std() > 0.01 and torch.allclose(a, b, atol=1e-4)
    assert torch.allclose(model.quantize.embedding.weight.norm(dim=1), torch.ones(tokens.CODES))
    assert all(m.eps == 1e-6 for m in model.modules() if isinstance(m, torch.nn.GroupNorm))


def test_losses_reach_every_trained_weight(book, start):
    error, entropy = vq.losses(start, *vq.crops(vq.draw(0, 0, 1), book, 0))
    assert entropy < math.log(tokens.CODES) / 2, "the start should be far from chance"
    torch.autograd.backward(error + entropy)
    assert all(p.grad is not None for p in start.parameters() if p.requires_grad)
    start.zero_grad()


def test_fit_resumes_and_measures(tmp_path):
    options = {"batch": 1, "lr": 1e-4, "seed": 0, "save_every": 1e9, "log_every": 1}
    vq.HELD_OUT, before = 2, vq.HELD_OUT
    try:
        vq.fit(tmp_path, steps=1, **options)
        assert vq.load(tmp_path)[1].step == 1
        with pytest.raises(ValueError, match="another --steps \\(1 there, 2 now\\).*--change-options"):
            vq.fit(tmp_path, steps=2, **options)
        vq.fit(tmp_path, steps=2, **options, change_options=True)
    finally:
        vq.HELD_OUT = before
    model, progress = vq.load(tmp_path)
    assert progress.step == progress.crops == 2 and progress.held_out["pictures"] == 2
    assert progress.held_out["code_accuracy"] > 0.9
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint.pt", "files.json", "model.safetensors",
                                                    "options.json", "progress.json"}
    for name in ("model.safetensors", "progress.json"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[:-1] + b" ")
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            vq.load(tmp_path)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "checkpoint.pt").write_bytes((tmp_path / "checkpoint.pt").read_bytes()[:-1000])
    with pytest.raises(ValueError, match="checkpoint.pt is damaged"):
        vq.fit(tmp_path, steps=2, **options)


def test_export_round_trip(exported):
    folder, weights = exported
    model = JanusForConditionalGeneration.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    for name, value in weights.items():
        assert torch.equal(model.state_dict()[name], value.to(torch.bfloat16)), name
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    settings = model.generation_config
    assert settings.guidance_scale == 1.5 and settings.top_k == 5 and settings.do_sample
    assert not list(folder.parent.glob("model.*"))


def test_the_card_states_what_was_recorded(exported):
    card = (exported[0] / "README.md").read_text()
    record = json.loads((exported[0] / export.RECORD).read_text())
    assert record["language_model"]["held_out_loss"] == 2.5
    for figure in ("| 7 |", "| 56 |", "2.5000", "12.3 dB", "98.70%", "scale 1.5", "5 most probable"):
        assert figure in card, figure


def test_scores_of_the_full_cache_alone_are_kept():
    share = {"mean": 0.5, "low": 0.25, "high": 0.75}
    plan = {"families": {"counting": share}, "overall": share, "by_prompt": {"counting": [1.0, 0.0]}}
    kept = export.full_cache_scores({"prompts": 6, "seeds": 1, "results": {"full": plan, "ssd-0.2": plan}})
    assert kept["results"] == {"full": {"families": {"counting": share}, "overall": share}}
    table = export.scores(kept)  # the first six prompts of the suite are of all families
    assert "| counting | 1 | 1 | 0.50 | 0.25 .. 0.75 |" in table and "| overall | 6 | 6 | 0.50 |" in table


def test_results_for_the_card_may_hold_anything(tmp_path):
    share = {"mean": 0.5, "low": 0.25, "high": 0.75}
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"suite": "shapes", "prompts": 6, "seeds": 1, "results": {
        "full": {"families": {"counting": share}, "overall": share, "pictures": 6}}}))
    check_json_reader(export.read_results, file, r"results\.full\.(unknown|pictures.*|families.counting.removed)|"
                      r"results\.unknown|unknown")


def test_export_names_what_is_damaged_and_writes_nothing(exported, tmp_path):
    root = exported[0].parent
    checkpoint = root / "lm" / "step_0000007"
    for file in (checkpoint / "model.safetensors", checkpoint / "progress.json", root / "vq" / "model.safetensors"):
        data = file.read_bytes()
        file.write_bytes(data[:-8] + b"damaged!")
        with pytest.raises(ValueError, match=f"{file} is damaged"):
            export.export(root / "lm", root / "vq", tmp_path / "out")
        file.write_bytes(data)
    (tmp_path / "profile").write_text("no profile")
    with pytest.raises(ValueError, match="profile"):
        export.export(root / "lm", root / "vq", tmp_path / "out", profile=tmp_path / "profile")
    assert not (tmp_path / "out").exists()


def test_export_refuses(exported, tmp_path):
    import typer

    with pytest.raises(typer.BadParameter, match="above 1"):
        export.export(tmp_path, tmp_path, tmp_path / "out", guidance=1.0)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        export.export(tmp_path, tmp_path, tmp_path / "out", guidance=2.0)
    with pytest.raises(ValueError, match="do not fit"):
        export.assemble(text.build_tokenizer(prompts=100), {"nonsense": torch.zeros(1)}, {}, 2.0)
    assert not list(tmp_path.iterdir())


def test_processor_equals_training(exported):
    """What the processor makes of a prompt is what the language model saw in training."""
    processor = JanusProcessor.from_pretrained(exported[0])
    tokenizer = text.build_tokenizer()
    prompt = "a photo of two blue squares"
    seen = [*tokenizer(prompt).input_ids, text.token_id(tokenizer, text.BOI)]
    batch = processor(text=[prompt, "a ring"], generation_mode="image", padding=True, return_tensors="pt")
    assert batch["input_ids"][0].tolist() == seen
    assert batch["attention_mask"][1].tolist() == [0] * (len(seen) - 4) + [1] * 4
    for content in (prompt, [{"type": "text", "text": prompt}]):
        chat = [{"role": "user", "content": content}]
        assert processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) == prompt


@included
def test_included_model_fits_in_the_package():
    files = [path for path in export.MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 15e6


@included
def test_included_model_loads_quietly_and_offline(monkeypatch):
    def no_network(*args):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            JanusProcessor.from_pretrained(export.MODEL)
            _, info = JanusForConditionalGeneration.from_pretrained(export.MODEL, output_loading_info=True)
    finally:
        logger.removeHandler(handler)
    assert not said and not any(info.values()), (said, info)


@included
def test_included_vq_model_is_as_good_as_recorded(book):
    model = JanusForConditionalGeneration.from_pretrained(export.MODEL, dtype=torch.float32)
    recorded = json.loads((export.MODEL / export.RECORD).read_text())["vq_model"]["held_out"]
    assert recorded["psnr_db"] >= 30 and recorded["code_accuracy"] >= 0.985
    pictures = vq.draw(1, 0, 10, "test")  # other pictures than the recorded ones
    found = vq.evaluate(model.model.vqmodel, book, pictures)
    assert found["psnr_db"] >= recorded["psnr_db"] - 1.5
    assert found["code_accuracy"] >= recorded["code_accuracy"] - 0.005
    codes = book.encode(pictures[:2])
    drawn = vq.to_bytes(model.decode_image_tokens(codes).permute(0, 3, 1, 2))
    assert vq.psnr(drawn, pictures[:2]) >= 29


@included
def test_included_model_draws():
    model = JanusForConditionalGeneration.from_pretrained(export.MODEL, dtype=torch.float32)
    processor = JanusProcessor.from_pretrained(export.MODEL)
    model.model.vision_model.config.num_image_tokens = 24  # the first row of patches
    inputs = processor(text=["a red circle"], generation_mode="image", return_tensors="pt")
    codes = model.generate(**inputs, generation_mode="image")
    assert codes.shape == (1, 24) and codes.max() < tokens.CODES
    # Pictures begin with background: a patch of one of its three colours, with rare exceptions.
    flat = tokens.CodeBook.load().codes[codes[0]].view(24, 16, 3).std(1).mean(-1) < 2
    assert flat.float().mean() > 0.7
