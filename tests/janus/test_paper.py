"""docs/paper.md and `--preset paper`: the page's commands parse, one of each kind runs, and its arithmetic is right."""

from __future__ import annotations

import functools
import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from test_drawing import GENEVAL
from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig
from typer.testing import CliRunner, Result

import ssd_bench.cli
import ssd_janus.cli
from ssd_janus import ModelShape
from ssd_janus.checkpoints import included_profile
from ssd_janus.cli.presets import PRESETS, PresetName, filled
from ssd_janus.engine import Sampling, sampling_settings, set_sampling
from ssd_janus.engine.memory import step_bytes, weight_bytes
from ssd_janus.images import read_picture
from ssd_janus.loading import PictureJanus
from ssd_kernels import CachePlan, policies
from ssd_kernels.policies import HeadProfile

PAGE = Path(__file__).parents[2] / "docs" / "paper.md"
PAPER = PRESETS[PresetName.paper]
PROGRAMS = {"ssd-janus": ssd_janus.cli.app, "ssd-bench": ssd_bench.cli.app}
SHELL = """
set -eu
git() { :; }
ssd-janus() { printf '%s\\x1f' ssd-janus "$@" >> commands; printf '\\x1e' >> commands; }
ssd-bench() { printf '%s\\x1f' ssd-bench "$@" >> commands; printf '\\x1e' >> commands; }
"""

Command = list[str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page's commands run: with few prompts in the place of the evaluators'."""
    path = tmp_path_factory.mktemp("paper")
    (path / "geneval/prompts").mkdir(parents=True)
    (path / "geneval/prompts/evaluation_metadata.jsonl").write_text("".join(json.dumps(one) + "\n" for one in GENEVAL))
    (path / "ELLA/dpg_bench/prompts").mkdir(parents=True)
    (path / "ELLA/dpg_bench/prompts/stuff7.txt").write_text("two blue squares beside a heart\n")
    return path


@pytest.fixture(scope="module")
def commands(place: Path) -> list[Command]:
    """Every command of ours in the page, as the shell gives it."""
    text = PAGE.read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == text.count("```") / 2, "nothing stands in other blocks"
    subprocess.run(["bash", "-c", SHELL + "".join(blocks)], cwd=place, check=True, timeout=60)
    assert len((place / "profile.jsonl").read_text().splitlines()) == len(GENEVAL)
    return [record.split("\x1f")[:-1] for record in (place / "commands").read_text().split("\x1e")[:-1]]


@functools.cache
def groups() -> dict[str, Any]:
    return {name: typer.main.get_command(app) for name, app in PROGRAMS.items()}


def value(command: Sequence[str], option: str) -> str | None:
    return command[command.index(option) + 1] if option in command else None


def parse(command: Sequence[str]) -> None:
    program, name, *arguments = command
    with groups()[program].commands[name].make_context(name, arguments):
        pass


def call(command: Sequence[str]) -> Result:
    return CliRunner().invoke(PROGRAMS[command[0]], list(command[1:]))


def replaced(command: Sequence[str], **options: object) -> Command:
    """A command with other values of options that it has."""
    new = list(command)
    for name, one in options.items():
        option = f"--{name.replace('_', '-')}"
        for index, word in enumerate(command):
            if word == option:
                new[index + 1] = str(one)
    return new


def test_every_command_parses(commands: list[Command], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    for command in commands:
        if command[1] == "image":
            for plan in re.findall(r"runs/plans/\S+\.json", " ".join(command)):
                Path(plan).parent.mkdir(parents=True, exist_ok=True)
                Path(plan).touch()
        parse(command)
        assert value(command, "--preset") == "paper" or command[1] == "plan"
    kinds = {(command[1], value(command, "--layout")) for command in commands}
    assert kinds == {("profile", None), ("plan", None), ("generate", "geneval"), ("generate", "dpg"),
                     ("evaluate", None), ("image", None)}


@pytest.mark.parametrize("wrong", [["--prompt-file", "a"], ["--policy", "sdd"], ["--budget", "a"], ["--seed", "-1"],
                                   ["--preset", "papers"]])
def test_what_does_not_parse_is_found(wrong: Command) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011  # click's, which typer has a copy of or imports
        parse(["ssd-janus", "generate", "a heart", *wrong])
    assert "UsageError" in [kind.__name__ for kind in type(caught.value).__mro__]


def test_every_file_of_the_page_is_written_by_a_command(commands: list[Command]) -> None:
    text = PAGE.read_text()
    out = {value(command, "--out") for command in commands}
    assert len(out) == len(commands)
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for path in re.findall(r"`(runs/[^`]+)`", prose):
        assert path in out or str(Path(path).parent) in out or path.endswith("/NAME"), path
    rows = re.findall(r"^\| [17]B, .*\| `(\S+)`(?:, `(\S+)`)? \|$", text, re.MULTILINE)
    assert len(rows) == 9
    for name, half in rows:
        for folder in [name, *([name.removesuffix("-0.2") + half] if half else [])]:
            assert {f"runs/geneval/{folder}", f"runs/dpg/{folder}"} <= out, folder


def test_the_table_of_the_preset() -> None:
    section = PAGE.read_text().split("## The settings")[1].split("##")[0]
    assert f"| `--guidance` | {PAPER['guidance']:g} |" in section
    numbers = f"{PAPER['temperature']:g}, {PAPER['top_k']}, {PAPER['top_p']:g}:"
    assert f"| `--temperature`, `--top-k`, `--top-p` | {numbers}" in section
    assert f"`compare`) | {PAPER['images_per_prompt']} |" in section and PAPER["seeds"] == PAPER["images_per_prompt"]
    assert f"| `--row-buffer`, with `--policy` | {PAPER['row_buffer']} |" in section
    known = {parameter.name for name in ("generate", "evaluate")
             for parameter in groups()["ssd-janus"].commands[name].params}
    assert PAPER.keys() <= known


@pytest.mark.parametrize("given, line", [
    ({"guidance": None, "top_k": None}, "preset paper: --guidance 5, --top-k 0"),
    ({"guidance": 3.0, "top_k": None}, "preset paper: --top-k 0, --guidance 3 as given, not 5"),
    ({"guidance": 5.0, "top_k": 0}, "preset paper: all options are given as it has them"),
    ({"guidance": 5.0, "row_buffer": 0}, "preset paper: --row-buffer 0 as given, not 24")])
def test_what_a_preset_fills_in(given: dict[str, Any], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert filled(PresetName.paper, given) == {
        name: PAPER[name] if one is None else one for name, one in given.items()}
    assert capsys.readouterr().err == f"note: {line}\n"
    assert filled(None, given) == given and not capsys.readouterr().err


def by_hand(command: Sequence[str], **added: object) -> Command:
    """A command with the preset's options in its place."""
    place = command.index("--preset")
    hand = {name: one for name, one in PAPER.items() if name not in ("seeds", "row_buffer")} | added
    options = [word for name, one in hand.items() for word in (f"--{name.replace('_', '-')}", str(one))]
    return [*command[:place], *options, *command[place + 2:]]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def geneval(commands: list[Command], name: str) -> Command:
    (found,) = [command for command in commands if value(command, "--out") == f"runs/geneval/{name}"]
    return found


def test_the_preset_is_its_options(commands: list[Command], tmp_path: Path) -> None:
    """The page's GenEval command with the included model and one picture; byte by byte, what it says of itself
    included. `test_one_command_of_each_kind_runs` compares four pictures and the row buffer."""
    (tmp_path / "one.jsonl").write_text(json.dumps(GENEVAL[0]) + "\n")
    command = replaced(geneval(commands, "1B-ssd-0.2"), prompts_file=tmp_path / "one.jsonl", device="cpu",
                       profile=included_profile())
    model = command.index("--model")
    command = [*command[:model], *command[model + 2:], "--images-per-prompt", "1"]
    result = call(replaced(command, out=tmp_path / "preset"))
    assert result.exit_code == 0, result.output
    assert "note: preset paper: --guidance 5, --temperature 1, --top-k 0, --top-p 1, --images-per-prompt 1 as given, " \
           "not 4, --row-buffer 0 as given, not 24\n" in result.stderr
    assert call(replaced(by_hand(command, images_per_prompt=1), out=tmp_path / "hand")).exit_code == 0
    found = contents(tmp_path / "preset")
    assert found == contents(tmp_path / "hand")
    assert sorted(found) == ["00000/metadata.jsonl", "00000/samples/00000.png"]
    facts = read_picture(tmp_path / "preset/00000/samples/00000.png")[1]
    assert facts is not None and facts["guidance_scale"] == 5
    assert facts["plan"].startswith("budget 0.1997, row buffer 0,")
    assert facts["sampling"] == {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


def test_one_command_of_each_kind_runs(commands: list[Command], folder: Path, place: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, with a model of 36 tokens, of which nine tenths are kept: a row buffer takes 24."""
    monkeypatch.chdir(place)
    wanted = ["runs/profile-1B", "runs/plans/1B-ssd-0.json", "runs/plans/1B-ssd-24.json",
              "runs/geneval/1B-ssd-buffer-0.2", "runs/dpg/1B-h2o-0.5", "runs/fidelity-1B", "runs/throughput-1B.jsonl"]
    for out in wanted:
        (command,) = [command for command in commands if value(command, "--out") == out]
        command = replaced(command, model=folder, device="cpu", budget=0.9, limit=2, trials=1)
        if command[1] == "image":
            command += ["--steps", "24", "--pictures", "1"]
        result = call(command)
        assert result.exit_code == 0, f"{command}\n{result.output}"
        assert ("note: preset paper: " in result.stderr) == (command[1] != "plan")
    assert {file.name for file in Path("runs/profile-1B").iterdir()} == {
        "parts", "profile.safetensors", "heads.png", "attention.png", "columns.png", "kinds.png"}
    assert [CachePlan.load(f"runs/plans/1B-ssd-{rows}.json").row_buffer for rows in (0, 24)] == [0, 24]
    assert len(list(Path("runs/geneval/1B-ssd-buffer-0.2").rglob("*.png"))) == 4 * len(GENEVAL)
    facts = read_picture(Path("runs/dpg/1B-h2o-0.5/stuff7.png"))[1]
    assert facts is not None and facts["images_per_prompt"] == 4 and "row buffer 0," in facts["plan"]
    assert "ssd-0.9" in Path("runs/fidelity-1B/table.md").read_text()
    settings = json.loads(Path("runs/fidelity-1B/ssd-0.9/settings.json").read_text())
    assert settings["guidance_scale"] == 5 and settings["sampling"] == {
        "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    lines = [json.loads(line) for line in Path("runs/throughput-1B.jsonl").read_text().splitlines()]
    assert [line["contender"]["name"] for line in lines] == [
        "transformers, dynamic cache", "transformers, static cache", "engine, full plan", "engine, plan 1B-ssd-0",
        "engine, plan 1B-ssd-24"]
    points = {(line["status"], line["point"]["dtype"], line["point"]["top_k"]) for line in lines}
    assert points == {("ok", "bfloat16", 0)}
    # The model's own row is 6 tokens: 24 are the preset's.
    hand = by_hand(geneval(commands, "1B-ssd-buffer-0.2"), row_buffer=24)
    assert call(replaced(hand, model=folder, device="cpu", budget=0.9, out="runs/hand")).exit_code == 0
    assert contents(Path("runs/hand")) == contents(Path("runs/geneval/1B-ssd-buffer-0.2"))


def test_the_preset_of_a_comparison(folder: Path, tmp_path: Path) -> None:
    result = call(["ssd-janus", "compare", "--preset", "paper", "--model", str(folder), "--out", str(tmp_path / "out"),
                   "--part", "fidelity", "--policy", "window", "--budget", "0.9", "--row-buffer", "0", "--seeds", "2",
                   "--fidelity-prompts", "1"])
    assert result.exit_code == 0, result.output
    assert "--top-p 1, --seeds 2 as given, not 4\n" in result.stderr
    assert json.loads((tmp_path / "out/settings.json").read_text())["sampling"]["top_k"] == 0


def test_sampling_by_options(folder: Path, tmp_path: Path) -> None:
    """Greedy pictures say that they are, and do not pass for sampled ones."""
    common = ["ssd-janus", "generate", "a heart", "--model", str(folder), "--layout", "dpg", "--out", str(tmp_path)]
    assert call([*common, "--temperature", "0"]).exit_code == 0
    facts = read_picture(tmp_path / "00000.png")[1]
    assert facts is not None and facts["sampling"]["do_sample"] is False
    result = call([*common, "--temperature", "1"])
    assert result.exit_code == 2 and "was drawn with another sampling" in result.stderr
    result = call([*common, "--top-p", "0"])
    assert result.exit_code == 2 and "top_p must be above 0" in result.stderr


def test_a_model_that_would_be_greedy_samples(fresh: Any) -> None:
    """transformers takes the likeliest token where nothing else is said."""
    fresh.generation_config.do_sample = None
    assert Sampling.of(fresh).greedy and sampling_settings(fresh)["do_sample"] is False
    set_sampling(fresh)
    assert Sampling.of(fresh).greedy
    set_sampling(fresh, 1.0, 0, 1.0)
    assert Sampling.of(fresh) == Sampling() and "do_sample" not in sampling_settings(fresh)


def janus(hidden: int, intermediate: int, layers: int, heads: int) -> PictureJanus:
    """Janus-Pro's sizes, in bfloat16, without contents."""
    text = LlamaConfig(vocab_size=102400, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
                       num_attention_heads=heads, num_key_value_heads=heads, head_dim=128)
    with torch.device("meta"):
        return PictureJanus(JanusConfig(
            text_config=text, vision_config=JanusVisionConfig(projection_dim=hidden),
            vq_config=JanusVQVAEConfig(projection_dim=hidden, image_token_embed_dim=hidden))).to(torch.bfloat16)


def test_the_arithmetic_of_memory() -> None:
    text = PAGE.read_text()
    for name, sizes in {"1B": (2048, 5632, 24, 16), "7B": (4096, 11008, 30, 32)}.items():
        model = janus(*sizes)
        weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        assert weight_bytes(model) == 0  # only what is loaded counts there
        shape = ModelShape.of(model)
        half = torch.arange(shape.num_layers * shape.num_heads).reshape(shape.num_layers, -1) % 2
        profile = HeadProfile.load(included_profile())
        profile = type("Halves", (HeadProfile,), {"check": lambda self, shape: self})(**vars(profile) | {
            "sparsity": half.float()})
        plans = {"full": shape.full_plan(),
                 **{f"SSD{more}, 20%": policies.ssd(shape, 0.2, rows, profile=profile)
                    for more, rows in (("", 0), (" + buffer", 24))}}
        caches = []
        for plan_name, plan in plans.items():
            for batch in (32, 64, 128):
                cache = plan.nbytes(batch_size=2 * batch, head_dim=128, max_prompt=32, dtype=torch.bfloat16,
                                    num_visual_tokens=576)
                caches.append(f"{cache / 1e9:.2f}")
                most = (weights + cache + step_bytes(model, batch, 2 * batch, 32)) / 1e9
                if name == "1B":
                    row = re.escape(f"| {plan_name} | {batch} |") + r" [\d.]+ \| [\d.]+ \| "
                    assert re.search(row + re.escape(f"{cache / 1e9:.2f} | {most:.1f} |"), text), (batch, most)
        if name == "1B":
            assert f"{weights / 1e9:.1f} GB of weights" in text
        else:
            said = f"{', '.join(caches[:2])} and {caches[2]} GB in full and {', '.join(caches[3:5])} and {caches[5]} GB"
            assert f"{said} at 20%, beside {weights / 1e9:.1f} GB of weights" in " ".join(text.split())
