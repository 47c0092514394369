"""`slingshot plan` says what the plan says, as tables, one JSON object, a page; nonsense is one line; torch stays
away."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from slingshot.base.errors import SlingshotError
from slingshot.base.files import write_json
from slingshot.base.quantity import show_money
from slingshot.cli import plan as door
from slingshot.model.config import ModelConfig
from slingshot.planning.page import plan_page, render
from slingshot.planning.plan_training import plan_pretrain
from slingshot.planning.request import NamedModel, PretrainRequest

PRETRAIN = "pretrain --model deepseek-v3 --tokens 14.8T --device h800 --count 2048 --tflops 385"
RL = "rl --model moonlight-16b-a3b --device h100 --count 64 --steps 100 --response 2K --longest 16K"
DISTILL = "distill --model qwen2.5-1.5b --teacher deepseek-v3 --device h800 --count 64 --samples 800K --response 5.4K"
SERVE = (
    "serve --model deepseek-v3 --device h800 --prompt 4383 --response 1210 --hit-share 56.3% --prices 0.14/0.55/2.19 "
    "--input 608B --output 168B"
)


def run(arguments: str) -> Any:
    return CliRunner().invoke(door.app, shlex.split(arguments), env={"COLUMNS": "200"})


def printed(arguments: str) -> str:
    result = run(arguments)
    assert result.exit_code == 0, result.exception
    return result.stdout


def as_json(arguments: str) -> dict[str, Any]:
    return json.loads(printed(f"{arguments} --json"))


def test_numbers_are_read_as_people_write_them() -> None:
    options = "--price $1.5 --batch 62.9M --stage 'context extension=119K' --stage post-training=5K"
    found = as_json(f"{PRETRAIN} {options}")
    assert found["tokens"] == 14.8e12 and found["price"] == 1.5 and found["batch_tokens"] == 62.9e6
    assert [stage["device_hours"] for stage in found["stages"]][-2:] == [119e3, 5e3]
    served = as_json(f"{SERVE} --latency 40ms")
    assert (served["latency"], served["prices"]) == (0.04, [0.14, 0.55, 2.19])
    assert served["hit_share"] == pytest.approx(0.563) and as_json(f"{RL} --mfu 30%")["mfu"] == pytest.approx(0.3)


def test_the_table_says_what_the_json_says() -> None:
    text, found = printed(f"{PRETRAIN} --stage post-training=5K"), as_json(f"{PRETRAIN} --stage post-training=5K")
    counts = ["54.4 d", "671.03B", "37.552B", "36.626B", "35.699B", "70,272 bytes", "arXiv 2412.19437"]
    headings = ["The bill", "Where the FLOPs go", "The network", "Memory of the fullest", "What dominates", "Assumed"]
    for wanted in [f"{found['device_hours']:,.0f}", *counts, *headings, "of it the MTP module"]:
        assert wanted in text
    assert text.count(f"${found['money']:,.0f}") >= 2  # at the top and under the bill
    assert all(line[:40] in text for line in found["assumptions"])


def test_serving_shows_curve_costs_margin_and_break_even() -> None:
    text, found = printed(SERVE), as_json(SERVE)
    wanted = ["Tokens a second against batch", "Make or buy", "A day",
              "Other devices and precisions", f"{found['day']['margin']:.0%}"]  # fmt: skip
    assert all(each in text for each in wanted)
    assert "no batch is in time" in printed("serve --model llama-3.1-8b --device h100 --latency 10us")


class Page(HTMLParser):
    """Text and tags of a page; refuses what is not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not {"src", "href", "onload"} & {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("arguments", [PRETRAIN, RL, DISTILL, SERVE], ids=lambda arguments: arguments.split()[0])
def test_the_page_is_whole_loads_nothing_and_says_what_the_json_says(arguments: str, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "plan.html"
    assert str(file) in printed(f"{arguments} --html {file}")
    page, found = Page(file.read_text()), as_json(arguments)
    assert "script" not in page.tags and "link" not in page.tags and "http" not in file.read_text()
    assert f"{found['device_hours']:,.0f}" in page.text and show_money(found["money"]) in page.text
    assert found["kind"] == arguments.split()[0] and found["energy_kwh"] > 0 and found["assumptions"]
    assert all(line in page.text for line in [*found["assumptions"], *(stage["name"] for stage in found["stages"])])


def test_a_hostile_name_is_text_on_the_page() -> None:
    model = NamedModel(name="<script>alert(1)</script>", config=ModelConfig.preset("llama-3.1-8b"))
    plan = plan_pretrain(PretrainRequest.parse({"model": model, "device": "h100", "count": 8, "tokens": 1e9}))
    html = render(plan_page(plan))
    assert "<script" not in html and "&lt;script&gt;" in html


def test_a_model_is_a_folder_before_it_is_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `slingshot inspect` has it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deepseek-v3").mkdir()
    assert door.named_model("deepseek-v3").config.family == "deepseek_v3"  # nothing in the folder
    write_json(tmp_path / "deepseek-v3" / "config.json", ModelConfig.preset("llama-3.1-8b").to_hf())
    for source in ("deepseek-v3", "./deepseek-v3", str(tmp_path / "deepseek-v3")):
        assert door.named_model(source) == NamedModel(name=source, config=ModelConfig.preset("llama-3.1-8b"))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("deepseek-v4", "did you mean deepseek-v3?"), ("package:no_such_package", "no_such_package"),
        ("folder/nothing.gguf", "no such folder or .gguf file"), (".", "config.json"),
    ],
)  # fmt: skip
def test_a_source_that_is_none_is_refused_in_one_line(source: str, says: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SlingshotError) as caught:
        door.named_model(source)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (f"{PRETRAIN} --count 0", "--count 0: must be a whole number, at least 1; the nearest is 1"),
        (f"{PRETRAIN} --tokens -3T", "did you mean 3T?"), (f"{PRETRAIN} --tokens 14.8X", "unknown unit 'X'"),
        (f"{PRETRAIN} --device h80", "did you mean h800?"), (f"{PRETRAIN} --pp 15", "the nearest valid value is 16"),
        (f"{PRETRAIN} --stage more", "write NAME=HOURS"), (f"{PRETRAIN} --stage =5", "write NAME=HOURS"),
        (f"{PRETRAIN} --stage a=5 --stage a=6", "a name of its own"),
        (f"{PRETRAIN} --stage pre-training=5", "a name of its own"), (f"{PRETRAIN} --price 2,5", "not a number"),
        (f"{PRETRAIN} --memory 0", "must be more than 0"), (f"{PRETRAIN} --memory 40Gib/s", "not a number"),
        (f"{DISTILL} --epochs nan", "not a number"), (f"{PRETRAIN} --mfu 0.4", "give one of them"),
        (f"{SERVE} --latency soon", "not a number"), (f"{DISTILL} --teacher deepseek", "did you mean deepseek-v3?"),
    ],
)  # fmt: skip
def test_nonsense_is_one_line_with_the_nearest_valid_choice(arguments: str, says: str) -> None:
    result = run(arguments)
    assert isinstance(result.exception, SlingshotError) and result.stdout == ""
    assert says in str(result.exception) and "\n" not in str(result.exception)


def test_planning_needs_no_torch() -> None:
    code = (
        "import sys; from slingshot.cli.plan import app\n"
        f"app({[*shlex.split(PRETRAIN), '--json']!r}, standalone_mode=False)\n"
        "heavy = {'torch', 'numpy', 'jinja2', 'transformers', 'matplotlib'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["days"] == pytest.approx(54.4, abs=0.1)
