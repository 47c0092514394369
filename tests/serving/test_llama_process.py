"""llama.cpp's server as a child: started on what it can read, told of in a line where it cannot be, and never left."""

import os
import subprocess
import sys

import httpx
import pytest

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.load_save import save_checkpoint
from slingshot.serving.llama_process import as_gguf, llama_server
from tests.serving.test_load import until

# As much of the package as the child asks of it: a server that is well, and knows the context of a slot.
PACKAGE = """\
import http.server, json, sys, threading
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
                self.send_response(200)
                self.end_headers()
                told = {"default_generation_settings": {"n_ctx": params.n_ctx // params.n_parallel}}
                self.wfile.write(json.dumps(told | {"total_slots": params.n_parallel}).encode())

            def log_message(self, *_):
                pass

        served = http.server.ThreadingHTTPServer((params.hostnames[0], params.port), Answers)
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


def answers(url):
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.ConnectError:
        return False


def test_a_checkpoint_is_run_with_whole_contexts_and_the_server_ends_with_the_block(checkpoint):
    with llama_server(checkpoint, "auto", 16, 1 << 30) as url:
        told = httpx.get(f"{url}/props").json()
        assert (told["default_generation_settings"]["n_ctx"], told["total_slots"]) == (512, 16)
    assert not answers(url)
    with llama_server(checkpoint, "auto", 16, 1 << 10) as url:  # the cache holds less than one
        told = httpx.get(f"{url}/props").json()
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


def test_why_it_does_not_start_is_said_in_a_line(tmp_path, monkeypatch):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"nothing")
    with pytest.raises(SlingshotError, match=r"start: invalid magic$"), llama_server(broken, "auto", 1, 1 << 20):
        pass
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(SlingshotError, match="pip install xllamacpp"), llama_server(tmp_path, "auto", 1, 1 << 20):
        pass


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
