"""Backend ``ptx``: the CUDA backend on tensors of the CPU, its kernels run from the PTX that nvcc makes of them."""

from __future__ import annotations

from types import ModuleType

import torch

from ssd_kernels.backends.cuda import CUDABackend

from . import build, schedules


class PTXBackend(CUDABackend):
    """`CUDABackend`, host side and all, but for where kernels run."""

    name = "ptx"
    device_type = "cpu"

    def __init__(self) -> None:
        self._module: ModuleType | None = None

    def extension(self) -> ModuleType:
        if self._module is None:
            self._module = build.module()
            schedules.use(schedules.usual())
            for name in build.CUDA_MODULES if build.nvcc() else ():
                self._module.load(name, build.cuda_ptx(name))
        return self._module

    def unavailable(self) -> str | None:
        return build.unsupported() or (None if build.nvcc() else "no nvcc, which makes the CUDA kernels' PTX")

    def _capability(self, device: torch.device) -> int:
        return 80

    def _place(self, device: torch.device) -> tuple[int, int]:
        return 0, 0
