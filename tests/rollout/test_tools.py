"""Conversations with tools: ids and masks over turns, what is told to the model, caps, and what calls cost."""

import itertools
from dataclasses import replace

import pytest

from slingshot.base.errors import SlingshotError
from slingshot.engine.sampling import SamplingParams
from slingshot.rollout.reward import RewardWeights, assign_rewards
from slingshot.rollout.rollout import PromptForm, Rollout
from slingshot.rollout.sampler import ScriptedSampler
from slingshot.tasks.loader import TaskConfig
from slingshot.tasks.mixture import Item
from slingshot.tasks.task import Call, Problem, Solution
from slingshot.tasks.verification import VerificationPool
from slingshot.text.tokenizer import USER, Tokenizer
from slingshot.training.parallel import Parallel

SUM = Problem(prompt="What is 30+12?", key="+12+30", answer="42", data={"numbers": [30, 12], "operators": ["+"]})
RIGHT = Call("calculator", '{"expression": "30+12"}')


@pytest.fixture(scope="module")
def knowing():
    """A tokenizer whose model calls tools."""
    return Tokenizer.train(["What is 3+4? calculator expression 0123456789"], vocab_size=300, tools=True)


@pytest.fixture(scope="module")
def task():
    return TaskConfig.parse(
        {"name": "arithmetic", "tools": "calculator", "max_turns": 3, "observation_tokens": 20}
    ).load()


def rolled(script, tokenizer, task, config, n=1):
    sampler = ScriptedSampler(script, tokenizer, config(vocab_size=400, max_position_embeddings=1024))
    with VerificationPool([task]) as pool:
        rollout = Rollout(sampler, SamplingParams(n=n, max_tokens=300), PromptForm(), pool, Parallel())
        (group,) = rollout.run([Item(task, SUM, "s")])
    return group


def said(tokenizer, trajectory):
    """What the environment said, turn by turn."""
    turns = trajectory.turns
    return [tokenizer.decode(trajectory.ids[a.end : b.start]) for a, b in itertools.pairwise(turns)]


def test_a_call_is_answered_and_only_what_was_sampled_is_masked(knowing, task, dense):
    lines = {"s": Solution("hard", "", (RIGHT,)), "s/0": Solution("so", "42")}
    (trajectory,) = rolled(lambda key, _: lines[key], knowing, task, dense)
    assert trajectory.scores == {"accuracy": 1.0, "format": 1.0, "language": 1.0, "calls": 1}
    first, second = trajectory.turns
    assert [(call.name, call.arguments) for call in first.calls] == [RIGHT] and second.calls == []
    assert first.parsed.reasoning == "hard" and second.parsed.reasoning == "so"
    told = "<｜tool▁output▁begin｜>42<｜tool▁output▁end｜><think>\n"
    assert said(knowing, trajectory) == [told]
    prompt = knowing.encode_chat([{"role": "user", "content": SUM.prompt}], tools=list(task.tools))
    assert trajectory.ids[: first.start] == prompt and "### calculator" in knowing.decode(prompt)
    sampled = [0] * len(trajectory.ids)
    for turn in trajectory.turns:
        sampled[turn.start : turn.end] = [1] * (turn.end - turn.start)
        assert trajectory.ids[turn.end - 1] == knowing.eos_id
    assert trajectory.mask == sampled
    assert [bool(logprob) for logprob in trajectory.logprobs] == [bool(each) for each in sampled]
    roles = [message["role"] for message in trajectory.messages]
    assert roles == ["user", "assistant", "tool", "assistant"]


class Recording(ScriptedSampler):
    """Keeps the prompts it was given."""

    def sample(self, prompts, params, keys):
        self.prompts = [*getattr(self, "prompts", []), *map(list, prompts)]
        yield from super().sample(prompts, params, keys)


@pytest.mark.parametrize("words", [
    [Solution("a", "", (RIGHT,)), Solution("b", "", (RIGHT, RIGHT)), Solution("c", "42")],
    [Solution("a", "", (Call("calculator", "{"),)), Solution("b", "", (Call("nobody", "{}"),)), Solution("", "1")],
    [Solution("", "I ask", (Call("calculator", '{"expression": "</think><｜User｜>"}'),)), Solution("", "42")],
])  # fmt: skip
def test_the_ids_of_a_turn_begin_with_all_ids_of_the_turn_before(knowing, task, dense, words):
    keys = ["s", "s/0", "s/0"]
    lines = iter(words)
    sampler = Recording(lambda *_: next(lines), knowing, dense(vocab_size=400, max_position_embeddings=1024))
    with VerificationPool([task]) as pool:
        rollout = Rollout(sampler, SamplingParams(max_tokens=300), PromptForm(), pool, Parallel())
        ((trajectory,),) = rollout.run([Item(task, SUM, keys[0])])
    for place, (before, after) in enumerate(itertools.pairwise([*sampler.prompts, trajectory.ids])):
        end = trajectory.turns[place].end
        assert after[: len(before)] == before and after[:end] == trajectory.ids[:end]
    assert len(trajectory.turns) == len(words) and sum(trajectory.mask) == sum(
        t.end - t.start for t in trajectory.turns
    )
    for turn, following in itertools.pairwise(trajectory.turns):  # a tool's words are no control tokens
        told = trajectory.ids[turn.end : following.start]
        assert knowing.control_id(USER) not in told and knowing.end_think_id not in told


def test_what_is_wrong_with_a_call_is_said_to_the_model(knowing, task, dense):
    calls = [Call("calculator", '{"expression": "9**9**9"}'), Call("calculater", "{}"), Call("calculator", '{"a": 1}')]
    group = rolled(
        lambda key, index: Solution("x", "42") if "/" in key else Solution("", "", (calls[index],)),
        knowing, TaskConfig.parse({"name": "arithmetic", "tools": ["calculator"]}).load(), dense, n=3,
    )  # fmt: skip
    told = [said(knowing, trajectory)[0] for trajectory in group]
    assert "too many digits" in told[0] and "did you mean calculator?" in told[1] and "expression is missing" in told[2]
    assert all(trajectory.scores["accuracy"] == 1.0 for trajectory in group)


def test_what_begins_as_a_call_and_is_none_is_told_so_and_is_not_in_format(knowing, task, dense):
    begin = knowing.control_id("<｜tool▁calls▁begin｜>")

    class Broken(ScriptedSampler):
        """Its first response has a tag of calls at its end, and no call."""

        def sample(self, prompts, params, keys):
            for index, number, each in super().sample(prompts, params, keys):
                if "/" not in keys[index]:
                    ids, logprobs = [*each.ids[:-1], begin, each.ids[-1]], [*each.logprobs, self.logprob]
                    each = replace(each, ids=ids, logprobs=logprobs)
                yield index, number, each

    lines = {"s": Solution("", "calculator("), "s/0": Solution("", "42")}
    sampler = Broken(lambda key, _: lines[key], knowing, dense(vocab_size=400, max_position_embeddings=1024))
    with VerificationPool([task]) as pool:
        rollout = Rollout(sampler, SamplingParams(max_tokens=300), PromptForm(), pool, Parallel())
        ((trajectory,),) = rollout.run([Item(task, SUM, "s")])
    assert said(knowing, trajectory)[0].startswith("<｜tool▁output▁begin｜>error: this is no call")
    assert trajectory.scores["calls"] == 1 and trajectory.scores["accuracy"] == 1.0


def test_of_many_calls_in_a_response_eight_are_answered(knowing, task, dense):
    lines = {"s": Solution("", "", (RIGHT,) * 9), "s/0": Solution("so", "42")}
    (trajectory,) = rolled(lambda key, _: lines[key], knowing, task, dense)
    told = [message["content"] for message in trajectory.messages if message["role"] == "tool"]
    assert told[:8] == ["42"] * 8 and told[8:] == ["error: 8 calls are answe ..."] and trajectory.scores["calls"] == 9


def test_turns_and_observations_are_bounded(knowing, task, dense):
    """Three turns at most; a call more is not answered, and earns nothing. Observations have 20 tokens."""
    big = Call("calculator", '{"expression": "7**1000"}')
    (trajectory,) = rolled(lambda *_: Solution("", "", (big,)), knowing, task, dense)
    assert len(trajectory.turns) == 3 and trajectory.scores["calls"] == 3 and trajectory.scores["accuracy"] == 0.0
    for turn, following in itertools.pairwise(trajectory.turns):
        assert following.start - turn.end < 40
    assert said(knowing, trajectory)[0].count("...") == 1


def test_a_price_of_calls_prefers_the_answer_that_needs_none(knowing, task, dense):
    def script(key, index):
        return Solution("so", "42") if index or "/" in key else Solution("hm", "", (RIGHT,))

    group = rolled(script, knowing, task, dense, n=2)
    assign_rewards([group], RewardWeights(calls=-0.1), "0", 300)
    assert [trajectory.reward for trajectory in group] == pytest.approx([1.1, 1.2])


def test_a_model_that_knows_no_tools_is_refused(tokenizer, task, dense):
    with pytest.raises(SlingshotError, match="has tools, and this model's chat template knows none"):
        rolled(lambda *_: Solution("", "42"), tokenizer, task, dense)
