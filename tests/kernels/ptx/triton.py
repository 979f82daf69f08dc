"""Backend ``ptx_triton``: the Triton backend on tensors of the CPU, its kernels compiled ahead of time to PTX and run.

Triton brings the compiler, so that neither nvcc nor a driver is needed.
"""

from __future__ import annotations

import importlib.util
import os
import struct
from collections.abc import Sequence
from functools import cache, partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from ssd_kernels.backends.triton import TritonBackend

from . import build, schedules

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32",
         torch.int64: "i64", torch.int8: "i8"}
UNDEFINED = {"out", "logits", "lists", "slot_list", "tokens"}  # until the kernel writes them
WRITTEN = UNDEFINED | {"keys", "values", "scores", "positions", "cursors", "key_scales", "value_scales"}
ALIGNMENT = 16  # bytes: Triton compiles anew for pointers that have it


@cache
def executor() -> ModuleType:
    """The executor, with its usual schedule."""
    module = build.module()
    schedules.use(schedules.usual())
    return module


@cache
def compiled(function: Any, architecture: int, signature: tuple[tuple[str, str], ...], constants: tuple[Any, ...],
             aligned: tuple[int, ...], options: tuple[Any, ...]) -> SimpleNamespace:
    """A kernel as Triton compiles it for such arguments.

    Returns:
        ``module``, the executor's name for it; ``warps``; and bytes of ``shared`` memory.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    source = ASTSource(fn=function, signature=dict(signature), constexprs=dict(constants),
                       attrs={(index,): [["tt.divisibility", ALIGNMENT]] for index in aligned})
    kernel = compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(options))
    name = f"{function.__name__} {kernel.hash}"
    executor().load(name, kernel.asm["ptx"])
    return SimpleNamespace(module=name, warps=kernel.metadata.num_warps, shared=kernel.metadata.shared)


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from the first element to behind the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size() if tensor.numel() else 0


def _bits(value: float) -> int:
    if isinstance(value, float):
        return int(struct.unpack("I", struct.pack("f", value))[0])
    return value & 0xFFFFFFFF


class Launcher:
    """Stands for a `triton.JITFunction`: ``launcher[grid](*arguments)`` runs it on the executor."""

    def __init__(self, function: Any, architecture: int) -> None:
        self.function, self.architecture = function, architecture

    def __getitem__(self, grid: Sequence[int]) -> Any:
        return partial(self._launch, grid)

    def _launch(self, grid: Sequence[int], *arguments: Any, **named: Any) -> None:
        names = self.function.arg_names
        given = dict(zip(names, arguments, strict=False))
        given.update((name, value) for name, value in named.items() if name in names)
        kernel = self.compile(given, {name: value for name, value in named.items() if name not in names})
        tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
        values = [given[name].data_ptr() if name in tensors else _bits(given[name]) for name in names
                  if name not in self._constants(given)]
        buffers = [(tensor.data_ptr(), _extent(tensor), name, name not in UNDEFINED, name in WRITTEN)
                   for name, tensor in tensors.items()]
        executor().launch(kernel.module, self.function.__name__, [*grid, 1, 1][:3], [32 * kernel.warps, 1, 1],
                          kernel.shared, values, buffers, True)

    def compile(self, given: dict[str, Any], options: dict[str, Any]) -> SimpleNamespace:
        """What these arguments, by name, compile to with such options of Triton."""
        names, constants = self.function.arg_names, self._constants(given)
        signature = tuple((name, "constexpr" if name in constants else self._type(given[name])) for name in names)
        aligned = tuple(index for index, name in enumerate(names) if isinstance(given[name], torch.Tensor)
                        and given[name].data_ptr() % ALIGNMENT == 0)
        return compiled(self.function, self.architecture, signature, tuple(constants.items()), aligned,
                        tuple(options.items()))

    def _constants(self, given: dict[str, Any]) -> dict[str, Any]:
        return {param.name: given[param.name] for param in self.function.params if param.is_constexpr}

    @staticmethod
    def _type(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return "*" + TYPES[value.dtype]
        return "fp32" if isinstance(value, float) else "i32"


class PTXTritonBackend(TritonBackend):
    """`TritonBackend`, host side and all, but for where kernels run. SSD_PTX_ARCHITECTURE: 80 (the default) or 90."""

    name = "ptx_triton"
    planted: SimpleNamespace | None = None  # kernels that tests run in the place of the package's

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        return build.unsupported()

    def unsupported(self, device: torch.device, dtype: torch.dtype, head_dim: int,
                    kv_format: str = "auto") -> str | None:
        if device.type != "cpu":
            return f"it needs device cpu, got {device}"
        return self.unsupported_by_kernels(dtype, head_dim, kv_format)

    def kernels(self) -> SimpleNamespace:
        kernels = self.planted or super().kernels()
        return SimpleNamespace(**{name: Launcher(function, self.capability(torch.device("cpu")))
                                  for name, function in vars(kernels).items()})

    def capability(self, device: torch.device) -> int:
        return int(os.environ.get("SSD_PTX_ARCHITECTURE", "80"))
