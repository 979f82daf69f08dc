"""What Prometheus reads."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..engine import Scheduler, Ticket

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
CLIENT_GONE = 499  # nginx's number


class Metrics:
    """Counts and times of one server, in a registry of their own."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter("ssd_janus_requests", f"Requests by path and answer; {CLIENT_GONE}: the client left.",
                                ["path", "status"], registry=self.registry)
        self.accepted = Counter("ssd_janus_pictures_accepted", "Pictures that were asked for, and not refused.",
                                registry=self.registry)
        self.pictures = Counter("ssd_janus_pictures", "Pictures by what became of them.", ["outcome"],
                                registry=self.registry)
        self.waited = self._seconds("waiting", "From the request to the first token of a picture.")
        self.first_row = self._seconds("first_row", "From the request to the first row of a picture.")
        self.drawn = self._seconds("drawing", "From the request to the last token of a picture.")
        self.decoded = self._seconds("decoding", "Turning a picture's tokens into a PNG.")
        for name in ("waiting", "joining", "running", "capacity"):
            self.gauge(name, name, lambda name=name: getattr(scheduler.load, name))  # type: ignore[misc]

    def gauge(self, name: str, what: str, value: Callable[[], float]) -> None:
        """Another number of pictures, which is asked for when Prometheus asks."""
        Gauge(f"ssd_janus_pictures_{name}", f"Pictures: {what}.", registry=self.registry).set_function(value)

    def done(self, ticket: Ticket) -> None:
        """A ticket has a result, an error, or was cancelled."""
        if ticket.cancelled():
            self.pictures.labels("cancelled").inc()
            return
        failed = ticket.exception() is not None
        self.pictures.labels("failed" if failed else "drawn").inc()
        if failed:
            return
        for moment, histogram in ((ticket.joined, self.waited), (ticket.first_row, self.first_row),
                                  (ticket.finished, self.drawn)):
            if moment is not None:
                histogram.observe(moment - ticket.submitted)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def _seconds(self, name: str, what: str) -> Histogram:
        return Histogram(f"ssd_janus_{name}_seconds", what, buckets=SECONDS, registry=self.registry)


class CountRequests:
    """ASGI middleware that counts requests by their route and answer."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = CLIENT_GONE

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noting)
        except Exception:
            status = 500  # whose answer is sent further out
            raise
        finally:
            route = scope.get("route")  # paths that are not there would make a label each
            self.metrics.requests.labels("none" if route is None else route.path, str(status)).inc()
