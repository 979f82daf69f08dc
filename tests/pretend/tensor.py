"""Tensors of a pretended device, and what their operations do and refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .machine import CUDAError, Machine, machine

# Operations whose result depends on values so that the host has to wait for them.
READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_unique2", "unique_dim", "unique_consecutive",
         "masked_select", "bincount", "unique"}
MASKS = {"index", "index_put_", "index_put", "_index_put_impl_"}
COPIES = {"copy_", "_to_copy", "copy", "set_", "lift", "lift_fresh", "lift_fresh_copy"}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "dot", "mv", "addmv"}
PICKS, PUTS = {"index_select", "embedding"}, {"copy_", "index_copy_"}
FUSED = {"_fused_rms_norm"}  # one kernel on CUDA, several operations elsewhere
HOST_ONLY = "can't convert cuda device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."


class Pretended(torch.Tensor):
    """A tensor that says it is on a device; ``held`` has the values, on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: int) -> Pretended:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=torch.device("cuda", device), requires_grad=False)
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})

    def __repr__(self, **others: Any) -> str:
        return f"Pretended({list(self.shape)}, {self.dtype}, {self.device})"

    # What Python asks a tensor about its memory is answered by the tensor that has it.
    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def storage_offset(self) -> int:
        return self.held.storage_offset()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, other: torch.Tensor) -> None:
        assert isinstance(other, Pretended) and other.shape == self.shape and other.stride() == self.stride()
        self.held = other.held

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **others: Any) -> Any:
        raise TypeError(HOST_ONLY)

    def __array__(self, *args: Any, **others: Any) -> Any:
        raise TypeError(HOST_ONLY)


class Mode(TorchDispatchMode):
    """Makes tensors on pretended devices where torch is asked for some. Below all modes that a program enters."""

    _mode_key = torch._C._TorchDispatchModeKey.FAKE  # with it, torch does not initialise CUDA

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and loading torch's compiler takes seconds

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "ssd_kernels":
            from ssd_kernels import ops

            with self:
                return getattr(ops, name_of(function))(*args, **kwargs)
        return run(function, args, kwargs)


def known_on_cuda() -> torch.library.Library:
    """Makes torch treat `FUSED` as operations of CUDA, until it is destroyed."""
    library = torch.library.Library("aten", "IMPL")
    for name in FUSED:
        library.impl(name, _unreachable, "CUDA")
    return library


def _unreachable(*args: Any, **others: Any) -> Any:
    raise AssertionError("an operation on a pretended device came past its tensors")


@dataclass(frozen=True)
class Operation:
    """What is known of an operation before it is called.

    Attributes:
        name: ``add`` for ``aten::add.Tensor``.
        written: arguments that it changes in place, by position and name.
        returns_written: its results are these.
        random: draws random numbers.
        composite: made of others, in which it is taken apart.
    """

    name: str
    written: tuple[tuple[int, str], ...]
    returns_written: bool
    random: bool
    composite: bool

    @classmethod
    @cache
    def of(cls, function: Any) -> Operation:
        schema, name = function._schema, name_of(function)
        writes = [argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments]
        first = schema.returns[0].alias_info if schema.returns else None
        return cls(name, tuple((number, argument.name) for number, argument in enumerate(schema.arguments)
                               if writes[number]), first is not None and first.is_write,
                   torch.Tag.nondeterministic_seeded in function.tags, name not in FUSED and function._can_decompose())


def name_of(function: Any) -> str:
    """``add`` for ``aten::add.Tensor``."""
    return str(function.name()).split("::")[-1].split(".")[0]


def is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def held(value: Any) -> Any:
    """The tensor of the CPU that a pretended one stands for."""
    return value.held if isinstance(value, Pretended) else value


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """A function of every part of an argument: it may be in lists, tuples and dictionaries."""
    if isinstance(value, (list, tuple)):
        return type(value)([mapped(function, part) for part in value])
    if isinstance(value, dict):
        return {name: mapped(function, part) for name, part in value.items()}
    return function(value)


def tensors_of(value: Any) -> list[torch.Tensor]:
    """All tensors in an argument."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for part in value for tensor in tensors_of(part)]


def run(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One operation of torch, on tensors of any device."""
    tensors = tensors_of((args, kwargs))
    given = [tensor for tensor in tensors if isinstance(tensor, Pretended)]
    asked = kwargs.get("device")
    if not given and not is_cuda(asked):
        return function(*args, **kwargs)
    here, known = machine(), Operation.of(function)
    name = known.name
    if known.composite:  # in inference mode these come whole
        with Mode():
            out = function.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
    device = here.index(asked) if is_cuda(asked) else given[0].device.index
    _check_devices(function, name, args, given, tensors)
    if known.random:
        _check_generator(here, kwargs.get("generator"), device)
    _notice_waits(here, name, args, kwargs, given, device)
    if name in PRODUCTS:
        here.prepare("cublas", device)
    on_device = is_cuda(asked) if asked is not None else True
    if name == "copy_" and not isinstance(args[0], Pretended):
        on_device = False
    plain_args, plain_kwargs = mapped(held, args), mapped(held, kwargs)
    if is_cuda(asked):
        plain_kwargs["device"] = torch.device("cpu")
    if plain_kwargs.get("pin_memory"):
        del plain_kwargs["pin_memory"]
    graph = here.stream(device).graph if on_device else None
    written = list(_written(known, args, kwargs))
    if graph is not None:
        for tensor in written:
            graph.keep(held(tensor))
    out = function(*plain_args, **plain_kwargs)
    if not on_device:
        return args[0] if name == "copy_" else out
    if graph is not None and name.startswith(("empty", "new_empty")):
        out.zero_()  # kernels do not run in a capture; what follows may look up what they would have left here
    _note(here, function, name, plain_args, plain_kwargs, out, device, bool(written))
    if known.returns_written:
        return written[0] if isinstance(out, torch.Tensor) else type(out)(written)
    return _wrapped(here, out, device)


def _check_devices(function: Any, name: str, args: tuple[Any, ...], given: list[Pretended],
                   tensors: list[torch.Tensor]) -> None:
    """Raise RuntimeError where tensors of different devices meet, as on CUDA."""
    if name in COPIES or not given:
        return
    hosts = [tensor for tensor in tensors if not isinstance(tensor, Pretended) and tensor.is_cpu and tensor.dim() > 0]
    others = [tensor for tensor in given if tensor.device != given[0].device]
    if hosts and name in MASKS and isinstance(args[0], Pretended):
        return  # indices are copied; `_notice_waits` says so
    if hosts or others:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, "
                           f"{given[0].device} and {(others or hosts)[0].device}! ({function})")


def _check_generator(here: Machine, generator: Any, device: int) -> None:
    """Raise RuntimeError unless random numbers come from a generator of the device, which a capture must know."""
    if generator is None:
        if device in here.stuck:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        return
    if here.generators.get(generator._cdata) != device:
        raise RuntimeError(f"Expected a generator on cuda:{device}, got one on another device")
    graph = here.stream(device).graph
    if graph is not None and generator._cdata not in graph.generators:
        graph.spoil()
        raise CUDAError("Attempt to increase offset for a CUDA generator not in capture mode.")


def _notice_waits(here: Machine, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Pretended],
                  device: int) -> None:
    """Log what makes the host wait, and refuse it in a capture."""
    asked = kwargs.get("device")
    if name == "_to_copy" and asked is not None and is_cuda(asked) != bool(given):
        kind = "to_host" if given else "to_device"
        here.wait(device, f"{name}{', non_blocking' if kwargs.get('non_blocking') else ''}", kind=kind,
                  nbytes=args[0].nbytes)
    elif name == "copy_" and isinstance(args[0], Pretended) != isinstance(args[1], Pretended):
        kind = "to_device" if isinstance(args[0], Pretended) else "to_host"
        blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        here.wait(device, name + ("" if blocking else ", non_blocking"), kind=kind, nbytes=args[1].nbytes)
    elif given and (name in READS or (name == "repeat_interleave" and isinstance(args[-1], Pretended))):
        here.wait(device, name, kind="to_host", nbytes=given[0].element_size())
    elif given and name in MASKS:
        for index in args[1]:
            if isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8):
                here.wait(device, f"{name} with a mask", kind="to_host", nbytes=index.nbytes)
            elif isinstance(index, torch.Tensor) and not isinstance(index, Pretended):
                here.wait(device, f"{name} with indices of the host", kind="to_device", nbytes=index.nbytes)


def _written(known: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """Arguments that an operation changes in place."""
    for number, name in known.written:
        yield from tensors_of(args[number] if number < len(args) else kwargs.get(name))


def _note(here: Machine, function: Any, name: str, args: Any, kwargs: Any, out: Any, device: int,
          writes: bool) -> None:
    """Log the launch of an operation that has been computed, and record it in a capture."""
    inputs, outputs = tensors_of((args, kwargs)), tensors_of(out)
    storages = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    fresh = [tensor for tensor in outputs if tensor.untyped_storage().data_ptr() not in storages]
    if name in ALLOCATIONS or not (writes or fresh):  # the rest are views
        return
    stream = here.stream(device)
    event = here.note("launch", name, device, stream, _moved(name, inputs, outputs))
    if stream.graph is not None:
        stream.graph.record(event, _again(function, args, kwargs, out))


def _moved(name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> int:
    """Bytes that an operation reads and writes: of a table what it picks, of a target what it puts there."""
    if name in PICKS:
        return sum(map(touched, (*inputs[1:], outputs[0], outputs[0])))
    if name in PUTS:
        written = inputs[0] if name == "copy_" else inputs[-1]
        return sum(map(touched, (*inputs[1:], written)))
    return sum(map(touched, (*inputs, *outputs)))


def touched(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's different elements."""
    numbers = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return int(torch.Size(numbers).numel()) * tensor.element_size() if tensor.numel() else 0


def _again(function: Any, args: Any, kwargs: Any, out: Any) -> Callable[[], None]:
    """The operation once more, with its results where they were."""

    def operation() -> None:
        for old, new in zip(tensors_of(out), tensors_of(function(*args, **kwargs)), strict=True):
            if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                old.copy_(new)

    return operation


def _wrapped(here: Machine, out: Any, device: int) -> Any:
    """An operation's results, on the device."""
    graph = here.stream(device).graph
    for tensor in tensors_of(out):
        here.allocate(tensor, device)
        if graph is not None:
            graph.own(tensor)
    return mapped(lambda value: Pretended(value, device) if isinstance(value, torch.Tensor) else value, out)
