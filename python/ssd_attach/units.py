"""Numbers for people to read."""

from __future__ import annotations


def show_bytes(count: int) -> str:
    """Bytes as MB or GB."""
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"
