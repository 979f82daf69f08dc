"""Ray clusters: where one is, how many workers fit onto it, and the connection to it.

Ray (the extra ``[ray]``) is imported when a cluster is used, never before. `ray_workers` has what workers do.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from ssd_kernels import process

from .extras import needs
from .ray_quiet import quiet_about_workers

THREADS = 2  # of a worker without a GPU
STORE = 1 << 30  # bytes of results that may wait on a machine where the cluster is started here
PREFIX = "ray://"
ANSWER = 10.0  # seconds that a cluster has to answer
# Of a cluster on this machine. The second is named after the systems where Ray does without a network by itself.
LOCAL = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


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


def last_line(error: Exception) -> str:
    """What the last line of an error's text says, which is where Ray puts the reason."""
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
                                  f"`ray start` has run ({last_line(error)}); if it said that token authentication is "
                                  "on, set RAY_AUTH_MODE=token here") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray has put its own in the place
    with quiet_about_workers(ray, verbose):
        try:
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
