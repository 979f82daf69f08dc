"""Pictures as PIL images: from the model's pixels, into files, onto a contact sheet."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ssd_kernels.reading import parse_json, read_bytes

from .files import write_atomically

FACTS = "ssd_janus"  # keyword of a PNG's text
MAX_BYTES = 256 << 20  # of a PNG file
END = b"IEND\xaeB`\x82"  # the last chunk of every PNG


def to_pictures(pixels: torch.Tensor) -> list[Image.Image]:
    """RGB images of ``pixels`` [N, H, W, 3], floats in about [-1, 1]."""
    scaled = ((pixels.float().clamp(-1, 1) + 1) * 127.5).to(torch.uint8)
    return [Image.fromarray(picture.numpy(), "RGB") for picture in scaled.cpu()]


def save_picture(picture: Image.Image, path: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Write a PNG. The file appears whole or not at all.

    Args:
        picture: to write.
        path: of the file.
        facts: as of `png`.
    """
    data = png(picture, facts)
    write_atomically(path, lambda file: file.write(data))


def png(picture: Image.Image, facts: Mapping[str, Any] | None = None) -> bytes:
    """A picture as the contents of a PNG file.

    Args:
        picture: to encode.
        facts: JSON values that `read_picture` returns: what the picture was drawn with. They are a text in the file, so
            that they go where it goes.
    """
    text = PngInfo()
    if facts is not None:
        text.add_text(FACTS, json.dumps(facts))
    file = io.BytesIO()
    picture.save(file, "PNG", pnginfo=text)
    return file.getvalue()


def read_picture(path: Path) -> tuple[Image.Image, dict[str, Any] | None]:
    """A PNG with all its pixels, and the ``facts`` that `save_picture` has put into it; None if there are none.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is damaged, or no PNG; the message names it.
    """
    data = read_bytes(path, MAX_BYTES)
    try:
        Image.open(io.BytesIO(data), formats=["PNG"]).verify()  # checksums, but not the last one
        if not data.endswith(END):
            raise ValueError("it has no end")
        picture = Image.open(io.BytesIO(data), formats=["PNG"])
        picture.load()
        facts = picture.info.get(FACTS)
        found = parse_json(facts) if isinstance(facts, str) else None
    except Exception as error:  # a damaged file makes Pillow raise many kinds
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())[:100]}") from None
    return picture, found if isinstance(found, dict) else None


def read_facts(path: Path) -> dict[str, Any] | None:
    """The ``facts`` of a PNG alone, without a look at its pixels; None if there are none.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is no PNG, or damaged before its pixels; the message names it.
    """
    try:
        with path.open("rb") as file, Image.open(file, formats=["PNG"]) as picture:
            facts = picture.info.get(FACTS)
        found = parse_json(facts) if isinstance(facts, str) else None
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(f"{path} is no PNG") from None
    except Exception as error:  # a damaged file makes Pillow raise many kinds
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())[:100]}") from None
    return found if isinstance(found, dict) else None


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
