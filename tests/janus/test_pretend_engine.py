"""Engine, pipeline and transformers' loop on the pretended machine (tests/pretend): the rules of CUDA, kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pretend
import pytest
import step_traffic
import tiny
import torch
from pretend import guard
from test_engine import prompts_of
from test_int8 import Dense
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import ssd_janus
from ssd_attach.online import OnlinePlan
from ssd_janus import Pipeline
from ssd_janus.engine import Engine, Sampling, StepTiming, capture, layers, saying, weights
from ssd_janus.engine.capture import WARM_STEPS
from ssd_janus.shape import ModelShape
from ssd_kernels import CachePlan, HeadSpec, backends, philox

pytestmark = pytest.mark.skipif(guard.unsupported() is not None, reason=f"no machine to pretend: {guard.unsupported()}")

PLAN = tiny.plan_of(HeadSpec.heavy(6, recent=2), HeadSpec.window(5), HeadSpec.full(), HeadSpec.heavy(7, score="mean"),
                    row_buffer=6)
GREEDY, GUIDANCE = Sampling(greedy=True), [5.0, 2.0, 2.0, 1.0]
WAITING = ("to_host", "to_device", "wait")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[pretend.Machine]:
    monkeypatch.setattr(saying, "_said", set())
    with pretend.pretended(devices=2) as made:
        yield made


@pytest.fixture(params=["triton", "cuda"])
def backend(machine: pretend.Machine, request: pytest.FixtureRequest) -> str:
    if reason := backends.available()[request.param]:
        pytest.skip(f"{request.param}: {reason}")
    return str(request.param)


def prompts() -> list[list[int]]:
    return prompts_of(tiny.image_inputs())


def of_steps(machine: pretend.Machine, engine: Engine, **options: Any) -> list[list[pretend.Event]]:
    """What was logged in every step after the first."""
    marks: list[int] = []
    engine.generate(prompts(), progress=lambda done, total: marks.append(len(machine.log)), **options)
    return [machine.log[begin:end] for begin, end in zip(marks, marks[1:], strict=False)]


def names(events: list[pretend.Event], *kinds: str) -> list[tuple[str, str, str]]:
    return [(event.kind, event.name, event.place) for event in events if event.kind in kinds]


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_the_engine_draws_the_same_and_no_step_waits(fresh: Any, machine: pretend.Machine, backend: str,
                                                     device: str) -> None:
    """On a device that is not the current one, too, where a capture on torch's own stream would record nothing."""
    expected = Engine(fresh, PLAN).generate(prompts(), guidance=GUIDANCE, sampling=GREEDY)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # torch's stream for captures is of cuda:0 from now on
        torch.ones(1, device="cuda:0")
    machine.graphs.clear()
    engine = Engine(fresh.to(device), PLAN, backend=backend)
    marks: list[int] = []
    drawn = engine.generate(prompts(), guidance=GUIDANCE, sampling=GREEDY,
                            progress=lambda done, total: marks.append(len(machine.log)))
    assert torch.equal(drawn, expected)
    steps = [machine.log[begin:end] for begin, end in zip(marks, marks[1:], strict=False)]
    (graph,) = machine.graphs
    assert machine.empty_graphs == 0 and graph.replays == len(steps) - WARM_STEPS
    assert sum(event.name == f"decode_kernel ({backend})" or event.name == f"decode ({backend})"
               for event in graph.operations) == tiny.LAYERS
    for step in (*steps[:WARM_STEPS], *steps[WARM_STEPS + 1:]):
        assert names(step, *WAITING) == []
    for step in steps[WARM_STEPS + 1:]:
        assert [event.kind for event in step] == ["replay"]
    assert {event.device for step in steps for event in step} == {torch.device(device).index}


@pytest.mark.parametrize("keep_prompt", [True, False], ids=["keep_prompt", "evict_prompt"])
def test_steps_attend_to_what_8_bits_hold(fresh: Any, machine: pretend.Machine, backend: str,
                                          keep_prompt: bool) -> None:
    plan = CachePlan.uniform(HeadSpec.full(), tiny.LAYERS, 4, keep_prompt=keep_prompt, kv_format="int8")
    dense = Dense()
    Engine(fresh.to("cuda"), plan, backend=backend).generate(2 * prompts(), guidance=2.0, observer=dense)
    dense.check(shared=keep_prompt)


def test_libraries_are_ready_before_the_capture(fresh: Any, machine: pretend.Machine) -> None:
    of_steps(machine, Engine(fresh.to("cuda:1"), PLAN), sampling=GREEDY, steps=8)
    prepared = machine.of_kind("prepare")
    assert len(prepared) == 2 and not any(event.captured for event in prepared)
    of_steps(machine, Engine(fresh, PLAN), sampling=GREEDY, steps=8)
    assert machine.of_kind("prepare") == prepared, "every picture would leave a workspace behind"
    assert torch.cuda.current_stream(1) is torch.cuda.default_stream(1)


@pytest.mark.parametrize(("broken", "seeds"), [("reads", None), ("launches", 3)])
def test_a_capture_that_fails_is_told_once_and_the_picture_goes_on(
        fresh: Any, machine: pretend.Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
        broken: str, seeds: int | None) -> None:
    engine = Engine(fresh.to("cuda:1"), PLAN)
    torch.manual_seed(0)
    expected = engine.generate(prompts(), guidance=GUIDANCE, seeds=seeds, steps=8)
    machine.graphs.clear()
    advance, failures = capture.Batch.advance, []

    def failing(batch: Any) -> None:
        advance(batch)
        if torch.cuda.is_current_stream_capturing():
            failures.append(batch.done)
            if broken == "reads":
                batch.tokens.cpu()
            raise RuntimeError("no capture here")

    monkeypatch.setattr(capture.Batch, "advance", failing)
    for _ in range(2):
        torch.manual_seed(0)
        assert torch.equal(engine.generate(prompts(), guidance=GUIDANCE, seeds=seeds, steps=8), expected)
    assert failures == [WARM_STEPS + 1] * 2
    (said,) = caplog.records
    assert "CUDA graph" in said.message and said.levelname == "WARNING"
    assert ("not permitted when stream is capturing" if broken == "reads" else "no capture here") in said.message
    assert torch.cuda.current_stream(1) is torch.cuda.default_stream(1) and torch.cuda.current_device() == 0


def test_timings_are_of_the_tensors_device(fresh: Any, machine: pretend.Machine) -> None:
    timing = StepTiming()
    steps = of_steps(machine, Engine(fresh.to("cuda:1"), PLAN), sampling=GREEDY, timing=timing, steps=8)
    assert len(timing.steps) == len(steps) and all(step["total"] > 0 for step in timing.steps)
    assert {(event.kind, event.device) for step in steps for event in step} == {("launch", 1), ("wait", 1)}
    assert machine.events == {1}


def test_a_draw_is_one_launch_whatever_the_batch(fresh: Any, machine: pretend.Machine) -> None:
    """Guidance, filters, noise and choice, in the graph; a picture's numbers are its own in every batch."""
    fresh.to("cuda")
    engine, drawn = Engine(fresh, PLAN), {}
    for count in (4, 1, 3):
        machine.graphs.clear()
        drawn[count] = engine.generate(prompts()[:count], guidance=2.0, seeds=[7, 8, 2**64 - 1, 7][:count],
                                       sampling=Sampling.make(0.9, 20, 0.9))
        (graph,) = machine.graphs
        operations = [event.name for event in graph.operations]
        assert operations.count("sample_kernel (triton)") == 1
        assert not {"exponential_", "sort", "topk", "_softmax", "argmax", "noise_kernel (triton)"} & set(operations)
    assert torch.equal(drawn[1], drawn[4][:1]) and torch.equal(drawn[3], drawn[4][:3])


def test_other_filters_have_their_noise_in_one_launch(fresh: Any, machine: pretend.Machine,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    choose = Sampling.choose
    monkeypatch.setattr(Sampling, "choose", lambda self, logits, noise: (seen.append(noise), choose(self, logits, noise)
                                                                         )[1])
    sampling = Sampling(warpers=[TopPLogitsWarper(0.9, min_tokens_to_keep=2)])
    Engine(fresh.to("cuda"), PLAN).generate(prompts()[:2], guidance=2.0, seeds=3, sampling=sampling, steps=8)
    (graph,) = machine.graphs
    assert [event.name for event in graph.operations].count("noise_kernel (triton)") == 1
    assert torch.equal(seen[0].cpu(), philox.exponential(torch.tensor([3, 4]), torch.tensor([7, 7]), 64))


def test_transformers_loop_draws_the_same_samples(fresh: Any, machine: pretend.Machine) -> None:
    pipe = Pipeline(fresh.to("cuda"), tiny.build_processor())
    expected = pipe.generate_tokens(list(tiny.PROMPTS[:2]), seed=3, plan=PLAN)
    fresh.model.language_model.layers[0].mlp.register_forward_hook(lambda module, args, output: output)
    machine.log.clear()
    assert torch.equal(pipe.generate_tokens(list(tiny.PROMPTS[:2]), seed=3, plan=PLAN), expected)
    launches = [event.name for event in machine.of_kind("launch")]
    assert launches.count("noise_kernel (triton)") == tiny.TOKENS and "exponential_" not in launches


@pytest.mark.parametrize(("warpers", "numbers"), [
    ([], (1.0, 0, 1.0)), ([TemperatureLogitsWarper(0.5), TopPLogitsWarper(0.9)], (0.5, 0, 0.9)),
    ([TemperatureLogitsWarper(0.5), TopKLogitsWarper(7), TopPLogitsWarper(0.9)], (0.5, 7, 0.9)),
    ([TopKLogitsWarper(7), TemperatureLogitsWarper(0.5)], None), ([TopKLogitsWarper(7), TopKLogitsWarper(8)], None),
    ([TopPLogitsWarper(0.9, filter_value=-5.0)], None), ([MinPLogitsWarper(0.1)], None)])
def test_filters_that_a_launch_knows(warpers: list[Any], numbers: Any) -> None:
    assert Sampling(warpers=warpers).numbers == numbers and Sampling(greedy=True, warpers=warpers).numbers is None


@pytest.mark.parametrize(("choice", "dtype", "table", "kv_format"), [
    ("greedy", torch.float32, True, "auto"), ("sampled", torch.float32, True, "int8"),
    ("sampled", torch.bfloat16, False, "auto")], ids=str)
def test_what_a_step_launches_and_moves(fresh: Any, machine: pretend.Machine, monkeypatch: pytest.MonkeyPatch,
                                        choice: str, dtype: torch.dtype, table: bool, kv_format: str) -> None:
    """The record of docs/engine.md: what a graph of a step holds, as far as an operation of torch is one launch."""
    if not table:
        monkeypatch.setattr(weights, "TABLE_CODES", 0)
    sampling, text = GREEDY if choice == "greedy" else Sampling.make(0.9, 50, 0.9), fresh.config.text_config
    plan = CachePlan(PLAN.layers, PLAN.row_buffer, kv_format=kv_format)
    Engine(fresh.to(dtype).to("cuda"), plan, backend="triton").generate(prompts(), guidance=2.0, sampling=sampling,
                                                                      steps=8)
    (graph,) = machine.graphs
    step = step_traffic.Step(
        len(prompts()), text.hidden_size, text.intermediate_size, tiny.LAYERS, text.num_key_value_heads,
        text.num_attention_heads, tiny.HEAD_DIM, 64, 8, dtype.itemsize, plan, 10, 20, tiny.TOKENS, table,
        choice == "greedy")
    launches, moved = Counter[str](), Counter[str]()
    for part in step.parts():
        for name, nbytes in part.operations * (tiny.LAYERS if part.in_layer else 1):
            launches[name] += 1
            moved[name] += nbytes
        assert part.launches <= len(part.operations)
        assert part.nbytes <= sum(nbytes for _, nbytes in part.operations)
    assert Counter(event.name for event in graph.operations) == launches
    assert sum(moved.pop(f"decode_kernel ({backend})", 0) for backend in ("triton", "cuda")) > 0, "depends on cursors"
    counted = Counter[str]()
    for event in graph.operations:
        counted[event.name] += event.nbytes
    assert +counted == moved


def test_the_table_of_a_step_is_that_of_the_pages_shape() -> None:
    """docs/engine.md says what the arithmetic gives for Janus-Pro-1B."""
    plan = CachePlan.uniform(HeadSpec.heavy(115), 24, 16, row_buffer=24)
    step = step_traffic.Step(8, 2048, 5632, 24, 16, 16, 128, 16384, 8, 2, plan, 24, 480, 576, table=False)
    text = (Path(__file__).resolve().parents[2] / "docs" / "engine.md").read_text(encoding="utf-8")
    assert [line for line in step_traffic.lines(step) if line not in text.splitlines()] == []
    stored = replace(step, plan=CachePlan(plan.layers, plan.row_buffer, kv_format="int8"))
    # Of 16 rows and 16 heads: two vectors of 24 prompt tokens, 115 kept ones and the new one, 132 bytes each for 256.
    assert step.attention() - stored.attention() == 16 * 16 * 2 * (24 + 115 + 1) * (256 - 132)
    attention, whole = (f"{nbytes / 1e6:.2f}" for nbytes in (
        stored.attention(), sum(moved * (24 if part.in_layer else 1) for part in stored.parts()
                                for _, moved in part.operations)))
    assert f"moves {attention} MB of a layer in 8 bits, and a step {whole}" in " ".join(text.split())


COMPUTED = {"mm", "addmm", "bmm", "_safe_softmax", "_fused_rms_norm",
            *(f"{kernel}_kernel (triton)" for kernel in ("prefill", "decode", "sample"))}
# Lengths of prompts: up to the width that the shortest are padded to, the second three alike; and some twice as wide.
SHORT, LONG = ((5, 9, 12), (4, 4, 4), (3, 31, 32), (2, 30, 7)), ((2, 33, 8), (60, 33, 5), (60, 1, 40))


def prompts_of_lengths(lengths: tuple[int, ...]) -> list[list[int]]:
    return [[0, *range(5, 3 + length), 3][-length:] for length in lengths]


@pytest.mark.parametrize("keep_prompt", [True, False], ids=["keep_prompt", "evict_prompt"])
@pytest.mark.parametrize("chunk", [512, 32])
def test_other_prompts_compute_in_the_same_shapes(fresh: Any, machine: pretend.Machine, keep_prompt: bool,
                                                  monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Nothing to compile or set up for a new prompt; once for a width, in the attention, and once when rows share
    prompts, for which there is another decode kernel. And the tokens are the CPU's.

    What moves numbers, or computes element by element, is not looked at: torch has one kernel for all shapes.
    """
    monkeypatch.setattr(layers, "PREFILL_CHUNK", chunk)
    plan, seen = CachePlan(PLAN.layers, PLAN.row_buffer, keep_prompt), set[Any]()
    options = {"guidance": 2.0, "sampling": GREEDY, "steps": WARM_STEPS + 1}  # graphs stay in memory here
    expected = [Engine(fresh, plan).generate(prompts_of_lengths(lengths), **options) for lengths in SHORT + LONG]
    engine = Engine(fresh.to("cuda"), plan, backend="triton")
    new = []
    for lengths, tokens in zip(SHORT + LONG, expected, strict=True):
        machine.log.clear()
        assert torch.equal(engine.generate(prompts_of_lengths(lengths), **options), tokens)
        report = engine.memory_report()
        assert report.device_peak is not None and report.device_peak <= report.weights + report.cache + report.step
        now = {(event.name, event.variant) for event in machine.of_kind("launch") if event.name in COMPUTED}
        new.append(sorted(name for name, _ in now - seen))
        seen |= now
    assert {"mm", "bmm", "_safe_softmax", "decode_kernel (triton)"} <= set(new[0])
    shared, wider = ["decode_kernel (triton)"] if keep_prompt else [], ["_safe_softmax", "bmm", "bmm"]
    assert new[1:] == [shared, [], [], wider, [], []]


def test_prompts_are_padded_beyond_the_rotary_table(fresh: Any, machine: pretend.Machine,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "SHORTEST_WIDTH", 128)  # the table has as many positions as prompt and picture
    given = prompts_of_lengths((5, 9, 12))
    expected = Engine(fresh, PLAN).generate(given, sampling=GREEDY, steps=4)
    assert torch.equal(Engine(fresh.to("cuda"), PLAN).generate(given, sampling=GREEDY, steps=4), expected)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_compiled_sees_two_shapes(fresh: Any, machine: pretend.Machine, monkeypatch: pytest.MonkeyPatch,
                                          device: str) -> None:
    """That of a step and that of prompts, whatever their lengths."""
    seen = set()

    def compiled(function: Any) -> Any:
        def recorded(*given: Any) -> torch.Tensor:
            *tensors, _ = given
            seen.add((function.__name__, *(tensor.shape[0] for tensor in tensors)))
            return function(*given)

        return recorded

    monkeypatch.setattr(layers, "_compiled", compiled)
    engine = Engine(fresh.to(device), PLAN, compile=True)
    for lengths in SHORT + LONG:
        engine.generate(prompts_of_lengths(lengths), guidance=2.0, steps=2)
    rows = 8 if device == "cpu" else 6
    assert seen == {(name, *[size] * tensors) for size in (rows, layers.PREFILL_CHUNK)
                    for name, tensors in (("project", 1), ("mix", 2))}


def test_without_triton_every_picture_has_a_generator(fresh: Any, machine: pretend.Machine,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := backends.available()["cuda"]:
        pytest.skip(f"cuda: {reason}")
    monkeypatch.setattr("ssd_janus.engine.sampling.in_one_launch", lambda device: False)
    steps = of_steps(machine, Engine(fresh.to("cuda"), PLAN, backend="cuda"), guidance=2.0, seeds=3, steps=8)
    assert [[event.name for event in step].count("exponential_") for step in steps] == [4] * 7
    assert all(names(step, *WAITING) == [] for step in steps[WARM_STEPS + 1:])


def test_pipeline_draws_the_same_pictures(fresh: Any, machine: pretend.Machine, backend: str) -> None:
    texts, seen = list(tiny.PROMPTS), []
    expected = Pipeline(fresh, tiny.build_processor())(texts, seed=3, plan=PLAN, temperature=0)
    pipe = Pipeline(fresh.to("cuda"), tiny.build_processor(), backend)
    drawn = pipe(texts, seed=3, plan=PLAN, temperature=0, preview=lambda numbers, part: seen.append(len(part)))
    assert [picture.tobytes() for picture in drawn] == [picture.tobytes() for picture in expected]
    assert seen == [len(texts)] * tiny.GRID and pipe.last_run is not None and pipe.last_run.backend == backend
    report = pipe.memory_report()
    assert 0 < report.weights < report.device_peak <= machine.peak[0]


@pytest.mark.parametrize(("engine", "guidance"), [(True, 2.0), (False, 2.0), (False, 1.0)])
def test_enabled_models_draw_the_same(fresh: Any, machine: pretend.Machine, engine: bool, guidance: float) -> None:
    def draw() -> torch.Tensor:
        ssd_janus.enable(fresh, PLAN, engine=engine)
        inputs = {name: tensor.to(fresh.device) for name, tensor in tiny.image_inputs().items()}
        drawn = fresh.generate(**inputs, generation_mode="image", do_sample=False, guidance_scale=guidance)
        ssd_janus.disable(fresh)
        return drawn

    expected = draw()
    fresh.to("cuda")
    drawn = draw()
    assert drawn.device == torch.device("cuda", 0) and torch.equal(drawn.cpu(), expected)
    assert len(names(machine.log, "to_host")) < tiny.TOKENS, "a step of the loop reads the device"


def test_online_typing_makes_way_for_a_capture(fresh: Any, machine: pretend.Machine) -> None:
    def draw() -> torch.Tensor:
        plan = OnlinePlan(ModelShape.of(fresh), 0.7, 6, loss=0.42)
        return Engine(fresh, plan).generate(prompts(), guidance=2.0, sampling=GREEDY)

    expected = draw()
    fresh.to("cuda")
    assert torch.equal(draw(), expected) and len(machine.graphs) == 1


def test_watched_pictures_are_not_captured(fresh: Any, machine: pretend.Machine) -> None:
    expected = Engine(fresh, PLAN).generate(prompts(), guidance=2.0, sampling=GREEDY, steps=8)
    drawn = Engine(fresh.to("cuda"), PLAN).generate(prompts(), guidance=2.0, sampling=GREEDY, steps=8,
                                                    logits_processor=[lambda tokens, logits: logits])
    assert torch.equal(drawn, expected) and machine.captures == 0


@pytest.mark.parametrize("observed", [False, True])
def test_positions_go_to_the_device_once(fresh: Any, machine: pretend.Machine, observed: bool) -> None:
    """Not for every layer, nor for q and k, cos and sin: a prompt's are counted on the device, and so are a step's."""
    options = {"logits_processor": [lambda tokens, logits: logits]} if observed else {}
    steps = of_steps(machine, Engine(fresh.to("cuda"), PLAN), sampling=GREEDY, steps=WARM_STEPS + 1,
                     **options)
    assert len(steps) == WARM_STEPS and all(names(step, *WAITING) == [] for step in steps)
    widths = len({layers.prefill_width(len(prompt), layers.PREFILL_CHUNK) for prompt in prompts()})
    copies = [event.place.partition(":")[0] for event in machine.of_kind("to_device")]
    assert not any(place.endswith("ssd_kernels/reference.py") for place in copies)
    # Tokens, rows and ends of every group of prompts; and once: whose rows, guidance, lengths.
    assert copies.count("python/ssd_janus/engine/layers.py") == 2 * widths
    assert copies.count("python/ssd_janus/engine/batch.py") == widths + 3


def test_too_little_memory_is_shared(fresh: Any, machine: pretend.Machine, caplog: pytest.LogCaptureFixture) -> None:
    fresh.to("cuda")
    expected = Engine(fresh, PLAN).generate(prompts(), guidance=2.0, sampling=GREEDY)
    machine.memory = 2**26
    engine, longest = Engine(fresh, PLAN), max(map(len, prompts()))
    while engine.max_batch(max_prompt=longest) > 2:
        machine.memory -= 2**18
    assert torch.equal(engine.generate(prompts(), guidance=2.0, sampling=GREEDY), expected)
    assert engine.last_run is not None and engine.last_run.batches == (2, 2)
    assert any("at once" in record.message for record in caplog.records)
