"""Plan files and profiles that hold anything: loaded as valid, or refused in one short line within bounds."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from ssd_kernels import CachePlan, HeadSpec
from ssd_kernels.policies import NEED_PROFILE, POLICIES, HeadProfile, head_costs
from ssd_kernels.policies.profile import OPTIONAL, SHARES

from .hostile import LITERALS, damaged_bytes, damaged_values, dumped, load_or_refuse, peak_of, refused
from .test_policies import PROFILES, SMALL

MIB = 2**20
PLAN = CachePlan([[HeadSpec.heavy(4, recent=1), HeadSpec.full(), HeadSpec.heavy(9, 2, "position", pinned=[0, 1, 2, 7])],
                  [HeadSpec.window(5), HeadSpec.heavy(3, score="decayed"), HeadSpec.full()]], row_buffer=4)


def check_plan(plan: CachePlan) -> None:
    """A plan that a mutant gave is one that could have been made and saved."""
    assert CachePlan(plan.layers, plan.row_buffer, plan.keep_prompt) == CachePlan.from_dict(plan.to_dict()) == plan
    assert 0 < plan.budget(10) <= 1


def test_plans_with_damaged_bytes(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)
    found = [load_or_refuse(CachePlan.load, path, data) for data in damaged_bytes(path.read_bytes(), 600)]
    for plan in filter(None, found):
        check_plan(plan)
    assert found.count(None) > 300 and found.count(None) < 600  # blanks do not matter


def test_plans_with_damaged_values(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    data = damaged_values(PLAN.to_dict(), 400)
    found = [load_or_refuse(CachePlan.load, path, dumped(value)) for value in data]
    for plan in filter(None, found):
        check_plan(plan)
    assert 250 < found.count(None) < 400
    for literal in LITERALS:
        text = dumped(PLAN.to_dict()).replace(b'"size": 5', b'"size": ' + literal)
        assert literal == b"\xef\xbb\xbf" or load_or_refuse(CachePlan.load, path, text) is None


def plan_of(layers: object) -> bytes:
    """A plan file with these layers."""
    return dumped({"format": "ssd_kernels.plan", "version": 1, "row_buffer": 4, "keep_prompt": True, "layers": layers})


PINS = {"kind": "heavy", "size": 4, "pinned": [[0, 2**20 - 1]]}
BOMBS: dict[str, tuple[bytes, str]] = {
    "pins": (plan_of([[PINS] * 20] * 20), r"layers\[0\]\[4\].pinned must hold at most 1048576.*4194304"),
    "pins-of-a-head": (plan_of([[{**PINS, "pinned": [[0, 2**62]]}]]), r"layers\[0\]\[0\].pinned.*1048576"),
    "pins-in-parts": (plan_of([[{**PINS, "pinned": [[n * 2**19, (n + 1) * 2**19 - 1] for n in range(3)]}]]),
                      r"layers\[0\]\[0\].pinned.*1048576"),
    "heads": (plan_of([[{"kind": "full"}] * (2**16 + 1)]), "layers must have at most 65536 heads.*65537"),
    "layers": (plan_of([[]] * (2**16 + 1)), "layers must be a list of 1 .. 65536"),
    "layers-times-heads": (plan_of([[0] * 2**9] * (2**7 + 1)), "layers must have at most 65536 heads"),
    "lists": (b"[" + b"[]," * 2**21 + b"[]]", "at most 4194304"),
    "objects": (b'[{"a":0}' + b',{"a":0}' * 2**20 + b"]", "at most 4194304"),
    "escapes": (b'"' + rb"\u0041" * (2**22 + 1) + b'"', "at most 4194304"),
    "bytes": (b" " * (2**25 + 1), "at most 33554432 bytes"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_small_plan_files_make_no_large_plans(tmp_path: Path, name: str) -> None:
    """What a file makes is bounded, whatever it says: pins, heads and values together, not only each for itself."""
    path = tmp_path / "plan.json"
    refused(CachePlan.load, path, *BOMBS[name])
    if name not in ("pins", "heads"):  # tracing what is allowed takes long
        assert peak_of(lambda: CachePlan.load(path)) < 128 * MIB


def test_the_largest_plans_load(tmp_path: Path) -> None:
    """The limits leave room: random pins in every head of a quarter of Janus-Pro-7B, and exactly the limits."""
    draw, path = random.Random(0), tmp_path / "plan.json"
    plan = CachePlan([[HeadSpec.heavy(288, pinned=draw.sample(range(576), 288)) for _ in range(32)] for _ in range(8)])
    plan.save(path)
    assert CachePlan.load(path) == plan and path.stat().st_size < 2**25 / 4
    pinned = [{**PINS, "pinned": [[0, 2**18 - 1]]}] * 16
    path.write_bytes(plan_of([pinned]))
    assert sum(len(head.pinned) for head in CachePlan.load(path).layers[0]) == 2**22
    path.write_bytes(plan_of([[*pinned, {**PINS, "pinned": [[0, 0]]}]]))
    with pytest.raises(ValueError, match=r"layers\[0\]\[16\].pinned"):
        CachePlan.load(path)


def test_plans_are_limited_in_memory_too() -> None:
    """What could not be loaded again is refused when it is made, before memory is filled."""
    with pytest.raises(ValueError, match="65536 heads.*got 10000000000000"):
        CachePlan.uniform(HeadSpec.full(), 10**7, 10**6)
    with pytest.raises(ValueError, match="65536 heads.*got 65537"):
        CachePlan([[HeadSpec.full()] * 65537])
    with pytest.raises(ValueError, match="pin at most 4194304 tokens in all, got 5242880"):
        CachePlan([[HeadSpec.heavy(4, pinned=range(2**20))] * 5])
    with pytest.raises(ValueError, match="pinned must hold at most 1048576"):
        HeadSpec.heavy(4, pinned=iter(int, 1))  # without end


@pytest.fixture(scope="module")
def profile_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("profile") / "profile.safetensors"
    PROFILES[SMALL].save(path)
    return path.read_bytes()


def rebuilt(data: bytes, header: Any) -> bytes:
    """The file with another header."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + int.from_bytes(data[:8], "little"):]


def header_of(data: bytes) -> dict[str, Any]:
    return dict(json.loads(data[8:8 + int.from_bytes(data[:8], "little")]))


def check_profile(profile: HeadProfile) -> None:
    """A profile that a mutant gave serves every policy that needs one, and every row buffer."""
    if all(getattr(profile, name) == getattr(GOOD, name) for name in ("columns", "sizes", "kinds", "row_buffers")):
        return
    for name in NEED_PROFILE:
        plan = POLICIES[name](profile, 1.0, profile=profile)
        assert plan.budget(profile.num_visual_tokens) <= 1
    assert head_costs(plan, profile).min() >= 0 and all(profile.cost(r).isfinite().all() for r in (0, 3, 100))


def test_profiles_with_damaged_bytes(tmp_path: Path, profile_file: bytes) -> None:
    """In the header, which is a twentieth of the file, and anywhere."""
    path, end = tmp_path / "profile.safetensors", 8 + int.from_bytes(profile_file[:8], "little")
    mutants = [*damaged_bytes(profile_file, 300), *(head + profile_file[end:] for head in damaged_bytes(
        profile_file[:end], 300, seed=1))]
    found = [load_or_refuse(HeadProfile.load, path, data) for data in mutants]
    for profile in filter(None, found):
        check_profile(profile)
    assert 300 < found.count(None) < 600


def test_profiles_with_damaged_headers(tmp_path: Path, profile_file: bytes) -> None:
    """Other values in the header, and in the part of it that is the profile's own."""
    path, header = tmp_path / "profile.safetensors", header_of(profile_file)
    own = json.loads(header["__metadata__"]["profile"])
    mutants = list(damaged_values(header, 200))
    for value in damaged_values(own, 250, seed=1, most=1):
        mutants.append({**header, "__metadata__": {**header["__metadata__"], "profile": json.dumps(value)}})
    found = [load_or_refuse(HeadProfile.load, path, rebuilt(profile_file, value)) for value in mutants]
    for profile in filter(None, found):
        check_profile(profile)
    assert 250 < found.count(None) < 450


HEADERS = {
    "nothing": (b"", "safetensors"),
    "no-length": (b"\x10\0\0", "safetensors"),
    "huge-length": (b"\xff" * 8 + b"{}", "header of at most 4194304 bytes, got 18446744073709551615"),
    "beyond-the-file": ((200).to_bytes(8, "little") + b"{}", "header of at most 4194304.*got 200 in a file of 10"),
    "large-header": ((2**22 + 1).to_bytes(8, "little") + b" " * (2**22 + 1), "header of at most 4194304"),
    "no-json": ((2).to_bytes(8, "little") + b"{{", "safetensors"),
    "a-list": ((2).to_bytes(8, "little") + b"[]", "header must be an object"),
    "deep": ((9000).to_bytes(8, "little") + b'{"a":' * 1800, "64 deep"),
    "huge-tensor": (rebuilt(b"\0" * 8, {"__metadata__": {"format": "ssd_kernels.profile", "version": "3"},
                                        "age_mass": {"dtype": "F32", "shape": [2**31, 2**31, 2**31],
                                                     "data_offsets": [0, 2**62]}}), "safetensors"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_headers_of_profiles(tmp_path: Path, name: str) -> None:
    path = tmp_path / "profile.safetensors"
    refused(HeadProfile.load, path, *HEADERS[name])
    assert peak_of(lambda: HeadProfile.load(path)) < 32 * MIB


def test_profiles_are_read_from_files_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero")):
        with pytest.raises(ValueError, match=f"{path}: must be a regular file"):
            HeadProfile.load(path)
        with pytest.raises(ValueError, match=f"{path}: must be a regular file"):
            CachePlan.load(path)


GOOD = PROFILES[SMALL]
BAD_PARTS: dict[str, tuple[dict[str, Any], str]] = {
    "columns-float": ({"columns": 6.0}, "columns must be an int within 1 .. 36, got 6.0"),
    "columns-zero": ({"columns": 0}, "columns must be"),
    "columns-no-divisor": ({"columns": 5}, "column_mass must be"),
    "radius-negative": ({"radius": -1}, "radius must be an int within 0 .. 36, got -1"),
    "radius-string": ({"radius": "1"}, "radius must be"),
    "sizes-strings": ({"sizes": ("1", "3", "6", "12", "20")}, r"sizes\[0\] must be an int.*got '1'"),
    "sizes-zero": ({"sizes": (0, 3, 6, 12, 20)}, r"sizes\[0\] must be an int within 1 .. 36, got 0"),
    "sizes-beyond": ({"sizes": (1, 3, 6, 12, 37)}, r"sizes\[4\] must be"),
    "sizes-falling": ({"sizes": (3, 1, 6, 12, 20)}, "sizes must be ascending"),
    "sizes-equal": ({"sizes": (1, 1, 6, 12, 20)}, "sizes must be ascending"),
    "sizes-none": ({"sizes": ()}, "sizes must be a list of at least 1"),
    "sizes-number": ({"sizes": 5}, "sizes must be a list"),
    "row_buffers-negative": ({"row_buffers": (-1, 6)}, r"row_buffers\[0\] must be"),
    "places-beyond": ({"places": (6, 36)}, r"places\[1\] must be an int within 0 .. 35, got 36"),
    "kinds-unknown": ({"kinds": (*GOOD.kinds[:4], "other")}, r"kinds\[4\] must be one of 'window'.*got 'other'"),
    "kinds-twice": ({"kinds": (*GOOD.kinds[:4], "window")}, "kinds must be different"),
    "kinds-no-heavy": ({"kinds": ("window",), "error": GOOD.error[:, :, :, :1]}, "kinds must be .*heavy"),
    "meta-list": ({"meta": []}, "meta must be an object"),
    "meta-none": ({"meta": None}, "meta must be an object"),
    "age_mass-rank": ({"age_mass": GOOD.age_mass[0]}, "age_mass must be"),
    "no-layers": ({"age_mass": GOOD.age_mass[:0]}, "age_mass must be"),
    "layers-differ": ({"sparsity": GOOD.sparsity[1:]}, r"sparsity must be \[3, 2\], got \[2, 2\]"),
    "error-sizes": ({"sizes": GOOD.sizes[1:]}, r"error must be \[3, 2, 2, 5, 4\]"),
    "sensitivity-negative": ({"sensitivity": -GOOD.sensitivity}, "sensitivity must not be negative"),
    "error-negative": ({"error": -GOOD.error}, "error must not be negative"),
    "guidance-negative": ({"guidance_difference": -GOOD.guidance_difference}, "guidance_difference must not"),
    "error-infinite": ({"error": GOOD.error / 0}, "error must be finite"),
    "place_mass-double": ({"place_mass": GOOD.place_mass.double()}, "place_mass must be float32, got torch.float64"),
    **{f"{name}-{kind}": ({name: change(getattr(GOOD, name))}, f"{name} must {words}")
       for name in SHARES for kind, change, words in (
           ("negative", lambda t: t - 1, "not be negative"), ("large", lambda t: t + 1.02, "be shares"),
           ("nan", lambda t: t * float("nan"), "be finite"), ("rank", lambda t: t[None], "be "))},
    **{f"{name}-{dtype}": ({name: getattr(GOOD, name).to(dtype)}, f"{name} must be float32, got {dtype}")
       for name in ("age_mass", "sensitivity", "error") for dtype in (torch.float64, torch.float16, torch.int32)},
}


@pytest.mark.parametrize("name", BAD_PARTS)
def test_profiles_that_nothing_measures(tmp_path: Path, name: str) -> None:
    """Wrong types, shapes or values are refused by the part's name."""
    changes, words = BAD_PARTS[name]
    path = tmp_path / "profile.safetensors"
    replace(GOOD, **changes).save(path)
    refused(HeadProfile.load, path, path.read_bytes(), f"profile.safetensors: {words}")


def test_profiles_hold_what_they_should_and_nothing_else(tmp_path: Path, profile_file: bytes) -> None:
    path, header = tmp_path / "profile.safetensors", header_of(profile_file)
    tensors = {name: value for name, value in vars(GOOD).items() if isinstance(value, torch.Tensor)}
    own = json.loads(header["__metadata__"]["profile"])

    def load(changed: dict[str, torch.Tensor], profile: object, **more: str) -> None:
        text = {**header["__metadata__"], "profile": json.dumps(profile), **more}
        refused(HeadProfile.load, path, save(changed, text), words)

    for name in tensors.keys() - OPTIONAL:
        words = f"{name} is missing"
        load({other: value for other, value in tensors.items() if other != name}, own)
    words = "unknown field 'extra'"
    load({**tensors, "extra": torch.zeros(1)}, own)
    load(tensors, {**own, "extra": 1})
    for name in own:
        words = f"{name} is missing"
        load(tensors, {other: value for other, value in own.items() if other != name})
    words = "must be an object"
    load(tensors, [own])
    words = "version 3, got 'ssd_kernels.profile', version '4'"
    load(tensors, own, version="4")
