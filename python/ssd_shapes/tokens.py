"""Pictures to tokens and back by 4 x 4 patches and a fixed code book; training needs no VQ model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssd_kernels.files import write_atomically
from ssd_shapes import world

PATCH = world.PATCH  # pixels
GRID = world.SIZE // PATCH  # patches per row and per column
TOKENS = GRID * GRID
CODES = 1024
FLAT = range(len(world.COLORS), len(world.COLORS) + len(world.BACKGROUNDS))  # codes of the empty backgrounds
# Codes of the same empty backgrounds in the left column. Like the borders of convolutions they can tell where a row
# begins: nothing else does, and a model that cannot tell lets objects run over the right edge into the next row.
MARGINS = range(FLAT.stop, FLAT.stop + len(FLAT))
ASSET = Path(__file__).parent / "assets" / "codes.npy"


def patches(pictures: Tensor) -> Tensor:
    """Cut pictures [B, 96, 96, 3] into patches [B, 576, 48], row by row."""
    cut = pictures.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)  # [B, 24, 24, 3, 4, 4]
    return cut.permute(0, 1, 2, 4, 5, 3).reshape(len(pictures), TOKENS, -1)


def unpatch(cut: Tensor) -> Tensor:
    """Put patches [B, 576, 48] together again: [B, 96, 96, 3]."""
    grid = cut.reshape(len(cut), GRID, GRID, PATCH, PATCH, 3)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(len(cut), world.SIZE, world.SIZE, 3)


def nearest(points: Tensor, codes: Tensor) -> Tensor:
    """Index of the nearest code for every point: [..., D] and [K, D] give int64 [...]."""
    return (points @ codes.T - 0.5 * codes.square().sum(-1)).argmax(-1)


def mark_margin(codes: Tensor) -> Tensor:
    """Codes [B, 576] with those of empty background in the left column replaced by `MARGINS`: the same picture."""
    marked = codes.clone().view(-1, GRID, GRID)
    for flat, margin in zip(FLAT, MARGINS, strict=True):
        left = marked[:, :, 0]
        left[left == flat] = margin
    return marked.view_as(codes)


class CodeBook:
    """1024 patches of 4 x 4 RGB pixels: ``codes`` is float32 [1024, 48] in 0..255."""

    def __init__(self, codes: Tensor):
        self.codes = codes.float()
        self._sought = self.codes.clone()
        self._sought[MARGINS] = 1e4  # out of reach, or ties with `FLAT` could go either way

    @classmethod
    def load(cls, path: Path = ASSET) -> CodeBook:
        return cls(torch.from_numpy(np.load(path, allow_pickle=False)))

    def save(self, path: Path = ASSET) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        codes = self.codes.round().to(torch.uint8).numpy()
        write_atomically(path, lambda file: np.save(file, codes, allow_pickle=False))

    def encode(self, pictures: Tensor) -> Tensor:
        """uint8 pictures [B, 96, 96, 3] to codes, int64 [B, 576], none of them of `MARGINS`."""
        return nearest(patches(pictures).float(), self._sought)

    def decode(self, tokens: Tensor) -> Tensor:
        """Codes [B, 576] to the pictures of their patches, float32 [B, 96, 96, 3] in 0..255."""
        return unpatch(self.codes[tokens])


def fit(
    seed: int = 0, pictures: int = 12_000, rounds: int = 40, log: Callable[[str], None] = print
) -> CodeBook:
    """K-means over the patches of random scenes; the flat patch of every colour and background is a code (of every
    background two: see `MARGINS`).

    Flat patches take no part in the clustering, and distinct others count as often as they occur.
    """
    rng = np.random.default_rng(seed)
    scenes = [world.draw_scene(rng, world.draw_prompt(rng), open_colors=False) for _ in range(pictures)]
    drawn = np.stack([world.render(scene) for scene in scenes])
    cut = patches(torch.from_numpy(drawn)).reshape(-1, PATCH * PATCH * 3).numpy()
    backgrounds = list(world.BACKGROUNDS.values())
    flat = np.array([*world.COLORS.values(), *backgrounds, *backgrounds], np.uint8).repeat(PATCH * PATCH, 0)
    flat = flat.reshape(-1, PATCH * PATCH * 3)
    cut = cut[(cut.reshape(len(cut), -1, 3) != cut[:, None, :3]).any((1, 2))]
    distinct, counts = np.unique(cut, axis=0, return_counts=True)
    points, weight = torch.from_numpy(distinct).float(), torch.from_numpy(counts).float()
    fixed = torch.from_numpy(flat).float()
    generator = torch.Generator().manual_seed(seed)
    start = torch.multinomial(weight.sqrt(), CODES - len(fixed), generator=generator)
    codes = torch.cat([fixed, points[start]])
    for step in range(rounds):
        index = torch.cat([nearest(part, codes) for part in torch.split(points, 65_536)])
        error = (points - codes[index]).square().sum(-1) * weight
        total = torch.zeros(CODES).index_add_(0, index, weight)
        mean = torch.zeros_like(codes).index_add_(0, index, points * weight[:, None])
        mean /= total[:, None].clamp(min=1)
        load = torch.zeros(CODES).index_add_(0, index, error)
        codes[len(fixed) :] = mean[len(fixed) :]
        # Idle codes move to badly served points, so that no code is wasted.
        idle = (load < 0.05 * load.mean()).nonzero().squeeze(1)
        idle = idle[idle >= len(fixed)]
        if len(idle) and step < rounds - 5:
            codes[idle] = points[torch.multinomial(error + 1e-6, len(idle), generator=generator)]
        if step % 5 == 4:
            log(f"round {step + 1}: mean squared error {error.sum() / (drawn.size / 48) / 48:.1f} of 255^2")
    return CodeBook(codes.round())
