"""`Pipeline`: pictures in order, repeatable, and arguments checked before anything is drawn."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL.Image import Image

from ssd_janus import Pipeline, disable, enable
from ssd_janus.checkpoints import fingerprint
from ssd_janus.engine import decode, memory
from ssd_kernels import CachePlan, HeadSpec, policies


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(folder)


def test_pictures_come_in_prompt_major_order(pipe: Pipeline) -> None:
    pictures = pipe(list(tiny.PROMPTS[:2]), num_images_per_prompt=2, seed=3)
    assert len(pictures) == 4 and all(isinstance(picture, Image) and picture.mode == "RGB" for picture in pictures)
    tokens = [tiny.draw(pipe.model, 3 + index, **tiny.image_inputs(tiny.PROMPTS[index // 2:index // 2 + 1]),
                        do_sample=True) for index in range(4)]
    pixels = pipe.model.decode_image_tokens(torch.cat(tokens))
    expected = ((pixels.clamp(-1, 1) + 1) * 127.5).to(torch.uint8)
    for picture, pixel in zip(pictures, expected, strict=True):
        assert picture.tobytes() == pixel.numpy().tobytes()


def test_tokens_repeat_and_leave_the_generator_alone(pipe: Pipeline) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = pipe.generate_tokens("a heart", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, pipe.generate_tokens(["a heart"], seed=1))
    assert not torch.equal(first, pipe.generate_tokens("a heart", seed=2))
    greedy = pipe.generate_tokens("a heart", temperature=0)
    assert torch.equal(greedy, pipe.generate_tokens("a heart", seed=9, top_k=1))
    assert torch.equal(greedy, pipe.generate_tokens("a heart", seed=9, top_p=1e-6))


def test_batches_and_progress(pipe: Pipeline) -> None:
    reports: list[tuple[int, int]] = []
    tokens = pipe.generate_tokens(list(tiny.PROMPTS), seed=4, batch_size=3, temperature=0,
                                  progress=lambda done, total: reports.append((done, total)))
    assert reports == [(step, 2 * tiny.TOKENS) for step in range(1, 2 * tiny.TOKENS + 1)]
    assert torch.equal(tokens, pipe.generate_tokens(list(tiny.PROMPTS), temperature=0, progress=True))


def test_previews_show_the_finished_rows(pipe: Pipeline) -> None:
    seen: list[tuple[list[int], list[Image]]] = []
    pictures = pipe(list(tiny.PROMPTS[:3]), batch_size=2,
                    preview=lambda numbers, rows: seen.append((list(numbers), rows)))
    assert [numbers for numbers, _ in seen] == [[0, 1]] * tiny.GRID + [[2]] * tiny.GRID
    assert [rows[0].size for _, rows in seen] == [(24, 4 * row) for row in range(1, tiny.GRID + 1)] * 2
    assert [rows.tobytes() for rows in seen[tiny.GRID - 1][1]] == [picture.tobytes() for picture in pictures[:2]]


def test_drawing_needs_no_vision_tower(folder: Path) -> None:
    pipe, whole = Pipeline.from_pretrained(folder), tiny.build_model()
    names = {name for name, _ in pipe.model.named_parameters()}
    left_out = {name for name, _ in whole.named_parameters()} - names
    assert left_out and all(name.startswith(("model.vision_model.", "model.aligner.", "lm_head.")) for name in left_out)
    assert fingerprint(pipe.model) == fingerprint(whole)
    assert not any(parameter.is_meta for parameter in pipe.model.parameters())
    assert torch.equal(pipe.generate_tokens("a heart"), Pipeline(whole, pipe.processor).generate_tokens("a heart"))
    with pytest.raises(ValueError, match="loaded for drawing, without its vision tower and text head"):
        pipe.model.generate(input_ids=torch.tensor([[0, 7]]))


def test_models_beyond_the_engine_are_drawn_by_transformers(fresh: Any, caplog: pytest.LogCaptureFixture) -> None:
    pipe = Pipeline(fresh, tiny.build_processor())
    expected = pipe.generate_tokens(list(tiny.PROMPTS), temperature=0)
    seen: list[tuple[int, int]] = []
    layer = fresh.model.language_model.layers[1].mlp
    layer.register_forward_hook(lambda module, args, output: output)
    for _ in range(2):
        tokens = pipe.generate_tokens(list(tiny.PROMPTS), temperature=0, batch_size=3,
                                      progress=lambda done, total: seen.append((done, total)))
        assert torch.equal(tokens, expected)
    assert seen[-1] == (2 * tiny.TOKENS, 2 * tiny.TOKENS)
    assert len([record for record in caplog.records if "layers.1.mlp has hooks" in record.message]) == 1
    assert pipe.last_run is not None and pipe.last_run.rows == 6
    with pytest.raises(RuntimeError, match="not with the engine"):
        pipe.memory_report()


def test_run_statistics(pipe: Pipeline) -> None:
    plan = policies.window(pipe.shape, 0.5)
    pipe(list(tiny.PROMPTS), plan=plan, batch_size=3)
    run = pipe.last_run
    assert run is not None
    assert (run.pictures, run.steps, run.rows) == (4, tiny.TOKENS, 6)
    assert run.budget == plan.budget(tiny.TOKENS)
    size = {"batch_size": 6, "head_dim": tiny.HEAD_DIM, "max_prompt": 9, "dtype": torch.float32,
            "num_visual_tokens": tiny.TOKENS}
    assert run.cache_bytes == plan.nbytes(**size)
    assert run.full_cache_bytes == CachePlan.uniform(HeadSpec.full(), tiny.LAYERS, 4).nbytes(**size)
    assert run.pictures_per_second > 0 and run.decode_seconds > 0
    pipe(["a heart"], guidance_scale=1)
    assert pipe.last_run is not None and pipe.last_run.rows == 1 and pipe.last_run.budget == 1


def test_plan_none_follows_enable_and_a_plan_is_undone(pipe: Pipeline) -> None:
    narrow = policies.window(pipe.shape, 0.2, row_buffer=0)
    full, expected = pipe.generate_tokens("a heart"), pipe.generate_tokens("a heart", plan=narrow)
    assert not torch.equal(full, expected)
    assert "generate" not in vars(pipe.model)
    enable(pipe.model, narrow)
    try:
        assert torch.equal(pipe.generate_tokens("a heart"), expected)
        assert torch.equal(pipe.generate_tokens("a heart", plan=pipe.shape.full_plan()), full)
        assert torch.equal(pipe.generate_tokens("a heart"), expected)
    finally:
        disable(pipe.model)


def test_chat_templates_are_applied(fresh: Any) -> None:
    plain = Pipeline(fresh, tiny.build_processor())
    chat = Pipeline(fresh, tiny.build_processor(tiny.CHAT_TEMPLATE))
    wrapped = chat.generate_tokens("a heart", temperature=0)
    assert torch.equal(wrapped, plain.generate_tokens("<|User|>: a heart\n\n<|Assistant|>:", temperature=0))


@pytest.mark.parametrize("arguments, error, message", [
    ({"prompts": []}, ValueError, "prompts must hold at least one text"),
    ({"prompts": ["a", " "]}, ValueError, r"prompts\[1\] must not be blank"),
    ({"prompts": ["a", 3]}, TypeError, r"prompts\[1\] must be a text, got 3"),
    ({"prompts": 7}, TypeError, "prompts must be a text or a sequence of texts, got int"),
    ({"prompts": "circle " * 90}, ValueError, "prompts must be at most 60 tokens long"),
    ({"num_images_per_prompt": 0}, ValueError, "num_images_per_prompt must be at least 1, got 0"),
    ({"num_images_per_prompt": 1.5}, TypeError, "num_images_per_prompt must be an int"),
    ({"guidance_scale": -1}, ValueError, "guidance_scale must be at least 0"),
    ({"guidance_scale": float("nan")}, ValueError, "guidance_scale must be"),
    ({"guidance_scale": "high"}, TypeError, "guidance_scale must be a number"),
    ({"seed": -1}, ValueError, "seed must be at least 0"),
    ({"seed": None}, TypeError, "seed must be an int"),
    ({"temperature": -0.1}, ValueError, "temperature must be at least 0"),
    ({"top_k": -1}, ValueError, "top_k must be at least 0"),
    ({"top_p": 1.1}, ValueError, "top_p must be within 0 .. 1"),
    ({"top_p": 0.0}, ValueError, "top_p must be above 0"),
    ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
    ({"progress": "yes"}, TypeError, "progress must be a bool or a function"),
    ({"plan": "plan.json"}, TypeError, "plan must be a CachePlan, got str"),
    ({"plan": CachePlan.uniform(HeadSpec.full(), 1, 1)}, ValueError, "plan must have the model's 3 layers"),
])
def test_bad_arguments(pipe: Pipeline, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pipe(**{"prompts": ["a heart"], **arguments})
    assert "generate" not in vars(pipe.model)


def test_from_pretrained_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="model must be a folder or a hub id"):
        Pipeline.from_pretrained(tmp_path / "nowhere")
    monkeypatch.setattr("ssd_janus.checkpoints.resources.files", lambda package: tmp_path)
    with pytest.raises(FileNotFoundError, match="the included model is not installed"):
        Pipeline.from_pretrained()


@pytest.mark.parametrize("kind, message", [
    ("multi_modality", "config.json: gen_vision_config is missing"),
    ("llama", "model must be a Janus .*'multi_modality'.*with model_type 'llama'"), (None, "with model_type None")])
def test_other_checkpoints_are_named_in_one_line(tmp_path: Path, kind: str | None, message: str) -> None:
    config = {"architectures": ["MultiModalityCausalLM"]} | ({} if kind is None else {"model_type": kind})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as error:
        Pipeline.from_pretrained(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200 + len(str(tmp_path))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_damaged_weights_are_named(folder: Path, tmp_path: Path, share: float) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy/model.safetensors"
    file.write_bytes(file.read_bytes()[:int(share * file.stat().st_size)])
    with pytest.raises(ValueError, match=f"weights of model {tmp_path / 'copy'} are damaged"):
        Pipeline.from_pretrained(tmp_path / "copy")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("engine", [True, False])
def test_caches_follow_the_language_model(dtype: torch.dtype, engine: bool) -> None:
    """Whatever dtypes the other parts are in, which drawing tokens does not use."""
    model, other = tiny.build_model(), torch.bfloat16 if dtype == torch.float32 else torch.float32
    pipes = [Pipeline(each, tiny.build_processor()) for each in (model.to(dtype), copy.deepcopy(model))]
    mixed = pipes[1].model.model
    for part in (mixed.vision_model, mixed.aligner, mixed.vqmodel):
        part.to(other)
    assert pipes[1].model.dtype == other
    plan = policies.heavy(pipes[0].shape, 0.5)
    if not engine:
        for pipe in pipes:
            pipe.model.model.language_model.norm.register_forward_hook(lambda module, args, output: output)
    tokens = [pipe.generate_tokens(list(tiny.PROMPTS), plan=plan, seed=7) for pipe in pipes]
    assert torch.equal(*tokens)
    runs = [pipe.last_run for pipe in pipes]
    assert runs[0] is not None and runs[1] is not None
    assert (runs[0].cache_bytes, runs[0].full_cache_bytes) == (runs[1].cache_bytes, runs[1].full_cache_bytes)
    # The engine holds unconditional prompts of one length once.
    different = len(tiny.PROMPTS) + len({len(prompt) for prompt in pipes[0].prompt_tokens(tiny.PROMPTS)})
    assert runs[0].cache_bytes == plan.nbytes(batch_size=8, head_dim=tiny.HEAD_DIM, max_prompt=9, dtype=dtype,
                                              num_visual_tokens=tiny.TOKENS,
                                              shared_prompts=different if engine else None)
    for pipe in pipes:
        enable(pipe.model, plan)
    assert torch.equal(*(tiny.draw(pipe.model) for pipe in pipes))
    assert memory.step_bytes(pipes[1].model, 4, 8, 9) == memory.step_bytes(pipes[0].model, 4, 8, 9)
    assert memory.decode_bytes(pipes[1].model, 1) == memory.decode_bytes(model.to(other), 1)
    assert torch.equal(next(decode(pipes[1].model, tokens[1])), next(decode(model, tokens[1])))


def test_dtype_and_backend(folder: Path) -> None:
    pipe = Pipeline.from_pretrained(str(folder), dtype=torch.bfloat16, backend="reference")
    pipe.generate_tokens("a heart")
    assert pipe.model.dtype == torch.bfloat16
    assert pipe.last_run is not None and pipe.last_run.backend == "reference"
