"""What the stages of a run left in its folder, as the report and the runner's own lines read it.

StageResult.read(Path("runs/tiny"), "rl", "rl").scores["arithmetic"].pass_at_1
headline(Path("runs/tiny/rl"))                  # "reward 0.950, 1.62M tokens, 41 TFLOP"
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from slingshot.base.config import Strict
from slingshot.base.errors import SlingshotError
from slingshot.base.files import read_json, read_jsonl
from slingshot.base.quantity import show_count, show_flops, show_share
from slingshot.cost.flops import Parameters, parameters
from slingshot.cost.receipt import RECEIPT, Receipt
from slingshot.model.config import ModelConfig

FEW = 30  # of fewer answers a share says less than their number


class Lenient(Strict):
    """Read what is needed here and let the rest pass."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Score(Lenient):
    """What an evaluation says of one task."""

    pass_at_1: float = Field(alias="pass@1")
    ci95: tuple[float, float]
    pass_at_8: float | None = Field(alias="pass@8", default=None)
    mean_tokens: float
    format: float
    language: float | None = None
    n: int
    samples_per_problem: int = 1
    calls: float | None = None  # of tools, a problem
    notes: list[str] = []  # what qualifies the scores, in words

    @property
    def few(self) -> bool:
        return self.n < FEW

    @property
    def shown(self) -> str:
        """ "95.4% (93.4% to 97.2%)"; of few problems the number that were right."""
        if self.few and self.samples_per_problem == 1:
            return f"{round(self.pass_at_1 * self.n)} of {self.n}"
        of = f" of {self.n} problems" if self.few else ""
        return f"{show_share(self.pass_at_1)}{of} ({show_share(self.ci95[0])} to {show_share(self.ci95[1])})"


class AnsweredProblem(Lenient):
    """One problem as one stage answered it."""

    prompt: str
    answer: str
    completion: str = ""
    reasoning: str | None = None
    response: str | None = None
    correct: bool


class Evaluation(Lenient):
    """The content of evaluation.json."""

    tasks: dict[str, Score] = {}
    examples: dict[str, list[AnsweredProblem]] = {}

    @classmethod
    def read(cls, folder: Path) -> Evaluation:
        """A folder's evaluation; empty when it has none."""
        path = folder / "evaluation.json"
        return cls.parse(read_object(path), str(path)) if path.is_file() else cls()


class PairedScores(Lenient):
    """A small model's pass@1 less the full one's, on the same problems."""

    difference: float
    ci95: tuple[float, float]

    @property
    def shown(self) -> str:
        """ "+1.0 (-1.0 to +3.0)": points."""
        low, high = (f"{100 * end:+.1f}" for end in self.ci95)
        return f"{100 * self.difference:+.1f} ({low} to {high})"


class Quantized(Lenient):
    """What a quantised checkpoint's receipt says of it, beside the model that it was made of."""

    bytes: int
    share_of_bfloat16: float
    kl: float
    same_top: float
    tokens_per_second: dict[str, float]
    tasks: dict[str, PairedScores] = {}


@dataclass(frozen=True)
class StageResult:
    """A stage as far as it got: without a receipt it has not run, without scores it was not evaluated."""

    name: str
    kind: str
    receipt: Receipt | None
    metrics: list[dict[str, Any]]
    scores: dict[str, Score]
    examples: dict[str, list[AnsweredProblem]]
    model: Parameters | None

    @classmethod
    def read(cls, run: Path, name: str, kind: str) -> StageResult:
        """What the stage `name` left in the folder `run`. SlingshotError when a file of it is broken."""
        folder = run / name
        if not (folder / RECEIPT).is_file():
            return cls(name, kind, None, [], {}, {}, None)
        metrics = read_jsonl(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
        # A stage's scores lie beside it; an evaluation that is a stage of the recipe holds its own.
        evaluation = Evaluation.read(run / "evaluations" / name)
        evaluation = evaluation if evaluation.tasks else Evaluation.read(folder)
        architecture = folder / "config.json"
        model = ModelConfig.from_hf(read_object(architecture), str(architecture)) if architecture.is_file() else None
        counts = parameters(model) if model else None
        return cls(name, kind, Receipt.read(folder), metrics, evaluation.tasks, evaluation.examples, counts)

    @property
    def quantization(self) -> Quantized | None:
        """What was lost by it, where it was quantised."""
        told = self.receipt.extra.get("quantization") if self.receipt else None
        return Quantized.parse(told, f"{self.name}: {RECEIPT}: extra.quantization") if told else None

    @property
    def parents(self) -> list[str]:
        """Names of what it was made from."""
        return [Path(parent.path).name for parent in self.receipt.parents] if self.receipt else []


def read_object(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise SlingshotError(f"{path} should hold a JSON object")
    return value


def headline(folder: Path) -> str:
    """What a reader wants of a finished artifact in half a line: an evaluation's pass@1, else the last loss or reward;
    and the cost."""
    parts = []
    for task, score in Evaluation.read(folder).tasks.items():
        notes = ["few problems, so chance has a large part in it"] * score.few + score.notes
        qualified = f" ({'; '.join(notes)})" if notes else ""
        parts.append(f"{task} {'' if score.few else 'pass@1 '}{score.shown}{qualified}")
    if (folder / "metrics.jsonl").exists() and (rows := read_jsonl(folder / "metrics.jsonl")):
        parts += [f"{key} {rows[-1][key]:.3f}" for key in ("loss", "reward") if isinstance(rows[-1].get(key), float)]
    receipt = Receipt.read(folder)
    if "bits_per_byte" in receipt.extra:
        parts.append(f"{receipt.extra['bits_per_byte']:.3f} bits per byte of held-out text")
    if receipt.extra.get("quantization"):
        told = Quantized.parse(receipt.extra["quantization"], f"{folder / RECEIPT}: extra.quantization")
        parts.append(f"{told.share_of_bfloat16:.2f} of bfloat16's bytes, KL {told.kl:.2g} a token")
        parts += [f"{task} pass@1 {each.shown} points" for task, each in told.tasks.items()]
    return ", ".join([*parts, f"{show_count(receipt.tokens)} tokens", show_flops(receipt.flops)])
