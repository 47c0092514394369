"""The rollout: problems in, verified and scored trajectories out, by turns of a sampler and a task. Used by rl, sample and evaluate.

rollout = Rollout(sampler, params, PromptForm(), parallel)
groups = rollout.run(items)                # this rank's share of the items: params.n trajectories of each
rollout.counts                             # {"skipped": 1}: what was left out of the last run, over all ranks
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace

from slingshot.base.config import Strict
from slingshot.base.errors import SlingshotError
from slingshot.engine.sampling import SamplingParams
from slingshot.rollout.reward import format_reward, language_consistency
from slingshot.rollout.sampler import Sampler
from slingshot.rollout.trajectory import Message, Trajectory
from slingshot.tasks.mixture import Item
from slingshot.tasks.task import Problem, Reward, Task
from slingshot.text.tokenizer import Tokenizer
from slingshot.training.parallel import Parallel

_PATIENCE = 32  # problems in a row that may be left out before it is taken to be all of them


class PromptForm(Strict):
    """How a problem is put to a model: in its chat template, or as plain text to be continued; `text` holds {prompt}.

    `lenient` takes the last answer-like thing anywhere in the response, for models that know no format.
    """

    name: str = "chat"
    chat: bool = True
    text: str = "{prompt}"
    lenient: bool = False

    def messages(self, problem: Problem) -> list[Message]:
        return [{"role": "user", "content": self.text.replace("{prompt}", problem.prompt)}]

    def encode(self, tokenizer: Tokenizer, problem: Problem) -> list[int]:
        messages = self.messages(problem)
        if self.chat:
            return tokenizer.encode_chat(messages)
        start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        return start + tokenizer.encode(messages[0]["content"])


class Rollout:
    """Samples, lets the tasks' environments reply, and verifies finished trajectories while others are still sampled.

    `lenient` scores each trajectory also as read leniently, under "lenient". Trajectories that were aborted are left out, as are problems whose
    prompts leave the model no room; the first of each kind is said on standard error.
    """

    def __init__(
        self, sampler: Sampler, params: SamplingParams, form: PromptForm, parallel: Parallel, lenient: bool = False
    ) -> None:
        self.sampler, self.params, self.form, self.parallel, self.lenient = sampler, params, form, parallel, lenient
        self.counts: dict[str, int] = {}
        self._notes: dict[str, list[str]] = {}
        self._said: dict[str, str] = {}
        self._asked = self._made = 0

    def run(self, items: Sequence[Item]) -> list[list[Trajectory]]:
        """Groups of trajectories, one of each problem, in the order of the items."""
        self._notes = {"skipped": [], "aborted": [], "unverified": []}
        live = [
            (item.key, [Trajectory(item, ids, self.form.messages(item.problem)) for _ in range(self.params.n)])
            for item in items[self.parallel.rank :: self.parallel.world]
            if (ids := self._prompt(item))
        ]
        groups = [group for _, group in live]
        verdicts: list[tuple[Trajectory, Future[Reward]]] = []
        while live:  # one turn of all that go on: at first the samples of a group together, then each by itself
            replies: list[tuple[str, Trajectory, Future[list[dict[str, str]] | None]]] = []
            prompts, each = (
                [group[0].ids for _, group in live],
                [replace(self.params, n=len(group)) for _, group in live],
            )
            for index, samples in self.sampler.sample(prompts, each, [key for key, _ in live]):
                key, group = live[index]
                for number, (trajectory, sampled) in enumerate(zip(group, samples, strict=True)):
                    trajectory.respond(sampled, self.sampler.tokenizer)
                    task, problem = trajectory.item.task, trajectory.item.problem
                    if task.has_turns and trajectory.finished:
                        reply = _step(task, problem, trajectory.messages)
                        replies.append((f"{key}/{number}", trajectory, reply))
                    else:
                        verdicts.append((trajectory, self._verify(trajectory, self.form.lenient)))
            live = []
            for key, trajectory, reply in replies:
                if broken := reply.exception():
                    verdicts.append((trajectory, _done(Reward(0.0, None, str(broken)))))
                elif self._hear(trajectory, reply.result()):
                    live.append((key, [trajectory]))
                else:
                    verdicts.append((trajectory, self._verify(trajectory, self.form.lenient)))
        self._score(verdicts)
        return self._whole(groups, len(items))

    def _prompt(self, item: Item) -> list[int] | None:
        """The problem's ids; None for one that is too long."""
        ids = self.form.encode(self.sampler.tokenizer, item.problem)
        if len(ids) < self.sampler.max_length:
            return ids
        room = f"the prompt of {item.problem.key!r:.60} has {len(ids):,} tokens, the model holds {self.sampler.max_length:,}"
        self._note("skipped", f"task {item.task.name}: {room}")
        return None

    def _hear(self, trajectory: Trajectory, messages: Sequence[Message] | None) -> bool:
        """Add the environment's messages; False where there are none, or no room for them."""
        if messages is None:
            return False
        ids = turn_suffix(self.sampler.tokenizer, messages)
        if len(trajectory.ids) + len(ids) >= self.sampler.max_length:
            trajectory.cut()
            return False
        trajectory.read(ids, messages)
        return True

    def _verify(self, trajectory: Trajectory, lenient: bool) -> Future[Reward]:
        """Strictly, the answer of a response that ended by itself; leniently, whatever the response says."""
        text = trajectory.answer
        if lenient:
            text = self.sampler.tokenizer.decode(trajectory.ids[trajectory.turns[-1].start :])
        elif not trajectory.finished:
            return _done(Reward(0.0, None))
        return _submit(trajectory.item.task, trajectory.item.problem, text, lenient)

    def _score(self, verdicts: list[tuple[Trajectory, Future[Reward]]]) -> None:
        for trajectory, verdict in verdicts:
            reward, turns = verdict.result(), trajectory.turns
            spoken = "\n".join(turn.reasoning for turn in turns if turn.reasoning) or trajectory.answer
            trajectory.scores = {
                "accuracy": reward.value,
                "format": min(format_reward(turn.closed, turn.answer, turn.finish_reason == "stop") for turn in turns),
                "language": language_consistency(spoken, trajectory.item.problem.language),
            }
            if reward.error:
                self._note("unverified", reward.error)
        if self.lenient:
            again = [(t, self._verify(t, lenient=True)) for t, _ in verdicts if t.scores["accuracy"] < 1]
            for trajectory, _ in verdicts:
                trajectory.scores["lenient"] = trajectory.scores["accuracy"]
            for trajectory, verdict in again:
                trajectory.scores["lenient"] = max(trajectory.scores["accuracy"], verdict.result().value)

    def _whole(self, groups: list[list[Trajectory]], asked: int) -> list[list[Trajectory]]:
        """The groups without what was aborted; counts what was left out over all ranks."""
        for trajectory in (trajectory for group in groups for trajectory in group if trajectory.aborted):
            self._note("aborted", f"a response to {trajectory.item.problem.key!r:.60} was aborted")
        groups = [kept for group in groups if (kept := [each for each in group if not each.aborted])]
        totals = {"groups": float(len(groups))} | {kind: float(len(notes)) for kind, notes in self._notes.items()}
        counts = {kind: round(total) for kind, total in self.parallel.sums(totals).items()}
        self._asked, self._made = self._asked + asked, self._made + counts.pop("groups")
        self.counts = {kind: count for kind, count in counts.items() if count}
        if self._asked >= _PATIENCE:
            self.refuse_nothing()
        return groups

    def refuse_nothing(self) -> None:
        """Raise SlingshotError when not one of the problems so far could be put to the model."""
        if self._asked and not self._made:
            first = next(iter(self._said.values()), "another rank says why")
            raise SlingshotError(f"none of {self._asked} problems could be put to the model: {first}")

    def _note(self, kind: str, reason: str) -> None:
        """Count what was left out; the first of each kind is said at once."""
        if kind not in self._said:
            print(f"{kind}: {reason}; others alike are only counted", file=sys.stderr)
        self._said.setdefault(kind, reason)
        self._notes[kind].append(reason)


def turn_suffix(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids from behind a response's end token to where the next response begins: the messages, as the chat template frames them.

    What is sampled stays as it is, so the ids of a turn begin with those of the turn before; a template that would render old responses
    otherwise (R1's drops their reasoning) has no say in it. Raises SlingshotError where the template ends responses with no end token.
    """
    question, response = {"role": "user", "content": "."}, {"role": "assistant", "content": "."}
    asked = tokenizer.encode_chat([question], add_generation_prompt=False)
    whole = tokenizer.encode_chat([question, response, *messages])
    ends = [place for place, id in enumerate(whole) if id in tokenizer.eos_ids]
    first = sum(id in tokenizer.eos_ids for id in asked)
    if len(ends) <= first:
        raise SlingshotError(
            "this model's chat template ends responses with no end token: it cannot take several turns"
        )
    return whole[ends[first] + 1 :]


def _submit(task: Task, problem: Problem, text: str, lenient: bool) -> Future[Reward]:
    try:
        return _done(task.verify(problem, text, lenient))
    except SlingshotError as error:
        return _done(Reward(0.0, None, str(error)))


def _step(task: Task, problem: Problem, messages: Sequence[Message]) -> Future[list[dict[str, str]] | None]:
    future: Future[list[dict[str, str]] | None] = Future()
    try:
        future.set_result(task.step(problem, messages))
    except SlingshotError as error:
        future.set_exception(error)
    return future


def _done(reward: Reward) -> Future[Reward]:
    future: Future[Reward] = Future()
    future.set_result(reward)
    return future
