"""What drawing takes is predicted, split where it does not fit, and given back."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_engine import plan_of_budget, prompts_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssd_janus.engine import Engine, Sampling, StepTiming, decode, decode_bytes, max_batch, memory
from ssd_janus.engine import engine as engine_module

GREEDY = Sampling(greedy=True)


@pytest.fixture
def prompts() -> list[list[int]]:
    return prompts_of(tiny.image_inputs())


def test_the_report_adds_up(fresh: Any, prompts: list[list[int]]) -> None:
    plan = plan_of_budget(fresh, 0.2)
    engine = Engine(fresh, plan)
    with pytest.raises(RuntimeError, match="has drawn nothing"):
        engine.memory_report()
    engine.generate(prompts, guidance=[2.0, 1.0, 1.0, 1.0], steps=2, batch_size=3)
    report, run = engine.memory_report(), engine.last_run
    assert run is not None and run.batches == (3, 1) and run.rows == 4
    assert report.cache == plan.nbytes(batch_size=4, head_dim=tiny.HEAD_DIM, max_prompt=max(map(len, prompts[:3])),
                                       dtype=torch.float32, num_visual_tokens=tiny.TOKENS)
    untied = sum(parameter.nbytes for parameter in fresh.parameters())  # parameters() leaves repeated ones out
    assert report.weights == untied + sum(buffer.nbytes for buffer in fresh.buffers())
    assert report.peak == report.weights + max(report.cache + report.step, report.decode)


class Peak(TorchDispatchMode):
    """Most bytes of new storages alive at once, counted by asking every storage that was ever seen."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[tuple[Any, int]] = []
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {value.untyped_storage().data_ptr() for value in tree_leaves((args, kwargs))
                  if isinstance(value, torch.Tensor) and value.layout == torch.strided}
        result = func(*args, **(kwargs or {}))
        self.alive = [(reference, size) for reference, size in self.alive if reference() is not None]
        for value in tree_leaves(result):
            if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
                continue
            storage = value.untyped_storage()
            if storage.data_ptr() not in inputs and not any(other() is storage for other, _ in self.alive):
                self.alive.append((weakref.ref(storage), storage.nbytes()))
        self.most = max(self.most, sum(size for _, size in self.alive))
        return result


@pytest.mark.parametrize("pictures", [1, 3])
def test_decoding_takes_what_was_predicted(fresh: Any, pictures: int) -> None:
    with torch.no_grad(), Peak() as peak:
        fresh.decode_image_tokens(torch.zeros(pictures, tiny.TOKENS, dtype=torch.long))
    predicted = decode_bytes(fresh, pictures)
    assert predicted == pytest.approx(peak.most, rel=0.05)
    assert predicted > pictures * 24 * 24 * 32 * 4, "at least one map of the last resolution"


@pytest.mark.parametrize("products", ["kernel", "torch"])
@pytest.mark.parametrize("pictures, length, guidance, codes", [
    (1, 10, 5.0, 64), (8, 20, 1.0, 64), (24, 3, 5.0, 64), (200, 20, 1.0, 64), (1, 10, 5.0, 4096), (32, 3, 5.0, 4097)])
def test_a_batch_takes_at_most_what_was_predicted(fresh: Any, products: str, pictures: int, length: int,
                                                  guidance: float, codes: int) -> None:
    """From the prompt on, with pictures' prompts that all differ and every filter of sampling."""
    torch.manual_seed(0)
    fresh.model.generation_embeddings = torch.nn.Embedding(codes, 8)
    fresh.model.generation_head.vision_head = torch.nn.Linear(fresh.config.text_config.hidden_size, codes)
    prompts = [[0, *torch.randint(5, 250, (length - 2,)).tolist(), 3] for _ in range(pictures)]
    engine = Engine(fresh, products=products)
    with Peak() as peak:
        batch = engine.batch(prompts, guidance=guidance, sampling=Sampling.make(0.9, 50, 0.9), steps=3)
        batch.step()
    taken = peak.most - batch.cache.nbytes
    # The unconditional prompts are all alike.
    predicted = memory.step_bytes(fresh, pictures, batch.rows, length, len(set(map(tuple, prompts))) + (guidance > 1))
    assert taken <= predicted < 2.5 * taken


@pytest.mark.parametrize("guided", [True, False])
def test_max_batch_is_the_last_that_fits(fresh: Any, guided: bool) -> None:
    plan = plan_of_budget(fresh, 0.2)
    weights = memory.weight_bytes(fresh)

    def needed(pictures: int) -> int:
        rows = pictures * (1 + guided)
        cache = plan.nbytes(batch_size=rows, head_dim=tiny.HEAD_DIM, max_prompt=16, dtype=torch.float32,
                            num_visual_tokens=tiny.TOKENS)
        return weights + cache + memory.step_bytes(fresh, pictures, rows, 16)

    for pictures in (3, 17, 64):
        assert max_batch(plan, fresh, needed(pictures), guided=guided, max_prompt=16) == pictures
        assert max_batch(plan, fresh, needed(pictures) - 1, guided=guided, max_prompt=16) == pictures - 1
    assert max_batch(plan, fresh, weights + decode_bytes(fresh, 1) - 1) == 0
    full = Engine(fresh).max_batch(needed(64), max_prompt=16, guided=guided)
    assert 0 < full < 64, "a full cache leaves room for fewer"


def test_requests_that_do_not_fit_are_split(fresh: Any, prompts: list[list[int]],
                                            monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    engine, seen = Engine(fresh), []
    expected = engine.generate(prompts, guidance=2.0)
    monkeypatch.setattr(memory, "available_memory", lambda device: 10**9)
    monkeypatch.setattr(memory, "max_batch", lambda *args, **kwargs: 3)
    drawn = engine.generate(prompts, guidance=2.0, progress=lambda done, total: seen.append((done, total)))
    assert torch.equal(drawn, expected)
    assert engine.last_run is not None and engine.last_run.batches == (3, 1)
    assert [record.message for record in caplog.records] == [
        "4 pictures do not fit into memory at once; drawing 3 at once"]
    assert seen == [(step, 2 * tiny.TOKENS) for step in range(1, 2 * tiny.TOKENS + 1)]
    monkeypatch.setattr(memory, "max_batch", lambda *args, **kwargs: 0)
    engine.generate(prompts[:2], guidance=2.0, steps=1)
    assert engine.last_run.batches == (1, 1)


@pytest.fixture
def short_of_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, BaseException], None]:
    """Let caches of more than so many rows fail."""

    def arrange(rows: int, error: BaseException) -> None:
        make = engine_module.CompressedCache

        def failing(plan: Any, batch_size: int, *args: Any, **kwargs: Any) -> Any:
            if batch_size > rows:
                raise error
            return make(plan, batch_size, *args, **kwargs)

        monkeypatch.setattr(engine_module, "CompressedCache", failing)

    return arrange


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 8 bytes")],
                         ids=lambda error: type(error).__name__)
def test_out_of_memory_halves_the_batch_once(fresh: Any, prompts: list[list[int]], error: BaseException,
                                             short_of_memory: Any, caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(fresh)
    expected = engine.generate(prompts, guidance=2.0)
    short_of_memory(4, error)
    seen: list[tuple[int, int]] = []
    drawn = engine.generate(prompts, guidance=2.0, progress=lambda done, total: seen.append((done, total)))
    assert torch.equal(drawn, expected)
    assert [record.message for record in caplog.records] == [
        "out of memory with 4 pictures at once; going on with 2"]
    assert engine.last_run is not None and engine.last_run.batches == (2, 2)
    assert seen[-1] == (2 * tiny.TOKENS, 2 * tiny.TOKENS)


class Watch:
    """An observer that only knows how many rows it saw."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def prefill(self, cache: Any, layer: int, keys: torch.Tensor, *args: Any) -> None:
        self.rows.append(len(keys))

    def decode(self, *args: Any) -> None:
        pass


@pytest.fixture(params=["observer", "logits_processor"])
def watching(request: pytest.FixtureRequest) -> tuple[dict[str, Any], list[int]]:
    """What watches a call, and the rows that it saw."""
    watch = Watch()

    def processor(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        watch.rows.append(len(logits))
        return logits

    return {request.param: watch if request.param == "observer" else [processor]}, watch.rows


def test_watched_requests_are_not_split(fresh: Any, prompts: list[list[int]], watching: tuple[dict[str, Any], list],
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """What watches keeps what it saw, and would take another batch for more steps of the first."""
    (options, seen), engine = watching, Engine(fresh)
    monkeypatch.setattr(memory, "max_batch", lambda *args, **kwargs: 3)
    with pytest.raises(ValueError, match="batch_size must be at most 3 with an observer or logits processors, got 4"):
        engine.generate(prompts, guidance=2.0, steps=2, **options)
    assert not seen and engine.last_run is None
    engine.generate(prompts[:3], guidance=2.0, steps=2, **options)
    assert set(seen) == {6}


def test_watched_requests_are_not_tried_again(fresh: Any, prompts: list[list[int]], short_of_memory: Any,
                                              watching: tuple[dict[str, Any], list]) -> None:
    (options, seen), engine = watching, Engine(fresh)
    short_of_memory(4, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(MemoryError, match="with 4 pictures at once, .* choose a smaller batch_size"):
        engine.generate(prompts, guidance=2.0, steps=2, **options)
    assert not seen and engine.last_run is None


def test_other_errors_and_a_second_time_are_raised(fresh: Any, prompts: list[list[int]], short_of_memory: Any) -> None:
    engine = Engine(fresh)
    short_of_memory(2, torch.OutOfMemoryError("still too much"))
    with pytest.raises(torch.OutOfMemoryError, match="still too much"):
        engine.generate(prompts, guidance=2.0)
    short_of_memory(0, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        engine.generate(prompts, guidance=2.0)


def test_the_cache_is_gone_when_pictures_are_decoded(fresh: Any, prompts: list[list[int]],
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[weakref.ref] = []
    make = engine_module.CompressedCache

    def remember(*args: Any, **kwargs: Any) -> Any:
        cache = make(*args, **kwargs)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(engine_module, "CompressedCache", remember)
    gc.disable()  # freed by counting references, not some time later
    try:
        engine = Engine(fresh, plan_of_budget(fresh, 0.2))
        tokens = engine.generate(prompts, guidance=2.0, steps=tiny.TOKENS, batch_size=2)
        assert len(caches) == 2 and all(cache() is None for cache in caches)
        assert len(list(engine.decode(tokens, chunk=3))) == 2
    finally:
        gc.enable()


def files(root: Path, contents: dict[str, str]) -> Path:
    for name, text in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


MACHINE = {"proc/meminfo": "MemTotal:  2000 kB\nMemFree: 5 kB\nMemAvailable:    1000 kB"}


@pytest.mark.parametrize("contents, expected", [
    ({}, (2_048_000, 1_024_000)),
    # Version 2: page cache that is idle counts as free; what is in use does not.
    ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "9000", "sys/fs/cgroup/memory.current": "8000",
      "sys/fs/cgroup/memory.stat": "anon 4000\nfile 4000\ninactive_file 3000\nactive_file 1000"}, (9000, 4000)),
    # The tightest of nested groups need be neither the innermost nor the outermost.
    ({"proc/self/cgroup": "0::/a/b/c", "sys/fs/cgroup/a/memory.max": "9000", "sys/fs/cgroup/a/memory.current": "8000",
      "sys/fs/cgroup/a/b/memory.max": "500", "sys/fs/cgroup/a/b/memory.current": "100",
      "sys/fs/cgroup/a/b/c/memory.max": "max", "sys/fs/cgroup/a/b/c/memory.current": "90"}, (500, 400)),
    ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/memory.max": "9000", "sys/fs/cgroup/a/memory.current": "8999",
      "sys/fs/cgroup/a/b/memory.max": "500", "sys/fs/cgroup/a/b/memory.current": "100"}, (500, 1)),
    # Version 1, in a container that sees the host's path but has the group at the root of the mount; and unlimited.
    ({"proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/x\n0::/", "sys/fs/cgroup/memory/memory.limit_in_bytes":
      "9000", "sys/fs/cgroup/memory/memory.usage_in_bytes": "8000",
      "sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 500"}, (9000, 1500)),
    ({"proc/self/cgroup": "4:memory:/", "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
      "sys/fs/cgroup/memory/memory.usage_in_bytes": "8000"}, (2_048_000, 1_024_000)),
    ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "9000", "sys/fs/cgroup/memory.current": "9001"},
     (9000, 0)),
], ids=["machine", "idle page cache", "tight in between", "full outside", "version 1", "version 1 unlimited", "over"])
def test_limits_of_control_groups_are_found(tmp_path: Path, contents: dict[str, str],
                                            expected: tuple[int, int]) -> None:
    assert memory.host_memory(files(tmp_path, MACHINE | contents)) == expected


def test_the_limits_of_this_machine(tmp_path: Path) -> None:
    assert memory.host_memory(tmp_path) == (2**62, 2**62), "another system"
    total, free = memory.host_memory()
    assert (memory.total_memory(), total >= free) == (total, True)


def test_rows_are_reported_and_decoded(fresh: Any, prompts: list[list[int]],
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    engine, seen = Engine(fresh), []
    tokens = engine.generate(prompts, guidance=[1.0, 2.0, 1.0, 2.0], batch_size=3,
                             on_row=lambda numbers, part: seen.append((list(numbers), part)))
    assert [numbers for numbers, _ in seen] == [[0, 1, 2]] * tiny.GRID + [[3]] * tiny.GRID
    for row, (_, part) in enumerate(seen[:tiny.GRID], 1):
        assert torch.equal(part, tokens[:3, :row * tiny.GRID])
    (whole,) = decode(fresh, tokens, chunk=4)
    with torch.no_grad():
        assert torch.equal(whole, fresh.decode_image_tokens(tokens))
    (rows,) = decode(fresh, tokens[:, :2 * tiny.GRID])
    monkeypatch.setattr(fresh.model.vqmodel.quantize, "quant_state_dims", (2, tiny.GRID))
    with torch.no_grad():
        assert rows.shape == (4, 8, 24, 3) and torch.equal(rows, fresh.decode_image_tokens(tokens[:, :2 * tiny.GRID]))
    for shape in ((1, 7), (1, 0), (1, 42), (36,)):
        with pytest.raises(ValueError, match="n a multiple of 6 up to 36"):
            next(decode(fresh, torch.zeros(shape, dtype=torch.long)))


def test_timing_splits_a_step(fresh: Any, prompts: list[list[int]]) -> None:
    timing, engine = StepTiming(), Engine(fresh)
    drawn = engine.generate(prompts, guidance=2.0, sampling=GREEDY, steps=5, timing=timing)
    assert torch.equal(drawn, engine.generate(prompts, guidance=2.0, sampling=GREEDY, steps=5))
    assert len(timing.steps) == 4, "the first token comes from the prompt"
    for step in timing.steps:
        assert step["linear"] > 0 and step["attention"] > 0 and step["rest"] > 0
        assert step["total"] == pytest.approx(step["linear"] + step["attention"] + step["rest"])


@pytest.mark.slow
def test_compiled_layers_draw_the_same(fresh: Any, prompts: list[list[int]]) -> None:
    drawn = Engine(fresh, compile=True).generate(prompts, guidance=2.0, sampling=GREEDY)
    assert torch.equal(drawn, Engine(fresh).generate(prompts, guidance=2.0, sampling=GREEDY))
