"""The needle: what is asked for stands in the text once, as deep as the problem says, and only its number is right."""

import itertools
import random
import re
from collections import Counter

import pytest

from slingshot.tasks.loader import load_task

CODE = {"en": r"The code of the (\w+) is (\d{3})\. ", "ja": r"(\w)の番号は(\d{3})。"}
ASKED = {"en": r"What is the code of the (\w+)\?$", "ja": r"(\w)の番号は\?$"}


@pytest.mark.parametrize("language", ["en", "ja"])
def test_the_answer_stands_in_the_text_once_at_its_level(language):
    task, levels = load_task("needle", needles=3, min_sentences=40, max_sentences=80, languages=[language]), Counter()
    for problem in itertools.islice(task.problems("train", 0), 200):
        told = [(match.start() / len(problem.prompt), *match.groups()) for match in
                re.finditer(CODE[language], problem.prompt)]  # fmt: skip
        (asked,) = re.findall(ASKED[language], problem.prompt)
        assert len(told) == 3 and len({thing for _, thing, _ in told}) == 3
        ((place, _, code),) = [needle for needle in told if needle[1] == asked]
        assert problem.answer == code and problem.language == language
        quarter = int(problem.data["level"][0])
        assert (quarter - 1) / 4 - 0.15 < place < quarter / 4 + 0.15
        assert f"{asked}" in (said := task.solution(problem, "steps", random.Random(0)).reasoning) and code in said
        levels[problem.data["level"]] += 1
        assert [task.verify(problem, text).value for text in (code, f" {code}.", "", f"{code}0")] == [
            1.0,
            1.0,
            0.0,
            0.0,
        ]
    assert set(levels) == {"1/4", "2/4", "3/4", "4/4"} and min(levels.values()) > 25


def test_a_haystack_is_as_long_as_asked():
    task = load_task("needle", min_sentences=500, max_sentences=500, needles=1, languages=["en"])
    problem = next(task.problems("test", 0))
    assert len(re.findall(r"\. ", problem.prompt)) == 501
