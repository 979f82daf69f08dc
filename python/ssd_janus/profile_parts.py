"""What the units of work of a profile have measured: in memory, or one file each in a folder that processes share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ssd_kernels.reading import naming, read_bytes

from .evaluation.folder import keep_settings
from .files import write_atomically

ROOM = 1 << 16  # bytes of a file besides its tensors

Tensors = Mapping[str, torch.Tensor]


class Parts:
    """Tensors by the name of a unit."""

    def __init__(self, path: Path | None = None, settings: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            path: folder for ``NAME.safetensors``; None keeps everything in memory.
            settings: JSON values that the measurement depends on, kept in the folder.

        Raises:
            ValueError: the folder holds parts that were measured with other settings; the message names them.
        """
        self.path, self.kept = path, dict[str, Tensors]()
        if path is not None:
            path.mkdir(parents=True, exist_ok=True)
            keep_settings(path, settings or {})

    def file(self, name: str) -> Path:
        """Where a unit is, or would be."""
        return (self.path or Path()) / f"{name}.safetensors"

    def put(self, name: str, tensors: Tensors) -> None:
        """Keep what a unit has measured; its file appears whole or not at all."""
        if self.path is None:
            self.kept[name] = tensors
            return
        from safetensors.torch import save

        data = save({key: tensor.contiguous() for key, tensor in tensors.items()})
        write_atomically(self.file(name), lambda file: file.write(data))

    def get(self, name: str, like: Tensors) -> Tensors | None:
        """What a unit has measured; None where it has not, or its file is damaged, so that it has to be done again.

        Args:
            name: of the unit.
            like: tensors of the same names, shapes and dtypes.
        """
        if self.path is None:
            return self.kept.get(name)
        from safetensors import SafetensorError
        from safetensors.torch import load

        file = self.file(name)
        if not file.exists():
            return None
        most = ROOM + sum(tensor.numel() * tensor.element_size() for tensor in like.values())
        try:
            with naming(file):
                found = load(read_bytes(file, most))
        except (ValueError, SafetensorError):
            return None
        same = {key: (tensor.shape, tensor.dtype) for key, tensor in found.items()} == {
            key: (tensor.shape, tensor.dtype) for key, tensor in like.items()}
        return found if same and all(tensor.isfinite().all() for tensor in found.values()) else None
