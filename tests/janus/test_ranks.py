"""Several processes at one work: which units are whose, and folders that are the same whatever their number."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_drawing import GENEVAL, Painter, contents, copy

from ssd_janus import Pipeline, drawing
from ssd_janus.layouts import DPGBench, GenEval, Layout, remove
from ssd_janus.parquet import Parquet
from ssd_janus.progress import progress_bar
from ssd_janus.prompts import FilePrompt, gather
from ssd_janus.ranks import ALONE, Ranks

GENEVAL_TEXTS = [line["prompt"] for line in GENEVAL]
TEXTS = ["a red circle", "a heart", "a green star", "two hearts", "a ring", "a blue square", "a cross"]


@pytest.mark.parametrize("environment, expected", [
    ({}, ALONE),
    ({"RANK": "", "WORLD_SIZE": ""}, ALONE),
    ({"RANK": "2", "WORLD_SIZE": "8"}, Ranks(2, 8)),
    ({"RANK": "2", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Ranks(2, 8, 1)),
    ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Ranks(0, 1, 0)),
    ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "1"}, Ranks(5, 6, 1)),
    # What is set by hand or by torchrun counts in a step of Slurm, too.
    ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "7"},
     Ranks(1, 2)),
    ({"LOCAL_RANK": "3"}, ALONE),
])
def test_ranks_of_an_environment(environment: Mapping[str, str], expected: Ranks) -> None:
    assert Ranks.here(environment) == expected
    assert Ranks.here({**environment, "OMP_NUM_THREADS": "1"}) == expected


def test_the_script_of_a_batch_job_is_alone() -> None:
    """Slurm sets the number of tasks and the place of a task for it, though srun has started none."""
    assert Ranks.here({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "4"}) == ALONE


@pytest.mark.parametrize("environment, message", [
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK must be less than WORLD_SIZE, which is 2, .*got 2"),
    ({"RANK": "1"}, "WORLD_SIZE must be set where RANK is"),
    ({"WORLD_SIZE": "4"}, "RANK must be set where WORLD_SIZE is"),
    ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE must be at least 1, got 0"),
    ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK must be a whole number of at least 0, got '-1'"),
    ({"RANK": "1", "WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number of at least 0, got 'two'"),
    ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0.5"}, "LOCAL_RANK must be a whole number"),
    ({"RANK": "²", "WORLD_SIZE": "3"}, "RANK must be a whole number"),
    ({"SLURM_PROCID": "6", "SLURM_STEP_NUM_TASKS": "6"}, "SLURM_PROCID must be less than SLURM_STEP_NUM_TASKS"),
])
def test_nonsense_is_refused_by_name(environment: Mapping[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ranks.here(environment)


@given(st.integers(0, 40), st.integers(1, 12), st.integers(0, 40))
def test_every_unit_is_dealt_out_once_and_evenly(count: int, ranks: int, before: int) -> None:
    units = list(range(count))
    shares = [Ranks(number, ranks).own(units, before) for number in range(ranks)]
    assert sorted(unit for share in shares for unit in share) == units
    assert all(share == sorted(share) for share in shares)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    # Lists dealt out one after the other are dealt out as one.
    whole = [Ranks(number, ranks).own(list(range(before + count))) for number in range(ranks)]
    assert [[before + unit for unit in share] for share in shares] == [[unit for unit in share if unit >= before]
                                                                       for share in whole]


@given(st.lists(st.integers(0, 60), min_size=1, unique=True), st.integers(1, 6), st.integers(1, 12))
def test_units_are_whole_prompts_that_fit_into_a_batch(numbers: list[int], images: int, batch_size: int) -> None:
    prompts = [FilePrompt(str(number), "a heart", {}, number=number) for number in sorted(numbers)]
    units = drawing.units(prompts, images, batch_size)
    assert [prompt for unit in units for prompt in unit] == prompts
    for unit in units:
        assert len(unit) == 1 or len(unit) * images <= batch_size
        assert [prompt.number for prompt in unit] == list(range(unit[0].number, unit[0].number + len(unit)))


@pytest.mark.parametrize("ranks, device, gpus, expected", [
    (Ranks(5, 8, 5), "cuda", 8, "cuda:5"),
    (Ranks(5, 8, 5), "cuda", 1, "cuda:0"),  # srun --gpus-per-task=1 shows each task its own one only
    (Ranks(9, 16, 1), "cuda", 8, "cuda:1"),
    (Ranks(5, 8, 5), "cuda:2", 8, "cuda:2"),
    (Ranks(5, 8, 5), "cpu", 8, "cpu"),
    (Ranks(5, 8), "cuda", 8, "cuda"),
    (Ranks(5, 8, 5), "cuda", 0, "cuda"),  # the pipeline says that there is none
    (ALONE, "cuda", 8, "cuda"),
])
def test_the_gpu_of_a_rank(ranks: Ranks, device: str, gpus: int, expected: str) -> None:
    assert ranks.device(device, gpus) == expected


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Pipeline:
    loaded = Pipeline.from_pretrained(folder)
    return Painter(loaded.model, loaded.processor)


def prompts_of(texts: Sequence[str] = TEXTS) -> list[FilePrompt]:
    return gather(texts, None)


LAYOUTS: dict[str, Callable[[Path], Layout | None]] = {
    "plain": lambda out: None, "geneval": lambda out: GenEval(out, 2), "dpg": lambda out: DPGBench(out, 2),
    "parquet": lambda out: Parquet(out, 2)}


def draw(pipe: Pipeline, layout: str, out: Path, ranks: Ranks = ALONE, texts: Sequence[str] = TEXTS,
         **options: Any) -> tuple[list[drawing.Drawn], list[str]]:
    """What a process draws, batches of two prompts, and what it says."""
    said: list[str] = []
    options = {"seed": 3, "redraw": False} | options
    found = list(drawing.draw(pipe, LAYOUTS[layout](out), out, prompts_of(texts), 2, None, options["seed"],
                              pipe.shape.full_plan(), 4, redraw=options["redraw"], say=said.append, ranks=ranks))
    return found, said


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_folder_is_the_same_whatever_the_number_of_ranks(pipe: Pipeline, tmp_path: Path, layout: str,
                                                           count: int) -> None:
    draw(pipe, layout, tmp_path / "alone")
    drawn = []
    for number in reversed(range(count)):
        found, said = draw(pipe, layout, tmp_path / "ranks", Ranks(number, count))
        drawn += found
        if number == 0 or (count, number) == (5, 0):
            assert said == []
        else:
            assert len(said) == 1 and "are not there yet" in said[0] and "run the same command again" in said[0]
    assert contents(tmp_path / "ranks") == contents(tmp_path / "alone")
    assert sorted((one.prompt, one.image) for one in drawn) == sorted((text, image) for text in TEXTS
                                                                      for image in range(2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_number_of_ranks_takes_up_what_is_left(pipe: Pipeline, tmp_path: Path, layout: str) -> None:
    draw(pipe, layout, tmp_path / "alone")
    for number in (0, 2):
        draw(pipe, layout, tmp_path / "ranks", Ranks(number, 3))
    redone = [one.prompt for number in range(2) for one in draw(pipe, layout, tmp_path / "ranks", Ranks(number, 2))[0]]
    assert sorted(redone) == sorted(2 * TEXTS[2:4])  # the second of four units
    assert contents(tmp_path / "ranks") == contents(tmp_path / "alone")
    # A rank that is started twice, late, or for fun does nothing.
    assert draw(pipe, layout, tmp_path / "ranks", Ranks(1, 3)) == ([], [])


def test_damage_is_its_owners(pipe: Pipeline, tmp_path: Path) -> None:
    out = tmp_path / "out"
    draw(pipe, "geneval", out)
    before = contents(out)
    broken = out / "00002" / "samples" / "00001.png"  # of the second unit
    broken.write_bytes(broken.read_bytes()[:-40])
    (out / "00003" / "metadata.jsonl").unlink()
    found, said = draw(pipe, "geneval", out, Ranks(0, 2))
    assert found == [] and len(said) == 1 and said[0].startswith("1 of 7 prompts are not there yet, such as")
    found, said = draw(pipe, "geneval", out, Ranks(1, 2))
    assert [one.prompt for one in found] == 2 * [TEXTS[2]] + 2 * [TEXTS[3]]
    assert len(said) == 2 and all("drawing it anew" in line for line in said) and contents(out) == before


@pytest.mark.parametrize("layout", ["geneval", "dpg"])
def test_what_another_rank_has_drawn_with_other_settings_is_refused(pipe: Pipeline, tmp_path: Path,
                                                                    layout: str) -> None:
    """Or a rank that has nothing there yet would mix pictures of two runs."""
    out = tmp_path / "out"
    draw(pipe, layout, out, Ranks(0, 2))
    before = contents(out)
    for number in (0, 1):
        with pytest.raises(ValueError, match=r"was drawn with another seed \(3 there, 4 now\).*--redraw"):
            draw(pipe, layout, out, Ranks(number, 2), seed=4)
    assert contents(out) == before
    for number in (1, 0):
        found, said = draw(pipe, layout, out, Ranks(number, 2), seed=4, redraw=True)
        assert len(found) == (8 if number == 0 else 6)
        # What it replaces itself, but not what the other one will.
        assert sum("drawing it anew" in line for line in said) == (0 if number else {"geneval": 5, "dpg": 4}[layout])
    draw(pipe, layout, tmp_path / "alone", seed=4)
    assert contents(out) == contents(tmp_path / "alone")


@pytest.mark.parametrize("layout", ["geneval", "dpg"])
def test_any_rank_removes_what_belongs_to_no_prompt(pipe: Pipeline, tmp_path: Path, layout: str) -> None:
    out = tmp_path / "out"
    draw(pipe, layout, out)
    copy(out, tmp_path / "copy")
    for number in (0, 1):
        with pytest.raises(ValueError, match="belongs to none of these prompts"):
            draw(pipe, layout, out, Ranks(number, 2), texts=TEXTS[:5])
    assert contents(out) == contents(tmp_path / "copy")
    assert "removed" in " ".join(draw(pipe, layout, out, Ranks(1, 2), texts=TEXTS[:5], redraw=True)[1])
    assert draw(pipe, layout, out, Ranks(0, 2), texts=TEXTS[:5], redraw=True) == ([], [])
    draw(pipe, layout, tmp_path / "alone", texts=TEXTS[:5])
    assert contents(out) == contents(tmp_path / "alone")


def test_plain_pictures_of_other_settings_are_replaced_by_their_owners(pipe: Pipeline, tmp_path: Path) -> None:
    out = tmp_path / "out"
    draw(pipe, "plain", out, seed=9)
    found, said = draw(pipe, "plain", out, Ranks(1, 2))
    assert len(found) == 6 and sum("drawn with another seed" in line for line in said) == 5 and len(said) == 7
    assert said[-1].startswith("4 of 7 prompts are not there yet")
    draw(pipe, "plain", out, Ranks(0, 2))
    draw(pipe, "plain", tmp_path / "alone")
    assert contents(out) == contents(tmp_path / "alone")


def test_more_ranks_than_units(pipe: Pipeline, tmp_path: Path) -> None:
    (drawn, said), others = draw(pipe, "geneval", tmp_path / "out", Ranks(0, 9), GENEVAL_TEXTS), []
    assert len(drawn) == 4 and "1 of 3 prompts" in said[0]
    for number in range(1, 9):
        others += draw(pipe, "geneval", tmp_path / "out", Ranks(number, 9), GENEVAL_TEXTS)[0]
    assert len(others) == 2




def test_every_batch_is_one_of_a_single_process(folder: Path, tmp_path: Path) -> None:
    """A picture may depend on its company: on a GPU by rounding, under online plans altogether."""
    loaded = Pipeline.from_pretrained(folder)
    calls: list[tuple[Any, ...]] = []

    class Recording(Painter):
        def generate_tokens(self, prompts: Any, count: int, guidance: Any, seed: int, plan: Any, **options: Any) -> Any:
            calls.append((tuple(prompts), count, seed))
            return super().generate_tokens(prompts, count, guidance, seed, plan, **options)

    pipe = Recording(loaded.model, loaded.processor)
    draw(pipe, "geneval", tmp_path / "alone")
    alone = calls.copy()
    calls.clear()
    for number in range(3):
        draw(pipe, "geneval", tmp_path / "ranks", Ranks(number, 3))
    assert sorted(calls) == sorted(alone) and len(alone) == 4
    # One picture of a batch is lost: the whole batch is drawn again.
    (tmp_path / "ranks" / "00001" / "samples" / "00000.png").unlink()
    calls.clear()
    draw(pipe, "geneval", tmp_path / "ranks", Ranks(0, 2))
    assert calls == alone[:1]


def test_two_processes_remove_the_same_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("00007/samples/00000.png", "00008/samples/00000.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    rmtree, meanwhile = shutil.rmtree, ["00007", "00008"]

    def late(path: Path) -> None:
        if meanwhile:
            rmtree(tmp_path / meanwhile.pop(0) / "samples")  # the other one is in the middle of it
            raise FileNotFoundError(path)
        rmtree(path)

    monkeypatch.setattr(shutil, "rmtree", late)
    strangers = [tmp_path / "00007", tmp_path / "00008", tmp_path / "00009"]
    assert remove(strangers) == strangers[:2] and not list(tmp_path.iterdir())


def test_progress_of_ranks_is_lines_on_a_terminal_too(monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, for rich
    with progress_bar("drawing", Ranks(1, 2)) as report:
        for done in range(1, 11):
            report(done, 10)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and all(line.startswith("rank 1 of 2, drawing: ") for line in lines)
