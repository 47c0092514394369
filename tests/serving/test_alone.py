"""The server connects to nobody but the upstreams that it was given: every packet is seen, in a network of its own."""

import json
import re
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from slingshot.checkpoint.load_save import save_checkpoint

pytestmark = pytest.mark.slow

CHAT = [{"role": "user", "content": "What is 3+4-2?"}]
ASKED = [
    ["POST", "/v1/chat/completions", {"model": "tiny", "messages": CHAT, "max_tokens": 5, "stream": True}],
    ["POST", "/v1/responses", {"model": "tiny", "input": "3+4", "max_output_tokens": 5}],
    ["POST", "/v1/messages", {"model": "tiny", "messages": CHAT, "max_tokens": 5}],
    ["POST", "/v1/messages/count_tokens", {"model": "tiny", "messages": CHAT}],
    ["POST", "/v1/completions", {"model": "tiny", "prompt": "3+4", "max_tokens": 5}],
    ["POST", "/tokenize", {"prompt": "3+4"}],
    *(["GET", path, None] for path in ("/v1/models", "/metrics", "/status.json", "/health", "/status", "/")),
]


@pytest.fixture
def alone(tokenizer, make_model, dense, tmp_path):
    """alone(*arguments of serve, upstreams=0): the statuses of what was asked, and whom that connected to."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        pytest.skip("this kernel gives no network of its own (unshare -rn)")
    folder = tmp_path / "tiny"
    folder.mkdir()
    save_checkpoint(folder, make_model(dense(vocab_size=tokenizer.vocab_size, max_position_embeddings=256)), tokenizer)
    page = files("slingshot.serving") / "page"
    linked = re.findall(r'(?:src|href)="([\w./-]+)"', (page / "index.html").read_text())

    def run(*serve, **more):
        arguments = {"serve": [*serve, "--ledger", f"{tmp_path}/ledger.sqlite"], "checkpoint": str(folder)}
        arguments["asked"] = [*ASKED, *(["GET", f"/{path.removeprefix('/')}", None] for path in linked)]
        command = ["unshare", "-rn", sys.executable, "-m", "tests.serving.alone", json.dumps(arguments | more)]
        done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        return told["statuses"], told["connected"]

    return run


def test_a_server_connects_to_nobody(alone):
    statuses, connected = alone()
    assert len(statuses) > len(ASKED) and set(statuses) == {200}
    assert connected["server"] and not connected["elsewhere"]


def test_a_server_connects_to_its_upstreams_alone(alone):
    statuses, connected = alone("--engine", "vllm", upstreams=2)
    assert set(statuses) == {200} and len(connected["upstream"]) == 2 and not connected["elsewhere"]


def test_a_connection_to_elsewhere_would_be_seen(alone):
    elsewhere = ("--upstream", "http://198.51.100.7:8000", "--upstream", "http://a.example")
    statuses, connected = alone("--engine", "vllm", *elsewhere, asked=[])
    assert not statuses and ["198.51.100.7", 8000] in connected["elsewhere"]
    assert 53 in [port for _, port in connected["elsewhere"]]
