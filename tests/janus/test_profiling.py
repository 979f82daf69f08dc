"""Head profiles against dense attention computed from transformers' own eager weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_cli import run

from ssd_janus import Pipeline, profiling
from ssd_janus.engine import memory
from ssd_janus.evaluation import fidelity
from ssd_janus.probing import Probes
from ssd_janus.profile_parts import Parts
from ssd_janus.prompts import calibration, shapes_suite
from ssd_kernels import CachePlan, HeadSpec, policies
from ssd_kernels.policies import HeadProfile

TEXTS = list(tiny.PROMPTS[:3])


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def profile(pipe: Pipeline) -> HeadProfile:
    return profiling.measure(pipe, TEXTS, seed=3, batch_size=2)


def dense_attention(pipe: Pipeline) -> list[torch.Tensor]:
    """Per picture the visual-to-all attention [layers, rows, heads, T, P + T] of a run with the profile's tokens."""
    found = []
    for first in range(0, len(TEXTS), 2):
        texts = TEXTS[first:first + 2]
        tokens = pipe.generate_tokens(texts, seed=3 + first)
        model = pipe.model
        inputs = pipe._tokenise(texts)
        ids, mask = inputs["input_ids"].repeat(2, 1), inputs["attention_mask"].repeat(2, 1)
        blank = (ids[len(texts):] != 0) & (ids[len(texts):] != 3)
        ids[len(texts):].masked_fill_(blank, 2)
        images = model.prepare_embeddings_for_image_generation(tokens.repeat(2, 1))
        embedded = torch.cat([model.get_input_embeddings()(ids), images[:, :-1]], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), embedded.shape[1] - mask.shape[1])], 1)
        before = model.model.language_model.config._attn_implementation
        model.model.language_model.config._attn_implementation = "eager"
        try:
            with torch.no_grad():
                out = model.model.language_model(inputs_embeds=embedded, attention_mask=mask, output_attentions=True)
        finally:
            model.model.language_model.config._attn_implementation = before
        found.append(torch.stack(out.attentions)[:, :, :, ids.shape[1]:])
    return found


def test_shares_equal_dense_attention(pipe: Pipeline, profile: HeadProfile) -> None:
    columns, steps = tiny.GRID, tiny.TOKENS - 1  # the last token is drawn and never attends
    age, sparsity, prompt, first, count = 0.0, 0.0, 0.0, 0.0, 0
    places = torch.zeros(tiny.LAYERS, 4, len(profile.places), tiny.TOKENS)
    for weights in dense_attention(pipe):
        length = weights.shape[-1] - steps
        for query in range(columns, steps):
            prompt = prompt + weights[:, :, :, query, :length].sum((1, 3))
            visual = weights[:, :, :, query, length:length + query + 1]
            visual = (visual / visual.sum(-1, keepdim=True)).sum(1)
            padded = torch.zeros(*visual.shape[:2], tiny.TOKENS)
            padded[..., :query + 1] = visual.flip(-1)
            age = age + padded
            far = [token for token in range(query + 1) if query // columns - token // columns > 1
                   or abs(query % columns - token % columns) > 1]
            sparsity = sparsity + visual[..., far].sum(-1)
            first = first + visual[..., :columns]
            count += weights.shape[1]
            if query in profile.places:
                places[:, :, profile.places.index(query), :query + 1] += visual / (2 * len(TEXTS))
    assert profile.places == (3 * 6 + 3, 4 * 6, 4 * 6 + 5)
    assert torch.allclose(profile.place_mass.float(), places, rtol=1e-3, atol=1e-5)
    for got, total in ((profile.sparsity, sparsity), (profile.prompt_mass, prompt), (profile.age_mass, age),
                       (profile.first_mass, first)):
        assert torch.allclose(got, total / count, atol=1e-5)


def test_shares_add_up(profile: HeadProfile) -> None:
    ones = torch.ones(tiny.LAYERS, 4)
    for name, dims in (("age_mass", 2), ("offset_mass", (2, 3)), ("column_mass", 2)):
        assert torch.allclose(getattr(profile, name).sum(dims), ones, atol=1e-5), name
    assert torch.allclose(profile.window_loss(tiny.TOKENS), 0 * ones, atol=1e-5)
    assert (profile.first_mass <= profile.column_mass + 1e-6).all()
    assert profile.meta["prompts"] == TEXTS
    # The first layer's keys and values know nothing of the prompt yet, and the last token never attends.
    assert (profile.guidance_difference[1:, :, :-1] > 0).all()
    assert not profile.guidance_difference[0].any() and not profile.guidance_difference[..., -1].any()


def test_guidance_difference_equals_that_of_the_two_branches(pipe: Pipeline) -> None:
    """Against keys and values kept whole, per head."""
    class Keep:
        def __init__(self) -> None:
            self.found = torch.zeros(tiny.LAYERS, 4, tiny.TOKENS)
            self.step = [0] * tiny.LAYERS

        def prefill(self, *arguments: Any) -> None:
            pass

        def decode(self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
                   scale: float | None, out: torch.Tensor) -> None:
            for head in range(4):
                for tensor in (keys, values):
                    self.found[layer, head, self.step[layer]] += ((tensor[0, head] - tensor[1, head]) ** 2).mean()
            self.step[layer] += 1

    keep = Keep()
    pipe.generate_tokens(TEXTS[:1], seed=3, plan=pipe.shape.full_plan(), observer=keep)
    got = profiling.measure(pipe, TEXTS[:1], seed=3).guidance_difference
    assert torch.allclose(got, keep.found, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(got[1, 0], got[1, 1], rtol=1e-2)


def test_places_are_watched_and_attend(pipe: Pipeline) -> None:
    """Never in the first row nor the last token, whatever the grid."""
    for tokens, columns in ((576, 24), (36, 6), (4, 2), (8, 1), (6, 3)):
        places = profiling.places(replace(pipe.shape, num_visual_tokens=tokens, columns=columns))
        assert places == tuple(sorted(set(places))) and all(columns <= place < tokens - 1 for place in places)
    janus = replace(pipe.shape, num_visual_tokens=576, columns=24)
    assert profiling.places(janus) == (12 * 24 + 12, 18 * 24, 18 * 24 + 23)


def test_errors_fall_with_size_and_match_fidelity(pipe: Pipeline, profile: HeadProfile, tmp_path: Path) -> None:
    assert profile.error.shape == (tiny.LAYERS, 4, 2, len(policies.KINDS), len(profile.sizes))
    mean = profile.error.mean((0, 1))
    assert (mean[..., :-1] > mean[..., 1:]).all()
    # A row buffer only adds tokens.
    assert (mean[0] > mean[1]).all() and profile.row_buffers == (0, tiny.GRID)
    # Windows: the relative output error of one head, through its own projection, as `fidelity` measures it.
    size = profile.sizes[2]
    plan = CachePlan([[policies.KINDS["window"](size)] * 4] * tiny.LAYERS, tiny.GRID)
    found = torch.tensor(fidelity.evaluate(pipe, {"a": plan}, tmp_path, prompts=TEXTS[:2])["a"].head_error)
    order = profile.error[:, :, 1, 0, 2].sqrt().flatten().argsort()
    assert torch.corrcoef(torch.stack([found.flatten()[order], profile.error[:, :, 1, 0, 2].sqrt().flatten()[order]]))[
        0, 1] > 0.5


def test_8_bits_cost_what_they_add_to_the_residual_stream(pipe: Pipeline) -> None:
    """Against a cache in 8 bits of its own and each head's slice of the projection, one picture, step by step."""
    class Beside(fidelity.AttentionError):
        def __init__(self) -> None:
            super().__init__(profiling.everything_in_8_bits(pipe.shape), pipe.backend)
            self.outs: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(tiny.LAYERS)]

        def decode(self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
                   scale: float | None, out: torch.Tensor) -> None:
            assert self.shadow is not None and self.shadow.plan.kv_format == "int8"
            self.outs[layer].append((self.shadow.decode(layer, query, keys, values, scale).double(), out.double()))

    beside, recorder = Beside(), fidelity.Recorder(pipe.guidance(None))
    pipe.generate_tokens(TEXTS[:1], seed=3, plan=pipe.shape.full_plan(), observer=beside, logits_processor=[recorder])
    # The first distribution follows the prompt.
    weight = [1 - float(step.exp().square().sum()) for step in recorder.steps[1:]]
    expected = torch.zeros(tiny.LAYERS, 4, dtype=torch.float64)
    for layer, outs in enumerate(beside.outs):
        matrix = pipe.model.model.language_model.layers[layer].self_attn.o_proj.weight.detach().double()
        norm = sum(w * (out.flatten(1) @ matrix.T).square().sum() for w, (_, out) in zip(weight, outs, strict=True))
        for head, part in enumerate(matrix.split(matrix.shape[1] // 4, 1)):
            expected[layer, head] = sum(w * ((got - out).view(2, 4, -1)[:, head] @ part.T).square().sum()
                                        for w, (got, out) in zip(weight, outs, strict=True)) / norm
    got = profiling.measure(pipe, TEXTS[:1], seed=3).int8_error
    assert got is not None and torch.allclose(got.double(), expected, rtol=1e-3, atol=0)
    assert not torch.allclose(expected[0, 0], expected[0, 1], rtol=0.05)


def test_batches_that_do_not_fit_are_refused(pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for the full cache, which the engine counts, and not for what is measured beside it."""
    plans = profiling.plans_beside(pipe.shape, profiling.measured_sizes(pipe.shape))
    longest = max(map(len, pipe.prompt_tokens(TEXTS)))
    taken = sum(plan.nbytes(batch_size=6, head_dim=tiny.HEAD_DIM, max_prompt=longest, dtype=torch.float32,
                            num_visual_tokens=tiny.TOKENS) for plan in plans)
    monkeypatch.setattr(fidelity, "available_memory", lambda device: taken - 1)
    with pytest.raises(ValueError, match="batch_size must be smaller.* for 6 rows.* enough for 5 rows"):
        profiling.measure(pipe, TEXTS, batch_size=3)
    monkeypatch.setattr(fidelity, "available_memory", lambda device: 0)
    with pytest.raises(ValueError, match="batch_size must be smaller.* enough for 0 rows"):
        fidelity.evaluate(pipe, {"a": pipe.shape.full_plan()}, tmp_path, prompts=TEXTS)
    assert not list(tmp_path.glob("a/batches/*"))


@pytest.mark.parametrize("measure", [
    lambda pipe, out: profiling.measure(pipe, TEXTS, batch_size=3),
    lambda pipe, out: fidelity.evaluate(pipe, {"a": pipe.shape.full_plan()}, out, prompts=TEXTS, batch_size=3),
], ids=["profile", "fidelity"])
def test_batches_are_not_split_behind_a_measurement(pipe: Pipeline, tmp_path: Path, measure: Any,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "max_batch", lambda *args, **kwargs: 2)
    with pytest.raises(ValueError, match="batch_size must be at most 2 with an observer or logits processors, got 3"):
        measure(pipe, tmp_path)


def test_steps_count_by_what_they_can_change(pipe: Pipeline) -> None:
    statistics = profiling.HeadStatistics(pipe, [4])
    statistics.begin(guided=True)
    costs, norm = torch.rand(4, *statistics.error.shape[1:]), torch.rand(4)  # two pictures, two branches
    statistics.pending = {1: (costs, norm)}
    even = torch.tensor([0.5, 0.5, 0.0, 0.0])
    statistics.weigh(torch.stack([even, torch.tensor([1.0, 0.0, 0.0, 0.0])]).log())  # the second is certain
    assert torch.allclose(statistics.error[1], (costs[0] + costs[2]) / 2) and not statistics.error[0].any()
    assert torch.allclose(statistics.norm[1], (norm[0] + norm[2]) / 2)


def test_a_layer_that_matters_more_is_more_sensitive(folder: Path) -> None:
    pipe = Pipeline.from_pretrained(folder)
    plain = profiling.measure(pipe, TEXTS[:2]).sensitivity
    assert (plain > 0).all()
    with torch.no_grad():  # nothing of what attention in this layer does reaches the rest
        pipe.model.model.language_model.layers[0].self_attn.o_proj.weight *= 1e-3
    assert profiling.measure(pipe, TEXTS[:2]).sensitivity[0] < 0.1 * plain[0]


def test_sensitivity_is_the_kl_of_all_prompts_over_the_error(pipe: Pipeline, profile: HeadProfile) -> None:
    even = replace(profile, sensitivity=torch.ones(tiny.LAYERS))
    scale, seen = pipe.guidance(None), []
    probes = Probes(pipe, TEXTS, scale, 5, 2, Parts())
    probes.measure(even, probes.to_do(), lambda done, total: seen.append((done, total)))
    got = probes.sensitivity(even)
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] == 2 * (1 + tiny.LAYERS) * tiny.TOKENS
    probe = policies.adaptive(pipe.shape, 0.1, 0, profile=even)
    full = [HeadSpec.full()] * 4
    for layer in range(tiny.LAYERS):
        plan, kl = CachePlan([probe.layers[n] if n == layer else full for n in range(tiny.LAYERS)], 0), []
        for first, texts in ((0, TEXTS[:2]), (2, TEXTS[2:])):
            intact = fidelity.Recorder(scale)
            tokens = pipe.generate_tokens(texts, seed=5 + first, logits_processor=[intact])
            forced = fidelity.Recorder(scale, tokens)
            pipe.generate_tokens(texts, seed=5 + first, plan=plan, logits_processor=[forced])
            kl += torch.nn.functional.kl_div(torch.stack(forced.steps), torch.stack(intact.steps), reduction="none",
                                             log_target=True).double().sum(-1).mean(0).tolist()
        assert len(kl) == len(TEXTS) and min(kl) > 0
        assert got[layer].item() * policies.predicted_cost(plan, even) == pytest.approx(sum(kl) / len(kl), rel=1e-4)


def test_profiling_changes_nothing_and_repeats(pipe: Pipeline, profile: HeadProfile) -> None:
    before = pipe.generate_tokens(TEXTS, seed=3)
    again = profiling.measure(pipe, TEXTS, seed=3, batch_size=2)
    assert torch.equal(again.error, profile.error) and torch.equal(again.age_mass, profile.age_mass)
    assert torch.equal(pipe.generate_tokens(TEXTS, seed=3), before)


def test_heads_that_see_only_the_prompt_have_shares_too(folder: Path) -> None:
    pipe = Pipeline.from_pretrained(folder)
    with torch.no_grad():  # attention so sharp that the shares of most tokens underflow
        for layer in pipe.model.model.language_model.layers:
            layer.self_attn.q_proj.weight *= 200
    profile = profiling.measure(pipe, TEXTS[:1])
    assert (profile.prompt_mass > 0.2).any()
    for value in vars(profile).values():
        assert not isinstance(value, torch.Tensor) or value.isfinite().all()
    assert torch.allclose(profile.age_mass.sum(2), torch.ones(tiny.LAYERS, 4), atol=1e-5)


def test_without_guidance(pipe: Pipeline) -> None:
    profile = profiling.measure(pipe, TEXTS[:1], guidance_scale=1.0)
    assert not profile.guidance_difference.any() and profile.error.any()


def test_calibration_prompts_are_not_evaluated() -> None:
    assert not set(calibration(500)) & {prompt["prompt"] for prompt in shapes_suite()}


def test_profile_command_and_policies_that_use_it(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    result = run("profile", "--model", folder, "--prompts-file", tmp_path / "prompts.txt", "--limit", 2, "--out",
                 tmp_path / "profile", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert [Path(file).name for file in facts["files"]] == [
        "profile.safetensors", "heads.png", "attention.png", "columns.png", "kinds.png"]
    assert all(Path(file).stat().st_size > 1000 for file in facts["files"]) and facts["prompts"] == 2
    common = ("a heart", "--model", folder, "--out", tmp_path / "pictures", "--budget", 0.5)
    for policy in sorted(policies.NEED_PROFILE):
        result = run("generate", *common, "--policy", policy, "--profile", facts["files"][0])
        assert result.exit_code == 0, result.output
    result = run("generate", *common, "--policy", "adaptive")
    assert result.exit_code == 2 and "needs a profile" in " ".join(result.stderr.split())
