"""Optional dependencies, imported late."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs(extra: str, *modules: str) -> Iterator[None]:
    """Turn the absence of ``modules`` inside the block into an ImportError that names the pip extra to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in modules:
            raise
        raise ImportError(f"this needs {error.name}, which is not installed: pip install '.[{extra}]' in a checkout of "
                          "ssd_kernels", name=error.name) from error
