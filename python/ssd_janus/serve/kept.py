"""Pictures that are kept for a while under names that nobody can guess."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable


class KeptPictures:
    """In memory, the oldest first to go. For one thread."""

    def __init__(self, max_bytes: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_bytes, self.seconds, self.nbytes = max_bytes, seconds, 0
        self._clock = clock
        self._kept: dict[str, tuple[float, bytes]] = {}  # in the order in which they expire

    def __len__(self) -> int:
        self._let_go()
        return len(self._kept)

    def keep(self, picture: bytes) -> str:
        """Its name."""
        name = secrets.token_urlsafe(24)
        self._kept[name] = self._clock() + self.seconds, picture
        self.nbytes += len(picture)
        self._let_go()
        return name

    def get(self, name: str) -> bytes | None:
        """None: there is none of this name, or no longer."""
        self._let_go()
        return self._kept[name][1] if name in self._kept else None

    def _let_go(self) -> None:
        now = self._clock()
        for name, (end, picture) in [*self._kept.items()]:
            if end > now and self.nbytes <= self.max_bytes:
                break
            del self._kept[name]
            self.nbytes -= len(picture)
