"""The routes of a server, in the forms of OpenAI's image API."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import StarletteHTTPException
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.sse import format_sse_event
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from ..engine import PictureRequest, Ticket
from .kept import KeptPictures
from .metrics import CLIENT_GONE, CountRequests
from .page import page_routes
from .schema import ImageRequest, Refused, parse, usage
from .service import Drawn, Service

# Of bodies that have not come wholly no more is read.
ANSWER_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 408: {"Connection": "close"}, 413: {"Connection": "close"}}
DISCARDED = 32  # times the largest body: so much of a larger one is read, that the client may read the answer

_logger = logging.getLogger("ssd_janus")
Result = TypeVar("Result")


class ClientGone(Exception):
    """Nobody waits for the answer."""


class Events(StreamingResponse):
    """Server-sent events of one picture, of which no more is drawn when they end, however they do."""

    media_type = "text/event-stream"

    def __init__(self, ticket: Ticket, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-store"})
        self.ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.ticket.cancel()


def create_app(service: Service, api_key: str | None = None) -> FastAPI:
    """
    Args:
        service: that draws.
        api_key: without which nobody draws, as ``Authorization: Bearer KEY``; None lets everybody.
    """
    kept = KeptPictures(service.limits.kept_bytes, service.limits.kept_seconds)
    service.metrics.gauge("kept", "kept under a URL", lambda: len(kept))
    began = int(time.time())
    model = {"id": service.name, "object": "model", "created": began, "owned_by": "ssd_janus"}

    async def authorised(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if api_key is not None and (scheme.lower() != "bearer" or not hmac.compare_digest(
                given.strip().encode("latin-1"), api_key.encode())):
            raise Refused(401, "incorrect or missing API key: send Authorization: Bearer KEY", code="invalid_api_key")

    app = FastAPI(title="ssd_janus", docs_url=None, redoc_url=None)  # whose pages load scripts from elsewhere
    app.add_middleware(CountRequests, metrics=service.metrics)
    v1 = APIRouter(prefix="/v1", dependencies=[Depends(authorised)])

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        headers = {**error.headers, **ANSWER_HEADERS.get(error.status, {})}
        return JSONResponse(error.body, error.status, headers)

    @app.exception_handler(StarletteHTTPException)
    async def no_route(request: Request, error: StarletteHTTPException) -> JSONResponse:
        body = Refused(error.status_code, f"{error.detail}: {request.method} {request.url.path[:100]}").body
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=CLIENT_GONE)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(_failure().body, 500)

    @v1.post("/images/generations", openapi_extra={"requestBody": {"required": True, "content": {
        "application/json": {"schema": ImageRequest.model_json_schema()}}}})
    async def generate(request: Request) -> Response:
        """Draw pictures of a prompt."""
        asked = parse(await _body(request, service))
        requests = service.requests(asked, await service.plan(asked.policy, asked.budget))
        if asked.stream:
            ticket, pictures = service.draw_rows(requests[0], asked.partial_images or 0)
            return Events(ticket, _events(service, requests[0], asked.partial_images or 0, pictures))
        pictures_drawn = await _unless_gone(request.receive, service.draw(requests))
        data: list[dict[str, Any]] = [{"seed": each.seed} for each in requests]
        for fields, picture in zip(data, pictures_drawn, strict=True):
            if asked.response_format == "url":
                fields["url"] = str(request.url_for("picture", name=kept.keep(picture)))
            else:
                fields["b64_json"] = base64.b64encode(picture).decode()
        return JSONResponse({"created": int(time.time()), "data": data, **_facts(service, requests[0]),
                             "usage": _usage(service, requests)})

    @v1.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @v1.get("/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name != service.name:
            raise Refused(404, f"the model {name[:60]!r} does not exist", "model", "model_not_found")
        return model

    @v1.get("/plans")
    async def plans() -> dict[str, Any]:
        """What requests may name as policy and budget, and what a page has to know of the model."""
        return {"object": "list", **await service.offers(), "model": service.name, "size": service.size,
                "rows": service.rows}

    @v1.get("/plans/{policy}")
    async def one_plan(policy: str, budget: str | None = None) -> Response:
        """A plan as ``ssd-janus generate --plan`` reads it."""
        share = _budget(budget)
        plan = await service.plan(policy, share)
        name = policy if share is None else f"{policy}-{share:g}"
        return JSONResponse(plan.to_dict(), headers={"Content-Disposition": f'inline; filename="{name}.json"'})

    @app.get("/pictures/{name}.png")
    async def picture(name: str) -> Response:
        """A picture that was asked for as a URL."""
        found = kept.get(name)
        if found is None:
            raise Refused(404, "there is no such picture, or no longer", code="picture_not_found")
        return Response(found, media_type="image/png",
                        headers={"Cache-Control": "private, no-store", "X-Content-Type-Options": "nosniff"})

    @app.get("/health")
    async def health() -> JSONResponse:
        load = service.scheduler.load
        state = "ok" if service.healthy else "closing" if service.closing else "failed"
        return JSONResponse({"status": state, "waiting": load.waiting, "joining": load.joining,
                             "running": load.running, "capacity": load.capacity}, 200 if state == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app.include_router(v1)
    app.include_router(page_routes())
    return app


async def _body(request: Request, service: Service) -> bytes:
    """Of a request that has the right kind and size, and comes in time."""
    limits, kind = service.limits, request.headers.get("content-type", "")
    # Without this, pages of other origins could have pictures drawn: a browser asks first only for JSON.
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, f"the Content-Type must be application/json, got {kind[:60]!r}")

    async def read() -> bytes:
        body, size = bytearray(), 0
        async for part in request.stream():
            size += len(part)
            if size <= limits.body:
                body += part
            elif size > limits.body * DISCARDED:
                break
        if size > limits.body:
            raise Refused(413, f"the body must have at most {limits.body} bytes", code="body_too_large")
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), limits.body_seconds)
    except asyncio.TimeoutError:
        raise Refused(408, f"the body must arrive within {limits.body_seconds} s") from None
    except ClientDisconnect:
        raise ClientGone from None


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of ``work``, which is cancelled if the client leaves.

    Raises:
        ClientGone: it has left.
    """

    async def leaves() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(leaves())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        watch.cancel()
        task.cancel()


async def _events(service: Service, request: PictureRequest, partial_images: int, pictures: AsyncIterator[Drawn]
                  ) -> AsyncIterator[bytes]:
    """Every picture as an event; an error is the last one."""
    number, facts = 0, _facts(service, request)
    try:
        async for picture, seconds in pictures:
            partial = number < partial_images
            kind = f"image_generation.{'partial_image' if partial else 'completed'}"
            fields = {"type": kind, "b64_json": base64.b64encode(picture).decode(), "created_at": int(time.time()),
                      "quality": "auto", "seed": request.seed, "seconds": round(seconds, 3), **facts,
                      **({"partial_image_index": number} if partial else {"usage": _usage(service, [request])})}
            yield format_sse_event(event=kind, data_str=json.dumps(fields))
            number += 1
    except Exception as error:
        if not isinstance(error, Refused):
            _logger.exception("drawing failed")
            error = _failure()
        yield format_sse_event(event="error", data_str=json.dumps(error.body))


def _budget(text: str | None) -> float | None:
    try:
        budget = None if text is None else float(text)
    except ValueError:
        budget = 0.0
    if budget is not None and not 0 < budget <= 1:
        raise Refused(400, f"budget must be within (0, 1], got {str(text)[:60]!r}", "budget", "invalid_value")
    return budget


def _facts(service: Service, request: PictureRequest) -> dict[str, Any]:
    return {"size": service.size, "output_format": "png", "background": "opaque", **service.cache(request)}


def _usage(service: Service, requests: Sequence[PictureRequest]) -> Any:
    return usage(sum(len(each.prompt) for each in requests), len(requests) * service.pipe.shape.num_visual_tokens)


def _failure() -> Refused:
    return Refused(500, "drawing failed; the server's log says why", code="drawing_failed")
