"""The training path: batches and their labels, losses, attention, checkpoints, and the model's size."""

import math
import os
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mutants import check_json_reader
from torch.optim._muon import _zeropower_via_newtonschulz  # here, before a test replaces it

from ssd_shapes import attention, data, janus, losses, runs, text, tokens, train, world


@pytest.fixture(scope="module")
def tokenizer():
    return text.build_tokenizer()


def test_tokenizer_knows_every_word(tokenizer):
    assert len(tokenizer) <= text.VOCABULARY
    words = "a photo of two blue crosses to the left of an orange heart"
    assert len(tokenizer(words).input_ids) == 1 + len(words.split())
    assert tokenizer.decode(tokenizer(words).input_ids[1:]).strip() == words
    for phrase in (*world.OPENINGS, *world.JOINTS):
        assert len(tokenizer(phrase).input_ids) == 1 + len(phrase.split()), phrase


def test_batches_follow_from_seed_and_step(tokenizer):
    book = tokens.CodeBook.load()
    make = data.Batches(tokenizer, book, size=4, blank=0.5)
    one, again, other = make(3), make(3), make(4)
    assert torch.equal(one.codes, again.codes) and torch.equal(one.prompts, again.prompts)
    assert not torch.equal(one.codes, other.codes)
    assert (one.prompts[:, 0] == tokenizer.bos_token_id).all() and (one.prompts[:, -1] == make.boi).all()
    blanked = data.Batches(tokenizer, book, size=4, blank=1.0)(3)
    assert (blanked.prompts[:, 1:-1] == tokenizer.pad_token_id).all()


def test_causal_blocks_equal_torch():
    q, k, v = (torch.randn(2, 3, 47, 8, requires_grad=True) for _ in range(3))
    ours = attention.causal_attention(q, k, v, 8**-0.5).transpose(1, 2)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(ours, theirs, atol=1e-5)
    grads = [torch.autograd.grad(out.sin().sum(), (q, k, v)) for out in (ours, theirs)]
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_size_of_the_model(tokenizer):
    model = janus.build_model(tokenizer)
    assert sum(p.numel() for p in model.parameters()) <= 7_400_000
    assert model.model.vision_model.config.num_image_tokens == tokens.TOKENS
    assert model.config.vq_config.num_patches == tokens.GRID


def test_schedule():
    assert train.schedule(0, 1000, 100) == pytest.approx(0.01)
    assert train.schedule(500, 1000, 100) == 1.0
    assert train.schedule(750, 1000, 100) == pytest.approx(0.5)


def test_checkpoints_resume(tokenizer, tmp_path):
    model, head = janus.build_model(tokenizer), losses.SceneHead()
    opts = train.optimizers(model, head, 1e-3, 1e-3)
    trained = [p for p in (*model.parameters(), *head.parameters()) if p.requires_grad]
    sum((p - 1).square().sum() for p in trained).backward()
    for opt in opts:
        opt.step()
    assert head.weight.all()
    for step in (1, 2, 3):
        train.save(tmp_path, model, head, opts, train.Progress(step=step, held_out_scene={"shape": 0.5}))
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step_0000002", "step_0000003"]
    fresh, other = janus.build_model(tokenizer), losses.SceneHead()
    restored = train.optimizers(fresh, other, 2e-3, 1e-3)
    progress = train.resume(tmp_path, fresh, other, restored)
    assert progress.step == 3 and progress.held_out_scene == {"shape": 0.5}
    for a, b in zip(train.trained_state(model).values(), train.trained_state(fresh).values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(head.weight, other.weight)
    assert restored[0].param_groups[0]["peak"] == 2e-3
    assert train.resume(tmp_path / "empty", fresh, other, restored).step == 0


def test_a_damaged_checkpoint_is_named_and_left_out(tokenizer, tmp_path, capsys):
    model, head = janus.build_model(tokenizer), losses.SceneHead()
    opts = train.optimizers(model, head, 1e-3, 1e-3)
    for step in (1, 2):
        train.save(tmp_path, model, head, opts, train.Progress(step=step))
    (tmp_path / "partial").mkdir()  # of a process that was killed while it saved
    newest = tmp_path / "step_0000002"
    for name in train.FILES:
        whole = (newest / name).read_bytes()
        place = len(whole) // 2
        for damaged in (whole[:place], whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:], None):
            (newest / name).unlink()
            if damaged is None:
                os.mkfifo(newest / name)
            else:
                (newest / name).write_bytes(damaged)
            assert train.resume(tmp_path, model, head, opts).step == 1
            assert str(newest / name) in (said := capsys.readouterr().err) and "leaving step_0000002 out" in said
            if damaged is None:
                (newest / name).unlink()
        (newest / name).write_bytes(whole)
    assert train.resume(tmp_path, model, head, opts).step == 2 and not capsys.readouterr().err
    (newest / runs.DIGESTS).unlink()
    assert train.resume(tmp_path, model, head, opts).step == 1
    assert "the run was not finished, or another version wrote it" in capsys.readouterr().err
    train.save(tmp_path, model, head, opts, train.Progress(step=2))
    assert train.resume(tmp_path, model, head, opts).step == 2, "in the place of the damaged one"
    for folder in tmp_path.glob("step_*"):
        (folder / "progress.json").write_text("{}")
    with pytest.raises(ValueError, match="no checkpoint in .* can be read"):
        train.resume(tmp_path, model, head, opts)


def test_progress_may_hold_anything(tmp_path):
    file = tmp_path / "progress.json"
    runs.write_json(file, runs.finite(asdict(train.Progress(step=3, held_out_loss=2.5, held_out_scene={"shape": 0.5}))))
    assert train.read_progress(file).held_out_loss == 2.5 and math.isnan(train.read_progress(file).loss)
    check_json_reader(train.read_progress, file, r"loss|held_out_loss|held_out_scene\.(shape\.removed|unknown)")


def test_options_of_a_run_are_kept(tmp_path):
    runs.keep_options(tmp_path, {"lr": 1.0, "seed": 0}, False, False)
    runs.keep_options(tmp_path, {"lr": 1.0, "seed": 0}, True, False)
    with pytest.raises(ValueError, match=r"another --seed \(0 there, 1 now\).*--change-options"):
        runs.keep_options(tmp_path, {"lr": 1.0, "seed": 1}, True, False)
    runs.keep_options(tmp_path, {"lr": 1.0, "seed": 1}, True, True)
    runs.keep_options(tmp_path, {"lr": 1.0, "seed": 1}, True, False)
    (tmp_path / "old").mkdir()
    with pytest.raises(ValueError, match=r"another --lr \(None there"):
        runs.keep_options(tmp_path / "old", {"lr": 1.0}, True, False)
    with pytest.raises(ValueError, match="options.json: "):
        (tmp_path / runs.OPTIONS).write_text("[")
        runs.keep_options(tmp_path, {"lr": 1.0}, True, False)


def test_held_out_measures(tokenizer):
    batches = [data.Batches(tokenizer, tokens.CodeBook.load(), 1, 0.0, split="test")(step) for step in range(2)]
    progress = train.Progress()
    with torch.no_grad():
        train.measure(janus.build_model(tokenizer), losses.SceneHead(), batches, progress)
    assert progress.held_out_loss == pytest.approx(math.log(tokens.CODES), abs=0.5)  # untrained
    assert progress.held_out_scene.keys() == {"shape", "color", "number", "column"}
    assert progress.held_out_scene["number"] == 0.0  # a blank head says that no object begins


def scenes(n: int) -> list[world.Scene]:
    rng = np.random.default_rng(0)
    return [world.draw_scene(rng, world.draw_prompt(rng)) for _ in range(n)]


def covered(scene: world.Scene) -> np.ndarray:
    """Share of each patch that each object covers, read from pictures of it alone, black on sand: [objects, 576]."""
    black = [replace(item, color="black") for item in scene.objects]
    alone = np.stack([world.render(replace(scene, objects=[item], background="sand")) for item in black])
    sand, ink = (np.array(color, float) for color in (world.BACKGROUNDS["sand"], world.COLORS["black"]))
    shares = tokens.patches(torch.from_numpy((sand - alone) / (sand - ink)))
    return shares.mean(-1).numpy()


def test_labels_are_what_objects_cover():
    for scene in scenes(100):
        shares = covered(scene)
        owner = np.where(shares.max(0) >= world.SHOWN, shares.argmax(0), -1)
        shown = [scene.objects[number] if number >= 0 else None for number in owner]
        shapes, colors, begins = data.label(scene)
        clear = (abs(shares - world.SHOWN) > 0.005).all(0)  # pictures are rounded to whole levels
        expected = np.array([list(world.SHAPES).index(item.shape) if item else -1 for item in shown])
        assert np.array_equal(shapes[clear], expected[clear])
        expected = np.array([list(world.COLORS).index(item.color) if item else -1 for item in shown])
        assert np.array_equal(colors[clear], expected[clear])
        first = [np.flatnonzero(owner == number)[0] for number in range(len(scene.objects))]
        assert np.flatnonzero(begins).tolist() == sorted(first)


def test_labels_fit_the_codes():
    book = tokens.CodeBook.load()
    for scene in scenes(20):
        codes, empty = book.encode(
            torch.from_numpy(np.stack([world.render(scene), world.render(replace(scene, objects=[]))]))
        ).numpy()
        shapes, _, _ = data.label(scene)
        share = covered(scene).max(0)
        assert (codes != empty)[share > 0.5].all() and (shapes >= 0)[share > 0.5].all()
        assert (codes == empty)[share == 0].all() and (shapes < 0)[share == 0].all()


def test_batches_carry_the_labels_of_their_pictures(tokenizer):
    book = tokens.CodeBook.load()
    batch = data.Batches(tokenizer, book, size=8)(0)
    assert batch.codes.shape == batch.shapes.shape == batch.colors.shape == batch.begins.shape == (8, tokens.TOKENS)
    assert torch.equal(batch.before, batch.codes[:, :-1]) and batch.weights.eq(1).all()
    assert batch.places.eq(torch.arange(tokens.TOKENS)).all()
    assert torch.equal(batch.remaining[:, 0], batch.begins.sum(1))
    assert batch.begins.sum(1).ge(1).all() and batch.shapes[batch.begins].ge(0).all()
    assert torch.equal(batch.shapes >= 0, batch.colors >= 0)
    plain = torch.tensor(list(world.COLORS.values()), dtype=torch.uint8)[:, None, None]
    codes = book.encode(plain.expand(-1, world.SIZE, world.SIZE, -1))[:, 0]
    inside = batch.codes[..., None] == codes  # [B, 576, colours]
    assert inside.any(-1).sum() > 50
    assert torch.equal(inside.nonzero()[:, 2], batch.colors[inside.any(-1)])


def toy_batch() -> data.Batch:
    """One picture: object 3 of colour 5 at tokens 100 to 102 (codes 7, 8, 8), object 1 of colour 2 at 300 (code 9)."""
    codes = torch.zeros(1, tokens.TOKENS, dtype=torch.long)
    shapes, colors = codes - 1, codes - 1
    codes[0, 100:103], codes[0, 300] = torch.tensor([7, 8, 8]), 9
    shapes[0, 100:103], shapes[0, 300] = 3, 1
    colors[0, 100:103], colors[0, 300] = 5, 2
    begins = torch.zeros_like(codes, dtype=torch.bool)
    begins[0, [100, 300]] = True
    return data.Batch(
        prompts=codes[:, :5], places=torch.arange(tokens.TOKENS)[None], weights=torch.ones(codes.shape),
        before=codes[:, :-1], codes=codes, shapes=shapes, colors=colors, begins=begins,
        remaining=data.remaining_objects(begins), coming=data.next_begin(begins), empty=torch.tensor([0]),
    )  # fmt: skip


def test_identity_loss_ignores_whether_an_object_begins():
    batch, logits = toy_batch(), torch.zeros(1, tokens.TOKENS, tokens.CODES)
    even = losses.identity_loss(logits, batch)
    assert even.item() * tokens.TOKENS == pytest.approx(2 * math.log(tokens.CODES - 1))
    logits[:, :, 0] = 30.0  # sure that everything is background
    assert torch.isclose(losses.identity_loss(logits, batch), even)
    logits[:, 100, 7] = logits[:, 300, 9] = 20.0  # but if something begins, then this
    assert losses.identity_loss(logits, batch) < 1e-5


def test_identity_loss_skips_invisible_beginnings():
    batch, logits = toy_batch(), torch.zeros(1, tokens.TOKENS, tokens.CODES)
    batch.codes[0, 300] = 0  # the background's code
    loss = losses.identity_loss(logits, batch)
    assert loss.item() * tokens.TOKENS == pytest.approx(math.log(tokens.CODES - 1))


def test_remaining_objects():
    remaining = toy_batch().remaining[0]
    assert remaining.tolist() == [2] * 101 + [1] * 200 + [0] * 275


def test_next_begin():
    coming = toy_batch().coming[0]
    assert coming.tolist() == [100] * 101 + [300] * 200 + [tokens.TOKENS] * 275


def perfect_reading(batch: data.Batch) -> losses.Reading:
    coming, here = batch.coming, batch.places
    targets = (batch.shapes.clamp(min=0), batch.colors.clamp(min=0), batch.remaining,
               here // 24, here % 24, (coming // 24).clamp(max=23), coming % 24)  # fmt: skip
    return losses.Reading(*(50.0 * F.one_hot(t, n) for t, n in zip(targets, losses.SceneHead().parts, strict=True)))


def test_scene_loss():
    batch = toy_batch()
    blank = losses.SceneHead()(torch.randn(1, tokens.TOKENS, janus.HIDDEN))
    nats = 2 * math.log(len(world.SHAPES)) + math.log(len(world.COLORS)) + math.log(losses.MOST_OBJECTS + 1)
    assert losses.scene_loss(blank, batch).item() == pytest.approx(nats + losses.PLACE_WEIGHT * 4 * math.log(24))
    read = perfect_reading(batch)
    # Background's shape, inner colours and what comes after the last object do not matter.
    for part, place in ((read.shape, 0), (read.color, 101), (read.next_row, 301), (read.next_column, 301)):
        part[0, place] *= -1
    assert losses.scene_loss(read, batch) < 1e-6
    matters = {"shape": 101, "color": 300, "remaining": 0, "row": 500, "column": 500, "next_row": 0, "next_column": 300}
    assert matters.keys() == set(read._fields)
    for name, place in matters.items():
        part = getattr(read, name)
        part[0, place] *= -1
        assert losses.scene_loss(read, batch) > 0.01, name
        part[0, place] *= -1


def test_scene_accuracy():
    batch = toy_batch()
    read = perfect_reading(batch)
    assert losses.scene_accuracy(read, batch) == {"shape": 1.0, "color": 1.0, "number": 1.0, "column": 1.0}
    read.color[0, 300] *= -1
    read.remaining[0, 0] *= -1
    read.column[0, :288] *= -1
    assert losses.scene_accuracy(read, batch) == {"shape": 1.0, "color": 0.5, "number": 0.0, "column": 0.5}


def test_thinned_batches_are_parts_of_whole_ones(tokenizer):
    make = data.Batches(tokenizer, tokens.CodeBook.load(), size=8, whole_from=1)
    thin, whole = make(0), data.Batches(tokenizer, make.book, size=8)(0)
    count = thin.places.shape[1]
    assert count < tokens.TOKENS and (thin.places[:, 0] == 0).all() and (thin.places.diff(dim=1) > 0).all()
    assert torch.equal(make(1).places, torch.arange(tokens.TOKENS).expand(8, -1))
    for name in ("codes", "shapes", "colors", "begins", "remaining", "coming"):
        assert torch.equal(getattr(thin, name), getattr(whole, name).gather(1, thin.places)), name
    assert torch.equal(thin.before, whole.codes.gather(1, thin.places[:, 1:] - 1))
    # All of every object and its surroundings is there, and what is there stands for all.
    assert torch.equal((thin.shapes >= 0).sum(1), (whole.shapes >= 0).sum(1))
    assert torch.equal(thin.begins.sum(1), whole.begins.sum(1))
    assert torch.allclose(thin.weights.sum(1), torch.full((8,), float(tokens.TOKENS)))
    assert thin.weights[thin.shapes >= 0].eq(1).all() and thin.weights.gt(1).sum(1).ge(data.FAR - 1).all()


def test_thinning_draws_the_background_evenly():
    shapes = torch.full((1, tokens.TOKENS), -1)
    shapes[0, 300] = 2
    rng, drawn = np.random.default_rng(0), torch.zeros(tokens.TOKENS, dtype=torch.float64)
    for _ in range(2000):
        places, weights = data.thin(shapes, rng)
        drawn.index_add_(0, places[0], weights[0].double() / 2000)
    near = torch.zeros(24, 24, dtype=torch.bool)
    near[11:14, 11:14] = True
    near[0, 0] = True
    assert torch.allclose(drawn[near.view(-1)], drawn.new_ones(10))
    assert (drawn - 1).abs().max() < 0.4 and drawn.mean() == pytest.approx(1)


def test_prediction_at_chosen_places(tokenizer, monkeypatch):
    """Predictions are those of transformers on whole sequences; a place keeps its position when others are left out.

    Both in float32, also on CPUs with instructions for bfloat16.
    """
    monkeypatch.setattr(losses, "HAS_BFLOAT16", False)
    model = janus.build_model(tokenizer).eval()
    make = data.Batches(tokenizer, tokens.CodeBook.load(), size=2)
    batch = make(0)
    with torch.no_grad():
        hidden, logits = losses.predict(model, batch, torch.float32)
        codes = model.model.generation_aligner(model.model.generation_embeddings(batch.codes[:, :-1]))
        embedded = torch.cat([model.model.language_model.embed_tokens(batch.prompts), codes], 1)
        plain = model.model.language_model(inputs_embeds=embedded).last_hidden_state[:, -tokens.TOKENS :]
        assert torch.allclose(hidden, plain, atol=1e-4)
        assert torch.allclose(logits, model.model.generation_head(plain), atol=1e-4)
        # The first places alone see all that comes before them.
        first = replace(batch, places=batch.places[:, :50], before=batch.before[:, :49])
        assert torch.allclose(losses.predict(model, first, torch.float32)[0], hidden[:, :50], atol=1e-4)
        # Two distant places: token 0 and token 400, which sees the prompt and token 399 at its own position.
        two = replace(batch, places=torch.tensor([[0, 400]] * 2), before=batch.codes[:, 399:400])
        positions = torch.cat([torch.arange(batch.prompts.shape[1]), torch.tensor([batch.prompts.shape[1] + 399])])
        embedded = torch.cat([embedded[:, : batch.prompts.shape[1]], codes[:, 399:400]], 1)
        alone = model.model.language_model(inputs_embeds=embedded, position_ids=positions.expand(2, -1))
        later = losses.predict(model, two, torch.float32)[0][:, 1]
        assert torch.allclose(later, alone.last_hidden_state[:, -1], atol=1e-4)


def test_prediction_in_bfloat16_is_near(tokenizer):
    """On every processor, also where training would not choose it."""
    model = janus.build_model(tokenizer).eval()
    batch = data.Batches(tokenizer, tokens.CodeBook.load(), size=1)(0)
    with torch.no_grad():
        exact, rounded = (losses.predict(model, batch, dtype)[1].float() for dtype in (torch.float32, torch.bfloat16))
    assert 0 < (exact - rounded).norm() < 0.05 * exact.norm()


def test_token_loss_weighs():
    batch, logits = toy_batch(), torch.randn(1, tokens.TOKENS, tokens.CODES)
    plain = F.cross_entropy(logits[0], batch.codes[0])
    assert torch.isclose(losses.token_loss(logits, batch), plain)
    each = F.cross_entropy(logits[0], batch.codes[0], reduction="none")
    part = replace(batch, codes=batch.codes[:, :2], weights=torch.tensor([[2.0, 574.0]]))
    expected = (2 * each[0] + 574 * each[1]) / tokens.TOKENS
    assert torch.isclose(losses.token_loss(logits[:, :2], part), expected)


def test_orthogonalize_is_torchs_iteration():
    """In float32 what torch's Muon does in bfloat16, for tall and wide matrices."""
    for shape in ((64, 96), (96, 64)):
        grad, coefficients = torch.randn(shape), (3.4445, -4.775, 2.0315)
        mine = train.orthogonalize(grad, coefficients, 5, 1e-7)
        assert mine.dtype == torch.float32 and mine.shape == shape
        assert (mine - _zeropower_via_newtonschulz(grad, coefficients, 5, 1e-7).float()).norm() < 0.03 * mine.norm()
        assert torch.linalg.svdvals(mine).max() < 1.3



def test_weights_are_averaged():
    a, b = {"x": torch.tensor([1.0, 3.0], dtype=torch.bfloat16)}, {"x": torch.tensor([2.0, -1.0])}
    assert torch.equal(train.average([a, b])["x"], torch.tensor([1.5, 1.0]))
    assert torch.equal(train.average([b])["x"], b["x"])
    for other in ({"y": torch.zeros(2)}, {"x": torch.zeros(3)}):
        with pytest.raises(ValueError, match="same names and shapes"):
            train.average([a, other])
