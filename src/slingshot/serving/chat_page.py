"""The chat page at `/`, the owner's at `/status`: static files of this package, which fetch nothing from elsewhere.

serve_page(app)
"""

from __future__ import annotations

from importlib.resources import files

from fastapi import FastAPI
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles


def serve_page(app: FastAPI) -> None:
    folder = str(files("slingshot.serving").joinpath("page"))

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(f"{folder}/index.html")

    @app.get("/status", include_in_schema=False)
    async def status_page() -> FileResponse:
        return FileResponse(f"{folder}/status.html")

    app.mount("/page", StaticFiles(directory=folder))
