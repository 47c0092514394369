"""From problems to verified trajectories: prompts, scores, what is left out, and conversations of several turns."""

import time
from dataclasses import replace

import pytest

from slingshot.base.errors import SlingshotError
from slingshot.engine.sampling import SamplingParams
from slingshot.rollout.rollout import PromptForm, Rollout, turn_suffix
from slingshot.rollout.sampler import ScriptedSampler
from slingshot.tasks.loader import load_task
from slingshot.tasks.mixture import Item
from slingshot.tasks.task import Problem, Solution, Task
from slingshot.tasks.verification import VerificationPool
from slingshot.text.reasoning import Parsed
from slingshot.training.parallel import Parallel

WAITING = """
import time
from pathlib import Path
def problems(split, seed): yield {{"prompt": "x"}}
def verify(problem, text):
    Path({asked!r}).touch()
    while not Path({whole!r}).exists(): time.sleep(0.01)
    return True
"""
ALONE = Parallel()
SUM = Problem(prompt="What is 3+4?", key="3+4", answer="7")


def item(problem=SUM, task=None):
    return Item(task or load_task("arithmetic", min_terms=2, max_terms=3), problem, f"step/{problem.key}")


def rolling(sampler, params, form=None, **more):
    return Rollout(sampler, params, form or PromptForm(), VerificationPool([]), ALONE, **more)


def rolled(sampler, n, form, max_tokens=64, **more):
    (group,) = rolling(sampler, SamplingParams(n=n, max_tokens=max_tokens), form, **more).run([item()])
    return group


def test_forms_of_a_prompt(tokenizer):
    problem = Problem(prompt="What is {x}?", key="k")
    chat = tokenizer.encode_chat([{"role": "user", "content": "What is {x}?"}])
    assert PromptForm().encode(tokenizer, problem) == chat
    form = PromptForm(chat=False, text="Q: {prompt}\nA:")
    assert form.encode(tokenizer, problem) == [tokenizer.bos_id, *tokenizer.encode("Q: What is {x}?\nA:")]
    within = tokenizer.encode_chat([{"role": "user", "content": "What is {x}? Think."}])
    assert PromptForm(text="{prompt} Think.").encode(tokenizer, problem) == within
    with pytest.raises(SlingshotError, match=r"form\.text: .*prompt"):  # every problem would read alike
        PromptForm.parse({"text": "{promt} Think."}, "form")


def test_a_problem_cannot_write_control_tokens(tokenizer):
    problem = Problem(prompt="<｜end▁of▁sentence｜></think>", key="k")
    for form in (PromptForm(), PromptForm(chat=False)):
        ids = form.encode(tokenizer, problem)
        assert tokenizer.eos_id not in ids and tokenizer.end_think_id not in ids


RESPONSES = [
    (Solution("3 plus 4 is 7", "7"), (1.0, 1.0, 1.0)),
    (Solution("3 plus 4 is 7", "8"), (0.0, 1.0, 1.0)),
    (Solution("3足す4は7", "7"), (1.0, 1.0, 0.0)),
    ("3 plus 4 is 7", (0.0, 0.0, 1.0)),  # its reasoning is never closed
    (Solution("3 plus 4 is 7", "It is 7, or 8"), (0.0, 1.0, 1.0)),
    (Solution("3 plus 4 is 7 " * 20, "7"), (0.0, 0.0, 1.0)),  # cut off
]


def test_how_many_trajectories_are_sampled_is_told_as_each_ends(saying):
    heard = []
    rolling(saying(lambda *_: RESPONSES[0][0]), SamplingParams(n=3, max_tokens=64)).run([item()], heard.append)
    assert heard == [1, 2, 3]


def test_responses_are_scored_on_their_answer_format_and_language(saying, tokenizer):
    group = rolled(saying(lambda _, index: RESPONSES[index][0]), len(RESPONSES), PromptForm())
    scores = [tuple(t.scores[name] for name in ("accuracy", "format", "language")) for t in group]
    assert scores == [expected for _, expected in RESPONSES]
    assert [t.finished for t in group] == [True] * 5 + [False] and sum(group[-1].mask) == 64
    prompt = PromptForm().encode(tokenizer, SUM)
    for t in group:
        n = len(t.ids) - len(prompt)
        assert t.ids[: len(prompt)] == prompt and t.mask == [0] * len(prompt) + [1] * n
        assert t.logprobs == [0.0] * len(prompt) + [ScriptedSampler.logprob] * n
    assert group[0].response == Parsed("3 plus 4 is 7", "7", True)


def test_a_lenient_form_reads_the_last_answer_wherever_it_stands(saying):
    said = ["3+4 is 8, no, 7", "7 or 8", "none", "3+4 is 7" + " " * 70 + "8"]
    plain = PromptForm(chat=False, lenient=True)
    group = rolled(saying(lambda _, index: said[index]), 4, plain, max_tokens=60)
    assert [t.scores["accuracy"] for t in group] == [1.0, 0.0, 0.0, 1.0] and not group[3].finished
    strict = rolled(saying(lambda _, index: said[index]), 4, PromptForm(chat=False), both=True)
    assert [t.scores["accuracy"] for t in strict] == [0.0] * 4
    assert [t.scores["lenient"] for t in strict] == [1.0, 0.0, 0.0, 1.0]


def test_problems_without_room_for_an_answer_are_counted_and_left_out(saying, capsys):
    long = [Problem(prompt="What is 3+4? " * 50, key=f"long{index}", answer="7") for index in range(2)]
    rollout = rolling(saying(lambda key, _: Solution("", key[-1])), SamplingParams(n=2))
    groups = rollout.run([item(long[0]), item(), item(long[1])])
    assert [group[0].item.problem for group in groups] == [SUM] and rollout.counts == {"skipped": 2}
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "task arithmetic: the prompt of 'long0' has" in said and "holds 256" in said
    rollout.run([item()])
    assert rollout.counts == {}
    rollout.run([item(each) for each in long] * 40)  # something was asked before
    rollout.refuse_nothing()


@pytest.mark.parametrize("count", [1, 40])
def test_problems_that_are_all_too_long_are_refused_by_name(saying, count):
    rollout = rolling(saying(lambda *_: ""), SamplingParams())
    with pytest.raises(SlingshotError, match=f"none of {count} problems .* task arithmetic: the prompt of '3\\+4' has"):
        rollout.run([item(replace(SUM, prompt="3+4" * 300))] * count)
        rollout.refuse_nothing()


def test_an_answer_that_fails_to_be_verified_ends_nothing_and_all_of_them_do(saying, tmp_path):
    file = tmp_path / "failing.py"
    verifier = "def verify(problem, text): raise ValueError('oh')"
    file.write_text(f"def problems(split, seed): yield {{'prompt': 'x'}}\n{verifier}\n")
    task = load_task(str(file))
    with VerificationPool([task]) as verification:
        failing = Rollout(saying(lambda *_: Solution("", "7")), SamplingParams(), PromptForm(), verification, ALONE)
        ((trajectory,),) = failing.run([item(task=task)])
        assert trajectory.scores["accuracy"] == 0.0 and failing.counts == {"unverified": 1}
        assert not trajectory.verified
        with pytest.raises(SlingshotError, match=r"raised ValueError: oh.*; so it is with 33 of 33 answers so far"):
            failing.run([item(task=task)] * 32)


def test_a_response_is_verified_while_others_of_its_group_are_sampled(saying, tmp_path):
    """The last is sampled once the verifier was asked of another, which it answers once all are sampled."""
    file, asked, whole = (tmp_path / name for name in ("waiting.py", "asked", "whole"))
    file.write_text(WAITING.format(asked=str(asked), whole=str(whole)))

    class Lasting(ScriptedSampler):
        def sample(self, *arguments):
            *others, last = super().sample(*arguments)
            yield from others
            while not asked.exists():
                time.sleep(0.01)
            whole.touch()
            yield last

    task, scripted = load_task(str(file)), saying(lambda *_: Solution("", "7"))
    sampler = Lasting(scripted.script, scripted.tokenizer, scripted.model_config)
    with VerificationPool([task]) as verification:
        rollout = Rollout(sampler, SamplingParams(n=3), PromptForm(), verification, ALONE)
        (group,) = rollout.run([item(task=task)])
    assert [trajectory.scores["accuracy"] for trajectory in group] == [1.0] * 3


@pytest.mark.parametrize("rank", [0, 1])  # it fails on the first; the second has nothing to verify
def test_ranks_end_together_when_nothing_can_be_verified(saying, rank):
    class OfTwo(Parallel):
        def sums(self, values):
            return {name: value + others.get(name, 0) for name, value in values.items()}

    for others in {"made": 1, "unverified": 40, "verified": 5}, {"made": 1, "unverified": 40, "verified": 3}:
        parallel = OfTwo(dp_rank=rank, dp_size=2)
        sampler = saying(lambda *_: Solution("so", "7"))
        rollout = Rollout(sampler, SamplingParams(), PromptForm(), VerificationPool([]), parallel)
        rollout.run([item(Problem("Guess a digit.", "broken", "7"), Guess())])
        if others["verified"] > 3:
            rollout.refuse_nothing()
    with pytest.raises(SlingshotError, match=("no such digit", "another rank says why")[rank]):
        rollout.refuse_nothing()


def test_what_was_aborted_is_left_out(saying):
    class Aborting(ScriptedSampler):
        def sample(self, *arguments):
            for index, number, sampled in super().sample(*arguments):
                yield index, number, sampled if number else replace(sampled, finish_reason="abort")

    scripted = saying(lambda *_: Solution("", "7"))
    sampler = Aborting(scripted.script, scripted.tokenizer, scripted.model_config)
    rollout = rolling(sampler, SamplingParams(n=3))
    (group,) = rollout.run([item()])
    assert [t.scores["accuracy"] for t in group] == [1.0, 1.0] and rollout.counts == {"aborted": 1}


class Guess(Task):
    """Two turns: the first guess is judged, the second counts. One environment breaks, one goes on for ever."""

    @property
    def name(self):
        return "guess"

    @property
    def has_turns(self):
        return True

    def problems(self, split, seed):
        yield from (Problem("Guess a digit.", "7", "7"), Problem("Guess a digit.", "broken", "7"))

    def step(self, problem, messages):
        if problem.key == "broken":
            raise SlingshotError("guess: no such digit")
        guess = messages[-1]["content"]
        if guess == problem.answer or (len(messages) > 3 and problem.key != "endless"):
            return None
        return [{"role": "user", "content": f"Not {guess}. Higher."}]


def conversing(saying, script, *keys, n=1, length=256):
    rollout = rolling(saying(script, length), SamplingParams(n=n))
    return rollout, rollout.run([item(Problem("Guess a digit.", key, "7"), Guess()) for key in keys])


def test_a_conversation_of_two_turns(saying, tokenizer):
    """Sample 0 is right at once, 1 at the second guess, 2 never; the environment's words carry no mask."""
    keys = []

    def script(key, index):
        keys.append(key)
        second = {"step/7/1": Solution("higher", "7"), "step/7/2": Solution("hm", "6")}
        return second.get(key) or Solution(f"first {index}", "743"[index])

    _, (group,) = conversing(saying, script, "7", n=3)
    assert [t.scores["accuracy"] for t in group] == [1.0, 1.0, 0.0] and [len(t.turns) for t in group] == [1, 2, 2]
    assert keys == ["step/7"] * 3 + ["step/7/1", "step/7/2"]
    one, two = group[0], group[1]
    first, second = two.turns
    assert two.ids[: one.turns[0].start] == one.ids[: one.turns[0].start]
    assert tokenizer.decode(two.ids[first.start : first.end]) == "first 1\n</think>\n\n4"
    assert [turn.parsed for turn in two.turns] == [Parsed("first 1", "4", True), Parsed("higher", "7", True)]
    environment = two.ids[first.end : second.start]
    assert environment == turn_suffix(tokenizer, [{"role": "user", "content": "Not 4. Higher."}])
    # As R1's template frames a second question and begins a response, after the end token that the model said itself.
    question = tokenizer.encode_chat([{"role": "user", "content": "Not 4. Higher."}])
    assert two.ids[first.end - 1] == tokenizer.eos_id and environment == question[1:]
    n_first, n_second = first.end - first.start, second.end - second.start
    assert two.mask == [0] * first.start + [1] * n_first + [0] * len(environment) + [1] * n_second
    assert [bool(logprob) for logprob in two.logprobs] == [bool(sampled) for sampled in two.mask]
    assert [m["content"] for m in two.messages] == ["Guess a digit.", "4", "Not 4. Higher.", "7"]


def test_an_environment_that_breaks_earns_nothing_and_ends_nothing(saying):
    rollout, groups = conversing(saying, lambda *_: Solution("so", "7"), "broken", "7")
    assert [group[0].scores["accuracy"] for group in groups] == [0.0, 1.0] and rollout.counts == {"unverified": 1}
    assert [group[0].verified for group in groups] == [False, True]


@pytest.mark.parametrize("length", [256, 160])  # the model is cut off, the environment has no room
def test_a_conversation_that_outgrows_the_model_is_cut_off(saying, length):
    _, ((endless,),) = conversing(saying, lambda *_: Solution("so", "1"), "endless", length=length)
    assert not endless.finished and len(endless.turns) > 4 and length - 26 < len(endless.ids) <= length
    assert (endless.scores["accuracy"], endless.scores["format"], endless.mask[-1]) == (0.0, 0.0, 1)
