"""Several streams as one.

async with contextlib.aclosing(together([one.pieces(), another.pieces()])) as items:
    async for item in items: ...        # as they come, whichever they come from
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import TypeVar

T = TypeVar("T")


def together(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Run them at once; the first error of one ends all. Leaving early closes them."""
    return streams[0] if len(streams) == 1 else _merged(streams)  # one needs no task, and waits while its reader does


async def _merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    queue: asyncio.Queue[tuple[T] | Exception | None] = asyncio.Queue()

    async def run(stream: AsyncGenerator[T, None]) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for item in stream:
                    queue.put_nowait((item,))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(run(stream)) for stream in streams]
    try:
        left = len(tasks)
        while left:
            came = await queue.get()
            if isinstance(came, Exception):
                raise came
            if came is None:
                left -= 1
            else:
                yield came[0]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
