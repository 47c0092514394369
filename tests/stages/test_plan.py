"""Every stage's plan against its receipt, and rehearsals: the stage's own code, stopped early and with prescribed responses."""

from __future__ import annotations

import json
import signal
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slingshot import rehearsal
from slingshot.base.files import read_jsonl, write_jsonl
from slingshot.checkpoint.load_save import load_model, load_tokenizer
from slingshot.cost.receipt import Receipt
from slingshot.engine import sampling
from slingshot.engine.engine import Engine
from slingshot.engine.sampling import SamplingParams
from slingshot.prospect import Prospect, Reply, Writer
from slingshot.rehearsal import Rehearsal, rehearse
from slingshot.rollout.rollout import Item, PromptForm, TaskMix
from slingshot.stages import convert, evaluate, pretrain, rl, sample, sft
from slingshot.tasks.task import TaskConfig


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A rehearsal belongs in a process of its own: here its stages and signal handlers are put back."""
    for module in (convert, evaluate, pretrain, rl, sample, sft):
        for name in ("Workspace", "roll_out", "_as_stored", "_converted", "write_checkpoint"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, getattr(module, name))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def values(base: Path, sums: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model": str(base), "tasks": [sums], "dtype": "float32", "threads": 1, **more}


def test_pretraining_is_foreseen_from_a_part_of_its_corpus(base: Path, pretraining: Callable[..., pretrain.Config]) -> None:
    config, receipt = pretraining(), Receipt.read(base)
    prospect = pretrain.foresee(config)
    work = pretrain.plan(config, prospect)
    assert prospect.model.vocab_size == load_model(base).config.vocab_size
    assert prospect.writer.styles == {"answer": 1.0, "steps": 1.0}
    assert work.steps == 30 and work.tokens == pytest.approx(receipt.tokens, rel=0.01)  # the last row may be padded
    assert work.flops == pytest.approx(receipt.flops, rel=0.02) and work.phases[0].flops.keys() == receipt.flops_by_part.keys()


def test_text_held_out_is_foreseen(tmp_path: Path, pretraining: Callable[..., pretrain.Config]) -> None:
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"line {number} of some text\n" * 30)
    config = pretraining(documents=None, text=[str(tmp_path)])
    work = pretrain.plan(config, pretrain.foresee(config))
    assert [phase.name for phase in work.phases] == ["training", "held-out text"]
    assert 0 < work.phases[1].total_flops < work.phases[0].total_flops


def test_fine_tuning_is_planned_to_the_flop(base: Path, sums: dict[str, Any], tmp_path: Path) -> None:
    config = sft.Config.parse(values(base, sums, examples=40, epochs=2, sequence_length=48, batch_size=4, micro_batch_size=4), "sft")
    work = sft.plan(config, Prospect.outside(str(base)))
    sft.run(config, tmp_path / "out")
    receipt = Receipt.read(tmp_path / "out")
    assert (work.phases[0].flops, work.tokens) == (receipt.flops_by_part, receipt.tokens)
    assert work.steps == len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines())


def recited(kind: str, module: Any, config: Any, out: Path, writer: Writer, steps: int = 10) -> Rehearsal:
    return Rehearsal.parse({"start": 0.0, **json.loads(json.dumps(rehearse(kind, module, config, out, writer, steps)))}, kind)


def test_reinforcement_is_rehearsed_as_it_is_planned(base: Path, sums: dict[str, Any], tmp_path: Path) -> None:
    prospect = Prospect.outside(str(base))
    given = values(base, sums, steps=5, prompts_per_step=4, group_size=4, max_tokens=24, sequence_length=48)
    config = rl.Config.parse(given, "rl")
    work = rl.plan(config, prospect)
    found = recited("rl", rl, config, tmp_path / "rl", prospect.writer)
    items = [item for step in range(5) for item in TaskMix(config.tasks).draw("train", f"{config.seed}/{step}", 4)]
    drawn = statistics.fmean(len({reply.right for reply in prospect.respond(item, config.form, 4, 24)[1]}) > 1 for item in items)
    sampling, update = (phase.total_flops for phase in work.phases)
    assert sum(step.flops for step in found.steps) == pytest.approx(sampling + update * drawn / prospect.writer.disagreement(4), rel=0.03)
    assert work.phases[0].responses == 16 and work.steps == 5
    assert found.prepare > 0 and found.save > 0 and found.peak_memory_bytes > 2**20
    assert found.seconds_per_flop == pytest.approx(sum(s.seconds for s in found.steps[1:]) / sum(s.flops for s in found.steps[1:]))


def test_a_budget_of_flops_ends_reinforcement(base: Path, sums: dict[str, Any]) -> None:
    prospect = Prospect.outside(str(base))
    given = values(base, sums, steps=100, prompts_per_step=4, group_size=4, max_tokens=24, sequence_length=48)
    whole = rl.plan(rl.Config.parse(given, "rl"), prospect)
    half = rl.plan(rl.Config.parse(given | {"max_flops": whole.flops / 2}, "rl"), prospect)
    assert half.steps in (50, 51) and half.flops == pytest.approx(whole.flops * half.steps / 100)


def test_a_coin_gives_nearly_every_group_a_signal(base: Path, sums: dict[str, Any]) -> None:
    prospect = Prospect.outside(str(base))
    given = values(base, sums, steps=8, prompts_per_step=4, group_size=4, max_tokens=24, sequence_length=48)
    honest, coin = (rl.plan(rl.Config.parse(given | {"rewards": {"random": random}}, "rl"), prospect) for random in (False, True))
    assert any(line.startswith("88% of the groups carry a signal; ten points more or less are") for line in coin.assumptions)
    assert coin.phases[0] == honest.phases[0] and coin.phases[1].total_flops > 1.5 * honest.phases[1].total_flops


def test_sampling_and_evaluation_are_rehearsed_as_they_are_planned(base: Path, sums: dict[str, Any], tmp_path: Path) -> None:
    prospect = Prospect.outside(str(base))
    config = sample.Config.parse(values(base, sums, problems=24, samples=2, chunk=8, max_tokens=24), "sample")
    work = sample.plan(config, prospect)
    found = recited("sample", sample, config, tmp_path / "sample", prospect.writer)
    assert len(found.steps) == work.steps == 3 and sum(step.flops for step in found.steps) == pytest.approx(work.flops)
    rows = read_jsonl(tmp_path / "sample" / "data.jsonl")
    assert sample.foresee(config, prospect) == rows and work.examples == len(rows)  # what the real verifier kept

    forms = [{"name": "chat"}, {"name": "plain", "chat": False, "lenient": True}]
    asked = evaluate.Config.parse(values(base, sums, problems=20, chunk=4, forms=forms, max_tokens=24), "evaluate")
    planned = evaluate.plan(asked, prospect)
    shown = [(phase.name, phase.steps, phase.responses) for phase in planned.phases]  # this task has 8 problems to test with
    assert shown == [("arithmetic, chat", 2, 4), ("arithmetic, plain", 2, 4)]
    found = recited("evaluate", evaluate, asked, tmp_path / "evaluation", prospect.writer)
    assert sum(step.flops for step in found.steps) == pytest.approx(planned.flops)


def test_without_a_writer_the_model_speaks_for_itself(base: Path, sums: dict[str, Any], tmp_path: Path) -> None:
    config = evaluate.Config.parse(values(base, sums, problems=8, chunk=2, max_tokens=24), "evaluate")
    evaluate.run(config, tmp_path / "real")
    found = Rehearsal.parse({"start": 0.0, **rehearse("evaluate", evaluate, config, tmp_path / "rehearsed", None, 10)}, "evaluate")
    assert sum(step.flops for step in found.steps) == pytest.approx(Receipt.read(tmp_path / "real").flops)


def test_a_rehearsal_stops_when_it_has_seen_enough(
    pretraining: Callable[..., pretrain.Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = recited("pretrain", pretrain, pretraining(), tmp_path / "base", Writer(), steps=3)
    assert len(found.steps) == 3 and not (tmp_path / "base").exists()
    assert 0.2 < found.weights_share < 0.8  # beside the weights a saved state holds the optimizer's
    monkeypatch.setattr(rehearsal, "LONG", 0.0)
    assert len(recited("pretrain", pretrain, pretraining(), tmp_path / "again", Writer(), steps=9).steps) == 2


def test_a_conversion_is_rehearsed_on_a_few_tensors(base: Path, tmp_path: Path) -> None:
    prospect = Prospect.outside(str(base))
    config = convert.Config(source=str(base), dtype="bfloat16", threads=1)
    work = convert.plan(config, prospect)
    assert work.flops == 0 and work.phases[0].n_bytes == convert.plan(convert.Config(source=str(base)), prospect).phases[0].n_bytes / 2
    found = recited("convert", convert, config, tmp_path / "converted", Writer(), steps=4)
    assert len(found.steps) == 4 and 0 < sum(step.n_bytes for step in found.steps) < work.phases[0].n_bytes


def test_rehearsed_sampling_cuts_few_tokens_from_a_sure_distribution(
    base: Path, sums: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rehearsal.stand_in(tmp_path / "stand-in", load_model(base).config, load_tokenizer(base))
    engine = Engine.load(tmp_path / "stand-in", dtype="float32")
    seen: list[float] = []
    smallest: list[float] = []
    real = sampling._smallest_kept

    def smallest_kept(weights_RV: Any, top_p_R: Any, top_k_R: Any) -> Any:
        seen.append(float((weights_RV > 1e-3 * weights_RV.sum(-1, keepdim=True)).sum(-1).float().mean()))
        smallest.append(float(weights_RV.min()))
        return real(weights_RV, top_p_R, top_k_R)

    monkeypatch.setattr(sampling, "_smallest_kept", smallest_kept)
    items = TaskMix([TaskConfig.parse(sums)]).draw("train", "x", 4)
    for top_p in (0.95, 1.0):
        params = SamplingParams(max_tokens=24, temperature=0.6, top_p=top_p)
        groups = rehearsal.recite(Writer(), engine, items, params, PromptForm(), lambda seconds: None)
        assert [r.reasoning.strip() for group in groups for r in group] == [r.reasoning for i in items for r in said(engine, i, params)]
    assert seen and max(seen) < 20  # of 300; random weights are sure of nothing
    assert min(smallest) > 2**-126  # no denormal numbers


def said(engine: Engine, item: Item, params: SamplingParams) -> list[Reply]:
    return Writer().respond(engine.tokenizer, item, PromptForm(), params.n, params.max_tokens)[1]


def test_a_dataset_to_come_can_stand_in(base: Path, sums: dict[str, Any], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "data.jsonl", [{"prompt": "What is 1+2?", "reasoning": "1 plus 2 is 3", "answer": "3"}] * 20)
    given = {"model": str(base), "data": [str(tmp_path)], "sequence_length": 48, "batch_size": 2, "dtype": "float32", "threads": 1}
    assert sft.plan(sft.Config.parse(given, "sft"), Prospect.outside(str(base))).steps > 2
