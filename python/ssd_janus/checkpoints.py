"""Where checkpoints are found, and what tells them apart; light enough for commands that load none."""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

SAMPLED = 4096  # values of every weight that tell checkpoints apart
UNUSED = ("model.vision_model.", "model.aligner.", "lm_head.")  # weights of a Janus that drawing does without


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


def fingerprint(model: nn.Module) -> str:
    """Tells checkpoints apart by values from all over every weight that drawing uses, 16 hexadecimal digits.

    It is the same whether the others were loaded or not. Values count as float32, so that weights that were loaded
    without loss have one fingerprint in every dtype.
    """
    from .quantization import dense

    digest = hashlib.blake2b(digest_size=8)
    for name, value in model.named_parameters():
        if name.startswith(UNUSED):
            continue
        values = dense(value.detach()).flatten()[::max(1, value.numel() // SAMPLED)]
        digest.update(name.encode() + values.float().cpu().numpy().tobytes())
    return digest.hexdigest()
