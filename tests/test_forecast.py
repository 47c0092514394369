"""forecast.py: a recipe looked through before it runs, with and without rehearsals, and the door `slingshot plan recipe`."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from slingshot import forecast as module
from slingshot.base.errors import SlingshotError
from slingshot.cli.plan import show
from slingshot.cost.devices import device
from slingshot.forecast import Forecast, forecast, recipe_command
from slingshot.machine.machine import Measurement, describe, save_measurement
from slingshot.recipe.recipe import Recipe
from slingshot.rehearsal import Rehearsal, Step

RECIPE = """
[defaults]
threads = 1
dtype = "float32"
tasks = [{ name = "arithmetic", params = { min_terms = 2, max_terms = 2, languages = ["en"] } }]
max_tokens = 32
sequence_length = 64

[base]
stage = "pretrain"
vocab_size = 400
batch_size = 4
micro_batch_size = 4
steps = 40
model = { family = "dense", hidden_size = 32, intermediate_size = 64, num_hidden_layers = 1, num_attention_heads = 2 }

[base.documents]
tasks = [{ name = "arithmetic", params = { min_terms = 2, max_terms = 2, languages = ["en"] } }]
count = 400

[zero]
stage = "rl"
model = "@base"
steps = 30
prompts_per_step = 4
group_size = 4

[coin]
stage = "rl"
model = "@base"
steps = 300
prompts_per_step = 4
group_size = 4
rewards = { random = true }
max_flops = { flops_of = "zero", times = 0.5 }

[sample]
stage = "sample"
model = "@zero"
problems = 40

[sft]
stage = "sft"
model = "@base"
data = ["@sample"]

[student]
stage = "pretrain"
tokenizer = "@base"
batch_size = 4
micro_batch_size = 4
steps = 10
model = { family = "dense", hidden_size = 32, intermediate_size = 64, num_hidden_layers = 1, num_attention_heads = 2 }

[student.documents]
tasks = [{ name = "arithmetic", params = { min_terms = 2, max_terms = 2, languages = ["en"] } }]
count = 400

[evaluation]
problems = 16
"""


@pytest.fixture
def mine(tmp_path: Path) -> str:
    (tmp_path / "mine.toml").write_text(RECIPE)
    return str(tmp_path / "mine.toml")


@pytest.fixture
def recipe(mine: str) -> Recipe:
    return Recipe.load(mine)


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that doctor has measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_measurement(f"{describe().cpu}, 1 threads, torch 2", Measurement(peak={"float32": 1e11, "bfloat16": 2e11}, bandwidth=2e10))


@pytest.fixture
def rehearsed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, int]]:
    """Rehearsals that take no time: a second before the first step, 3 s the first, then 1 s for 1e8 FLOPs; the stages asked for, in order."""
    asked: list[tuple[str, Any, int]] = []

    def measure(kind: str, config: Any, folder: Path, writer: Any, steps: int, least: int) -> Rehearsal:
        source = getattr(config, "model", None)
        assert not isinstance(source, str) or (Path(source) / "model.safetensors").is_file()  # stand-ins are there
        asked.append((kind, config, steps))
        done = [Step(seconds=seconds, flops=1e8) for seconds in (3.0, 1.0, 1.0)]
        return Rehearsal(start=2.0, prepare=1.0, steps=done, save=0.5, weights_share=0.4, peak_memory_bytes=len(asked) * 2**20, watts=10.0)

    import slingshot.rehearsal

    monkeypatch.setattr(slingshot.rehearsal, "measure", measure)
    return asked


def test_every_stage_is_foreseen_from_those_before_it(recipe: Recipe, measured: None) -> None:
    found = forecast(recipe, [device("h100"), device("l40s")], probe=False)
    works = {line.name: line.work for line in found.stages}
    names = ["base", "base.evaluation", "zero", "zero.evaluation", "coin", "coin.evaluation", "sample", "sft", "sft.evaluation",
             "student", "student.evaluation"]  # fmt: skip
    assert list(works) == names
    assert works["coin"].flops == pytest.approx(works["zero"].flops / 2, rel=0.1) and works["coin"].steps < 300
    # A base answers as its documents do, reinforcement makes it write the steps, a coin does not.
    assert works["base.evaluation"].phases[0].response < works["zero.evaluation"].phases[0].response
    assert works["coin.evaluation"].phases[0].response == works["base.evaluation"].phases[0].response
    assert works["sample"].examples is not None and 10 < works["sample"].examples < 40
    assert works["sft"].steps > 1 and works["sft"].model == works["base"].model
    assert all(line.here.seconds > 0 and line.here.probed == 0 for line in found.stages)
    assert [away.device for away in found.stages[0].elsewhere] == ["h100", "l40s"]
    assert any("doctor measured" in line for line in found.assumptions)


def test_more_hope_leaves_more_examples(recipe: Recipe, measured: None) -> None:
    few, many = (forecast(recipe, probe=False, solved=solved).stages[6].work.examples for solved in (0.2, 0.9))
    assert few is not None and many is not None and few < 0.6 * many


def test_time_here_is_what_rehearsals_took(mine: str, rehearsed: list[tuple[str, Any, int]]) -> None:
    found = forecast(Recipe.load(mine), hourly=3600.0)
    lines = {line.name: line for line in found.stages}
    base = lines["base"].here
    # Preparation, what the first step took beyond the others, the FLOPs, and the weights' share of a save for the artifact.
    assert base.seconds == pytest.approx(1 + 2 + lines["base"].work.flops / 1e8 + 0.5 * 0.4)
    assert (base.money, base.start, base.joules) == (pytest.approx(base.seconds), 2.0, pytest.approx(10 * base.seconds))
    assert found.seconds == pytest.approx(sum(line.here.seconds + 2 for line in found.stages))
    saved = forecast(Recipe.load(mine, ["base.save_seconds=0.1"]))
    again = {line.name: line for line in saved.stages}["base"].here
    assert again.seconds == pytest.approx(base.seconds + 0.5 * int((base.seconds - 1.2) / 0.1))


def test_stages_alike_are_rehearsed_once_and_no_kind_more_than_ten_steps(mine: str, rehearsed: list[tuple[str, Any, int]]) -> None:
    forecast(Recipe.load(mine))
    # zero and coin differ in how their responses read; the evaluations of zero and sft do not differ at all
    assert [kind for kind, _, _ in rehearsed] == ["pretrain", "evaluate", "rl", "evaluate", "rl", "sample", "sft", "pretrain"]
    for kind in {kind for kind, _, _ in rehearsed}:
        assert 1 < sum(steps for other, _, steps in rehearsed if other == kind) <= module.PROBE_STEPS
    rehearsed.clear()
    many = RECIPE + "".join(f'\n[more{number}]\nstage = "rl"\nmodel = "@base"\nsteps = 3\ngroup_size = {number + 5}\n' for number in range(12))
    Path(mine).write_text(many)
    found = forecast(Recipe.load(mine))
    assert sum(steps for kind, _, steps in rehearsed if kind == "rl") == module.PROBE_STEPS
    assert all(line.here.seconds > 0 for line in found.stages)


def test_another_architecture_is_another_rehearsal(mine: str, rehearsed: list[tuple[str, Any, int]]) -> None:
    base = RECIPE[RECIPE.index("[base]") : RECIPE.index("[zero]")]
    Path(mine).write_text(RECIPE + base.replace("[base", "[wide").replace("hidden_size = 32", "hidden_size = 64"))
    forecast(Recipe.load(mine))
    assert [kind for kind, _, _ in rehearsed].count("pretrain") == 3


def test_a_tokenizer_of_an_earlier_stage_is_there_without_rehearsals(mine: str, measured: None) -> None:
    """As the recipe tiny has one."""
    base = RECIPE[RECIPE.index("[base]") : RECIPE.index("[zero]")]
    Path(mine).write_text(RECIPE + base.replace("[base", "[again").replace("vocab_size = 400", 'tokenizer = "@base"'))
    lines = {line.name: line.work for line in forecast(Recipe.load(mine), probe=False).stages}
    assert lines["again"].model == lines["base"].model


def test_a_real_rehearsal_of_a_small_recipe(recipe: Recipe) -> None:
    found = forecast(recipe, until="base")
    base, evaluation = found.stages
    assert (base.name, evaluation.name) == ("base", "base.evaluation")
    assert base.here.probed == 10 and evaluation.here.probed == 1
    for line in found.stages:
        assert 0 < line.here.prepare < line.here.seconds < 60 and line.here.memory_bytes > 50 * 2**20 and 0 < line.here.start < 60
    assert found.probing_seconds < 120


def test_what_a_rehearsal_died_of_is_said(recipe: Recipe, tmp_path: Path) -> None:
    from slingshot.prospect import Writer
    from slingshot.rehearsal import measure
    from slingshot.stages import rl

    config = rl.Config(model=str(tmp_path / "nowhere"), tasks=[{"name": "arithmetic"}])  # type: ignore[list-item]
    with pytest.raises(SlingshotError, match=r"rehearsing a stage of kind rl failed: .*nowhere.*; --no-probe plans without") as caught:
        measure("rl", config, tmp_path, Writer(), 1)
    assert "\n" not in str(caught.value)


@pytest.fixture
def app() -> typer.Typer:
    made = typer.Typer()
    made.command()(recipe_command)
    return made


def test_the_door_prints_table_json_and_page(app: typer.Typer, mine: str, rehearsed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    page = tmp_path / "plan.html"
    result = CliRunner().invoke(app, [mine, "rl.steps=1"])
    assert isinstance(result.exception, SlingshotError)  # there is no stage of that name
    result = CliRunner().invoke(app, [mine, "zero.steps=2", "--until", "zero", "--html", str(page), "--price", "2"])
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines()]
    assert ["stage", "tokens", "FLOPs", "time"] in [line[:4] for line in lines] and any(line[:2] == ["in", "all"] for line in lines)
    html = page.read_text()
    assert "before it runs" in html and "zero.evaluation" in html and "on h100" in html and "<script" not in html
    result = CliRunner().invoke(app, [mine, "--json", "--device", "h100", "--device", "cpu"])
    found = json.loads(result.output)
    assert Forecast.parse(found).recipe == "mine" and [away["device"] for away in found["stages"][0]["elsewhere"]] == ["h100", "cpu"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tini"], "did you mean tiny"),
        (["micro", "--device", "h1000"], "did you mean h100"),
        (["micro", "--solved", "100%"], "nearest valid value is 99%"),
        (["micro", "--solved", "1.5"], "0.015 is 1.5%"),
        (["micro", "--until", "sampel"], "did you mean sample"),
        (["micro", "rl.step=3"], "did you mean steps"),
        (["micro", "--price", "cheap"], "not a number"),
    ],
)
def test_bad_input_is_one_line_with_the_nearest_choice(app: typer.Typer, arguments: list[str], message: str, rehearsed: Any) -> None:
    error = CliRunner().invoke(app, arguments).exception
    assert isinstance(error, SlingshotError) and message in str(error) and "\n" not in str(error)


def test_the_table_has_money_and_energy_only_where_they_are_known(recipe: Recipe, measured: None, rehearsed: Any) -> None:
    plain, metered = forecast(recipe, probe=False), forecast(recipe, [device("m4-max")], hourly=1.0)
    assert module.columns(plain) == ["stage", "tokens", "FLOPs", "time here", "memory"]
    assert module.columns(metered) == ["stage", "tokens", "FLOPs", "time here", "memory", "money", "energy", "on m4-max", "money"]
    for found in (plain, metered):
        assert {len(row) for row in module.rows(found)} == {len(module.columns(found))}
    assert module.rows(metered)[-1][-1] == ""  # nobody says what an hour of it costs
    target = io.StringIO()
    show(module.tell(metered), Console(file=target, width=160))
    assert "11 processes" in target.getvalue()


def test_the_door_needs_no_torch() -> None:
    code = "import sys, slingshot.forecast, slingshot.cli.bill; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_a_model_too_large_for_this_machine_is_not_rehearsed(mine: str, measured: None, rehearsed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = describe().model_copy(update={"memory_bytes": 2**16})
    monkeypatch.setattr(module, "describe", lambda: machine)
    with pytest.raises(SlingshotError, match=r"base: its .* of weights are too much to rehearse here; --no-probe plans without"):
        forecast(Recipe.load(mine))
    assert forecast(Recipe.load(mine), probe=False).stages and not rehearsed


def test_a_model_that_is_there_speaks_for_itself(mine: str, rehearsed: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from slingshot import rehearsal
    from slingshot.prospect import Prospect
    from slingshot.stages import pretrain

    prospect = pretrain.foresee(pretrain.Config.parse(Recipe.load(mine).stages[0].values, "base"))
    rehearsal.stand_in(tmp_path / "there", prospect.model, prospect.tokenizer)
    stages = f"""
[copy]
stage = "convert"
source = "{tmp_path / "there"}"
[tuned]
stage = "sft"
model = "@copy"
examples = 20
[straight]
stage = "rl"
model = "{tmp_path / "there"}"
steps = 30
prompts_per_step = 4
group_size = 4
[spent]
stage = "rl"
model = "{tmp_path / "there"}"
steps = 30
prompts_per_step = 4
group_size = 4
max_flops = 1.5e9
[evaluation]
problems = 40
chunk = 8
"""
    Path(mine).write_text(RECIPE[: RECIPE.index("[base]")] + stages)
    fake, asked = rehearsal.measure, {}

    def measure(kind: str, config: Any, folder: Path, writer: Any, steps: int, least: int) -> Rehearsal:
        asked[kind, getattr(config, "model", "")] = writer
        found = fake(kind, config, folder, writer, steps, least)
        return found if kind != "convert" else found.model_copy(update={"steps": [Step(seconds=1, flops=0, n_bytes=1000)]})

    monkeypatch.setattr(rehearsal, "measure", measure)
    forecasted = forecast(Recipe.load(mine))
    lines = {line.name: line for line in forecasted.stages}
    assert asked["evaluate", str(tmp_path / "there")] is None  # the copy's evaluation: not the stand-in's weights, and no script
    assert [bool(writer) for (kind, model), writer in asked.items() if kind == "evaluate" and model != str(tmp_path / "there")] == [True]
    assert asked["rl", str(tmp_path / "there")] is None
    assert lines["straight"].work.flops == pytest.approx(30 * 1e8)
    assert lines["spent"].work.flops == pytest.approx(1.5e9)
    assert "responses as this model wrote them in the rehearsal (copy.evaluation, straight, spent)" in forecasted.assumptions
    assert not any("carry a signal" in text or "from its first step on" in text for text in forecasted.assumptions)
    spoken, told = lines["copy.evaluation"], lines["tuned.evaluation"]
    assert spoken.work.flops == pytest.approx(1e8 * spoken.work.steps)  # as many as a step of the rehearsal had
    assert told.work.flops != pytest.approx(1e8 * told.work.steps)
    assert Prospect.outside(str(tmp_path / "there")).reading({"steps": 1.0}).source is None
