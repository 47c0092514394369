"""One attempt at a problem: every id the model read or wrote, which of them it sampled, and what that earned.

What comes after the rollout (training, FLOPs, datasets, evaluations) reads `mask` and `turns`: who wrote what.

    trajectory = Trajectory(item, prompt_ids, messages)
    trajectory.respond(sampled, tokenizer)         # a turn of the model
    trajectory.read(suffix_ids, messages)          # what the environment says to it
    rows = pack(trajectories, length=256)          # rows for training

Shape suffixes: B rows, T time, L layers, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from slingshot.cost.flops import generation_flops
from slingshot.data.packing import pack_examples, whole_groups
from slingshot.model.config import ModelConfig
from slingshot.tasks.mixture import Item
from slingshot.text.reasoning import Parsed, ends_in_reasoning
from slingshot.text.tokenizer import Tokenizer
from slingshot.text.tool_formats import ToolCall, tool_format
from slingshot.text.turns import read_turn, told_calls
from slingshot.training.objectives import Aggregation, token_shares
from slingshot.training.parallel import Parallel
from slingshot.training.policy import PolicyRows

Message = Mapping[str, Any]
Finish = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class Sampled:
    """One sample: its ids (an end-of-sequence id included) and their logprobs at the sampling temperature.

    routed_experts [T - 1, L, K]: the experts of each token of prompt and sample but the last, where they are told.
    """

    ids: list[int]
    logprobs: list[float]
    finish_reason: Finish
    routed_experts: Tensor | None = None


@dataclass(frozen=True)
class Turn:
    """One response of the model: ids[start:end] of its trajectory, parted at the think tags, and what it called."""

    start: int
    end: int
    parsed: Parsed
    finish_reason: Finish
    calls: Sequence[ToolCall] = ()


@dataclass
class Trajectory:
    """One attempt at a problem. The ids of each turn begin with all ids of the turn before."""

    item: Item
    ids: list[int]  # at first the prompt
    messages: list[Message]  # the same as a chat, reasoning left out
    mask: list[int] = field(default_factory=list)  # 1 on sampled tokens
    logprobs: list[float] = field(default_factory=list)  # of sampled tokens, 0 elsewhere
    turns: list[Turn] = field(default_factory=list)
    routed_experts: Tensor | None = None  # of all ids before the last turn's last
    # accuracy, format, language: each in [0, 1]; calls: how many, where there are tools
    scores: dict[str, float] = field(default_factory=dict)
    answer: str | None = None  # as the verifier read it
    verified: bool = True  # False where verifier or environment failed: the reward says nothing then
    reward: float = 0.0
    advantage: float = 0.0

    def __post_init__(self) -> None:
        self.mask, self.logprobs = [0] * len(self.ids), [0.0] * len(self.ids)

    def respond(self, sampled: Sampled, tokenizer: Tokenizer) -> None:
        """Add what the model said next."""
        form = tool_format(tokenizer) if self.item.task.tools else None
        parsed, calls = read_turn(sampled.ids, ends_in_reasoning(self.ids, tokenizer), tokenizer, form)
        start, end = len(self.ids), len(self.ids) + len(sampled.ids)
        self.turns.append(Turn(start, end, parsed, sampled.finish_reason, calls))
        called = {"tool_calls": told_calls(calls)} if calls else {}
        message = {"role": "assistant", "content": parsed.answer, **called}
        self._extend(sampled.ids, 1, sampled.logprobs, [message])
        self.routed_experts = sampled.routed_experts

    def read(self, ids: list[int], messages: Sequence[Message]) -> None:
        """Add what the environment says to the model: never trained on."""
        self._extend(ids, 0, [0.0] * len(ids), messages)

    def _extend(self, ids: list[int], mask: int, logprobs: list[float], messages: Sequence[Message]) -> None:
        self.ids = self.ids + ids  # a new list: the prompt's is shared by its group
        self.mask += [mask] * len(ids)
        self.logprobs += logprobs
        self.messages = [*self.messages, *messages]

    def cut(self) -> None:
        """End a conversation that would go on, had the model room for it."""
        self.turns[-1] = replace(self.turns[-1], finish_reason="length")

    @property
    def finished(self) -> bool:
        """Whether the model ended its last turn by itself, rather than being cut off or aborted."""
        return self.turns[-1].finish_reason == "stop"

    @property
    def cut_off(self) -> bool:
        """Whether there was no more room for what the model would have said."""
        return self.turns[-1].finish_reason == "length"

    @property
    def response(self) -> Parsed:
        """The last turn's reasoning and answer."""
        return self.turns[-1].parsed


def pack(
    trajectories: Sequence[Trajectory],
    length: int,
    aggregation: Aggregation = "token",
    constant: int = 1,
    own: int | None = None,
) -> PolicyRows:
    """Rows of `length` tokens (or as the longest has), what belongs to a sampled token in its place.

    `constant`: the length that a response's sum is divided by under the aggregation of that name. `own`: how many of
    the ids that all responses to a problem begin with each has for itself, 1, or 2 where MTP is trained; the others
    stand once. None: nothing is shared.
    """
    examples = [(t.ids, t.mask) for t in trajectories]
    groups = None if own is None else [t.item.key for t in trajectories]
    longest = max([length, *(len(t.ids) for t in trajectories)])
    packed = pack_examples(examples, longest, groups=groups, own=own or 0)
    placed = list(zip(trajectories, packed.placement, packed.shared, strict=True))
    shares = token_shares([sum(t.mask) for t in trajectories], [t.item.key for t in trajectories], aggregation)
    shares_BT, weights_BT, advantages_BT, sampler_BT = (
        np.zeros(packed.tokens_NT.shape, dtype=np.float32) for _ in range(4)
    )
    for (trajectory, (row, start), shared), share in zip(placed, shares, strict=True):
        span, mask = slice(start, start + len(trajectory.ids) - shared), trajectory.mask[shared:]
        shares_BT[row, span] = np.multiply(mask, share)
        weights_BT[row, span] = np.multiply(mask, 1 / constant if aggregation == "constant" else share)
        advantages_BT[row, span] = np.multiply(mask, trajectory.advantage)
        sampler_BT[row, span] = trajectory.logprobs[shared:]
    ids = (torch.from_numpy(part).long() for part in (packed.tokens_NT, packed.segments_NT))
    rows = PolicyRows(*ids, *map(torch.from_numpy, (shares_BT, weights_BT, advantages_BT, sampler_BT)))
    if packed.prefixes_NT.any():
        rows.prefixes_BT = torch.from_numpy(packed.prefixes_NT).long()
    if told := [t.routed_experts for t in trajectories if t.routed_experts is not None]:
        rows.replayed_BTLk = torch.zeros(*rows.tokens_BT.shape, *told[0].shape[1:], dtype=torch.int16)
        for trajectory, (row, start), shared in placed:
            if (experts := trajectory.routed_experts) is not None:
                numbered = experts.to(torch.int16) + 1
                rows.replayed_BTLk[row, start : start + len(experts) - shared] = numbered[shared:]
                if shared:
                    prefix_T = packed.segments_NT[row] == packed.prefixes_NT[row, start]
                    rows.replayed_BTLk[row, torch.from_numpy(prefix_T)] = numbered[:shared]
    return rows


def row_shape(
    trajectories: Sequence[Trajectory],
    length: int,
    micro_batch_size: int,
    parallel: Parallel,
    own: int,
    minibatches: int = 1,
) -> tuple[int, int]:
    """The length of rows, and how many are a micro-batch: for `pack`, the same on all ranks.

    Rows are long enough for all responses to a problem, so that its prompt is computed once, where a micro-batch is
    not of more tokens for it than in rows of `length` (or as the longest trajectory has), nor `minibatches` too many.
    """
    longest = parallel.max(max([length, *(len(t.ids) for t in trajectories)]))
    groups = [t.item.key for t in trajectories]
    largest, total = whole_groups([(t.ids, t.mask) for t in trajectories], groups, own)
    largest += -largest % 32  # few shapes: matrix libraries make code for each
    wide = parallel.max(max(longest, min(largest, longest * micro_batch_size, total // minibatches)))
    return wide, max(1, longest * micro_batch_size // wide)


def sampling_cost(config: ModelConfig, groups: Sequence[Sequence[Trajectory]]) -> tuple[int, float]:
    """Tokens sampled and their FLOPs; the first turns of a group share the prefill of their prompt."""
    tokens, flops = 0, 0.0
    for group in groups:
        firsts = [(group[0].turns[0].start, [each.turns[0] for each in group])]
        for start, turns in firsts + [(turn.start, [turn]) for each in group for turn in each.turns[1:]]:
            sizes = [turn.end - turn.start for turn in turns]
            tokens += sum(sizes)
            flops += generation_flops(config, start, sizes)
    return tokens, flops
