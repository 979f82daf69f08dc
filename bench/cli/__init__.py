"""Command line ``ssd-bench``: a module per command, or for a few that go together.

torch is imported when a command runs: how it waits and which instructions it may use is decided before.
"""

from __future__ import annotations

import typer

from ssd_janus import waiting
from ssd_janus.cli.terminal import as_command

from . import decoder, kernel, results, serve, suite

__all__ = ["app"]

app = typer.Typer(help="Benchmarks of ssd_kernels: strong rivals, cold caches, one run.", no_args_is_help=True,
                  add_completion=False)
for command in (kernel.kernel, decoder.step, decoder.image, serve.serve, suite.suite, results.compare, results.plot,
                results.report):
    app.command()(as_command(command))


@app.callback()
def main() -> None:
    """Benchmarks of ssd_kernels: strong rivals, cold caches, one run."""
    waiting.prepare()
