"""The rollout: problems in, verified and scored trajectories out, by turns of a sampler and a task.

rollout = Rollout(sampler, params, PromptForm(), VerificationPool(mix.tasks), parallel)
groups = rollout.run(items)                # this rank's share of the items: params.n trajectories of each
rollout.counts                             # {"skipped": 1}: what was left out of the last run, over all ranks

batch = rollout.sample(items)              # or in two parts: this one asks no other rank, so a thread may do it
groups = rollout.finish(batch)
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import Field

from slingshot.base.config import Strict
from slingshot.base.errors import SlingshotError
from slingshot.engine.sampling import SamplingParams
from slingshot.rollout.reward import format_reward, language_consistency
from slingshot.rollout.sampler import Sampler
from slingshot.rollout.trajectory import Message, Trajectory
from slingshot.tasks.mixture import Item
from slingshot.tasks.task import Problem, Reward
from slingshot.tasks.verification import VerificationPool
from slingshot.text.tokenizer import Tokenizer
from slingshot.text.tool_formats import tool_format
from slingshot.text.turns import cut_text, turn_suffix
from slingshot.training.parallel import Parallel

# Problems that may be left out, or answers that fail to be verified, until it is taken to be all of them.
_PATIENCE = 32


class PromptForm(Strict):
    """How a problem is put to a model: in its chat template, or as plain text to be continued; `text` holds {prompt}.

    `lenient` takes the last answer-like thing anywhere in the response, for models that know no format.
    """

    name: str = "chat"
    chat: bool = True
    text: str = Field(default="{prompt}", pattern=r"\{prompt\}")
    lenient: bool = False

    def messages(self, problem: Problem) -> list[Message]:
        return [{"role": "user", "content": self.text.replace("{prompt}", problem.prompt)}]

    def encode(self, tokenizer: Tokenizer, problem: Problem, tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """tools: what the chat template tells the model that it may call."""
        messages = self.messages(problem)
        if self.chat:
            return tokenizer.encode_chat(messages, tools=list(tools) or None)
        start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        return start + tokenizer.encode(messages[0]["content"])


@dataclass
class Batch:
    """Trajectories that are sampled, whose verification is under way."""

    asked: int  # problems, over all ranks
    groups: list[list[Trajectory]] = field(default_factory=list)
    verdicts: list[tuple[Trajectory, Future[Reward] | None]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)  # of this rank: what was left out, what was verified


@dataclass
class Rollout:
    """Samples, lets the tasks' environments reply, and verifies finished trajectories while others are still sampled.

    With `both` each is also scored as a lenient reader would, under "lenient". Aborted trajectories are left out, and
    problems whose prompts leave the model no room; the first of each kind is said on standard error.
    """

    sampler: Sampler
    params: SamplingParams
    form: PromptForm
    verification: VerificationPool
    parallel: Parallel
    both: bool = False
    stopped: bool = False  # set from another thread: what is sampled is left
    counts: Counter[str] = field(default_factory=Counter)  # what was left out of the last run, over all ranks
    _all: Counter[str] = field(default_factory=Counter)  # problems asked, groups made, answers unverified in all runs
    _reasons: dict[str, str] = field(default_factory=dict)  # the first of each kind

    def run(self, items: Sequence[Item], heard: Callable[[int], None] | None = None) -> list[list[Trajectory]]:
        """Groups of trajectories, one of each problem, in the order of the items.

        heard: told how many trajectories of this rank are sampled, at the end of each.
        """
        return self.finish(self.sample(items, heard))

    def sample(self, items: Sequence[Item], heard: Callable[[int], None] | None = None) -> Batch:
        """This rank's share of the items, through all turns."""
        batch = Batch(len(items), counts=Counter(skipped=0, aborted=0, unverified=0, verified=0))
        mine = self.parallel.mine(items)
        live = [(item.key, group) for item in mine if (group := self._begin(item, batch.counts))]
        batch.groups = [group for _, group in live]
        while live:  # a turn of all that go on: at first the samples of a group together, then each by itself
            replies: list[tuple[str, Trajectory, Future[list[dict[str, Any]] | None]]] = []
            prompts = [group[0].ids for _, group in live]
            params = [replace(self.params, n=len(group)) for _, group in live]
            for index, number, sampled in self.sampler.sample(prompts, params, [key for key, _ in live]):
                if self.stopped:
                    return batch
                key, group = live[index]
                trajectory, item = group[number], group[number].item
                trajectory.respond(sampled, self.sampler.tokenizer)
                if item.task.has_turns and trajectory.finished:
                    reply = self.verification.step(item.task, item.problem, trajectory.messages)
                    replies.append((f"{key}/{number}", trajectory, reply))
                else:
                    self._end(batch, trajectory, heard)
            live = []
            for key, trajectory, reply in replies:
                if self._hear(trajectory, reply, batch.counts):
                    live.append((key, [trajectory]))
                else:
                    self._end(batch, trajectory, heard)
        return batch

    def finish(self, batch: Batch) -> list[list[Trajectory]]:
        """The groups of a batch once all is verified: scored, without what was aborted."""
        self._score(batch)
        return self._whole(batch)

    def refuse_nothing(self) -> None:
        """Raise SlingshotError when not one problem could be put to the model, or hardly an answer verified."""
        asked, unverified, elsewhere = self._all["asked"], self._all["unverified"], "another rank says why"
        verified = self.verification.verified  # responses without an answer too, of which no verifier hears
        if asked and not self._all["made"]:
            why = next(iter(self._reasons.values()), elsewhere)
            raise SlingshotError(f"none of {asked} problems could be put to the model: {why}")
        if unverified > 10 * verified and unverified >= min(_PATIENCE, asked):
            why = self._reasons.get("unverified", elsewhere)
            raise SlingshotError(f"{why}; so it is with {unverified} of {unverified + verified} answers so far")

    def _begin(self, item: Item, counts: Counter[str]) -> list[Trajectory]:
        """The problem's trajectories; none where it is too long."""
        task, tokenizer, longest = item.task, self.sampler.tokenizer, self.sampler.max_length
        if task.has_turns and not self.form.chat:
            raise SlingshotError(f"task {task.name} takes several turns; form {self.form.name} has one, use chat")
        if task.tools and tool_format(tokenizer) is None:
            way = "take a model that was made for them, or leave `tools` out"
            raise SlingshotError(f"task {task.name} has tools, and this model's chat template knows none: {way}")
        ids = self.form.encode(tokenizer, item.problem, task.tools)
        if len(ids) >= longest:
            size = f"the prompt of {item.problem.key!r:.60} has {len(ids):,} tokens, the model holds {longest:,}"
            self._count(counts, "skipped", f"task {task.name}: {size}")
            return []
        return [Trajectory(item, ids, self.form.messages(item.problem)) for _ in range(self.params.n)]

    def _end(self, batch: Batch, trajectory: Trajectory, heard: Callable[[int], None] | None) -> None:
        batch.verdicts.append((trajectory, self._verify(trajectory, self.form.lenient)))
        if heard is not None:
            heard(len(batch.verdicts))

    def _hear(self, trajectory: Trajectory, reply: Future[list[dict[str, Any]] | None], counts: Counter[str]) -> bool:
        """Whether the conversation goes on. It is cut off where the environment fails or leaves no room."""
        if failure := reply.exception():
            self._count(counts, "unverified", str(failure))
            trajectory.verified = False
        elif (messages := reply.result()) is None:
            return False
        else:
            tokenizer, most = self.sampler.tokenizer, trajectory.item.task.observation_tokens
            messages = [each | {"content": cut_text(tokenizer, each["content"], most)} for each in messages]
            ids = turn_suffix(tokenizer, messages, trajectory.turns[-1].calls)
            if len(trajectory.ids) + len(ids) < self.sampler.max_length:
                trajectory.read(ids, messages)
                return True
        trajectory.cut()
        return False

    def _verify(self, trajectory: Trajectory, lenient: bool) -> Future[Reward] | None:
        """Strictly, the answer of a response that ended by itself; leniently, whatever the response says."""
        text = trajectory.response.answer
        if lenient:
            text = self.sampler.tokenizer.decode(trajectory.ids[trajectory.turns[-1].start :])
        elif not trajectory.finished:
            return None
        return self.verification.submit(trajectory.item.task, trajectory.item.problem, text, lenient)

    def _score(self, batch: Batch) -> None:
        for trajectory, verdict in batch.verdicts:
            reward = verdict.result() if verdict else Reward(0.0, None)
            if reward.error:
                self._count(batch.counts, "unverified", reward.error)
                trajectory.verified = False
            batch.counts["verified"] += verdict is not None and not reward.error
            said = [(turn.parsed, turn.finish_reason == "stop", turn.calls) for turn in trajectory.turns]
            spoken = "\n".join(each.reasoning for each, *_ in said if each.reasoning) or trajectory.response.answer
            trajectory.answer = reward.answer
            trajectory.scores = {
                "accuracy": reward.value,
                "format": min(
                    format_reward(each.closed, each.answer or " ".join(call.name for call in calls), ended)
                    for each, ended, calls in said
                ),
                "language": language_consistency(spoken, trajectory.item.problem.language),
            }
            if trajectory.item.task.tools:
                trajectory.scores["calls"] = sum(len(turn.calls) for turn in trajectory.turns)
        if self.both:
            again = [
                (t, self._verify(t, lenient=True) if t.scores["accuracy"] < 1 else None) for t, _ in batch.verdicts
            ]
            for trajectory, verdict in again:
                read = verdict.result().value if verdict else 0.0
                trajectory.scores["lenient"] = max(trajectory.scores["accuracy"], read)

    def _whole(self, batch: Batch) -> list[list[Trajectory]]:
        """The groups without what was aborted; sums the counts over all ranks."""
        kept = [[each for each in group if each.turns[-1].finish_reason != "abort"] for group in batch.groups]
        if aborted := sum(map(len, batch.groups)) - sum(map(len, kept)):
            self._count(batch.counts, "aborted", "the sampler broke off a response", aborted)
        lost, kept = sum(not group for group in kept), [group for group in kept if group]
        sums = self.parallel.sums({"made": len(kept), "lost": lost, **batch.counts})
        totals = Counter({kind: round(total) for kind, total in sums.items() if total})
        self.verification.verified += totals.pop("verified", 0)
        self._all += totals + Counter(asked=batch.asked - totals.pop("lost", 0))
        self.counts = totals - Counter(made=totals["made"])
        if self._all["asked"] >= _PATIENCE:
            self.refuse_nothing()
        return kept

    def _count(self, counts: Counter[str], kind: str, reason: str, count: int = 1) -> None:
        if kind not in self._reasons:
            print(f"{kind}: {reason}; others alike are only counted", file=sys.stderr)
            self._reasons[kind] = reason
        counts[kind] += count
