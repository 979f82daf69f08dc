"""The page at ``/``: files of the package, which load nothing from elsewhere."""

from __future__ import annotations

from importlib import resources

from fastapi import APIRouter
from fastapi.responses import Response

FILES = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
                               "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_routes() -> APIRouter:
    """Routes of the page and of the files that it names. They need no key: they say nothing about the server."""
    router, folder = APIRouter(include_in_schema=False), resources.files(__package__) / "static"

    def serve(path: str, name: str, kind: str) -> None:
        content = (folder / name).read_bytes()

        @router.get(path)
        async def file() -> Response:
            return Response(content, media_type=kind, headers=HEADERS)

    serve("/", "index.html", "text/html")
    for name, kind in FILES.items():
        serve(f"/{name}", name, kind)
    return router
