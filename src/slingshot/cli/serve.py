"""`slingshot serve CHECKPOINT...`: the HTTP API and the chat page, on this machine.

slingshot serve runs/tiny/rl_final
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Sources = Annotated[list[str], typer.Argument(metavar="CHECKPOINT...", help="Folders, .gguf files, hub names.")]


def serve(
    sources: Sources,
    host: Annotated[
        str, typer.Option(help="The address to listen on; others than this machine need keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on.")] = 8000,
) -> None:
    """Serve checkpoints: OpenAI's API with the reasoning shown, and a page to chat on. Ctrl-C ends it."""
    import uvicorn

    from slingshot.engine.engine import Engine
    from slingshot.serving.app import create_app
    from slingshot.serving.gateway import Gateway
    from slingshot.serving.local import LocalBackend
    from slingshot.serving.served_model import ServedModel

    models = []
    for source in sources:
        engine = Engine.load(source)
        models.append(ServedModel(Path(source).name, engine.tokenizer, LocalBackend(engine)))
    uvicorn.run(create_app(Gateway(models)), host=host, port=port, log_level="warning", access_log=False)
