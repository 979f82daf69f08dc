"""Draw on a Ray cluster what `drawing.draw` draws."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ssd_kernels import backends
from ssd_kernels.reading import shown

from .checks import check_number
from .cluster import check_installed, cluster_address, needed
from .drawing import Drawing, Files, Unit
from .layouts import Facts
from .progress import ProgressCallback
from .ray_workers import Source, results

if TYPE_CHECKING:
    from .pipeline import Pipeline

__all__ = ["OnRay", "Source"]


@dataclass(frozen=True)
class OnRay:
    """`drawing.Painters` that are workers on a cluster; files are written where `draw` runs.

    Attributes: as the arguments of `ray_workers.results`.
    """

    address: str | None
    source: Source
    workers: int | None = None
    verbose: bool = False
    say: Callable[[str], Any] = lambda line: None

    @classmethod
    def at(cls, place: str, source: Source, workers: int | None = None, verbose: bool = False,
           say: Callable[[str], Any] = lambda line: None) -> OnRay:
        """Workers at a place, as `cluster.cluster_address` reads it; nothing is started yet.

        Raises:
            ImportError: Ray is missing; the message names the extra.
            ValueError: there is no such place, or no such device on a cluster, or no such backend.
        """
        address = cluster_address(place)
        needed(source.device, ())
        if source.backend != "auto":
            backends.get(source.backend)
        check_installed()
        return cls(address, source, workers, verbose, say)

    def __str__(self) -> str:
        return f"Ray at {self.address}" if self.address else "Ray"

    def __call__(self, work: Drawing, todo: Sequence[Unit], keep: Container[int],
                 report: ProgressCallback) -> Iterator[list[Files]]:
        """
        Raises:
            ValueError: an argument is wrong; most are found before a cluster is started.
            As `ray_workers.results`.
        """
        pipe = work.pipe
        check_number("seed", work.seed, int, 0)
        if self.source.device == "cpu":
            backends.resolve(self.source.backend, pipe.device, pipe.dtype, pipe.shape.head_dim, work.plan.kv_format)
        job = PaintJob(functools.partial(
            Drawing, layout=work.layout, prompts=(), guidance_scale=work.guidance_scale, seed=work.seed, plan=work.plan,
            batch_size=work.batch_size), work.settings)
        units = [(unit, tuple(prompt.number for prompt in unit if prompt.number in keep)) for unit in todo]
        steps, total = pipe.shape.num_visual_tokens, len(units) * pipe.shape.num_visual_tokens
        report(0, total)
        for done, files in enumerate(results(self.address, self.source, job, units, workers=self.workers,
                                             verbose=self.verbose, say=self.say), 1):
            report(done * steps, total)
            yield files


@dataclass(frozen=True)
class PaintJob:
    """What a worker does: units of ``work(pipe)``, if its model is the one that ``settings`` tell of."""

    work: Callable[[Pipeline], Drawing]
    settings: Facts

    def __call__(self, pipe: Pipeline) -> Callable[[tuple[Unit, Container[int]]], list[Files]]:
        work = self.work(pipe)
        for name, value in self.settings.items():
            if work.settings[name] != value:
                raise ValueError(f"a worker has another {name} than the process that asks "
                                 f"({shown(work.settings[name])} there, {shown(value)} here): every node must have the "
                                 "same checkpoint")
        return lambda unit: list(work.paint(*unit))
