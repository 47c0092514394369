"""Stop strings, and the budget of a reasoning: what ends what, wherever tokens end."""

import itertools
import re

import pytest
import torch

from slingshot.engine.engine import Engine
from slingshot.engine.row_sampler import RowSampler
from slingshot.engine.sampling import SamplingParams
from slingshot.engine.sequence import Request
from slingshot.engine.vocabulary import Vocabulary
from slingshot.text.tokenizer import Tokenizer

THOUGHT, ANSWER = "3 plus 4 is 7, 7 minus 2 is 5.", "The end: 5"


def reasoned(tokenizer, thought=THOUGHT, answer=ANSWER):
    return [*tokenizer.encode(thought), tokenizer.end_think_id, *tokenizer.encode(answer)]


@pytest.mark.parametrize("budget", [0, 1, 4, 7])
def test_a_budget_ends_the_reasoning_in_the_templates_words_and_the_model_answers(tokenizer, say, asked, budget):
    """Whatever the model wanted to think; the answer is its own."""
    ends = [*tokenizer.encode("\n"), tokenizer.end_think_id, *tokenizer.encode("\n\n")]
    script = [*tokenizer.encode(THOUGHT)[:budget], *[0] * len(ends), *tokenizer.encode(ANSWER)]
    (output,) = say([(asked, script, {"thinking_budget": budget})])
    (completion,) = output.outputs
    assert completion.token_ids == [*script[:budget], *ends, *tokenizer.encode(ANSWER), tokenizer.eos_id]
    assert completion.reasoning == tokenizer.decode(script[:budget]).rstrip("\n") and completion.answer == ANSWER
    assert completion.finish_reason == "stop" and len(completion.logprobs) == len(completion.token_ids)
    assert max(completion.logprobs[budget : budget + len(ends)]) < -10 < min(completion.logprobs[:budget] or [0])


@pytest.mark.parametrize(("begun", "breaks"), [("\n", 1), (THOUGHT, 1), (THOUGHT + "\n", 0)])
def test_a_reasoning_that_the_prompt_has_begun_is_closed_behind_one_line_break(tokenizer, say, asked, begun, breaks):
    ends = [*tokenizer.encode("\n" * breaks), tokenizer.end_think_id, *tokenizer.encode("\n\n")]
    script = [*[0] * len(ends), *tokenizer.encode(ANSWER)]
    (output,) = say([(asked + tokenizer.encode(begun), script, {"thinking_budget": 0})])
    assert output.outputs[0].token_ids == [*ends, *tokenizer.encode(ANSWER), tokenizer.eos_id]


@pytest.mark.parametrize("spare", [-1, 0, 1, 50])
def test_a_budget_that_is_just_enough_or_more_changes_no_text(tokenizer, say, asked, spare):
    script = reasoned(tokenizer, THOUGHT + "\n", "\n\n" + ANSWER)
    size = len(tokenizer.encode(THOUGHT + "\n"))
    ((completion,),) = [output.outputs for output in say([(asked, script, {"thinking_budget": size + spare})])]
    assert (completion.reasoning, completion.answer) == (THOUGHT, ANSWER)
    if spare > 0:
        assert completion.token_ids == [*script, tokenizer.eos_id]


@pytest.mark.parametrize("budget", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("stubborn", [False, True])
def test_a_budget_never_ends_inside_a_character(tokenizer, say, asked, budget, stubborn):
    """The emoji comes in four tokens. A model that would rather say something else must end it all the same."""
    ids = tokenizer.encode("a😀b")
    assert len(ids) == 6
    rest = tokenizer.encode(THOUGHT) if stubborn else ids[budget:]
    ((completion,),) = [
        output.outputs for output in say([(asked, [*ids[:budget], *rest], {"thinking_budget": budget})])
    ]
    assert "\ufffd" not in completion.text and completion.reasoning.startswith("a")
    used = completion.token_ids.index(tokenizer.end_think_id)
    assert budget <= used <= budget + 3 + 1  # a line break belongs to the closing words
    assert len(completion.reasoning) == (1 if budget == 1 else 3 if budget == 6 else 2)
    if not stubborn and budget < 6:
        assert completion.reasoning == "a😀"[: 1 if budget == 1 else 2]


def test_each_request_has_its_own_budget(tokenizer, say, asked):
    """None among them, one that thinks by itself, and one whose prompt opens no reasoning."""
    script = reasoned(tokenizer)
    budgets = [3, None, 0, 6]
    outputs = say([(asked, script, {"thinking_budget": budget, "max_tokens": 60}) for budget in budgets])
    thought = [tokenizer.decode(tokenizer.encode(THOUGHT)[:budget]) for budget in (3, None, 0, 6)]
    assert [output.outputs[0].reasoning for output in outputs] == thought
    begun = [tokenizer.think_id, *script]
    (plain,), (opened,) = (
        output.outputs
        for output in say(
            [([9, 9], tokenizer.encode(ANSWER), {"thinking_budget": 0}), ([9], begun, {"thinking_budget": 3})]
        )
    )
    assert (plain.reasoning, plain.answer) == (None, ANSWER)
    assert opened.reasoning == tokenizer.decode(tokenizer.encode(THOUGHT)[:3])


def test_a_budget_is_part_of_max_tokens(tokenizer, say, asked):
    ((completion,),) = [
        output.outputs for output in say([(asked, reasoned(tokenizer), {"thinking_budget": 3, "max_tokens": 5})])
    ]
    assert completion.finish_reason == "length" and len(completion.token_ids) == 5


def test_with_a_budget_no_sample_ends_in_its_reasoning(tokenizer, say, asked):
    script = [*tokenizer.encode("3 "), tokenizer.eos_id, *tokenizer.encode("4"), tokenizer.end_think_id, 20]
    free, led = say([(asked, script, {}), (asked, script, {"thinking_budget": 50, "max_tokens": 60})])
    assert free.outputs[0].token_ids == script[: script.index(tokenizer.eos_id) + 1]
    assert len(led.outputs[0].token_ids) > len(script) and led.outputs[0].answer


def test_what_is_streamed_is_what_the_completion_holds(dense_model, tokenizer, asked):
    engine = Engine(dense_model, tokenizer)
    for budget, seed in itertools.product((0, 3, 12), range(4)):
        params = SamplingParams(max_tokens=40, temperature=1.5, seed=seed, thinking_budget=budget)
        deltas, told = engine.stream(asked, params), {"reasoning": "", "answer": ""}
        try:
            while True:
                kind, text = next(deltas)
                told[kind] += text
        except StopIteration as stop:
            completion = stop.value
        assert told == {"reasoning": completion.reasoning, "answer": completion.answer}
        assert completion.token_ids.index(tokenizer.end_think_id) <= budget + 3 + 1


def test_closing_words_are_the_templates_where_it_shows_them(tokenizer):
    words = Vocabulary(tokenizer, tokenizer.vocab_size).closing
    assert words == ([*tokenizer.encode("\n"), tokenizer.end_think_id], tokenizer.encode("\n\n"))
    template = (
        "{% for m in messages %}<｜User｜>{% if m.reasoning_content %}<think>{{ m.reasoning_content }} ok</think> So: "
        "{% endif %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
    )
    other = Tokenizer(tokenizer._backend, {**tokenizer.config, "chat_template": template}, tokenizer.eos_ids)
    words = Vocabulary(other, other.vocab_size)
    assert words.closing == ([*tokenizer.encode(" ok"), tokenizer.end_think_id], tokenizer.encode(" So: "))
    assert words.may_begin_reasoning and not Vocabulary(tokenizer, tokenizer.vocab_size).may_begin_reasoning


def test_stop_strings_end_answers_not_reasoning(tokenizer, say, asked):
    """Said in the reasoning they stop nothing; its closing tag may be one."""
    script = reasoned(tokenizer, "3 is 4, the end", "4: the end of it")
    cases = {("the end",): "4: ", ("is", "of"): "4: the end ", ("</think>",): "", ("d</think>",): "4: the end of it"}
    for output, answer in zip(say([(asked, script, {"stop": stop}) for stop in cases]), cases.values(), strict=True):
        assert (output.outputs[0].reasoning, output.outputs[0].answer) == ("3 is 4, the end", answer)
    ((plain,),) = [output.outputs for output in say([([9, 9], tokenizer.encode("3 is the end"), {"stop": ("is",)})])]
    assert plain.answer == "3 " and plain.finish_reason == "stop"


def test_tags_of_plain_text_are_closed_too(tokenizer):
    """A vocabulary without think tokens: the tag is spelt, the budget and the answer's form hold all the same."""
    described, think = tokenizer.description(), ("<think>", "</think>")
    added = {token["content"]: token["special"] for token in described["added_tokens"] if token["content"] not in think}
    vocab = {token: id for token, id in described["model"]["vocab"].items() if token not in think}
    merges = [tuple(pair) for pair in described["model"]["merges"]]
    plain = Tokenizer.from_bpe(vocab, merges, added, tokenizer.config, eos_ids=tokenizer.eos_ids)
    assert plain.think_id is None
    prompt, vocabulary = plain.encode_chat([{"role": "user", "content": "3"}]), Vocabulary(plain, tokenizer.vocab_size)
    params = SamplingParams(thinking_budget=4, regex="[0-9]{3}", max_tokens=60)
    (sequence,) = Request(0, prompt, params, "key", 500, vocabulary, False).sequences
    generator, sampler = torch.Generator().manual_seed(0), RowSampler()
    while sequence.finish_reason is None:
        sequence.push(
            *(each[0] for each in sampler.draw(torch.randn(1, vocabulary.size, generator=generator), [sequence]))
        )
    completion = sequence.completion()
    assert completion.text.count("</think>") == 1 and re.fullmatch("[0-9]{3}", completion.answer)
    spelt = completion.text.partition("</think>")
    assert spelt[0].endswith("\n") and spelt[2] == f"\n\n{completion.answer}"
