"""`slingshot serve`: what it says, what it refuses before a model is loaded, and how it ends."""

import os
import re
import signal
import subprocess
import sys

import httpx
import pytest
import torch
from typer.testing import CliRunner

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.adapter import write_adapter
from slingshot.checkpoint.load_save import save_checkpoint
from slingshot.cli import main as door
from slingshot.serving.served_model import names_of
from slingshot.serving.server import is_loopback, listening
from slingshot.text.tokenizer import Tokenizer
from slingshot.training.lora import LoRAConfig, adapters, add_lora
from slingshot.training.parallel import Parallel


@pytest.fixture
def refused(tmp_path):
    """refused(arguments): the error that `slingshot serve` ends with."""

    def run(*arguments):
        line = ["serve", "nowhere", "--ledger", str(tmp_path / "ledger.sqlite"), "--port", "0", *arguments]
        error = CliRunner().invoke(door.app, line).exception
        assert isinstance(error, SlingshotError)
        return str(error)

    return run


def test_it_refuses_in_a_line_before_a_model_is_loaded(refused):
    with listening("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert f"--port {port + 1}" in refused("--port", str(port))
    assert "slingshot keys create" in refused("--host", "0.0.0.0")
    assert "slingshot keys create" in refused("--require-key")
    assert "vllm serve nowhere" in refused("--engine", "vllm")
    assert "--engine" in refused("--upstream", "http://127.0.0.1:9")
    assert "another --ledger" in refused("--ledger", f"{__file__}/ledger")
    assert "--host" in refused("--host", "192.0.2.1", "--require-key")
    for given in ("sums", "=folder", "sums=", "a/b=folder"):
        assert "write NAME=FOLDER" in refused("--adapter", given)
    assert "served already" in refused("--adapter", "nowhere=folder")
    assert "served already" in refused("--adapter", "sums=folder", "--adapter", "sums=other")
    assert "one checkpoint" in refused("elsewhere", "--adapter", "sums=folder")
    assert "own engine" in refused("--engine", "llama.cpp", "--upstream", "http://127.0.0.1:9", "--adapter", "a=b")
    assert "option of its own" in refused("--engine", "vllm", "--upstream", "http://127.0.0.1:9", "--kv-cache", "int8")


def test_which_addresses_are_this_machine_s_alone():
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.0.2.1", "example.org", "")))


def test_checkpoints_of_one_name_are_told_apart_by_their_folders():
    assert names_of(["runs/tiny/base", "Qwen/Qwen3-0.6B"]) == ["base", "Qwen3-0.6B"]
    assert names_of(["runs/tiny/base", "runs/micro/base", "runs/tiny/rl"]) == ["tiny-base", "micro-base", "rl"]
    assert names_of(["a/x/base", "b/x/base"]) == ["a-x-base", "b-x-base"]
    with pytest.raises(SlingshotError, match="twice"):
        names_of(["a/base", "a/base"])


@pytest.mark.slow
def test_it_says_where_everything_is_adapters_too_and_ends_its_answers_before_it_leaves(tmp_path, make_model, dense):
    tokenizer = Tokenizer.train(["What is 3+4-2? 3 plus 4 is 7."] * 9, vocab_size=290)
    model = make_model(dense(vocab_size=tokenizer.vocab_size, max_position_embeddings=512))
    for name in ("small", "adapter"):
        (tmp_path / name).mkdir()
    save_checkpoint(tmp_path / "small", model, tokenizer)
    add_lora(model, LoRAConfig(rank=4), 0, Parallel())
    for name, each in adapters(model).items():
        if name.endswith("lora_B"):
            each.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    write_adapter(tmp_path / "adapter", adapters(model), 4, 32, "not on this machine")
    line = [sys.executable, "-m", "slingshot", "serve", str(tmp_path / "small"), "--port", "0"]
    line += ["--ledger", str(tmp_path / "ledger.sqlite"), "--adapter", f"sums={tmp_path / 'adapter'}"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        try:
            said = [process.stdout.readline() for _ in range(8)]
            assert re.match(r"Model +small: \w+, .*context of 512 tokens", said[0])
            assert re.match(r"Model +sums: an adapter of small, torch, context of 512 tokens", said[1])
            url = re.match(r"API +(http://127.0.0.1:\d+)/v1", said[2])[1]
            assert said[5] == f"Clients    OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY=none\n"
            assert said[6] == f"           ANTHROPIC_BASE_URL={url} ANTHROPIC_AUTH_TOKEN=none\n"
            cards = httpx.get(f"{url}/v1/models").json()["data"]
            assert [(card["id"], card["max_model_len"]) for card in cards] == [("small", 512), ("sums", 512)]
            body = {"prompt": "3+4", "max_tokens": 20, "temperature": 0, "ignore_eos": True}
            answers = [
                httpx.post(f"{url}/v1/completions", json=body | {"model": name}, timeout=60).json()["choices"]
                for name in ("small", "sums")
            ]
            assert answers[0] != answers[1]
            body |= {"model": "small", "max_tokens": 400, "stream": True}
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
                lines = answer.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                rest = list(lines)
            assert rest[-2] == "data: [DONE]" and '"finish_reason":"length"' in rest[-4]
            assert process.wait(20) == 0
        finally:
            process.kill()
