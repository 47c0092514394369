"""On-policy distillation: each problem's teacher draws the student to itself, and the student's samples to it."""

import json
import subprocess
import sys

import pytest
import torch

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.load_save import load_model, load_tokenizer, save_checkpoint
from slingshot.cost.receipt import Receipt
from slingshot.engine.engine import Engine
from slingshot.recipe.recipe import Recipe
from slingshot.rollout.sampler import EngineSampler
from slingshot.stages.distill import DistillConfig, run
from slingshot.tasks.mixture import TaskMix
from slingshot.tasks.task import Solution
from slingshot.text.tokenizer import Tokenizer
from slingshot.training.identity import local_inputs
from tests.waiting import PATIENCE


@pytest.fixture(scope="session")
def teachers(base, tmp_path_factory):
    """Two other models of the base's tokenizer: surer and less sure of everything it says."""
    folders = []
    for name, factor in (("surer", 2.0), ("vaguer", 0.5)):
        model = load_model(base)
        with torch.no_grad():
            model.lm_head.weight.mul_(factor)
        folders.append(tmp_path_factory.mktemp(name))
        save_checkpoint(folders[-1], model, load_tokenizer(base))
    return [str(folder) for folder in folders]


@pytest.fixture
def distilling(base, sums, teachers):
    """distilling(**changes): two steps of 4 sums, 2 responses each, judged by the surer teacher."""
    common = {"model": str(base), "teachers": [{"model": teachers[0]}], "tasks": [sums], "dtype": "float32"}
    sizes = {"threads": 1, "steps": 2, "prompts_per_step": 4, "group_size": 2, "sequence_length": 48}
    sizes |= {"sampling": {"max_tokens": 12}, "optimizer": {"lr": 1e-3}}
    return lambda **changes: DistillConfig.parse({**common, **sizes, **changes}, "distill")


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("divergence", ["reverse", "forward", "jsd"])
def test_a_student_moves_towards_its_teacher(distilling, metrics, tmp_path, divergence):
    run(distilling(steps=12, prompts_per_step=8, divergence=divergence), tmp_path / "out")
    losses = [row["loss"] for row in metrics(tmp_path / "out")]
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])


def test_a_student_that_is_its_teacher_has_nothing_to_learn(distilling, base, metrics, tmp_path):
    run(distilling(teachers=[{"model": str(base)}], steps=1), tmp_path / "out")
    (row,) = metrics(tmp_path / "out")
    assert abs(row["loss"]) < 1e-5 and row["gradient_norm"] < 1e-4


def test_adapters_alone_move_towards_the_teacher(distilling, base, metrics, tmp_path):
    """The student is sampled with them merged; what is written is whole, and the adapter beside it."""
    given = {"steps": 12, "prompts_per_step": 8}
    run(distilling(lora={"rank": 4, "targets": ["attention", "mlp", "experts"]}, **given), tmp_path / "out")
    losses = [row["loss"] for row in metrics(tmp_path / "out")]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    before, after = load_model(base).state_dict(), load_model(tmp_path / "out").state_dict()
    changed = {name for name, each in after.items() if not torch.equal(each, before[name])}
    assert changed and all(".self_attn." in name or ".mlp." in name for name in changed)
    assert json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())["r"] == 4
    run(distilling(**given), tmp_path / "whole")
    parts = [Receipt.read(tmp_path / name).flops_by_part for name in ("out", "whole")]
    cost = [each["training"] / each["teacher"] for each in parts]  # of as many tokens
    assert cost[0] < cost[1]


def test_each_problem_goes_to_the_teacher_of_its_task(distilling, base, sums, teachers, metrics, tmp_path):
    """One teacher is the student itself: what is left is the loss of the other's share."""
    tasks = [sums, {"name": "countdown"}]
    own, other = {"model": str(base)}, {"model": teachers[0]}
    losses = {}
    for name, judges in {
        "sums": [other | {"tasks": ["arithmetic"]}, own],
        "countdown": [own | {"tasks": ["arithmetic"]}, other],
        "both": [other],
    }.items():
        run(distilling(tasks=tasks, teachers=judges, steps=1, prompts_per_step=8), tmp_path / name)
        losses[name] = metrics(tmp_path / name)[0]["loss"]
    assert min(losses.values()) > 1e-3
    assert losses["sums"] + losses["countdown"] == pytest.approx(losses["both"], rel=1e-4)


def test_two_specialists_teach_one_student(distilling, sums, teachers, base, metrics, tmp_path):
    """Every step and cost is told; the same config makes the same weights; MTP and router biases stay as they were."""
    judges = [{"model": teachers[0], "tasks": ["arithmetic"]}, {"model": teachers[1]}]
    config = distilling(tasks=[sums, "countdown"], teachers=judges)
    run(config, tmp_path / "out")
    rows, receipt = metrics(tmp_path / "out"), Receipt.read(tmp_path / "out")
    keys = {"step", "pass_rate", "response_tokens", "loss", "gradient_norm", "lr"}
    assert [row["step"] for row in rows] == [1, 2] and all(set(row) == keys for row in rows)
    assert receipt.tokens == round(sum(row["response_tokens"] * 8 for row in rows))
    parts = receipt.flops_by_part
    assert {"sampling", "training", "teacher"} <= set(parts) and parts["teacher"] < parts["training"]
    assert {parent.path for parent in receipt.parents} >= {str(base), *teachers}
    run(config, tmp_path / "again")
    assert weights(tmp_path / "out") == weights(tmp_path / "again") != weights(base)
    before, after = load_model(base), load_model(tmp_path / "out")
    kept = [name for name in before.state_dict() if name.startswith("model.layers.2.") or "correction_bias" in name]
    assert kept and all(torch.equal(before.state_dict()[name], after.state_dict()[name]) for name in kept)


def test_the_pass_rate_is_the_verifiers(distilling, saying, metrics, tmp_path):
    answers = {"right": lambda item: item.problem.answer, "wrong": lambda item: "no"}
    for name, rate in {"right": 1.0, "wrong": 0.0}.items():
        items = {}
        sampler = saying(lambda key, index, items=items, name=name: Solution("so", answers[name](items[key])))
        config = distilling(steps=1, sampling={"max_tokens": 32})
        items |= {item.key: item for item in TaskMix(config.tasks, "train", "distill/0").draw(0, 4)}
        run(config, tmp_path / name, sampler)
        assert metrics(tmp_path / name)[0]["pass_rate"] == rate


class Breaking(EngineSampler):
    """Dies as it is about to get the weights of one step."""

    at = 1

    def update_weights(self, version, state):
        if version == self.at:
            raise ConnectionError("gone")
        super().update_weights(version, state)


def test_an_interruption_leaves_no_trace(distilling, base, metrics, tmp_path):
    config = distilling(steps=3, save_seconds=0.0)
    run(config, tmp_path / "whole", EngineSampler(Engine.load(base)))
    with pytest.raises(ConnectionError):
        run(config, tmp_path / "out", Breaking(Engine.load(base)))
    run(config, tmp_path / "out", EngineSampler(Engine.load(base)))
    assert metrics(tmp_path / "out") == metrics(tmp_path / "whole")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_a_budget_of_flops_ends_the_stage(distilling, metrics, tmp_path):
    run(distilling(steps=9, max_flops=1.0), tmp_path / "out")
    assert len(metrics(tmp_path / "out")) == 1


def test_a_teacher_of_another_tokenizer_is_refused(distilling, base, tmp_path):
    model, folder = load_model(base), tmp_path / "other"
    folder.mkdir()
    save_checkpoint(folder, model, Tokenizer.train(["a banana, a bandana"] * 9, model.config.vocab_size))
    with pytest.raises(SlingshotError, match=r"^teachers: [^\n]*other has another tokenizer than [^\n]*$"):
        run(distilling(teachers=[{"model": str(tmp_path / "other")}]), tmp_path / "out")


@pytest.mark.parametrize(("changes", "message"), [
    ({"teachers": []}, "distill.teachers: "),
    ({"teachers": [{"model": "a"}, {"model": "b"}]}, "teachers: 2 of them are for the task arithmetic"),
    ({"teachers": [{"model": "a", "tasks": ["arithmetc"]}]}, "teachers: arithmetc is none of the tasks"),
    ({"tasks": ["countdown", "arithmetic"], "teachers": [{"model": "a", "tasks": ["arithmetic"]}]},
     "teachers: 0 of them are for the task countdown"),
    ({"sampling": {"temperature": 0.0}}, "distill.* temperature above 0"),
    ({"sampling": {"top_p": 0.9}}, "distill.* leave top_p 1"),
    ({"sampling": {"top_k": 5}}, "distill.* top_k 0"),
    ({"divergence": "kl"}, "distill.divergence: .*'reverse'.*got 'kl'"),
    ({"beta": 1.0}, "distill.beta: .*got 1.0"),
])  # fmt: skip
def test_a_config_that_means_nothing_is_refused(distilling, changes, message):
    with pytest.raises(SlingshotError, match=message):
        distilling(**changes)


@pytest.mark.slow
def test_several_processes_are_refused_in_one_line(distilling, tmp_path):
    (tmp_path / "distill.json").write_text(distilling().model_dump_json())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*torchrun, "slingshot", "distill", "--config", tmp_path / "distill.json", "--out", tmp_path / "out"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert said.returncode != 0 and "distill: runs in one process; start it without torchrun" in said.stderr


def test_a_recipes_teachers_are_earlier_stages(tmp_path):
    """They count as what the stage reads, so that a changed teacher makes a student stale."""
    text = "\n".join([
        '[a]\nstage = "convert"\nsource = "x"', '[b]\nstage = "convert"\nsource = "y"',
        '[c]\nstage = "distill"\nmodel = "@a"\ntasks = ["arithmetic"]',
        'teachers = [{ model = "@b", tasks = ["arithmetic"] }]',
    ])  # fmt: skip
    (tmp_path / "r.toml").write_text(text)
    assert Recipe.load(str(tmp_path / "r.toml")).stages[-1].parents == ["a", "b"]
    (tmp_path / "r.toml").write_text(text.replace("@b", "@later"))
    with pytest.raises(SlingshotError, match="no earlier stage 'later'"):
        Recipe.load(str(tmp_path / "r.toml"))
    given = {"model": "/m", "teachers": [{"model": "/t", "tasks": ["arithmetic"]}], "tasks": ["arithmetic"]}
    config = DistillConfig.parse(given, "distill").model_dump(mode="json")
    assert local_inputs(config) == {"/m": True, "/t": True}
