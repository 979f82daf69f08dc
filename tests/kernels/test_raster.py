"""`Raster`: rows, line tokens, what comes before and after; and the policies that go by it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssd_kernels.policies import Raster, margin, raster_of, rows, ssd_guarded, window
from ssd_kernels.policies.profile import HeadProfile

from .shapes import Shape

EMU3 = Raster(6, 5, line_tokens=1, tail=3)
LEADING = Raster(5, 6, line_tokens=2, head=3, tail=1)


def shape_of(raster: Raster) -> Shape:
    return Shape(2, 2, raster.tokens, raster.columns, raster)


@given(rows=st.integers(1, 5), columns=st.integers(1, 5), line_tokens=st.integers(0, 2), head=st.integers(0, 3),
       tail=st.integers(0, 3))
def test_places(rows: int, columns: int, line_tokens: int, head: int, tail: int) -> None:
    """Against the sequence written down."""
    raster = Raster(rows, columns, line_tokens, head, tail)
    line: list[tuple[int, int] | None] = [None] * line_tokens
    expected = [None] * head
    for row in range(rows):
        expected += [(row, column) for column in range(columns)] + line
    expected += [None] * tail
    assert [raster.place(token) for token in range(raster.tokens)] == expected
    assert raster.place(-1) is None and raster.place(raster.tokens) is None


@pytest.mark.parametrize("arguments, error, match", [
    ((0, 3), ValueError, "rows must be at least 1"), ((2, 0), ValueError, "columns must be at least 1, got 0"),
    ((2, 3, -1), ValueError, "line_tokens must be at least 0"), ((2.0, 3), TypeError, "rows must be an int"),
    ((2, 3, 0, -1), ValueError, "head must be"), ((2, 3, 0, 0, True), TypeError, "tail must be an int")])
def test_bad_rasters(arguments: tuple, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        Raster(*arguments)


def test_shapes_without_one() -> None:
    assert raster_of(Shape(1, 1, 36, 6)) == Raster(6, 6)
    assert raster_of(Shape(1, 1, 20, 6)) == Raster(3, 6, tail=2) and raster_of(Shape(1, 1, 4, 6)).tokens == 4
    assert raster_of(shape_of(EMU3)) is EMU3


def profile(shape: Shape) -> HeadProfile:
    stride = raster_of(shape).stride
    head, tokens = (shape.num_layers, shape.num_heads), shape.num_visual_tokens
    sparsity = torch.tensor([[0.1, 0.9], [0.2, 0.8]])
    age = torch.zeros(*head, tokens)
    age[:, 0, :stride], age[:, 1, stride:] = 1 / stride, 1 / (tokens - stride)
    return HeadProfile(
        sparsity=sparsity, prompt_mass=torch.zeros(head), age_mass=age,
        offset_mass=torch.zeros(*head, -(-tokens // stride), 2 * stride - 1), column_mass=torch.zeros(*head, stride),
        first_mass=torch.zeros(*head, stride), place_mass=torch.zeros(*head, 1, tokens),
        guidance_difference=torch.zeros(*head, tokens), error=torch.zeros(*head, 1, 2, 1),
        sensitivity=torch.ones(head[0]), sizes=(4,), kinds=("window", "heavy"), row_buffers=(0,), places=(stride,),
        columns=stride, radius=1)


@pytest.mark.parametrize("raster", [EMU3, LEADING])
def test_policies_take_rows_and_margins_from_it(raster: Raster) -> None:
    shape = shape_of(raster)
    assert window(shape, 0.9).row_buffer == raster.stride
    (heads, _) = rows(shape, 0.9, 0, first_rows=2).layers
    assert heads[0].pinned == tuple(range(raster.head + 2 * raster.stride))[:heads[0].size // 2]
    places = [raster.place(token) for token in range(raster.tokens)]
    marginal = [token for token, place in enumerate(places) if place and place[1] in (0, raster.columns - 1)]
    spatial, semantic = margin(shape, 0.9, 0, profile=profile(shape)).layers[0]
    assert spatial.kind == "window" and semantic.pinned == tuple(marginal)
    guarded = ssd_guarded(shape, 0.9, 0, profile=profile(shape), window_rows=1).layers[0]
    assert [spec.kind for spec in guarded] == ["window", "heavy"]


def test_profiles_of_rasters_are_files(tmp_path) -> None:
    """Also where rows do not divide the picture's tokens; the shape must have the same rows."""
    shape = shape_of(EMU3)
    assert EMU3.tokens % EMU3.stride
    file = tmp_path / "profile.safetensors"
    profile(shape).save(file)
    read = HeadProfile.load(file)
    assert read.check(shape) is read and read.columns == EMU3.stride
    with pytest.raises(ValueError, match=r"columns\) = \(2, 2, 39, 5\), got one with \(2, 2, 39, 6\)"):
        read.check(replace(shape, raster=None))
