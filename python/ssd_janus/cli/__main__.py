"""``python -m ssd_janus.cli`` is ``ssd-janus``."""

from . import app

app(prog_name="ssd-janus")
