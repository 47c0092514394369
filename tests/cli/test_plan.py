"""plan.py: the commands say what the plan says, as tables, as one JSON object, as a page; nonsense is one line; torch stays away."""

from __future__ import annotations

import json
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
from slingshot.cost.devices import device
from slingshot.model.config import ModelConfig
from slingshot.planning.plan_training import plan_pretrain

PRETRAIN = [
    "pretrain",
    "--model",
    "deepseek-v3",
    "--tokens",
    "14.8T",
    "--device",
    "h800",
    "--count",
    "2048",
    "--tflops",
    "385",
]
RL = [
    "rl",
    "--model",
    "moonlight-16b-a3b",
    "--device",
    "h100",
    "--count",
    "64",
    "--steps",
    "100",
    "--response",
    "2K",
    "--longest",
    "16K",
]
DISTILL = [
    "distill",
    "--model",
    "qwen2.5-1.5b",
    "--teacher",
    "deepseek-v3",
    "--device",
    "h800",
    "--count",
    "64",
    "--samples",
    "800K",
    "--response",
    "5.4K",
]
SERVE = ["serve", "--model", "deepseek-v3", "--device", "h800", "--prompt", "4383", "--response", "1210", "--hit-share", "56.3%", "--prices",
         "0.14/0.55/2.19", "--input", "608B", "--output", "168B"]  # fmt: skip


def run(arguments: list[str]) -> Any:
    return CliRunner().invoke(door.app, arguments, env={"COLUMNS": "200"})


def printed(arguments: list[str]) -> str:
    result = run(arguments)
    assert result.exit_code == 0, result.exception
    return result.stdout


def as_json(arguments: list[str]) -> dict[str, Any]:
    return json.loads(printed([*arguments, "--json"]))


@pytest.mark.parametrize("arguments", [PRETRAIN, RL, DISTILL, SERVE], ids=lambda arguments: arguments[0])
def test_json_is_one_object_with_what_every_plan_has(arguments: list[str]) -> None:
    found = as_json(arguments)
    assert {
        "device_hours",
        "days",
        "money",
        "energy_kwh",
        "flops",
        "memory_per_device_bytes",
        "memory",
        "fits",
        "stages",
        "dominates",
    } <= found.keys()
    assert found["kind"] == arguments[0] and found["assumptions"] and found["device_hours"] > 0


def test_numbers_are_read_as_people_write_them() -> None:
    found = as_json(
        [
            *PRETRAIN,
            "--price",
            "$1.5",
            "--batch",
            "62.9M",
            "--stage",
            "context extension=119K",
            "--stage",
            "post-training=5K",
        ]
    )
    assert found["tokens"] == 14.8e12 and found["price"] == 1.5 and found["batch_tokens"] == 62.9e6
    assert [stage["device_hours"] for stage in found["stages"]][-2:] == [119e3, 5e3]
    assert as_json([*SERVE, "--latency", "40ms"])["latency"] == 0.04
    assert as_json(SERVE)["hit_share"] == pytest.approx(0.563) and as_json(SERVE)["prices"] == [0.14, 0.55, 2.19]
    assert as_json([*RL, "--mfu", "30%"])["mfu"] == pytest.approx(0.3)


def test_the_table_says_what_the_json_says() -> None:
    text, found = (
        printed([*PRETRAIN, "--stage", "post-training=5K"]),
        as_json([*PRETRAIN, "--stage", "post-training=5K"]),
    )
    for wanted in (
        f"{found['device_hours']:,.0f}",
        f"${found['money']:,.0f}",
        "54.4 d",
        "671.03B",
        "37.55B",
        "36.63B",
        "35.7B",
        "70,272 bytes",
    ):
        assert wanted in text
    assert text.count(f"${found['money']:,.0f}") >= 2  # at the top and under the bill
    for heading in (
        "The bill",
        "Where the FLOPs go",
        "The network",
        "Memory of the fullest device",
        "What dominates",
        "Assumed",
    ):
        assert heading in text
    assert "of it the MTP module" in text and "It fits" in text and "arXiv 2502.05172" in text
    for line in found["assumptions"]:
        assert line[:40] in text


def test_serving_shows_curve_costs_margin_and_break_even() -> None:
    text, found = printed(SERVE), as_json(SERVE)
    assert (
        f"{found['tokens_per_second_per_device']:,.0f} tokens a second" in text
        and f"{found['day']['margin']:.0%}" in text
    )
    for heading in (
        "Tokens a second against batch",
        "Cost per million tokens, by cache hits",
        "Make or buy",
        "A day",
        "Other devices and precisions",
    ):
        assert heading in text
    late = printed(["serve", "--model", "llama-3.1-8b", "--device", "h100", "--latency", "10us"])
    assert "no batch is in time" in late


def test_what_does_not_fit_is_said_loudly_with_what_does() -> None:
    text = printed(["pretrain", "--model", "deepseek-v3", "--tokens", "1T", "--device", "rtx4090", "--count", "8"])
    assert "does NOT fit. The nearest that does: " in text and "x rtx4090" in text


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


@pytest.mark.parametrize("arguments", [PRETRAIN, RL, DISTILL, SERVE], ids=lambda arguments: arguments[0])
def test_the_page_is_whole_loads_nothing_and_says_the_same(arguments: list[str], tmp_path: Path) -> None:
    file = tmp_path / "deep" / "plan.html"
    text = printed([*arguments, "--html", str(file)])
    assert str(file) in text
    page = Page(file.read_text())
    assert "script" not in page.tags and "link" not in page.tags and "http" not in file.read_text()
    found = as_json(arguments)
    assert f"{found['device_hours']:,.0f}" in page.text and show_money(found["money"]) in page.text
    assert all(stage["name"] in page.text for stage in found["stages"]) and all(
        line in page.text for line in found["assumptions"]
    )


def test_a_hostile_name_is_text_on_the_page() -> None:
    plan = plan_pretrain(ModelConfig.preset("llama-3.1-8b"), "<script>alert(1)</script>", device("h100"), 8, tokens=1e9)
    html = door.page(door.tell(plan))
    assert "<script" not in html and "&lt;script&gt;" in html


def test_a_folder_with_a_config_is_a_model_too(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", ModelConfig.preset("llama-3.1-8b").to_hf())
    arguments = ["pretrain", "--tokens", "1B", "--device", "h100", "--model"]
    here, preset = as_json([*arguments, str(tmp_path)]), as_json([*arguments, "llama-3.1-8b"])
    assert here["flops"] == preset["flops"] and here["model"] == str(tmp_path)


def test_a_folder_goes_before_a_preset_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `slingshot inspect` has it."""
    monkeypatch.chdir(tmp_path)
    assert door.load_model_config("deepseek-v3").family == "deepseek_v3"
    (tmp_path / "deepseek-v3").mkdir()
    assert door.load_model_config("deepseek-v3").family == "deepseek_v3"  # nothing in it
    write_json(tmp_path / "deepseek-v3" / "config.json", ModelConfig.preset("llama-3.1-8b").to_hf())
    assert door.load_model_config("deepseek-v3").family == "dense"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([*PRETRAIN, "--count", "0"], "--count 0: must be a whole number, at least 1; the nearest is 1"),
        ([*PRETRAIN, "--tokens", "-3T"], "did you mean 3T?"),
        ([*PRETRAIN, "--tokens", "14.8X"], "unknown unit 'X'"),
        ([*PRETRAIN, "--device", "h80"], "did you mean h800?"),
        ([*PRETRAIN, "--model", "deepseek-v4"], "did you mean deepseek-v3?"),
        ([*PRETRAIN, "--pp", "15"], "the nearest valid value is 16"),
        ([*PRETRAIN, "--stage", "more"], "write NAME=HOURS"),
        ([*PRETRAIN, "--stage", "=5"], "write NAME=HOURS"),
        ([*PRETRAIN, "--stage", "a=5", "--stage", "a=6"], "a name of its own"),
        ([*PRETRAIN, "--stage", "pre-training=5"], "a name of its own"),
        ([*PRETRAIN, "--price", "2,5"], "not a number"),
        ([*PRETRAIN, "--memory", "0"], "the table's h800 has 80 GiB"),
        ([*PRETRAIN, "--memory", "40Gib/s"], "not a number"),
        ([*DISTILL, "--epochs", "nan"], "not a number"),
        ([*PRETRAIN, "--mfu", "0.4"], "give one of them"),
        ([*SERVE, "--prices", "1/2"], "such as 0.14/0.55/2.19"),
        ([*SERVE, "--hit-share", "140%"], "a share lies between 0 and 1"),
        ([*SERVE, "--latency", "soon"], "not a number"),
        ([*RL, "--response", "20K"], "needs a longer cap"),
        ([*DISTILL, "--teacher", "deepseek"], "did you mean deepseek-v3?"),
    ],
)
def test_nonsense_is_one_line_with_the_nearest_valid_choice(arguments: list[str], says: str) -> None:
    result = run(arguments)
    assert isinstance(result.exception, SlingshotError) and result.stdout == ""
    assert says in str(result.exception) and "\n" not in str(result.exception)


def test_a_device_may_have_another_memory() -> None:
    large, small = (
        as_json(["serve", "--model", "llama-3.1-8b", "--device", "a100", "--memory", size])
        for size in ("80GiB", "40GiB")
    )
    assert small["usable_memory_bytes"] == 0.9 * 40 * 2**30 and small["batch"] < large["batch"]
    assert small["alternatives"][0]["device"] == "a100" and small["alternatives"][0]["money"] == small["money"]


def test_a_folder_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(SlingshotError, match=r"no config\.json there"):
        door.load_model_config(str(tmp_path))


def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run([*PRETRAIN, "--html", str(tmp_path / "file" / "plan.html")])
    assert isinstance(result.exception, SlingshotError) and "cannot write" in str(result.exception)


def test_planning_needs_no_torch() -> None:
    code = (
        "import sys; from slingshot.cli.plan import app\n"
        f"app({PRETRAIN!r} + ['--json'], standalone_mode=False)\n"
        "heavy = {'torch', 'numpy', 'jinja2', 'transformers', 'matplotlib'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["days"] == pytest.approx(54.4, abs=0.1)
