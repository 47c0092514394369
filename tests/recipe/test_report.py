"""report.py on a made-up run that looks like a real one: nine stages, two tasks, curves that fall and rise, a hostile
completion."""

from __future__ import annotations

import math
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from slingshot.base.errors import SlingshotError
from slingshot.base.files import read_json, write_json, write_jsonl
from slingshot.cost.receipt import Parent, Receipt
from slingshot.machine.machine import Machine
from slingshot.model.config import ModelConfig
from slingshot.recipe import report
from slingshot.recipe.charts import POINTS, kept_apart, points_of, smoothed
from slingshot.recipe.results import headline

MODEL = ModelConfig(
    family="deepseek_v3", vocab_size=512, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
    num_attention_heads=4, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32,
    moe_intermediate_size=96, n_routed_experts=16, n_shared_experts=1,
    num_experts_per_tok=4, first_k_dense_replace=1, num_nextn_predict_layers=1,
)  # fmt: skip

# name, kind, parents, seconds, tokens, TFLOP, arithmetic pass@1, countdown pass@1, tokens a response, share in format
STAGES: list[tuple[str, str, list[str], float, int, float, float, float, float, float]] = [
    ("pretrain", "pretrain", [], 291.0, 9_800_000, 112.0, 0.612, 0.088, 5.1, 0.914),
    ("zero", "rl", ["pretrain"], 154.0, 1_620_000, 41.0, 0.874, 0.142, 21.7, 0.998),
    ("cold_start", "sft", ["pretrain"], 21.0, 310_000, 4.1, 0.806, 0.171, 38.0, 0.981),
    ("rl", "rl", ["cold_start"], 148.0, 2_100_000, 47.0, 0.938, 0.236, 41.3, 0.997),
    ("sample", "sample", ["rl"], 34.0, 640_000, 9.0, 0, 0, 0, 0),
    ("sft", "sft", ["pretrain", "sample"], 40.0, 720_000, 9.6, 0.921, 0.228, 40.2, 0.996),
    ("rl_final", "rl", ["sft"], 150.0, 2_080_000, 46.0, 0.966, 0.264, 42.9, 0.999),
]
HOSTILE = "<script>alert(1)</script><b>7</b> & {{ 7 * 7 }}"


def make_run(run: Path, finished: int = len(STAGES)) -> Path:
    """A run's folder in which the first `finished` stages are done."""
    rng = random.Random(0)
    listed = [{"name": stage[0], "kind": stage[1], "config": {"seed": 0}} for stage in STAGES]
    write_json(run / "recipe.json", {"name": "tiny", "stages": listed})
    machine = Machine(cpu="AMD EPYC", cores=2, memory_bytes=24 * 2**30, threads=2, torch="2.13.0")

    def receipt(name: str, kind: str, parents: list[str], seconds: float, tokens: int, flops: float) -> Receipt:
        return Receipt(
            stage=kind, name=name, digest="1" * 16, tokens=tokens, flops=flops, seconds=seconds, machine=machine,
            parents=[Parent(path=f"runs/tiny/{parent}", digest="0" * 16) for parent in parents],
            peak_host_memory_bytes=1_310_000_000, mfu=flops / seconds / 9e11,
        )  # fmt: skip

    for name, kind, parents, seconds, tokens, tflop, arithmetic, countdown, length, form in STAGES[:finished]:
        receipt(name, kind, parents, seconds, tokens, tflop * 1e12).write(run / name)
        write_jsonl(run / name / "metrics.jsonl", _metrics(kind, name, rng))
        if kind == "sample":
            continue
        write_json(run / name / "config.json", MODEL.to_hf())
        tasks = {}
        for task, share in (("arithmetic", arithmetic), ("countdown", countdown)):
            half = 1.96 * math.sqrt(share * (1 - share) / 500)
            score = {"pass@1": share, "ci95": [share - half, share + half], "pass@8": None, "format": form, "n": 500}
            tasks[task] = score | {"mean_tokens": length * (1 + (task == "countdown")), "language": 0.97}
        write_json(run / "evaluations" / name / "evaluation.json", {"tasks": tasks, "examples": _examples(name)})
        receipt(name, "evaluate", [name], 12.0, 30_000, 0.4e12).write(run / "evaluations" / name)
    return run


def _metrics(kind: str, name: str, rng: random.Random) -> list[dict[str, Any]]:
    def fallen(step: int, scale: float, steps: float) -> float:
        return scale * math.exp(-step / steps) + rng.gauss(0, 0.02)

    if kind == "pretrain":
        return [{"step": step, "loss": 0.78 + fallen(step, 5.4, 45), "mtp_loss": 1.32 + fallen(step, 4.9, 60),
                 "expert_load": [1.2 + fallen(step, 2.2, 90)] * 4} for step in range(1, 1201)]  # fmt: skip
    if kind == "sft":
        return [{"step": step, "loss": 0.3 + fallen(step, 0.5, 20)} for step in range(1, 120)]
    start, end, short = {"zero": (0.5, 0.9, 6), "rl": (0.78, 0.94, 38), "rl_final": (0.9, 0.97, 40)}.get(
        name, (0, 0, 0)
    )
    return [
        {"step": step, "reward": end - fallen(step, end - start, 18), "entropy": 0.08 + fallen(step, 0.3, 25),
         "response_tokens": short - fallen(step, 4, 25), "kl": fallen(step, -0.02, 30), "pass_rate": 0.5,
         "seconds": 2.5 * step}
        for step in range(1, 61 if kind == "rl" else 1)
    ]  # fmt: skip


def _examples(stage: str) -> dict[str, list[dict[str, Any]]]:
    base, early = stage == "pretrain", stage in {"pretrain", "zero"}

    def example(prompt: str, answer: str, reasoning: str, response: str, correct: bool) -> dict[str, Any]:
        told = {"prompt": prompt, "answer": answer, "completion": response, "response": response, "correct": correct}
        return told | {"reasoning": None if base else reasoning}

    steps = "7 minus 2 is 5, 5 plus 9 is 14, 14 minus 8 is 7, no, 6, 6 plus 4 is 10"
    countdown = HOSTILE if base else "9*3-5" if early else "3*5+9"
    return {
        "arithmetic": [
            example("What is 7-2+9-8+4?", "10", steps, "11" if base else "10", not base),
            example("5+3-1-6+2はいくつ?", "3", "5足す3は8、8引く1は7、7引く6は1、1足す2は3", "3", True),
            example("What is 8+7-9+6-5+3-2+8?", "16", "8 plus 7 is 15, 15 minus 9 is 6", "15", False),
        ],
        "countdown": [example("Make 24 from 3, 5, 9.", "3*5+9", "3*5=15, 15+9=24", countdown, not early)],
    }


def text_of(html: str) -> str:
    """The page as read: text nodes only, so that markup that was escaped shows and markup that was not is missing."""
    pieces: list[str] = []
    reader = HTMLParser()
    reader.handle_data = pieces.append  # type: ignore[method-assign]
    reader.feed(html)
    return " ".join(" ".join(pieces).split())


def page(run: Path) -> str:
    """The text of a run's page, built anew."""
    report.build(run)
    return text_of((run / "report.html").read_text())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "tiny")


def test_report_json_has_the_documented_shape(run: Path) -> None:
    report.build(run)
    stages = read_json(run / "report.json")["stages"]
    assert [stage["name"] for stage in stages] == [stage[0] for stage in STAGES]
    zero = stages[1]
    assert zero["kind"] == "rl" and (run / zero["artifact"] / "receipt.json").is_file()
    assert zero["receipt"] == {"tokens": 1_620_000, "flops": 41e12, "seconds": 154.0,
                               "peak_host_memory_bytes": 1_310_000_000, "peak_device_memory_bytes": None,
                               "mfu": 41e12 / 154 / 9e11, "energy_joules": None, "money": None}  # fmt: skip
    score = zero["eval"]["arithmetic"]
    assert {"pass@1", "ci95", "pass@8", "mean_tokens", "format", "n"} <= set(score)
    assert (score["pass@1"], score["pass@8"], score["n"]) == (0.874, None, 500)
    assert score["ci95"][0] < 0.874 < score["ci95"][1]
    assert stages[4]["eval"] == {}  # a dataset is not evaluated


def test_page_tells_the_story_and_stands_alone(run: Path) -> None:
    text = page(run)
    html = (run / "report.html").read_text()
    assert HOSTILE in text  # what a model wrote is text
    assert "After rl_final , the model to talk to, it solves 96.6% of 500 arithmetic problems" in text
    assert "after pretrain it was 61.2%" in text
    assert "8.4 × as long a response: 5 tokens became 43" in text
    assert "15 min 10 s" in text  # 838 s of stages and 6 evaluations of 12 s
    assert html.count("<svg") == 1 + 6 + 3  # accuracy, curves, fits
    assert "<script" not in html and "http://www.w3.org/2000/svg" in html
    links = {word.split("/")[2] for word in html.split('"') if word.startswith(("http:", "https:", "//"))}
    # Names in the SVGs' metadata; nothing is loaded.
    assert links <= {"www.w3.org", "purl.org", "creativecommons.org", "matplotlib.org"}
    assert not any(tag in html for tag in ("<link", "<img", "<iframe", "@import", "url(http"))
    for piece in html.split("<svg")[1:]:
        svg = "<svg" + piece.split("</svg>")[0] + "</svg>"
        ElementTree.fromstring(svg)
        assert "var(--series-1)" in svg and "#0a0a01" not in svg and "DejaVu" not in svg
    assert "zero 0." in html  # a curve is labelled where it ends
    assert re.search(r"Reward of zero by compute seconds; A 0\.\d+ ± 0\.\d+, C_mid \d+ s ± ", text)
    assert (
        "Reward of rl_final by compute seconds; where it ends these points do not tell" in text
    )  # its gain is as small as its noise
    report.build(run)
    assert (run / "report.html").read_text() == html, "the same run gives the same bytes"


def test_calls_of_tools_are_a_column_where_there_are_some(run: Path) -> None:
    assert "calls" not in page(run)
    path = run / "evaluations" / "rl" / "evaluation.json"
    evaluation = read_json(path)
    evaluation["tasks"]["countdown"]["calls"] = 0.256
    write_json(path, evaluation)
    text = page(run)
    assert "the calls of tools a problem" in text and "97.0% 0.26" in text
    assert read_json(run / "report.json")["stages"][3]["eval"]["countdown"]["calls"] == 0.256


def quantised(run: Path, name: str, size: int, speed: float, arithmetic: float) -> None:
    """Add to a run a checkpoint that rl_final was quantised to, and its evaluation."""
    paired = {"full": 0.966, "small": arithmetic, "difference": arithmetic - 0.966, "ci95": [-0.03, 0.005], "n": 200}
    told = {"bytes": size, "share_of_bfloat16": size / 4.8e6, "kl": 0.00051, "same_top": 0.9949,
            "tokens_per_second": {"full": 4000.0, "small": speed}, "tasks": {"arithmetic": paired}}  # fmt: skip
    receipt = read_json(run / "rl_final" / "receipt.json")
    parents = [Parent(path="runs/tiny/rl_final", digest="0" * 16).model_dump()]
    write_json(run / name / "receipt.json", receipt | {"parents": parents, "extra": {"quantization": told}})
    evaluation = read_json(run / "evaluations" / "rl_final" / "evaluation.json")
    ends = {"pass@1": arithmetic, "ci95": [arithmetic - 0.02, arithmetic + 0.015]}
    evaluation["tasks"]["arithmetic"] |= ends
    write_json(run / "evaluations" / name / "evaluation.json", evaluation)
    recipe = read_json(run / "recipe.json")
    stages = [*recipe["stages"], {"name": name, "kind": "quantize"}]
    write_json(run / "recipe.json", recipe | {"stages": stages, "chat": "rl_final"})


def test_accuracy_stands_beside_bytes_and_speed_of_what_was_quantised(run: Path) -> None:
    assert "Smaller, and what it lost" not in page(run)
    quantised(run, "int8", 2_976_000, 5200.0, 0.968)
    quantised(run, "int4", 1_920_000, 5400.0, 0.957)
    text, html = page(run), (run / "report.html").read_text()
    assert "Accuracy of rl_final by bytes" in text and "Accuracy of rl_final by speed" in text
    assert "int4 1.92 MB 40.0% 4,000 5,400 0.00051 99.5% -0.9 (-3.0 to +0.5)" in text
    for name in ("Accuracy of rl_final by bytes", "Accuracy of rl_final by speed"):
        drawing = html[html.index(f'aria-label="{name}"') :].split("</svg>")[0]
        found = re.findall(r">(rl_final|int8|int4)</text>", drawing)
        assert found == (["int4", "int8", "rl_final"] if "bytes" in name else ["rl_final", "int8", "int4"])


@pytest.mark.slow
def test_three_problems_show_what_was_learned_and_what_was_not(run: Path) -> None:
    text = page(run)
    section = text[text.index("Three problems") : text.index("How training went")]
    assert "What is 7-2+9-8+4? arithmetic · learned on the way · expected 10" in section
    assert "Make 24 from 3, 5, 9. countdown · learned on the way" in section
    assert "What is 8+7-9+6-5+3-2+8? arithmetic · still beyond it · expected 16" in section
    assert section.count("✓") == 5 + 4 and section.count("✗") == 1 + 2 + 6


@pytest.mark.slow
def test_the_model_to_talk_to_leads_and_not_the_one_with_the_highest_score(run: Path) -> None:
    """The last checkpoint, or the one the recipe names, whatever another one scores."""
    path = run / "evaluations" / "rl_final" / "evaluation.json"
    evaluation = read_json(path)
    evaluation["tasks"]["arithmetic"] |= {"pass@1": 0.4, "ci95": [0.35, 0.45]}
    evaluation["examples"]["arithmetic"][0]["correct"] = False
    write_json(path, evaluation)
    text = page(run)
    assert "After rl_final , the model to talk to, it solves 40.0%" in text
    assert "What is 7-2+9-8+4? arithmetic · still beyond it" in text
    write_json(run / "recipe.json", read_json(run / "recipe.json") | {"chat": "rl"})
    text = page(run)
    assert "After rl , the model to talk to, it solves 93.8%" in text
    assert "What is 7-2+9-8+4? arithmetic · learned on the way" in text


def test_a_model_to_talk_to_without_scores_is_named_beside_the_one_that_has_them(run: Path) -> None:
    shutil.rmtree(run / "evaluations" / "rl_final")
    text = page(run)
    assert "After sft it solves 92.1%" in text and "The model to talk to is rl_final ." in text


@pytest.mark.slow
def test_what_was_asked_for_is_whole_and_the_rest_is_offered(tmp_path: Path) -> None:
    run = make_run(tmp_path / "tiny", finished=2)
    asked = {"asked": ["pretrain", "zero"]}
    write_json(run / "recipe.json", read_json(run / "recipe.json") | asked)
    text = page(run)
    assert "through 2 of 2 stages" in text and "has not run yet" not in text
    assert "The recipe has 5 stages more: cold_start, rl, sample, sft, rl_final." in text
    make_run(run, finished=4)  # what an earlier run made beyond it is shown all the same
    write_json(run / "recipe.json", read_json(run / "recipe.json") | asked)
    assert "through 4 of 4 stages" in page(run)


def test_few_problems_are_counted_rather_than_shared_out(run: Path) -> None:
    for path in run.glob("evaluations/*/evaluation.json"):
        evaluation = read_json(path)
        evaluation["tasks"]["arithmetic"] |= {"pass@1": 0.4, "n": 5, "ci95": [0.118, 0.769]}
        evaluation["tasks"]["countdown"]["notes"] = ["0 of 20 in format, 1 right if read leniently"]
        write_json(path, evaluation)
    text = page(run)
    assert "it solves 2 of 5 arithmetic problems" in text and "few problems, so chance has a large part in it" in text
    assert "zero, countdown: 0 of 20 in format, 1 right if read leniently." in text
    said = headline(run / "evaluations" / "zero")
    assert said.startswith("arithmetic 2 of 5 (few problems, so chance has a large part in it), countdown pass@1 14.2%")
    assert "(0 of 20 in format, 1 right if read leniently)" in said


def test_a_run_half_done(tmp_path: Path) -> None:
    run = make_run(tmp_path / "tiny", finished=1)
    summary = report.build(run)
    assert [stage["name"] for stage in summary["stages"]] == ["pretrain"]
    text = text_of((run / "report.html").read_text())
    assert "through 1 of 7 stages" in text and text.count("has not run yet") == 6
    assert "as long a response" not in text  # nothing to compare with yet
    run = make_run(tmp_path / "new", finished=0)
    assert report.build(run) == {"stages": []}
    assert (run / "report.html").read_text().count("has not run yet") == 7


def test_hostile_stage_names_and_missing_values_are_drawn(run: Path) -> None:
    recipe = read_json(run / "recipe.json")
    recipe["stages"][1]["name"] = "$\\frac<&"
    write_json(run / "recipe.json", recipe)
    (run / "zero").rename(run / "$\\frac<&")
    (run / "evaluations" / "zero").rename(run / "evaluations" / "$\\frac<&")
    rows = [{"step": 1, "reward": None}, {"step": 2, "reward": 0.5, "kl": None}, {"step": 3, "reward": 0.75}]
    write_jsonl(run / "$\\frac<&" / "metrics.jsonl", [*rows, {"note": "no step"}])
    assert "$\\frac<& 0.75" in page(run)


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("recipe.json", None, "a folder that `slingshot run` wrote"), ("recipe.json", "[]", "JSON object"),
        ("recipe.json", "{", "not valid JSON"), ("zero/receipt.json", "{}", "receipt.json"),
        ("evaluations/zero/evaluation.json", '{"tasks": {"arithmetic": {}}}', "pass@1"),
    ],
)  # fmt: skip
def test_broken_inputs_are_named(run: Path, path: str, content: str | None, message: str) -> None:
    if content is None:
        (run / path).unlink()
    else:
        (run / path).write_text(content)
    with pytest.raises(SlingshotError, match=message) as caught:
        report.build(run)
    assert str(run / path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (run / "report.html").exists()


def test_labels_are_moved_apart() -> None:
    assert kept_apart([0.1, 0.5, 0.9], gap=0.1) == [0.1, 0.5, 0.9]
    assert kept_apart([0.1, 0.1, 0.1], gap=0.25) == pytest.approx([0.1, 0.35, 0.6])
    assert kept_apart([0.2, 0.95, 0.95], gap=0.25) == pytest.approx([0.2, 0.75, 1.0])


def test_points_average_lists_and_long_curves() -> None:
    rows = [{"step": step, "load": [step, step + 2.0]} for step in range(480)]
    points = points_of(rows, "load")
    assert len(points) == POINTS and points[0] == (1.0, 1.5) and points[-1] == (479.0, 479.5)
    assert smoothed([1.0, 2.0, 6.0]) == [1.0, 2.0, 6.0]
    assert smoothed([0.0] * 12 + [3.0] + [0.0] * 12)[11:14] == [1.0, 1.0, 1.0]


def test_a_long_response_is_cut_on_the_page(run: Path) -> None:
    path = run / "evaluations" / "rl" / "evaluation.json"
    evaluation = read_json(path)
    evaluation["examples"]["arithmetic"][0]["response"] = "x" * 5000
    write_json(path, evaluation)
    assert "x" * 4000 + " …" in (text := page(run)) and "x" * 4001 not in text


def test_matplotlib_is_loaded_only_to_build() -> None:
    code = "import sys, slingshot.recipe.report; print('matplotlib' in sys.modules, 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


def test_the_bill_adds_up_stages_and_evaluations(run: Path) -> None:
    for number, file in enumerate(sorted(run.rglob("receipt.json"))):
        receipt = read_json(file)
        write_json(file, receipt | {"money": 0.25, "energy_joules": 3600.0 if number else None})
    summary = report.build(run)["bill"]
    assert (summary["seconds"], summary["tokens"]) == (838 + 6 * 12, 17_270_000 + 180_000)
    assert (summary["money"], summary["energy_joules"]) == (3.25, 12 * 3600)
    assert summary["flops"] == pytest.approx(268.7e12 + 2.4e12)
    text = text_of((run / "report.html").read_text())
    assert "in all 17.4M 271 TFLOP 1.22 GiB 12 Wh 3.25" in text and "Of energy only a part is known." in text
    assert "evaluations evaluate every checkpoint 180K 2.4 TFLOP 1.22 GiB" in text
