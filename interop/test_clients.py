"""Programs that people use, as clients of a server on loopback: lm-eval, LangChain, OpenAI's Agents SDK, the
Codex CLI, Claude Code.

    make clients

SmolLM2-135M-Instruct answers where the answer counts. Where a client is to call a tool, a scripted model calls it: what
it says is known, so the next prompt has to begin with exactly what was sampled. Proxies that are not there keep the
clients from reaching anything but loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from interop.conftest import Peer
from interop.servers import REPO, free_port, peer_python, running
from slingshot.serving.app import create_app
from slingshot.serving.backend import Generation, TokenDelta
from slingshot.serving.gateway import Gateway
from slingshot.serving.served_model import ServedModel
from tests.serving.conftest import ScriptedBackend, calling_tokenizer, said
from tests.serving.conftest import running as in_process

CAPITALS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Spain": "Madrid", "Egypt": "Cairo"}
NOWHERE = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9") | {"NO_PROXY": "127.0.0.1"}
MODELS = ("OPUS", "SONNET", "HAIKU")
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{questions}"}}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
{rest}
"""


class Caller(ScriptedBackend):
    """Calls a tool until it has a result of one; then it answers. Whoever offers none is answered at once."""

    def __init__(self, tool: str, arguments: dict[str, str]) -> None:
        self.tokenizer = calling_tokenizer()
        super().__init__([], chunk=4, max_length=1 << 20, eos_ids=self.tokenizer.eos_ids)
        call = json.dumps({"name": tool, "arguments": arguments}, separators=(" , ", " : "))  # nobody writes it so
        self.call = said(self.tokenizer, f"Look.\n</think>\n\nOne moment.\n<tool_call>\n{call}\n</tool_call>")
        self.end = said(self.tokenizer, "Seen.\n</think>\n\nIt is 42.")

    async def generate(self, generation: Generation) -> AsyncGenerator[TokenDelta, None]:
        prompt = self.tokenizer.decode(list(generation.prompt_ids))
        self.ids = self.call if "tools: " in prompt and "result: " not in prompt else self.end
        async for delta in super().generate(generation):
            yield delta

    def assert_round_trip(self, result: str) -> None:
        """The last prompt begins with the first one and what was sampled, to the token, and holds the tool's result."""
        first, *_, last = (its.prompt_ids for its in self.asked if "tools: " in self.tokenizer.decode(its.prompt_ids))
        turn = (*first, *self.call)
        assert last[: len(turn)] == turn
        assert result in self.tokenizer.decode(last[len(turn) :])


@pytest.fixture
def scripted() -> Iterator[Callable[..., tuple[Caller, str]]]:
    """scripted(tool, arguments): the backend and the URL of a server of it, whose model is called "scripted"."""
    servers = []

    def make(tool: str, **arguments: str) -> tuple[Caller, str]:
        backend = Caller(tool, arguments)
        servers.append(in_process(create_app(Gateway([ServedModel("scripted", backend.tokenizer, backend)]))))
        return backend, servers[-1].__enter__()

    yield make
    for server in servers:
        server.__exit__(None, None, None)


@pytest.fixture(scope="module")
def smollm2_url(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    work, port = tmp_path_factory.mktemp("served"), free_port()
    command = [sys.executable, "-m", "slingshot", "serve", str(smollm2), "--port", str(port)]
    with running([*command, "--ledger", str(work / "ledger.sqlite")], port, work / "server.log") as url:
        yield url


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home of its own, with a folder `work` to be in."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "note.txt").write_text("what stands here is 42\n")
    return tmp_path


def run(command: list[str], home: Path, **more: str) -> str:
    """A client's standard output; it fails with what it says on standard error."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), **NOWHERE, **more}
    process = subprocess.run(
        command, env=environment, cwd=home / "work", stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, f"{process.stdout[-2000:]}\n{process.stderr[-4000:]}"
    return process.stdout


def program(name: str) -> str:
    path = REPO / ".venv-clients" / "node_modules" / ".bin" / name
    if not path.exists():
        pytest.fail(f"{name} is not there: make clients installs it, with npm", pytrace=False)
    return str(path)


def lm_eval(home: Path, url: str, kind: str, model: str, text: str, rest: str, *more: str) -> dict[str, Any]:
    """The results of a task of the capitals, and its samples."""
    questions = home / "capitals.jsonl"
    rows = [{"country": country, "city": city, "cities": [*CAPITALS.values()]} for country, city in CAPITALS.items()]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "capitals.yaml").write_text(
        TASK.format(name="capitals", questions=questions, kind=kind, text=text, rest=rest)
    )
    path = "chat/completions" if model == "local-chat-completions" else "completions"
    arguments = f"base_url={url}/v1/{path},model=smollm2,num_concurrent=2,max_length=1024"
    command = [peer_python("clients"), "-m", "lm_eval", "--model", model, "--model_args", arguments, "--tasks"]
    command += ["capitals", "--include_path", str(home), "--output_path", str(home / "out"), "--log_samples", *more]
    run(command, home, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    [results], [samples] = (list((home / "out").rglob(f"{name}*")) for name in ("results_", "samples_"))
    told: dict[str, Any] = json.loads(results.read_text())["results"]["capitals"]
    return told | {"samples": [json.loads(line) for line in samples.read_text().splitlines()]}


def test_lm_eval_weighs_choices_by_the_logprobs_of_the_prompt(smollm2_url: str, home: Path) -> None:
    rest = 'doc_to_choice: "{{cities}}"\ndoc_to_target: "{{city}}"\nmetric_list: [{metric: acc}]'
    text = "The capital of {{country}} is"
    told = lm_eval(home, smollm2_url, "multiple_choice", "local-completions", text, rest)
    assert told["acc,none"] == 1.0
    [sample] = (sample for sample in told["samples"] if sample["doc"]["country"] == "France")
    body = {
        "model": "smollm2",
        "prompt": "The capital of France is Paris",
        "echo": True,
        "logprobs": 0,
        "max_tokens": 0,
    }
    asked = httpx.post(f"{smollm2_url}/v1/completions", json=body, timeout=60).json()["choices"][0]["logprobs"]
    assert float(sample["filtered_resps"][0][0]) == pytest.approx(asked["token_logprobs"][-1], abs=0.01)


def test_lm_eval_reads_the_answers_of_a_chat(smollm2_url: str, home: Path) -> None:
    rest = """\
doc_to_target: "{{city}}"
generation_kwargs: {until: ["."], max_gen_toks: 30, temperature: 0}
filter_list: [{name: city, filter: [{function: regex, regex_pattern: "is ([A-Z][a-z]+)"}, {function: take_first}]}]
metric_list: [{metric: exact_match}]"""
    text = "What is the capital of {{country}}? Answer in one sentence."
    told = lm_eval(home, smollm2_url, "generate_until", "local-chat-completions", text, rest, "--apply_chat_template")
    assert told["exact_match,city"] == 1.0


@pytest.mark.parametrize("does", ["invoke", "stream"])
def test_langchain_gets_the_answer_and_its_tokens(peer: Callable[[str], Peer], smollm2_url: str, does: str) -> None:
    question = "What is the capital of France? Answer in one sentence."
    told = peer("clients")({"url": smollm2_url, "does": does, "model": "smollm2", "question": question})
    assert told["text"] == "The capital of France is Paris."
    assert (told["usage"]["input_tokens"], told["usage"]["output_tokens"]) == (42, 8)
    assert told.get("chunks", 9) >= 8


def test_langchain_gets_an_object_of_its_class(peer: Callable[[str], Peer], smollm2_url: str) -> None:
    question = "What is the capital of France?"
    told = peer("clients")({"url": smollm2_url, "does": "structured", "model": "smollm2", "question": question})
    assert told == {"city": "Paris"}


def test_langchain_calls_a_tool(peer: Callable[[str], Peer], scripted: Callable[..., tuple[Caller, str]]) -> None:
    backend, url = scripted("weather", city="Paris")
    told = peer("clients")({"url": url, "does": "tools", "model": "scripted", "question": "How is it in Paris?"})
    assert [(call["name"], call["args"]) for call in told["calls"]] == [("weather", {"city": "Paris"})]
    assert told["text"] == "It is 42."
    backend.assert_round_trip("rain in Paris")


def test_an_agent_of_openai_s_sdk_calls_a_tool(
    peer: Callable[[str], Peer], scripted: Callable[..., tuple[Caller, str]]
) -> None:
    backend, url = scripted("weather", city="Paris")
    told = peer("clients")({"url": url, "does": "agent", "model": "scripted", "question": "How is it in Paris?"})
    assert told == {"text": "It is 42."}
    backend.assert_round_trip("rain in Paris")


def test_codex_runs_a_command_and_answers(scripted: Callable[..., tuple[Caller, str]], home: Path) -> None:
    backend, url = scripted("exec_command", cmd="cat note.txt")
    (home / ".codex").mkdir()
    provider = f'[model_providers.slingshot]\nname = "slingshot"\nbase_url = "{url}/v1"\nwire_api = "responses"\n'
    (home / ".codex" / "config.toml").write_text(f'model = "scripted"\nmodel_provider = "slingshot"\n\n{provider}')
    # the script's one command is harmless, and a sandbox of namespaces is not to be had everywhere
    command = [program("codex"), "exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]
    assert run([*command, "What stands in note.txt?"], home).strip() == "It is 42."
    backend.assert_round_trip("what stands here is 42")


@pytest.mark.parametrize(
    "tool, arguments", [("Bash", {"command": "cat note.txt"}), ("Read", {"file_path": "{work}/note.txt"})]
)
def test_claude_code_calls_a_tool_and_answers(
    scripted: Callable[..., tuple[Caller, str]], home: Path, tool: str, arguments: dict[str, str]
) -> None:
    backend, url = scripted(tool, **{key: value.format(work=home / "work") for key, value in arguments.items()})
    models = {f"ANTHROPIC_{name}MODEL": "scripted" for name in ("", *(f"DEFAULT_{of}_" for of in MODELS))}
    settings = models | {"ANTHROPIC_BASE_URL": url, "ANTHROPIC_AUTH_TOKEN": "none"}
    command = [program("claude"), "-p", "What stands in note.txt?", "--allowedTools", "Bash", "Read"]
    said = run(command, home, CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1", **settings)
    assert said.strip() == "It is 42."
    backend.assert_round_trip("what stands here is 42")
