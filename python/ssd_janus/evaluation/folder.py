"""The folder of one evaluation: its settings, and one file per finished batch, so that a killed run goes on."""

from __future__ import annotations

import errno
import io
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from PIL import Image

import ssd_kernels
from ssd_kernels import CachePlan, backends
from ssd_kernels.reading import Field, naming, read_bytes, read_json, shown

from ..checkpoints import fingerprint
from ..engine import sampling_settings
from ..files import write_text
from ..pipeline import Pipeline

SETTINGS = "settings.json"
LARGEST = 2**26  # bytes of a file of settings, results or one picture
ABSENT = "nothing"  # what is said for a field that is not there

Content = TypeVar("Content")


@dataclass(frozen=True)
class Batch:
    """Prompts ``first .. first + len(prompts)`` of the suite, drawn together from one seed."""

    seed: int
    first: int
    prompts: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"seed-{self.seed}-{self.first:05d}"


class RunFolder(Generic[Content]):
    """One plan's results on one suite.

    A batch counts as done when its file ``batches/seed-S-FIRST.SUFFIX`` exists and can be read; it is written last and
    atomically. What a picture looks like depends on the batch it is drawn in, so batches are the same in every run of
    a folder.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], prompts: Sequence[str], suffix: str,
                 read: Callable[[Path, Batch], Content]) -> None:
        """Open a folder, or make it.

        Args:
            path: the folder.
            settings: JSON values that results depend on; must hold ``batch_size``.
            prompts: of the suite.
            suffix: of the batch files.
            read: the content of a batch's file; it raises a ValueError that names the file if that, or a picture that
                belongs to it, is damaged or missing.

        Raises:
            ValueError: the folder holds results that were made with other settings; the message names them.
        """
        self.path, self.prompts, self.suffix, self.read = path, list(prompts), suffix, read
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

    def to_do(self, batches: Iterable[Batch]) -> list[Batch]:
        """Those of the batches that are not done; a warning names what is damaged and so has to be done again."""

        def say(problem: str, batch: Batch) -> None:
            warnings.warn(f"ssd_kernels: {problem}; drawing batch {batch.name} again", stacklevel=4)

        return [batch for batch in batches if not self._done(batch, say)]

    def missing(self, seeds: int) -> list[Path]:
        """The files of the batches of these seeds that are not done, or damaged."""
        return [self.file(batch) for batch in self.batches(seeds) if not self._done(batch)]

    def contents(self, seeds: int) -> Iterator[Content]:
        """What the files of all batches of these seeds hold, in order; all must be done."""
        return (self.read(self.file(batch), batch) for batch in self.batches(seeds))

    def sampling_seed(self, batch: Batch) -> int:
        """A different seed for every batch of every seed."""
        return batch.seed * len(self.prompts) + batch.first

    def _done(self, batch: Batch, say: Callable[[str, Batch], Any] = lambda problem, batch: None) -> bool:
        file = self.file(batch)
        if not _is_there(file):
            return False
        try:
            self.read(file, batch)
        except ValueError as error:
            say(str(error), batch)
            return False
        return True


def keep_settings(path: Path, wanted: Mapping[str, Any]) -> None:
    """Write ``settings.json`` into a folder of results, or check that the one there says the same.

    Args:
        path: the folder, which must exist.
        wanted: JSON values that results depend on.

    Raises:
        ValueError: the folder holds results that were made with other settings, or its settings cannot be read; the
            message names them.
    """
    file = path / SETTINGS
    if not file.exists():
        write_text(file, json.dumps(wanted, indent=1) + "\n")
    found = read_json(file, LARGEST)  # another process may have written it, too
    with naming(file):
        Field(found).members(optional=None)
    for name in sorted({*found, *wanted}):
        old, new = (values.get(name, ABSENT) for values in (found, wanted))
        if old != new:
            raise ValueError(f"{path} holds results made with another {name} ({difference(old, new)}); choose another "
                             "folder or remove it")


def difference(old: Any, new: Any, name: str = "") -> str:
    """The first place where two JSON values differ, and what is there in each, for a message."""
    inside: dict[str, tuple[Any, Any]] = {}
    if isinstance(old, dict) and isinstance(new, dict):
        inside = {f"{name}.{key}".lstrip("."): (old.get(key, ABSENT), new.get(key, ABSENT)) for key in {**old, **new}}
    elif isinstance(old, list) and isinstance(new, list):
        inside = ({f"{name}[{index}]": pair for index, pair in enumerate(zip(old, new, strict=True))}
                  if len(old) == len(new) else {f"{name} length".lstrip(): (len(old), len(new))})
    for place, (was, now) in inside.items():
        if was != now:
            return difference(was, now, place)
    return f"{name}: {shown(old)} there, {shown(new)} now".removeprefix(": ")


def check_pictures(files: Iterable[Path]) -> None:
    """Check that pictures are all there and whole.

    Raises:
        OSError: something that is no regular file has the name of one.
        ValueError: one is missing or damaged; the message names it.
    """
    for file in files:
        if not _is_there(file):
            raise ValueError(f"{file} is missing")
        try:
            with Image.open(io.BytesIO(read_bytes(file, LARGEST)), formats=["PNG"]) as picture:
                picture.verify()
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{file} is damaged ({error})") from None


def _is_there(file: Path) -> bool:
    """Whether there is such a file; an OSError where it is something that could never be replaced by one."""
    if file.exists() and not file.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(file))
    return file.exists()


def settings(pipe: Pipeline, suite: str, plan: CachePlan, guidance_scale: float | None,
             batch_size: int) -> dict[str, Any]:
    """What the results of a suite depend on, besides its prompts.

    Raises:
        ValueError: the pipeline's backend cannot serve the model.
    """
    config, dtype, device = pipe.model.generation_config, pipe.dtype, pipe.device
    return {"version": ssd_kernels.__version__, "suite": suite, "weights": fingerprint(pipe.model),
            "plan": plan.to_dict(), "guidance_scale": pipe.guidance(guidance_scale),
            "sampling": {"do_sample": config.do_sample, **sampling_settings(pipe.model)}, "batch_size": batch_size,
            "dtype": str(dtype).removeprefix("torch."), "device": device.type,
            "backend": backends.resolve(pipe.backend, device, dtype, pipe.shape.head_dim, plan.kv_format).name}
