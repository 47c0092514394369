"""Do two engines predict the same from the same checkpoint? Both are forced along the same tokens, and each prediction
is compared.

ours = teacher_forced(load_model(path), prompts)
assert_same_predictions(ours, theirs, bound=1e-4, what="vLLM, float32")
assert_same_continuations(model, prompts, ours_ids, theirs_ids, bound=1e-4)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from slingshot.model.transformer import Transformer


@dataclass(frozen=True)
class Forced:
    """One prompt of n tokens, n - 1 predictions: entry t is about token t + 1, given those up to t."""

    logprobs: list[float]  # natural logarithm of the probability given to the token that stands there
    greedy: list[int]  # the likeliest token instead
    gaps: list[float]  # by how much its logprob is above the second's

    def last(self, count: int) -> Forced:
        """The last `count` predictions."""
        start = len(self.logprobs) - count
        return Forced(self.logprobs[start:], self.greedy[start:], self.gaps[start:])


@dataclass(frozen=True)
class Bounds:
    """In nats: of every deviation, of their median, and of a near-tie where greedy texts may part."""

    worst: float
    median: float
    tie: float


@torch.no_grad()
def teacher_forced(model: Transformer, prompts: Sequence[Sequence[int]]) -> list[Forced]:
    """Our predictions along each prompt, in one uncached pass in the model's own dtype; softmax in float32."""
    forced = []
    for prompt in prompts:
        logits_1TV = model(torch.tensor([prompt])).logits_BTV
        assert logits_1TV is not None
        logprobs_TV = logits_1TV[0, :-1].float().log_softmax(-1)
        logprobs_T = logprobs_TV.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        best_T2, ids_T2 = logprobs_TV.topk(2, dim=-1)
        forced.append(Forced(logprobs_T.tolist(), ids_T2[:, 0].tolist(), (best_T2[:, 0] - best_T2[:, 1]).tolist()))
    return forced


def deviations(ours: Sequence[Forced], theirs: Sequence[Forced]) -> list[float]:
    """By how much each logprob of ours differs from theirs, in nats, prompt after prompt."""
    assert [len(forced.logprobs) for forced in ours] == [len(forced.logprobs) for forced in theirs]
    pairs = chain.from_iterable(zip(a.logprobs, b.logprobs, strict=True) for a, b in zip(ours, theirs, strict=True))
    return [abs(a - b) for a, b in pairs]


def assert_same_predictions(
    ours: Sequence[Forced], theirs: Sequence[Forced], bound: float, median: float | None = None, what: str = ""
) -> None:
    """Every logprob agrees within `bound` nats, and every greedy token unless our two best are within `bound` of each
    other.

    `median` bounds the median deviation: where rounding now and then sends a token to another expert, it says more than
    the worst. Prints median and worst, for pytest -s and for the log of a failure."""
    differences = torch.tensor(deviations(ours, theirs), dtype=torch.float64)
    figure = f"{what or 'logprobs'}: median {differences.median():.2e}, worst {differences.max():.2e} nats"
    figure += f" of {len(differences)} predictions"
    print(figure)
    assert (differences <= bound).all(), f"{figure}; the bound is {bound:g}"  # NaN fails as well
    assert median is None or differences.median() <= median, f"{figure}; the median's bound is {median:g}"
    greedy = [
        (prompt, position, gap)
        for prompt, (a, b) in enumerate(zip(ours, theirs, strict=True))
        for position, (mine, other, gap) in enumerate(zip(a.greedy, b.greedy, a.gaps, strict=True))
        if mine != other and gap > bound
    ]
    assert not greedy, (
        f"{figure}; another greedy token at (prompt, position, gap) {greedy[0]} and {len(greedy) - 1} more"
    )


def assert_same_continuations(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    ours: Sequence[Sequence[int]],
    theirs: Sequence[Sequence[int]],
    bound: float,
) -> None:
    """Greedy continuations are the same ids; where one parts from the other, our two best there are within `bound` nats
    of each other."""
    for number, (prompt, mine, other) in enumerate(zip(prompts, ours, theirs, strict=True)):
        if list(mine) == list(other):
            continue
        common = next((at for at, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), None)
        assert common is not None, (
            f"prompt {number}: one continuation ends after {min(len(mine), len(other))} tokens, the other goes on"
        )
        gap = teacher_forced(model, [[*prompt, *mine[: common + 1]]])[0].gaps[-1]
        parted = f"prompt {number}: continuations part at token {common}, where our two best are {gap:.2e} nats apart"
        assert gap <= bound, f"{parted}; the bound is {bound:g}"
