"""The folder of one evaluation: its settings, and one file per finished batch, so that a killed run goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssd_kernels import CachePlan

from ..checkpoints import fingerprint
from ..files import write_text
from ..pipeline import Pipeline

SETTINGS = "settings.json"
SAMPLING = ("do_sample", "temperature", "top_k", "top_p")  # of the model's generation config


@dataclass(frozen=True)
class Batch:
    """Prompts ``first .. first + len(prompts)`` of the suite, drawn together from one seed."""

    seed: int
    first: int
    prompts: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"seed-{self.seed}-{self.first:05d}"


class RunFolder:
    """One plan's results on one suite.

    A batch counts as done when its file ``batches/seed-S-FIRST.SUFFIX`` exists, which is written last and atomically.
    What a picture looks like depends on the batch it is drawn in, so batches are the same in every run of a folder.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], prompts: Sequence[str], suffix: str) -> None:
        """Open a folder, or make it.

        Args:
            path: the folder.
            settings: JSON values that results depend on; must hold ``batch_size``.
            prompts: of the suite.
            suffix: of the batch files.

        Raises:
            ValueError: the folder holds results that were made with other settings; the message names them.
        """
        self.path, self.prompts, self.suffix = path, list(prompts), suffix
        self.settings = json.loads(json.dumps({**settings, "prompts": self.prompts}))
        (path / "batches").mkdir(parents=True, exist_ok=True)
        keep_settings(path, self.settings)

    def batches(self, seeds: int) -> list[Batch]:
        """All batches of seeds 0 .. seeds - 1."""
        size = self.settings["batch_size"]
        return [Batch(seed, first, tuple(self.prompts[first:first + size]))
                for seed in range(seeds) for first in range(0, len(self.prompts), size)]

    def file(self, batch: Batch) -> Path:
        return self.path / "batches" / f"{batch.name}{self.suffix}"

    def open_batches(self, seeds: int) -> list[Batch]:
        """The batches still to do."""
        return [batch for batch in self.batches(seeds) if not self.file(batch).exists()]

    def done_files(self, seeds: int) -> Iterator[Path]:
        """Files of the finished batches of these seeds, in order."""
        return (path for path in map(self.file, self.batches(seeds)) if path.exists())

    def sampling_seed(self, batch: Batch) -> int:
        """A different seed for every batch of every seed."""
        return batch.seed * len(self.prompts) + batch.first


def keep_settings(path: Path, wanted: Mapping[str, Any]) -> None:
    """Write ``settings.json`` into a folder of results, or check that the one there says the same.

    Args:
        path: the folder, which must exist.
        wanted: JSON values that results depend on.

    Raises:
        ValueError: the folder holds results that were made with other settings; the message names them.
    """
    file = path / SETTINGS
    if not file.exists():
        write_text(file, json.dumps(wanted, indent=1) + "\n")
        return
    found = json.loads(file.read_text())
    for name in sorted({*found, *wanted}):
        if (old := found.get(name)) != (new := wanted.get(name)):
            raise ValueError(f"{path} holds results made with another {name} ({_short(old)} there, {_short(new)} now); "
                             "choose another folder or remove it")


def settings(pipe: Pipeline, suite: str, plan: CachePlan, guidance_scale: float | None,
             batch_size: int) -> dict[str, Any]:
    """What the results of a suite depend on, besides its prompts."""
    config = pipe.model.generation_config
    return {"suite": suite, "weights": fingerprint(pipe.model), "plan": plan.to_dict(),
            "guidance_scale": pipe.guidance(guidance_scale),
            "sampling": {name: getattr(config, name) for name in SAMPLING}, "batch_size": batch_size,
            "dtype": str(pipe.dtype).removeprefix("torch."), "device": pipe.device.type,
            "backend": pipe.backend}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
