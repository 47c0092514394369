"""Tasks by name: how a recipe names them, what there is, and what is said to wrong names."""

import pytest

from slingshot.base.config import Strict
from slingshot.base.errors import SlingshotError
from slingshot.tasks.loader import KINDS, TaskConfig, load_task, task_keys


class Asked(Strict):
    tasks: list[TaskConfig]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("arithmetic", ["arithmetic"]), (["hhmm.py", {"name": "countdown"}], ["hhmm.py", "countdown"]),
        ({"name": "a.py"}, ["a.py"]), ([{"name": "a.py", "weight": 2}], ["a.py"]),
    ],
)  # fmt: skip
def test_tasks_are_named_by_text_by_table_or_by_a_list_of_either(given, named):
    assert [task.name for task in Asked.parse({"tasks": given}).tasks] == named
    assert TaskConfig.parse("hhmm.py") == TaskConfig(name="hhmm.py")


def test_what_names_no_task_is_refused():
    with pytest.raises(SlingshotError, match=r"rl\.tasks: .*list, got 3"):
        Asked.parse({"tasks": 3}, "rl")
    with pytest.raises(SlingshotError, match=r"rl\.tasks\.0\.wieght: unknown key; did you mean weight\?"):
        Asked.parse({"tasks": [{"name": "a", "wieght": 1}]}, "rl")


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("arithmetics", {}, r"^task 'arithmetics' is unknown; did you mean arithmetic\?$"),
        ("zzz", {}, "^task 'zzz' is unknown; there are: arithmetic, .*, dataset:SOURCE, path/to/file.py$"),
        ("arithmetic", {"max_term": 3}, r"^arithmetic\.max_term: unknown key; did you mean max_terms\?$"),
        ("arithmetic", {"digits": "many"}, "arithmetic.digits: .*integer.*'many'"),
        ("arithmetic", {"min_terms": 9}, "arithmetic: min_terms 9 is above max_terms 8"),
        ("arithmetic", {"digits": 0}, "arithmetic.digits: .*greater than or equal to 1, got 0"),
        ("arithmetic", {"operators": "+/"}, r"arithmetic\.operators: .*, got '\+/'"),
        ("arithmetic", {"languages": []}, "arithmetic.languages: .*at least 1 item"),
        ("arithmetic", {"languages": ["fr"]}, "arithmetic.languages.0: .*'fr'"),
        ("countdown", {"n_numbers": 1}, "countdown.n_numbers: .*, got 1"),
        ("countdown", {"max_target": 5}, "countdown: max_number 10 is above max_target 5"),
        ("countdown", {"operators": "^"}, r"countdown\.operators: .*, got '\^'"),
        ("countdown", {"languages": []}, "countdown.languages: .*at least 1 item"),
        ("arithmetic", {"operators": "+x", "digits": 8}, "arithmetic: products have up to 64 digits, 63 can be read"),
        ("knights", {"forms": ["is", "is"]}, 'knights: forms: of puzzles of "is" alone none has exactly one solution'),
        ("multiplication", {"min_digits": 4}, "multiplication: min_digits 4 is above max_digits 3"),
        ("knights", {"min_people": 4}, "knights: min_people 4 is above max_people 3"),
        ("knights", {"forms": ["nor"]}, "knights.forms.0: .*'nor'"),
        ("code", {"level": 4}, "code.level: .*less than or equal to 3, got 4"),
        ("code", {"source": "none.jsonl"}, "none.jsonl"),
        ("nowhere/task.py", {}, r"^nowhere/task\.py: no such file; a task is one Python file with problems\(split, se"),
        ("gym:chain_sums", {}, r"^gym:chain_sums: dataset 'chain_sums' is unknown; did you mean chain_sum\?$"),
        ("gym:chain_sum", {"min_terms": {1}}, r"^gym:chain_sum\.params\.min_terms: .*JSON"),
    ],
)
def test_what_cannot_be_loaded_is_named_with_the_way_out(name, params, message):
    with pytest.raises(SlingshotError, match=message):
        load_task(name, **params)


@pytest.mark.slow
def test_every_kind_tells_its_parameters_in_words():
    told = {name: task_keys(name) for name in (*KINDS, "gym:chain_sum")}
    own = (
        "arithmetic",
        "code",
        "countdown",
        "knights",
        "multiplication",
        "needle",
        "dataset:SOURCE",
        "path/to/file.py",
    )
    assert all(key.meaning for name in own for key in told[name])
    digits = next(key for key in told["arithmetic"] if key.name == "digits")
    said = "whole number at least 1 and at most 9", "1", "digits of a number, at most"
    assert (digits.kind, digits.default, digits.meaning) == said
    sums = {key.name: (key.kind, key.default) for key in told["gym:chain_sum"]}
    assert sums["min_terms"] == ("whole number", "2") and sums["allow_negation"] == ("true or false", "false")
    assert {"gym:composite", "gym:chain_sum"} < {key.name for key in told["gym:NAME"]}
    with pytest.raises(SlingshotError, match=r"task 'countdwn' is unknown; did you mean countdown\?"):
        task_keys("countdwn")
