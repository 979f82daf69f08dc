"""Policies: the budget is used up and never exceeded, at equal bytes, and every head gets what its policy says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ssd_kernels import CachePlan, HeadSpec, policies
from ssd_kernels.layout import LayerLayout
from ssd_kernels.policies import NEED_PROFILE, POLICIES, HeadProfile

from .shapes import Shape

JANUS, SMALL = Shape(24, 16, 576, 24), Shape(3, 2, 36, 6)
SIZES = {576: (4, 16, 48, 96, 192, 288), 36: (1, 3, 6, 12, 20)}
KINDS = tuple(policies.KINDS)


def profile_of(shape: Shape, seed: int = 0) -> HeadProfile:
    """Random but plausible: attention falls with age at a rate of its own in every head, errors fall with size."""
    generator = torch.Generator().manual_seed(seed)
    head, tokens, columns = (shape.num_layers, shape.num_heads), shape.num_visual_tokens, shape.columns
    rate = torch.rand(*head, generator=generator)
    age = (-rate[..., None] * torch.arange(tokens) / 8).softmax(-1)
    sizes = SIZES[tokens]
    fall = 1 / torch.tensor(sizes) ** 0.7
    noise = 0.5 + torch.rand(*head, 1, len(KINDS), 1, generator=generator)
    # Without a row buffer fewer tokens are there, and more is lost.
    error = rate.flip(0)[..., None, None, None] ** 3 * noise * fall * torch.tensor([1.5, 1.0])[:, None, None]
    offset = torch.rand(*head, tokens // columns, 2 * columns - 1, generator=generator)
    return HeadProfile(
        sparsity=torch.rand(head, generator=generator), prompt_mass=torch.rand(head, generator=generator),
        age_mass=age, offset_mass=offset / offset.sum((2, 3), keepdim=True),
        column_mass=torch.full((*head, columns), 1 / columns), first_mass=torch.full((*head, columns), 1e-3),
        place_mass=torch.full((*head, 2, tokens), 1 / tokens),
        guidance_difference=torch.rand(*head, tokens, generator=generator), error=error,
        sensitivity=0.5 + torch.rand(shape.num_layers, generator=generator), sizes=sizes, kinds=KINDS,
        row_buffers=(0, columns), places=(columns, tokens - 2), columns=columns, radius=1, meta={"prompts": ["a", "b"]},
        int8_error=1e-6 * torch.rand(head, generator=generator))


PROFILES = {JANUS: profile_of(JANUS), SMALL: profile_of(SMALL)}


def build(name: str, shape: Shape, budget: float, row_buffer: int | None = None, **options: object) -> CachePlan:
    profile = PROFILES[shape] if name in NEED_PROFILE else None
    return policies.build(name, shape, budget, row_buffer, profile=profile, **options)


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"full"}))
@pytest.mark.parametrize("row_buffer", [None, 0, 7, 24])
@pytest.mark.parametrize("budget", [0.05, 0.1, 0.2, 1 / 3, 0.9, 1.0])
@pytest.mark.parametrize("shape", [JANUS, SMALL], ids=["janus", "small"])
def test_budgets_are_used_up_and_never_exceeded(name: str, row_buffer: int | None, budget: float,
                                                shape: Shape) -> None:
    try:
        plan = build(name, shape, budget, row_buffer)
    except ValueError as error:
        smallest = float(str(error).split("at least ")[1].split()[0])
        assert smallest > budget
        assert build(name, shape, smallest, row_buffer).budget(shape.num_visual_tokens) > budget
        return
    got = plan.budget(shape.num_visual_tokens)
    # Equal bytes: less than one slot per head on average below what was asked for.
    assert budget - 1.01 / shape.num_visual_tokens < got <= budget + 1e-9
    assert plan.row_buffer == (shape.columns if row_buffer is None else row_buffer)
    assert (plan.num_layers, plan.num_heads) == (shape.num_layers, shape.num_heads)


@pytest.mark.parametrize("budget, row_buffer, kv_format", [
    *((budget, row_buffer, "auto") for budget in (0.1, 0.15, 0.2, 0.3, 0.5) for row_buffer in (0, 24)),
    (0.1, 0, "int8"), (0.1, 24, "int8")])
def test_policies_have_equal_bytes(budget: float, row_buffer: int, kv_format: str) -> None:
    """Keys and values within one slot per head on average of what was asked for; scores and positions besides."""
    options = {"batch_size": 2, "head_dim": 128, "max_prompt": 16, "dtype": torch.bfloat16}
    heads, full = 24 * 16, 2 * 2 * 128 * 2 * 576
    slot = 2 * 2 * (128 * 2 if kv_format == "auto" else 128 + 4)  # of two rows
    asked = heads * (budget * full + 16 * slot)
    for name in sorted(set(POLICIES) - {"full"}):
        plan = build(name, JANUS, None, row_buffer, byte_budget=budget, dtype=torch.bfloat16, kv_format=kv_format)
        scored = sum(LayerLayout.build(layer, plan, 16, 576).scored_slots for layer in plan.layers)
        # Table, mask and cursors, a few words per head; 8 bytes per scored slot and row, one part in 64 of its tokens.
        besides = 24 * (16 * 4 * (8 + 18) + 2 * 8) + 2 * 8 * scored
        assert 0 <= scored <= heads * (budget * full / slot + 16)
        slabs = plan.nbytes(**options) - besides
        assert asked - heads * slot < slabs <= asked + 1, name


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("kv_format, dtype, share", [
    ("int8", torch.float32, 132 / 512), ("int8", torch.bfloat16, 132 / 256), ("auto", torch.bfloat16, 1.0)])
def test_budgets_in_bytes_are_budgets_in_tokens(name: str, kv_format: str, dtype: torch.dtype, share: float) -> None:
    """The same heads as at as many tokens, and every token where the bytes suffice for all; errors speak of bytes."""
    options = {"dtype": dtype, "kv_format": kv_format}
    for row_buffer in (0, 6):
        for byte_budget in (0.02, 0.1, 0.3, 0.6, 1.0):
            tokens = min(1.0, byte_budget / share)
            try:
                expected = build(name, SMALL, tokens, row_buffer)
            except policies.BudgetTooSmall as error:
                with pytest.raises(policies.BudgetTooSmall, match=r"^byte_budget must be at least .*, kv_format="
                                                                  rf"'{kv_format}', .* got {byte_budget}$") as refused:
                    build(name, SMALL, None, row_buffer, byte_budget=byte_budget, **options)
                assert byte_budget < refused.value.smallest == pytest.approx(error.smallest * share)
                told = float(str(refused.value).split("at least ")[1].split()[0])
                build(name, SMALL, None, row_buffer, byte_budget=told, **options)
                continue
            plan = build(name, SMALL, None, row_buffer, byte_budget=byte_budget, **options)
            assert (plan.layers, plan.row_buffer) == (expected.layers, expected.row_buffer)
            assert plan.kv_format == kv_format and expected.kv_format == "auto"
            got = plan.byte_budget(36, head_dim=128, dtype=dtype)
            unused = 0 if tokens < 1 else byte_budget - share
            assert byte_budget - unused - 1.01 * share / 36 < got <= byte_budget + 1e-9


def test_a_format_of_a_budget_in_tokens_changes_nothing_else() -> None:
    for name in POLICIES:
        plan, budget = build(name, SMALL, 1.0 if name == "full" else 0.5), 1.0 if name == "full" else 0.5
        stored = build(name, SMALL, budget, kv_format="int8")
        assert stored.kv_format == "int8" and stored != plan
        assert (stored.layers, stored.row_buffer, stored.keep_prompt) == (plan.layers, plan.row_buffer, True)


def test_the_best_format_is_the_one_predicted_to_cost_less() -> None:
    profile, options = PROFILES[SMALL], {"dtype": torch.float32, "kv_format": "best"}
    costly = replace(profile, int8_error=1e3 * torch.ones(3, 2))
    for name in ("adaptive", "h2o"):
        for byte_budget in (0.2, 0.5, 1.0):
            for heads in (profile, costly):
                both = [policies.build(name, SMALL, None, 0, byte_budget=byte_budget, dtype=torch.float32,
                                       kv_format=each, profile=heads) for each in ("auto", "int8")]
                costs = [policies.predicted_cost(plan, heads) for plan in both]
                best = policies.build(name, SMALL, None, 0, byte_budget=byte_budget, profile=heads, **options)
                assert best == both[costs.index(min(costs))]
                # More tokens in 8 bits, unless 8 bits cost much or all tokens fit as they are.
                assert best.kv_format == ("int8" if heads is profile and byte_budget < 1 else "auto")
    # 6 of 36 slots are needed for the row buffer alone, of which 8 bits take .26 of the bytes.
    assert policies.build("adaptive", SMALL, None, 6, byte_budget=0.1, profile=costly, **options).kv_format == "int8"
    with pytest.raises(policies.BudgetTooSmall, match="byte_budget must be at least 0.0502 .*'int8'.* got 0.02"):
        policies.build("adaptive", SMALL, None, 6, byte_budget=0.02, profile=profile, **options)


@pytest.mark.parametrize("changes, error, message", [
    ({"budget": 0.2}, ValueError, "must be given, and not both, got budget=0.2 and byte_budget=0.2"),
    ({"byte_budget": None}, ValueError, "must be given, and not both, got budget=None and byte_budget=None"),
    ({"byte_budget": 1.2}, ValueError, r"byte_budget must be within \(0, 1\], got 1.2"),
    ({"byte_budget": "5%"}, TypeError, "byte_budget must be a number, got '5%'"),
    ({"dtype": None}, TypeError, "dtype must be the torch.dtype of the model's caches.* got None"),
    ({"dtype": "bfloat16"}, TypeError, "dtype must be the torch.dtype .* got 'bfloat16'"),
    ({"kv_format": "int4"}, ValueError, "kv_format must be one of 'auto', 'int8', 'best', got 'int4'"),
    ({"kv_format": 8}, ValueError, "kv_format must be one of 'auto', 'int8', 'best', got 8"),
    ({"kv_format": "best"}, ValueError, "kv_format='best' needs a profile of the model's heads, got None"),
    ({"kv_format": "best", "byte_budget": None, "budget": 0.2}, ValueError, "kv_format='best' needs byte_budget"),
    ({"kv_format": "best", "profile": PROFILES[SMALL]}, ValueError, "profile must be of a model with"),
    ({"kv_format": "best", "profile": replace(PROFILES[JANUS], int8_error=None)}, ValueError,
     "needs a profile that says what storage in 8 bits costs"),
    ({"shape": PROFILES[JANUS]}, TypeError, "shape.head_dim must be an int, got None"),
])
def test_bad_budgets_in_bytes(changes: dict, error: type[Exception], message: str) -> None:
    options = {"shape": JANUS, "byte_budget": 0.2, "dtype": torch.bfloat16, **changes}
    with pytest.raises(error, match=message):
        policies.build("window", **options)


def specs(plan: CachePlan) -> list[HeadSpec]:
    return [spec for heads in plan.layers for spec in heads]


def test_uniform_policies_say_what_they_keep() -> None:
    assert {spec.size for spec in specs(build("window", JANUS, 0.2))} == {91}
    assert set(specs(build("heavy", JANUS, 0.2))) == {HeadSpec.heavy(91, recent=45, score="mean")}
    assert set(specs(build("h2o", JANUS, 0.2))) == {HeadSpec.heavy(91, recent=45)}
    assert set(specs(build("decayed", JANUS, 0.2))) == {HeadSpec.heavy(91, recent=45, score="decayed")}
    assert set(specs(build("h2o", JANUS, 0.2, recent=0.25))) == {HeadSpec.heavy(91, recent=22)}
    assert set(specs(build("streaming_llm", JANUS, 0.2))) == {HeadSpec.heavy(91, score="position", pinned=range(4))}
    assert set(specs(build("rows", JANUS, 0.2))) == {HeadSpec.heavy(91, score="position", pinned=range(24))}
    draws = specs(build("random", SMALL, 0.5))
    assert len(set(draws)) == len(draws) and draws == specs(build("random", SMALL, 0.5))
    assert draws != specs(build("random", SMALL, 0.5, seed=1))
    assert all(len(spec.pinned) == spec.size - 1 for spec in draws)


def test_ssd_types_heads_by_their_score() -> None:
    profile = PROFILES[JANUS]
    for tau in (None, 0.2, 0.7):
        plan = build("ssd", JANUS, 0.2, tau=tau)
        semantic = profile.sparsity > (profile.sparsity.median() if tau is None else tau)
        assert [spec.kind == "heavy" for spec in specs(plan)] == semantic.flatten().tolist()
        windows = {spec.size for spec in specs(plan) if spec.kind == "window"}
        heavies = {(spec.size, spec.recent, spec.score) for spec in specs(plan) if spec.kind == "heavy"}
        (w,), ((m, recent, score),) = windows, heavies
        assert 3 * w <= m < 3 * w + 3 and (recent, score) == (0, "sum")
    assert all(spec.kind == "window" for spec in specs(build("ssd", JANUS, 0.2, tau=1.0)))


def test_ssd_guarded_types_heads_by_what_a_window_misses() -> None:
    plan = build("ssd_guarded", JANUS, 0.2, loss=0.3)
    missed = 1 - PROFILES[JANUS].age_mass[..., :48].sum(-1)
    assert [spec.kind == "heavy" for spec in specs(plan)] == (missed > 0.3).flatten().tolist()
    assert {(spec.recent, spec.score) for spec in specs(plan) if spec.kind == "heavy"} == {(45, "mean")}


def test_margin_pins_the_margins_of_semantic_heads() -> None:
    kinds = {spec.kind: spec for spec in specs(build("margin", JANUS, 0.2, left=1, right=2))}
    assert kinds["window"].size == kinds["heavy"].size == 91
    assert {token % 24 for token in kinds["heavy"].pinned} == {0, 22, 23} and len(kinds["heavy"].pinned) == 72


def predicted(plan: CachePlan, profile: HeadProfile) -> float:
    """The total cost of a plan of the cheapest kinds by linear interpolation, computed head by head."""
    total, index = 0.0, profile.row_buffers.index(plan.row_buffer)
    for layer, heads in enumerate(plan.layers):
        for head, spec in enumerate(heads):
            sizes = [*profile.sizes, profile.num_visual_tokens]
            size = sizes[-1] if spec.size is None else spec.size
            least = profile.error[layer, head, index].amin(0) * profile.sensitivity[layer]
            errors = [*least.tolist(), 0.0]
            for (a, e), (b, f) in zip(zip(sizes, errors, strict=True), zip(sizes[1:], errors[1:], strict=True),
                                      strict=False):
                if a <= size <= b:
                    total += e + (f - e) * (size - a) / (b - a)
                    break
    return total


@pytest.mark.parametrize("shape", [JANUS, SMALL], ids=["janus", "small"])
def test_adaptive_predicts_less_error_than_equal_shares(shape: Shape) -> None:
    profile = PROFILES[shape]
    for budget in (0.25, 0.4):
        ours, even = build("adaptive", shape, budget), build("window", shape, budget)
        assert policies.predicted_cost(ours, profile) < policies.predicted_cost(even, profile)
        assert predicted(ours, profile) < predicted(even, profile)
        sizes = {spec.size for spec in specs(ours)}
        assert len(sizes) > 1


def test_adaptive_is_optimal_on_a_small_problem() -> None:
    """Against every division of the slots, on convex curves."""
    shape = Shape(1, 2, 36, 6)
    sizes = (1, 2, 3, 4, 5, 6, 7)
    curves = torch.tensor([[8.0, 4, 2, 1, 0.5, 0.3, 0.2], [9.0, 8, 7, 6, 5.5, 5.2, 5.1]])
    profile = replace(profile_of(shape), error=curves[None, :, None, None].repeat(1, 1, 2, len(KINDS), 1), sizes=sizes)
    plan = policies.adaptive(shape, 10 / 72, 0, profile=profile)
    got = [spec.size for spec in plan.layers[0]]
    total = [(curves[0, a] + curves[1, b], a, b) for a in range(7) for b in range(7)
             if sizes[a] + 1 + sizes[b] + 1 <= 10]
    best = min(float(error) for error, _, _ in total)
    assert float(curves[0, got[0] - 1] + curves[1, got[1] - 1]) == pytest.approx(best)


def test_adaptive_takes_the_kind_with_the_least_error() -> None:
    profile = PROFILES[SMALL]
    error = torch.ones_like(profile.error)
    for layer in range(3):
        for head in range(2):
            error[layer, head, :, (layer + 2 * head) % len(KINDS)] = 0.5
    error = error / torch.tensor(profile.sizes)
    plan = policies.adaptive(SMALL, 0.4, 6, profile=replace(profile, error=error))
    for layer, heads in enumerate(plan.layers):
        for head, spec in enumerate(heads):
            kind = KINDS[(layer + 2 * head) % len(KINDS)]
            assert spec.kind == ("window" if kind == "window" else "heavy")
            scores = {"first": "position", "heavy": "mean", "sum": "sum", "decayed": "decayed"}
            assert kind == "window" or spec.score == scores[kind]


def test_adaptive_goes_by_the_row_buffer_and_by_what_layers_cost() -> None:
    """Two heads in two layers: whoever's error costs more gets more."""
    shape = Shape(2, 1, 36, 6)
    profile = profile_of(shape)
    curve = 1 / torch.tensor(profile.sizes)
    error = curve.expand(2, 1, 2, len(KINDS), -1).clone()
    error[0, :, 1] *= 9  # with a row buffer of 6, layer 0 loses more ...
    error[1, :, 0] *= 9  # ... and without one layer 1
    profile = replace(profile, error=error, sensitivity=torch.ones(2))

    def sizes(row_buffer: int, profile: HeadProfile) -> list[int]:
        return [heads[0].size or 36 for heads in policies.adaptive(shape, 0.4, row_buffer, profile=profile).layers]

    assert sizes(6, profile)[0] > sizes(6, profile)[1] and sizes(0, profile)[0] < sizes(0, profile)[1]
    costly = replace(profile, sensitivity=torch.tensor([1.0, 100.0]))
    assert sizes(6, costly)[0] < sizes(6, costly)[1]


def test_cost_between_and_outside_of_measured_row_buffers() -> None:
    profile = PROFILES[SMALL]
    weight = profile.sensitivity.double()[:, None, None, None]
    none, row = profile.error[:, :, 0].double() * weight, profile.error[:, :, 1].double() * weight
    for row_buffer, expected in ((0, none), (6, row), (2, (2 * none + row) / 3), (48, row)):
        assert torch.allclose(profile.cost(row_buffer), expected)


def test_predicted_cost_adds_up_heads() -> None:
    profile = PROFILES[SMALL]
    cost = profile.cost(0)
    for kind, make in enumerate(policies.KINDS.values()):
        plan = CachePlan.uniform(make(3), 3, 2)
        assert policies.predicted_cost(plan, profile) == pytest.approx(float(cost[:, :, kind, 1].sum()))
    between = policies.predicted_cost(CachePlan.uniform(HeadSpec.window(28), 3, 2), profile)
    assert between == pytest.approx(float(cost[:, :, 0, 4].sum()) / 2)
    assert policies.predicted_cost(CachePlan.uniform(HeadSpec.full(), 3, 2), profile) == 0


def test_profiles_without_a_newer_kind_still_serve() -> None:
    """A profile made before "decayed" was a kind: `adaptive` chooses among the others, and it counts as "heavy"."""
    older = replace(PROFILES[SMALL], kinds=KINDS[:4], error=PROFILES[SMALL].error[:, :, :, :4])
    assert all(spec.score != "decayed" for spec in specs(policies.adaptive(SMALL, 0.4, 6, profile=older)))
    costs = [policies.predicted_cost(CachePlan.uniform(policies.KINDS[kind](3), 3, 2), older)
             for kind in ("decayed", "heavy", "sum")]
    assert costs[0] == costs[1] != costs[2]


def test_full_keeps_everything() -> None:
    plan = policies.build("full", JANUS, 1.0)
    assert plan.budget(576) == 1 and plan.row_buffer == 0
    with pytest.raises(ValueError, match="budget must be at least 1 for policy full, which keeps every token, got 0.2"):
        policies.full(JANUS, 0.2)


def test_profiles_are_saved_and_checked(tmp_path: Path) -> None:
    profile, path = PROFILES[SMALL], tmp_path / "profile.safetensors"
    profile.save(path)
    again = HeadProfile.load(path)
    for name, value in vars(profile).items():
        other = getattr(again, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name
    assert [entry.name for entry in tmp_path.iterdir()] == ["profile.safetensors"]
    with pytest.raises(FileNotFoundError, match="absent"):
        HeadProfile.load(tmp_path / "absent")
    path.write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="profile.safetensors"):
        HeadProfile.load(path)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, path, {"format": "other"})
    with pytest.raises(ValueError, match="format ssd_kernels.profile, version 3, got 'other'"):
        HeadProfile.load(path)
    replace(profile, age_mass=profile.age_mass * float("nan")).save(path)
    with pytest.raises(ValueError, match="age_mass must be finite"):
        HeadProfile.load(path)
    replace(profile, error=profile.error[..., :-1]).save(path)
    with pytest.raises(ValueError, match=r"error must be \[3, 2, 2, 5, 5\]"):
        HeadProfile.load(path)
    for wrong, message in ((torch.zeros(3, 1), r"int8_error must be \[3, 2\], got \[3, 1\]"),
                           (-torch.ones(3, 2), "int8_error must not be negative")):
        replace(profile, int8_error=wrong).save(path)
        with pytest.raises(ValueError, match=message):
            HeadProfile.load(path)
    replace(profile, int8_error=None).save(path)
    older = HeadProfile.load(path)
    assert older.int8_error is None and not older.int8_cost.any()


@pytest.mark.parametrize("name, options, error, message", [
    ("window", {"budget": 0}, ValueError, r"budget must be within \(0, 1\], got 0"),
    ("window", {"budget": float("nan")}, ValueError, "budget must be within"),
    ("window", {"budget": "20%"}, TypeError, "budget must be a number"),
    ("window", {"row_buffer": -1}, ValueError, "row_buffer must be at least 0"),
    ("window", {"row_buffer": 2.5}, TypeError, "row_buffer must be an int"),
    ("heavy", {"budget": 0.03}, ValueError, "budget must be at least 0.0435 with row_buffer=24"),
    ("adaptive", {"budget": 0.03}, ValueError, "budget must be at least 0.0487 with row_buffer=24"),
    ("paper", {}, ValueError, "policy must be one of full, window, .*adaptive, got 'paper'"),
    ("h2o", {"recent": 1.5}, ValueError, "recent must be within 0 .. 1, got 1.5"),
    ("ssd", {"tau": -1}, ValueError, "tau must be within 0 .. 1, got -1"),
    ("ssd", {"ratio": 0}, ValueError, "ratio must be within"),
    ("margin", {"left": 20, "right": 9}, ValueError, "left and right must be .* at most 24, got 20, 9"),
    ("margin", {"left": -1}, ValueError, "left must be at least 0, got -1"),
    ("margin", {"left": 1.5}, TypeError, "left must be an int"),
    ("ssd", {"ratio": "a"}, TypeError, "ratio must be a number, got 'a'"),
    ("ssd_guarded", {"window_rows": -3}, ValueError, "window_rows must be within 0 .. 24, got -3"),
    ("ssd_guarded", {"window_rows": "x"}, TypeError, "window_rows must be a number, got 'x'"),
    ("ssd_guarded", {"loss": 7}, ValueError, "loss must be within 0 .. 1, got 7"),
    ("streaming_llm", {"first": -1}, ValueError, "first must be"),
])
def test_bad_arguments(name: str, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(name, JANUS, **{"budget": 0.2, **options})


def test_profiles_must_fit() -> None:
    for name in sorted(NEED_PROFILE):
        with pytest.raises(TypeError, match="profile must be a HeadProfile, got None"):
            POLICIES[name](JANUS, 0.2, profile=None)
    with pytest.raises(ValueError, match="policy ssd needs a profile"):
        policies.build("ssd", JANUS, 0.2)
    with pytest.raises(ValueError, match=r"profile must be of a model with .* = \(24, 16, 576, 24\), got one with"):
        policies.build("ssd", JANUS, 0.2, profile=PROFILES[SMALL])


def test_head_costs_are_each_heads_own() -> None:
    profile = PROFILES[SMALL]
    cost, chosen = profile.cost(6), [
        [HeadSpec.window(3), HeadSpec.full()], [HeadSpec.heavy(6, score="position"), HeadSpec.heavy(6)],
        [HeadSpec.heavy(12, recent=3), HeadSpec.heavy(1, score="decayed")]]
    plan = CachePlan(chosen, 6)
    kinds = [[policies.kind_of(spec, profile) for spec in heads] for heads in chosen]
    assert kinds == [["window", "sum"], ["first", "sum"], ["heavy", "decayed"]]
    expected = [[cost[0, 0, 0, 1], 0], [cost[1, 0, 1, 2], cost[1, 1, 3, 2]], [cost[2, 0, 2, 3], cost[2, 1, 4, 0]]]
    found = policies.head_costs(plan, profile)
    assert found.dtype == torch.float64
    assert torch.equal(found, torch.tensor(expected, dtype=torch.float64))
    assert policies.predicted_cost(plan, profile) == pytest.approx(float(sum(map(sum, expected))), rel=1e-12)


def test_8_bits_cost_every_head_its_own_besides() -> None:
    profile = PROFILES[SMALL]
    plan = CachePlan([[HeadSpec.window(3), HeadSpec.full()]] * 3, 6)
    stored = replace(plan, kv_format="int8")
    added = policies.head_costs(stored, profile) - policies.head_costs(plan, profile)
    assert torch.allclose(added, profile.int8_error.double() * profile.sensitivity.double()[:, None], rtol=1e-9, atol=0)
    assert (added > 0).all() and len(added.unique()) == added.numel()
    older = replace(profile, int8_error=None)
    assert policies.predicted_cost(stored, older) == policies.predicted_cost(plan, profile)


@pytest.mark.parametrize("layers, heads", [(2, 2), (4, 2), (3, 1), (3, 3)])
def test_head_costs_need_a_profile_of_the_plans_heads(layers: int, heads: int) -> None:
    plan = CachePlan.uniform(HeadSpec.window(3), layers, heads)
    for predict in (policies.head_costs, policies.predicted_cost):
        with pytest.raises(ValueError, match=f"plan must have the profile's 3 layers x 2 KV heads, got {layers} layers "
                                             f"x {heads} KV heads"):
            predict(plan, PROFILES[SMALL])
