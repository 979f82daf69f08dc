"""What is decided about a Ray cluster before there is one; tests/serve/test_ray.py has clusters."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_cli import run
from test_drawing import Painter

from ssd_janus import Pipeline, cluster
from ssd_janus.cluster import cluster_address, needed, pool_size, room
from ssd_janus.drawing import Drawing
from ssd_janus.layouts import GenEval
from ssd_janus.prompts import gather
from ssd_janus.remote import PaintJob

GPUS: list[Mapping[str, float]] = [{"CPU": 64, "GPU": 8, "memory": 1e12}, {"CPU": 64, "GPU": 8}, {"CPU": 16}]


@pytest.mark.parametrize("place, address", [
    ("ray", None), ("ray://auto", "auto"), ("ray://10.0.0.1:6379", "10.0.0.1:6379"), ("ray://head:1", "head:1"),
    ("ray://[::1]:6379", "[::1]:6379")])
def test_places(place: str, address: str | None) -> None:
    assert cluster_address(place) == address


@pytest.mark.parametrize("place", ["", "Ray", "ray:", "ray://", "ray://head", "ray://:6379", "ray://head:", "auto",
                                   "ray://head:x", "ray://head:0", "ray://head:65536", "ray://a/b:1", "head:6379",
                                   "spark", "ray://auto:"])
def test_other_places_are_refused(place: str) -> None:
    with pytest.raises(ValueError, match="--on must be ray, ray://auto or ray://HOST:PORT, got "):
        cluster_address(place)


@pytest.mark.parametrize("device, nodes, expected", [
    ("cuda", GPUS, {"GPU": 1}), ("cuda", [], {"GPU": 1}), ("cpu", GPUS, {"CPU": 2}), ("cpu", [{"CPU": 1}], {"CPU": 1}),
    ("cpu", [{"CPU": 1}, {"CPU": 3}], {"CPU": 2}), ("cpu", [{"GPU": 8}], {"CPU": 1}), ("cpu", [], {"CPU": 1})])
def test_what_a_worker_takes(device: str, nodes: Sequence[Mapping[str, float]], expected: dict[str, int]) -> None:
    assert needed(device, nodes) == expected


@pytest.mark.parametrize("device", ["cuda:1", "mps", ""])
def test_ray_chooses_the_gpu(device: str) -> None:
    with pytest.raises(ValueError, match=f"--device must be cpu or cuda with --on, .* got {device}"):
        needed(device, [])


@pytest.mark.parametrize("nodes, need, expected", [
    (GPUS, {"GPU": 1}, 16), (GPUS, {"CPU": 2}, 72), ([{"CPU": 3}, {"CPU": 3}], {"CPU": 2}, 2), ([], {"CPU": 2}, 0),
    ([{"CPU": 1.5}], {"CPU": 1}, 1), ([{"CPU": 9, "GPU": 2}], {"CPU": 2, "GPU": 1}, 2)])
def test_no_worker_is_on_two_nodes(nodes: Sequence[Mapping[str, float]], need: dict[str, int], expected: int) -> None:
    assert room(nodes, need) == expected


@pytest.mark.parametrize("units, workers, expected", [(100, None, 16), (3, None, 3), (100, 40, 40), (3, 40, 3)])
def test_never_more_workers_than_units(units: int, workers: int | None, expected: int) -> None:
    assert pool_size(GPUS, {"GPU": 1}, units, workers) == expected


def test_no_room_is_told_unless_the_cluster_may_grow() -> None:
    with pytest.raises(ValueError, match="a node that has 1 GPU for a worker; this one has 1 nodes without"):
        pool_size([{"CPU": 4}], {"GPU": 1}, 5, None)
    assert pool_size([{"CPU": 4}], {"GPU": 1}, 5, 2) == 2


@pytest.mark.parametrize("options, message", [
    (("--on", "spark"), "error: --on must be ray, ray://auto or ray://HOST:PORT, got 'spark'"),
    (("--on", "ray", "--device", "cuda:0"), "error: --device must be cpu or cuda with --on"),
    (("--on", "ray", "--backend", "cudnn"), "error: backend must be one of auto, cpu, "),
    (("--workers", 2), "error: --workers says nothing without --on"),
])
def test_arguments_are_checked_before_anything_is_started(folder: Path, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch, options: tuple[object, ...],
                                                          message: str) -> None:
    monkeypatch.setattr(cluster, "results", None)
    result = run("generate", "a heart", "--out", tmp_path / "out", "--model", folder, *options)
    assert result.exit_code == 2 and result.stderr.startswith(message) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("options, message", [
    (("--seed", 2**63), "seed must be within 0 .."), (("--guidance", "nan"), "guidance_scale must be"),
    (("--backend", "cuda"), "backend"), (("--budget", 3, "--policy", "window"), "budget")])
def test_arguments_are_checked_before_a_cluster_is_started(folder: Path, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch,
                                                           options: tuple[object, ...], message: str) -> None:
    monkeypatch.setattr("ssd_janus.remote.results", None)  # calling it is an error that no command reports
    result = run("generate", "a heart", "--out", tmp_path / "out", "--model", folder, "--on", "ray", *options)
    last = result.stderr.splitlines()[-1]
    assert result.exit_code == 2 and last.startswith("error: ") and message in last and not (tmp_path / "out").exists()


def test_one_of_several_ranks_asks_no_cluster(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run("generate", "a heart", "--model", folder, "--on", "ray")
    assert result.exit_code == 2
    assert "--on deals out the work by itself, and this process is rank 1 of 2" in result.stderr


def test_without_ray(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = run("generate", "a heart", "--out", tmp_path / "out", "--model", folder, "--on", "ray")
    assert result.exit_code == 2 and "needs ray, which is not installed: pip install '.[ray]'" in result.stderr


def test_a_worker_with_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    loaded = Pipeline.from_pretrained(folder)
    pipe = Painter(loaded.model, loaded.processor)
    make = partial(Drawing, layout=GenEval(tmp_path, 2), prompts=(), guidance_scale=None, seed=3,
                   plan=pipe.shape.full_plan(), batch_size=4)
    settings = make(pipe).settings
    unit = tuple(gather(["a heart", "a star"], None))
    (files,) = PaintJob(make, settings)(pipe)((unit, (0,)))
    assert [(drawn.prompt, drawn.seed) for drawn in files.drawn] == [("a star", 5), ("a star", 6)]
    with pytest.raises(ValueError, match=r"a worker has another weights than the process that asks \('.*' there, 'x'"):
        PaintJob(make, {**settings, "weights": "x"})(pipe)


def test_errors_cross_processes_as_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    class Odd(Exception):
        pass

    full = OSError(28, "No space left on device", "/a/b")
    assert cluster._portable(full) is full
    assert repr(cluster._portable(Odd("so"))) == repr(RuntimeError("Odd: so"))
    assert "No space left on device" in capsys.readouterr().err, "and into the worker's log"


class Gone(Exception):
    """What `Cluster` raises for a worker that died."""


class Cluster:
    """Stands in for Ray: workers that do what they are asked when their answer is fetched, in any order.

    Attributes:
        deaths: how often the worker dies that does a unit, or that begins where the unit is None.
        begun: units in the order in which they were given out.
        alive: workers that were started, and not killed.
    """

    exceptions = SimpleNamespace(RayError=Gone, RayTaskError=type("RayTaskError", (Gone,), {}))

    def __init__(self, seed: int = 0, cores: int = 6, deaths: dict[int | None, int] | None = None) -> None:
        self.random, self.cores, self.deaths = random.Random(seed), cores, deaths or {}
        self.begun: list[int] = []
        self.alive: list[object] = []

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": self.cores}}, {"Alive": False, "Resources": {"CPU": 99}}]

    def remote(self, **options: Any) -> Callable[[type], Any]:
        assert options["num_cpus"] == 2 and options["max_restarts"] == 0
        return lambda kind: SimpleNamespace(remote=lambda *given: self._worker(kind, *given))

    def _worker(self, kind: type, *given: Any) -> Any:
        def do(unit: int) -> Any:
            self.begun.append(unit)
            return self._answer(unit, lambda: made.do(unit))

        made = kind(*given)
        worker = SimpleNamespace(ready=SimpleNamespace(remote=lambda: self._answer(None, made.ready)),
                                 do=SimpleNamespace(remote=do))
        self.alive.append(worker)
        return worker

    def _answer(self, unit: int | None, call: Callable[[], Any]) -> Callable[[], Any]:
        def answer() -> Any:
            if self.deaths.get(unit, 0) > 0:
                self.deaths[unit] -= 1
                raise Gone("The worker died.\nIts node was gone.")
            return call()

        return answer

    def put(self, value: Any) -> Any:
        return value

    def wait(self, answers: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        assert num_returns == 1
        chosen = self.random.choice(answers)
        return [chosen], [answer for answer in answers if answer is not chosen]

    def get(self, answer: Callable[[], Any]) -> Any:
        return answer()

    def kill(self, worker: object) -> None:
        self.alive.remove(worker)


def results(monkeypatch: pytest.MonkeyPatch, ray: Cluster, work: Callable[[int], Any], units: Sequence[int],
            **options: Any) -> Iterator[Any]:
    source: Any = SimpleNamespace(device="cpu", load=lambda: None)
    monkeypatch.setattr(cluster, "connected", lambda *_, **__: nullcontext(ray))
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    return cluster.results(None, source, lambda pipe: work, units, **options)


@pytest.mark.parametrize("seed", range(20))
def test_deaths_lose_and_double_nothing(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    ray = Cluster(seed, deaths={3: 1, 7: cluster.RETRIES, None: 2})
    said: list[str] = []
    found = list(results(monkeypatch, ray, lambda unit: 10 * unit, range(12), say=said.append))
    assert sorted(found) == [10 * unit for unit in range(12)]
    assert sorted(ray.begun) == sorted([*range(12), 3, *[7] * cluster.RETRIES])
    assert len([line for line in said if "unit 8 of 12" in line]) == cluster.RETRIES and len(said) <= 6


@pytest.mark.parametrize("seed", range(5))
def test_who_takes_slowly_is_not_flooded(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    ray = Cluster(seed)
    for taken, _ in enumerate(results(monkeypatch, ray, lambda unit: unit, range(20)), 1):
        assert len(ray.begun) <= taken + 3, "one for each of three workers beyond what was taken"
    assert len(ray.begun) == 20


def test_a_unit_that_always_ends_its_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Cluster(deaths={1: 99})
    with pytest.raises(RuntimeError, match="workers died 4 times at unit 2 of 3, the last one so: Its node was gone."):
        list(results(monkeypatch, ray, lambda unit: unit, range(3)))
    assert ray.begun.count(1) == 4


def test_workers_that_cannot_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="workers died 4 times at beginning, the last one so: Its node was gone."):
        list(results(monkeypatch, Cluster(deaths={None: 99}), lambda unit: unit, range(3)))


def test_an_error_of_a_unit_is_raised_as_it_is_and_ends_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(unit: int) -> int:
        if unit == 5:
            raise OSError(28, "No space left on device", "/a/b")
        time.sleep(0)
        return unit

    ray = Cluster()
    with pytest.raises(OSError, match="No space left on device: '/a/b'"):
        list(results(monkeypatch, ray, work, range(50)))
    assert len(ray.begun) < 20 and len(ray.alive) <= 1, "the one that failed has nothing to do"


def test_no_units_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(results(monkeypatch, None, lambda unit: unit, [])) == []  # type: ignore[arg-type]
