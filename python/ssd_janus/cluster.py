"""Units of work on a Ray cluster: workers with a model each, one per GPU or per two cores.

Ray (the extra ``[ray]``) is imported when a cluster is used, never before. What workers return comes to the process
that asked, which alone writes files: they need no folder in common. When a worker dies another one begins, and its unit
goes to the next that is free; a unit depends on itself alone, so that its result is the same.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import logging
import os
import pickle
import signal
import socket
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from ssd_kernels import process

from .extras import needs

if TYPE_CHECKING:
    from .pipeline import Pipeline

THREADS = 2  # of a worker without a GPU
RETRIES = 3  # deaths of workers that one unit survives
STORE = 1 << 30  # bytes of results that may wait on a machine where the cluster is started here
PREFIX = "ray://"
WORKERS = {"OMP_WAIT_POLICY": "passive"}  # variables of workers, before torch loads
ANSWER = 10.0  # seconds that a cluster has to answer
# Of a cluster on this machine. The second is named after the systems where Ray does without a network by itself.
LOCAL = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

Unit = TypeVar("Unit")
Result = TypeVar("Result")
Job = Callable[["Pipeline"], Callable[[Unit], Result]]


def cluster_address(place: str) -> str | None:
    """Where the cluster is that ``--on`` names, as ``ray.init`` takes it.

    Args:
        place: ``ray``, ``ray://auto`` or ``ray://HOST:PORT``.

    Returns:
        ``auto`` or ``HOST:PORT``; None for a cluster that is started here.

    Raises:
        ValueError: it is none of these.
    """
    if place == "ray":
        return None
    host, colon, port = (address := place.removeprefix(PREFIX)).rpartition(":")
    named = colon and host and "/" not in host and port.isascii() and port.isdigit() and 0 < int(port) < 2**16
    if not place.startswith(PREFIX) or not (address == "auto" or named):
        raise ValueError(f"--on must be ray, ray://auto or ray://HOST:PORT, got {place!r}")
    return address


def check_installed() -> None:
    """Raises an ImportError that names the extra if Ray is missing. Does not import it."""
    with needs("ray", "ray"):
        if importlib.util.find_spec("ray") is None:
            raise ModuleNotFoundError("No module named 'ray'", name="ray")


def needed(device: str, nodes: Sequence[Mapping[str, float]]) -> dict[str, int]:
    """What a worker takes of a cluster, as Ray names it: one GPU, or two cores, or one where no node has two.

    Args:
        device: ``cpu`` or ``cuda``; Ray chooses which GPU.
        nodes: resources of every node, by name.

    Raises:
        ValueError: another device.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda with --on, where Ray chooses the GPU, got {device}")
    if device == "cuda":
        return {"GPU": 1}
    return {"CPU": max(1, min(THREADS, int(max((node.get("CPU", 0) for node in nodes), default=0))))}


def room(nodes: Sequence[Mapping[str, float]], need: Mapping[str, int]) -> int:
    """How many workers that need so much fit onto these nodes, none of them on two.

    Args: as of `needed`, and what it returns.
    """
    return sum(min(int(node.get(name, 0) // amount) for name, amount in need.items()) for node in nodes)


def pool_size(nodes: Sequence[Mapping[str, float]], need: Mapping[str, int], units: int, workers: int | None) -> int:
    """How many workers to start: as many as fit, or as are asked for, never more than there are units.

    Args:
        workers: as many in any case, where a cluster grows by what it is asked for; None for those that fit.

    Raises:
        ValueError: there is room for none.
    """
    if workers is None and not (workers := room(nodes, need)):
        amounts = " and ".join(f"{amount} {name}" for name, amount in need.items())
        raise ValueError(f"--on must name a cluster with a node that has {amounts} for a worker; this one has "
                         f"{len(nodes)} nodes without. If it grows on demand, --workers says how many to ask for")
    return min(units, workers)


@dataclass(frozen=True)
class Source:
    """The model that workers load.

    Attributes:
        model: a folder, which must be there on every node under this name, a hub id, or None for the included model.
        device, dtype, backend: arguments of `Pipeline.from_pretrained`.
        sampling: arguments of `engine.set_sampling`.
        weights: a format of `quantization.quantize`, or None.
    """

    model: str | None
    device: str
    dtype: str | None
    backend: str
    sampling: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None

    def load(self) -> Pipeline:
        import torch

        from .engine import set_sampling
        from .pipeline import Pipeline

        pipe = Pipeline.from_pretrained(self.model, device=self.device, backend=self.backend,
                                        dtype=None if self.dtype is None else getattr(torch, self.dtype))
        set_sampling(pipe.model, **self.sampling)
        if self.weights is not None:
            from .quantization import quantize

            quantize(pipe.model, self.weights)
        return pipe


class Worker:
    """A model in a process of its own, that does one unit after the other.

    What goes wrong is returned, not raised: Ray would wrap it.
    """

    def __init__(self, source: Source, job: Job[Any, Any], threads: int | None) -> None:
        """
        Args:
            source: of the model.
            job: makes what does a unit, from the model.
            threads: of torch; None for its default.
        """
        self.error: Exception | None = None
        try:
            import torch

            if threads is not None:
                torch.set_num_threads(threads)
            self.work = job(source.load())
        except Exception as error:
            self.error = _portable(error)

    def ready(self) -> tuple[None, Exception | None]:
        """Whether the model could be loaded."""
        return None, self.error

    def do(self, unit: Any) -> tuple[Any, Exception | None]:
        """The result of a unit, or what went wrong."""
        try:
            return self.work(unit), None
        except Exception as error:
            return None, _portable(error)


def _portable(error: Exception) -> Exception:
    """The error as it can be raised in another process; its traceback goes into the worker's log."""
    traceback.print_exception(type(error), error, error.__traceback__)
    with suppress(Exception):
        if str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    return RuntimeError(f"{type(error).__name__}: {error}")


def results(address: str | None, source: Source, job: Job[Unit, Result], units: Sequence[Unit], *,
            workers: int | None = None, verbose: bool = False,
            say: Callable[[str], Any] = lambda line: None) -> Iterator[Result]:
    """The result of every unit, once each, in the order in which they come.

    A worker gets its next unit when its last result is taken, so that no more than one result of each waits.

    Args:
        address: as `cluster_address` returns it.
        source: the model, which every worker loads once.
        job: makes what does a unit, from the model. A copy goes to every worker, by pickle, as units and results do.
        units: of work.
        workers: as of `pool_size`.
        verbose: let Ray say what it does.
        say: called with a line about every worker that died.

    Raises:
        ImportError: Ray is missing; the message names the extra.
        ConnectionError: no cluster answers.
        ValueError: no worker fits.
        RuntimeError: workers died again and again.
        Exception: what ``job`` or a unit raised in a worker, or loading the model there.
    """
    if not units:
        return
    with connected(address, device=source.device, verbose=verbose) as ray:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        need = needed(source.device, nodes)
        kind = ray.remote(**{f"num_{name.lower()}s": amount for name, amount in need.items()},
                          scheduling_strategy="SPREAD", max_restarts=0,
                          runtime_env={"env_vars": WORKERS})(Worker)
        work, todo, deaths = ray.put(job), deque(range(len(units))), Counter[int | None]()
        busy: dict[Any, tuple[Any, int | None]] = {}  # what a worker does: a unit, or None while it begins

        def begin() -> None:
            worker = kind.remote(source, work, need.get("CPU"))
            busy[worker.ready.remote()] = worker, None

        for _ in range(pool_size(nodes, need, len(units), workers)):
            begin()
        try:
            while todo or any(number is not None for _, number in busy.values()):
                (done,), _ = ray.wait(list(busy), num_returns=1)
                worker, number = busy.pop(done)
                try:
                    result, error = ray.get(done)
                except ray.exceptions.RayTaskError as raised:
                    raise RuntimeError(f"a worker failed: {_last_line(raised)}") from raised
                except ray.exceptions.RayError as raised:  # the worker or its node died, or what it returned is lost
                    deaths[number] += 1
                    what = "beginning" if number is None else f"unit {number + 1} of {len(units)}"
                    if deaths[number] > RETRIES:
                        raise RuntimeError(f"workers died {deaths[number]} times at {what}, the last one so: "
                                           f"{_last_line(raised)}") from raised
                    say(f"a worker died at {what}: doing it again")
                    ray.kill(worker)
                    if number is not None:
                        todo.appendleft(number)
                    begin()
                    continue
                if error is not None:
                    raise error
                deaths[number] = 0
                if todo:
                    following = todo.popleft()
                    busy[worker.do.remote(units[following])] = worker, following
                if number is not None:
                    yield result
        finally:
            for worker, _ in busy.values():
                ray.kill(worker)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


@contextmanager
def connected(address: str | None, *, device: str = "cpu", verbose: bool = False) -> Iterator[Any]:
    """The module ``ray``, connected to a cluster inside the block; one that this process is connected to already stays.

    A cluster that is started here listens on the loopback interface only, has no dashboard, reports nothing to
    anybody, and ends with the block or the process.

    Args: as of `results`; without ``device="cuda"`` a cluster that is started here gets no GPUs.

    Raises:
        ImportError: Ray is missing; the message names the extra.
        ConnectionError: no cluster answers.
    """
    handler = signal.getsignal(signal.SIGTERM)
    if address is not None:
        _check_answer(address)
    with _environment(LOCAL if address is None or _is_loopback(address) else {}), needs("ray", "ray"):
        import ray

        if ray.is_initialized():
            yield ray
            return
        quiet: dict[str, Any] = {} if verbose else {"log_to_driver": False, "logging_level": logging.ERROR}
        own: dict[str, Any] = {"num_cpus": process.usable_cpus(), "object_store_memory": STORE,
                               "include_dashboard": False, **({} if device == "cuda" else {"num_gpus": 0})}
        try:
            ray.init(address or "local", **quiet, **({} if address else own))
        except ConnectionError as error:
            raise ConnectionError(f"--on {PREFIX}{address} must be a cluster that this machine is a node of, where "
                                  f"`ray start` has run ({_last_line(error)}); if it said that token authentication is "
                                  "on, set RAY_AUTH_MODE=token here") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray has put its own in the place
    try:
        with _silence(ray, verbose):
            yield ray
    finally:
        ray.shutdown()


def _check_answer(address: str) -> None:
    """Raises a ConnectionError if nobody listens at HOST:PORT, which Ray would try for many minutes."""
    if address != "auto":
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), ANSWER).close()
        except OSError as error:
            raise ConnectionError(f"--on {PREFIX}{address}: nobody answers there ({error.strerror or error})") from None


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Variables inside the block, but for those that the user has set."""
    ours = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


@contextmanager
def _silence(ray: Any, verbose: bool) -> Iterator[None]:
    """Keep what Ray says about dead workers off stdout, where results are printed; no option does."""
    module = getattr(getattr(ray, "_private", None), "worker", None)
    printed = getattr(module, "_worker_logs_enabled", None)
    if printed is None or verbose:
        yield
        return
    module._worker_logs_enabled = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        module._worker_logs_enabled = printed  # type: ignore[union-attr]
