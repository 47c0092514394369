"""llama.cpp's server as a child: started on what it can read, told of in a line where it cannot be, and never left."""

import asyncio
import os
import signal
import subprocess
import sys

import httpx
import pytest

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.load_save import save_checkpoint
from slingshot.engine.vocabulary import Vocabulary
from slingshot.serving.inference_servers import LlamaServer
from slingshot.serving.ledger import Ledger
from slingshot.serving.llama_process import as_gguf, llama_server
from slingshot.serving.upstream import UpstreamBackend
from tests.serving.conftest import serving
from tests.serving.test_killed import rows_of, started
from tests.waiting import until

# As much of the package as the child asks of it: a server that is well, and knows the context of a slot.
PACKAGE = """\
import http.server, json, os, sys, threading, time
from types import SimpleNamespace

def CommonParams():
    return SimpleNamespace(model=SimpleNamespace(), cpuparams=SimpleNamespace(), cpuparams_batch=SimpleNamespace())

class Server:
    def __init__(self, params):
        with open(params.model.path, "rb") as file:
            if file.read(4) != b"GGUF":
                print("0.01 I loading\\n0.02 E invalid magic\\n0.03 E failed to load", file=sys.stderr)
                raise RuntimeError("Failed to init server")

        class Answers(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                print("much " * 50_000, flush=True)
                self.send_response(200)
                self.end_headers()
                told = {"default_generation_settings": {"n_ctx": params.n_ctx // params.n_parallel}}
                self.wfile.write(json.dumps(told | {"total_slots": params.n_parallel}).encode())

            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.end_headers()
                for number in range(1, asked["n_predict"] + 1):
                    event = {"tokens": [100], "content": "", "tokens_predicted": number, "stop": False}
                    self.wfile.write(f"data: {json.dumps(event)}\\n\\n".encode())
                    time.sleep(0.02)
                last = {"tokens": [], "content": "", "stop": True, "stop_type": "limit"}
                self.wfile.write(f"data: {json.dumps(last)}\\n\\n".encode())

            def log_message(self, *_):
                pass

        served = http.server.ThreadingHTTPServer((params.hostnames[0], params.port), Answers)
        with open(params.model.path + ".pid", "w") as file:
            file.write(str(os.getpid()))
        self.listening_address = f"http://127.0.0.1:{served.server_port}"
        threading.Thread(target=served.serve_forever, daemon=True).start()
"""


@pytest.fixture(autouse=True)
def installed(tmp_path, monkeypatch):
    """The package, and a cache folder of the test's own."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "xllamacpp.py").write_text(PACKAGE)
    paths = [str(tmp_path / "packages"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.syspath_prepend(paths[0])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def checkpoint(tokenizer, make_model, dense, tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    save_checkpoint(folder, make_model(dense(vocab_size=tokenizer.vocab_size, max_position_embeddings=512)), tokenizer)
    return folder


def pid(folder):
    """Of the server that started last."""
    [file] = (folder / "cache").rglob("*.pid")
    return int(file.read_text() or 0)


def answers(url):
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False


def test_a_checkpoint_is_run_with_whole_contexts_and_the_server_ends_with_the_block(checkpoint):
    with llama_server(checkpoint, "auto", 16, 1 << 30) as server:
        told = httpx.get(f"{server.url}/props").json()
        assert (told["default_generation_settings"]["n_ctx"], told["total_slots"]) == (512, 16)
    assert not answers(server.url)
    with llama_server(checkpoint, "auto", 16, 1 << 10) as server:  # the cache holds less than one
        told = httpx.get(f"{server.url}/props").json()
        assert told["default_generation_settings"]["n_ctx"] < 512 and told["total_slots"] == 1


def test_a_checkpoint_is_converted_once_and_again_when_it_changes(checkpoint):
    first = as_gguf(checkpoint, "auto")
    written = first.stat().st_mtime_ns
    assert as_gguf(checkpoint, "bfloat16") == first and first.stat().st_mtime_ns == written
    q8_0 = as_gguf(checkpoint, "q8_0")
    os.utime(checkpoint / "config.json", ns=(1, 1))
    second = as_gguf(checkpoint, "auto")
    assert {*first.parent.iterdir()} == {second, q8_0} and second != first
    assert as_gguf(second, "auto") == second
    with pytest.raises(SlingshotError, match="leave --dtype out"):
        as_gguf(second, "float32")


def test_a_server_that_prints_much_is_not_held_up(checkpoint):
    with llama_server(checkpoint, "auto", 1, 1 << 20) as server:
        for _ in range(3):
            assert httpx.get(f"{server.url}/props", timeout=30).status_code == 200


def test_why_it_does_not_start_is_said_in_a_line(tmp_path, monkeypatch):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"nothing")
    with pytest.raises(SlingshotError, match=r"start: invalid magic$"), llama_server(broken, "auto", 1, 1 << 20):
        pass
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(SlingshotError, match="pip install xllamacpp"), llama_server(tmp_path, "auto", 1, 1 << 20):
        pass


def test_a_server_that_is_killed_is_started_again_in_its_place(checkpoint, tmp_path, caplog):
    with llama_server(checkpoint, "auto", 16, 1 << 30, pauses=[0.0], lasting=0.0) as server:
        url = server.url
        for _ in range(3):  # each of them lasted: it is started once more
            os.kill(first := pid(tmp_path), signal.SIGKILL)
            until(lambda first=first: pid(tmp_path) not in (first, 0) and answers(url) and not server.obstacle)
        assert server.url == url and caplog.text.count("ended with status -9; it is started again") == 3
    assert not answers(url)


def test_a_server_that_does_not_start_any_more_is_given_up_and_says_why(checkpoint, tmp_path, caplog, tokenizer):
    with llama_server(checkpoint, "auto", 16, 1 << 30, pauses=[0.0, 0.0]) as server:
        vocabulary = Vocabulary(tokenizer, tokenizer.vocab_size)
        backend = UpstreamBackend([LlamaServer(server.url, vocabulary)], tokenizer, child=server)
        with serving(tokenizer, backend) as url:
            assert httpx.get(f"{url}/health").status_code == 200
            as_gguf(checkpoint, "auto").write_bytes(b"nothing")
            os.kill(pid(tmp_path), signal.SIGKILL)
            until(lambda: "restart" in (server.obstacle or ""))
            asked = httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "3+4"})
            health = httpx.get(f"{url}/health")
    why = "llama.cpp's server does not start: invalid magic; 2 starts did not help: restart slingshot"
    assert (asked.status_code, asked.json()["error"]["message"]) == (503, why)
    assert (health.status_code, health.json()["reason"]) == (503, why)
    assert [record.getMessage() for record in caplog.records if record.name.endswith("llama_process")] == [
        "llama.cpp's server ended with status -9; it is started again",
        "llama.cpp's server does not start: invalid magic; it is started again",
        why,
    ]


@pytest.mark.slow
def test_streams_of_a_server_that_is_killed_end_with_an_error_and_the_next_are_served(checkpoint, tmp_path):
    options = ["--engine", "llama.cpp", "--ledger", tmp_path / "ledger.sqlite"]
    body = {"model": "tiny", "prompt": "3+4", "stream": True, "max_tokens": 200}

    async def told(url, kill):
        seen = [0] * 8

        async def one(http, number):
            async with http.stream("POST", "/v1/completions", json=body) as answer:
                lines = []
                async for line in answer.aiter_lines():
                    lines += [line] if line.startswith("data: ") else []
                    seen[number] = len(lines)
            return answer.status_code, lines

        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            streams = [asyncio.create_task(one(http, number)) for number in range(8)]
            while min(seen) < 3:
                await asyncio.sleep(0.05)
            os.kill(kill, signal.SIGKILL)
            return await asyncio.gather(*streams)

    with started(checkpoint, options, tmp_path) as (process, url):
        first = pid(tmp_path)
        for status, lines in asyncio.run(told(url, first)):
            assert status == 200 and "failed midway" in lines[-2] and lines[-1] == "data: [DONE]"
        until(lambda: httpx.post(f"{url}/v1/completions", json=body | {"max_tokens": 3}).text.endswith("[DONE]\n\n"))
        assert pid(tmp_path) != first and process.poll() is None
        ledger = Ledger(f"sqlite:///{tmp_path}/ledger.sqlite", gateway=False)
        until(lambda: all(row.ended is not None for row in rows_of(ledger).values()))
        assert sum(row.completion > 0 for row in rows_of(ledger).values()) >= 9
        ledger.close()


@pytest.mark.slow
def test_a_killed_slingshot_leaves_no_server(checkpoint, tmp_path):
    line = [sys.executable, "-m", "slingshot", "serve", str(checkpoint), "--engine", "llama.cpp", "--port", "0"]
    line += ["--ledger", str(tmp_path / "ledger.sqlite")]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline().split()[2]
            assert answers(url)
        finally:
            process.kill()
    until(lambda: not answers(url))
