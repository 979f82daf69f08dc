"""The detector reads the world's own pictures, also through the VQ model, and finds nothing where nothing is."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import JanusForConditionalGeneration

from ssd_shapes import detector, export, tokens, vq, world


def scenes(each: int, seed: int) -> list[world.Scene]:
    """``each`` scenes of every family."""
    rng = np.random.default_rng(seed)
    return [world.draw_scene(rng, world.draw_prompt(rng, family=f)) for f in world.FAMILIES for _ in range(each)]


def metadata(scene: world.Scene) -> dict[str, Any]:
    return {"tag": scene.family, "include": scene.include, "exclude": scene.exclude, "prompt": scene.prompt}


def draw(*objects: world.Object, background: str = "grey") -> np.ndarray:
    return world.render(world.Scene("", "", [], [], list(objects), background))


def kinds(picture: np.ndarray) -> list[tuple[str, str]]:
    return sorted((item.shape, item.color) for item in detector.detect(picture))


def mismatches(scene: world.Scene) -> Iterator[dict[str, Any]]:
    """Metadata that differ from a scene's in one attribute and are false for it."""

    def changed(index: int, **new: Any) -> dict[str, Any]:
        include = [thing | new if i == index else thing for i, thing in enumerate(scene.include)]
        more = {key: value for key, value in new.items() if key != "position"}
        if "count" in more:
            more["count"] += 1
        return metadata(scene) | {"include": include, "exclude": [thing | more for thing in scene.exclude]}

    classes = {thing["class"] for thing in scene.include}
    for index, thing in enumerate(scene.include):
        for other in set(world.SHAPES) - classes:
            yield changed(index, **{"class": other})
        for other in set(world.COLORS) - {thing["color"]} if "color" in thing else ():
            yield changed(index, color=other)
        for relation in set(world.RELATIONS) - {thing["position"][0]} if "position" in thing else ():
            yield changed(index, position=[relation, 0])
        for count in {1, 2, 3, 4} - {thing["count"]} if "count" in scene.family else ():
            yield changed(index, count=count)


def accepted(drawn: list[world.Scene], found: list[list[detector.Found]]) -> dict[str, float]:
    """Per family, the share of mismatched prompts that are accepted."""
    wrong, total = Counter(), Counter()
    for scene, items in zip(drawn, found, strict=True):
        for other in mismatches(scene):
            wrong[scene.family] += detector.judge(items, other).correct
            total[scene.family] += 1
    assert min(total.values()) >= 3 * len(drawn) / len(world.FAMILIES)
    return {family: wrong[family] / total[family] for family in total}


def test_true_pictures():
    drawn = scenes(30, seed=0)
    found = [detector.detect(world.render(scene)) for scene in drawn]
    # Less than one in 200 may fail: none of these.
    assert all(detector.judge(items, metadata(scene)).correct for items, scene in zip(found, drawn, strict=True))
    assert max(accepted(drawn, found).values()) <= 0.01
    for scene, items in zip(drawn, found, strict=True):
        assert len(items) == len(scene.objects)
        for item in items:
            true = min(scene.objects, key=lambda o: np.hypot(*np.subtract(o.center, item.center)))
            assert (item.shape, item.color) == (true.shape, true.color)
            assert np.allclose((*item.center, item.radius), (*true.center, true.radius), atol=0.6)


def test_rates_count_by_family():
    drawn = scenes(2, seed=4)
    pictures = [world.render(scene) for scene in drawn]
    pictures[0] = np.full_like(pictures[0], 152)
    rates = detector.rate(pictures, [metadata(scene) for scene in drawn])
    assert rates == dict.fromkeys(world.FAMILIES, (2, 2)) | {"single_object": (1, 2)}


@pytest.mark.skipif(not (export.MODEL / "config.json").exists(), reason="the model is not exported yet")
def test_pictures_from_the_vq_model():
    drawn = scenes(12, seed=3)
    originals = torch.from_numpy(np.stack([world.render(scene) for scene in drawn]))
    model = JanusForConditionalGeneration.from_pretrained(export.MODEL, dtype=torch.float32)
    with torch.inference_mode():
        values = [model.decode_image_tokens(c) for c in tokens.CodeBook.load().encode(originals).split(8)]
    found = [detector.detect(p) for p in vq.to_bytes(torch.cat(values).permute(0, 3, 1, 2)).numpy()]
    wrong = [scene for scene, items in zip(drawn, found, strict=True) if not detector.judge(items, scene).correct]
    assert len(wrong) <= 1, wrong  # at most one in 200 over many pictures
    assert max(accepted(drawn, found).values()) <= 0.01


def test_mismatches_differ_in_one_attribute():
    scene = next(s for s in scenes(1, seed=0) if s.family == "color_count")
    (thing,) = scene.include
    for other in mismatches(scene):
        assert sum(other["include"][0][key] != thing[key] for key in thing) == 1
        assert other["exclude"][0] == other["include"][0] | {"count": other["include"][0]["count"] + 1}


def test_nothing_on_noise():
    rng = np.random.default_rng(0)
    book = tokens.CodeBook.load()
    torch.manual_seed(0)
    true = book.encode(torch.from_numpy(np.stack([world.render(scene) for scene in scenes(2, seed=5)])))
    shuffled = torch.stack([codes[torch.randperm(len(codes))] for codes in true])
    noise = [rng.integers(0, 256, (96, 96, 3)) for _ in range(10)]
    noise += [np.clip(152 + rng.normal(0, deviation, (96, 96, 3)), 0, 255) for deviation in (5, 15, 30, 60)]
    noise += [*book.decode(torch.randint(tokens.CODES, (10, tokens.TOKENS))).numpy(), *book.decode(shuffled).numpy()]
    for picture in noise:
        assert detector.detect(picture.astype(np.uint8)) == []


@pytest.mark.parametrize("color", [*world.COLORS.values(), *world.BACKGROUNDS.values()])
def test_nothing_on_one_color(color):
    picture = np.broadcast_to(np.array(color, np.uint8), (96, 96, 3))
    assert detector.detect(picture) == []
    assert not detector.score(picture, scenes(1, seed=0)[0]).correct


def test_nothing_of_other_forms_and_colors():
    for box in ((20, 20, 60, 40), (20, 20, 51, 40), (40, 10, 52, 80), (10, 50, 90, 54)):  # bars
        image = Image.new("RGB", (96, 96), world.BACKGROUNDS["sand"])
        image.paste(world.COLORS["blue"], box)
        assert detector.detect(image) == []
    square = np.full((96, 96, 3), 152, np.uint8)
    square[30:60, 30:60] = (0, 220, 220)  # no colour of the palette
    assert detector.detect(square) == []
    square[30:60, 30:60] = world.COLORS["red"]
    assert kinds(square) == [("square", "red")]
    square[30:60, 45:60] = world.COLORS["green"]  # two halves are no square of either colour
    assert detector.detect(square) == []


@pytest.mark.parametrize("shape", world.SHAPES)
def test_cut_off_objects(shape):
    """Found while nearly all of an object is in the picture, and not taken for another shape later."""
    whole = draw(world.Object(shape, "yellow", (48, 48), 14))
    for cut, found in ((36, True), (44, False), (54, False)):  # of 34..62
        for turn in range(2):
            picture = np.full_like(whole, 152)
            if turn:
                picture[: 96 - cut] = whole[cut:]
            else:
                picture[:, : 96 - cut] = whole[:, cut:]
            seen = kinds(picture)
            assert seen == [(shape, "yellow")] if found else set(seen) <= {(shape, "yellow")}, (cut, turn)


@pytest.mark.parametrize("shape", world.SHAPES)
def test_objects_that_run_over_the_side(shape):
    """Drawn token by token, what runs over the right side goes on at the left one, a patch lower: no object there."""
    picture = draw(world.Object(shape, "yellow", (48, 48), 14))
    for beyond in (10, 14, 17):  # of 28 pixels
        rolled = np.roll(picture, 34 + beyond, axis=1)
        rolled[:, :48] = np.roll(rolled[:, :48], tokens.PATCH, axis=0)
        assert detector.detect(rolled) == [], beyond


@pytest.mark.parametrize("colors", [("red", "blue"), ("red", "red")])
def test_touching_objects(colors):
    for shape, gap in (("circle", 24), ("heart", 27), ("star", 24), ("ring", 24)):
        objects = [world.Object(shape, color, (30 + i * gap, 48), 13) for i, color in enumerate(colors)]
        assert kinds(draw(*objects)) == sorted((shape, color) for color in colors), shape


def test_damage():
    """A few wrong patches, as a language model may draw, neither hide an object nor make one."""
    picture = draw(world.Object("heart", "purple", (40, 50), 15), background="slate")
    picture[44:48, 40:44] = world.BACKGROUNDS["slate"]
    picture[8:12, 80:84] = world.COLORS["red"]
    picture[80:84, 8:12] = world.COLORS["white"]
    assert kinds(picture) == [("heart", "purple")]


def found(shape: str, color: str, x: float, y: float) -> detector.Found:
    return detector.Found(shape, color, (x, y), (20, 20), 10, 300, 0.99)


def test_verdicts_follow_geneval():
    things = [found("circle", "red", 20, 20), found("ring", "blue", 60, 30), found("ring", "green", 60, 70)]

    def verdict(*include: dict[str, Any], exclude: tuple[dict[str, Any], ...] = ()) -> detector.Verdict:
        return detector.judge(things, {"include": list(include), "exclude": list(exclude)})

    circle, ring = {"class": "circle", "count": 1}, {"class": "ring", "count": 1}
    assert verdict(circle) == detector.Verdict(True, "")  # other objects do not matter
    assert verdict(ring | {"count": 2}, exclude=(ring | {"count": 3},)).correct
    assert verdict(ring, exclude=(ring | {"count": 2},)).reason == "expected fewer than 2 x ring, found 2"
    assert verdict(ring | {"count": 3}).reason == "expected 3 x ring, found 2"
    assert verdict(ring | {"color": "blue"}).correct  # the best found of a class is judged
    assert verdict(circle | {"color": "blue"}).reason == "expected 1 x blue circle, found red"
    assert verdict(circle, ring | {"position": ["right of", 0]}).correct
    below = verdict(circle, ring | {"position": ["below", 0]})
    assert below.reason == "expected the ring below the circle"
    assert not verdict({"class": "star", "count": 1}, ring | {"position": ["right of", 0]}).correct
    assert detector.judge([], {"include": [circle]}).reason == "expected 1 x circle, found 0"


def test_positions_have_a_margin():
    a = found("circle", "red", 40, 40)
    assert detector.related("right of", found("ring", "red", 60, 45), a)
    assert not detector.related("right of", found("ring", "red", 44, 40), a)  # within a tenth of both sizes
    assert not detector.related("right of", found("ring", "red", 60, 61), a)  # more below than right
    assert not detector.related("above", a, a)


def test_bad_pictures_are_refused():
    for bad in (np.zeros((96, 96), np.uint8), np.zeros((96, 96, 3), np.float32), np.zeros((96, 96, 4), np.uint8)):
        with pytest.raises(ValueError, match="uint8 picture"):
            detector.detect(bad)
    scene = scenes(1, seed=0)[0]
    assert detector.score(Image.fromarray(world.render(scene)), scene).correct
    with pytest.raises(ValueError):
        detector.rate([world.render(scene)], [])
