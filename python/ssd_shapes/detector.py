"""Finds the shapes in a picture of the shapes world and judges it against a prompt, as GenEval does.

No learned model: a picture is split into parts of one palette colour on one of the three backgrounds, and a part is
an object where a shape of the world, rendered at the part's own place and size, covers the same pixels. What fits
no shape, or no palette colour, is not reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from ssd_shapes import world

Picture = NDArray[np.uint8] | Image.Image
Wanted = world.Prompt | world.Scene | Mapping[str, Any]  # a mapping is GenEval's metadata
FloatArray = NDArray[Any]  # floating point
Mask = NDArray[np.bool_]

# Colour distances are Euclidean, in levels of 0..255. The closest two of palette and backgrounds are 76 apart.
MAX_COLOR_ERROR = 40.0  # a pixel farther than this from every palette colour has none
MIN_CONTRAST = 30.0  # foreground is at least this far from the background; pink and sand are 76 apart
MIN_BACKGROUND = 0.4  # share of the picture; the world's scenes leave 0.75 and more
MIN_PURITY = 0.6  # share of an interior that must have a palette colour
MIN_AREA = 40  # pixels; the world's smallest object covers 90
MIN_CORE = 10  # pixels left of an object by erosion
SHARPNESS = 2.0  # slope of coverage across an edge, per pixel; the world draws with 1
# Least intersection over union of a part and the rendered shape, by radius: a blur costs small objects more.
MIN_FIT = ((9.0, 15.0), (0.76, 0.80))
MIN_LEAD = 0.03  # by which the best shape must beat the second
MIN_RADIUS = 7.0  # pixels; the world's smallest is 9
MIN_VISIBLE = 0.9  # share of an object that must lie inside the picture; the world's lie inside whole
POSITION_MARGIN = 0.1  # GenEval's: this share of both objects' sizes does not count towards an offset
POSITION_SHARE = 0.5  # GenEval's: the least share of an offset along the relation's axis

_PALETTE = np.array(list(world.COLORS.values()), np.float32)
_BACKGROUNDS = np.array(list(world.BACKGROUNDS.values()), np.float32)
_FOUR, _EIGHT = ndimage.generate_binary_structure(2, 1), ndimage.generate_binary_structure(2, 2)


@dataclass(frozen=True)
class Found:
    """One object; all lengths in pixels."""

    shape: str
    color: str
    center: tuple[float, float]  # (x, y)
    size: tuple[float, float]  # width and height of the visible part
    radius: float  # nominal circumradius, as in ``world.Object``
    area: float  # visible, with half-covered pixels counted by half
    fit: float  # intersection over union with the rendered shape, 0..1


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows what a prompt asks, and if not, why."""

    correct: bool
    reason: str  # empty when correct


def detect(picture: Picture) -> list[Found]:
    """The objects of a picture (uint8 [96, 96, 3] or PIL), best fit first; none when there is no background."""
    pixels = _pixels(picture)
    distance = _distances(pixels, _BACKGROUNDS)  # [H, W, 3]
    shares = (distance < MIN_CONTRAST).mean((0, 1))
    chosen = int(shares.argmax())
    if shares[chosen] < MIN_BACKGROUND:
        return []
    background = _BACKGROUNDS[chosen]
    found = []
    for part, color in _parts(pixels, distance[..., chosen] >= MIN_CONTRAST):
        alpha = _alpha(pixels, part, background, color)
        whole = _recognise(alpha, color)
        if whole:
            found.append(whole)
            continue
        pieces = [_recognise(_alpha(pixels, piece, background, color), color) for piece in _split(part)]
        found += [piece for piece in pieces if piece]
    return sorted(found, key=lambda item: -item.fit)


def _pixels(picture: Picture) -> FloatArray:
    """A picture as float32 [H, W, 3] in 0..255."""
    if isinstance(picture, Image.Image):
        picture = np.asarray(picture.convert("RGB"))
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"expected a uint8 picture [H, W, 3], got {picture.dtype} {list(picture.shape)}")
    return picture.astype(np.float32)


def _distances(pixels: FloatArray, colors: FloatArray) -> FloatArray:
    """Distances of pixels [H, W, 3] from colours [N, 3]: [H, W, N]."""
    squares = (pixels**2).sum(-1, keepdims=True) + (colors**2).sum(-1) - 2 * pixels @ colors.T
    return np.asarray(np.sqrt(np.maximum(squares, 0.0)))


def _parts(pixels: FloatArray, foreground: Mask) -> Iterator[tuple[Mask, int]]:
    """Split a foreground [H, W] into parts of one colour: masks with their index into the palette.

    Pixels at an edge mix two colours, so colours come from the interior; the others join the nearest interior one.
    """
    error = _distances(pixels, _PALETTE)  # [H, W, 10]
    color = np.where(error.min(-1) <= MAX_COLOR_ERROR, error.argmin(-1), -1)
    interior = ndimage.binary_erosion(foreground, _FOUR, border_value=1)
    labels, _ = ndimage.label(foreground, _FOUR)
    for label, box in enumerate(ndimage.find_objects(labels), 1):
        mask = labels[box] == label
        if mask.sum() < MIN_AREA:
            continue
        core = mask & interior[box]
        counts = np.bincount(color[box][core] + 1, minlength=len(_PALETTE) + 1)[1:]
        if counts.sum() < MIN_PURITY * core.sum():
            continue
        kept = np.flatnonzero(counts >= max(MIN_CORE, 0.1 * counts.sum()))
        if not len(kept):
            continue
        seeds = core & np.isin(color[box], kept)
        owner = _spread(color[box], seeds)
        for index in kept:
            part = np.zeros_like(foreground)
            part[box] = mask & (owner == index)
            yield part, int(index)


def _spread(values: NDArray[Any], seeds: Mask) -> NDArray[Any]:
    """Give every pixel the value [H, W] of the nearest seed."""
    near: tuple[NDArray[Any], ...] = tuple(
        ndimage.distance_transform_edt(~seeds, return_distances=False, return_indices=True)
    )
    return np.asarray(values[near])


def _split(part: Mask) -> list[Mask]:
    """Cut a part at its narrowest place into the pieces that erosion leaves; none if it stays in one piece."""
    core = ndimage.binary_fill_holes(part)
    for _ in range(6):
        core = ndimage.binary_erosion(core, _FOUR, border_value=1)
        labels, count = ndimage.label(core, _FOUR)
        sizes = np.bincount(labels.ravel(), minlength=count + 1)
        large = [label for label in range(1, count + 1) if sizes[label] >= MIN_CORE]
        if len(large) > 1:
            owner = _spread(labels, np.isin(labels, large))
            return [part & (owner == label) for label in large]
    return []


def _alpha(pixels: FloatArray, part: Mask, background: FloatArray, color: int) -> FloatArray:
    """How much of each pixel a part covers, 0..1 [H, W], from where the pixel lies between the two colours.

    Edges are sharpened: otherwise a blur as of the VQ model costs small shapes much of their fit.
    """
    way = _PALETTE[color] - background
    share = (pixels - background) @ way / (way @ way)
    share = np.clip(0.5 + SHARPNESS * (share - 0.5), 0.0, 1.0)
    return np.where(ndimage.binary_dilation(part, _EIGHT), share, 0.0)


def _recognise(alpha: FloatArray, color: int) -> Found | None:
    """The object whose coverage is ``alpha`` [H, W], or nothing if no shape fits well and clearly best."""
    rows, columns = (np.flatnonzero((alpha > 0.5).any(axis)) for axis in (1, 0))
    if alpha.sum() < MIN_AREA or not len(rows):
        return None
    # The window is about square, so that no shape can hide its misfit of a long part outside.
    pad = 4 + abs(np.ptp(rows) - np.ptp(columns)) // 2
    top, left = max(rows[0] - pad, 0), max(columns[0] - pad, 0)
    window = alpha[top : rows[-1] + pad + 1, left : columns[-1] + pad + 1]
    starts = [_Match.start(window, shape) for shape in world.SHAPES]
    likely = max(start.fit for start in starts) - 0.2
    best, second = sorted((m.climb(window) if m.fit > likely else m for m in starts), key=lambda m: -m.fit)[:2]
    shown = _Match.at(alpha, best.shape, left + best.x, top + best.y, best.radius).drawn
    hidden = shown < MIN_VISIBLE * _moments(best.shape)[0] * best.radius**2
    vague = best.fit < np.interp(best.radius, *MIN_FIT) or best.fit - second.fit < MIN_LEAD
    if vague or hidden or best.radius < MIN_RADIUS:
        return None
    center, size = (float(left + best.x), float(top + best.y)), (len(columns), len(rows))
    return Found(best.shape, list(world.COLORS)[color], center, size, best.radius, float(window.sum()), best.fit)


@dataclass(frozen=True)
class _Match:
    """A shape at a place of a window [h, w], how well it fits there (intersection over union, 0..1) and how much of it
    is ``drawn`` inside, in pixels."""

    shape: str
    x: float
    y: float
    radius: float
    fit: float
    drawn: float

    @classmethod
    def at(cls, alpha: FloatArray, shape: str, x: float, y: float, radius: float) -> _Match:
        right, down = (np.arange(n, dtype=np.float32) for n in alpha.shape[::-1])
        drawn = np.clip(0.5 - SHARPNESS * world.SHAPES[shape](right - x, down[:, None] - y, radius), 0.0, 1.0)
        both = np.minimum(alpha, drawn).sum()
        union = alpha.sum() + drawn.sum() - both
        return cls(shape, x, y, radius, float(both / union), float(drawn.sum()))

    @classmethod
    def start(cls, alpha: FloatArray, shape: str) -> _Match:
        """The shape with the area and the centroid of ``alpha``."""
        area, below = _moments(shape)
        y, x = ndimage.center_of_mass(alpha)
        radius = float(np.sqrt(alpha.sum() / area))
        return cls.at(alpha, shape, x, y - below * radius, radius)

    def climb(self, alpha: FloatArray) -> _Match:
        """The best match within reach: what cuts and blots have moved is moved back."""
        best, step = self, 2.0
        while step >= 0.5:
            moves = [(step, 0, 0), (-step, 0, 0), (0, step, 0), (0, -step, 0), (0, 0, step), (0, 0, -step)]
            tries = [self.at(alpha, self.shape, best.x + x, best.y + y, best.radius + r) for x, y, r in moves]
            ahead = max(tries, key=lambda match: match.fit)
            if ahead.fit > best.fit:
                best = ahead
            else:
                step /= 2
        return best


@cache
def _moments(shape: str) -> tuple[float, float]:
    """Of a shape with radius 1: its area, and how far its centroid lies below its centre."""
    mask = world.coverage(shape, 100)[..., 0]
    return float(mask.sum()) / 1e4, float(ndimage.center_of_mass(mask)[0] - 101) / 100


def score(picture: Picture, prompt: Wanted) -> Verdict:
    """Judge a picture against a prompt, or against its GenEval metadata ("include", "exclude").

    As in GenEval, other objects do not matter, and of several of a class the best found ones are judged.
    """
    return judge(detect(picture), prompt)


def judge(found: list[Found], prompt: Wanted) -> Verdict:
    """``score`` for objects that are already found, best first."""
    reasons: list[str] = []
    groups: list[list[Found]] = []  # per wanted thing, for the positions that refer to it; empty where it failed
    for wanted in _get(prompt, "include"):
        count, color = wanted["count"], wanted.get("color")
        group = [item for item in found if item.shape == wanted["class"]][:count]
        colored = [item for item in group if color in (None, item.color)]
        misplaced: list[Found] = []
        if len(group) < count:
            reasons.append(f"expected {count} x {wanted['class']}, found {len(group)}")
        elif len(colored) < count:
            colors = ", ".join(item.color for item in group)
            reasons.append(f"expected {count} x {color} {wanted['class']}, found {colors}")
        elif "position" in wanted:
            relation, index = wanted["position"]
            anchors = groups[index]
            misplaced = [item for item in group if not all(related(relation, item, other) for other in anchors)]
            if misplaced or not anchors:
                anchor = _get(prompt, "include")[index]["class"]
                reasons.append(f"expected the {wanted['class']} {relation} the {anchor}")
        groups.append([] if len(colored) < count or misplaced else group)
    for unwanted in _get(prompt, "exclude"):
        color = unwanted.get("color")
        seen = [item for item in found if item.shape == unwanted["class"] and color in (None, item.color)]
        if len(seen) >= unwanted["count"]:
            reasons.append(f"expected fewer than {unwanted['count']} x {unwanted['class']}, found {len(seen)}")
    return Verdict(not reasons, "; ".join(reasons))


def related(relation: str, a: Found, b: Found) -> bool:
    """Whether ``a`` is ``relation`` ``b`` by their centres.

    GenEval's rule, and the relation's axis must be the longer one: on a diagonal GenEval accepts two relations.
    """
    offset = np.subtract(a.center, b.center)
    rest = np.maximum(np.abs(offset) - POSITION_MARGIN * np.add(a.size, b.size), 0.0) * np.sign(offset)
    axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[relation]
    along = sign * rest[axis]
    return bool(along > POSITION_SHARE * np.linalg.norm(offset) and abs(offset[axis]) > abs(offset[1 - axis]))


def rate(pictures: Iterable[Picture], prompts: Iterable[Wanted]) -> dict[str, tuple[int, int]]:
    """Per family, how many pictures show what their prompt asks, and of how many: {"colors": (12, 13), ...}."""
    tally: dict[str, tuple[int, int]] = {}
    for picture, prompt in zip(pictures, prompts, strict=True):
        family = prompt["tag"] if isinstance(prompt, Mapping) else prompt.family
        correct, total = tally.get(family, (0, 0))
        tally[family] = (correct + score(picture, prompt).correct, total + 1)
    return tally


def _get(prompt: Wanted, field: str) -> list[dict[str, Any]]:
    """What a prompt includes or excludes."""
    return list(prompt.get(field, ())) if isinstance(prompt, Mapping) else getattr(prompt, field)
