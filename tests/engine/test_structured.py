"""Structured answers: a random model says what fits, after its reasoning and never in it; what cannot be is refused."""

import json
import re
import sys

import pytest

from slingshot.base.errors import SlingshotError
from slingshot.engine.engine import Engine
from slingshot.engine.sampling import SamplingParams
from slingshot.engine.structured import GrammarError

PROMPT = [20, 31, 40, 7]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "名": {"enum": ["x", "é😀"]}, "n": {"type": "integer", "maximum": 9}},
    "required": ["ok", "名", "n"],
}
CHOICES = ("yes", "no", 'a "quoted"\\ one\n', "足す😀")
EBNF = 'root ::= "(" item ("," item)? ")"\nitem ::= [0-9] | "(" [a-c] ")"'


def fits_schema(text):
    value = json.loads(text)
    return type(value["ok"]) is bool and value["名"] in ("x", "é😀") and value["n"] <= 9 and len(value) == 3


STRUCTURES = {
    "json_schema": (SCHEMA, fits_schema),
    "regex": (r"[0-9]{2,4}-(いく|つ)+!", re.compile(r"[0-9]{2,4}-(いく|つ)+!").fullmatch),
    "choice": (CHOICES, CHOICES.__contains__),
    "grammar": (EBNF, re.compile(r"\(([0-9]|\([a-c]\))(,([0-9]|\([a-c]\)))?\)").fullmatch),
}


@pytest.mark.parametrize("kind", STRUCTURES)
def test_every_answer_fits(dense_model, tokenizer, kind):
    """Of 12 samples at a high temperature; those that were cut at the length began as one that fits."""
    structure, fits = STRUCTURES[kind]
    params = SamplingParams(max_tokens=200, temperature=1.5, n=12, **{kind: structure})
    (output,) = Engine(dense_model, tokenizer).generate([PROMPT], params)
    whole = [completion for completion in output.outputs if completion.finish_reason == "stop"]
    assert len(whole) > 3 and all(fits(completion.answer) for completion in whole)
    assert len({completion.answer for completion in whole}) > 1
    assert all(completion.token_ids[-1] == tokenizer.eos_id for completion in whole)


@pytest.mark.parametrize("kind", STRUCTURES)
def test_a_structure_binds_after_the_reasoning_and_never_in_it(tokenizer, say, asked, kind):
    """Not where the model ends its reasoning by itself, nor where its budget does, nor where it would end there."""
    structure, fits = STRUCTURES[kind]
    thought = "3 plus 4 is 7, [0-9] then {go on}"
    script = [*tokenizer.encode(thought), tokenizer.eos_id, tokenizer.end_think_id]
    script[-2:-2] = tokenizer.encode(" until")
    params = {kind: structure, "max_tokens": 300}
    free, led = say([(asked, script, params), (asked, script, {**params, "thinking_budget": 8})])
    for output, reasoning in ((free, f"{thought} until"), (led, tokenizer.decode(script[:8]))):
        (completion,) = output.outputs
        assert completion.reasoning.startswith(reasoning) and fits(completion.answer)
        at = completion.token_ids.index(tokenizer.end_think_id)
        words = tokenizer.encode("\n\n")
        assert completion.token_ids[at + 1 :][: len(words)] == words


def test_other_requests_of_the_batch_are_free(dense_model, tokenizer):
    engine, free = Engine(dense_model, tokenizer), SamplingParams(max_tokens=20, temperature=1.2, n=3)
    structured = [SamplingParams(max_tokens=40, n=2, **{kind: STRUCTURES[kind][0]}) for kind in STRUCTURES]
    outputs = engine.generate([PROMPT] * 5, [free, *structured])
    alone = engine.generate([PROMPT], free)
    assert [each.token_ids for each in outputs[0].outputs] == [each.token_ids for each in alone[0].outputs]


@pytest.mark.parametrize(
    ("structure", "named"),
    [
        ({"json_schema": "{"}, "json_schema '{' cannot be used"), ({"json_schema": False}, "cannot accept any value"),
        ({"json_schema": {"type": "strange"}}, 'Unsupported type "strange"'), ({"regex": "["}, "Unclosed"),
        ({"json_schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "minimum greater than maximum"),
        ({"json_schema": {"properties": {"not": {"not": {}}}}}, "json_schema: 'not' is not supported; leave it out"),
        ({"json_schema": {"items": [{"type": "array", "uniqueItems": True}]}}, "'uniqueItems' is not supported"),
        ({"json_schema": {"$defs": {"a": {"$ref": "http://a"}}}}, r"a '\$ref' to elsewhere \('http://a'\)"),
        ({"json_schema": {"type": "object", "required": ["a"]}}, "'a', required but not among 'properties'"),
        ({"json_schema": {"type": "object", "anyOf": []}}, "'anyOf' beside other demands"),
        ({"json_schema": {"allOf": [{}, {}]}}, "'allOf' of several"), ({"grammar": 'root ::= "a" b'}, "not defined"),
        ({"json_schema": {"type": "string", "pattern": "a", "minLength": 3}}, "'pattern' together with a length"),
        ({"grammar": 'start ::= "a"'}, "cannot be used"), ({"regex": "(?=a)b"}, "Lookahead is not supported"),
    ],
)  # fmt: skip
def test_a_structure_that_cannot_be_is_refused_and_other_requests_go_on(dense_model, tokenizer, structure, named):
    engine = Engine(dense_model, tokenizer)
    running = engine.add(PROMPT, SamplingParams(max_tokens=3))
    with pytest.raises(GrammarError, match=named) as refused:
        engine.add(PROMPT, SamplingParams(**structure))
    assert "\n" not in str(refused.value)
    outputs = [output for _ in range(5) for output in engine.step()]
    assert [output.request_id for output in outputs] == [running] and engine.unfinished == 0


def test_without_xgrammar_it_is_said_how_to_get_it(dense_model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(SlingshotError, match=r"needs the package xgrammar: pip install 'slingshot-lm\[structured\]'"):
        Engine(dense_model, tokenizer).add(PROMPT, SamplingParams(regex="a"))


def test_names_of_keywords_are_no_keywords_as_properties(dense_model, tokenizer):
    schema = {"type": "object", "properties": {"not": {"type": "boolean"}, "contains": {"enum": [{"not": 1}]}}}
    (output,) = Engine(dense_model, tokenizer).generate(
        [PROMPT], SamplingParams(max_tokens=60, n=3, json_schema=schema)
    )
    assert all(completion.text.lstrip().startswith("{") for completion in output.outputs)


def test_an_answer_that_cannot_go_on_fails_alone(dense_model, tokenizer):
    """After the first digit nothing is left: two rules contradict each other only then."""
    engine, digits = Engine(dense_model, tokenizer), [tokenizer.encode(str(digit))[0] for digit in range(10)]
    params = SamplingParams(max_tokens=9, regex="a[0-9]b", bad_words=[[digit] for digit in digits])
    failing, running = engine.add(PROMPT, params), engine.add(PROMPT, SamplingParams(max_tokens=6, ignore_eos=True))
    outputs = {output.request_id: output for _ in range(9) for output in engine.step()}
    assert outputs[failing].outputs[0].finish_reason == "error" and outputs[failing].outputs[0].text == "a"
    assert "no token can follow" in str(outputs[failing].error) and engine.unfinished == 0
    assert outputs[running].error is None and len(outputs[running].outputs[0].token_ids) == 6
    stuck, whole = engine.generate([PROMPT] * 2, [params, SamplingParams(max_tokens=6, ignore_eos=True)])
    assert "no token can follow" in str(stuck.error) and stuck.outputs == outputs[failing].outputs
    assert whole.error is None and whole.outputs == outputs[running].outputs
    for wants_a_whole_one in (lambda: stuck.whole, lambda: list(engine.stream(PROMPT, params))):
        with pytest.raises(SlingshotError, match="no token can follow"):
            wants_a_whole_one()


@pytest.mark.slow
def test_a_grammar_that_takes_too_long_to_be_followed_fails_alone(dense_model, tokenizer):
    """Every token can be read in more ways than the one before."""
    engine = Engine(dense_model, tokenizer)
    rules = [f"r{number} ::= r{number + 1} r{number + 1} | r{number + 1}" for number in range(36)]
    grammar = "\n".join(["root ::= r0", *rules, 'r36 ::= "z" | ""'])
    others = SamplingParams(max_tokens=6, ignore_eos=True)
    failing = SamplingParams(max_tokens=200, grammar=grammar, logit_bias={tokenizer.eos_id: -100})
    slow, free = engine.generate([PROMPT] * 2, [failing, others])
    assert "takes too long to be followed" in str(slow.error) and set(slow.outputs[0].text) <= {"z"}
    assert free.error is None and free.outputs == engine.generate([PROMPT], others)[0].outputs
