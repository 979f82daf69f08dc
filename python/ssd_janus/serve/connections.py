"""Connections of clients that are gone, or on which nothing moves, are ended."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

STALLED = 30.0  # seconds
READ_AHEAD = 64 << 10  # bytes


class Connection(H11Protocol):
    """uvicorn's waits for ever for a client that does not end its request's head, that sends on behind an answer, or
    that does not read; and does not see one leave that has sent more than its request. This one

    - is aborted when between two looks, `STALLED` seconds apart, no request has come, or nothing of an answer was
      taken; not while an answer is awaited;
    - reads on while an answer is awaited, up to `READ_AHEAD`, and so sees the end.
    """

    _read_ahead = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look(None)

    def connection_lost(self, error: Exception | None) -> None:
        self._next_look.cancel()
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._awaited and not self.cycle.more_body:
            self._read_ahead += len(data)
            if self._read_ahead < READ_AHEAD:
                self.flow.resume_reading()
        else:
            self._read_ahead = 0

    @property
    def _awaited(self) -> bool:
        """Whether the client waits for an answer, not the server for the client."""
        return self.cycle is not None and not self.cycle.response_complete

    def _look(self, before: tuple[int, Any] | None) -> None:
        state = self.transport.get_write_buffer_size(), self.cycle
        if before == state and (state[0] or not self._awaited):
            self.transport.abort()
        self._next_look = self.loop.call_later(STALLED, self._look, state)
