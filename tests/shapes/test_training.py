"""The training path: batches, attention, and the model's size."""

import pytest
import torch
import torch.nn.functional as F

from ssd_shapes import attention, data, janus, text, tokens, train


@pytest.fixture(scope="module")
def tokenizer():
    return text.build_tokenizer()


def test_tokenizer_knows_every_word(tokenizer):
    assert len(tokenizer) <= text.VOCABULARY
    words = "a photo of two blue crosses to the left of an orange heart"
    assert len(tokenizer(words).input_ids) == 1 + len(words.split())
    assert tokenizer.decode(tokenizer(words).input_ids[1:]).strip() == words


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
    assert train.schedule(875, 1000, 100) == pytest.approx(0.5)


def test_checkpoints_resume(tokenizer, tmp_path):
    model = janus.build_model(tokenizer)
    opts = train.optimizers(model, 1e-3, 1e-3)
    sum(p.square().sum() for p in model.parameters() if p.requires_grad).backward()
    for opt in opts:
        opt.step()
    for step in (1, 2, 3):
        train.save(tmp_path, model, opts, train.Progress(step=step, loss=1.0))
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step_0000002", "step_0000003"]
    fresh = janus.build_model(tokenizer)
    restored = train.optimizers(fresh, 2e-3, 1e-3)
    assert train.resume(tmp_path, fresh, restored).step == 3
    for a, b in zip(train.trained_state(model).values(), train.trained_state(fresh).values(), strict=True):
        assert torch.equal(a, b)
    assert restored[0].param_groups[0]["peak"] == 2e-3
    assert train.resume(tmp_path / "empty", fresh, restored).step == 0


def test_object_starts_are_first_rows_only():
    grid = torch.zeros(1, 24, 24, dtype=torch.long)
    grid[0, 5:9, 7:11] = 3  # a square begins once
    grid[0, 9:12, 4:8] = 4  # touches the first from below: the same heap, no new beginning
    grid[0, 0, 20:24] = 5  # at the upper edge of the picture
    starts = train.object_starts(grid.flatten(1)).unflatten(1, (24, 24))[0]
    assert starts.nonzero().tolist() == [[0, 20], [5, 7]]


def test_identity_loss_ignores_whether_an_object_begins():
    codes = torch.zeros(1, 576, dtype=torch.long)
    codes[0, 100] = 7
    logits = torch.zeros(1, 576, tokens.CODES)
    even = train.identity_loss(logits, codes)
    assert torch.isclose(even * 576, torch.tensor(float(tokens.CODES - 1)).log())
    logits[:, :, 0] = 30.0  # sure that everything is background
    assert torch.isclose(train.identity_loss(logits, codes), even)
    logits[:, :, 7] = 20.0  # but if something begins, then 7
    assert train.identity_loss(logits, codes) * 576 < 1e-3
