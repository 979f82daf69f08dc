"""Several processes that do one work into one folder: which of them this one is, and what of the work is its own.

They share nothing but the folder. They may start and end when they like, on one machine or many: units of work are
named by what they hold, never by who does them, and their files appear whole or not at all. So nothing is lost with a
killed process that a later one, of any number, would not do, and a unit that is done twice has the same files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

Unit = TypeVar("Unit")

# Number and count of processes, and number on the machine: torchrun's, or set by hand; and those of a step of Slurm.
BY_HAND = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")


@dataclass(frozen=True)
class Ranks:
    """One of several processes.

    Attributes:
        number: of this process, from 0.
        count: of processes.
        local: number of this process on its machine, from 0, which chooses its GPU; None if nobody said.
    """

    number: int = 0
    count: int = 1
    local: int | None = None

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> Ranks:
        """This process among its kind: by ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``, as torchrun sets them, or else
        by ``SLURM_PROCID``, ``SLURM_STEP_NUM_TASKS`` and ``SLURM_LOCALID``, as srun does; otherwise it is alone.

        Raises:
            ValueError: one of these is no such number, or only one of the first two is there; the message names it.
        """
        number, count, local = BY_HAND
        if not environment.get(number) and not environment.get(count):
            # Without the count this is the script of a batch job, which is one process, whatever SLURM_NTASKS says.
            if not all(environment.get(name) for name in SLURM[:2]):
                return cls()
            number, count, local = SLURM
        for name, other in ((number, count), (count, number)):
            if not environment.get(name):
                raise ValueError(f"{name} must be set where {other} is ({environment[other]!r}), or neither")
        ranks = _natural(environment, count)
        if ranks < 1:
            raise ValueError(f"{count} must be at least 1, got {ranks}")
        rank = _natural(environment, number)
        if rank >= ranks:
            raise ValueError(f"{number} must be less than {count}, which is {ranks}, as ranks count from 0; got {rank}")
        return cls(rank, ranks, _natural(environment, local) if environment.get(local) else None)

    @property
    def alone(self) -> bool:
        return self.count == 1

    def own(self, units: Sequence[Unit], before: int = 0) -> list[Unit]:
        """Those of the units that this process does: every ``count``-th one.

        Args:
            units: of the whole work, the same in every process, whatever is done already.
            before: how many units of the same work have been dealt out before; the next one is whose turn it is.
        """
        return [unit for place, unit in enumerate(units, before) if place % self.count == self.number]

    def device(self, device: str, gpus: int) -> str:
        """``cuda:N`` for ``cuda``, where N is the number on this machine among its ``gpus`` GPUs, around and around."""
        return f"cuda:{self.local % gpus}" if device == "cuda" and self.local is not None and gpus else device

    def __str__(self) -> str:
        return f"rank {self.number} of {self.count}"


ALONE = Ranks()


# What to do about units that are not there.
GO_ON = ("other ranks' work. If none is at work on it any more, run the same command again, with any number of ranks")


def still_missing(missing: Sequence[str], total: int, what: str) -> str:
    """What a process says that has done its own units and does not find those of others.

    Args:
        missing: names of what is not there; at least one.
        total: how many there should be.
        what: they are, in the plural.
    """
    return f"{len(missing)} of {total} {what} are not there yet, such as {missing[0]}: {GO_ON}"


class StillMissing(Exception):
    """Units of other processes are not done, so that nothing can be summed up yet.

    Attributes:
        missing: files that are not there.
        total: how many units there are.
    """

    def __init__(self, missing: Sequence[Path], total: int) -> None:
        super().__init__(still_missing([str(file) for file in missing], total, "units"))
        self.missing, self.total = missing, total


def _natural(environment: Mapping[str, str], name: str) -> int:
    text = environment[name].strip()
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{name} must be a whole number of at least 0, got {environment[name]!r}")
    return int(text)
