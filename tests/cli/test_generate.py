"""generate.py: prompts in, completions out in order, whatever was killed on the way."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slingshot.data.examples import read_examples
from slingshot.engine.engine import Engine
from slingshot.engine.sampling import SamplingParams
from tests.waiting import until

Command = Callable[..., tuple[int, str, str]]

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "three plus three"}]
ROWS: list[dict[str, Any]] = [
    {"prompt": "three", "id": "a", "max_tokens": 3},
    {"messages": CHAT, "id": 7, "n": 2, "temperature": 0, "level": "columns of a data set do not matter"},
    {"prompt": CHAT, "seed": 5},
    {"prompt": "plus\u2028three"},
]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    return tmp_path / "prompts.jsonl"


def asking(checkpoint: Path, prompts: Path, out: Path) -> tuple[object, ...]:
    return "generate", checkpoint, "--dtype", "float32", "--prompts", prompts, "--out", out


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_prompts_come_from_arguments_standard_input_and_files(
    command: Command, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\n\nthree\n"))
    (tmp_path / "more.txt").write_text("four\nfive\n")
    code, out, _ = command("generate", checkpoint, "--max-tokens", 1, "one", "-", "--prompts", tmp_path / "more.txt")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [row["prompt"] for row in rows] == ["one", "two", "three", "four", "five"]
    assert rows[0].keys() == {"prompt", "reasoning", "answer", "sample", "finish_reason", "tokens"}


def test_a_file_of_rows_gives_what_the_engine_gives(command: Command, checkpoint: Path, prompts: Path) -> None:
    """In the rows' order and with their own parameters; a chat goes on with the reply, as training reads it."""
    out = prompts.with_name("new") / "completions.jsonl"
    code, said, _ = command(*asking(checkpoint, prompts, out), "-n", 3, "--max-tokens", 6)
    assert code == 0
    rows, engine = read(out), Engine.load(checkpoint, "float32")
    assert [(row.get("id"), row["sample"]) for row in rows] == [
        ("a", 0), ("a", 1), ("a", 2), (7, 0), (7, 1), (None, 0), (None, 1), (None, 2), (None, 0), (None, 1), (None, 2)
    ]  # fmt: skip
    params = {"max_tokens": 6, "temperature": 0.6, "top_p": 0.95, "n": 3}
    expected = []
    for row in ROWS:
        own = {key: row[key] for key in ("max_tokens", "temperature", "n", "seed") if key in row}
        asked = row.get("messages", row.get("prompt"))
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        (output,) = engine.generate([messages], SamplingParams(**{**params, **own}))
        expected += [
            (completion.reasoning, completion.answer, len(completion.token_ids)) for completion in output.outputs
        ]
    whole = out.with_name("whole.jsonl")  # as if none had been cut off
    whole.write_text("\n".join(json.dumps(row | {"finish_reason": "stop"}) for row in rows))
    examples = read_examples(whole)
    assert [(example.reasoning, example.answer) for example in examples] == [each[:2] for each in expected]
    assert [row["tokens"] for row in rows] == [each[2] for each in expected]
    assert examples[3].prompt == CHAT and rows[0]["prompt"] == "three"
    tokens = sum(row["tokens"] for row in rows)
    assert said.startswith(f"made {out}: 11 completions of 4 prompts, {tokens} tokens now at ")
    assert f"next: slingshot sft MODEL data={out}" in said


def test_a_killed_run_goes_on_behind_the_last_whole_line(command: Command, checkpoint: Path, prompts: Path) -> None:
    out = prompts.with_name("completions.jsonl")
    arguments = (*asking(checkpoint, prompts, out), "-n", 3, "--max-tokens", 6)
    assert command(*arguments)[0] == 0
    whole = out.read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == ord("\n")]
    for size in (1, ends[1] - 1, ends[3] + 9, ends[9]):
        out.write_bytes(whole[:size])
        assert command(*arguments)[0] == 0 and out.read_bytes() == whole
    assert command(*arguments)[1].startswith(f"made {out}: 11 completions of 4 prompts\n")


def test_an_output_of_something_else_is_not_continued(command: Command, checkpoint: Path, prompts: Path) -> None:
    out = prompts.with_name("completions.jsonl")
    arguments = (*asking(checkpoint, prompts, out), "--max-tokens", 2)
    assert command(*arguments)[0] == 0
    before = out.read_bytes()
    for more, line in (
        (["--top-k", 3], f"{out} line 1 was made with another checkpoint or other sampling; remove the file"),
        (["--raw"], f"{out} line 1 was made with another checkpoint or other sampling; remove the file"),
        (["four"], f"{out} line 1 answers another prompt; remove the file or choose another --out"),
        (["-n", 3], f"{out} line 1 was made with another checkpoint"),
    ):
        code, said, err = command(*arguments, *more)
        assert (code, said, err.count("\n")) == (2, "", 1) and line in err and out.read_bytes() == before
    for place in ("/dev/full", "/dev/null", out.parent):
        assert f"{place} is no plain file; choose another --out" in command(*asking(checkpoint, prompts, place))[2]
    prompts.write_text(json.dumps(ROWS[0]) + "\n")
    assert f"{out} line 2 answers no prompt" in command(*arguments)[2] and out.read_bytes() == before


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"question": "six"}', 'a row is an object with "prompt" (text, or a chat) or "messages"'),
        ('{"prompt": "six", "messages": []}', "a row is an object with"), ('{"prompt": ""}', "a row is an object with"),
        ('{"messages": "six"}', "a row is an object with"), ('["six"]', "a row is an object with"),
        ('{"prompt": "six", "temprature": 1}', "'temprature' is no sampling parameter; did you mean temperature?"),
        ('{"prompt": "six", "top_p": 2}', "sampling: top_p must be above 0 and at most 1, got 2"),
        ('{"prompt": "six"', "is not valid JSON"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named_before_anything_runs(
    command: Command, checkpoint: Path, prompts: Path, row: str, message: str
) -> None:
    prompts.write_text('{"prompt": "five"}\n\n' + row + "\n")
    code, out, err = command("generate", checkpoint, "--prompts", prompts, "--out", prompts.with_name("x.jsonl"))
    assert code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith(f"slingshot: {prompts} line 3") and message in err
    assert not prompts.with_name("x.jsonl").exists()


def test_a_row_that_cannot_be_asked_is_named_before_anything_runs(
    command: Command, checkpoint: Path, prompts: Path
) -> None:
    lines = [json.dumps({"prompt": text}) for text in ("one", "two", "three " * 5000, "four")]
    out = prompts.with_name("completions.jsonl")
    arguments = (*asking(checkpoint, prompts, out), "--max-tokens", 2)
    prompts.write_text(lines[0])
    assert command(*arguments)[0] == 0
    before = out.read_bytes()
    for row, reason in (
        (lines[2], "the prompt has "),
        ('{"prompt": "x", "logit_bias": {"999": 1}}', "sampling: logit"),
    ):
        prompts.write_text("\n".join([*lines[:2], row, lines[3]]))
        code, _, err = command(*arguments)
        assert code == 2 and err.splitlines()[-1].startswith(f"slingshot: {prompts} line 3: {reason}")
        assert out.read_bytes() == before
    prompts.write_text("\n".join([*lines[:2], json.dumps({"prompt": "three"}), lines[3]]))
    assert command(*arguments)[0] == 0
    assert [row["prompt"] for row in read(out)] == ["one", "two", "three", "four"]


def test_marks_line_ends_and_lone_surrogates_of_prompts(command: Command, checkpoint: Path, tmp_path: Path) -> None:
    """A byte order mark and the line ends of Windows are no part of a prompt; what only JSON can carry comes back."""
    text, rows, out = (tmp_path / name for name in ("prompts.txt", "prompts.jsonl", "out.jsonl"))
    text.write_bytes("\ufeffthree\r\n\r\nplus\u2028\r\n".encode())
    _, said, _ = command("generate", checkpoint, "--prompts", text, "--max-tokens", 2)
    assert [json.loads(line)["prompt"] for line in said.split("\n") if line] == ["three", "plus\u2028"]
    rows.write_bytes(b'\xef\xbb\xbf{"prompt": "\\ud800 three", "id": "\\udfff"}\r\n\r\n')
    arguments = ("generate", checkpoint, "--prompts", rows, "--max-tokens", 2)
    code, said, _ = command(*arguments)
    assert code == 0 and (row := json.loads(said))["prompt"] == "\ud800 three" and row["id"] == "\udfff"
    for _ in range(2):  # made, and found complete
        assert command(*arguments, "--out", out)[0] == 0
        assert [kept["prompt"] for kept in read(out)] == ["\ud800 three"]


def test_bytes_that_are_no_text_are_refused(
    command: Command, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"three\xff"), "utf-8", "surrogateescape"))
    for typed, where in (("three\udcff", "the prompt"), ("-", "standard input")):
        code, said, err = command("generate", checkpoint, typed)
        assert (code, said, err.count("\n")) == (2, "", 1) and f"{where} is not UTF-8 text" in err


@pytest.mark.slow
def test_a_checkpoint_is_known_by_what_it_holds(command: Command, checkpoint: Path, prompts: Path) -> None:
    out = prompts.with_name("completions.jsonl")
    assert command(*asking(checkpoint, prompts, out))[0] == 0
    moved = checkpoint.rename(checkpoint.with_name("moved"))
    assert command(*asking(moved, prompts, out))[1].startswith(f"made {out}: 5 completions of 4 prompts\n")
    config = moved / "generation_config.json"
    config.write_text(config.read_text() + " ")
    assert f"{out} line 1 was made with another checkpoint" in command(*asking(moved, prompts, out))[2]


@pytest.mark.slow
def test_every_sampling_option_reaches_the_engine(command: Command, checkpoint: Path, prompts: Path) -> None:
    """By its own flag, and by a row's key."""
    (prompts.parent / "schema.json").write_text('{"enum": ["x"]}')
    asked = ("generate", checkpoint, "--dtype", "float32", "--max-tokens", 12, "--thinking-budget", 0)
    for flags, keys, row in (
        (["--regex", "a+b", "--temperature", 0], {"regex": "a+b", "temperature": 0}, {}),
        (["--choice", "yes", "--choice", "no"], {"choice": ["yes", "no"]}, {}),
        (["--grammar", 'root ::= "abc"'], {"grammar": 'root ::= "abc"'}, {"answer": "abc", "finish_reason": "stop"}),
        (["--json-schema", prompts.parent / "schema.json"], {"json_schema": {"enum": ["x"]}}, {"answer": '"x"'}),
        (["--logit-bias", "70=100", "--logit-bias", "71=-inf"], {"logit_bias": {"70": 100, "71": float("-inf")}}, {}),
        (["--bad-word", "e", "--min-p", 0.1, "--top-k", 9], {"bad_words": ["e"], "min_p": 0.1, "top_k": 9}, {}),
        (["--repetition-penalty", 1.5], {"repetition_penalty": 1.5}, {}),
        (["--presence-penalty", 1], {"presence_penalty": 1}, {}),
        (["--frequency-penalty", 2, "--thinking-budget", 2], {"frequency_penalty": 2, "thinking_budget": 2}, {}),
        (["--stop", "e", "--stop-token-id", 70], {"stop": ["e"], "stop_token_ids": [70]}, {}),
        (["--ignore-eos", "--seed", 5, "--top-p", 1], {"ignore_eos": True, "seed": 5, "top_p": 1}, {"tokens": 12}),
        (["--top-logprobs", 2, "--prompt-logprobs", 1], {"top_logprobs": 2, "prompt_logprobs": 1}, {}),
    ):
        (prompts.parent / "one.jsonl").write_text(json.dumps({"prompt": "three", **keys}))
        one, other = command(*asked, "three", *flags), command(*asked, "--prompts", prompts.parent / "one.jsonl")
        assert one[0] == 0 and one == other
        said = json.loads(one[1])
        assert said | row == said
    assert len(said["token_ids"]) == len(said["logprobs"]) == len(said["top_logprobs"]) == said["tokens"]
    assert len(said["prompt_logprobs"]) == len(said["prompt_token_ids"]) and said["prompt_top_logprobs"][0] is None


def test_an_answer_that_cannot_go_on_is_a_row_of_its_own(command: Command, checkpoint: Path, prompts: Path) -> None:
    prompts.write_text('{"prompt": "a", "regex": "ab", "bad_words": ["ab"]}\n{"prompt": "b", "regex": "ab"}\n')
    code, out, err = command("generate", checkpoint, "--prompts", prompts, "--thinking-budget", 0)
    failed, other = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and err == "slingshot: 1 prompt could not be answered; `error` in the row says why\n"
    assert failed["finish_reason"] == "error" and "no token can follow" in failed["error"]
    assert other["answer"] == "ab" and "error" not in other


def test_answers_that_were_cut_off_are_not_learned(
    command: Command, checkpoint: Path, prompts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = prompts.with_name("completions.jsonl")
    assert command(*asking(checkpoint, prompts, out), "--max-tokens", 2)[0] == 0
    rows = read(out)
    rows[1]["finish_reason"], rows[2]["finish_reason"] = "stop", "error"
    out.write_text("\n".join(json.dumps(row) for row in rows))
    whole = sum(row["finish_reason"] == "stop" for row in rows)
    assert len(read_examples(out)) == whole < len(rows)
    assert f"{out}: {len(rows) - whole} answers were cut off (finish_reason) and are left out" in caplog.text


@pytest.mark.slow
def test_kill_9_in_the_middle_changes_nothing(command: Command, checkpoint: Path, tmp_path: Path) -> None:
    prompts, out, other = (tmp_path / name for name in ("prompts.txt", "killed.jsonl", "whole.jsonl"))
    prompts.write_text("\n".join(f"three plus {number}" for number in range(250)))
    killed, whole = ((*asking(checkpoint, prompts, file), "-n", 8, "--max-tokens", 40) for file in (out, other))
    script = [sys.executable, "-m", "slingshot", *map(str, killed)]
    with subprocess.Popen(script, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        until(lambda: process.poll() is not None or (out.exists() and out.stat().st_size >= 20_000))
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and 0 < out.read_bytes().count(b"\n") < 2000
    assert command(*killed)[0] == command(*whole)[0] == 0
    assert out.read_bytes() == other.read_bytes()
