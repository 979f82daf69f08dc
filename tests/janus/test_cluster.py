"""What is decided about a Ray cluster before there is one; tests/serve/test_ray.py has clusters."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_cli import run
from test_drawing import Painter

from ssd_janus import Pipeline, ray_workers
from ssd_janus.cluster import cluster_address, needed, pool_size, room
from ssd_janus.drawing import Drawing
from ssd_janus.layouts import GenEval
from ssd_janus.prompts import gather
from ssd_janus.ray_quiet import quiet_about_dataset
from ssd_janus.ray_workers import Deaths, Ledger
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
    monkeypatch.setattr("ssd_janus.remote.results", None)
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
    assert ray_workers._portable(full) is full
    assert repr(ray_workers._portable(Odd("so"))) == repr(RuntimeError("Odd: so"))
    assert "No space left on device" in capsys.readouterr().err, "and into the worker's log"


async def begun(ledger: Ledger, *units: int, worker: str = "one") -> list[Deaths | None | str]:
    """What every unit's `begin` returns if all are asked for at once, in this order, or "waits"."""
    asked = [asyncio.ensure_future(ledger.begin(unit, "actor", worker)) for unit in units]
    await asyncio.sleep(0.01)
    answers = [each.result() if each.done() else "waits" for each in asked]
    for each in asked:
        each.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    return answers


def test_no_more_are_begun_than_have_room() -> None:
    async def go() -> None:
        ledger = Ledger(2, 3)
        assert await begun(ledger, 0, 1, 2, 3) == [None, None, "waits", "waits"]
        for _ in range(2):  # asked again, as Ray may
            await ledger.taken(1)
        assert await begun(ledger, 2, 3) == [None, "waits"]
        assert await begun(ledger, 0, 3) == [None, "waits"], "what is begun again needs no more room"
        assert await begun(ledger, 1, worker="two") == [None], "and what was taken none at all"
        for unit in (0, 2):
            await ledger.taken(unit)
        assert await begun(ledger, 4, 5, 6) == [None, None, "waits"]

    asyncio.run(go())


def test_who_waits_is_told_of_room() -> None:
    ledger = Ledger(1, 3)

    async def go() -> None:
        await ledger.begin(0, "a", "one")
        waits = asyncio.ensure_future(ledger.begin(1, "b", "two"))
        await asyncio.sleep(0.01)
        assert not waits.done()
        await ledger.taken(0)
        assert await asyncio.wait_for(waits, 60) is None

    asyncio.run(go())


def test_a_unit_that_always_ends_its_worker_is_given_up() -> None:
    async def go() -> None:
        ledger = Ledger(1, 2)
        for worker in ("one", "one", "two", "two", "three"):  # an answer may be lost, and the question come again
            assert await begun(ledger, 4, worker=worker) == [None]
        for _ in range(2):
            assert await begun(ledger, 4, worker="four") == [Deaths(4, 3, "three")]
        assert await ledger.taken(4) == [Deaths(4, 1, "one"), Deaths(4, 2, "two")]
        assert await ledger.taken(4) == []

    asyncio.run(go())


def test_an_actor_that_cannot_load_is_given_up() -> None:
    async def go() -> None:
        ledger = Ledger(9, 1)
        assert [await ledger.load(*each) for each in (("a", "1"), ("b", "2"), ("a", "3"))] == [None] * 3
        await ledger.begin(0, "a", "3")
        assert [await ledger.load(*each) for each in (("a", "4"), ("a", "5"))] == [None] * 2, "anew after a unit"
        assert await ledger.load("a", "6") == Deaths(None, 2, "5") and await ledger.load("b", "7") is None
        assert [deaths.unit for deaths in await ledger.taken(0)] == [None] * 3

    asyncio.run(go())


class Cluster:
    """Stands in for Ray and Ray Data where `results` looks at what came.

    Attributes:
        rows: number, result and error, as `ray_workers._rows` has them.
        deaths: what the ledger tells when a unit is taken.
        taken: units, in order.
        alive: whether the ledger is.
    """

    def __init__(self, rows: Sequence[tuple[int, Any, Any]], deaths: dict[int, list[Deaths]] | None = None) -> None:
        self.rows, self.deaths = rows, deaths or {}
        self.taken: list[int] = []
        self.alive = True

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 6}}, {"Alive": False, "Resources": {"CPU": 99}}]

    def get(self, unit: int) -> list[Deaths]:
        self.taken.append(unit)
        return self.deaths.get(unit, [])

    @contextmanager
    def ledger(self, ray: object, size: int) -> Iterator[Any]:
        assert size == 3
        try:
            yield SimpleNamespace(taken=SimpleNamespace(remote=lambda unit: unit))
        finally:
            self.alive = False


def results(monkeypatch: pytest.MonkeyPatch, ray: Cluster, units: int, **options: Any) -> Iterator[Any]:
    monkeypatch.setattr(ray_workers, "connected", lambda *_, **__: nullcontext(ray))
    monkeypatch.setattr(ray_workers, "import_data", lambda: None)
    monkeypatch.setattr(ray_workers, "_ledger", ray.ledger)
    monkeypatch.setattr(ray_workers, "_rows", lambda *_, **__: nullcontext(iter(ray.rows)))
    source: Any = SimpleNamespace(device="cpu")
    return ray_workers.results(None, source, lambda pipe: lambda unit: unit, range(units), **options)


def test_results_come_once_and_are_taken_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    deaths = [Deaths(2, 1, "one"), Deaths(None, 2, "two")]
    ray = Cluster([(2, "c", None), (0, "a", None), (2, "again", None), (1, "b", None)], {0: deaths})
    said: list[str] = []
    found = results(monkeypatch, ray, 3, say=said.append)
    assert next(found) == "c" and ray.taken == [2] and not said and ray.alive
    assert list(found) == ["a", "b"] and not ray.alive
    assert said == ["a worker died at unit 3 of 3: doing it again", "a worker died at beginning: doing it again"]


def test_what_is_lost_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Cluster([(2, None, None), (0, None, None)])
    with pytest.raises(RuntimeError, match="Ray lost unit 2 of 5 and 2 others"):
        list(results(monkeypatch, ray, 5))
    assert not ray.alive


@pytest.mark.parametrize("error, kind, message", [
    (OSError(28, "No space left on device", "/a/b"), OSError, "No space left on device: '/a/b'"),
    (Deaths(1, 4, "worker f0 on head"), RuntimeError,
     "workers died 4 times at unit 2 of 3, the last one was worker f0 on head: Ray's logs of that machine tell how"),
    (Deaths(None, 4, "worker f0 on head"), RuntimeError, "workers died 4 times at beginning, the last"),
])
def test_an_error_of_a_unit_is_raised_as_it_is(monkeypatch: pytest.MonkeyPatch, error: Any, kind: type[Exception],
                                               message: str) -> None:
    ray = Cluster([(0, "a", None), (1, None, error), (2, "c", None)])
    found = results(monkeypatch, ray, 3)
    assert next(found) == "a"
    with pytest.raises(kind, match=message):
        next(found)
    assert not ray.alive


def test_no_units_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Cluster([])
    assert list(results(monkeypatch, ray, 0)) == [] and ray.alive, "nothing was asked of it"


def test_ray_data_is_quiet_about_one_dataset_alone(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("ray.data")
    console, other = logging.StreamHandler(sys.stderr), logging.getLogger("ray.data.somewhere")
    logger.addHandler(console)
    try:
        with quiet_about_dataset("ours", verbose=False):
            other.error("said here")
            for name, text in [("Executor-ours_1", "by its thread"), ("Executor-1", "about ours_1"),
                               ("Executor-2", "about theirs")]:
                thread = threading.Thread(target=other.error, args=(text,), name=name)
                thread.start()
                thread.join()
        other.error("afterwards")
        with quiet_about_dataset("ours", verbose=True):
            other.error("if asked for")
    finally:
        logger.removeHandler(console)
    assert capsys.readouterr().err.splitlines() == ["about theirs", "afterwards", "if asked for"]
