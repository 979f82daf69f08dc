"""Where checkpoints are found; light enough for commands that load none."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def included_model() -> str:
    """Folder of the small model that ships with the package.

    Raises:
        FileNotFoundError: this installation came without it.
    """
    try:
        folder = Path(str(resources.files("ssd_shapes") / "model"))
    except ModuleNotFoundError:
        folder = Path("ssd_shapes/model")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"the included model is not installed (no {folder}/config.json); pass a folder or a "
                                "hub id instead")
    return str(folder)


def included_profile() -> Path:
    """The head profile of the included model.

    Raises:
        FileNotFoundError: this installation came without it.
    """
    file = Path(included_model()) / "profile.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"no profile of the included model ({file}); make one with `ssd-janus profile`")
    return file
