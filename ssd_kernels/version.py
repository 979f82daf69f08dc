"""The release of this package; pyproject.toml reads it from here, without importing anything."""

__version__ = "0.1.0"
