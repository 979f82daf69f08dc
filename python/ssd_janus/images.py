"""Pictures as PIL images: from the model's pixels, into files, onto a contact sheet."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from .files import write_atomically


def to_pictures(pixels: torch.Tensor) -> list[Image.Image]:
    """RGB images of ``pixels`` [N, H, W, 3], floats in about [-1, 1]."""
    scaled = ((pixels.float().clamp(-1, 1) + 1) * 127.5).to(torch.uint8)
    return [Image.fromarray(picture.numpy(), "RGB") for picture in scaled.cpu()]


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG. The file appears whole or not at all."""
    write_atomically(path, lambda file: picture.save(file, "PNG"))


def file_names(prompts: Sequence[str], num_images_per_prompt: int) -> list[str]:
    """Readable PNG names in prompt-major order: ``01-a-red-circle.png``, or ``01-a-red-circle-2.png`` and so on."""
    digits = max(2, len(str(len(prompts))))
    names = []
    for number, prompt in enumerate(prompts, 1):
        words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].strip("-") or "prompt"
        for copy in range(1, num_images_per_prompt + 1):
            names.append(f"{number:0{digits}d}-{words}" + (f"-{copy}" if num_images_per_prompt > 1 else "") + ".png")
    return names


def contact_sheet(columns: Mapping[str, Sequence[Image.Image]], captions: Sequence[str], zoom: int = 2) -> Image.Image:
    """Pictures in captioned rows, one named column per set, so that a row shows the same prompt side by side.

    Args:
        columns: heading -> pictures; all of one size and number.
        captions: one per row.
        zoom: integer factor of enlargement, without smoothing.

    Raises:
        ValueError: a column has not one picture per caption.
    """
    for heading, pictures in columns.items():
        if len(pictures) != len(captions):
            raise ValueError(f"column {heading!r} must have {len(captions)} pictures, got {len(pictures)}")
    sets = list(columns.values())
    width, height = (side * zoom for side in sets[0][0].size)
    font, gap, line = ImageFont.load_default(14), 12, 20
    sheet = Image.new("RGB", (gap + len(sets) * (width + gap), 2 * gap + line + len(captions) * (height + line + gap)),
                      "white")
    draw = ImageDraw.Draw(sheet)
    for column, heading in enumerate(columns):
        draw.text((gap + column * (width + gap), gap), heading, "black", font)
    for row, caption in enumerate(captions):
        top = 2 * gap + line + row * (height + line + gap)
        draw.text((gap, top), caption, "black", font)
        for column, pictures in enumerate(sets):
            sheet.paste(pictures[row].resize((width, height), Image.Resampling.NEAREST),
                        (gap + column * (width + gap), top + line))
    return sheet
