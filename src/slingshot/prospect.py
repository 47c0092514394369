"""A model that does not exist yet, as far as it can be known: its architecture, its tokenizer, and how it will probably write.

Plans count with it and rehearsals act it out: responses are the tasks' own worked solutions, encoded by the tokenizer to come.

    prospect = Prospect(model, tokenizer, Writer({"answer": 0.6, "steps": 0.4}))
    prompt, replies = prospect.respond(item, PromptForm(), n=16, max_tokens=128)
    len(replies[0].ids), replies[0].right

Nobody knows beforehand which problems a model will solve. Each problem's chance of being solved is drawn from a Beta distribution around `solved`
that is as sharp as one that was measured: at one half 44% of groups of 8 replies are all right or all wrong, as those of Llama-3.1-8B are on
Big-Math (arXiv 2607.00152).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from slingshot.checkpoint.hub import locate
from slingshot.checkpoint.load_save import FolderWeights, load_tokenizer, open_weights
from slingshot.cost.flops import generation_flops
from slingshot.cost.workload import SOLVED, Phase
from slingshot.model.config import ModelConfig
from slingshot.rollout.rollout import Item, PromptForm
from slingshot.tasks.task import Solution, Style
from slingshot.text.reasoning import ends_in_reasoning
from slingshot.text.response import encode_responses
from slingshot.text.tokenizer import Tokenizer

SHOWN = 4096  # problems looked at; of more, the others are taken to be like them
CONCENTRATION = 0.84  # of the Beta distribution: the sum of its two parameters


@dataclass(frozen=True)
class Reply:
    """A response as it may come: its ids, the end token included, its text in two parts, and whether its answer is right."""

    ids: list[int]
    reasoning: str
    answer: str
    right: bool


@dataclass(frozen=True)
class Writer:
    """How responses read: worked solutions in these styles and shares, and the chance that one is right."""

    styles: Mapping[Style, float] = field(default_factory=lambda: {"steps": 1.0})
    solved: float = SOLVED

    def respond(self, tokenizer: Tokenizer, item: Item, form: PromptForm, n: int, max_tokens: int) -> tuple[list[int], list[Reply]]:
        """The prompt's ids and `n` replies to it, the same for the same item."""
        prompt = form.encode(tokenizer, item.problem)
        rng = random.Random(f"reply/{item.key}")
        sure = rng.betavariate(*self.prior)
        written = [self._write(item, rng, rng.random() < sure, max_tokens) for _ in range(n)]
        if form.chat:
            texts = [(solution.reasoning, solution.answer) for solution, _ in written]
            ids = encode_responses(tokenizer, texts, ends_in_reasoning(prompt, tokenizer))
        else:
            plain = ["\n".join(filter(None, (solution.reasoning, solution.answer))) for solution, _ in written]
            ids = [[*each, tokenizer.eos_id or 0] for each in tokenizer.encode_batch(plain)]
        cut = [each[:max_tokens] for each in ids]
        return prompt, [Reply(each, s.reasoning, s.answer, right) for each, (s, right) in zip(cut, written, strict=True)]

    @property
    def prior(self) -> tuple[float, float]:
        """Parameters of the Beta distribution of a problem's chance of being solved."""
        return CONCENTRATION * self.solved, CONCENTRATION * (1 - self.solved)

    def disagreement(self, n: int) -> float:
        """The chance that of `n` replies to a problem some are right and some wrong, over all problems."""

        def alike(a: float) -> float:  # the mean of p^n
            return math.exp(math.lgamma(a + n) - math.lgamma(a) + math.lgamma(CONCENTRATION) - math.lgamma(CONCENTRATION + n))

        return max(0.0, 1 - sum(map(alike, self.prior)))

    def _write(self, item: Item, rng: random.Random, right: bool, max_tokens: int) -> tuple[Solution, bool]:
        task, problem = item.task, item.problem
        if task.has_solutions:
            style = rng.choices(list(self.styles), list(self.styles.values()))[0]
            solution = task.solution(problem, style, rng)
        else:  # how this is solved is written nowhere, so responses are taken to be as long as they may
            solution = Solution("so " * max_tokens, problem.answer)
        return (solution, True) if right else (Solution(solution.reasoning, f"{solution.answer}1"), False)


@dataclass(frozen=True)
class Prospect:
    """A checkpoint to come."""

    model: ModelConfig
    tokenizer: Tokenizer
    writer: Writer
    # Where it is pre-trained: tokens of the documents in one batch, and of those held out.
    lengths: Sequence[int] = ()
    heldout: Sequence[int] = ()
    stored: str = "float32"  # torch's name of the type its weights are stored in
    source: str | None = None  # where it lies, if it is there already

    def respond(self, item: Item, form: PromptForm, n: int, max_tokens: int) -> tuple[list[int], list[Reply]]:
        return self.writer.respond(self.tokenizer, item, form, n, max_tokens)

    @classmethod
    def outside(cls, source: str) -> Prospect:
        """A checkpoint that is there, by its headers; how it writes is unknown, so worked solutions step by step stand for it."""
        path = locate(source)
        weights = open_weights(path)
        stored = weights.dtype if isinstance(weights, FolderWeights) else "float32"
        return cls(weights.config, load_tokenizer(path), Writer(), stored=stored, source=str(path))

    def trusting(self, solved: float) -> Prospect:
        """The same model, believed to solve this share of problems."""
        return replace(self, writer=replace(self.writer, solved=solved))

    def reading(self, styles: Mapping[Style, float]) -> Prospect:
        """What training makes of the model: one that writes in these styles, and is not there yet."""
        return replace(self, writer=replace(self.writer, styles=dict(styles)), source=None)


def some(items: Sequence[Item]) -> tuple[Sequence[Item], float]:
    """At most SHOWN of the items, evenly spaced, and how many times as many there are."""
    shown = items[:: -(-len(items) // SHOWN) or 1]
    return shown, len(items) / max(1, len(shown))


def rollout_phase(name: str, model: ModelConfig, answered: Sequence[tuple[list[int], list[Reply]]], rounds: int, scale: float = 1.0) -> Phase:
    """The phase of sampling these replies, `scale` times over, in so many rounds."""
    counts = [[len(reply.ids) for reply in replies] for _, replies in answered]
    flat = [count for group in counts for count in group]
    flops = sum(generation_flops(model, len(prompt), group) for (prompt, _), group in zip(answered, counts, strict=True))
    return Phase(
        name=name, sort="rollouts", steps=rounds, tokens=scale * sum(flat), flops={"sampling": scale * flops},
        responses=-(-round(scale * len(flat)) // max(1, rounds)), prompt=sum(len(prompt) for prompt, _ in answered) / max(1, len(answered)),
        response=sum(flat) / max(1, len(flat)), longest=max(flat, default=0),
    )  # fmt: skip


def guesses(items: Sequence[Item], writer: Writer, max_tokens: int) -> list[str]:
    """The assumptions behind replies to these items, a line each."""
    silent = dict.fromkeys(item.task.name for item in items if not item.task.has_solutions)
    shares = ", ".join(f"{style} {share / sum(writer.styles.values()):.0%}" for style, share in writer.styles.items())
    lines = []
    if any(item.task.has_solutions for item in items):
        lines.append(f"responses as long as the tasks' worked solutions ({shares}) in this tokenizer")
    if silent:
        lines.append(f"{', '.join(silent)}: no worked solutions, so every response runs to max_tokens {max_tokens}")
    return lines


def luck(writer: Writer) -> str:
    return f"a problem's chance of being solved is drawn from Beta({writer.prior[0]:.2g}, {writer.prior[1]:.2g})"
