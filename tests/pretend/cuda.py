"""`torch.cuda` of the pretended machine."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.profiler

from . import kernels
from .machine import Graph, Machine, Stream, TimingEvent, _machines, machine
from .tensor import Mode, known_on_cuda

SITE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "site")
DEVICES = "SSD_PRETENDED_DEVICES"  # environment: how many devices the processes of a script pretend


class Generator(torch.Generator):
    """A generator that may say it is on a pretended device."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls, "cpu")
        made.where = torch.device(device)
        if made.where.type == "cuda":
            made.where = torch.device("cuda", machine().index(made.where))
            machine().generators[made._cdata] = made.where.index
            weakref.finalize(made, machine().generators.pop, made._cdata)
        return made

    @property
    def device(self) -> torch.device:
        return self.where

    def clone_state(self) -> Generator:
        return Generator(self.where)

    def graphsafe_set_state(self, state: torch.Generator) -> None:
        """Of the numbers to come, which mean nothing here, nothing changes."""
        machine().stuck.discard(self.where.index)


class Profile:
    """In the place of `torch.profiler.profile`: the launches as its events."""

    def __init__(self, **options: Any) -> None:
        self.began = self.ended = 0

    def __enter__(self) -> Profile:
        self.began = len(machine().log)
        return self

    def __exit__(self, *error: object) -> None:
        self.ended = len(machine().log)

    def events(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=event.name, device_type=torch._C._autograd.DeviceType.CUDA)
                for event in machine().log[self.began:self.ended] if not event.captured for _ in range(event.launches)]


def _functions(here: Machine) -> dict[str, Any]:
    """Of `torch.cuda`, by name. What is not here is torch's own and asks these."""

    def set_device(device: Any) -> None:
        here.current = here.index(device)

    def exchange(device: int) -> int:
        before = here.current
        if device >= 0:
            here.current = device
        return before

    def properties(device: Any = None) -> SimpleNamespace:
        major, minor = here.capability
        return SimpleNamespace(name=here.name, major=major, minor=minor, total_memory=here.memory, warp_size=32,
                               multi_processor_count=132, shared_memory_per_block_optin=232448)

    def allocated(device: Any = None) -> int:
        return here.allocated[here.index(device)]

    def peak(device: Any = None) -> int:
        return here.peak[here.index(device)]

    def reset_peak(device: Any = None) -> None:
        here.peak[here.index(device)] = allocated(device)

    def nothing() -> Callable[..., None]:
        return lambda *args, **others: None  # a new one each time: torch tells its functions apart by identity

    return {
        "is_available": lambda: True, "is_initialized": lambda: True, "init": nothing(), "_lazy_init": nothing(),
        "is_bf16_supported": lambda including_emulation=True: True,
        "device_count": lambda: here.devices, "current_device": lambda: here.current, "set_device": set_device,
        "_exchange_device": exchange, "_maybe_exchange_device": lambda device: exchange(device),
        "get_device_capability": lambda device=None: here.capability, "get_device_properties": properties,
        "get_device_name": lambda device=None: properties(device).name,
        "Stream": Stream, "current_stream": here.stream, "default_stream": here.default_stream,
        "set_stream": here.set_stream, "Event": TimingEvent, "CUDAGraph": Graph,
        "synchronize": lambda device=None: here.wait(here.index(device), "synchronize"),
        "is_current_stream_capturing": lambda: here.stream().graph is not None,
        "graph_pool_handle": lambda: (0, 0), "empty_cache": nothing(), "ipc_collect": nothing(),
        "mem_get_info": lambda device=None: (here.memory - allocated(device), here.memory),
        "memory_allocated": allocated, "memory_reserved": lambda device=None: allocated(device),
        "max_memory_allocated": peak, "reset_peak_memory_stats": reset_peak,
        "manual_seed": nothing(), "manual_seed_all": nothing(), "_lazy_call": nothing(),
    }


@contextmanager
def pretended(devices: int = 1, **sizes: Any) -> Iterator[Machine]:
    """Pretend CUDA devices in this process while this lasts, in all threads that are started meanwhile.

    Args:
        devices: how many.
        sizes: ``capability`` and ``memory`` of each, as `Machine` takes them.
    """
    here = Machine(devices, **sizes)
    to, run = torch.Tensor.to, threading.Thread.run

    def with_index(value: Any) -> Any:
        if isinstance(value, (str, torch.device)) and torch.device(value) == torch.device("cuda"):
            return torch.device("cuda", here.current)
        return value

    def moved(self: torch.Tensor, *args: Any, **others: Any) -> torch.Tensor:
        return to(self, *map(with_index, args), **{name: with_index(value) for name, value in others.items()})

    def to_cuda(self: torch.Tensor, device: Any = None, non_blocking: bool = False, **others: Any) -> torch.Tensor:
        return to(self, torch.device("cuda", here.index(device)), non_blocking=non_blocking, **others)

    def in_thread(self: threading.Thread) -> None:
        torch._C._set_only_lift_cpu_tensors(True)  # of this thread
        with Mode():
            run(self)

    lifts, device = torch._C._only_lift_cpu_tensors(), here.current
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    with ExitStack() as undo:
        _machines.append(here)
        undo.callback(_machines.remove, here)
        undo.callback(setattr, here, "current", device)
        undo.callback(known_on_cuda()._destroy)
        torch._C._set_only_lift_cpu_tensors(True)
        undo.callback(torch._C._set_only_lift_cpu_tensors, lifts)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        undo.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrites)
        for name, value in _functions(here).items():
            undo.enter_context(patch.object(torch.cuda, name, value))
        for owner, name, value in ((torch.Tensor, "to", moved), (torch.Tensor, "cuda", to_cuda),
                                   (torch, "Generator", Generator), (torch.profiler, "profile", Profile),
                                   (threading.Thread, "run", in_thread),
                                   (torch.cuda.graph, "default_capture_stream", None), *kernels.patches(here)):
            undo.enter_context(patch.object(owner, name, value))
        undo.enter_context(patch.object(torch.cuda, "default_generators", tuple(
            Generator(torch.device("cuda", index)) for index in range(devices))))
        undo.enter_context(patch.object(torch._C, "_host_emptyCache", lambda: None, create=True))
        undo.enter_context(Mode())
        yield here


_installed = ExitStack()


def install(devices: int = 1, **sizes: Any) -> Machine:
    """As `pretended`, until the process ends."""
    return _installed.enter_context(pretended(devices, **sizes))


def environment(devices: int = 1) -> dict[str, str]:
    """Variables that make every Python process started with them pretend: see site/sitecustomize.py."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    paths = [SITE, root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {DEVICES: str(devices), "PYTHONPATH": os.pathsep.join(paths)}

