"""Warnings that are said once."""

from __future__ import annotations

import logging
import threading

_logger = logging.getLogger("ssd_janus")
_said: set[str] = set()
_saying = threading.Lock()


def warn_once(message: str) -> None:
    """Log a warning the first time that any thread has it."""
    with _saying:
        new = message not in _said
        _said.add(message)
    if new:
        _logger.warning("%s", message)
