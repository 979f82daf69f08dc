"""Scenes satisfy their prompts, pictures show their scenes, and everything follows from the seed."""

import numpy as np
import pytest
import torch

from ssd_shapes import tokens, world


def scenes(n: int, split: world.Split = "train", seed: int = 0) -> list[world.Scene]:
    rng = np.random.default_rng(seed)
    return [world.draw_scene(rng, world.draw_prompt(rng, split)) for _ in range(n)]


def test_same_seed_same_scenes():
    assert scenes(50) == scenes(50)
    assert scenes(50) != scenes(50, seed=1)


def test_scenes_hold_exactly_what_the_prompt_asks():
    for scene in scenes(500):
        assert len(scene.objects) == sum(thing["count"] for thing in scene.include)
        for thing in scene.include:
            found = [o for o in scene.objects if o.shape == thing["class"]]
            assert len(found) == thing["count"]
            assert all(o.color == thing.get("color", o.color) for o in found)


def test_positions_hold():
    sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
    positioned = [s for s in scenes(500) if "position" in s.family]
    assert positioned
    for scene in positioned:
        anchor, thing = scene.include
        axis, direction = sign[thing["position"][0]]
        a = next(o for o in scene.objects if o.shape == thing["class"])
        b = next(o for o in scene.objects if o.shape == anchor["class"])
        assert (a.center[axis] - b.center[axis]) * direction >= a.radius + b.radius


def test_objects_are_inside_and_apart():
    for scene in scenes(500):
        covered = np.zeros((world.SIZE, world.SIZE), int)
        for o in scene.objects:
            half, (x, y) = o.radius + 1, o.center
            assert half <= min(x, y) and max(x, y) + half < world.SIZE
            box = covered[y - half : y + half + 1, x - half : x + half + 1]
            box += world.coverage(o.shape, o.radius)[..., 0] > 0
        assert covered.max() == 1


def test_training_neither_names_nor_shows_a_held_out_combination():
    rng = np.random.default_rng(3)
    named: set[world.Combination] = set()
    shown: dict[bool, set[world.Combination]] = {False: set(), True: set()}
    for _ in range(6000):
        prompt = world.draw_prompt(rng)
        named |= world.named(prompt.include)
        opening = next(o for o in sorted(world.OPENINGS, key=len, reverse=True) if prompt.text.startswith(o))
        named |= {("single_object", opening, thing["class"]) for thing in prompt.include}
        for open_colors, found in shown.items():
            found |= world.shown(world.draw_scene(rng, prompt, open_colors).objects)
    assert not any(map(world.held_out, named | shown[False]))
    # A colour that the prompt leaves open may be any; nothing else is.
    pairs = {("colors", color, shape) for color in world.COLORS for shape in world.SHAPES}
    assert set(filter(world.held_out, shown[True])) == set(filter(world.held_out, pairs))
    # What is not held out is all there, or the test above would say little.
    assert {key for key in named if key[0] == "colors"} == {pair for pair in pairs if not world.held_out(pair)}


def test_test_scenes_show_only_the_held_out_combinations_that_are_named():
    for scene in scenes(300, "test"):
        held = set(filter(world.held_out, world.shown(scene.objects)))
        assert all(key[0] == "colors" for key in held - world.named(scene.include))
        assert held & world.named(scene.include) or scene.family == "single_object"


def test_what_is_shown_is_what_is_named():
    """A picture shows all that its prompt names, told from the objects alone."""
    for scene in scenes(500):
        assert world.named(scene.include) <= world.shown(scene.objects)


def test_mirrored_relations_are_one_combination():
    assert world.related("left of", "star", "ring") == world.related("right of", "ring", "star")
    assert world.related("above", "star", "ring") == world.related("below", "ring", "star")
    assert len({world.related(r, "star", "ring") for r in world.RELATIONS}) == 4


def test_splits_share_no_prompt():
    train, test = scenes(3000), scenes(1000, "test", 1)
    assert not {s.prompt for s in train} & {s.prompt for s in test}
    assert {s.family for s in train} == set(world.FAMILIES)
    assert {s.family for s in test} == set(world.FAMILIES)


def test_genevals_wording():
    rng = np.random.default_rng(0)
    prompts = {world.draw_prompt(rng).text for _ in range(30_000)}
    for wanted in ("a photo of a circle", "a photo of three stars", "a photo of an orange heart"):
        assert wanted in prompts
    assert any(" to the left of " in p for p in prompts)


def test_single_objects_are_held_out_by_opening():
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for _ in range(100):
            prompt = world.draw_prompt(rng, split, "single_object")
            shape = prompt.include[0]["class"]
            opening = prompt.text.removesuffix(f"a {shape}").strip()
            assert opening in world.OPENINGS
            assert world.held_out(("single_object", opening, shape)) == (split == "test")


@pytest.mark.parametrize("shape", world.SHAPES)
def test_shapes_are_upright_and_fit(shape):
    mask = world.coverage(shape, 13)[..., 0]
    assert np.allclose(mask, mask[:, ::-1], atol=1e-5)
    assert mask[[0, -1]].max() == 0 and mask[:, [0, -1]].max() == 0
    assert 0.2 < mask.mean() < 0.8


def test_shapes_differ():
    masks = [world.coverage(shape, 9)[..., 0] for shape in world.SHAPES]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert np.abs(a - b).sum() > 0.15 * max(a.sum(), b.sum())


def test_code_book_reconstructs():
    book = tokens.CodeBook.load()
    pictures = torch.from_numpy(np.stack([world.render(s) for s in scenes(100, "test", 7)]))
    codes = book.encode(pictures)
    assert codes.shape == (100, tokens.TOKENS)
    assert (book.decode(codes) - pictures).square().mean() <= 30
    for color in (*world.COLORS.values(), *world.BACKGROUNDS.values()):
        flat = torch.tensor(color, dtype=torch.uint8).expand(1, world.SIZE, world.SIZE, 3)
        assert torch.equal(book.decode(book.encode(flat)).byte(), flat)
    # A picture made of codes has those codes.
    assert torch.equal(book.encode(book.decode(codes)), codes)


def test_objects_begin_in_order():
    """Different objects begin in the order of the prompt, related ones with the left or upper one first."""
    first_named = {"left of": 0, "above": 0, "right of": 1, "below": 1}
    checked = 0
    for scene in scenes(500):
        shapes = [word for word in scene.prompt.replace(",", "").split() if word in world.SHAPES]
        if len(set(shapes)) < 2:
            continue
        relation = next((thing["position"][0] for thing in scene.include if "position" in thing), "above")
        drawn = [item.shape for item in sorted(scene.objects, key=world.first_token)]
        assert drawn == (shapes if first_named[relation] == 0 else shapes[::-1]), scene.prompt
        checked += 1
    assert checked > 100


def test_first_token_is_where_a_picture_first_shows_an_object():
    for scene in scenes(100):
        for item in scene.objects:
            alone = world.Scene(scene.prompt, scene.family, [], [], [item], scene.background)
            empty = world.Scene(scene.prompt, scene.family, [], [], [], scene.background)
            changed = abs(world.render(alone).astype(int) - world.render(empty)).sum(-1) > 0
            patches = changed.reshape(24, 4, 24, 4).mean((1, 3)).reshape(-1)
            first = world.first_token(item)
            # Patches before it may show a sliver, and it shows more than one pixel's edge.
            assert patches[first] > world.SHOWN / 2 and (patches[:first] <= 0.5).all()


def test_margin_codes_draw_the_same_picture():
    """Marking changes empty background in the left column only, and not what is drawn; no picture has these codes."""
    book = tokens.CodeBook.load()
    codes = book.encode(torch.from_numpy(np.stack([world.render(s) for s in scenes(50)])))
    assert not torch.isin(codes, torch.tensor(list(tokens.MARGINS))).any()
    marked = tokens.mark_margin(codes)
    assert torch.equal(book.decode(marked), book.decode(codes))
    left, changed = torch.zeros(24, 24, dtype=torch.bool), marked != codes
    left[:, 0] = True
    assert torch.equal(changed, torch.isin(codes, torch.tensor(list(tokens.FLAT))) & left.view(-1))
    assert changed.any()
