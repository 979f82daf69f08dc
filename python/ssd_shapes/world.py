"""The shapes world: prompts in GenEval's wording, scenes that satisfy them, and their pictures.

Every draw comes from a ``numpy.random.Generator``, so a scene is a function of its seed. Combinations (a
colour and a shape, a count and a shape, two shapes, ...) are split by a stable hash: no training prompt, of whatever
family, names one held out, and no training picture shows one, be it by chance, but for colours that prompts leave open.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from itertools import combinations
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "test"]
FloatArray = NDArray[Any]  # floating point

SIZE = 96  # picture height and width, pixels
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 30, 36),
    "orange": (246, 138, 18),
    "yellow": (252, 224, 40),
    "green": (28, 150, 52),
    "blue": (28, 70, 222),
    "purple": (134, 40, 172),
    "pink": (252, 146, 196),
    "brown": (116, 68, 26),
    "black": (14, 14, 14),
    "white": (252, 252, 252),
}
# Unsaturated and of middle lightness, so that no background can be taken for one of the ten colours.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "grey": (152, 152, 152),
    "slate": (112, 120, 128),
    "sand": (198, 186, 160),
}
COUNTS = ("one", "two", "three", "four")
RELATIONS = ("left of", "right of", "above", "below")
# Nominal circumradii, pixels, by the number of objects in the picture.
RADII: dict[int, tuple[int, ...]] = {1: (10, 13, 16), 2: (10, 13, 16), 3: (10, 13), 4: (10, 13)}
# Families beyond GenEval's six join a colour with a count or a position. Shares favour what is hard to learn.
FAMILIES: dict[str, float] = {
    "single_object": 0.08,
    "two_object": 0.13,
    "counting": 0.15,
    "colors": 0.12,
    "position": 0.13,
    "color_attr": 0.17,
    "color_count": 0.10,
    "color_position": 0.12,
}
# Shares late in training, when single objects are known.
LATE_FAMILIES: dict[str, float] = {
    "single_object": 0.03,
    "two_object": 0.13,
    "counting": 0.20,
    "colors": 0.04,
    "position": 0.22,
    "color_attr": 0.21,
    "color_count": 0.05,
    "color_position": 0.12,
}
PATCH = 4  # side, in pixels, of the patches that become tokens
CLEAR_SLOPE = 2.0  # how much further along an asked relation than across it two objects lie
SHOWN = 0.08  # share of a patch that an object must cover to count as shown there
# One combination in about this many is held out; more of those of which there are few.
TEST_SHARE = {"single_object": 10, "two_object": 5, "counting": 6, "colors": 10, "position": 8, "color_attr": 10}
# How a prompt may begin, bare and GenEval's own first; single objects are held out by opening and shape.
OPENINGS = (
    "", "a photo of", "a picture of", "an image of", "a drawing of", "a photograph of", "an illustration of",
    "a painting of", "a rendering of", "a sketch of", "a graphic of", "a poster of", "a print of", "an icon of",
    "a view of", "a snapshot of",
)  # fmt: skip
COMMON_OPENINGS = 0.7  # share of prompts with one of the first two
JOINTS = ("and", "and", "and", "with", "next to")  # between two objects without a relation


@dataclass(frozen=True)
class Object:
    """One drawn shape; ``center`` is (x, y) and ``radius`` the nominal circumradius, both in pixels."""

    shape: str
    color: str
    center: tuple[int, int]
    radius: int


@dataclass(frozen=True)
class Prompt:
    """A prompt and its GenEval metadata: what a picture must ``include`` and must not (``exclude``)."""

    text: str
    family: str
    include: list[dict[str, Any]]
    exclude: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Scene:
    """A prompt with one arrangement of objects that satisfies it."""

    prompt: str
    family: str
    include: list[dict[str, Any]]
    exclude: list[dict[str, Any]]
    objects: list[Object]
    background: str


# Signed distances in pixels, negative inside; x grows to the right, y downwards, the centre is the origin.


def _circle(x: FloatArray, y: FloatArray, r: float) -> FloatArray:
    return np.hypot(x, y) - 0.95 * r


def _square(x: FloatArray, y: FloatArray, r: float) -> FloatArray:
    return np.asarray(np.maximum(np.abs(x), np.abs(y)) - 0.82 * r)


def _triangle(x: FloatArray, y: FloatArray, r: float) -> FloatArray:
    y = y - 0.2 * r  # the bounding box, not the centroid, is what should be centred
    return np.maximum(y - 0.6 * r, 0.866 * np.abs(x) - 0.5 * (y + 1.2 * r))


def _diamond(x: FloatArray, y: FloatArray, r: float) -> FloatArray:
    return np.asarray((np.abs(x) + 0.66 * np.abs(y) - 0.66 * r) / np.float32(np.hypot(1.0, 0.66)))


def _cross(x: FloatArray, y: FloatArray, r: float) -> FloatArray:
    across = np.maximum(np.abs(x) - 0.95 * r, np.abs(y) - 0.3 * r)
    return np.asarray(np.minimum(across, np.maximum(np.abs(x) - 0.3 * r, np.abs(y) - 0.95 * r)))


def _ring(x: FloatArray, y: FloatArray, r: float) -> FloatArray:
    return np.abs(np.hypot(x, y) - 0.7 * r) - 0.25 * r


def _star(x: FloatArray, y: FloatArray, r: float) -> FloatArray:
    c, s = np.cos(np.pi / 5), np.sin(np.pi / 5)
    px, py = np.abs(x), -y
    for sign in (1.0, -1.0):  # fold the plane onto one of the ten congruent half points
        fold = 2 * np.maximum(sign * c * px - s * py, 0.0)
        px, py = px - sign * fold * c, py + fold * s
    px, py = np.abs(px), py - r
    bx, by = 0.45 * s, 0.45 * c - 1.0
    h = np.clip((px * bx + py * by) / (bx * bx + by * by), 0.0, r)
    return np.asarray(np.hypot(px - bx * h, py - by * h) * np.sign(py * bx - px * by))


def _heart(x: FloatArray, y: FloatArray, r: float) -> FloatArray:
    scale = 1.72 * r
    px, py = np.abs(x) / scale, 0.55 - y / scale
    lobe = np.hypot(px - 0.25, py - 0.75) - 0.3535534
    diagonal = 0.5 * np.maximum(px + py, 0.0)
    point = np.minimum(np.hypot(px, py - 1.0), np.hypot(px - diagonal, py - diagonal)) * np.sign(px - py)
    return np.where(px + py > 1.0, lobe, point) * scale


SHAPES: dict[str, Callable[[FloatArray, FloatArray, float], FloatArray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "diamond": _diamond,
    "cross": _cross,
    "ring": _ring,
}


@cache
def coverage(shape: str, radius: int) -> FloatArray:
    """Share of each pixel covered by a shape, 0..1: [2 * h + 1, 2 * h + 1, 1] with h = radius + 1 pixels."""
    axis = np.arange(-radius - 1, radius + 2, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    return np.clip(0.5 - SHAPES[shape](x, y, radius), 0.0, 1.0).astype(np.float32)[..., None]


def render(scene: Scene) -> NDArray[np.uint8]:
    """Draw a scene: uint8 RGB [96, 96, 3]."""
    background = np.array(BACKGROUNDS[scene.background], np.float32)
    picture = np.broadcast_to(background, (SIZE, SIZE, 3)).copy()
    for item in scene.objects:
        half, (x, y) = item.radius + 1, item.center
        box = picture[y - half : y + half + 1, x - half : x + half + 1]
        box += coverage(item.shape, item.radius) * (np.array(COLORS[item.color], np.float32) - box)
    drawn: NDArray[np.uint8] = np.round(picture).astype(np.uint8)
    return drawn


Combination = tuple[str, ...]  # the family whose prompts ask for it, and its words


def held_out(combination: Combination) -> bool:
    """Whether a combination belongs to the test split; depends on its words only."""
    digest = blake2b("|".join(combination).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % TEST_SHARE[combination[0]] == 0


def related(relation: str, a: str, b: str) -> Combination:
    """The combination of shape ``a`` in a relation to shape ``b``: the same for a left of b and b right of a."""
    first, second = (a, b) if relation in ("left of", "above") else (b, a)
    return "position", first, "left of" if relation in ("left of", "right of") else "above", second


def named(include: list[dict[str, Any]]) -> set[Combination]:
    """The combinations that a prompt names by its metadata; beside these, by its words, an opening and a shape."""
    found = {("colors", thing["color"], thing["class"]) for thing in include if "color" in thing}
    found |= {("counting", COUNTS[thing["count"] - 1], thing["class"]) for thing in include if thing["count"] > 1}
    for b, a in combinations(include, 2):
        found.add(("two_object", *sorted((a["class"], b["class"]))))
        if "color" in a and "color" in b:
            found.add(_colored(a["color"], a["class"], b["color"], b["class"]))
        if "position" in a:
            found.add(related(a["position"][0], a["class"], b["class"]))
    return found


def shown(objects: list[Object]) -> set[Combination]:
    """The combinations that a picture shows."""
    found = {("colors", item.color, item.shape) for item in objects}
    counts = Counter(item.shape for item in objects)
    found |= {("counting", COUNTS[count - 1], shape) for shape, count in counts.items() if count > 1}
    for a, b in combinations(objects, 2):
        if a.shape != b.shape:
            found.add(("two_object", *sorted((a.shape, b.shape))))
            found.add(_colored(a.color, a.shape, b.color, b.shape))
            found |= {related(relation, a.shape, b.shape) for relation in RELATIONS if _lie(relation, a, b)}
    return found


def _colored(color_a: str, a: str, color_b: str, b: str) -> Combination:
    return "color_attr", *sorted((f"{color_a} {a}", f"{color_b} {b}"))


def _pick(rng: np.random.Generator, items: tuple[str, ...] | list[str], n: int = 1) -> list[str]:
    """``n`` different items, uniformly."""
    chosen: list[str] = []
    while len(chosen) < n:
        item = items[int(rng.integers(len(items)))]
        if item not in chosen:
            chosen.append(item)
    return chosen


def _noun(shape: str, color: str | None = None, count: int = 1) -> str:
    """A noun without article or numeral: "red circle", "crosses"."""
    plural = "es" if shape.endswith("s") else "s"
    return f"{color} " * bool(color) + shape + plural * (count > 1)


def _one(shape: str, color: str | None = None) -> str:
    """A noun with its article: "a red circle"."""
    noun = _noun(shape, color)
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _thing(shape: str, color: str | None = None, **more: Any) -> dict[str, Any]:
    entry: dict[str, Any] = {"class": shape, "count": 1}
    return entry | ({"color": color} if color else {}) | more


_SHAPES, _COLORS = tuple(SHAPES), tuple(COLORS)


def _draw_prompt(rng: np.random.Generator, family: str) -> tuple[Prompt, Combination, set[Combination]]:
    """A prompt of one family, the combination that it is about, and all that it names."""
    a, b = _pick(rng, _SHAPES, 2)
    ca, cb = _pick(rng, _COLORS, 2)
    (opening,) = _pick(rng, OPENINGS[:2] if rng.random() < COMMON_OPENINGS else OPENINGS[2:])
    joint = JOINTS[int(rng.integers(len(JOINTS)))]
    exclude: list[dict[str, Any]] = []
    about: Combination
    if family == "single_object":
        text, include, about = _one(a), [_thing(a)], ("single_object", opening, a)
    elif family == "colors":
        text, include, about = _one(a, ca), [_thing(a, ca)], ("colors", ca, a)
    elif family == "two_object":
        text, include = f"{_one(a)} {joint} {_one(b)}", [_thing(a), _thing(b)]
        about = ("two_object", *sorted((a, b)))
    elif family == "color_attr":
        text, include = f"{_one(a, ca)} {joint} {_one(b, cb)}", [_thing(a, ca), _thing(b, cb)]
        about = _colored(ca, a, cb, b)
    elif family in ("counting", "color_count"):
        n = int(rng.integers(1, 5)) if family == "counting" else int(rng.integers(2, 5))
        color = ca if family == "color_count" else None
        text, include = f"{COUNTS[n - 1]} {_noun(a, color, n)}", [_thing(a, color, count=n)]
        exclude = [_thing(a, color, count=n + 1)]
        about = ("counting", COUNTS[n - 1], a)
    elif family in ("position", "color_position"):
        (relation,) = _pick(rng, RELATIONS)
        ca_, cb_ = (ca, cb) if family == "color_position" else (None, None)
        words = f"to the {relation}" if relation.endswith("of") and rng.random() < 0.3 else relation
        text = f"{_one(a, ca_)} {words} {_one(b, cb_)}"
        include = [_thing(b, cb_), _thing(a, ca_, position=[relation, 0])]
        about = related(relation, a, b)
    else:
        raise ValueError(f"unknown family {family!r}; expected one of {', '.join(FAMILIES)}")
    openings: set[Combination] = {("single_object", opening, thing["class"]) for thing in include}
    return Prompt(f"{opening} {text}".strip(), family, include, exclude), about, openings | named(include)


def draw_prompt(
    rng: np.random.Generator,
    split: Split = "train",
    family: str | None = None,
    shares: dict[str, float] = FAMILIES,
) -> Prompt:
    """Draw a prompt, of ``family`` or of one drawn by ``shares``.

    "train" names no held-out combination; a "test" prompt is about one, and may name others. One object is not held
    out as a number: every picture of a single object shows that.
    """
    edges = np.cumsum(list(shares.values()))
    name = family or list(shares)[int(np.searchsorted(edges, rng.random() * edges[-1]))]
    while True:
        prompt, about, all_named = _draw_prompt(rng, name)
        if split == "test" and about in all_named and held_out(about):
            return prompt
        if split == "train" and not any(map(held_out, all_named)):
            return prompt


def _lie(relation: str, a: Object, b: Object, slope: float = 1.2) -> bool:
    """Whether ``a`` lies ``relation`` ``b``: apart along the axis, and ``slope`` times further along than across it."""
    dx, dy = b.center[0] - a.center[0], b.center[1] - a.center[1]
    ways = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}
    along, across = ways[relation]
    return along >= a.radius + b.radius and along > slope * abs(across)


def _apart(a: Object, b: Object) -> bool:
    """Whether two objects keep their distance, whatever their shapes: a triangle's corner is 1.31 radii out."""
    return bool(np.hypot(a.center[0] - b.center[0], a.center[1] - b.center[1]) >= 1.2 * (a.radius + b.radius) + 2)


@cache
def _first_patch(shape: str, radius: int, x: int, y: int) -> tuple[int, int]:
    """Row and column of the first patch that shows a shape whose box is (x, y) pixels from a patch's corner."""
    size = 2 * radius + 3
    count = (size - 1) // PATCH + 2
    covered = np.zeros((count * PATCH, count * PATCH), np.float32)
    covered[y : y + size, x : x + size] = coverage(shape, radius)[..., 0]
    shown = covered.reshape(count, PATCH, count, PATCH).mean((1, 3)) >= SHOWN
    row, column = divmod(int(shown.argmax()), count)
    return row, column


def first_token(item: Object) -> int:
    """The token, 0 to 575, at which an object begins when the picture is read row by row."""
    (left, x), (top, y) = (divmod(center - item.radius - 1, PATCH) for center in item.center)
    row, column = _first_patch(item.shape, item.radius, x, y)
    return (top + row) * (SIZE // PATCH) + left + column


def _in_order(relation: str | None, objects: list[Object]) -> bool:
    """Whether two different objects begin in the order of the prompt, or of their relation: left and upper first."""
    if len({item.shape for item in objects}) == 1:
        return True
    first, second = map(first_token, objects)
    # With a relation the second of ``objects`` is the one the prompt names first.
    return first > second if relation in ("left of", "above") else first < second


def draw_scene(rng: np.random.Generator, prompt: Prompt, open_colors: bool = True) -> Scene:
    """Arrange the objects of a prompt at random: inside the picture, apart, in order, clearly in the asked relation.

    In order means that of two different objects the one named first begins first when the picture is read row by row;
    of two in a relation it is the left or upper one. What comes next is then known from the prompt, which a small
    model learns many times faster. Colours the prompt does not mention are random. Centres are multiples of 4 pixels.
    The scene shows no held-out combination that the prompt does not name, except for colours and shapes where the
    prompt leaves the colour open; without ``open_colors`` not these either.
    """
    wanted = [(thing["class"], thing.get("color")) for thing in prompt.include for _ in range(thing["count"])]
    relation = next((thing["position"][0] for thing in prompt.include if "position" in thing), None)
    allowed = named(prompt.include)
    while True:
        objects: list[Object] = []
        for shape, color in wanted:
            radius = RADII[len(wanted)][int(rng.integers(len(RADII[len(wanted)])))]
            low, high = -(-(radius + 2) // PATCH), (SIZE - radius - 3) // PATCH + 1
            x, y = (int(v) * PATCH for v in rng.integers(low, high, 2))
            objects.append(Object(shape, color or _pick(rng, _COLORS)[0], (x, y), radius))
        if not all(_apart(p, q) for p, q in combinations(objects, 2)):
            continue
        if relation is not None and not _lie(relation, objects[1], objects[0], CLEAR_SLOPE):
            continue
        by_chance = {found for found in shown(objects) - allowed if not (open_colors and found[0] == "colors")}
        if _in_order(relation, objects) and not any(map(held_out, by_chance)):
            break
    (background,) = _pick(rng, list(BACKGROUNDS))
    return Scene(prompt.text, prompt.family, prompt.include, prompt.exclude, objects, background)
