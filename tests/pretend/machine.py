"""The state of the pretended machine: devices, streams, captures, memory and the log."""

from __future__ import annotations

import itertools
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import guard

ROOT = Path(__file__).resolve().parents[2]
ROOMS = tuple(str(ROOT / room) for room in ("python", "ssd_kernels", "bench", "tools"))
OTHERS = "/transformers/"
NOT_PERMITTED = "CUDA error: operation not permitted when stream is capturing"
# `torch.AcceleratorError` is what torch raises for errors of CUDA; earlier releases raise its base class.
CUDAError: type[RuntimeError] = getattr(torch, "AcceleratorError", RuntimeError)


def place() -> str:
    """``file:line`` of the innermost frame that is this project's own or transformers'; "" if there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(ROOMS):
            return f"{name[len(str(ROOT)) + 1:]}:{frame.f_lineno}"
        if OTHERS in name:
            return f"transformers/{name.rpartition(OTHERS)[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


@dataclass(frozen=True)
class Event:
    """Something that the machine was asked for.

    Attributes:
        kind: ``launch`` (an operation that runs at least one kernel), ``replay`` (of a graph), ``to_host`` (a read,
            for which the host waits), ``to_device`` (a copy of pageable memory, for which it waits too unless it is
            ``non_blocking``), ``wait`` (a synchronisation), ``prepare`` (a library made its workspace for a stream).
        name: of the operation.
        device, stream: index of the device, number of the stream.
        place: who asked (`place`); not looked up for launches.
        nbytes: copied, or read and written by the operation.
        launches: kernels, as far as one operation is one; of a replay as many as the graph recorded.
        captured: it was recorded by a graph instead of being done.
        variant: for what a library or compiler may make a kernel or workspace of its own: the shapes of the tensors
            that an operation of torch was given; of a kernel in Triton its constants, and what else it specialises on.
    """

    kind: str
    name: str
    device: int
    stream: int
    place: str
    nbytes: int = 0
    launches: int = 0
    captured: bool = False
    variant: tuple[Any, ...] = ()


class Stream:
    """In the place of `torch.cuda.Stream`."""

    numbers = itertools.count(1)

    def __init__(self, device: Any = None, priority: int = 0, *, number: int | None = None) -> None:
        self.device = torch.device("cuda", machine().index(device))
        self.device_index = self.device.index
        self.cuda_stream = self.stream_id = next(self.numbers) if number is None else number
        self.graph: Graph | None = None

    def wait_stream(self, other: Stream) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def record_event(self, event: TimingEvent | None = None) -> TimingEvent:
        event = event or TimingEvent()
        event.record(self)
        return event

    def synchronize(self) -> None:
        machine().wait(self.device_index, "synchronize", self)


class TimingEvent:
    """In the place of `torch.cuda.Event`: the clock of the host, with CUDA's rule that a pair is of one device."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.enable_timing, self.stream, self.seconds = enable_timing, None, 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or machine().stream()
        machine().events.add(self.stream.device_index)
        self.seconds = time.perf_counter()

    def elapsed_time(self, other: TimingEvent) -> float:
        """Milliseconds."""
        if not (self.enable_timing and other.enable_timing and self.stream and other.stream):
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        if self.stream.device_index != other.stream.device_index:
            raise CUDAError("CUDA error: invalid resource handle")
        return max((other.seconds - self.seconds) * 1e3, 1e-3)

    def synchronize(self) -> None:
        machine().wait(self.stream.device_index if self.stream else machine().current, "synchronize", self.stream)

    def wait(self, stream: Stream | None = None) -> None:
        pass

    def query(self) -> bool:
        return True


class Graph:
    """In the place of `torch.cuda.CUDAGraph`.

    Attributes:
        operations: names of what was recorded.
        replays: how often it was replayed.
    """

    def __init__(self, keep_graph: bool = False) -> None:
        self.operations: list[Event] = []
        self.generators: set[int] = set()
        self.replays = 0
        self._recorded: list[Callable[[], None]] = []
        self._owned: list[torch.Tensor] = []
        self._saved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._stream: Stream | None = None
        self._broken = self._complete = False

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global", **others: Any) -> None:
        stream = machine().stream()
        if stream.cuda_stream == 0:
            raise CUDAError("CUDA graphs must be captured on a non-default stream.")
        if stream.graph is not None:
            raise CUDAError(NOT_PERMITTED)
        self._stream, stream.graph = stream, self
        machine().captures += 1

    def capture_end(self) -> None:
        assert self._stream is not None
        if machine().stream() is not self._stream:
            raise CUDAError("Capture must end on the same stream it began on.")
        self._stream.graph = None
        with torch.no_grad():
            for storage, contents in self._saved.values():
                storage.copy_(contents)
        self._saved.clear()
        if self._broken:
            machine().stuck.add(self._stream.device_index)
            raise CUDAError("CUDA error: operation failed due to a previous error during capture")
        if not self._recorded:
            machine().empty_graphs += 1
        self._complete = True
        machine().graphs.append(self)

    def replay(self) -> None:
        if not self._complete:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        stream = machine().stream(self._stream.device)
        if stream.graph is not None:
            raise machine().forbidden("replay")
        self.replays += 1
        machine().note("replay", "graph", stream.device_index, stream, launches=len(self.operations))
        with torch.no_grad():
            for operation in self._recorded:
                operation()

    def reset(self) -> None:
        self._recorded.clear()
        self._owned.clear()
        self._complete = False

    def pool(self) -> tuple[int, int]:
        return 0, id(self)

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generators.add(generator._cdata)

    def record(self, event: Event, operation: Callable[[], None]) -> None:
        """What every replay does again."""
        self.operations.append(event)
        self._recorded.append(operation)

    def own(self, tensor: torch.Tensor) -> None:
        """Hold the memory of a tensor that was made in the capture."""
        self._owned.append(tensor)

    def keep(self, tensor: torch.Tensor) -> None:
        """Remember the contents of a tensor's storage, which a capture leaves as they are."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._saved:
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._saved[storage.data_ptr()] = whole, whole.clone()

    def spoil(self) -> None:
        """Something happened that ends the capture."""
        self._broken = True


@dataclass
class Machine:
    """A host with pretended devices.

    Attributes:
        devices: how many. name, capability: of each. memory: bytes of each.
        log: what happened, in order.
        graphs: captured successfully; ``captures`` were begun, and ``empty_graphs`` recorded nothing.
        events: devices on whose streams events were recorded.
    """

    devices: int = 1
    name: str = "Pretended GPU"
    capability: tuple[int, int] = (9, 0)
    memory: int = 8 << 30
    log: list[Event] = field(default_factory=list)
    graphs: list[Graph] = field(default_factory=list)
    events: set[int] = field(default_factory=set)
    captures: int = 0
    empty_graphs: int = 0

    def __post_init__(self) -> None:
        self._here = threading.local()
        self._guard = guard.load()
        self._guard.pretended_set_device_count(self.devices)
        self.generators: dict[int, int] = {}  # devices of random number generators, by the address of what they wrap
        self.stuck: set[int] = set()  # devices whose own generator waits for the end of a capture that failed
        self._default: dict[int, Stream] = {}
        self._storages: dict[int, int] = {}
        self._prepared: set[tuple[str, int]] = set()
        self.allocated, self.peak = [0] * self.devices, [0] * self.devices

    @property
    def current(self) -> int:
        """Index of the calling thread's device."""
        return int(self._guard.pretended_current_device())

    @current.setter
    def current(self, device: int) -> None:
        if not 0 <= device < self.devices:
            raise CUDAError("CUDA error: invalid device ordinal")
        self._guard.pretended_set_device(device)

    def index(self, device: Any = None) -> int:
        """Index of a device, given as torch's functions take it."""
        if device is None:
            return self.current
        if isinstance(device, int):
            index = device
        else:
            device = torch.device(device)
            if device.type != "cuda":
                raise ValueError(f"Expected a cuda device, but got: {device}")
            index = self.current if device.index in (None, -1) else device.index
        if not 0 <= index < self.devices:
            raise CUDAError("CUDA error: invalid device ordinal")
        return index

    def stream(self, device: Any = None) -> Stream:
        """The stream on which the calling thread launches on a device."""
        index = self.index(device)
        return self._streams().get(index) or self.default_stream(index)

    def default_stream(self, device: Any = None) -> Stream:
        index = self.index(device)
        if index not in self._default:
            self._default[index] = Stream(index, number=0)
        return self._default[index]

    def set_stream(self, stream: Stream) -> None:
        """As torch's: the stream's device becomes the current one, too."""
        self.current = stream.device_index
        self._streams()[stream.device_index] = stream

    def _streams(self) -> dict[int, Stream]:
        if not hasattr(self._here, "streams"):
            self._here.streams = {}
        return self._here.streams

    def of_kind(self, *kinds: str) -> list[Event]:
        """The log's events of some kinds."""
        return [event for event in self.log if event.kind in kinds]

    def note(self, kind: str, name: str, device: int, stream: Stream, nbytes: int = 0, launches: int = 0,
             variant: tuple[Any, ...] = ()) -> Event:
        launches = launches or int(kind == "launch")
        where = "" if kind == "launch" else place()  # of hundreds a step; looking it up takes longer than they do
        event = Event(kind, name, device, stream.cuda_stream, where, nbytes, launches, stream.graph is not None,
                      variant)
        self.log.append(event)
        return event

    def forbidden(self, what: str) -> RuntimeError:
        """The error of something that spoils the captures of this thread."""
        for stream in self._streams().values():
            if stream.graph is not None:
                stream.graph.spoil()
        return CUDAError(f"{NOT_PERMITTED}: {what} at {place()}")

    def wait(self, device: int, name: str, stream: Stream | None = None, kind: str = "wait", nbytes: int = 0) -> None:
        """The host waits for a device, which a capture by this thread does not permit."""
        if any(each.graph is not None for each in self._streams().values()):
            raise self.forbidden(name)
        self.note(kind, name, device, stream or self.stream(device), nbytes)

    def launch(self, name: str, device: int, operation: Callable[[], None], nbytes: int = 0,
               stream: Stream | None = None, variant: tuple[Any, ...] = ()) -> None:
        """Run a kernel on a device's stream, or record it."""
        stream = stream or self.stream(device)
        event = self.note("launch", name, device, stream, nbytes, variant=variant)
        if stream.graph is None:
            operation()
        else:
            stream.graph.record(event, operation)

    def prepare(self, library: str, device: int) -> None:
        """A library is used on a stream; the first time it makes its workspace there."""
        stream = self.stream(device)
        if (library, id(stream)) not in self._prepared:
            self._prepared.add((library, id(stream)))
            self.note("prepare", library, device, stream)

    def allocate(self, tensor: torch.Tensor, device: int) -> None:
        """Count the storage of a tensor of the CPU as memory of a device until it is freed.

        Raises:
            torch.OutOfMemoryError: there is not as much.
        """
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        if self.allocated[device] + size > self.memory:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes on GPU {device}.")
        self._storages[key] = size
        self.allocated[device] += size
        self.peak[device] = max(self.peak[device], self.allocated[device])
        weakref.finalize(storage, self._free, key, device)

    def _free(self, key: int, device: int) -> None:
        self.allocated[device] -= self._storages.pop(key, 0)


_machines: list[Machine] = []


def machine() -> Machine:
    """The machine that is pretended."""
    return _machines[-1]
