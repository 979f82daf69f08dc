"""Plots, the page and the README's table, from made-up results."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from ssd_bench.cli import app
from ssd_bench.plot import figures
from ssd_bench.records import write
from ssd_bench.report import BEGIN, END, mixed, page, refresh
from ssd_bench.tables import markdown
from ssd_bench.terminal import log, print_records

OURS, RIVAL = "ssd_kernels cpu: heavy", "SDPA full cache"  # as in conftest.py


@pytest.fixture
def lines(make):
    found = [make(name, (factor * batch, 2 * factor * batch, 3 * factor * batch), batch=batch)
             for batch in (2, 16, 64) for name, factor in ((OURS, 10), (RIVAL, 50))]
    return [*found, make("FlexAttention <b>", status="failed: no <compiler>", batch=64)]


class Page(HTMLParser):
    """Collects what a page fetches, and its cells."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.cells: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        # References inside the page itself begin with "#"; SVG's namespaces are names, not addresses.
        self.fetched += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value[:1] != "#"]

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def test_page_stands_alone_and_holds_every_number(lines):
    text = page(lines)
    parsed = Page()
    parsed.feed(text)
    assert not parsed.fetched and "<script" not in text and "@import" not in text
    for cell in ("20.0", "160", "3200", "failed: no <compiler>", "5.00"):
        assert cell in parsed.cells, cell
    assert text.count("<svg") == 3  # roofline, time and memory against batch
    assert "ssd-bench kernel &lt;b&gt;" in text


def test_plots_need_something_to_show(make):
    assert set(figures([make(), make(RIVAL)])) == {"roofline"}
    assert set(figures([make(mean=30), make(mean=60)])) == {"roofline", "time-slots"}
    assert figures([make(status="failed")]) == {}


def test_runs_are_never_in_one_panel(make):
    lines = [make(batch=batch, machine={"commit": commit}) for batch in (2, 16) for commit in ("old", "new")]
    for name in ("roofline", "time-batch"):
        panels = figures(lines)[name].axes
        assert sorted(axes.get_title(loc="center").splitlines()[1] for axes in panels) == ["commit new", "commit old"]
    assert figures([make(machine={"commit": "old"}), make(batch=2, machine={"commit": "new"})]).keys() == {"roofline"}
    steps = [{**make(machine={"commit": commit}), "kind": "step", "contender": {"name": "engine", "backend": "auto"},
              "split": {"linear": 1, "attention": 1, "rest": 1},
              "point": {"label": "1b", "batch": 8, "rows": 16, "dtype": "float32", "steps": 4, "start": 480,
                        "batch_is": "fixed"}} for commit in ("old", "new")]
    assert len(figures(steps)["step-breakdown"].axes) == 2


def test_results_of_several_runs_are_said(tmp_path: Path, make):
    write([make(), make(batch=2, machine={"commit": "b", "torch": "9"})], tmp_path / "r.jsonl")
    run = CliRunner().invoke(app, ["report", str(tmp_path / "r.jsonl"), "--out", str(tmp_path / "p.html")])
    note = "results of several runs, which differ in torch (2.13, 9); commit (abc, b)"
    assert run.exit_code == 0 and run.stderr == f"note: {note}\n"
    text = (tmp_path / "p.html").read_text()
    assert f"<p>{note}.</p>" in text and "commit abc</li>" in text and "commit b</li>" in text
    assert mixed([make(), make(RIVAL)]) is None


def test_tables_are_whole_and_plain_when_piped(capsys: pytest.CaptureFixture[str], make):
    """Brackets are no markup, and no cell is cut, however long."""
    name = "[bold]a" + 30 * " long name" + "[/bold]"
    print_records([make(name), make()])
    shown = capsys.readouterr().out
    assert name in shown and "\u2026" not in shown and "append" not in shown


def test_markdown_cells_stay_in_their_column():
    rows = markdown(["a", "b"], [["x | y\n<!-- kernel-table:end -->", "2"]], 1).splitlines()
    assert rows[-1] == r"| x \| y &lt;!-- kernel-table:end --> | 2 |"


def test_a_log_has_a_line_at_every_tenth_and_every_half_minute(capsys: pytest.CaptureFixture[str]):
    now = [0.0]
    report = log(clock=lambda: now[0])
    for second in range(101):
        now[0] = second
        report(f"[{second}]", 0.25 if second < 80 else 0.3)
    assert capsys.readouterr().err.split() == ["[0]", "[30]", "[60]", "[80]"]


@pytest.mark.parametrize("arguments, said", [
    (("kernel", "--mean", 5, "--policy", "heavy"), "--mean: says nothing beside --policy"),
    (("kernel", "--score", "--plan", __file__), "--score: says nothing beside --plan"),
    (("kernel", "--budget", 0.2), "--budget: needs --plan or --policy"),
    (("kernel", "--start", 0), "--start: needs --plan or --policy"),
    (("image", "--largest-in", 1, "--pictures", 1), "--pictures: says nothing beside --largest-in"),
    (("image", "--plan", __file__, "--budget", 0.2), "--budget: says nothing beside --plan"),
    (("image", "--plan", __file__, "--row-buffer", 0), "--row-buffer: says nothing beside --plan"),
    (("step", "--pictures", 0), "--pictures: must be at least 1"),
    (("kernel", "--out", "."), "--out: must be a file"),
    (("suite", "--readme", __file__), "must hold <!-- kernel-table:begin -->"),
    (("suite", "--results", f"{__file__}/results"), "Not a directory"),
    (("plot", __file__, "--out", "x"), "test_report.py, line 1: "),
])
def test_what_cannot_work_is_said_before_measuring(arguments: tuple[object, ...], said: str, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke(app, list(map(str, arguments)))
    assert run.exit_code == 2 and said in " ".join(run.stderr.replace("\u2502", " ").split()), run.stderr
    assert not list(tmp_path.iterdir())


def test_plot_values_are_the_records(lines):
    axes = figures(lines)["time-batch"].axes[0]
    shown = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
    assert shown[OURS] == [(2, pytest.approx(20)), (16, pytest.approx(160)), (64, pytest.approx(640))]
    assert len({(line.get_marker(), line.get_linestyle()) for line in axes.lines}) == 2


def test_plot_command_writes_png_and_svg(tmp_path: Path, lines):
    write(lines, tmp_path / "r.jsonl")
    run = CliRunner().invoke(app, ["plot", str(tmp_path / "r.jsonl"), "--out", str(tmp_path / "plots")])
    assert run.exit_code == 0, run.output
    assert len(run.stdout.split()) == 6
    assert Image.open(tmp_path / "plots" / "roofline.png").size[0] > 500
    assert "<svg" in (tmp_path / "plots" / "roofline.svg").read_text()


def test_readme_is_changed_between_the_markers_only(tmp_path: Path, lines):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{BEGIN}\nstale\n{END}\nafter\n")
    refresh(path, lines)
    refresh(path, lines[:2])
    text = path.read_text()
    assert text.startswith(f"before\n{BEGIN}\n**batch 2") and text.endswith(f"\n{END}\nafter\n") and "stale" not in text
    assert f"| {RIVAL} | attend | 100.0 | 200 | 100% |" in text and "batch 16" not in text


@pytest.mark.parametrize("text", ["no markers", f"{END} {BEGIN}", f"{BEGIN} {BEGIN} {END}"])
def test_readme_without_markers_is_left_alone(tmp_path: Path, lines, text: str):
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(ValueError, match="kernel-table"):
        refresh(path, lines)
    assert path.read_text() == text


def test_report_wants_somewhere_to_write(tmp_path: Path, lines):
    write(lines, tmp_path / "r.jsonl")
    run = CliRunner().invoke(app, ["report", str(tmp_path / "r.jsonl")])
    assert run.exit_code == 2 and "--out" in run.output
    run = CliRunner().invoke(app, ["report", str(tmp_path / "r.jsonl"), "--out", str(tmp_path / "deep" / "p.html")])
    assert run.exit_code == 0 and (tmp_path / "deep" / "p.html").read_text().startswith("<!doctype html>")
