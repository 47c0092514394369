"""The chat page at `/`, the owner's at `/status`: static files of this package, which fetch nothing from elsewhere.

serve_page(app)
"""

from __future__ import annotations

from importlib.resources import files

from fastapi import FastAPI
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

# KaTeX sets sizes in style attributes; everything else is the page's own.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; font-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def serve_page(app: FastAPI) -> None:
    folder = str(files("slingshot.serving").joinpath("page"))

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(f"{folder}/index.html", headers={"Content-Security-Policy": _POLICY})

    @app.get("/status", include_in_schema=False)
    async def status_page() -> FileResponse:
        return FileResponse(f"{folder}/status.html", headers={"Content-Security-Policy": _POLICY})

    app.mount("/page", StaticFiles(directory=folder))
