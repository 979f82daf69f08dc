"""How commands end, and what they print when nobody watches."""

from __future__ import annotations

import errno
import io
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from test_cli import run
from typer.testing import CliRunner

from ssd_janus.cli.terminal import as_command, explain, print_table, table


@pytest.mark.parametrize("error, message", [
    (OSError(errno.ENOSPC, "No space left on device", "out/a.png"), "out/a.png: No space left on device"),
    (PermissionError(errno.EACCES, "Permission denied", b"out"), "out: Permission denied"),
    (OSError("two\n  lines"), "two lines"),
    (ValueError(), "ValueError"),
    (MemoryError("std::bad_alloc"), "out of memory; a lower --batch-size or a smaller --dtype takes less "
                                    "(std::bad_alloc)"),
    (torch.OutOfMemoryError("CUDA out of memory."),
     "out of memory; a lower --batch-size or a smaller --dtype takes less (CUDA out of memory.)"),
])
def test_errors_in_one_line(error: Exception, message: str) -> None:
    assert explain(error, ["prompts", "batch_size", "dtype"]) == message


def test_out_of_memory_as_torch_says_it() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert explain(caught.value, ["budget"]).startswith("out of memory; a lower --budget takes less (")
    assert explain(RuntimeError("shapes differ"), ["budget"]) == "shapes differ"


def test_a_command_that_runs_out_of_memory(capsys: pytest.CaptureFixture[str]) -> None:
    def draw(batch_size: int = 8) -> None:
        raise MemoryError

    app = typer.Typer()
    app.command()(as_command(draw))
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 2
    assert result.stderr == "error: out of memory; a lower --batch-size takes less (MemoryError)\n"


STOPPED = """
import sys, time
import typer
from ssd_janus.cli.terminal import as_command
app = typer.Typer(pretty_exceptions_enable=False)
@app.command()
@as_command
def wait():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)
app()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_a_command_cleanly(number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", STOPPED], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (128 + number, "cleaned up\n", "stopped\n")


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []
    as_command(lambda: seen.append(signal.getsignal(signal.SIGTERM)))()
    assert signal.getsignal(signal.SIGTERM) is before and seen != [before]


def test_tables_are_plain_and_whole() -> None:
    out = Console(file=io.StringIO(), width=20)
    path = "/a/" + "long/" * 40 + "path"
    print_table(table([("pip", "'.[triton]' [red]x[/red]"), ("path", path)], ("[name]", "value")), out)
    text = out.file.getvalue()
    assert "'.[triton]' [red]x[/red]" in text and path in text and text.startswith("[name]")


def test_info_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    import ssd_kernels

    facts = ssd_kernels.info()
    reason = "not built: pip install '.[triton]' " + "x" * 200
    facts["backends"]["triton"] = {"available": False, "reason": reason}
    monkeypatch.setattr(ssd_kernels, "info", lambda: facts)
    text = run("info").stdout
    assert f"cannot run: {reason}" in text and "\x1b" not in text


def test_who_reads_the_output_may_leave() -> None:
    code = STOPPED.replace("time.sleep(60)", "[print(number, flush=True) for number in range(10**6)]")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1
    process.stderr.close()


def test_a_full_cache_of_downloads_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    from ssd_janus import Pipeline

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Pipeline, "from_pretrained", fail)
    result = run("generate", "a heart", "--model", "somebody/janus", "--out", tmp_path / "out")
    assert result.exit_code == 2 and result.stderr == f"error: {HF_HUB_CACHE}: No space left on device\n"
