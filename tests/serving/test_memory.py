"""What a server's process holds: as much behind the second crowd as behind the first, and little for an idle stream."""

import asyncio
import contextlib
import json
import random
import resource
from pathlib import Path

import httpx
import pytest

from slingshot.serving import accounts
from tests.serving.test_killed import assert_consistent, checkpoint, crowd, ledger, rows_of, serve, started  # noqa: F401
from tests.serving.test_monitoring import samples
from tests.waiting import until

pytestmark = pytest.mark.slow

CROWD, IDLE = 300, 200


@pytest.fixture(autouse=True)
def _files():
    """As many sockets as the system gives, for the servers too."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def resident(process):
    """Megabytes of memory that it holds."""
    return int(Path(f"/proc/{process.pid}/status").read_text().split("VmRSS:")[1].split()[0]) / 1024


def test_a_crowd_is_booked_as_it_was_served_and_a_second_one_takes_no_more_memory(serve, ledger):  # noqa: F811
    """A third of each hangs up."""
    key, told, held = accounts.create(ledger, "alice", balance=1000.0), {}, []
    process, url = serve()
    with httpx.Client(base_url=url, timeout=30) as http:
        for number in range(2):
            asyncio.run(crowd(url, key, CROWD, random.Random(number), 3, 24, told))
            until(lambda: samples(http)["slingshot_requests_running"]["tiny",] == 0)
            held.append(resident(process))
        assert held[1] < held[0] + 20  # megabytes
        until(lambda: not accounts.keys(ledger)[0].running)
        found = {name: values["tiny",] for name, values in samples(http).items() if ("tiny",) in values}
    rows = rows_of(ledger)
    assert told.keys() <= rows.keys() and len(rows) <= 2 * CROWD
    whole = {name: (usage, seen) for name, (usage, seen) in told.items() if usage}
    assert 2 * CROWD * 2 // 3 < len(whole) < 2 * CROWD
    for name, (usage, seen) in whole.items():
        assert (rows[name].prompt, rows[name].completion) == (usage["prompt_tokens"], usage["completion_tokens"])
        assert seen <= usage["completion_tokens"] + 3
    completion = sum(row.completion for row in rows.values())
    assert found["slingshot_generated_tokens_total"] == found["slingshot_completion_tokens_sum"] == completion
    assert found["slingshot_completion_tokens_count"] == len(rows)
    assert found["slingshot_pages_used"] == found["slingshot_engine_running"] == found["slingshot_waiting_tokens"] == 0
    assert_consistent(ledger, 1000.0)


async def silent(reader, writer):
    """llama.cpp's server, as far as it is asked: a token of every answer, and then nothing."""
    told = {"/health": {}, "/props": {"default_generation_settings": {"n_ctx": 1024}}}
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
        while True:
            path = (await reader.readuntil(b"\r\n\r\n")).decode().split()[1]
            if path in told:
                body = json.dumps(told[path])
                writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
                continue
            event = {"tokens": [100], "content": "7", "tokens_predicted": 1, "stop": False}
            chunk = f"data: {json.dumps(event)}\n\n"
            head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
            writer.write(f"{head}{len(chunk):x}\r\n{chunk}\r\n".encode())
    writer.close()


def test_streams_that_say_nothing_take_a_fifth_of_a_megabyte_each_at_most(checkpoint, tmp_path):  # noqa: F811
    body = json.dumps({"model": "tiny", "prompt": [100] * 32, "stream": True, "max_tokens": 64, "temperature": 1.0})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
    asked = f"{head}Content-Type: application/json\r\n\r\n{body}".encode()

    async def held():
        streams = []

        async def opened(port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(asked)
            await asyncio.wait_for(reader.readuntil(b"data: "), 60)
            streams.append(writer)

        async with await asyncio.start_server(silent, "127.0.0.1", 0, backlog=2048) as quiet:
            upstream = f"http://127.0.0.1:{quiet.sockets[0].getsockname()[1]}"
            options = ["--engine", "llama.cpp", "--upstream", upstream, "--ledger", tmp_path / "ledger.sqlite"]
            with contextlib.ExitStack() as stack:
                process, url = await asyncio.to_thread(stack.enter_context, started(checkpoint, options, tmp_path))
                port = int(url.rpartition(":")[2])
                await opened(port)  # what is made for the first of all requests
                before = resident(process)
                for _ in range(IDLE // 50):
                    await asyncio.gather(*(opened(port) for _ in range(50)))
                await asyncio.sleep(1.0)
                assert len(streams) == IDLE + 1 and process.poll() is None
                took = resident(process) - before
                for writer in streams:
                    writer.close()
                return took

    assert asyncio.run(held()) <= IDLE / 5
