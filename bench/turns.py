"""Loops that run in threads of their own and take turns, so that all of them are timed in the same moments."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

TURN = 0.05  # seconds after which a loop lets the next one go on: some steps, so that caches are warm again
T = TypeVar("T")


class _GivenUp(BaseException):
    """Ends a loop whose caller was interrupted."""


def in_turn(jobs: Sequence[Callable[[Callable[[], None]], T]], between: Callable[[], None], turn: float = TURN,
            clock: Callable[[], float] = time.monotonic) -> list[T | Exception]:
    """Run jobs, one at any time. Each is given a function to call after every step, which lets others run.

    Args:
        between: called before every turn.
        turn: seconds that a job may run before it lets others; a single step may take longer.
        clock: in seconds.

    Returns:
        what each job returned, or the exception that ended it.
    """
    if len(jobs) == 1:
        return [_alone(jobs[0], between, turn, clock)]
    results: list[T | Exception | None] = [None] * len(jobs)
    go_on = [threading.Semaphore(0) for _ in jobs]
    stopped = threading.Semaphore(0)
    began, given_up = 0.0, False

    def run(number: int) -> None:
        def pause() -> None:
            if clock() - began >= turn:
                stopped.release()
                wait()

        def wait() -> None:
            go_on[number].acquire()
            if given_up:
                raise _GivenUp

        try:
            wait()
            results[number] = jobs[number](pause)
        except Exception as error:
            results[number] = error
        except _GivenUp:
            pass
        finally:
            stopped.release()

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    running = list(range(len(jobs)))
    try:
        while running:
            for number in running:
                between()
                began = clock()
                go_on[number].release()
                stopped.acquire()
            running = [number for number in running if results[number] is None]
    finally:
        # Interrupted, a process must not end while threads of its are in torch.
        given_up, began = True, float("-inf")
        for semaphore in go_on:
            semaphore.release()
        for thread in threads:
            thread.join()
    return [result for result in results if result is not None]


def _alone(job: Callable[[Callable[[], None]], T], between: Callable[[], None], turn: float,
           clock: Callable[[], float]) -> T | Exception:
    """A single job, in the caller's thread."""
    between()
    began = clock()

    def pause() -> None:
        nonlocal began
        if clock() - began >= turn:
            between()
            began = clock()

    try:
        return job(pause)
    except Exception as error:
        return error
