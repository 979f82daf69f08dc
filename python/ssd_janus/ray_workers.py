"""Units of work on a Ray cluster, by Ray Data: actors with a model each, one per GPU or per two cores.

What actors return comes to the process that asked, which alone writes files: they need no folder in common. When one
dies Ray begins it again and gives it the unit that it had; a unit depends on itself alone, so that its result is the
same. A `Ledger` adds what Ray Data does not have: a unit that always ends its actor is given up, and no more than one
result per actor waits to be taken, however small they are.
"""

from __future__ import annotations

import asyncio
import pickle
import secrets
import socket
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from .cluster import connected, last_line, needed, pool_size
from .extras import needs
from .ray_quiet import quiet_about_dataset

if TYPE_CHECKING:
    from .pipeline import Pipeline

RETRIES = 3  # deaths of workers that one unit survives
WORKERS = {"OMP_WAIT_POLICY": "passive"}  # variables of workers, before torch loads

Unit = TypeVar("Unit")
Result = TypeVar("Result")
Job = Callable[["Pipeline"], Callable[[Unit], Result]]


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


@dataclass(frozen=True)
class Deaths:
    """Workers that died at the same work.

    Attributes:
        unit: its number, or None where a worker loads the model.
        count: of deaths, one after the other.
        last: the name of the last one.
    """

    unit: int | None
    count: int
    last: str


class Ledger:
    """What was begun by which worker, and what was not taken yet. An actor of its own, without a core.

    Ray may call a method again whose answer was lost: nothing is counted twice.
    """

    def __init__(self, ahead: int, retries: int) -> None:
        """
        Args:
            ahead: how many units may be begun and not taken.
            retries: how many deaths one unit, or one actor that loads, survives.
        """
        self.ahead, self.retries = ahead, retries
        self.begun: dict[int | str, list[str]] = {}  # names of workers, by the unit or the actor that loads
        self.out: set[int] = set()
        self.done: set[int] = set()
        self.news: list[Deaths] = []
        self.room = asyncio.Condition()

    def _begin(self, work: int | str, worker: str) -> Deaths | None:
        names = self.begun.setdefault(work, [])
        if new := worker not in names:
            names.append(worker)
        if len(names) == 1:
            return None
        deaths = Deaths(work if isinstance(work, int) else None, len(names) - 1, names[-2])
        if deaths.count > self.retries:
            return deaths
        if new:
            self.news.append(deaths)
        return None

    async def load(self, actor: str, worker: str) -> Deaths | None:
        """A worker begins to load the model, as the actor of a name.

        Returns:
            Why it is not to, or None.
        """
        return self._begin(actor, worker)

    async def begin(self, unit: int, actor: str, worker: str) -> Deaths | None:
        """A worker that has loaded the model is to do a unit: returns when there is room for its result.

        Returns:
            Why it is not to, or None.
        """
        self.begun.pop(actor, None)
        if (deaths := self._begin(unit, worker)) is None:
            async with self.room:
                # Ray does a unit that was taken again if the machine that had its result is lost.
                await self.room.wait_for(lambda: unit in self.out or unit in self.done or len(self.out) < self.ahead)
                if unit not in self.done:
                    self.out.add(unit)
        return deaths

    async def taken(self, unit: int) -> list[Deaths]:
        """The result of a unit is taken.

        Returns:
            The deaths since the last call.
        """
        async with self.room:
            self.out.discard(unit)
            self.done.add(unit)
            self.begun.pop(unit, None)
            self.room.notify_all()
        news, self.news = self.news, []
        return news


class Worker:
    """A model in a process of its own, that does one unit after the other.

    What goes wrong is returned, not raised: Ray Data would wrap it.
    """

    def __init__(self, source: Source, job: Job[Any, Any], threads: int | None, ledger: Any) -> None:
        """
        Args:
            source: of the model.
            job: makes what does a unit, from the model.
            threads: of torch; None for its default.
            ledger: handle of the `Ledger`.
        """
        import ray

        context = ray.get_runtime_context()
        self.actor = context.get_actor_id()  # the same when Ray begins it again
        self.name = f"worker {context.get_worker_id()} on {socket.gethostname()}"
        self.ledger = ledger
        self.error: Exception | Deaths | None = ray.get(ledger.load.remote(self.actor, self.name))
        if self.error is not None:
            return
        try:
            import torch

            if threads is not None:
                torch.set_num_threads(threads)
            self.work = job(source.load())
        except Exception as error:
            self.error = _portable(error)

    def __call__(self, batch: Any) -> Any:
        """
        Args:
            batch: Arrow table of one row: ``number`` and ``unit``, pickled.

        Returns:
            Arrow table of one row: ``result``, the pickled number, result and what went wrong.
        """
        import pyarrow as pa
        from ray import cloudpickle

        (row,) = batch.to_pylist()
        done = cloudpickle.dumps((row["number"], *self._do(row["number"], row["unit"])))
        return pa.table({"result": pa.array([done], pa.large_binary())})

    def _do(self, number: int, unit: bytes) -> tuple[Any, Exception | Deaths | None]:
        import ray

        error = self.error or ray.get(self.ledger.begin.remote(number, self.actor, self.name))
        if error is not None:
            return None, error
        try:
            return self.work(pickle.loads(unit)), None
        except Exception as raised:
            return None, _portable(raised)


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

    No more units than there are workers are begun beyond those whose results were taken.

    Args:
        address: as `cluster_address` returns it.
        source: the model, which every worker loads once.
        job: makes what does a unit, from the model. A copy goes to every worker, by pickle, as units and results do.
        units: of work.
        workers: as of `pool_size`.
        verbose: let Ray say what it does.
        say: called with a line about every worker that died, when the next result comes.

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
        import_data()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        need = needed(source.device, nodes)
        size = pool_size(nodes, need, len(units), workers)
        left = set(range(len(units)))
        with (_ledger(ray, size) as ledger,
              _rows(ray, units, size, need, verbose, source=source, job=job, threads=need.get("CPU"),
                    ledger=ledger) as rows):
            for number, result, error in rows:
                for deaths in ray.get(ledger.taken.remote(number)):
                    say(f"a worker died {_at(deaths, len(units))}: doing it again")
                if isinstance(error, Deaths):
                    raise RuntimeError(f"workers died {error.count} times {_at(error, len(units))}, the last one was "
                                       f"{error.last}: Ray's logs of that machine tell how")
                if error is not None:
                    raise error
                if number in left:
                    left.remove(number)
                    yield result
                if not left:  # Ray may be doing some again, where the machine that had their results was lost
                    return
        raise RuntimeError(f"Ray lost unit {min(left) + 1} of {len(units)} and {len(left) - 1} others")


def import_data() -> None:
    """Raises an ImportError that names the extra if Ray is there without Ray Data's needs."""
    with needs("ray", "ray", "numpy", "pandas", "pyarrow"):
        import ray.data  # noqa: F401


def _at(deaths: Deaths, units: int) -> str:
    return "at beginning" if deaths.unit is None else f"at unit {deaths.unit + 1} of {units}"


@contextmanager
def _ledger(ray: Any, size: int) -> Iterator[Any]:
    """A `Ledger` for workers of a number, beside this process: they end together."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    kind = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=2 * size + 1000,
                      scheduling_strategy=here)(Ledger)
    ledger = kind.remote(size, RETRIES)
    try:
        yield ledger
    finally:
        ray.kill(ledger)


@contextmanager
def _rows(ray: Any, units: Sequence[Any], size: int, need: Mapping[str, int], verbose: bool,
          **arguments: Any) -> Iterator[Iterator[tuple[int, Any, Exception | Deaths | None]]]:
    """Number, result and what went wrong of every unit, as they come; the workers end with the block.

    Args:
        size: how many workers.
        need: as `needed` returns it.
        arguments: of `Worker`.
    """
    rows = [{"number": number, "unit": ray.cloudpickle.dumps(unit)} for number, unit in enumerate(units)]
    data = ray.data.from_items(rows, override_num_blocks=len(rows))  # a block is what Ray Data gives to an actor
    data.context.execution_options.preserve_order = False  # the context is a copy that is the dataset's own
    for option, value in {"enable_progress_bars": False, "print_on_execution_start": verbose,
                          "execution_no_progress_timeout_s": -1}.items():
        if hasattr(data.context, option):
            setattr(data.context, option, value)
    data = data.map_batches(
        Worker, fn_constructor_kwargs=arguments, batch_size=1, batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1),
        runtime_env={"env_vars": WORKERS}, **{f"num_{name.lower()}s": amount for name, amount in need.items()})
    data.set_name(name := f"ssd_janus_{secrets.token_hex(4)}")
    batches = iter(data.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0))
    with quiet_about_dataset(name, verbose), closing(batches):
        yield map(ray.cloudpickle.loads, _column(batches))


def _column(batches: Iterator[Any]) -> Iterator[bytes]:
    """What workers returned.

    Raises:
        RuntimeError: Ray could not go on.
    """
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except Exception as error:
            raise RuntimeError(f"a worker failed: {last_line(error)}") from error
        yield from batch.column("result").to_pylist()
