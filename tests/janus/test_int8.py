"""Keys and values in 8 bits: what is drawn, and what it takes, wherever a model draws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_official
import torch
from test_cli import run
from test_engine import prompts_of

import ssd_attach
import ssd_janus
from ssd_janus import ModelShape, Pipeline, official
from ssd_janus.engine import Engine, Sampling, max_batch, memory
from ssd_kernels import CachePlan, CompressedCache, HeadSpec, policies
from ssd_kernels.policies import Raster


def in_8_bits(vectors: torch.Tensor) -> torch.Tensor:
    """What a cache in 8 bits returns of float32 vectors [..., D]."""
    largest = vectors.abs().amax(-1, keepdim=True)
    limit = torch.full_like(largest, 127)  # a number over a tensor would be its reciprocal times the number
    return torch.where(largest == 0, 0, (vectors * (limit / largest)).round() * (largest / limit))


class Dense:
    """Observes a run of a plan that keeps everything: attention over all that it was given, dense and in float64, with
    and without 8 bits."""

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.errors: list[torch.Tensor] = []
        self.costs: list[torch.Tensor] = []

    def prefill(self, cache: CompressedCache, layer: int, keys: torch.Tensor, values: torch.Tensor,
                prompt_lens: list[int]) -> None:
        self.shared = cache.shared_prompts
        self.keys.append(keys.cpu())
        self.values.append(values.cpu())
        self.seen = torch.arange(keys.shape[2]) < torch.tensor(prompt_lens)[:, None]

    def decode(self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float,
               out: torch.Tensor) -> None:
        query, keys, values, out = (tensor.cpu() for tensor in (query, keys, values, out))
        self.keys[layer] = torch.cat([self.keys[layer], keys[:, :, None]], 2)
        self.values[layer] = torch.cat([self.values[layer], values[:, :, None]], 2)
        every = self.keys[layer].shape[2]
        seen = torch.nn.functional.pad(self.seen, (0, every - self.seen.shape[1]), value=True)[:, None, None]
        grouped = query.double().unflatten(1, (keys.shape[1], -1))
        found = []
        for stored in (in_8_bits, torch.clone):
            key, value = (stored(tensor).double() for tensor in (self.keys[layer], self.values[layer]))
            logits = (grouped @ key.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)
            found.append((logits.softmax(-1) @ value).flatten(1, 2))
        self.errors.append((out - found[0]).abs().max())
        self.costs.append((found[1] - found[0]).abs().max())

    def check(self, shared: bool) -> None:
        """The run was a whole picture's, and stored prompts once for all rows, or not."""
        errors, costs = torch.stack(self.errors), torch.stack(self.costs)
        assert (self.shared is not None) is shared
        assert len(errors) == tiny.LAYERS * (tiny.TOKENS - 1) and bool((errors < 2e-5).all())
        assert costs.min() > 1e-3, "8 bits must matter, or this test shows nothing"


@pytest.mark.parametrize("engine", [True, False])
@pytest.mark.parametrize("keep_prompt", [True, False])
def test_steps_attend_to_what_8_bits_hold(fresh: Any, engine: bool, keep_prompt: bool) -> None:
    """Whoever draws, with prompts that rows share, keep for themselves or may evict."""
    if not engine:
        fresh.model.language_model.layers[0].register_forward_hook(lambda *args: None)
    pipe = Pipeline(fresh, tiny.build_processor())
    plan = CachePlan.uniform(HeadSpec.full(), tiny.LAYERS, 4, keep_prompt=keep_prompt, kv_format="int8")
    dense = Dense()
    pipe.generate_tokens(list(tiny.PROMPTS), 2, plan=plan, observer=dense)
    assert (pipe._engine is not None) is engine
    dense.check(shared=engine and keep_prompt)


def test_pictures_are_the_same_in_any_company(fresh: Any) -> None:
    """Stored keys and values have the same bits where those that are given have."""
    prompts, engine = prompts_of(tiny.image_inputs()), Engine(fresh, ModelShape.of(fresh).full_plan("int8"))
    together = engine.generate(prompts, guidance=2.0, seeds=5)
    for first, last in ((0, 1), (1, 4)):
        assert torch.equal(engine.generate(prompts[first:last], guidance=2.0, seeds=5 + first), together[first:last])


def test_memory_counts_bytes_and_scales(fresh: Any) -> None:
    prompts, shape = prompts_of(tiny.image_inputs(tiny.PROMPTS[:2])), ModelShape.of(fresh)
    engines = {kind: Engine(fresh, shape.full_plan(kind)) for kind in ("auto", "int8")}
    slots = shape.num_layers * shape.num_heads * 2
    held = {}
    for kind, engine in engines.items():
        engine.generate([prompt for prompt in prompts for _ in range(3)], guidance=2.0,
                        sampling=Sampling(greedy=True), steps=2)
        held[kind] = engine.memory_report().cache
        assert held[kind] == engine.last_run.cache_bytes
    # Six pictures of two rows; two prompts and two unconditional ones, held once; positions and tables are alike.
    vectors = 12 * tiny.TOKENS + 4 * max(map(len, prompts))
    assert held["auto"] - held["int8"] == slots * vectors * (4 * tiny.HEAD_DIM - tiny.HEAD_DIM - 4)
    room = sum((memory.weight_bytes(fresh), memory.step_bytes(fresh, 20, 40, 16), 40 * held["auto"] // 12))
    fits = {kind: max_batch(engine.plan, fresh, room, max_prompt=16) for kind, engine in engines.items()}
    assert fits["int8"] > 1.5 * fits["auto"] > 0
    assert engines["int8"].max_batch(room, max_prompt=16, samples=4) > fits["int8"], "shared prompts count, too"


def test_one_line_takes_a_format(fresh: Any) -> None:
    plain, stored = (ssd_janus.enable(fresh, "decayed", budget=0.5, kv_format=kind) for kind in ("auto", "int8"))
    assert stored.plan == policies.build("decayed", plain.shape, 0.5, kv_format="int8")
    assert stored.plan.budget(tiny.TOKENS) == plain.plan.budget(tiny.TOKENS)
    assert stored.nbytes() < 0.5 * plain.nbytes()
    assert "rows in float32, " in str(plain) and str(plain).endswith("MB")
    assert "rows in int8, " in str(stored) and str(stored).endswith("MB in float32")
    assert f"{stored.nbytes() / stored.full_nbytes():.1%} of the full cache's" in str(stored)
    shared = ssd_janus.enable(fresh, "decayed", byte_budget=0.2, kv_format="int8")
    share = 0.2 * 4 * tiny.HEAD_DIM / (tiny.HEAD_DIM + 4)
    assert shared.plan == policies.build("decayed", shared.shape, share, kv_format="int8") and shared.asked == 0.2
    reached = shared.plan.byte_budget(tiny.TOKENS, head_dim=tiny.HEAD_DIM, dtype=torch.float32)
    assert (f"decayed: 20.0% of the bytes asked, {reached:.1%} reached, with "
            f"{shared.plan.budget(tiny.TOKENS):.1%} of the tokens, row buffer 6; ") in str(shared)
    assert ssd_janus.enable(fresh, "full", kv_format="int8").plan == shared.shape.full_plan("int8")
    online = ssd_janus.enable(fresh, "online", budget=0.8, kv_format="int8").plan
    assert online.kv_format == "int8" and online.to_dict()["kv_format"] == "int8"
    assert tiny.draw(fresh).shape == (4, tiny.TOKENS)
    for beside in ({"kv_format": "int8"}, {"byte_budget": 0.2}):
        with pytest.raises(ValueError, match=f"{next(iter(beside))} must be left out beside a plan"):
            ssd_janus.enable(fresh, shared.plan, **beside)
    for wrong, match in (({"kv_format": "int4"}, "kv_format must be one of 'auto', 'int8', 'best', got 'int4'"),
                         ({"kv_format": "best"}, "needs byte_budget"),
                         ({"budget": 0.2, "byte_budget": 0.2}, "must be given, and not both")):
        with pytest.raises(ValueError, match=match):
            ssd_janus.enable(fresh, "decayed", **wrong)
    assert ssd_janus.hooks.in_force(fresh)[0] is online, "what was refused changes nothing"


def test_loops_over_other_models_hold_8_bits() -> None:
    """Loops by hand over transformers' decoders and over DeepSeek's models, whose rollouts share prompts."""
    janus = tiny.build_model(kv_heads=2)
    taken = {}
    for kind in ("auto", "int8"):
        choice = ssd_attach.attach(janus, "full", kv_format=kind, pictures=Raster(tiny.GRID, tiny.GRID))
        output = janus.generate(**tiny.image_inputs(), max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        (cache,) = ssd_attach.caches(janus)
        taken[kind] = cache.nbytes
        assert cache.nbytes == choice.nbytes(rows=4, max_prompt=cache.max_prompt)
        del cache, output
    assert taken["int8"] < 0.4 * taken["auto"]
    model = tiny_official.build(kv_heads=2)
    ids = torch.tensor([tiny_official.prompt_ids("two blue squares")])
    for kind in ("auto", "int8"):
        ssd_janus.enable(model, "full", kv_format=kind)
        found = official.rollout(model, ids, torch.ones_like(ids), 3, pad_token_id=2, steps=4)
        taken[kind] = found.cache_bytes
        assert found.tokens.shape == (3, 4) and torch.isfinite(found.drawn).all()
    assert taken["int8"] < 0.4 * taken["auto"]


def test_rollouts_hold_8_bits(fresh: Any) -> None:
    prompts = prompts_of(tiny.image_inputs(tiny.PROMPTS[:2]))
    shape = ModelShape.of(fresh)
    plain, stored = (Engine(fresh, shape.full_plan(kind)).rollout(prompts, 2, 3, guidance=2.0, steps=6)
                     for kind in ("auto", "int8"))
    assert stored.cache_bytes < 0.4 * plain.cache_bytes
    assert torch.equal(stored.drawn[:, 0], plain.drawn[:, 0]), "a prompt is computed before it is stored"
    same = (stored.tokens[:, :2] == plain.tokens[:, :2]).all(1)
    assert same.any() and not torch.equal(stored.drawn[same, 1], plain.drawn[same, 1])


@pytest.fixture(scope="module")
def drawn(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of one prompt in both formats, and in a folder of an evaluator."""
    out = tmp_path_factory.mktemp("int8")
    for name, options in (("full", []), ("int8", ["--kv", "int8", "--json"])):
        result = run("generate", "a heart", "--model", folder, "--out", out / name, "--verbose", *options)
        assert result.exit_code == 0, result.output
        assert ("cache, int8" in result.stderr) is (name == "int8")
    (out / "record.json").write_text(result.stdout)
    return out


def test_generate_and_gallery(drawn: Path, folder: Path) -> None:
    record, pipe = json.loads((drawn / "record.json").read_text()), Pipeline.from_pretrained(folder)
    assert record["kv_format"] == "int8" and record["plan_budget"] == 1
    assert record["cache_bytes"] < 0.4 * record["full_cache_bytes"]
    assert (drawn / "int8" / "01-a-heart.png").read_bytes() != (drawn / "full" / "01-a-heart.png").read_bytes()
    pipe(["a heart"], plan=pipe.shape.full_plan("int8"))
    assert pipe.last_run.cache_bytes == record["cache_bytes"]
    result = run("gallery", "a heart", "--model", folder, "--out", drawn / "sheet.png", "--kv", "auto", "--kv", "int8",
                 "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["plans"] == ["full", "full-int8"] and (drawn / "sheet.png").exists()


def test_folders_do_not_mix_formats(folder: Path, tmp_path: Path) -> None:
    common = ("--model", folder, "--out", tmp_path / "out")
    assert run("generate", "a heart", *common, "--layout", "dpg", "--images-per-prompt", 4).exit_code == 0
    result = run("generate", "a heart", *common, "--layout", "dpg", "--images-per-prompt", 4, "--kv", "int8")
    assert result.exit_code == 2 and "int8" in result.stderr and "--redraw" in result.stderr, result.stderr


def test_evaluate_compares_formats(folder: Path, tmp_path: Path) -> None:
    common = ("--model", folder, "--out", tmp_path / "out", "--suite", "fidelity", "--limit", 2, "--no-pictures",
              "--row-buffer", 0, "--policy", "full", "--policy", "window")
    result = run("evaluate", *common, "--budget", 0.5, "--kv", "auto", "--kv", "int8", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    found, vector = record["results"], (tiny.HEAD_DIM + 4) / (4 * tiny.HEAD_DIM)
    assert list(found) == ["full", "full-int8", "window-0.5", "window-0.5-int8"]
    kept = found["window-0.5"]["budget"]
    assert list(record["byte_budgets"].values()) == pytest.approx([1, vector, kept, vector * kept])
    head, _, *rows = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert head.startswith("| plan | budget | bytes | pictures | KL mean |")
    assert [row.split(" | ")[2] for row in rows] == [f"{share:.1%}" for share in record["byte_budgets"].values()]
    assert found["full"]["kl_mean"] < 1e-9 < 1e-7 < found["full-int8"]["kl_mean"] < found["window-0.5"]["kl_mean"]
    settings = {name: json.loads((tmp_path / "out" / name / "settings.json").read_text()) for name in found}
    assert [each["plan"].get("kv_format", "auto") for each in settings.values()] == ["auto", "int8"] * 2
    (tmp_path / "out" / "full-int8").rename(tmp_path / "out" / "full-other")
    (tmp_path / "out" / "full").rename(tmp_path / "out" / "full-int8")
    result = run("evaluate", *common, "--budget", 0.5, "--kv", "int8")
    assert result.exit_code == 2 and "results made with another plan (kv_format" in " ".join(result.stderr.split())


def test_the_plan_command_shows_formats_and_bytes(folder: Path, tmp_path: Path) -> None:
    common = ("--policy", "decayed", "--row-buffer", 0, "--model", folder)

    def facts(*arguments: object) -> Any:
        result = run("plan", *common, *arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    plain, stored = facts("--budget", 0.5), facts("--budget", 0.5, "--kv", "int8", "--out", tmp_path / "plan.json")
    assert (plain["kv_format"], stored["kv_format"]) == ("auto", "int8")
    assert plain["budget_reached"] == stored["budget_reached"] == plain["byte_budget_reached"]
    vector = (tiny.HEAD_DIM + 4) / (4 * tiny.HEAD_DIM)
    assert stored["byte_budget_reached"] == pytest.approx(vector * stored["budget_reached"])
    assert stored["cache_bytes"] < 0.5 * plain["cache_bytes"]
    assert stored["full_cache_bytes"] == plain["full_cache_bytes"]
    assert CachePlan.load(tmp_path / "plan.json").kv_format == "int8"
    line = run("plan", *common, "--budget", 0.5, "--kv", "int8").stdout.splitlines()[0]
    assert "decayed, int8: budget 50.0% asked" in line and "a guided picture in int8, " in line
    assert " in float32; heads: " in line
    found = facts("--budget-bytes", 0.25, "--kv", "int8")
    assert found["byte_budget"] == 0.25 and found["budget"] is None
    assert 0.25 - 1 / tiny.TOKENS < found["byte_budget_reached"] <= 0.25 < found["budget_reached"]
    line = run("plan", *common, "--budget-bytes", 0.25, "--kv", "int8").stdout.splitlines()[0]
    assert (f"decayed, int8: 25.0% of the bytes asked, {found['byte_budget_reached']:.2%} reached, with "
            f"{found['budget_reached']:.2%} of the tokens") in line
