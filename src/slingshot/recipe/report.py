"""A run's report: report.json for programs, report.html for people. One file, inline SVG, no scripts, light and dark.

It tells what was built, what each stage can do, how training went and what it cost, from what the run's folder holds:

    runs/tiny/recipe.json                       {"name", "stages": [{"name", "kind", ...}], "asked": [names], "chat"}
    runs/tiny/STAGE/receipt.json                what the stage consumed; metrics.jsonl: one line a step
    runs/tiny/evaluations/STAGE/evaluation.json {"tasks": {TASK: scores}, "examples": {TASK: [one solved problem each]}}

    build(Path("runs/tiny"))                    # after every stage; stages not reached yet are shown as such

What was asked for (`--until STAGE`) is the whole that is counted; the rest of the recipe is offered below it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slingshot.base import quantity
from slingshot.base.errors import SlingshotError
from slingshot.base.files import rendered, write_json, write_text
from slingshot.cost.bill import Sums
from slingshot.cost.receipt import RECEIPT, Receipt
from slingshot.machine.memory import PeakMemory
from slingshot.recipe.charts import accuracy_chart, compression_charts, compute_curves, training_curves
from slingshot.recipe.results import AnsweredProblem, Lenient, StageResult, read_object

LONGEST_TEXT = 4000  # characters shown of one response; the evaluation keeps the rest


class _StageEntry(Lenient):
    name: str
    kind: str


class RunRecord(Lenient):
    """recipe.json: the stages of a run's recipe; `asked` names those the run was to make (None: all), `chat` the one
    whose model a reader will want to talk to (None: the last checkpoint)."""

    name: str = ""
    stages: list[_StageEntry]
    asked: list[str] | None = None
    chat: str | None = None


def build(run: Path) -> dict[str, Any]:
    """Write report.json and report.html into the folder of a run; returns the former's content.

    Raises SlingshotError when `run` is no run's folder, a file in it is broken, or the report cannot be written.
    """
    path = run / "recipe.json"
    if not path.is_file():
        raise SlingshotError(f"{path} does not exist; a report is made of a folder that `slingshot run` wrote")
    record = RunRecord.parse(read_object(path), str(path))
    stages = [StageResult.read(run, entry.name, entry.kind) for entry in record.stages]
    asked = [stage for stage in stages if record.asked is None or stage.name in record.asked or stage.receipt]
    folders = [run / "evaluations" / stage.name for stage in stages]
    evaluations = [Receipt.read(folder) for folder in folders if (folder / RECEIPT).is_file()]
    bill = _bill(asked, evaluations)
    summary: dict[str, Any] = {"stages": [_summary(stage, stage.receipt) for stage in asked if stage.receipt]}
    if bill:
        summary["bill"] = bill.model_dump(include={"seconds", "tokens", "flops", "energy_joules", "money"})
    offered = [stage.name for stage in stages if stage not in asked]
    page = _page(record, run.resolve().name, asked, offered, bill)
    write_json(run / "report.json", summary)
    write_text(run / "report.html", page)
    return summary


class RunBill(Sums):
    """The sums of a run, its evaluations among them and once apart."""

    evaluations: RunBill | None


def _bill(stages: list[StageResult], evaluations: list[Receipt]) -> RunBill | None:
    """The bill of what has run so far; None when nothing has."""
    receipts = [stage.receipt for stage in stages if stage.receipt] + evaluations
    if not receipts:
        return None
    return RunBill(**dict(Sums.of(receipts)), evaluations=_bill([], evaluations) if stages else None)


def _summary(stage: StageResult, receipt: Receipt) -> dict[str, Any]:
    """A finished stage as report.json has it; the artifact's path is relative to the run."""
    shown = {"tokens", "flops", "seconds", *PeakMemory.model_fields, "mfu", "energy_joules", "money"}
    scores = {task: score.model_dump(mode="json", by_alias=True) for task, score in stage.scores.items()}
    return {"name": stage.name, "kind": stage.kind, "artifact": stage.name, "eval": scores,
            "receipt": receipt.model_dump(include=shown)}  # fmt: skip


def _page(record: RunRecord, folder: str, stages: list[StageResult], offered: list[str], bill: RunBill | None) -> str:
    evaluated = [stage for stage in stages if stage.scores]
    tasks = list(dict.fromkeys(task for stage in evaluated for task in stage.scores))
    finished = [stage.receipt for stage in stages if stage.receipt]
    made = [stage for stage in stages if stage.model]
    talking = next((stage for stage in made if stage.name == record.chat), made[-1] if made else None)
    subject = talking if talking in evaluated else evaluated[-1] if evaluated else None
    apart = [bill.evaluations.seconds] if bill and bill.evaluations else []
    times = [*(receipt.seconds for receipt in finished), *apart]
    scores = [score for stage in evaluated for score in stage.scores.values()]
    return rendered(
        "slingshot.recipe", "report.html.jinja",
        title=record.name or folder, stages=stages, offered=offered, evaluated=evaluated, tasks=tasks, subject=subject,
        talking=talking, first=evaluated[0] if evaluated else None, bill=bill, longest=max(times, default=0.0),
        show=quantity, has_pass_at_8=any(score.pass_at_8 is not None for score in scores),
        has_language=any(score.language is not None for score in scores),
        has_calls=any(score.calls is not None for score in scores),
        noted=[(its, task, score.notes) for its in evaluated for task, score in its.scores.items() if score.notes],
        built=talking.model if talking else None,
        machine=finished[-1].machine if finished else None, version=finished[-1].version if finished else "",
        accuracy_chart=accuracy_chart(evaluated, tasks) if tasks else "", curves=training_curves(stages),
        compute_curves=compute_curves(stages), compression_charts=compression_charts(evaluated, tasks),
        quantized=[(stage, stage.quantization) for stage in stages if stage.quantization],
        problems=_problems(evaluated, subject, tasks),
        clip=lambda text: text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " …",
    )  # fmt: skip


@dataclass(frozen=True)
class ReportedProblem:
    """One problem and each stage's answer to it (None where that stage was not asked)."""

    task: str
    prompt: str
    answer: str
    lesson: str
    asked: int
    tries: list[tuple[StageResult, AnsweredProblem | None]]


LEARNED, BEYOND, KNOWN = "learned on the way", "still beyond it", "right from the start"


def _problems(evaluated: list[StageResult], subject: StageResult | None, tasks: list[str]) -> list[ReportedProblem]:
    """Three problems that most stages were asked, from different tasks if possible: two learned on the way to
    `subject`, one that it still fails."""
    found: list[ReportedProblem] = []
    for task in tasks:
        by_prompt: dict[str, list[tuple[StageResult, AnsweredProblem | None]]] = {}
        for index, stage in enumerate(evaluated):
            for example in stage.examples.get(task, []):
                by_prompt.setdefault(example.prompt, [(other, None) for other in evaluated])[index] = (stage, example)
        for prompt, tries in by_prompt.items():
            asked = [example for _, example in tries if example]
            final = next((example for stage, example in tries if stage is subject and example), asked[-1])
            lesson = BEYOND if not final.correct else KNOWN if asked[0].correct else LEARNED
            found.append(ReportedProblem(task, prompt, final.answer, lesson, len(asked), tries))
    most = max((problem.asked for problem in found), default=0)
    widest = [problem for problem in found if problem.asked == most]
    chosen: list[ReportedProblem] = []
    for lesson in (LEARNED, LEARNED, BEYOND, LEARNED, KNOWN, KNOWN, KNOWN, BEYOND, BEYOND):
        rest = [problem for problem in widest if problem.lesson == lesson and problem not in chosen]
        if rest and len(chosen) < 3:
            # The first of a new task, where there is one.
            chosen.append(max(rest, key=lambda problem: problem.task not in {other.task for other in chosen}))
    return chosen
