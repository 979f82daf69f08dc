"""Plan files: round trips, refusal of damage, and saving all or nothing."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from ssd_kernels import CachePlan, HeadSpec

from .cases import MIX, mixed
from .test_plan import PLANS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plans")


@given(plan=PLANS)
def test_round_trip(folder: Path, plan: CachePlan) -> None:
    """`CachePlan.load` gives back what `save` was given; str and Path alike."""
    plan.save(folder / "plan.json")
    assert CachePlan.load(str(folder / "plan.json")) == plan


def test_file_is_plain_versioned_json(tmp_path: Path) -> None:
    """"plain JSON, versioned": readable and writable without this package."""
    mixed(8, row_buffer=24).save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert data["version"] == 1 and data["row_buffer"] == 24 and data["keep_prompt"] is True
    assert data["layers"][0][:3] == [{"kind": "heavy", "size": 4, "recent": 1, "score": "sum"},
                                     {"kind": "window", "size": 5}, {"kind": "full"}]


def test_pinned_tokens_are_written_as_ranges(tmp_path: Path) -> None:
    """`pinned` stands in a file only where there is something to say, as inclusive ranges."""
    plan = CachePlan([[HeadSpec.heavy(4, pinned=[7, 0, 1, 2, 9, 10]), HeadSpec.heavy(4, score="position"),
                       HeadSpec.heavy(1, pinned=[5])]])
    plan.save(tmp_path / "plan.json")
    heads = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))["layers"][0]
    assert heads[0] == {"kind": "heavy", "size": 4, "recent": 0, "score": "sum", "pinned": [[0, 2], [7, 7], [9, 10]]}
    assert heads[1] == {"kind": "heavy", "size": 4, "recent": 0, "score": "position"}
    assert heads[2]["pinned"] == [[5, 5]]
    assert CachePlan.load(tmp_path / "plan.json") == plan
    # Not as `save` writes them, but as clear: empty, or ranges that touch.
    for ranges, pinned in (([], ()), ([[0, 1], [2, 3]], (0, 1, 2, 3)), ([[10**12, 10**12]], (10**12,))):
        assert HeadSpec.from_dict({"kind": "heavy", "size": 4, "pinned": ranges}) == HeadSpec.heavy(4, pinned=pinned)


GOOD: dict[str, Any] = {"format": "ssd_kernels.plan", "version": 1, "row_buffer": 4, "keep_prompt": True,
                        "layers": [[{"kind": "heavy", "size": 4, "recent": 1, "score": "sum"}, {"kind": "full"}],
                                   [{"kind": "window", "size": 5}, {"kind": "full"}]]}


def _set(path: str, value: object) -> Callable[[dict[str, Any]], object]:
    def damage(data: dict[str, Any]) -> object:
        *way, last = [int(step) if step.isdigit() else step for step in path.split(".")]
        place: Any = data
        for step in way:
            place = place[step]
        place[last] = value
        return data
    return damage


def _drop(path: str) -> Callable[[dict[str, Any]], object]:
    def damage(data: dict[str, Any]) -> object:
        *way, last = [int(step) if step.isdigit() else step for step in path.split(".")]
        place: Any = data
        for step in way:
            place = place[step]
        del place[last]
        return data
    return damage


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "version-2": (_set("version", 2), "version.*1.*2"),
    "version-string": (_set("version", "1"), "version"),
    "version-bool": (_set("version", True), "version"),
    "version-missing": (_drop("version"), "version"),
    "format-other": (_set("format", "other"), "format"),
    "format-missing": (_drop("format"), "format"),
    "layers-missing": (_drop("layers"), "layers"),
    "layers-empty": (_set("layers", []), "layers"),
    "layers-object": (_set("layers", {}), "layers"),
    "layers-flat": (_set("layers", [{"kind": "full"}]), "layers"),
    "layers-string": (_set("layers.0", "full"), "layers"),
    "layers-ragged": (_drop("layers.1.1"), "layers.*layer 1 has 1"),
    "spec-null": (_set("layers.0.0", None), r"layers\[0\]\[0\].*object.*None"),
    "spec-list": (_set("layers.0.0", []), r"layers\[0\]\[0\].*object.*\[\]"),
    "spec-unknown-field": (_set("layers.0.0.weight", 3), "weight"),
    "kind-unknown": (_set("layers.0.0.kind", "sparse"), "kind.*sparse"),
    "kind-missing": (_drop("layers.0.0.kind"), "kind"),
    "kind-list": (_set("layers.0.0.kind", ["full"]), "kind"),
    "M-zero": (_set("layers.0.0.size", 0), "size.*0"),
    "M-negative": (_set("layers.0.0.size", -1), "size.*-1"),
    "M-float": (_set("layers.0.0.size", 4.0), "size.*4.0"),
    "M-bool": (_set("layers.0.0.size", True), "size.*True"),
    "M-string": (_set("layers.0.0.size", "4"), "size.*'4'"),
    "M-null": (_set("layers.0.0.size", None), "size.*None"),
    "M-missing": (_drop("layers.0.0.size"), "size"),
    "W-negative": (_set("layers.1.0.size", -1), "size.*-1"),
    "full-sized": (_set("layers.0.1.size", 4), "size.*4"),
    "recent-above-M": (_set("layers.0.0.recent", 5), "recent.*5"),
    "recent-negative": (_set("layers.0.0.recent", -1), "recent.*-1"),
    "recent-of-window": (_set("layers.1.0.recent", 2), "recent"),
    "score-unknown": (_set("layers.0.0.score", "max"), "score.*max"),
    "score-null": (_set("layers.0.0.score", None), "score.*None"),
    "pinned-null": (_set("layers.0.0.pinned", None), "pinned.*None"),
    "pinned-number": (_set("layers.0.0.pinned", 3), "pinned.*3"),
    "pinned-string": (_set("layers.0.0.pinned", "03"), "pinned.*'03'"),
    "pinned-object": (_set("layers.0.0.pinned", {"0": 3}), "pinned"),
    "pinned-flat": (_set("layers.0.0.pinned", [0, 3]), r"pinned\[0\].*first, last.*0"),
    "pinned-single": (_set("layers.0.0.pinned", [[0]]), r"pinned\[0\].*first, last"),
    "pinned-triple": (_set("layers.0.0.pinned", [[0, 1, 2]]), r"pinned\[0\].*first, last"),
    "pinned-strings": (_set("layers.0.0.pinned", ["03"]), r"pinned\[0\].*first, last.*'03'"),
    "pinned-first-float": (_set("layers.0.0.pinned", [[0.0, 1]]), r"pinned\[0\].*0.0"),
    "pinned-last-bool": (_set("layers.0.0.pinned", [[0, True]]), r"pinned\[0\].*True"),
    "pinned-last-null": (_set("layers.0.0.pinned", [[0, None]]), r"pinned\[0\].*None"),
    "pinned-negative": (_set("layers.0.0.pinned", [[-1, 1]]), r"pinned\[0\].*-1"),
    "pinned-backwards": (_set("layers.0.0.pinned", [[3, 2]]), r"pinned\[0\].*2"),
    "pinned-overlap": (_set("layers.0.0.pinned", [[0, 3], [3, 5]]), r"pinned\[1\].*4.*3"),
    "pinned-order": (_set("layers.0.0.pinned", [[7, 8], [3, 5]]), r"pinned\[1\].*9.*3"),
    "pinned-huge": (_set("layers.0.0.pinned", [[0, 10**15]]), "pinned.*1048576"),
    "pinned-of-window": (_set("layers.1.0.pinned", [[0, 3]]), "pinned.*heavy"),
    "pinned-of-full": (_set("layers.0.1.pinned", [[0, 3]]), "pinned.*heavy"),
    "row_buffer-negative": (_set("row_buffer", -1), "row_buffer.*-1"),
    "row_buffer-float": (_set("row_buffer", 24.0), "row_buffer.*24.0"),
    "row_buffer-missing": (_drop("row_buffer"), "row_buffer"),
    "keep_prompt-string": (_set("keep_prompt", "yes"), "keep_prompt.*yes"),
    "keep_prompt-number": (_set("keep_prompt", 1), "keep_prompt.*1"),
    "kv_format-unknown": (_set("kv_format", "int4"), "kv_format.*'auto', 'int8'.*'int4'"),
    "kv_format-null": (_set("kv_format", None), "kv_format.*None"),
    "kv_format-list": (_set("kv_format", ["int8"]), "kv_format"),
    "unknown-field": (_set("comment", "hello"), "comment"),
    "list": (lambda data: [data], "object"),
    "number": (lambda data: 7, "object"),
    "null": (lambda data: None, "object"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_refused(tmp_path: Path, name: str) -> None:
    """"a malformed plan file (wrong version, ragged layers, negative W, M = 0, unknown kind)", by file and field."""
    damage, message = DAMAGE[name]
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(GOOD), encoding="utf-8")
    assert CachePlan.load(path) == CachePlan([[HeadSpec.heavy(4, recent=1), HeadSpec.full()],
                                              [HeadSpec.window(5), HeadSpec.full()]], row_buffer=4)
    path.write_text(json.dumps(damage(copy.deepcopy(GOOD))), encoding="utf-8")
    with pytest.raises(ValueError, match=f"(?s)damaged.json.*{message}"):
        CachePlan.load(path)


@pytest.mark.parametrize("content", [b"", b"{", b"not json", json.dumps(GOOD).encode()[:-7], b"\xff\xfe\x00\x81",
                                     json.dumps(GOOD).encode() * 2, b"[" * 100_000],
                         ids=["empty", "open", "words", "cut", "binary", "twice", "deep"])
def test_files_that_are_not_json_are_refused(tmp_path: Path, content: bytes) -> None:
    """A file that is no JSON at all is refused by its name."""
    path = tmp_path / "damaged.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged.json"):
        CachePlan.load(path)


def test_missing_file(tmp_path: Path) -> None:
    """A path that does not exist is a FileNotFoundError that names it."""
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        CachePlan.load(tmp_path / "nowhere.json")


@pytest.mark.parametrize("failing", ["os.fdopen", "os.replace", "os.fsync"])
def test_save_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    """A save that fails half-way leaves the old file as it was, and no litter beside it."""
    path = tmp_path / "plan.json"
    mixed(3).save(path)
    before = path.read_bytes()

    fdopen = os.fdopen

    def fail(*args: Any, **options: Any) -> None:
        if failing == "os.fdopen":
            with fdopen(*args) as file:
                file.write(b"{half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(failing, fail)
        with pytest.raises(OSError, match="disk full"):
            CachePlan([MIX]).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    CachePlan([MIX]).save(path)
    assert CachePlan.load(path) == CachePlan([MIX]) and list(tmp_path.iterdir()) == [path]
