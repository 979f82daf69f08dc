"""``ssd-janus``: one module per command.

torch and transformers are imported when a command runs, so that ``ssd-janus --help`` stays fast.
"""

from __future__ import annotations

import typer

from .. import waiting
from . import compare, demo, evaluate, gallery, generate, info, plan, profile, serve
from .terminal import as_command

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
                  help="Draw pictures with Janus, each attention head keeping its own few tokens.")
for command in (generate.generate, gallery.gallery, demo.demo, evaluate.evaluate, compare.compare, plan.plan,
                profile.profile, serve.serve, info.info):
    app.command()(as_command(command))
app.callback()(waiting.prepare)
