"""A server that starts, runs in a thread of its own, and ends in order."""

from __future__ import annotations

import socket
import threading
import time
from ipaddress import ip_address

import uvicorn

from .app import create_app
from .connections import Connection
from .service import Service

SENDING = 10.0  # seconds that answers have at least, after the last picture is drawn
SPARE_CONNECTIONS = 512  # beside those whose pictures are drawn or wait


class Server:
    """Answers requests from the moment it is made.

    Attributes:
        url: where.
        loopback: only this machine can reach it.
    """

    def __init__(self, service: Service, host: str = "127.0.0.1", port: int = 8000, api_key: str | None = None) -> None:
        """
        Args:
            service: for this server alone, which ends it.
            host: name or address; ``port``: 0 for any that is free.
            api_key: as in `create_app`.

        Raises:
            ValueError: no such host.
            OSError: the port cannot be had.
        """
        self.service = service
        listening = _listen(host, port)
        address, port = listening.getsockname()[:2]
        self.loopback = ip_address(address.partition("%")[0]).is_loopback
        self.url = f"http://{f'[{address}]' if ':' in address else address}:{port}"
        self._server = uvicorn.Server(uvicorn.Config(
            create_app(service, api_key), http=Connection, ws="none", lifespan="off", log_level="warning",
            access_log=False, server_header=False,
            limit_concurrency=service.limits.batch + service.limits.waiting + SPARE_CONNECTIONS))
        self._ended = threading.Event()
        threading.Thread(target=self._run, args=(listening,), name="ssd_janus serving", daemon=True).start()
        while not self._server.started and not self._ended.is_set():
            time.sleep(0.01)

    def wait(self) -> None:
        """Until it has ended."""
        # Not by joining the thread: where a signal's exception ends a join, Python 3.11 takes the thread for ended.
        while not self._ended.is_set():
            time.sleep(0.05)

    def stop(self, grace: float) -> None:
        """Answer new requests with 503, draw the others for at most ``grace`` seconds, and end."""
        end = time.monotonic() + grace
        self.service.finish(grace)
        self._server.config.timeout_graceful_shutdown = max(SENDING, end - time.monotonic())  # type: ignore[assignment]
        self._server.should_exit = True
        self.wait()
        self.service.release()

    def _run(self, listening: socket.socket) -> None:
        try:
            self._server.run([listening])
        finally:
            self._ended.set()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ValueError(f"host must be a name or address of this machine, got {host!r}: {error.strerror}") from None
    return socket.create_server(address[:2], family=family, backlog=2048)
